"""The log of answers is checked when it is read: the line and the field are named."""

import json

import pytest

import dynamical_jax as dj
from dynamical_jax.labeling import answers

ANSWER = answers.Answer(
    "a.png", answers.LABEL, "cat", answers.QUERY, 1, "dog", 0.5, "me", "7", 1.5, 2
)
BATCH = answers.Batch(1, 4, ["a.png"], ["b\udcff.png"], None, 0, 2.0)


def test_what_is_written_comes_back(tmp_path):
    log = answers.Log(tmp_path / "log.jsonl")
    log.add([ANSWER, BATCH, "cat"])
    for read in (log, answers.Log(tmp_path / "log.jsonl")):
        assert (read.answers, read.batches, read.classes) == ([ANSWER], [BATCH], ["cat"])


def test_fields_that_were_not_there_before(tmp_path):
    given = {name: value for name, value in ANSWER._asdict().items() if name != "place"}
    (tmp_path / "log.jsonl").write_text(json.dumps({"answer": given, "of later": 1}) + "\n")
    assert answers.Log(tmp_path / "log.jsonl").answers == [ANSWER]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"{", "Expecting property name"),
        (b"\xff", "codec can't decode"),
        (b"[" * 100_000, "recursion"),
        (b"[]", "Expected `object`"),
        (b'{"class": 1}', r"Expected `str \| null`, got `int` - at `\$.class`"),
        ({"answer": {**ANSWER._asdict(), "round": "1"}}, "Expected `int`.*answer.round"),
        ({"answer": {"path": "a.png"}}, "missing required field `what`"),
        ({"batch": {**BATCH._asdict(), "query": [1]}}, "Expected `str`.*batch.query"),
    ],
)
def test_a_line_that_is_none_of_ours(tmp_path, line, why):
    answers.Log(tmp_path / "log.jsonl").add(["cat"])
    line = line if isinstance(line, bytes) else json.dumps(line).encode()
    with (tmp_path / "log.jsonl").open("ab") as file:
        file.write(line + b"\n")
    with pytest.raises(dj.UserError, match=rf"^line 2 of .*log.jsonl cannot be used: .*{why}"):
        answers.Log(tmp_path / "log.jsonl")
