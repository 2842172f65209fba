"""Programs killed at random moments, and continued, end with what one left alone has written.

`SOAK_KILLS` for each program; by default 5.
"""

import csv
import os
import random
import time

import forks
import numpy as np
import pytest
from PIL import Image

import dynamical_jax as dj

KILLS = int(os.environ.get("SOAK_KILLS", 5))
EXPERIMENT = (
    "--strategies=dynamical,albl",
    "--num_seeds=1",
    "--num_rounds=4",
    "--max_epochs=40",
    "--initial_size=30",
    "--batch_size=10",
    "--checkpoint_every=5",
)


def finish(process):
    process.join()
    assert process.exitcode == 0


def kill(process, seconds):
    """Kills a process after some time; returns whether it was still running."""
    process.join(seconds)
    if process.exitcode is not None:
        assert process.exitcode == 0
        return False
    process.kill()
    process.join()
    return True


def played(directory):
    rounds = dj.records.read(directory / "rounds.jsonl")
    for record in rounds:
        del record["seconds"], record["flags"]["output_dir"]
    return rounds


@pytest.mark.slow
def test_active_learning(tmp_path):
    cache = f"--cache_dir={tmp_path / 'cache'}"
    run = lambda name: forks.start(
        "experiments.active_learning", *EXPERIMENT, cache, f"--output_dir={tmp_path / name}"
    )
    finish(run("whole"))  # Compiles.
    took = time.monotonic()
    finish(run("again"))
    took = time.monotonic() - took
    expected = played(tmp_path / "whole")
    assert len(expected) == 2 * 5

    moments, kills, ends, recorded = random.Random(0), 0, 0, []
    while kills < KILLS:
        name = f"killed-{ends}"  # A run that has ended makes place for a new one.
        if not kill(run(name), moments.uniform(0.1, 0.6) * took):
            assert played(tmp_path / name) == expected
            ends += 1
            continue
        kills += 1
        rounds = tmp_path / name / "rounds.jsonl"
        recorded.append(rounds.read_bytes().count(b"\n") if rounds.exists() else 0)
    finish(run(name))
    assert played(tmp_path / name) == expected
    print(
        f"active_learning: {kills} kills, {ends + 1} runs continued to their end, all records equal"
    )
    print(f"  rounds recorded at the kills: {recorded}")


@pytest.mark.slow
def test_select(tmp_path):
    """A person fills in each proposal; the program is killed in every round."""
    generator = np.random.default_rng(0)
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(40):
        pixels = generator.integers(0, 128, (8, 8), np.uint8)
        pixels[:, 4 * (number % 2) :][:, :4] += 100
        Image.fromarray(pixels).save(photos / f"{number:02d}.png")

    def run(name):
        folder = tmp_path / name
        return forks.start(
            "dynamical_jax.programs.select",
            *(f"--images={photos}", f"--labels={folder / 'labels.csv'}", "--batch_size=3"),
            *(f"--output={folder / 'to_label.csv'}", f"--predictions={folder / 'rest.csv'}"),
            *("--max_epochs=20", f"--cache_dir={tmp_path / 'cache'}"),
        )

    def fill_in(name):
        path = tmp_path / name / "to_label.csv"
        rows = list(csv.reader(path.read_text().splitlines()))
        for row in rows[1:]:
            row[1] = "right" if int(row[0][:2]) % 2 else "left"
        path.write_text("\n".join(map(",".join, rows)) + "\n")

    def tables(name):
        folder = tmp_path / name
        return {path.name: path.read_text() for path in sorted(folder.glob("*.csv"))}

    num_rounds = 4
    expected, took = [], []
    for _ in range(num_rounds):
        began = time.monotonic()
        finish(run("whole"))
        took.append(time.monotonic() - began)
        expected.append(tables("whole"))
        fill_in("whole")

    moments, kills, sittings = random.Random(1), 0, 0
    while kills < KILLS:
        name = f"killed-{sittings}"
        sittings += 1
        for number in range(num_rounds):
            for _ in range(moments.randrange(4)):  # Killed up to three times in a row.
                kills += kill(run(name), moments.uniform(0.1, 1.0) * min(took))
            finish(run(name))
            assert tables(name) == expected[number], (name, number)
            fill_in(name)
    print(f"select: {kills} kills in {sittings} sittings of {num_rounds} rounds, all tables equal")
