"""Would it pay to train several seeds as one program? Compares k networks at once with one.

  python -m benchmarks.seeds --json=results/gpu/seeds.json

A minute on a GPU. Small networks leave an accelerator idle. Here an epoch of `training.fit` is
`vmap`ped over k networks, their labeled sets and orders, without what would make k of them
differ: their numbers of epochs, and sizes of steps. Prints, for each k, the time of an epoch of
all relative to that of one network (median and range over turns), and k divided by it: how many
times as many runs there would be in an hour, at most.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import dynamical_jax as dj
from benchmarks import harness, jax_contenders
from benchmarks.task import Task
from benchmarks.worker import Contender, Work
from dynamical_jax.programs import binary

for _name in ("models", "batch_sizes", "matmul_precision", "repetitions", "json"):
    flags.declare_key_flag(_name)

SEEDS = flags.DEFINE_list("seeds", ["1", "5", "10", "20"], "Numbers of networks at once.")
SET_SIZE = flags.DEFINE_integer("set_size", 1500, "Labels of each network.")


def main(argv: list[str]) -> int | None:
    """Times the epochs; returns the exit status."""
    return harness.main(argv, run)


def run() -> None:
    """Times epochs of each network, and prints a table for each."""
    tasks, _, repetitions = harness.settings({"at once": ""}, {"cnn": (128,)})
    counts = binary.parse_positive("seeds", SEEDS.value)
    report = harness.Report("seeds")
    print(report.head())
    for task in tasks:
        contenders = {count: Contender(Work(_epoch(task, count), 1)) for count in counts}
        for contender in contenders.values():
            contender.warm_up()
        turns: dict[int, list[float]] = {count: [] for count in counts}
        for _ in range(repetitions):
            for count, contender in contenders.items():
                turns[count].append(1e3 * contender.turn())
        report.add({"model": task.model, "batch_size": task.batch_size, "milliseconds": turns})
        print(f"\n{task.model:12}{'ms':>10}{f'/ {counts[0]} (range)':>26}{'runs':>10}")
        for count, milliseconds in turns.items():
            first = {"milliseconds": turns[counts[0]]}
            relative = harness.ratio({"milliseconds": milliseconds}, first)
            runs = count / counts[0] / relative.median
            print(f"  {count:10}{np.median(milliseconds):10.2f}{relative!s:>26}{runs:10.2f}")


def _epoch(task: Task, count: int) -> Callable[[], Any]:
    """Returns what trains so many networks for an epoch, and waits."""
    model, size = jax_contenders._model(task), SET_SIZE.value
    optimizer = dj.training._optimizer(dj.TrainingConfig())
    buffer = dj.Examples(jax_contenders._images(size, task), jax_contenders._labels(size))
    generator = np.random.default_rng(0)
    orders = np.stack([generator.permutation(size)[None] for _ in range(count)])
    keys = jax.random.split(jax.random.key(0), count)
    state: dict[str, Any] = {}

    def many(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: jnp.stack([leaf] * count), tree)

    def train(variables: Any, optimizer_state: Any, buffer: Any, order: Any, key: Any) -> Any:
        settings = model, optimizer, task.batch_size
        rest = np.array([1e-3]), 1, 1, size, key
        return dj.training._epochs(*settings, variables, optimizer_state, buffer, order, *rest)

    program = jax.jit(jax.vmap(train) if count > 1 else train, donate_argnums=(0, 1))

    def epoch() -> Any:
        if not state:
            variables = jax_contenders._variables(model, task)
            carry = jax.tree.map(jnp.copy, (variables, optimizer.init(variables["params"])))
            state["carry"] = many(carry) if count > 1 else carry
            state["given"] = (buffer, orders[0], keys[0])
            if count > 1:
                state["given"] = (many(buffer), orders, keys)
        state["carry"] = program(*state["carry"], *state["given"])
        return jax.block_until_ready(state["carry"])

    return epoch


if __name__ == "__main__":
    binary.launch(main)
