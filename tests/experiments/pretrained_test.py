"""The programs with --weights, as a user runs them: digits, and a network with random weights."""

import csv
import json
import pathlib

import numpy as np
import pytest
import tiny_weights
from PIL import Image

import dynamical_jax as dj
from experiments import active_learning, embed, predict, select

pytest.importorskip("safetensors", reason="needs the extra weights")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    return tiny_weights.save(path, tiny_weights.vit(num_classes=7))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Thirty digits of three classes, one of them twice, and a file that is no image."""
    folder = tmp_path_factory.mktemp("photos")
    digits = dj.datasets.load("digits").pool
    for label in range(3):
        (folder / str(label)).mkdir()
        for number, row in enumerate(np.flatnonzero(digits.y == label)[:10]):
            image = Image.fromarray(digits.x[row, ..., 0]).resize((12, 9))
            image.save(folder / f"{label}/{number}.png")
    (folder / "copy.png").write_bytes((folder / "0/0.png").read_bytes())
    (folder / "broken.png").write_bytes(b"no image")
    return folder


@pytest.fixture
def run(run_binary, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda binary, *arguments, **values: run_binary(
        binary, *arguments, **{"cache_dir": str(tmp_path / "cache"), **values}
    )


def predictions_of(table):
    """Path → class and confidence."""
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    known = [row for row in rows if row["predicted"]]
    return {row["path"]: (row["predicted"], float(row["confidence"])) for row in known}


def assert_same_predictions(all_of_them, some):
    assert some
    for path, (name, confidence) in some.items():
        assert all_of_them[path][0] == name
        np.testing.assert_allclose(all_of_them[path][1], confidence, atol=1e-4)


def rounds_of(directory):
    kept = ("num_labeled", "initial", "query", "query_scores", "test_accuracy", "labeled_loss")
    rounds = dj.records.read(directory / "rounds.jsonl")
    return [{name: record[name] for name in kept if name in record} for record in rounds]


SMALL = {"num_seeds": 1, "num_rounds": 2, "initial_size": 20, "batch_size": 5, "max_epochs": 30}


def test_to_train_the_head_is_to_learn_from_a_file_of_embeddings(run, weights, tmp_path):
    status, output, errors = run(
        active_learning, weights=weights, output_dir=str(tmp_path / "head"), **SMALL
    )
    assert (status, errors) == (None, "")
    assert f"{weights}: vit_ti with timm or DINOv2's names, for images of 8×8\n" in output
    data = dj.datasets.load("digits")
    loaded = dj.models.weights.load(weights)
    by_hand = [
        dj.embedding.embed(loaded, part.x, tmp_path / "other")[:] for part in (data.pool, data.test)
    ]
    np.savez(
        tmp_path / "features.npz",
        embedding=by_hand[0],
        label=data.pool.y,
        test_embedding=by_hand[1],
        test_label=data.test.y,
        index=data.index,
    )
    file = str(tmp_path / "features.npz")
    run(active_learning, dataset=file, output_dir=str(tmp_path / "file"), **SMALL)
    assert rounds_of(tmp_path / "head") == rounds_of(tmp_path / "file")
    record = dj.records.read(tmp_path / "head" / "rounds.jsonl")[0]
    assert (record["dataset"], record["model"]) == ("digits", "linear")


@pytest.mark.slow  # Compiles the whole network.
def test_all_layers_are_trained(run, weights, tmp_path):
    status, output, errors = run(
        *(active_learning,),
        **{**SMALL, "num_rounds": 1, "max_epochs": 2},
        weights=weights,
        train="all",
        output_dir=str(tmp_path / "all"),
    )
    # Without a warning: the factored engine takes all layers apart.
    assert (status, errors) == (None, "")
    assert "its last layer, for 7 classes, is replaced by a new one for 10" in output
    record = dj.records.read(tmp_path / "all" / "rounds.jsonl")[0]
    assert record["model"] == record["flags"]["model"] == "vit_ti"
    assert record["flags"]["learning_rate"] == 1e-4


@pytest.mark.filterwarnings("default")  # They are shown as a user sees them.
class TestEmbed:
    @pytest.mark.slow  # Below, it learns in both ways, too.
    def test_select_learns_from_its_file(self, run, weights, photos, tmp_path, monkeypatch):
        status, output, errors = run(embed, str(photos), weights=weights)
        assert status is None
        assert errors == (
            "warning: 1 of 32 image files cannot be read: broken.png; they are left out\n"
        )
        assert output.endswith("features.npz: 31 vectors of 192 numbers\n")
        with np.load("features.npz") as arrays:
            assert set(arrays) == {"embedding", "path"}
            assert "broken.png" not in arrays["path"]
            assert arrays["embedding"].shape == (31, 192)
        assert run(embed, str(photos), weights=weights)[0] is None  # It may be made again.

        truth = {f"{label}/{number}.png": str(label) for label in range(3) for number in range(10)}
        dj.labeling.add_labels(tmp_path / "labels.csv", dict(list(truth.items())[::2]))
        asked = []
        for number, values in enumerate([{"features": "features.npz"}, {"weights": weights}]):
            status, output, _ = run(
                *(select,),
                **{**values, "images": str(photos), "batch_size": 5, "max_epochs": 20},
                output=f"{number}.csv",
            )
            assert status is None
            asked.append((tmp_path / f"{number}.csv").read_text())
        assert "15 to choose from, 1 cannot be read, 1 is a copy of another" in output
        assert output.startswith(f"{weights}: vit_ti with timm or DINOv2's names, for images of")
        assert asked[0] == asked[1]

    def test_the_model_predicts_for_other_images(self, run, weights, photos, tmp_path):
        """All ways to have embeddings predict the same; a file of weights that is not is told."""
        truth = {f"{label}/{number}.png": str(label) for label in range(3) for number in range(5)}
        dj.labeling.add_labels(tmp_path / "labels.csv", truth)
        run(embed, str(photos), weights=weights, features="old.npz")
        moved = tmp_path / "moved.safetensors"
        moved.write_bytes(pathlib.Path(weights).read_bytes())
        values = {"images": str(photos), "batch_size": 5, "max_epochs": 20}
        run(select, weights=str(moved), output="weights.csv", predictions="rest.csv", **values)
        run(select, features="old.npz", output="file.csv", **values)
        new = tmp_path / "new"
        for source in (*photos.glob("?/*.png"), photos / "broken.png"):
            target = new / source.relative_to(photos)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())

        given = {"checkpoint": "weights.checkpoint", "table": "predicted.csv", "top": 2}
        status, output, errors = run(predict, str(new), **given)
        assert (status, errors) == (None, "1 image cannot be read: broken.png\n")
        assert output == "predicted.csv: predictions for 30 images\n"
        predicted = predictions_of("predicted.csv")
        rest = predictions_of("rest.csv")
        assert len(rest) == 16
        del rest["copy.png"]
        assert_same_predictions(predicted, rest)

        run(embed, str(new), weights=weights, features="new.npz")
        for checkpoint in ("file.checkpoint", "weights.checkpoint"):
            status, _, errors = run(
                predict, str(new), **{**given, "checkpoint": checkpoint}, features="new.npz"
            )
            assert (status, errors) == (None, "1 image has no vector in new.npz: broken.png\n")
            assert_same_predictions(predictions_of("predicted.csv"), predicted)

        def refused(**values):
            status, output, errors = run(predict, str(new), **{**given, **values})
            assert (status, output) == (1, "")
            assert errors.count("\n") == 1
            return errors

        assert "learned from vectors of a file: give" in refused(checkpoint="file.checkpoint")
        assert "needs no file of weights" in refused(checkpoint="file.checkpoint", weights=weights)
        assert "there is no file none.npz" in refused(features="none.npz")
        (tmp_path / "elsewhere").mkdir()
        elsewhere = str(moved.rename(tmp_path / "elsewhere" / "vit.safetensors"))
        # The images go through it as in training, whatever stands beside it now.
        beside = {"input_size": [3, 8, 8], "mean": [0.9] * 3, "std": [0.1] * 3}
        config = json.dumps({**beside, "interpolation": "bilinear"})
        (tmp_path / "elsewhere" / "config.json").write_text(config)
        assert f"there is no file {moved}, whose network" in refused()
        other = tiny_weights.vit(num_classes=7, seed=1)
        changed = tiny_weights.save(tmp_path / "changed.safetensors", other)
        assert f"{changed} is not the file of weights by which" in refused(weights=changed)
        status, _, _ = run(predict, str(new), **given, weights=elsewhere)
        assert status is None
        assert_same_predictions(predictions_of("predicted.csv"), predicted)

    @pytest.mark.slow  # Compiles the whole network.
    def test_select_trains_all_layers(self, run, weights, photos, tmp_path):
        truth = {f"{label}/{number}.png": str(label) for label in range(2) for number in range(4)}
        dj.labeling.add_labels(tmp_path / "labels.csv", truth)
        values = {"images": str(photos), "weights": weights, "train": "all", "max_epochs": 1}
        status, output, _ = run(select, batch_size=4, **values)
        assert status is None
        assert "its last layer, for 7 classes, is replaced by a new one for 2" in output
        _, output, _ = run(select, batch_size=4, predictions="rest.csv", **values)
        assert "no labels that the model was not trained on" in output
        given = {"checkpoint": "to_label.checkpoint", "table": "predicted.csv", "weights": None}
        status, _, _ = run(predict, str(photos), **given)
        assert status is None
        assert_same_predictions(predictions_of("predicted.csv"), predictions_of("rest.csv"))

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            (
                {"folder": "nowhere"},
                "a folder of images must be given, as in dynamical-embed photos",
            ),
            ({"weights": None}, "--weights must be a file with the weights of a network"),
            ({"weights": "none.npz"}, "there is no file none.npz"),
            ({"features": "features.csv"}, "--features must be an .npz file, got features.csv"),
            (
                {"features": "theirs.npz"},
                "theirs.npz is there, and was not written by this program",
            ),
            ({"features": "/proc/none/features.npz"}, "cannot write /proc/none/features.npz"),
            ({"image_size": 9}, "patches of 4×4 need images whose sides are multiples of 4, got 9"),
            ({"unreadable": "refuse"}, "1 of 32 image files cannot be read: broken.png"),
        ],
    )
    def test_bad_flags_are_one_line(self, run, weights, photos, tmp_path, values, message):
        np.savez(tmp_path / "theirs.npz", embedding=np.eye(2), label=np.arange(2))
        given = {"folder": str(photos), "weights": weights, **values}
        status, _, errors = run(embed, given.pop("folder"), **given)
        assert status == 1
        assert message in errors
        assert errors.count("\n") == 1
        assert not (tmp_path / "features.npz").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weights": None}, "--train has an effect beside --weights only"),
        ({"backbone_learning_rate": 1e-5}, "--backbone_learning_rate has an effect with --train=a"),
        ({"train": "all", "model": "linear"}, "--train=all trains the network of --weights"),
        ({"model": "resnet18"}, "holds weights of vit_ti, and --model is resnet18"),
        ({"stem": "cifar"}, "--stem has no effect beside --weights, which decide it"),
        ({"train": "all", "backbone_learning_rate": 0.0}, "backbone's learning rate must be posit"),
        ({"dataset": "features.npz"}, "takes images [n, h, w, 1 or 3] of uint8, got float32"),
    ],
)
def test_bad_flags_are_one_line(run, weights, tmp_path, values, message):
    x = np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32)
    np.savez(tmp_path / "features.npz", embedding=x, label=np.arange(40) % 2)
    train = {} if "backbone_learning_rate" in values or "dataset" in values else {"train": "head"}
    status, output, errors = run(
        active_learning, **{"weights": weights, **train, **SMALL, **values}
    )
    assert (status, output) == (1, "")
    assert message in errors
    assert errors.count("\n") == 1
