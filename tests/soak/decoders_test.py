"""Damaged images of six formats: each is read or named, and none of them stops the rest.

`SOAK_IMAGES` of them; by default 2,000.
"""

import io
import os
import time
import warnings
from collections import Counter

import numpy as np
import psutil
import pytest
from PIL import Image, features

import dynamical_jax as dj

COUNT = int(os.environ.get("SOAK_IMAGES", 2_000))
FORMATS = ("png", "jpg", "gif", "bmp", "tif", "webp")
AT_ONCE = 200


def damaged(whole, generator):
    """Returns a file with some bits flipped, or cut off, or both, or a part that is zeros."""
    data, kind = bytearray(whole), generator.integers(4)
    if kind != 1:
        for _ in range(generator.integers(1, 9)):
            # Headers are the worst place.
            limit = len(data) if generator.integers(2) else min(64, len(data))
            data[generator.integers(limit)] ^= 1 << generator.integers(8)
    if kind in (1, 2):
        del data[generator.integers(len(data)) :]
    if kind == 3:
        start = generator.integers(len(data))
        data[start : start + 16] = bytes(len(data[start : start + 16]))
    return bytes(data)


@pytest.mark.slow
def test_damaged_images(tmp_path):
    if not features.check("webp"):
        pytest.skip("Pillow has no WebP")
    generator, whole = np.random.default_rng(0), {}
    for suffix in FORMATS:
        pixels = generator.integers(0, 256, (24, 20, 3), np.uint8)
        written = io.BytesIO()
        Image.fromarray(pixels).save(written, {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix))
        whole[suffix] = written.getvalue()
    read, named, before = Counter(), Counter(), psutil.Process().memory_info().rss
    start = time.process_time()
    for first in range(0, COUNT, AT_ONCE):
        folder = tmp_path / str(first)
        folder.mkdir()
        for number in range(first, min(first + AT_ONCE, COUNT)):
            suffix = FORMATS[number % len(FORMATS)]
            (folder / f"{number}.{suffix}").write_bytes(damaged(whole[suffix], generator))
        (folder / "whole.png").write_bytes(whole["png"])
        paths = dj.images.find(folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            decoded = dj.images.decode(paths, tmp_path / "cache")
        assert decoded.readable[paths.index(str(folder / "whole.png"))]
        for path, is_readable in zip(paths, decoded.readable, strict=True):
            (read if is_readable else named)[path.rpartition(".")[2]] += 1
    grown = (psutil.Process().memory_info().rss - before) / 2**20
    for suffix in FORMATS:
        print(f"{suffix:6}{read[suffix]:6} read{named[suffix]:6} named and left out")
    print(f"{time.process_time() - start:.0f} s of CPU, {grown:.0f} MiB more memory")
    assert all(named[suffix] for suffix in FORMATS)
    assert grown < 300
