import sys

import jax
import pytest
import toy
from absl import flags
from absl.testing import flagsaver


@pytest.fixture(autouse=True)
def _strict_arrays():
    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def dataset():
    return toy.dataset()


@pytest.fixture
def run_benchmark(capfd):
    """Runs a benchmark's main on the smallest setting, with flags.

    Returns exit status, standard output and standard error, those of its workers included.
    """
    if not flags.FLAGS.is_parsed():
        flags.FLAGS([sys.argv[0]])

    def run(binary, *arguments, **values):
        with flagsaver.flagsaver(**{"repetitions": 1, **values}):
            status = binary.main([binary.__name__, *arguments])
        return status, *capfd.readouterr()

    return run
