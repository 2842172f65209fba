"""Turns a folder of images into vectors, by a pretrained network.

  dynamical-embed photos/ --weights=weights.safetensors --features=features.npz

writes features.npz with the arrays embedding, a vector for each image in photos, and path, relative
to photos: dynamical-select and dynamical-label take it as --features. The network is a ResNet-18, a
VGG-11 or a vision transformer, with weights as torchvision, timm, DINOv2 or big_vision have them.
They bring along how images are resized and scaled. If it is interrupted, the same command goes on.
"""

import functools
import os
import pathlib
import sys
import warnings

import numpy as np
from absl import flags

from dynamical_jax import embedding, files, words
from dynamical_jax.data import images
from dynamical_jax.errors import UserError
from dynamical_jax.models import weights
from dynamical_jax.programs import binary, options, person

for _flag in (
    *(options.WEIGHTS, options.IMAGE_SIZE, options.UNREADABLE, options.CACHE_DIR),
    *(person.FEATURES, person.OVERWRITE),
):
    flags.declare_key_flag(_flag.name)

ARRAYS = {"embedding", "path"}
INTERRUPTED = "interrupted; nothing is lost, the same command goes on"


def start() -> None:
    """Runs this program: the console script dynamical-embed."""
    binary.start(sys.modules[__name__])


def main(argv: list[str]) -> int | None:
    """Embeds the images; returns the exit status."""
    return binary.run_main(functools.partial(run, argv), INTERRUPTED)


def run(argv: list[str]) -> list[str]:
    """Checks the flags, embeds the images and writes the vectors; returns no failures."""
    program, *folders = argv
    binary.check_command_line([program, *folders[1:]], sys.modules[__name__])
    if len(folders) != 1 or not os.path.isdir(folders[0]):
        given = folders[0] if folders else "none"
        raise UserError(
            f"a folder of images must be given, as in dynamical-embed photos; got {given}"
        )
    (folder,) = folders
    if options.WEIGHTS.value is None:
        raise UserError("--weights must be a file with the weights of a network")
    images.check_options(options.IMAGE_SIZE.value, None)
    output = pathlib.Path(person.FEATURES.value or "features.npz")
    check_output(output)
    network = weights.load(options.WEIGHTS.value)
    found = images.find(folder)
    if not found:
        raise UserError(f"there are no image files in {folder}")
    print(network.describe())
    vectors, rows = embedding.embed_files(
        network, found, options.prepare_cache_dir(), options.IMAGE_SIZE.value
    )
    paths = np.array([pathlib.Path(path).relative_to(folder).as_posix() for path in found])
    report(np.delete(paths, rows).tolist(), len(paths))
    with files.replacing(output) as partial, partial.open("wb") as file:
        np.savez(file, embedding=vectors[:], path=paths[rows])
    number = words.count(len(vectors), "vector")
    print(f"{output}: {number} of {words.count(vectors.shape[1], 'number')}")
    return []


def check_output(output: pathlib.Path) -> None:
    """Raises `UserError` if the file cannot be written, or is there and holds other things."""
    if output.suffix != ".npz":
        raise UserError(f"--features must be an .npz file, got {output}")
    files.check_writable(output)
    if not output.exists() or person.OVERWRITE.value:
        return
    try:
        with np.load(output, allow_pickle=False) as held:
            ours = set(held) == ARRAYS
    except (OSError, ValueError, EOFError, AttributeError, TypeError):
        ours = False
    if not ours:
        raise UserError(
            f"{output} is there, and was not written by this program: give another name, or "
            "--overwrite to replace it"
        )


def report(broken: list[str], total: int) -> None:
    """Says which files cannot be read.

    Raises:
      UserError: if none can, or they are to be refused.
    """
    if not broken:
        return
    listed = f"{', '.join(broken[:3])}{', …' if len(broken) > 3 else ''}"
    message = f"{len(broken)} of {words.count(total, 'image file')} cannot be read: {listed}"
    if options.UNREADABLE.value == "refuse" or len(broken) == total:
        raise UserError(message)
    warnings.warn(f"{message}; they are left out", stacklevel=2)
