"""Tables that people and spreadsheets write."""

import csv
import functools
import os
import pathlib
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

import hypothesis
import pytest
import toy
from hypothesis import strategies as st

import dynamical_jax as dj
from dynamical_jax import labeling


def write(path, text):
    path.write_bytes(text.encode())
    return path


@pytest.mark.parametrize(
    "text",
    [
        "path,label\na.png,cat\nb.png,dog\n",
        "path,label\r\na.png,cat\r\nb.png,dog",  # Windows, without a last end of line
        "\ufeffpath;label\na.png;cat\nb.png;dog\n",  # a spreadsheet's byte-order mark, semicolons
        "label\tnote\tpath\ncat\tblurred\t./a.png\ndog\t\t b.png \n",
        'path,label\n"a.png","cat"\nb.png,dog\nc.png,\n,\nb.png,dog\n',  # empty and double rows
        "Path,LABEL\na.png,cat\nb.png,dog\n",
        "path,label\npictures/../a.png,cat\nb.png, dog\n",
    ],
)
def test_the_same_labels_however_they_are_written(tmp_path, text):
    table = write(tmp_path / "labels.csv", text)
    assert labeling.read_labels(table, "images").by_path == {"a.png": "cat", "b.png": "dog"}


def test_absolute_paths(tmp_path):
    table = write(tmp_path / "labels.csv", f"path,label\n{tmp_path}/in/a.png,cat\n")
    assert labeling.read_labels(table, str(tmp_path)).by_path == {"in/a.png": "cat"}


@pytest.mark.parametrize("text", [None, "", " \n"])
def test_no_table_no_labels(tmp_path, text):
    table = tmp_path / "labels.csv"
    if text is not None:
        write(table, text)
    assert labeling.read_labels(table, "images").by_path == {}
    labeling.add_labels(table, {"a.png": "cat"})
    assert table.read_text() == "path,label\na.png,cat\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\na.png,cat\n", "has the columns file, label; it needs path and label"),
        ("path,label\na.png,cat\na.png,dog\n", r"line 3 of .* labels a.png 'dog', .* 'cat'"),
        ("path,label\n,cat\n", "line 2 of .* has a label but no path"),
        ("path,label\na.png,cat,dog\n", "line 2 of .* has more cells than the header"),
        ("path,label,label\na.png,cat,dog\n", "line 1 of .* names the column label twice"),
        ("path,label,Path\na.png,cat,\n", "line 1 of .* names the column path twice"),
        ('path,label\n"a.png,cat\nb.png,dog\n', "line 3 of .* is no CSV: unexpected end of data"),
        ('path,label\n"a".png,cat\n', "line 2 of .* is no CSV: ',' expected after '\"'"),
        ('path,label\na.png,"big\ncat"\n', r"line 3 of .* in its label: 'big\\ncat'"),
        ("path,label\na.png,big\x00cat\n", r"line 2 of .*"),
        ("path,label\na.png,big\x07cat\n", r"line 2 of .* in its label: 'big\\x07cat'"),
        (f"path,label\na.png,{'m' * 200_000}\n", "line 2 of .* field larger than field limit"),
    ],
)
def test_what_is_no_table_of_labels(tmp_path, text, message):
    table = write(tmp_path / "labels.csv", text)
    with pytest.raises(dj.UserError, match=message):
        labeling.read_labels(table, "images")


def test_other_encodings(tmp_path):
    table = tmp_path / "labels.csv"
    table.write_bytes("path,label\na.png,Käse\n".encode("latin-1"))
    with pytest.raises(dj.UserError, match="is not UTF-8; save it as CSV in UTF-8"):
        labeling.read_labels(table, "images")
    with pytest.raises(dj.UserError, match="cannot read"):
        labeling.read_labels(tmp_path, "images")


def test_two_tables_that_disagree(tmp_path):
    joined = labeling.join_labels({"a": "cat"}, {"a": "cat", "b": "dog"}, tmp_path)
    assert joined == {"a": "cat", "b": "dog"}
    with pytest.raises(dj.UserError, match="labels a 'dog', but it is labeled 'cat' already"):
        labeling.join_labels({"a": "cat"}, {"a": "dog"}, tmp_path)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("path,label\na,cat\n", "path,label\na,cat\nb,dog\nc,big cat\n"),
        ("Path,Label\na,cat\n", "Path,Label\na,cat\nb,dog\nc,big cat\n"),
        ("path,label\na,cat", "path,label\na,cat\nb,dog\nc,big cat\n"),
        (
            "\ufefflabel;by;path\r\ncat;me;a\r\n",
            "\ufefflabel;by;path\r\ncat;me;a\r\ndog;;b\r\nbig cat;;c\r\n",
        ),
    ],
)
def test_adding_keeps_the_form_of_the_table(tmp_path, before, after):
    table = write(tmp_path / "labels.csv", before)
    labeling.add_labels(table, {"b": "dog", "c": "big cat"})
    assert table.read_bytes() == after.encode()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("path,label\na,cat\nb,dog\n", "path,label\na,owl\nc,ant\n"),
        ("path,label\nx/../a,cat\n./a,cat\nb,dog", "path,label\nx/../a,owl\n./a,owl\nc,ant\n"),
        ("path,label\na,\n", "path,label\na,owl\nc,ant\n"),
        (
            '\ufeffLabel;by;path\r\ncat;me;a\r\ndog;you;b\r\n"x;y";;d\r\n',
            '\ufeffLabel;by;path\r\nowl;me;a\r\n;you;b\r\n"x;y";;d\r\nant;;c\r\n',
        ),
        (None, "path,label\na,owl\nc,ant\n"),
    ],
)
def test_changing_keeps_the_form_of_the_table(tmp_path, before, after):
    table = tmp_path / "labels.csv"
    if before is not None:
        write(table, before)
    labeling.tables.change_labels(table, {"a": "owl", "b": None, "c": "ant"}, "images")
    assert table.read_bytes() == after.encode()


def test_a_proposal_looks_like_the_table_of_labels(tmp_path):
    table = write(tmp_path / "labels.csv", "\ufeffpath;label\na.png;cat\n")
    labeling.write_proposal(tmp_path / "to_label.csv", [labeling.Proposed("ö.png")], table)
    written = (tmp_path / "to_label.csv").read_text()
    assert written == "\ufeffpath;label;predicted;confidence;score;rank\nö.png;;;;;1\n"


def test_a_proposal_comes_back_filled_in(tmp_path):
    table = tmp_path / "to_label.csv"
    proposed = [
        labeling.Proposed("in, out/a.png", "cat", 0.9, 1.5),
        labeling.Proposed("b.png", "dog", 0.5, 0.25),
        labeling.Proposed("c.png", "dog", 0.5, -1.0),
        labeling.Proposed("d.png"),
    ]
    labeling.write_proposal(table, proposed)
    assert table.read_text().splitlines()[:3] == [
        "path,label,predicted,confidence,score,rank",
        '"in, out/a.png",,cat,0.9,1.5,1',
        "b.png,,dog,0.5,0.25,2",
    ]
    assert labeling.read_labels(table, "images") == ({}, 0, 0)
    text = table.read_text().replace(",,cat", ",cat,cat").replace("b.png,,", "b.png,cat,")
    write(table, text.replace("d.png,,", "d.png,owl,"))
    labels = labeling.read_labels(table, "images")
    assert labels.by_path == {"in, out/a.png": "cat", "b.png": "cat", "d.png": "owl"}
    assert (labels.num_right, labels.num_predicted) == (1, 2)


NAMES = st.builds(
    os.fsdecode, st.binary(min_size=1, max_size=8).filter(lambda name: not {0, 47} & set(name))
)
TEXTS = NAMES | st.from_regex(r"'{0,2}[=+@ -]?[a-z0-9; ,\"]{0,3}", fullmatch=True).filter(bool)
PATHS = TEXTS.filter(lambda name: name not in {".", ".."})
LABELS = st.text(max_size=5) | st.from_regex(r"'{0,2}[=+@-]?[a-z0-9; ,\"]{0,3}", fullmatch=True)


def is_label(text):
    return text == text.strip() != "" and not labeling.tables.CONTROL.search(text)


@hypothesis.given(
    st.dictionaries(PATHS, LABELS.filter(is_label), min_size=1, max_size=4), st.sampled_from(",;\t")
)
@hypothesis.settings(max_examples=100, deadline=None, derandomize=True)
def test_whatever_is_written_is_read_back(labels, delimiter):
    with tempfile.TemporaryDirectory() as folder:
        table = write(pathlib.Path(folder, "labels.csv"), f"path{delimiter}label\n")
        labeling.add_labels(table, labels)
        assert labeling.read_labels(table, folder).by_path == labels
        # A proposal, of which a program that knows nothing of ours fills in the labels.
        proposal = pathlib.Path(folder, "to_label.csv")
        guesses = [labeling.Proposed(path, label, 0.5, 1.0) for path, label in labels.items()]
        labeling.write_proposal(proposal, guesses, table)
        with proposal.open(newline="") as file:
            rows = list(csv.reader(file, delimiter=delimiter))
        for row in rows[1:]:
            row[1] = row[2]
        with proposal.open("w", newline="") as file:
            csv.writer(file, delimiter=delimiter).writerows(rows)
        assert labeling.read_labels(proposal, folder) == (labels, len(labels), len(labels))


@pytest.mark.parametrize("text", ["=1+1", "+cat", "-cat", "@cat", "'=cat"])
def test_no_cell_is_a_formula(tmp_path, text):
    table = tmp_path / "labels.csv"
    labeling.add_labels(table, {text: text})
    (cells,) = list(csv.reader(table.read_text().splitlines()[1:]))
    assert all(cell[0] in "'." for cell in cells)
    labeling.add_labels(table, {"a": "-1"})
    assert table.read_text().endswith("a,-1\n")  # A number is no formula.


def add_one_by_one(folder, name):
    """Fills in a hundred proposals, each of one image, and adds each to the table."""
    paths = [f"{name}{i}" for name in "ab" for i in range(100)]
    for i in range(100):
        proposal = write(folder / f"{name}.csv", f"path,label\n{name}{i},cat\n")
        labeling.folder.take_over(folder / "labels.csv", proposal, str(folder), paths)


def test_two_threads_add_their_labels_to_one_table(tmp_path):
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(functools.partial(add_one_by_one, tmp_path), "ab"))
    assert len(labeling.read_labels(tmp_path / "labels.csv", str(tmp_path)).by_path) == 200


@pytest.mark.slow  # 4 s: two processes import JAX; the threads take the same lock of the file.
def test_two_processes_add_their_labels_to_one_table(tmp_path):
    program = """
import pathlib, sys
from dynamical_jax import labeling
table = pathlib.Path("labels.csv")
paths = [f"{name}{i}" for name in "ab" for i in range(100)]
for i in range(100):
    proposal = pathlib.Path(f"{sys.argv[1]}.csv")
    proposal.write_text(f"path,label\\n{sys.argv[1]}{i},cat\\n")
    labeling.folder.take_over(table, proposal, ".", paths)
"""
    run = [sys.executable, "-c", program]
    environment = {**os.environ, "PYTHONPATH": str(toy.ROOT)}
    both = [subprocess.Popen([*run, name], cwd=tmp_path, env=environment) for name in "ab"]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    assert len(labeling.read_labels(tmp_path / "labels.csv", str(tmp_path)).by_path) == 200


def test_a_proposal_is_read_whatever_was_filled_in(tmp_path):
    table = tmp_path / "to_label.csv"
    proposed = [
        labeling.Proposed("in, out/a.png", "cat", 0.9, 1.5),
        labeling.Proposed("d.png"),
    ]
    labeling.write_proposal(table, proposed)
    write(table, table.read_text().replace("d.png,,", "d.png,owl,"))
    assert labeling.tables.read_proposal(table, "images") == proposed
    write(table, table.read_text().replace("0.9", "much"))
    assert labeling.tables.read_proposal(table, "images")[0].confidence is None
    assert labeling.tables.read_proposal(tmp_path / "none.csv", "images") == []


def test_notes_of_a_person_are_kept_when_a_proposal_is_replaced(tmp_path):
    table = tmp_path / "to_label.csv"
    labeling.write_proposal(table, [labeling.Proposed("a.png")])
    labeling.write_proposal(table, [labeling.Proposed("b.png")])
    assert [path.name for path in tmp_path.iterdir()] == ["to_label.csv"]
    noted = table.read_text().replace("rank", "rank,note").replace(",1\n", ",1,blurred\n")
    write(table, noted)
    labeling.write_proposal(table, [labeling.Proposed("c.png")])
    (copy,) = tmp_path.glob("to_label.2*.csv")
    assert copy.read_text() == noted
    assert "c.png" in table.read_text()
