"""Plants faults, one at a time, and shows which tests find them. Run by hand:

    python tests/mutants.py [name …] [--all | --named=TABLE] [--output=TABLE]

Each fault is planted in a copy of the checkout, in a temporary directory, and pytest runs there
until the first failure; the checkout itself is not touched. By default the test files named beside
a fault are run, with `--all` the whole default suite, with `--named` only the test that a table of
before names, to see that it still finds the fault. Before any fault the same tests are run
without one: they must pass, or nothing that fails would mean anything.

Exit status 0 if every fault is found. It takes about a minute for each.
"""

import argparse
import ast
import contextlib
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parent.parent


class Fault(NamedTuple):
    """A fault to plant.

    Attributes:
      name: what is wrong then.
      file: where.
      old: text that occurs there exactly once.
      new: what takes its place.
      tests: files of tests that should find it, the likeliest first.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


GRADIENTS = ("tests/gradients/layers_test.py",)

FAULTS = (
    Fault(
        "factor 2 in Δ",
        "dynamical_jax/dynamics.py",
        "return squared_norm + gamma * inner_product",
        "return squared_norm + gamma / 2 * inner_product",
        ("tests/dynamics_test.py",),
    ),
    Fault(
        "sign of the inner product",
        "dynamical_jax/gradients/factored.py",
        "GradientTerms(terms[:, 0], terms[:, 1], targets)",
        "GradientTerms(terms[:, 0], -terms[:, 1], targets)",
        GRADIENTS,
    ),
    Fault(
        "off-by-one in reveal",
        "dynamical_jax/data/pool.py",
        "rows = self.unlabeled[positions]",
        "rows = self.unlabeled[positions - 1]",
        ("tests/data/pool_test.py",),
    ),
    Fault(
        "mask ignored in BatchNorm",
        "dynamical_jax/training.py",
        '{**kwargs, "mask": mask if own is None else mask & own}',
        '{**kwargs, "mask": own}',
        ("tests/training_test.py",),
    ),
    Fault(
        "shares of bias dropped",
        "dynamical_jax/gradients/shares.py",
        "squared_norm += jnp.sum(gradient**2, axis=-1)",
        "pass",
        GRADIENTS,
    ),
    Fault(
        "groups confused",
        "dynamical_jax/gradients/shares.py",
        "channels, groups, features // groups)\n    return kernel.transpose(2, 3, 0, 1)",
        "channels, features // groups, groups)\n    return kernel.transpose(3, 2, 0, 1)",
        GRADIENTS,
    ),
    Fault(
        "dilation ignored",
        "dynamical_jax/gradients/shares.py",
        "start = [place * window.dilation[axis] for axis, place in enumerate(tap)]",
        "start = list(tap)",
        GRADIENTS,
    ),
    Fault(
        "wrong pool rows",
        "dynamical_jax/active_learning.py",
        "Rows(images, pool.unlabeled)",
        "Rows(images, np.roll(pool.unlabeled, 1))",
        ("tests/active_learning_test.py",),
    ),
    Fault(
        "wrong tie-break",
        "dynamical_jax/strategies/selection.py",
        "return jax.lax.top_k(jnp.where(scores == 0, 0, scores), batch_size)[1]",
        "scores = jnp.where(scores == 0, 0, scores)\n"
        "    return len(scores) - 1 - jax.lax.top_k(scores[::-1], batch_size)[1]",
        ("tests/strategies/selection_test.py",),
    ),
    Fault(
        "Holm without maximum",
        "dynamical_jax/reports/statistics.py",
        "np.maximum.accumulate(factors * pvalues[order])",
        "factors * pvalues[order]",
        ("tests/reports/statistics_test.py",),
    ),
    Fault(
        "MMD with diagonal",
        "dynamical_jax/ntk/mmd.py",
        "within = np.trace(kernel[:m, :m])",
        "within = 0.0",
        ("tests/ntk/theory_test.py",),
    ),
    Fault(
        "alignment without transpose",
        "dynamical_jax/ntk/alignment.py",
        "ntk_spectrum.eigenvectors.T @",
        "ntk_spectrum.eigenvectors @",
        ("tests/ntk/theory_test.py",),
    ),
    Fault(
        "checkpoint without optimizer state",
        "dynamical_jax/runs/checkpoints.py",
        "description.epoch,\n            optimizer_state,",
        "description.epoch,\n            like.underway.optimizer_state,",
        ("tests/runs/checkpoints_test.py",),
    ),
    Fault(
        "record written before query",
        "dynamical_jax/active_learning.py",
        "pool, rows_of_query = pool.reveal(chosen.positions)\n"
        "            query = self.dataset.index[rows_of_query]",
        "pool, _ = pool.reveal(chosen.positions)",
        ("tests/active_learning_test.py",),
    ),
    Fault(
        "seed streams shared",
        "dynamical_jax/streams.py",
        "spawn_key = (NAMES.index(stream), *path)",
        "spawn_key = path",
        ("tests/streams_test.py",),
    ),
    Fault(
        "cosine schedule off by one",
        "dynamical_jax/training.py",
        "schedule(epoch - 1)",
        "schedule(epoch)",
        ("tests/training_test.py",),
    ),
    Fault(
        "normalisation per image",
        "dynamical_jax/models/__init__.py",
        "return (x - mean) / jnp.where(std == 0, 1, std)",
        "mean = jnp.mean(x, axis=tuple(range(1, x.ndim)), keepdims=True, dtype=dtype)\n"
        "        return (x - mean) / jnp.where(std == 0, 1, std)",
        ("tests/models/models_test.py", "tests/training_test.py"),
    ),
    Fault(
        "padding repeated into sums",
        "dynamical_jax/gradients/set_gradient.py",
        "weights = np.arange(len(positions)) < count",
        "weights = np.ones(len(positions), bool)",
        ("tests/gradients/gradients_test.py",),
    ),
    Fault(
        "k-means++ first centre",
        "dynamical_jax/strategies/selection.py",
        "parallel.argmax(jnp.where(is_first, first, draw), mesh)",
        "parallel.argmax(draw, mesh)",
        ("tests/strategies/selection_test.py",),
    ),
    Fault(
        "entropy sign",
        "dynamical_jax/strategies/entropy.py",
        "return -jnp.sum(",
        "return jnp.sum(",
        ("tests/strategies/strategies_test.py",),
    ),
)


def planted(fault: Fault, source: str) -> str:
    """Returns the source of the fault's file with the fault.

    Raises:
      ValueError: if the text to replace does not occur exactly once, or no program is left.
    """
    count = source.count(fault.old)
    if count != 1:
        raise ValueError(
            f"{fault.name}: {fault.file} holds the text to replace {count} times, not once; "
            f"bring tests/mutants.py up to date: {fault.old!r}"
        )
    broken = source.replace(fault.old, fault.new)
    ast.parse(broken)  # A `SyntaxError` is a `ValueError`'s equal here: the table is wrong.
    return broken


@contextlib.contextmanager
def plant(fault: Fault, tree: pathlib.Path) -> Iterator[None]:
    """Within this context the fault is in `tree`."""
    file = tree / fault.file
    source = file.read_text(encoding="utf-8")
    file.write_text(planted(fault, source), encoding="utf-8")
    try:
        yield
    finally:
        file.write_text(source, encoding="utf-8")


def copy_checkout(tree: pathlib.Path) -> None:
    """Copies all files but those that git ignores."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.split("\0"):
        if name and (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)


def failing_tests(tree: pathlib.Path, cache: str, tests: Sequence[str]) -> list[str]:
    """Runs tests in `tree` until one fails; returns the ids of those that failed.

    Args:
      tree: a copy of the checkout.
      cache: a directory for compiled programs, which a fault elsewhere does not change.
      tests: files of tests; all if there are none.

    Raises:
      RuntimeError: if pytest neither passed nor found a failure.
    """
    workers = ["-n", "0"] if tests else []
    command = [sys.executable, "-m", "pytest", "-x", "-q", *workers, *tests]
    environment = {**os.environ, "DYNAMICAL_JAX_TEST_CACHE": cache, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, env=environment)
    failed = re.findall(r"^FAILED (.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    if done.returncode == 0 or (done.returncode in (1, 2) and failed):
        return failed
    raise RuntimeError(f"{' '.join(command)} could not run:\n{done.stdout}\n{done.stderr}")


def markdown(rows: Sequence[Sequence[str]], scope: str) -> str:
    """Returns the table, and a sentence that says what was run."""
    lines = [
        "# Planted faults, and the tests that find them",
        "",
        f"Made by `python tests/mutants.py`; run against {scope}, each until the first failure.",
        "",
        "| fault | file | found by |",
        "| --- | --- | --- |",
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
    ]
    return "\n".join(lines)


def read_rows(path: pathlib.Path | str) -> list[list[str]]:
    """Returns the rows of a table that was written before; none if there is no file."""
    path = pathlib.Path(path)
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    return [row for row in rows if row[-1] not in ("found by", "---")]


def main() -> int:
    """Plants the faults; returns the exit status."""
    parser = argparse.ArgumentParser(description="Plants faults and shows which tests find them.")
    parser.add_argument("names", nargs="*", help="which faults; all by default")
    parser.add_argument("--all", action="store_true", help="run the whole default suite for each")
    parser.add_argument("--named", help="a table: run only the tests that it names")
    parser.add_argument("--output", help="a file for the table; its rows of other faults stay")
    options = parser.parse_args()
    known = {fault.name: fault for fault in FAULTS}
    if unknown := [name for name in options.names if name not in known]:
        parser.error(f"no fault {unknown[0]!r}; choose from {', '.join(map(repr, known))}")
    faults = [known[name] for name in options.names or known]
    if options.named:
        named = {name: re.findall(r"`(.+?)`", found) for name, _, found in read_rows(options.named)}
        faults = [fault._replace(tests=tuple(named[fault.name])) for fault in faults]
    rows = []
    with tempfile.TemporaryDirectory(prefix="dynamical_jax-mutants-") as directory:
        tree, cache = pathlib.Path(directory, "tree"), str(pathlib.Path(directory, "cache"))
        copy_checkout(tree)
        files = [] if options.all else sorted({path for fault in faults for path in fault.tests})
        if failed := failing_tests(tree, cache, files):
            print(f"error: {failed[0]} fails without any fault", file=sys.stderr)
            return 2
        for fault in faults:
            with plant(fault, tree):
                failed = failing_tests(tree, cache, [] if options.all else fault.tests)
            found = ", ".join(f"`{test}`" for test in failed) or "NOT FOUND"
            rows.append((fault.name, f"`{fault.file}`", found))
            print(" | ".join(rows[-1]), flush=True)
    scope = "the whole default suite" if options.all else "the test files of the code in question"
    if options.named:
        scope = "the tests that the table named before"
    if options.output:
        output = pathlib.Path(options.output)
        table = {row[0]: row for row in [*read_rows(output), *rows]}
        ordered = [table[name] for name in known if name in table]
        output.write_text(markdown(ordered, scope), encoding="utf-8")
    lost = sum(row[-1] == "NOT FOUND" for row in rows)
    print(f"{len(rows) - lost} of {len(rows)} faults found by {scope}")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
