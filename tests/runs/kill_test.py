"""A run killed at random moments, and continued, ends with the records of one left alone."""

import pathlib
import random
import subprocess
import sys

import pytest

import dynamical_jax as dj

CHECKOUT = pathlib.Path(__file__).parent.parent.parent
FLAGS = (
    "--strategies=dynamical,albl",
    "--num_seeds=2",
    "--num_rounds=4",
    "--initial_size=30",
    "--batch_size=10",
    "--checkpoint_every=5",
)
KILLS = 20


def outcome(directory):
    rounds = dj.records.read(directory / "rounds.jsonl")
    for record in rounds:
        del record["seconds"], record["flags"]["output_dir"]
    return rounds


@pytest.mark.slow
def test_kill_9_at_random_moments(tmp_path):
    def command(name):
        cache = f"--cache_dir={tmp_path / 'cache'}"
        binary = [sys.executable, "-m", "experiments.active_learning"]
        return [*binary, *FLAGS, cache, f"--output_dir={tmp_path / name}"]

    subprocess.run(command("whole"), cwd=CHECKOUT, check=True, capture_output=True)
    expected = outcome(tmp_path / "whole")
    assert len(expected) == 2 * 2 * 5

    moments, kills, ends = random.Random(0), 0, 0
    while kills < KILLS:
        name = f"killed-{ends}"  # A run that has ended makes place for a new one.
        process = subprocess.Popen(
            command(name), cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            process.communicate(timeout=moments.uniform(2.0, 9.0))
            assert process.returncode == 0
            assert outcome(tmp_path / name) == expected
            ends += 1
            continue
        except subprocess.TimeoutExpired:
            process.kill()
        output, _ = process.communicate()
        kills += 1
        rounds = tmp_path / name / "rounds.jsonl"
        recorded = rounds.read_bytes().count(b"\n") if rounds.exists() else 0
        said = [line for line in output.splitlines() if "continued" in line or "dropped" in line]
        print(f"kill {kills}: {recorded} of 20 rounds recorded; {said}")
    done = subprocess.run(command(name), cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert outcome(tmp_path / name) == expected
