import matplotlib.pyplot as plt
import pytest
from toy import RECORDS, record

from dynamical_jax.reports import plotting


@pytest.mark.parametrize("rounds", [RECORDS, RECORDS[:2]])
@pytest.mark.usefixtures("drawn_pictures")
def test_picture_is_drawn(tmp_path, rounds):
    path = tmp_path / "accuracy.png"
    plotting.accuracy(rounds, path)
    picture = plt.imread(path)
    assert picture.shape[:2] == (600, 900)
    # A picture of other numbers is another picture.
    plotting.accuracy([record("a", 0, 0, 0.9), record("a", 0, 1, 0.2)], path)
    assert (plt.imread(path) != picture).any()


def test_backend_of_a_notebook_stays(tmp_path):
    plt.switch_backend("svg")
    plotting.accuracy(RECORDS, tmp_path / "accuracy.png")
    assert plt.get_backend() == "svg"
