"""Which classes are on these images?

  dynamical-predict path/to/images --top=3

predicts them by the model that dynamical-select or dynamical-label trained last, which is in
to_label.checkpoint, and writes predicted.csv: for each image its path, and the three most probable
classes with their probabilities. If it learned from what a pretrained network makes of images
(--weights), these images go through the network, too; the file of its weights must be where it was,
or --weights says where it is now. If it learned from vectors of a file (--features), --features is
a file with vectors of these images, made alike. In Python, the model is

  model = dynamical_jax.labeling.load("to_label.checkpoint")
  model.predict(["one.jpg", "two.jpg"], top=3)
"""

import functools
import pathlib
import sys

import numpy as np
from absl import flags

from dynamical_jax import files, labeling, words
from dynamical_jax.data import folders, images
from dynamical_jax.errors import UserError
from dynamical_jax.programs import binary, options, person
from dynamical_jax.runs import progress
from dynamical_jax.types import Rows

CHECKPOINT = flags.DEFINE_string("checkpoint", "to_label.checkpoint", "Folder of the model.")
TABLE = flags.DEFINE_string("table", "predicted.csv", "Table of predictions to write.")
TOP = flags.DEFINE_integer("top", 1, "How many classes of each image to write.", lower_bound=1)
for _flag in (options.CACHE_DIR, options.WEIGHTS, person.FEATURES):
    flags.declare_key_flag(_flag.name)


def start() -> None:
    """Runs this program: the console script dynamical-predict."""
    binary.start(sys.modules[__name__])


def main(argv: list[str]) -> int | None:
    """Writes the predictions; returns the exit status."""
    return binary.run_main(functools.partial(run, argv))


def run(argv: list[str]) -> list[str]:
    """Writes the predictions; returns no failures."""
    program, *given = argv
    binary.check_command_line([program, *given[1:]], sys.modules[__name__])
    if len(given) != 1 or not pathlib.Path(given[0]).is_dir():
        raise UserError(
            "a folder of images must be given, as in dynamical-predict photos; got "
            f"{given[0] if given else 'none'}"
        )
    table = pathlib.Path(TABLE.value)
    if table.suffix != ".csv":
        raise UserError(f"--table must be a .csv file, got {table}")
    files.check_writable(table)
    if not labeling.tables.may_hold_predictions(table):
        raise UserError(f"{table} is there, and was not written by this program: give another name")
    model = labeling.load(CHECKPOINT.value, options.WEIGHTS.value, options.prepare_cache_dir())
    paths = images.find(given[0])
    if not paths:
        raise UserError(f"there are no image files in {given[0]}")
    relative = [pathlib.Path(path).relative_to(given[0]).as_posix() for path in paths]
    vectors = read_features(model, relative)
    with progress.Bar() as bar:
        bar.start("predict", 1, 1)
        bar.begin(1)
        if vectors is None:
            found = model.predict(paths, TOP.value, bar.scored)
            named = [image._replace(path=path) for image, path in zip(found, relative, strict=True)]
        else:
            named = model.predict_vectors(*vectors, TOP.value, bar.scored)
    known = {image.path for image in named if image.class_names}
    if not known:
        raise UserError(f"none of the images in {given[0]} can be read, such as {relative[0]}")
    files.write(table, labeling.tables.prediction_text(named))
    if broken := [path for path in relative if path not in known]:
        of_file = f"no vector in {person.FEATURES.value}"
        one, more = f"image has {of_file}", f"images have {of_file}"
        if vectors is None:
            one, more = "image cannot be read", "images cannot be read"
        number = words.count(len(broken), one, more)
        print(f"{number}: {', '.join(broken[:3])}", file=sys.stderr)
    number = len(model.learner.class_names)
    few = f", of {number} classes each: no more known" if number < TOP.value else ""
    print(f"{table}: predictions for {words.count(len(known), 'image')}{few}")
    return []


def read_features(
    model: labeling.prediction.Model, paths: list[str]
) -> tuple[list[str], Rows] | None:
    """Returns the images of which --features has vectors, and these; None if it is not given.

    Raises:
      UserError: if the model does not learn from vectors, or needs others, or there are none.
    """
    path = person.FEATURES.value
    if path is None:
        if model.shape is None and model.embed is None:
            raise UserError(
                f"the model in {CHECKPOINT.value} learned from vectors of a file: give a file with "
                "vectors of these images as --features, as dynamical-embed makes it"
            )
        return None
    if model.shape is not None:
        raise UserError(f"the model in {CHECKPOINT.value} learned from images, not from --features")
    if not pathlib.Path(path).is_file():
        raise UserError(f"there is no file {path}")
    features = folders.read_features(path)
    row_of = {features.paths[row]: row for row in features.finite}
    found = [path for path in paths if path in row_of]
    if not found:
        raise UserError(f"{path} has no vector of an image in the folder, such as {paths[0]}")
    return found, Rows(features.x, np.array([row_of[path] for path in found]))
