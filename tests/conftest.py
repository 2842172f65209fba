import jax
import pytest
import toy


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
