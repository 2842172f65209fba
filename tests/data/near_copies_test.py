"""Near-copies, against the comparison of all pairs, and as photographs come to be them."""

import numpy as np
import pytest
from PIL import Image, ImageEnhance

import dynamical_jax as dj
from dynamical_jax.data import near_copies


def scene(seed):
    """A smooth picture of its own."""
    coarse = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((48, 48), Image.Resampling.BICUBIC)


def test_a_photograph_saved_again_is_near_and_another_is_not(tmp_path):
    pictures = []
    for seed in range(20):
        whole = scene(seed)
        whole.save(tmp_path / "a.jpg", quality=60)
        smaller = whole.resize((40, 40)).resize((48, 48))
        lighter = ImageEnhance.Brightness(whole).enhance(1.05)
        with Image.open(tmp_path / "a.jpg") as again:
            pictures += [whole, again.copy(), smaller, lighter]
    x = np.stack([np.asarray(picture) for picture in pictures])
    np.testing.assert_array_equal(near_copies.first_near(x, 3), np.repeat(np.arange(0, 80, 4), 4))


@pytest.mark.parametrize("bits", [0, 3, 7])
def test_it_is_what_comparing_all_pairs_finds(bits):
    generator = np.random.default_rng(bits)
    bases = generator.integers(0, 200, (8, 8, 9))
    x = np.concatenate([base + generator.integers(0, 30, (12, 8, 9)) for base in bases])
    x = generator.permutation(x).astype(np.uint8)[..., None]
    signs = (x[:, :, 1:] > x[:, :, :-1]).reshape(len(x), -1)
    expected = []
    for row in range(len(x)):
        near = [
            other
            for other in range(row)
            if expected[other] == other
            and np.sum(signs[row] != signs[other]) <= bits
            and np.abs(x[row].astype(int) - x[other]).mean() <= near_copies.LARGEST_DIFFERENCE
        ]
        expected.append(min(near, default=row))
    found = near_copies.first_near(x, bits)
    np.testing.assert_array_equal(found, expected)
    assert bits == 0 or len(np.unique(found)) < len(x)


def test_pictures_with_little_to_see_are_no_copies_of_each_other():
    x = np.zeros((3, 16, 16, 1), np.uint8)
    x[1] = 200
    x[2, 4:8, 4:8] = 255
    np.testing.assert_array_equal(near_copies.first_near(x, 3), [0, 1, 2])
    with pytest.raises(dj.UserError, match="0 to 7 bits, got 8"):
        near_copies.first_near(x, 8)
