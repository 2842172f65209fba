"""One run of two processes, as on two hosts, of a folder of images that they share."""

import importlib.util
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import hosts
import jax
import numpy as np
import pytest
import tiny_weights
import toy
from PIL import Image

import dynamical_jax as dj

# Notes which files are decoded.
COUNTING = """
import os
from dynamical_jax.data import images
from dynamical_jax.programs import binary
from experiments import active_learning

read = images.read

def noted(path, *options):
    with open(os.environ["DECODED"], "a") as file:
        file.write(f"{path}\\n")
    return read(path, *options)

images.read = noted
binary.launch(active_learning.main)
"""
PROGRAM = (
    *(sys.executable, "-c", COUNTING, "--num_seeds=1", "--num_rounds=2", "--initial_size=30"),
    *("--batch_size=10", "--max_epochs=40", "--checkpoint_every=5"),
)


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def start(devices, host, *flags):
    """Starts a process that has the cache of a host, beside which it notes what it decodes."""
    host.mkdir(exist_ok=True)
    compiled = pathlib.Path(os.environ["DYNAMICAL_JAX_TEST_CACHE"], "compiled")
    if not (host / "compiled").is_symlink():
        (host / "compiled").symlink_to(compiled)
    environment = {"JAX_NUM_CPU_DEVICES": str(devices), "NPROC": "1", "DECODED": host / "decoded"}
    return subprocess.Popen(
        [*PROGRAM, f"--cache_dir={host}", *flags],
        cwd=toy.ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_two(hosts, *flags, other=()):
    address = f"--coordinator_address=127.0.0.1:{free_port()}"
    common = ["--distributed", address, "--num_processes=2", *flags]
    return [
        start(2, hosts / f"host {i}", *common, f"--process_id={i}", *(i * other)) for i in range(2)
    ]


def decoded(host):
    """Returns the names of the files that a host has decoded, each as often as it has."""
    return [pathlib.Path(line).name for line in (host / "decoded").read_text().splitlines()]


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
def folder(tmp_path_factory):
    """The digits as image files; one of them is broken."""
    path, digits = tmp_path_factory.mktemp("digits"), dj.datasets.load("digits")
    x, y = digits.pool
    for label in range(10):
        (path / str(label)).mkdir()
    for row in range(len(y)):
        Image.fromarray(x[row, ..., 0]).save(path / str(y[row]) / f"{row:04d}.png")
    (path / "3" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n but not so")
    return path


@pytest.fixture(scope="module")
def expected(tmp_path_factory, folder):
    path = tmp_path_factory.mktemp("one")
    process = start(4, path / "host", f"--dataset={folder}", f"--output_dir={path}")
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert len(decoded(path / "host")) == 1434
    return outcome(path)


def test_hosts_that_share_a_folder(tmp_path, request):
    """What they compute is what one device does, and each decodes its half."""
    folder, draw = tmp_path / "photos", np.random.default_rng(0)
    for i in range(40):  # Grey but for one, which the second host looks at.
        shape = (4, 4, 3) if i == 3 else (4, 4)
        path = folder / "ab"[i // 24] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, shape, np.uint8)).save(path)
    (folder / "a" / "05 broken.png").write_bytes(b"")
    weights = []
    if importlib.util.find_spec("safetensors"):
        weights = [tiny_weights.save(tmp_path / "vit.safetensors", tiny_weights.vit())]
    with pytest.warns(UserWarning, match="1 of 41 image files cannot be read"):
        expected = hosts.work(str(folder), str(tmp_path / "one"), *(weights or [None]))
    shutil.rmtree(f"{folder} embedded", ignore_errors=True)
    address = f"127.0.0.1:{free_port()}"
    started = [
        subprocess.Popen(
            [sys.executable, "hosts.py", address, str(i), folder, tmp_path / f"{i}", *weights],
            cwd=toy.ROOT / "tests",
            env={**os.environ, "JAX_NUM_CPU_DEVICES": "2", "NPROC": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    ended = [process.communicate() for process in started]
    assert [process.returncode for process in started] == [0, 0], ended
    assert all("1 of 41 image files cannot be read" in errors for _, errors in ended)
    expected = json.loads(json.dumps(expected))
    of_hosts = [json.loads(output.splitlines()[-1]) for output, _ in ended]
    for found in of_hosts:
        for name in filter(expected.__contains__, hosts.SAME):
            assert found[name] == of_hosts[0][name]
            ours, as_one = (
                np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(of[name])])
                for of in (found, expected)
            )
            np.testing.assert_allclose(ours, as_one, rtol=1e-4, atol=1e-5, err_msg=name)
        assert found["mean"] == expected["mean"]  # Whole numbers are added up.
        assert found["versions"] == expected["versions"]
        # Of the other's it decodes what is labeled, and a few to try the model.
        assert found["others"] <= 8
        assert found["refused"] == [
            f"{folder}/a/00.png is not the image that process 0 has decoded: all hosts need the "
            "same files and the same version of Pillow",
            "the number of devices must be from 3 to 4, as many as there are, got 2",
        ]
    assert len(set(expected["versions"])) == 1
    # In the cache of both and in those of each, what one has embedded the other has not.
    assert sum(found.get("number embedded", 40) for found in of_hosts) == 2 * 40
    # Its share, and three of the other's, to try them.
    assert [found["decoded"] for found in of_hosts] == [21 + 3, 20 + 3]
    # All is there; the second has lost its share; one host had decoded all, but the broken one.
    assert [found["again"] for found in of_hosts] == [[3, 3, 3], [3, 20 + 3, 1 + 3]]


@pytest.mark.slow
def test_two_processes_are_one_run(tmp_path, folder, expected):
    flags = (f"--dataset={folder}", f"--output_dir={tmp_path}")
    processes = start_two(tmp_path, *flags)
    (output, errors), (silence, more_errors) = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors + more_errors
    assert output.count("test accuracy") == 2 * 3 + 1
    assert "1 of 1434 image files cannot be read" in errors
    # On CPUs the library for collectives says that it is there.
    assert [line for line in silence.splitlines() if not line.startswith("[Gloo]")] == []
    assert more_errors == ""
    assert_same(tmp_path, expected)
    # Each has decoded its own half; of the other's what was labeled, and a few to try the files and
    # the model; and none of them twice.
    files = [path.name for path in sorted(folder.glob("*/*.png"))]
    labeled = {files[i] for record in expected for i in record["initial"] + record["query"]}
    for host in range(2):
        names = decoded(tmp_path / f"host {host}")
        own = {name for i, name in enumerate(files) if i % 2 == host}
        others = set(names) - own
        assert own | labeled <= set(names)
        assert len(others - labeled) <= 8
        assert len(names) == len(set(names))


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_one_is_killed_and_the_same_command_continues(tmp_path, folder, expected, killed):
    flags = (f"--dataset={folder}", f"--output_dir={tmp_path}")
    processes = start_two(tmp_path, *flags)
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
    processes = start_two(tmp_path, *flags)
    (_, errors), _ = [process.communicate() for process in processes]
    assert processes[0].returncode == 0, errors
    assert_same(tmp_path, expected)


@pytest.mark.slow
def test_other_flags_on_one_of_them(tmp_path):
    processes = start_two(tmp_path, f"--output_dir={tmp_path}", other=("--learning_rate=0.1",))
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
