"""The binary, run as a user runs it who labels images between one run and the next."""

import csv
import json
import shutil

import jax
import numpy as np
import pytest
from absl import flags
from PIL import Image

import dynamical_jax as dj
from dynamical_jax.programs import person
from experiments import predict, select

NAMES = ("zero", "one", "two")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Sixty digits in files of several formats, a copy and two broken ones, and the truth."""
    folder, truth = tmp_path_factory.mktemp("pictures"), {}
    digits = dj.datasets.load("digits").pool
    rows = np.concatenate([np.flatnonzero(digits.y == label)[:20] for label in range(3)])
    for position, row in enumerate(rows):
        name = f"{position % 7}/{position}.{('png', 'bmp', 'gif')[position % 3]}"
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(digits.x[row, ..., 0]).save(folder / name)
        truth[name] = NAMES[digits.y[row]]
    (folder / "copy.png").write_bytes((folder / "0/0.png").read_bytes())
    truth["copy.png"] = truth["0/0.png"]
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "empty.jpg").touch()
    return folder, truth


@pytest.fixture
def run(run_binary, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dj.images.warnings, "warn", lambda message, stacklevel: None)
    given = {"images": str(pictures[0]), "batch_size": 10, "max_epochs": 2}
    return lambda **values: run_binary(select, **{**given, **values})


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def fill_in(path, label_of):
    rows = rows_of(path)
    for row in rows:
        row["label"] = label_of(row["path"])
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return [row["path"] for row in rows]


@pytest.mark.usefixtures("drawn_pictures")
def test_three_rounds(run, pictures, tmp_path):
    table, proposal = tmp_path / "labels.csv", tmp_path / "to_label.csv"
    _, truth = pictures
    status, output, errors = run(batch_size=9)
    assert (status, errors) == (None, "")
    assert "63 images" in output
    assert "0 labeled, 60 to choose from, 2 cannot be read, 1 is a copy of another" in output
    assert "fewer than two classes are labeled: drawn at random" in output
    labeled = set()
    for number in range(3):
        chosen = fill_in(proposal, truth.get)
        assert len(chosen) == 9  # All pools are of one size when it is rounded: fewer programs.
        assert not labeled & set(chosen)
        assert not {"0/0.png", "copy.png"} <= labeled | set(chosen)
        labeled |= set(chosen)
        status, output, errors = run(batch_size=9)
        assert (status, errors) == (None, "")
        assert "9 labels of to_label.csv added to labels.csv" in output
        assert ("of 9 of them right" in output) == (number > 0)
        assert {row["path"]: row["label"] for row in rows_of(table)} == {
            path: truth[path] for path in labeled
        }
    rows = rows_of(proposal)
    assert [row["rank"] for row in rows] == [str(rank) for rank in range(1, 10)]
    assert {row["predicted"] for row in rows} <= set(NAMES)
    assert all(1 / 3 <= float(row["confidence"]) <= 1 for row in rows)
    scores = [float(row["score"]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    log = dj.files.read_lines(tmp_path / "to_label.jsonl", dict)
    assert [line["num_labeled"] for line in log] == [0, 9, 18, 27]
    assert log[-1]["query"] == [row["path"] for row in rows]
    assert log[2]["num_predicted"] == 9
    assert (tmp_path / "to_label.png").stat().st_size > 5000


def test_without_new_labels_the_same_is_asked_for(run, pictures, tmp_path):
    run()
    fill_in(tmp_path / "to_label.csv", pictures[1].get)
    run()
    once = rows_of(tmp_path / "to_label.csv")
    _, output, _ = run()
    assert "no labels that the model was not trained on" in output
    log = dj.files.read_lines(tmp_path / "to_label.jsonl", dict)
    assert log[2]["epochs"] == log[1]["epochs"] >= 1
    assert rows_of(tmp_path / "to_label.csv") == once


def test_rows_left_empty_stay_in_the_pool(run, pictures, tmp_path):
    run()
    kept = fill_in(tmp_path / "to_label.csv", lambda path: "")
    _, output, _ = run()
    assert "0 labeled, 60 to choose from" in output
    assert [row["path"] for row in rows_of(tmp_path / "to_label.csv")] == kept


@pytest.mark.slow  # 3 s; another new class is below.
def test_a_new_class_and_predictions(run, pictures, tmp_path):
    _, truth = pictures
    table = tmp_path / "labels.csv"
    first = {path: label for path, label in truth.items() if label != "two"}
    dj.labeling.add_labels(table, dict(list(first.items())[10:30]))
    run(max_epochs=20, strategy="random")
    dj.labeling.add_labels(table, {path: label for path, label in truth.items() if label == "two"})
    _, output, _ = run(predictions="rest.csv", max_epochs=20, strategy="random")
    assert "new classes: two; the model grows to 3 outputs" in output
    assert "still knows" not in output
    rest = rows_of(tmp_path / "rest.csv")
    assert len(rest) == 61 - 40  # Copies too.
    right = sum(truth[row["path"]] == row["predicted"] for row in rest)
    assert right > 0.7 * len(rest)


@pytest.mark.slow  # As with other vectors: TestFeatures.
def test_another_kind_of_model_begins_anew(run, pictures, tmp_path):
    dj.labeling.add_labels(tmp_path / "labels.csv", dict(list(pictures[1].items())[10:30]))
    run(strategy="random")
    _, output, _ = run(image_size=5, strategy="random")
    told = (
        "from the start: the earlier rounds had images of 8×8×3, and this one has images of 5×5×3"
    )
    assert told in output
    _, output, _ = run(image_size=5, strategy="random")
    assert "no labels that the model was not trained on" in output


def test_a_table_that_is_a_link_to_itself(run, tmp_path):
    (tmp_path / "labels.csv").symlink_to("labels.csv")
    status, output, errors = run()
    assert (status, output) == (1, "")
    assert errors == "error: cannot read labels.csv: Too many levels of symbolic links\n"


def test_flags_without_use_are_named(run, pictures, tmp_path):
    _, output, _ = run(strategy="margin", learning_rate=0.1)
    unused = "--strategy, --learning_rate, --max_epochs"
    assert f"fewer than two classes are labeled: drawn at random, without {unused}" in output
    dj.labeling.add_labels(tmp_path / "labels.csv", dict(list(pictures[1].items())[10:30]))
    run(strategy="random")
    _, output, _ = run(strategy="random", learning_rate=0.1)
    unused = "--learning_rate, --max_epochs"
    assert f"the model was not trained on: it stays as it is, without {unused}" in output


def test_one_class_is_no_class(run, pictures, tmp_path):
    dj.labeling.add_labels(tmp_path / "labels.csv", {"0/0.png": "zero"})
    _, output, _ = run(predictions="new/rest.csv")
    assert "1 labeled (1 zero), 59 to choose from" in output
    assert "new/rest.csv is not written: there is no model yet" in output
    assert "fewer than two classes are labeled" in output


def test_no_copy_of_what_is_labeled(run, pictures, tmp_path):
    dj.labeling.add_labels(tmp_path / "labels.csv", {"copy.png": "zero"})
    _, output, _ = run(batch_size=60)
    assert "1 labeled (1 zero), 59 to choose from" in output
    asked = {row["path"] for row in rows_of(tmp_path / "to_label.csv")}
    assert not {"0/0.png", "copy.png"} & asked
    dj.labeling.add_labels(tmp_path / "labels.csv", {"0/0.png": "one"})
    _, output, _ = run(strategy="random")
    assert "0/0.png is labeled 'one', but a copy of it 'zero'" in output


def test_a_class_that_sorts_first_does_not_mix_up_the_others(run, pictures, tmp_path):
    table, (_, truth) = tmp_path / "labels.csv", pictures
    known = {path: label for path, label in truth.items() if label != "one"}
    dj.labeling.add_labels(table, dict(list(known.items())[5:35]))
    run(max_epochs=30, strategy="random", predictions="before.csv")
    (path,) = list(truth)[25:26]
    dj.labeling.add_labels(table, {path: "a new class"})
    run(max_epochs=1, learning_rate=1e-9, strategy="random", predictions="after.csv")
    before, after = (
        {row["path"]: row["predicted"] for row in rows_of(tmp_path / name)}
        for name in ("before.csv", "after.csv")
    )
    table.write_text(table.read_text().replace("a new class", "zero"))
    _, output, _ = run(max_epochs=1, strategy="random")
    assert "the model still knows a new class, though no image has that label now" in output
    del before[path]
    same = [before[path] == after[path] for path in before if after[path] in before.values()]
    assert np.mean(same) == 1
    assert len(same) > 0.5 * len(before)


def test_the_contact_sheet_is_not_asked_for(pictures, run, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for position in range(4):
        Image.new("L", (8, 8), 60 * position).save(folder / f"{position}.png")
    for _ in range(2):
        _, output, _ = run(images=str(folder), output=str(folder / "to_label.csv"))
        assert "4 images" in output


def test_all_are_labeled_and_more_asked_for_than_there_are(run, pictures, tmp_path):
    dj.labeling.add_labels(tmp_path / "labels.csv", dict(list(pictures[1].items())[:57]))
    _, output, _ = run(strategy="random")
    assert "to_label.csv: 3 images to label next, and not 10: no more are left\n" in output
    assert "(not converged: --max_epochs)" in output
    assert dj.files.read_lines(tmp_path / "to_label.jsonl", dict)[0]["converged"] is False
    assert len(fill_in(tmp_path / "to_label.csv", pictures[1].get)) == 3
    status, output, _ = run()
    assert status is None
    assert "all images are labeled" in output
    assert rows_of(tmp_path / "to_label.csv") == []
    assert not (tmp_path / "to_label.png").exists()


class TestFeatures:
    """Vectors are learned from, the pictures are only shown."""

    @pytest.fixture
    def features(self, pictures, tmp_path):
        """Writes vectors that tell the classes; pixels of other images say nothing."""

        def write(left_out=(), more=(), **arrays):
            paths = [path for path in pictures[1] if path not in left_out] + list(more)
            classes = [NAMES.index(pictures[1].get(path, "two")) for path in paths]
            x = np.random.default_rng(0).normal(size=(len(paths), 5)) + 5 * np.eye(5)[classes]
            x[paths.index("copy.png")] = x[paths.index("0/0.png")]
            path = tmp_path / "features.npz"
            given = {"embedding": x.astype(np.float16), "path": np.array(paths), **arrays}
            np.savez(path, **{name: array for name, array in given.items() if array is not None})
            return str(path)

        return write

    @pytest.fixture
    def told(self, monkeypatch):
        messages = []
        tell = lambda message, stacklevel: messages.append(message)
        monkeypatch.setattr(dj.labeling.folder.warnings, "warn", tell)
        return messages

    def test_rounds(self, run, pictures, tmp_path, features, told):
        vectors = features(left_out=["1/1.bmp"], more=["gone.png"])
        for _ in range(3):
            status, output, errors = run(
                features=vectors, max_epochs=200, strategy="random", predictions="rest.csv"
            )
            assert (status, errors) == (None, "")
            asked = fill_in(tmp_path / "to_label.csv", pictures[1].get)
            assert not {"1/1.bmp", "broken.png", "empty.jpg", "gone.png"} & set(asked)
        assert "59 to choose from" not in output
        assert "20 labeled" in output
        assert "3 cannot be read or have no vector, 1 is a copy of another" in output
        assert told[:3] == [
            f"3 of 63 images in {pictures[0]} have no vector in {vectors}: 1/1.bmp, broken.png, "
            "empty.jpg; they are left out",
            f"1 of 61 vectors in {vectors} are of no image in {pictures[0]}: gone.png",
            "2 of 63 image files cannot be read: broken.png, empty.jpg; they are left out",
        ]
        rest = rows_of(tmp_path / "rest.csv")
        assert np.mean([pictures[1][row["path"]] == row["predicted"] for row in rest]) > 0.9
        log = dj.files.read_lines(tmp_path / "to_label.jsonl", dict)
        assert log[-1]["flags"]["model"] == "linear"
        _, output, _ = run(features=features(), strategy="random")  # Other numbers.
        assert f"trained from the start: --features={vectors} gives other vectors than in" in output

    def test_a_label_without_a_vector_and_a_model_that_needs_vectors(
        self, run, run_binary, pictures, tmp_path, features, told
    ):
        folder, truth = pictures
        dj.labeling.add_labels(tmp_path / "labels.csv", dict(list(truth.items())[:50]))
        _, output, _ = run(features=features(left_out=["1/1.bmp"]), strategy="random")
        assert "1 label is of an image that cannot be read or has no vector: 1/1.bmp\n" in output
        _, _, errors = run_binary(predict, str(folder))
        assert "learned from vectors of a file: give a file with vectors of these" in errors

    @pytest.mark.slow
    def test_the_model_is_that_of_the_vectors(self, run, pictures, tmp_path, features, told):
        """What is asked for is what the strategy asks for of a pool of these vectors."""
        labels = dict(list(pictures[1].items())[10:50])
        dj.labeling.add_labels(tmp_path / "labels.csv", labels)
        vectors = features()
        assert run(features=vectors, max_epochs=20)[0] is None
        asked = rows_of(tmp_path / "to_label.csv")
        with np.load(vectors) as arrays:
            x = dict(zip(arrays["path"], arrays["embedding"].astype(np.float32), strict=True))
        mean, std = (
            f(np.stack([*x.values()]), axis=0, dtype=np.float64).tolist() for f in (np.mean, np.std)
        )
        std = 5 * [float(np.sqrt(np.mean(np.square(std))))]
        model = dj.models.Standardized(dj.models.Linear(3), tuple(mean), tuple(std))
        names = sorted(NAMES)
        labeled = dj.Examples(
            np.stack([x[path] for path in labels]),
            np.array([names.index(label) for label in labels.values()], np.int32),
        )
        variables = dj.models.init(model, jax.random.key(0), labeled.x)
        config = dj.TrainingConfig(learning_rate=1e-2, max_epochs=20)
        fit = dj.training.fit(model, variables, labeled, config, 0, len(labels))
        rest = [path for path in sorted(x) if path not in labels and path != "copy.png"]
        view = dj.LearnerView(
            model.apply, fit.variables, labeled, np.stack([x[path] for path in rest])
        )
        query = dj.STRATEGIES[person.RECOMMENDED]().query(jax.random.key(0), view, 10)
        assert [row["path"] for row in asked] == [rest[position] for position in query.positions]
        scores = [float(row["score"]) for row in asked]
        np.testing.assert_allclose(scores, query.scores, rtol=1e-2)

    @pytest.mark.parametrize(
        ("arrays", "values", "message"),
        [
            ({}, {"features": "none.npz"}, "there is no file none.npz"),
            ({}, {"features": __file__}, "select_test.py is no .npz or .npy file"),
            ({"path": None}, {}, "there is no array 'path'; features need embedding [n, d] and pa"),
            (
                {"path": np.arange(61).astype(str)},
                {},
                "where they look like '0/0.png'; it has 0, 1",
            ),
            ({}, {"image_size": 8}, "--image_size has no effect with vectors, only with images"),
            ({}, {"model": "cnn"}, "cnn takes images, and the data are vectors"),
            ({"embedding": np.full((61, 5), np.nan)}, {}, "61 of 61 vectors are not finite"),
        ],
    )
    def test_what_does_not_fit(self, run, tmp_path, features, told, arrays, values, message):
        status, output, errors = run(**{"features": features(**arrays), **values})
        assert (status, output) == (1, "")
        assert message in errors
        assert errors.count("\n") == 1
        assert not (tmp_path / "to_label.csv").exists()


@pytest.mark.parametrize("strategy", ["badge", "coreset", "entropy", "random"])
def test_other_strategies(run, pictures, tmp_path, strategy):
    dj.labeling.add_labels(tmp_path / "labels.csv", dict(list(pictures[1].items())[10:30]))
    status, _, errors = run(strategy=strategy)
    assert (status, errors) == (None, "")
    assert len({row["path"] for row in rows_of(tmp_path / "to_label.csv")}) == 10


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"images": None}, "as in --images=photos; none given;"),
        ({"images": "nowhere"}, "--images must be a folder of images, got nowhere"),
        ({"images": "."}, "there are no image files in ."),
        ({"output": "labels.csv"}, "--labels, --output and --predictions must be different"),
        ({"predictions": "labels.csv"}, "--labels, --output and --predictions must be different"),
        ({"output": "to_label.txt"}, "tables must be .csv files, got to_label.txt, labels.csv"),
        (
            {"output": "/proc/none/to_label.csv"},
            "cannot write /proc/none/to_label.csv: no file can",
        ),
        ({"predictions": "/proc/rest.csv"}, "cannot write /proc/rest.csv: no file can be made in"),
        ({"label_studio": "/proc/tasks.json"}, "cannot write /proc/tasks.json: no file can be"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"strategy": "atuo"}, "unknown strategy 'atuo' (is it 'auto'?); choose from dynamical, r"),
        ({"strategy": "best"}, "badge, typiclust, "),  # Not albl, which would be between.
        ({"strategy": "albl"}, "albl learns from how its last query was labeled"),
        ({"model": "alexnet"}, "unknown model 'alexnet'"),
        ({"learning_rate": 0.0}, "learning rate must be positive"),
        ({"unreadable": "refuse"}, "2 of 63 image files cannot be read"),
    ],
)
def test_bad_flags_are_one_line(run, tmp_path, values, message):
    status, output, errors = run(**values)
    assert (status, output) == (1, "")
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert message in errors
    assert not (tmp_path / "to_label.csv").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,label\n0/0.png,zero\n0/0.png,one\n", "line 3 of labels.csv labels 0/0.png 'one'"),
        ("path,label\n0/9.png,zero\n9/9.png,a\n", "2 labeled images are not in"),
        ("name,class\n0/0.png,zero\n", "labels.csv has the columns name, class; it needs path"),
    ],
)
def test_tables_that_cannot_be(run, tmp_path, text, message):
    (tmp_path / "labels.csv").write_text(text)
    status, output, errors = run()
    assert (status, output) == (1, "")
    assert message in errors
    assert (tmp_path / "labels.csv").read_text() == text


def test_a_proposal_that_disagrees_with_the_labels(run, pictures, tmp_path):
    run()
    (path, *_) = fill_in(tmp_path / "to_label.csv", pictures[1].get)
    dj.labeling.add_labels(tmp_path / "labels.csv", {path: "other"})
    status, _, errors = run()
    assert status == 1
    assert f"to_label.csv labels {path} '{pictures[1][path]}'" in errors
    assert len(rows_of(tmp_path / "labels.csv")) == 1


def test_what_is_asked_for_is_what_the_strategy_chose(run, pictures, tmp_path):
    dj.labeling.add_labels(tmp_path / "labels.csv", dict(list(pictures[1].items())[10:30]))
    run(strategy="confidence", predictions="rest.csv")
    asked = {row["path"]: row for row in rows_of(tmp_path / "to_label.csv")}
    rest = {row["path"]: row for row in rows_of(tmp_path / "rest.csv")}
    assert {name: row["confidence"] for name, row in asked.items()} == {
        name: rest[name]["confidence"] for name in asked
    }
    del rest["copy.png"]  # Never asked for, its original is.
    sure = [float(row["confidence"]) for name, row in rest.items() if name not in asked]
    assert max(float(row["confidence"]) for row in asked.values()) <= min(sure)


@pytest.mark.parametrize("flag", ["output", "predictions"])
def test_a_table_of_others_is_not_replaced(run, tmp_path, flag):
    theirs = tmp_path / "theirs.csv"
    theirs.write_text("path,label,price\n0/0.png,,3\n")
    status, output, errors = run(**{flag: "theirs.csv"})
    assert (status, output) == (1, "")
    assert "error: theirs.csv is there, and was not written by this program" in errors
    assert (", after its labels are added to labels.csv\n" in errors) == (flag == "output")
    assert theirs.read_text() == "path,label,price\n0/0.png,,3\n"
    assert run(**{flag: "theirs.csv"}, overwrite=True)[0] is None


def test_a_table_for_another_folder_is_not_taken_over(run, pictures, tmp_path):
    run()
    fill_in(tmp_path / "to_label.csv", pictures[1].get)
    other = tmp_path / "other"
    shutil.copytree(pictures[0], other)
    status, output, errors = run(images=str(other), labels="other.csv")
    assert (status, output) == (1, "")
    assert f"to_label.csv asks for labels of the images in {pictures[0]}" in errors
    assert not (tmp_path / "other.csv").exists()
    other.rename(tmp_path / "moved")  # A folder that is gone was moved: there is nothing to mix up.
    assert run(output="second.csv", images=str(tmp_path / "moved"))[0] is None
    (tmp_path / "moved").rename(other)
    assert run(output="second.csv", images=str(other))[0] is None


def test_a_proposal_of_path_and_label_alone(run, pictures, tmp_path):
    run()
    proposal = tmp_path / "to_label.csv"
    path, *_ = (row["path"] for row in rows_of(proposal))
    proposal.write_text(f"path,label,note\n{path},zero,hm\n")
    status, output, errors = run()
    assert (status, errors) == (None, "")
    assert "1 label of to_label.csv added to labels.csv" in output
    assert path not in {row["path"] for row in rows_of(proposal)}
    (kept,) = tmp_path.glob("to_label.*.csv")
    assert "hm" in kept.read_text()
    proposal.write_text(f"path\n{path}\n")
    status, _, errors = run()
    assert status == 1
    assert "to_label.csv has the columns path; it needs path and label, and stays" in errors


def test_a_proposal_with_a_column_that_is_mistyped_is_kept(run, pictures, tmp_path):
    run()
    proposal = tmp_path / "to_label.csv"
    proposal.write_text(proposal.read_text().replace("label", "lable", 1))
    status, _, errors = run()
    assert status == 1
    assert "to_label.csv has the columns path, lable, predicted" in errors
    assert "lable" in proposal.read_text()
    rest = proposal.rename(tmp_path / "rest.csv")
    status, _, errors = run(predictions="rest.csv")
    assert status == 1
    assert "rest.csv has the columns path, lable, predicted" in errors
    assert "lable" in rest.read_text()


def test_label_studio_there_and_back(run, pictures, tmp_path):
    table, (_, truth) = tmp_path / "labels.csv", pictures
    given = {"label_studio": "tasks.json", "classes": list(NAMES)}
    run(**given)
    tasks = json.loads((tmp_path / "tasks.json").read_text())
    assert [t["data"]["path"] for t in tasks] == [
        r["path"] for r in rows_of(tmp_path / "to_label.csv")
    ]
    assert (tmp_path / "tasks.xml").read_text().count("<Choice ") == 3
    for task in tasks:
        value = {"choices": [truth[task["data"]["path"]]]}
        task["annotations"] = [{"result": [{"type": "choices", "value": value}]}]
    (tmp_path / "export.json").write_text(json.dumps(tasks))
    _, output, errors = run(annotations="export.json", **given)
    assert "10 labels of to_label.csv and export.json added to labels.csv" in output + errors
    labeled = {row["path"]: row["label"] for row in rows_of(table)}
    assert labeled == {task["data"]["path"]: truth[task["data"]["path"]] for task in tasks}
    again = json.loads((tmp_path / "tasks.json").read_text())
    assert not labeled.keys() & {task["data"]["path"] for task in again}
    assert all(task["predictions"][0]["score"] > 1 / 3 for task in again)


def test_no_class_but_those_that_are_named(run, pictures, tmp_path):
    table, names = tmp_path / "labels.csv", list(pictures[1])
    dj.labeling.add_labels(
        table, dict(zip(names[:4], ["three", "seven", "sevne", "three"], strict=True))
    )
    before = table.read_bytes()
    status, _, errors = run(classes=["three", "seven"])
    assert status == 1
    assert f"{names[2]} is labeled 'sevne', which is none of --classes: is it 'seven'?" in errors
    assert table.read_bytes() == before
    assert not (tmp_path / "to_label.csv").exists()
    _, output, _ = run(batch_size=1, strategy="random")
    assert "'seven' (1 label) and 'sevne' (1) are nearly the same" in output


def test_labels_of_earlier_rounds_must_be_there(run, pictures, tmp_path):
    labels = list(pictures[1].items())
    dj.labeling.add_labels(tmp_path / "labels.csv", dict(labels[:3]))
    run(strategy="random")
    (tmp_path / "labels.csv").rename(tmp_path / "kept.csv")
    for name in ("labels.csv", "lables.csv"):
        status, output, errors = run(strategy="random", labels=name)
        assert (status, output) == (1, "")
        assert errors == (
            f"error: there is no {name}, and the last round had 3 labels in labels.csv: give that "
            "as --labels, or another --output to begin anew\n"
        )
    status, _, _ = run(strategy="random", labels="kept.csv")
    assert status is None


def test_a_round_without_a_model_is_recorded_as_random(run, tmp_path):
    run()
    (line,) = (tmp_path / "to_label.jsonl").read_text().splitlines()
    assert json.loads(line)["strategy"] == "random"


def test_auto_is_the_recommended_strategy():
    flag = flags.FLAGS["strategy"]
    assert flag.default == person.RECOMMENDED
    assert flag.parser.parse("auto") == person.RECOMMENDED
    assert flag.parser.parse("badge") == "badge"
    assert person.RECOMMENDED in person.STRATEGY_NAMES


def test_the_model_is_used_for_other_images(run, run_binary, pictures, tmp_path):
    folder, truth = pictures
    dj.labeling.add_labels(tmp_path / "labels.csv", dict(list(truth.items())[10:50]))
    run(predictions="rest.csv", max_epochs=20)
    expected = {row["path"]: row for row in rows_of(tmp_path / "rest.csv")}
    flags_of = {"checkpoint": "to_label.checkpoint", "table": "new/predicted.csv", "top": 2}
    status, output, errors = run_binary(predict, str(folder), **flags_of)
    assert (status, errors) == (None, "2 images cannot be read: broken.png, empty.jpg\n")
    assert output == "new/predicted.csv: predictions for 61 images\n"
    rows = {row["path"]: row for row in rows_of(tmp_path / "new/predicted.csv")}
    assert len(rows) == 63
    for path, row in expected.items():
        assert rows[path]["predicted"] == row["predicted"]
        assert float(rows[path]["confidence"]) == pytest.approx(float(row["confidence"]), rel=1e-4)
        assert rows[path]["predicted_2"] in {*NAMES} - {row["predicted"]}
    assert rows["broken.png"]["predicted"] == ""
    model = dj.labeling.load("to_label.checkpoint")
    (image,) = model.predict([str(folder / "0/0.png")], top=9)
    with pytest.raises(dj.UserError, match=r"takes a list of paths, got '0/0.png'"):
        model.predict("0/0.png")
    assert len(image.class_names) == 3
    assert sum(image.probabilities) == pytest.approx(1, abs=1e-5)
    _, output, _ = run_binary(predict, str(folder), **{**flags_of, "top": 9})
    assert (
        output == "new/predicted.csv: predictions for 61 images, of 3 classes each: no more known\n"
    )
    table = (tmp_path / "labels.csv").read_bytes()
    status, _, errors = run_binary(predict, str(folder), **{**flags_of, "table": "labels.csv"})
    assert (status, (tmp_path / "labels.csv").read_bytes()) == (1, table)
    assert "labels.csv is there, and was not written by this program" in errors
    (tmp_path / "to_label.checkpoint/round-00000/_METADATA").write_bytes(b"")
    status, _, errors = run_binary(predict, str(folder), **flags_of)
    assert status == 1
    assert errors == (
        "error: to_label.checkpoint/round-00000 is damaged (files are missing or not what was "
        "written): dynamical-select or dynamical-label, given as before, sets it aside and trains "
        "another model on the same labels\n"
    )
    status, _, errors = run_binary(predict, str(folder), **{**flags_of, "checkpoint": "nothing"})
    assert (status, errors) == (
        1, "error: there is no model in nothing; dynamical-select makes one\n"
    )  # fmt: skip
