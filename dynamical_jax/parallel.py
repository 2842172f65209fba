"""One run on several devices, of one host or of many.

The devices are a mesh of one axis, `AXIS`. Examples are divided over it by rows; parameters, the
state of the optimiser and g_S are on each device. Everywhere `mesh=None` is one device.

Scores and outputs are computed by each device for its own rows (`on_each`); nothing is exchanged.
g_S is summed on each device and exchanged once. Training is one program over all rows of a batch,
of which the compiler gives each device its share (`divided`), so that the gradient and the
statistics of BatchNorm are those of the whole batch.

Of a set with an attribute `owners` each host has only some rows at hand. `Order` puts these on its
own devices; what hosts find out about their rows comes together by `of_all_rows`.
"""

import atexit
import functools
import math
import numbers
import os
import pickle
import re
import socket
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dynamical_jax.errors import UserError, reason
from dynamical_jax.types import Rows, take_rows

AXIS = "data"

PATIENCE = 60
"""Seconds within which all processes have to be there."""

HEARTBEAT = 30
"""Seconds without a sign of life after which a process counts as dead."""

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


def make_mesh(num_devices: int | None = None) -> Mesh | None:
    """Returns a mesh of the first devices, or None for one device.

    Args:
      num_devices: how many; all, those of other hosts included, if None.

    Raises:
      UserError: if there are fewer, or hosts are left without one.
    """
    devices = jax.devices()
    count = len(devices) if num_devices is None else num_devices
    hosts = [device.process_index for device in devices]
    least = max(map(hosts.index, hosts)) + 1  # With the first of the last host.
    if not isinstance(count, numbers.Integral) or not least <= count <= len(devices):
        raise UserError(
            f"the number of devices must be from {least} to {len(devices)}, as many as there are, "
            f"got {count!r}"
        )
    if count == 1:
        return None
    return jax.make_mesh((count,), (AXIS,), axis_types=(AxisType.Auto,), devices=devices[:count])


def num_devices(mesh: Mesh | None) -> int:
    """Returns the number of devices of a mesh."""
    return 1 if mesh is None else mesh.size


def multiple(count: int, mesh: Mesh | None) -> int:
    """Returns the next number of rows that all devices have an equal share of."""
    return -(-count // num_devices(mesh)) * num_devices(mesh)


def rows(x: Any, positions: np.ndarray, mesh: Mesh | None) -> Any:
    """Returns `x[positions]`, divided over the devices; each host reads the rows of its own.

    Args:
      x: anything that gathers rows.
      positions: as many as a multiple of the devices.
      mesh: the devices.
    """
    if mesh is None:
        return take_rows(x, positions)
    sharding = NamedSharding(mesh, P(AXIS))
    if jax.process_count() == 1:
        return jax.device_put(x[positions], sharding)
    shape = (len(positions), *x.shape[1:])
    return jax.make_array_from_callback(
        shape, sharding, lambda index: np.asarray(x[positions[index[0]]])
    )


def shares(x: Any, mesh: Mesh | None) -> jax.Array:
    """Returns an array of which each device holds an equal share of the rows; the last are filled.

    Args:
      x: `[n, ...]` the same array on every host; more rows of zeros follow, up to a `multiple`.
      mesh: the devices.
    """
    if mesh is None:
        return jnp.asarray(x)
    x = np.asarray(x, jax.dtypes.canonicalize_dtype(x.dtype))
    size = multiple(len(x), mesh)

    def share(index: tuple[slice, ...]) -> np.ndarray:
        part = x[index[0]]
        filling = np.zeros((size // mesh.size - len(part), *x.shape[1:]), x.dtype)
        return np.concatenate([part, filling]) if len(filling) else part

    sharding = NamedSharding(mesh, P(AXIS))
    return jax.make_array_from_callback((size, *x.shape[1:]), sharding, share)


def make_owners(count: int) -> np.ndarray:
    """Returns `[count]` the process to which each row of a set belongs, for the whole run.

    They take turns, as sets are often sorted by class.
    """
    return np.arange(count) % jax.process_count()


def owners(x: Any) -> np.ndarray | None:
    """Returns `[n]` the process that has each row of x at hand; None where all have all of them."""
    if isinstance(x, Rows):
        of_data = owners(x.data)
        return None if of_data is None else of_data[x.indices]
    return getattr(x, "owners", None)


def own_rows(x: Any) -> Any:
    """Returns the rows of x that this process has at hand."""
    found = owners(x)
    return x if found is None else Rows(x, np.flatnonzero(found == jax.process_index()))


def of_all_rows(own: Sequence[Any], owners: np.ndarray | None) -> list[Any]:
    """Returns a value of each row of a set, of which each process gives those of its own rows."""
    if owners is None:
        return list(own)
    values: list[Any] = [None] * len(owners)
    for process, part in enumerate(gather(list(own))):
        for row, value in zip(np.flatnonzero(owners == process).tolist(), part, strict=True):
            values[row] = value
    return values


class Order:
    """The order in which the rows of a set are worked on, on each device those of its own host.

    Where all hosts have all rows at hand it is that of the rows.

    Args:
      x: the set; its `owners` decide.
      mesh: the devices.

    Attributes:
      size: number of slots: as many as rows, or more, so that each device has as many.
    """

    def __init__(self, x: Any, mesh: Mesh | None):
        self.size, self._steps = len(x), None
        found = None if mesh is None else owners(x)
        if found is None:
            return
        hosts = [device.process_index for device in mesh.devices.flat]
        of_hosts = [np.flatnonzero(found == host) for host in hosts]
        of_devices = [
            rows[hosts[:i].count(hosts[i]) :: hosts.count(hosts[i])]
            for i, rows in enumerate(of_hosts)
        ]
        self._counts = np.array([[len(rows)] for rows in of_devices])
        most = self._counts.max()
        # Those with fewer are filled up with copies, of their host's rows if it has any.
        fillings = [rows[:1] if len(rows) else np.zeros(1, int) for rows in of_hosts]
        self._steps = np.stack(
            [
                np.resize(rows if len(rows) else filling, most)
                for rows, filling in zip(of_devices, fillings, strict=True)
            ]
        )
        self.size = self._steps.size

    def block(self, slots: np.ndarray, count: int) -> tuple[np.ndarray, slice | np.ndarray]:
        """Returns the rows of a block of slots, and an index of those that count.

        Args:
          slots: as from `blocks.block_at`, of a size and start that are multiples of the devices.
          count: how many of the slots count.
        """
        if self._steps is None:
            return slots, slice(count)
        devices, most = self._steps.shape
        steps = slots[0] // devices + np.arange(len(slots) // devices)
        rows = self._steps[:, np.minimum(steps, most - 1)]
        return rows.ravel(), (steps < self._counts).ravel()

    def restore(self, rows: Sequence[np.ndarray], tree: Any) -> Any:
        """Returns arrays in the order of the set.

        Args:
          rows: those that count of each block.
          tree: of arrays with the results for these, block by block, on their first axis.
        """
        if self._steps is None:
            return tree
        back = np.argsort(np.concatenate(rows))
        return jax.tree.map(lambda leaf: leaf[back], tree)


def replicate(tree: Any, mesh: Mesh | None) -> Any:
    """Returns the arrays of a tree, equal on all hosts, on each device."""
    if mesh is None:
        return tree
    sharding = NamedSharding(mesh, P())

    def put(leaf: Any) -> Any:
        if jax.process_count() == 1 or (isinstance(leaf, jax.Array) and leaf.sharding == sharding):
            return jax.device_put(leaf, sharding)
        if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(put(jax.random.key_data(leaf)))
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return jax.tree.map(put, tree)


def is_on_each(x: Any, mesh: Mesh | None) -> bool:
    """Returns whether x is an array of which each of the devices has all rows."""
    if not isinstance(x, jax.Array):
        return False
    return mesh is None or x.sharding == NamedSharding(mesh, P())


def fetch(tree: Any) -> Any:
    """Returns the arrays of a tree in NumPy, whole, on every host; waits once for all of them."""

    def whole(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array) and not (
            leaf.is_fully_addressable or leaf.is_fully_replicated
        ):
            return _together(leaf, leaf.sharding.mesh)
        return leaf

    return jax.device_get(jax.tree.map(whole, tree))


def on_each(function: Callable[..., Any], mesh: Mesh | None, *by_rows: bool) -> Callable[..., Any]:
    """Returns a function that each device runs for its own rows; for one device, `function`.

    Args:
      function: returns arrays with the rows on their first axis.
      mesh: the devices.
      by_rows: of each argument, whether it is divided by rows or on each device.
    """
    if mesh is None:
        return function
    specs = tuple(P(AXIS) if divided else P() for divided in by_rows)
    # The engine's custom derivatives are refused by the check of varying axes.
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=P(AXIS), check_vma=False)


def total(partial: Any, mesh: Mesh | None) -> Any:
    """Returns the sum over the devices, each of which has one row of each array: one exchange."""
    return partial if mesh is None else _total(partial, mesh)


@functools.partial(jax.jit, static_argnames="mesh", donate_argnames="partial")
def _total(partial: Any, mesh: Mesh) -> Any:
    def exchange(partial: Any) -> Any:
        flat, restore = ravel_pytree(jax.tree.map(lambda leaf: leaf[0], partial))
        return restore(jax.lax.psum(flat, AXIS))

    return jax.shard_map(exchange, mesh=mesh, in_specs=P(AXIS), out_specs=P(), check_vma=False)(
        partial
    )


def join(
    address: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Makes this process and those on other hosts one: from here on all of their devices are there.

    On Slurm, Open MPI, Kubernetes and Cloud TPU no argument is needed. All processes must then do
    the same things in the same order. Called before anything else of JAX.

    Args:
      address: host:port of the first process.
      num_processes: how many there are.
      process_id: which one this is, from 0.

    Raises:
      UserError: if the others are not found within `PATIENCE` seconds, or nothing says where
        they are, or they have more devices than this one, or fewer.
    """
    if address is not None and num_processes != 1 and process_id:
        _wait_for(address)
    try:
        jax.distributed.initialize(
            address,
            num_processes,
            process_id,
            initialization_timeout=PATIENCE,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=HEARTBEAT,
        )
    except (RuntimeError, ValueError, TypeError) as error:
        raise UserError(
            f"cannot join the other processes ({reason(error)}): outside of a cluster that JAX "
            "knows, give --coordinator_address, --num_processes and --process_id"
        ) from error
    _say_in_one_line_if_ended()
    devices = Counter(device.process_index for device in jax.devices())
    if len(set(devices.values())) > 1:  # JAX cannot gather then.
        raise UserError(
            "each process needs as many devices as the others; they have "
            f"{', '.join(str(devices[process]) for process in sorted(devices))}"
        )


def lost(why: str) -> UserError:
    """Returns the error of a process that alone may have failed, or whose others have."""
    return UserError(
        f"the processes of this run have lost each other ({why}); the same command, on all of "
        "them, continues"
    )


def _say_in_one_line_if_ended() -> None:
    """Makes one line of the dozens that JAX writes when it ends this process, as others are lost.

    It does that from a thread of its own, before Python hears of it. So what is not written by
    Python goes to a file, and a process that does nothing else prints the line, if this one ends
    without a word.
    """
    ours = os.dup(2)
    with tempfile.NamedTemporaryFile(prefix="dynamical_jax-", suffix=".log", delete=False) as log:
        os.dup2(log.fileno(), 2)
    sys.stderr.flush()
    sys.stderr = os.fdopen(ours, "w", buffering=1, encoding="utf-8", errors="backslashreplace")
    line = f"error: {lost(f'what JAX says is in {log.name}')}"
    program = "import sys; sys.stdin.read() or sys.exit(sys.argv[1])"
    watcher = subprocess.Popen(
        [sys.executable, "-Sc", program, line],
        stdin=subprocess.PIPE,
        stderr=ours,
        start_new_session=True,  # Ctrl-C is not for it.
    )

    def end_with_a_word() -> None:
        watcher.communicate(b"ended")
        os.unlink(log.name)

    atexit.register(end_with_a_word)


def _wait_for(address: str) -> None:
    """Raises `UserError` unless something answers there: JAX would end the process instead."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"the coordinator's address is host:port, got {address}")
    until = time.monotonic() + PATIENCE
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                raise UserError(
                    f"no coordinator at {address} within {PATIENCE} seconds ({error}): is process "
                    "0 running, and its port open?"
                ) from error
            time.sleep(0.5)


def speaks() -> bool:
    """Whether this process is the only one, or the first, which alone speaks."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def broadcast(value: Any = None) -> Any:
    """Returns, in every process, the value that the first one gives."""
    if jax.process_count() == 1:
        return value
    data = np.frombuffer(pickle.dumps(value) if jax.process_index() == 0 else b"", np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    data = data if jax.process_index() == 0 else np.zeros(size, np.uint8)
    return pickle.loads(multihost_utils.broadcast_one_to_all(data).tobytes())


def gather(value: Any) -> list[Any]:
    """Returns, in every process, the values that all of them give, in their order."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(data)))
    filled = np.zeros(np.max(sizes), np.uint8)
    filled[: len(data)] = data
    parts = multihost_utils.process_allgather(filled)
    return [pickle.loads(part[:size].tobytes()) for part, size in zip(parts, sizes, strict=True)]


def smallest(value: int) -> int:
    """Returns the smallest of what the processes give: what each measures may differ."""
    if jax.process_count() == 1:
        return value
    return int(np.min(multihost_utils.process_allgather(np.int32(value))))


def check_agreement(what: str, value: Any) -> None:
    """Raises `UserError`, in every process, unless all of them have the same value.

    Args:
      what: the value, for the message.
      value: an array, or anything of which `repr` says all.
    """
    if jax.process_count() == 1:
        return
    data = value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode()
    digests = multihost_utils.process_allgather(np.uint32(zlib.crc32(data)))
    if len(set(digests.tolist())) > 1:
        raise UserError(f"the processes do not agree on {what}")


def argmax(values: Any, mesh: Mesh | None) -> jax.Array:
    """Returns the position of the largest value, the lowest of equals; inside `jax.jit`.

    The devices, each of which has a share of the values, tell each other their largest.
    """
    if mesh is None:
        return jnp.argmax(values)

    def largest(values: Any) -> jax.Array:
        here = jnp.argmax(values)
        place = here + jax.lax.axis_index(AXIS) * len(values)
        of_devices, places = jax.lax.all_gather((values[here], place), AXIS)
        return places[jnp.argmax(of_devices)]

    specs = {"in_specs": P(AXIS), "out_specs": P()}
    return jax.shard_map(largest, mesh=mesh, **specs, check_vma=False)(values)


def row(tree: Any, position: Any, mesh: Mesh | None) -> Any:
    """Returns a row of each array of a tree; inside `jax.jit`. Only these rows are exchanged."""
    if mesh is None:
        return jax.tree.map(lambda leaf: leaf[position], tree)

    def of_owner(tree: Any, position: Any) -> Any:
        def own(leaf: Any) -> Any:
            here = position - jax.lax.axis_index(AXIS) * len(leaf)
            is_mine = (here >= 0) & (here < len(leaf))
            return jnp.where(is_mine, leaf[jnp.where(is_mine, here, 0)], 0)

        return jax.lax.psum(jax.tree.map(own, tree), AXIS)

    specs = {"in_specs": (P(AXIS), P()), "out_specs": P()}
    return jax.shard_map(of_owner, mesh=mesh, **specs, check_vma=False)(tree, position)


def divided(tree: Any, mesh: Mesh | None) -> Any:
    """Tells the compiler, inside `jax.jit`, to divide arrays over the devices by rows."""
    return tree if mesh is None else _constrained(tree, mesh, P(AXIS))


def together(tree: Any, mesh: Mesh | None) -> Any:
    """Tells the compiler, inside `jax.jit`, that each device needs the whole arrays."""
    return tree if mesh is None else _constrained(tree, mesh, P())


_together = jax.jit(together, static_argnames="mesh")


def _constrained(tree: Any, mesh: Mesh, spec: P) -> Any:
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, spec))


def collectives(compiled: Any) -> list[tuple[str, int]]:
    """Returns the exchanges between devices in a compiled program: their names and bytes."""
    found = []
    pattern = rf"= (.+?) ({'|'.join(COLLECTIVES)})(?:-start)?\("
    for shapes, name in re.findall(pattern, compiled.as_text()):
        sizes = [
            math.prod(map(int, filter(None, dims.split(",")))) * int(bits) // 8
            for bits, dims in re.findall(r"[a-z]+(\d+)\[([\d,]*)\]", shapes)
        ]
        found.append((name, sum(sizes)))
    return found
