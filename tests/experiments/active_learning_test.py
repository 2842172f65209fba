"""The binary, run as a user runs it."""

import math

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from PIL import Image

import dynamical_jax as dj
from experiments import active_learning, common

SMALL = {
    "initial_size": 10,
    "batch_size": 5,
    "num_rounds": 2,
    "num_seeds": 2,
    "max_epochs": 2,
    "image_size": 4,
}


@pytest.fixture
def run(run_binary, tmp_path):
    small = {**SMALL, "output_dir": str(tmp_path / "run")}
    return lambda *arguments, **values: run_binary(
        active_learning, *arguments, **{**small, **values}
    )


PLAYED = []


@pytest.fixture
def played(run, tmp_path_factory, drawn_pictures):
    """Plays with `SMALL`, once for all tests; returns status, output, errors and the directory."""
    if not PLAYED:
        directory = tmp_path_factory.mktemp("played")
        PLAYED.extend((*run(output_dir=str(directory / "run")), directory))
    return PLAYED


def read(directory):
    return dj.records.read(directory / "run" / "rounds.jsonl")


def test_records_table_and_picture(played):
    status, output, errors, directory = played
    assert status is None
    assert errors == ""
    rounds = read(directory)
    assert len(rounds) == 2 * 2 * 3
    for record in rounds:
        assert record["num_labeled"] == 10 + 5 * record["round"]
        assert len(record["query"]) == (5 if record["round"] < 2 else 0)
        assert len(record["initial"]) == (0 if record["round"] else 10)
        assert record["flags"]["max_epochs"] == 2
        assert record["dataset"] == "digits"
        assert record["model"] == record["flags"]["model"] == "cnn"
        assert set(record["seconds"]) >= {"train", "evaluate"}
        assert record["git_commit"] is None or len(record["git_commit"]) >= 40
    chosen = [record for record in rounds if record["query"]]
    for record in chosen:
        assert record["query_score_max"] >= record["query_score_mean"]
    assert output.count("test accuracy") == 12 + 1
    assert dj.records.table(rounds) in output
    assert (directory / "run" / "accuracy.png").stat().st_size > 10_000


def test_the_same_command_twice(played, run, tmp_path):
    assert run()[0] is None
    kept = []
    for directory in (played[-1], tmp_path):
        rounds = read(directory)
        for record in rounds:
            del record["seconds"], record["flags"]["output_dir"]
        kept.append(rounds)
    assert kept[0] == kept[1]


def test_seeds_can_be_spread(played, run, tmp_path):
    run(first_seed=1, num_seeds=1)
    mine = [record for record in read(played[-1]) if record["seed"] == 1]
    other = read(tmp_path)
    for one, two in zip(mine, other, strict=True):
        assert (one["query"], one["test_accuracy"]) == (two["query"], two["test_accuracy"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dataset": "imagenet"}, "unknown dataset 'imagenet'; choose from digits, cifar10"),
        ({"stem": "cifar"}, "--stem has no effect with cnn, only with resnet18"),
        ({"model": "alexnet"}, "unknown model 'alexnet'; choose from cnn, resnet18"),
        ({"strategies": ["random", "best"]}, "unknown strategy 'best'; choose from dynamical"),
        ({"preset": "table10"}, "unknown preset 'table10' (is it 'table"),
        ({"strategies": []}, "no strategy given; choose from dynamical"),
        ({"strategies": ["random", "random"]}, "a strategy is given twice: random,random"),
        ({"cache_dir": "/proc/none"}, "cannot write to /proc/none/compiled"),
        ({"initial_size": 0}, "initial_size must be at least 1, got 0"),
        ({"batch_size": -1}, "batch_size must be at least 1, got -1"),
        ({"num_rounds": 0}, "num_rounds must be at least 1, got 0"),
        ({"num_seeds": 0}, "num_seeds must be at least 1, got 0"),
        ({"initial_size": 1424}, "need 1434 images, but the pool of digits has 1433"),
        ({"image_size": 3}, "cnn needs images of at least 4×4, got 3×3"),
        ({"model": "vgg11"}, "vgg11 needs images of at least 32×32, got 4×4"),
        ({"gamma": -2.0}, "gamma must be at least 0"),
        ({"gamma": math.nan}, "--gamma must be a finite number, got nan"),
        ({"learning_rate": math.inf}, "--learning_rate must be a finite number, got inf"),
        ({"max_epochs": 10**12}, "--max_epochs must be at most 2147483647, got 1000000000000"),
        ({"first_seed": 2**32 - 1}, "seeds are at most 4294967295: 2 from 4294967295 on are"),
        ({"strategies": ["random"], "gamma": 2.0}, "--gamma has no effect with random, only with"),
        ({"strategies": ["dynamical", "margin"], "beta": 1.0}, "no effect with dynamical, margin"),
        ({"data_dir": "photos"}, "--data_dir has no effect with digits, only with cifar10, svhn"),
        ({"feature_scale": "each"}, "--feature_scale has no effect with images, only with vectors"),
        ({"unreadable": "refuse"}, "--unreadable has no effect with digits, only with a folder"),
        ({"pool_imbalance": ["half"]}, "--pool_imbalance takes numbers from 0 to 1, got 'half'"),
        ({"pool_imbalance": ["1", "2"]}, "must be numbers from 0 to 1, got '1.0,2.0'"),
        ({"strategies": ["power_margin"], "beta": -1.0}, "beta must be at least 0"),
        ({"strategies": ["dynamical_joint"], "num_candidates": 0}, "must be at least 1, got 0"),
        ({"strategies": ["dynamical_repelled"], "block_size": 0}, "block_size must be at least 1"),
        ({"learning_rate": -1.0}, "learning rate must be positive"),
        ({"target_accuracy": 2.0}, "target accuracy must be in"),
        ({"chunk_size": -3}, "chunk size must be at least 1"),
        ({"dataset": "own.npz"}, "there is no file own.npz"),
        ({"dataset": ".ci"}, "no folders; images go into a folder for each class"),
        ({"dataset": ".ci", "channels": 2}, "1 channel (grey) or 3 (RGB), got 2"),
        (
            {"test_dir": "photos"},
            "--test_dir has no effect with digits, only with a folder of imag",
        ),
        ({"workers": 5}, "--workers=5 is more than the 4 runs"),
        ({"workers": 1, "ray_address": "auto"}, "give --workers, for this machine, or"),
        ({"gpus_per_run": 0.5}, "--gpus_per_run has no effect without --ray_address"),
        ({"num_devices": 4096}, "as many as there are, got 4096"),
        ({"process_id": 1}, "--process_id has no effect without --distributed"),
    ],
)
def test_bad_flags_are_one_line(run, tmp_path, values, message):
    status, output, errors = run(**values)
    assert status == 1
    assert output == ""
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert message in errors
    assert not (tmp_path / "run").exists()  # Found before anything was begun.


def test_unexpected_argument(run):
    status, _, errors = run("dataset=cifar10")
    assert status == 1
    assert "unexpected argument 'dataset=cifar10'" in errors


def test_output_directory_of_another_run(played, run):
    directory = played[-1]
    before = read(directory)
    status, _, errors = run(num_seeds=1, learning_rate=0.01, output_dir=str(directory / "run"))
    assert status == 1
    assert (
        "made with other flags (--learning_rate=0.001 there and 0.01 here, --num_seeds=" in errors
    )
    assert read(directory) == before


def test_the_same_command_again_plays_nothing_again(played, run):
    _, first, _, directory = played
    before = read(directory)
    status, output, _ = run(chunk_size=7, output_dir=str(directory / "run"))  # Changes no result.
    assert status is None
    assert "round" not in output.partition("test accuracy (%)")[0]
    assert output.partition("test accuracy (%)")[2] == first.partition("test accuracy (%)")[2]
    assert read(directory) == before


def test_a_failing_run_does_not_stop_the_others(run, tmp_path, monkeypatch):
    score = dj.strategies.Dynamical.score

    def fails_once(self, key, view, state):
        if len(view.labeled.y) == 15:
            raise FloatingPointError("weights fell over\nbadly")
        return score(self, key, view, state)

    monkeypatch.setattr(dj.strategies.Dynamical, "score", fails_once)
    status, output, errors = run()
    assert status == 1
    assert errors.splitlines() == [
        "error: dynamical, seed 0: FloatingPointError: weights fell over",
        "error: dynamical, seed 1: FloatingPointError: weights fell over",
        "error: 2 of 4 runs failed; the same command tries these again",
    ]
    assert "[1/4] dynamical, seed 0 failed: FloatingPointError" in output
    assert "Traceback" in (tmp_path / "run" / "errors.log").read_text()
    kept = [(record["strategy"], record["seed"]) for record in read(tmp_path)]
    assert [kept.count((name, 1)) for name in ("dynamical", "random")] == [1, 3]
    assert (tmp_path / "run" / "accuracy.png").exists()

    monkeypatch.setattr(dj.strategies.Dynamical, "score", score)
    status, output, errors = run()
    assert (status, errors) == (None, "")
    assert len(read(tmp_path)) == 12


@pytest.mark.slow
def test_divergence_leaves_the_directory_to_other_flags(run):
    status, _, errors = run(learning_rate=1e30, optimizer="sgd")
    assert status == 1
    assert errors.count("training diverged") == 4
    assert run(num_seeds=1, num_rounds=1)[0] is None


def test_interruption_is_one_line_and_can_be_continued(run, tmp_path, monkeypatch):
    step, played = dj.Experiment.step, []

    def interrupted(self, *arguments):
        if len(played) == 2:
            raise KeyboardInterrupt
        played.append(self)
        return step(self, *arguments)

    monkeypatch.setattr(dj.Experiment, "step", interrupted)
    status, _, errors = run()
    assert status == 130
    assert errors == "interrupted; the same command continues from here\n"
    assert len(read(tmp_path)) == 2
    monkeypatch.setattr(dj.Experiment, "step", step)
    assert run()[0] is None
    assert len(read(tmp_path)) == 12


def test_presets_are_the_papers_settings_and_flags_prevail(run, monkeypatch):
    seen = {}

    def compare(arms, module, default_dir, pool_shares=None):
        seen.update(arms)
        seen["dataset"] = common.DATASET.value
        return []

    monkeypatch.setattr(common, "compare", compare)
    with flagsaver.flagsaver():
        flags.FLAGS(["binary", "--preset=table5", "--num_rounds=3"])
        assert active_learning.main(["binary"]) is None
    of_the_paper = ["dynamical", "random", "confidence", "margin", "entropy"]
    assert list(seen) == [*of_the_paper, "coreset", "badge", "albl", "dataset"]
    assert {budget for _, budget in list(seen.values())[:-1]} == {dj.Budget(500, 1000, 3)}
    assert seen["dataset"] == "cifar10"


def test_gamma_may_be_infinite(run, tmp_path):
    status, _, _ = run(gamma=float("inf"), strategies=["dynamical"], num_seeds=1)
    assert status is None
    assert {record["flags"]["gamma"] for record in read(tmp_path)} == {"inf"}


def test_help_names_every_choice():
    for name, registry in (
        ("dataset", dj.datasets.DATASETS),
        ("model", dj.models.MODELS),
        ("strategies", dj.STRATEGIES),
    ):
        assert all(choice in flags.FLAGS[name].help for choice in registry)


def test_records_rest_on_real_indices(run, tmp_path):
    run(num_seeds=1, strategies=["random"])
    queries = [index for record in read(tmp_path) for index in record["query"]]
    assert len(set(queries)) == 10
    assert np.isin(queries, dj.datasets.load("digits").index).all()


def test_a_folder_of_ones_own(run, tmp_path, cache_dir):
    photos = tmp_path / "photos"
    for index in range(40):
        path = photos / ("cat", "dog")[index % 2] / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (6, 6), 5 * index).save(path)
    own = {"dataset": str(photos), "image_size": None, "strategies": ["random"], "num_seeds": 1}
    status, output, errors = run(**own)
    assert (status, errors) == (None, "")
    assert "test accuracy (%) on photos" in output
    rounds = read(tmp_path)
    data = dj.datasets.load(str(photos), cache_dir=cache_dir)
    assert rounds[0]["dataset_version"] == data.version
    asked = [index for record in rounds for index in record["initial"] + record["query"]]
    assert len({data.paths[index] for index in asked}) == 20
    assert run(**own)[0] is None
    assert read(tmp_path) == rounds  # Nothing was played again.

    Image.new("L", (6, 6), 0).save(photos / "dog" / "39.png")
    status, _, errors = run(**own)
    assert status == 1
    assert "made with other flags (--dataset_version=" in errors
    status, _, errors = run(**own, test_fraction=0.5)
    assert "no --test_fraction there and 0.5 here" in errors
