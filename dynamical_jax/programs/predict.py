"""Which classes are on these images?

  dynamical-predict path/to/images --top=3

predicts them by the model that dynamical-select or dynamical-label trained last, which is in
to_label.checkpoint, and writes predicted.csv: for each image its path, and the three most probable
classes with their probabilities. A model of vectors (--features, --weights) cannot be used so yet:
dynamical-select --predictions=rest.csv predicts with it. In Python, the model is

  model = dynamical_jax.labeling.load("to_label.checkpoint")
  model.predict(["one.jpg", "two.jpg"], top=3)
"""

import functools
import pathlib
import sys

from absl import flags

from dynamical_jax import files, labeling
from dynamical_jax.data import images
from dynamical_jax.errors import UserError
from dynamical_jax.programs import binary, options
from dynamical_jax.runs import progress

CHECKPOINT = flags.DEFINE_string("checkpoint", "to_label.checkpoint", "Folder of the model.")
TABLE = flags.DEFINE_string("table", "predicted.csv", "Table of predictions to write.")
TOP = flags.DEFINE_integer("top", 1, "How many classes of each image to write.", lower_bound=1)
flags.declare_key_flag(options.CACHE_DIR.name)


def start() -> None:
    """Runs this program: the console script dynamical-predict."""
    binary.start(sys.modules[__name__])


def main(argv: list[str]) -> int | None:
    """Writes the predictions; returns the exit status."""
    return binary.run_main(functools.partial(run, argv))


def run(argv: list[str]) -> list[str]:
    """Writes the predictions; returns no failures."""
    program, *folders = argv
    binary.check_command_line([program, *folders[1:]], sys.modules[__name__])
    if len(folders) != 1 or not pathlib.Path(folders[0]).is_dir():
        raise UserError(
            "a folder of images must be given, as in dynamical-predict photos; got "
            f"{folders[0] if folders else 'none'}"
        )
    table = pathlib.Path(TABLE.value)
    if table.suffix != ".csv" or not table.parent.is_dir():
        raise UserError(f"--table must be a .csv file in a folder that exists, got {table}")
    if not labeling.tables.may_hold_predictions(table):
        raise UserError(f"{table} is there, and was not written by this program: give another name")
    options.prepare_cache_dir()
    model = labeling.load(CHECKPOINT.value)
    paths = images.find(folders[0])
    if not paths:
        raise UserError(f"there are no image files in {folders[0]}")
    with progress.Bar() as bar:
        bar.start("predict", 1, 1)
        bar.begin(1)
        found = model.predict(paths, TOP.value, bar.scored)
    named = [
        image._replace(path=pathlib.Path(image.path).relative_to(folders[0]).as_posix())
        for image in found
    ]
    files.write(table, labeling.tables.prediction_text(named))
    broken = [image.path for image in named if not image.class_names]
    if broken:
        print(f"{len(broken)} images cannot be read: {', '.join(broken[:3])}", file=sys.stderr)
    number = len(model.learner.class_names)
    few = f", of {number} classes each: no more known" if number < TOP.value else ""
    print(f"{table}: predictions for {len(named) - len(broken)} images{few}")
    return []
