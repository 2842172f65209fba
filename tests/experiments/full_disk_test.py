"""A disk that fills up, whenever it does, costs a line and the round that is played."""

import shutil

import numpy as np
import pytest
from full_disk import Disk
from PIL import Image

import dynamical_jax as dj
from dynamical_jax.runs import playing
from experiments import active_learning, select


@pytest.fixture
def photos(tmp_path):
    generator = np.random.default_rng(0)
    for number in range(6):
        pixels = generator.integers(0, 256, (8, 8), np.uint8)
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
    return tmp_path / "photos"


def refuse_at_every_moment(monkeypatch, folder, before, run, outcome):
    """Runs a program on a full disk: full at the first thing that it writes, at the second, …

    Args:
      monkeypatch: pytest's.
      folder: where it writes.
      before: a folder that this one begins as, each time.
      run: runs the program.
      outcome: returns what it has written.

    Returns:
      After how many writes it needs no more.
    """

    def begin():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(before, folder)

    begin()
    with Disk(folder).patched(monkeypatch) as disk:
        assert run()[0] is None
    expected, number = outcome(), disk.written
    assert number > 3
    for full_at in range(1, number + 1):
        begin()
        with Disk(folder, full_at).patched(monkeypatch):
            status, _, errors = run()
        assert status == 1, full_at
        lines = [line for line in errors.splitlines() if not line.startswith("warning: ")]
        assert all(line.startswith("error: ") for line in lines), errors
        assert any("space" in line for line in lines), errors
        assert not [path for path in folder.rglob("*") if ".partial" in path.name], full_at
        # What was written by then is whole, and the same command does the rest.
        assert run()[0] is None
        assert outcome() == expected, full_at
    return number


def tables(folder):
    return {path.name: path.read_text() for path in sorted(folder.glob("*.csv"))}


def test_select_draws_at_random(run_binary, photos, tmp_path, monkeypatch):
    (tmp_path / "before").mkdir()
    (tmp_path / "before" / "labels.csv").write_text("path,label\n0.png,a\n")
    folder = tmp_path / "out"
    monkeypatch.chdir(tmp_path)
    given = {"images": str(photos), "labels": str(folder / "labels.csv"), "batch_size": 2}
    given |= {"output": str(folder / "to_label.csv")}
    run = lambda: run_binary(select, **given)
    refuse_at_every_moment(monkeypatch, folder, tmp_path / "before", run, lambda: tables(folder))


@pytest.mark.slow
def test_select_trains(run_binary, photos, tmp_path, monkeypatch):
    (tmp_path / "before").mkdir()
    (tmp_path / "before" / "labels.csv").write_text("path,label\n0.png,a\n1.png,b\n")
    (tmp_path / "before" / "to_label.csv").write_text("path,label\n2.png,a\n")
    folder = tmp_path / "out"
    given = {"images": str(photos), "labels": str(folder / "labels.csv"), "batch_size": 2}
    given |= {"output": str(folder / "to_label.csv"), "predictions": str(folder / "rest.csv")}
    given |= {"max_epochs": 2, "overwrite": True}
    run = lambda: run_binary(select, **given)
    refuse_at_every_moment(monkeypatch, folder, tmp_path / "before", run, lambda: tables(folder))


@pytest.mark.slow
def test_active_learning(run_binary, tmp_path, monkeypatch):
    (tmp_path / "before").mkdir()
    folder = tmp_path / "out"
    # However long a round takes, the same is written each time.
    monkeypatch.setattr(playing, "WORTH_SAVING", 0.0)
    small = {"initial_size": 10, "batch_size": 5, "num_rounds": 1, "num_seeds": 1, "max_epochs": 2}
    small |= {"strategies": ["random"]}
    run = lambda: run_binary(
        active_learning, output_dir=str(folder), image_size=4, checkpoint_every=1, **small
    )

    def outcome():
        rounds = dj.records.read(folder / "rounds.jsonl")
        return [{**record, "seconds": None, "flags": None} for record in rounds]

    number = refuse_at_every_moment(monkeypatch, folder, tmp_path / "before", run, outcome)
    print(f"{number} moments")
