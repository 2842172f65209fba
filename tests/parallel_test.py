"""Several devices compute what one computes, and exchange no more than they must."""

import json
import os
import subprocess
import sys
import unittest.mock

import jax
import numpy as np
import pytest
import toy

import dynamical_jax as dj
from dynamical_jax import parallel
from dynamical_jax.gradients.blocks import block_at

SAME = ("fit", "evaluation", "grad_s", "change", "outputs", "few")


def compute(*arguments):
    command = [sys.executable, "devices.py", *arguments]
    done = subprocess.run(command, cwd=toy.ROOT / "tests", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("dtype", "counts", "tolerance"),
    [
        ("float64", "1,8", 1e-12),
        pytest.param("float64", "1,2,4", 1e-12, marks=pytest.mark.slow),
        pytest.param("float32", "1,2,4,8", 1e-5, marks=pytest.mark.slow),
    ],
)
def test_as_on_one_device(dtype, counts, tolerance):
    found = compute(dtype, counts)
    expected = found.pop("1")
    assert expected["scoring"] == []
    for count, values in found.items():
        for name in SAME:
            largest = np.max(np.abs(expected[name]))
            np.testing.assert_allclose(
                values[name], expected[name], rtol=tolerance, atol=tolerance * largest, err_msg=name
            )
        assert values["query"] == expected["query"]
        # As on one device, the lower of equally far ones first; each device holds its share.
        shares, exchanged = values["chosen"].pop("shares"), values["chosen"].pop("per choice")
        assert values["chosen"] == expected["chosen"]
        assert shares == [-(-36 // int(count))] * int(count)
        # For a choice a point and the farthest of each device, never all points.
        point = 3 * np.dtype(dtype).itemsize
        assert sum(size for _, size in exchanged) <= 16 * int(count) + 8 * point, exchanged
        # Nothing is exchanged while the pool is scored; once, in the end, for g_S.
        assert values["scoring"] == []
        assert values["total"] == [["all-reduce", values["parameters"]]]
        # A step exchanges the gradient, and statistics of BatchNorm; nothing as large as a batch.
        assert {name for name, _ in values["step"]} == {"all-reduce"}, count
        exchanged = sum(size for _, size in values["step"])
        assert values["parameters"] <= exchanged <= 1.5 * values["parameters"], values["step"]


def test_more_devices_than_there_are():
    count = len(jax.devices()) + 1
    with pytest.raises(dj.UserError, match=f"from 1 to {count - 1}, .* got {count}"):
        parallel.make_mesh(count)


def test_one_device_is_no_mesh():
    assert parallel.make_mesh(1) is None
    assert parallel.multiple(5, None) == 5


class Owned(np.ndarray):
    """Rows of which each belongs to a host."""


@pytest.mark.parametrize("share_of_second", [0, 0.1, 0.3, 1])
def test_devices_work_on_rows_of_their_own_hosts(share_of_second):
    hosts, draw = [0, 0, 1, 1], np.random.default_rng(0)
    devices = np.array([unittest.mock.Mock(process_index=host) for host in hosts])
    mesh = unittest.mock.Mock(spec=jax.sharding.Mesh, devices=devices)
    data = np.arange(31).view(Owned)
    data.owners = (draw.random(31) < share_of_second).astype(int)
    x = dj.types.Rows(data, draw.permutation(31)[:23])  # Some are labeled.
    order, rows, start, block_size = parallel.Order(x, mesh), [], 0, 8
    while start < order.size:
        positions, counted = order.block(*block_at(start, block_size, order.size))
        assert len(positions) == block_size
        rows.append(positions[counted])
        of_device = np.repeat(hosts, block_size // 4)[counted]
        np.testing.assert_array_equal(parallel.owners(x)[positions[counted]], of_device)
        some = np.isin(np.repeat(hosts, block_size // 4), parallel.owners(x))
        np.testing.assert_array_equal(  # Fillings, too, where a host has any.
            parallel.owners(x)[positions[some]], np.repeat(hosts, block_size // 4)[some]
        )
        start, block_size = start + block_size, 4  # As where memory has run out.
    found = order.restore(rows, np.asarray(x[np.concatenate(rows)]))
    np.testing.assert_array_equal(found, x[:])


@pytest.mark.slow
def test_each_device_holds_its_share_of_a_million_features():
    found = compute("million")
    print(found)
    assert found["shares"] == [found["all"] // 8] * 8
    assert found["chosen"] == found["expected"]


ENDED = """
import os, sys
from dynamical_jax import parallel
parallel._say_in_one_line_if_ended()
os.write(2, b"dozens of lines\\n")
print("ours", file=sys.stderr)
if sys.argv[1] == "ended by JAX":
    os.abort()
"""


def test_a_process_that_jax_ends_says_so_in_one_line(tmp_path):
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    pipes = {"env": environment, "stderr": subprocess.PIPE, "text": True, "cwd": toy.ROOT}
    ways = ("ended by JAX", "by itself")
    started = [subprocess.Popen([sys.executable, "-c", ENDED, way], **pipes) for way in ways]
    ended, by_itself = (process.communicate()[1] for process in started)
    (log,) = tmp_path.iterdir()
    line = f"what JAX says is in {log}); the same command, on all of them, continues\n"
    assert ended == f"ours\nerror: the processes of this run have lost each other ({line}"
    assert log.read_text().startswith("dozens of lines\n")
    assert by_itself == "ours\n"
    assert started[1].returncode == 0
