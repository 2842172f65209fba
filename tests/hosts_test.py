"""One run of two processes, as on two hosts."""

import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import toy

import dynamical_jax as dj

PROGRAM = (
    *(sys.executable, "-m", "experiments.active_learning", "--num_seeds=1", "--num_rounds=2"),
    *("--initial_size=30", "--batch_size=10", "--max_epochs=40", "--checkpoint_every=5"),
)


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def start(devices, *flags):
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices), "NPROC": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*PROGRAM, *flags], cwd=toy.ROOT, env=environment, **pipes)


def start_two(*flags, other=()):
    address = f"--coordinator_address=127.0.0.1:{free_port()}"
    common = ["--distributed", address, "--num_processes=2", *flags]
    return [start(2, *common, f"--process_id={i}", *(i * other)) for i in range(2)]


def outcome(directory):
    return dj.records.read(directory / "rounds.jsonl")


def assert_same(directory, expected):
    found = outcome(directory)
    assert len(found) == len(expected)
    for one, two in zip(found, expected, strict=True):
        for name in ("strategy", "round", "initial", "query", "epochs", "test_accuracy"):
            assert one[name] == two[name]
        np.testing.assert_allclose(one["test_loss"], two["test_loss"], rtol=1e-4)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    path = tmp_path_factory.mktemp("one")
    process = start(4, f"--output_dir={path}")
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return outcome(path)


@pytest.mark.slow
def test_two_processes_are_one_run(tmp_path, expected):
    processes = start_two(f"--output_dir={tmp_path}")
    (output, errors), (silence, more_errors) = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors + more_errors
    assert output.count("test accuracy") == 2 * 3 + 1
    # On CPUs the library for collectives says that it is there.
    assert [line for line in silence.splitlines() if not line.startswith("[Gloo]")] == []
    assert_same(tmp_path, expected)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_one_is_killed_and_the_same_command_continues(tmp_path, expected, killed):
    processes = start_two(f"--output_dir={tmp_path}")
    for line in processes[0].stdout:
        if "round 1/2" in line:
            break
    processes[killed].send_signal(signal.SIGKILL)
    at = time.monotonic()
    _, errors = processes[1 - killed].communicate(timeout=60)
    print(f"ended after {time.monotonic() - at:.1f} s: {errors}")
    processes[killed].communicate()
    assert processes[1 - killed].returncode != 0
    # One line, ours; a second where JAX ends the process after the exchange has failed.
    said = [line for line in errors.splitlines() if not line.startswith("warning: ")]
    assert 1 <= len(said) <= 2, errors
    assert all("the processes of this run have lost each other" in line for line in said)
    processes = start_two(f"--output_dir={tmp_path}")
    (_, errors), _ = [process.communicate() for process in processes]
    assert processes[0].returncode == 0, errors
    assert_same(tmp_path, expected)


@pytest.mark.slow
def test_other_flags_on_one_of_them(tmp_path):
    processes = start_two(f"--output_dir={tmp_path}", other=("--learning_rate=0.1",))
    for process in processes:
        _, errors = process.communicate()
        assert process.returncode == 1
        assert "error: the processes do not agree on flags, data and code\n" in errors


def test_no_coordinator(monkeypatch):
    monkeypatch.setattr(dj.parallel, "PATIENCE", 0.1)
    with pytest.raises(dj.UserError, match=r"no coordinator at 127\.0\.0\.1"):
        dj.parallel.join(f"127.0.0.1:{free_port()}", 2, 1)
    with pytest.raises(dj.UserError, match="address is host:port, got nowhere"):
        dj.parallel.join("nowhere", 2, 1)
