"""Finds images that are nearly the same: saved again, resized, made a little lighter."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Int
from PIL import Image

from dynamical_jax.data import images
from dynamical_jax.errors import UserError

MOST_BITS = 7
"""Of the 64 bits of a hash, how many may differ at most; the search rests on equal bytes."""

LARGEST_DIFFERENCE = 12.0
"""Mean difference of grey values, of 255, in which near-copies may differ where they are small."""

LONGEST_LIST = 500
"""Images of one byte of the hash that are compared, the last ones: many are alike only where there
is little to be seen in them."""


def first_near(x: Any, bits: int) -> Int[np.ndarray, " n"]:
    """Returns for each image the first that it is nearly the same as, itself if there is none.

    Two images are nearly the same if at most `bits` of 64 signs differ, which say whether a field
    of 8×9 is lighter than the one to its left (Krawetz, "Kind of like that", 2013), and their
    fields differ by at most `LARGEST_DIFFERENCE` on average. An image that is near to a near-copy
    of the first, but not to the first itself, is none: it is a first image of its own.

    Args:
      x: images `[n, h, w, c]` uint8.
      bits: 0 to `MOST_BITS`.

    Raises:
      UserError: if `bits` is out of range.
    """
    if not 0 <= bits <= MOST_BITS:
        raise UserError(f"near copies differ in 0 to {MOST_BITS} bits, got {bits}")
    first, seen = np.arange(len(x)), {}
    fields_of: dict[int, np.ndarray] = {}
    for row, (hash_, fields) in enumerate(_hashes(x)):
        # Of eight bytes one at least is the same if no more than seven bits differ.
        lists = [seen.setdefault((k, hash_ >> 8 * k & 255), []) for k in range(8)]
        near = {
            other
            for rows in lists
            for other, other_hash in rows[-LONGEST_LIST:]
            if (hash_ ^ other_hash).bit_count() <= bits
            and np.mean(np.abs(fields - fields_of[other])) <= LARGEST_DIFFERENCE
        }
        if near:
            first[row] = min(near)
        else:
            fields_of[row] = fields
            for rows in lists:
                rows.append((row, hash_))
    return first


def _hashes(x: Any) -> Iterator[tuple[int, np.ndarray]]:
    """Yields of each image the hash, and the grey values of its fields `[8, 9]`."""
    for block in images.iterate_blocks(x):
        for image in block:
            grey = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).convert("L")
            fields = np.asarray(grey.resize((9, 8), Image.Resampling.BOX), np.int16)
            signs = np.packbits(fields[:, 1:] > fields[:, :-1])
            yield int.from_bytes(signs.tobytes()), fields
