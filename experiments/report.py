"""Makes tables and statistics from the records of experiments.active_learning and others.

  python -m experiments.report runs/digits-cnn

reads one or more output directories of one setting, whose seeds may come from several machines, and
nothing else. Writes to the first of them, or to --report_dir:

- table.md: accuracies by strategy and labels, beside the paper's if the setting is in the paper;
- accuracy.png: the same as curves;
- statistics.md: area under the curve, label efficiency, paired tests, penalty matrix;
- rounds.csv: a row for each round, for pandas and spreadsheets.

--html adds report.html, all of it on one page that needs no other file, with tables that a click
sorts. --tensorboard_dir=runs/events writes the curves for TensorBoard.
"""

import functools
import pathlib

from absl import flags

import dynamical_jax as dj
from dynamical_jax.programs import binary
from experiments import neutral_flags, paper

OUTPUT_DIR = flags.DEFINE_string(
    "report_dir", None, "Directory for the report; by default the first of those that are read."
)
REFERENCES = flags.DEFINE_list(
    "references",
    None,
    "Strategies against which the others are tested; by default random and dynamical, or the first "
    "strategy where neither is recorded.",
)

HTML = flags.DEFINE_boolean("html", False, "Write report.html, too.")
TENSORBOARD_DIR = flags.DEFINE_string(
    "tensorboard_dir", None, "Directory for event files of TensorBoard, one for each run."
)

# Fields that a record must have.
REQUIRED_FIELDS = {
    "strategy",
    "seed",
    "round",
    "num_labeled",
    "test_accuracy",
    "flags",
    "dataset",
    "model",
}
# Flags that may differ between directories that are reported together.
FREE_FLAGS = {*neutral_flags.FLAGS, "num_seeds", "first_seed", "strategies"}

# Flags that older records lack, and the values that say what was done then.
BEFORE = {"hidden": ["512"], "train": "head", "redundancy": False}


def main(argv: list[str]) -> int | None:
    """Writes the report on the directories that the arguments name; returns the exit status."""
    return binary.run_main(functools.partial(run, argv[1:]))


def run(directories: list[str]) -> list[str]:
    """Reads the records, then writes the report; returns no failures."""
    if not directories:
        raise dj.UserError(
            "name the directories to report on: python -m experiments.report runs/digits-cnn"
        )
    rounds = read(directories)
    names = list(dict.fromkeys(record["strategy"] for record in rounds))
    references = REFERENCES.value
    if references is None:
        references = [name for name in ("random", "dynamical") if name in names] or names[:1]
    for name in references:
        if name not in names:
            raise dj.UserError(f"no records of reference {name!r}; choose from {', '.join(names)}")
    for package, is_wanted in (("markdown", HTML.value), ("tensorboardX", TENSORBOARD_DIR.value)):
        if is_wanted:
            dj.reports.exports.check_installed(package)
    output = pathlib.Path(OUTPUT_DIR.value or directories[0])
    texts = {
        "table.md": dj.reports.markdown.accuracy(rounds, published(rounds)),
        "statistics.md": dj.reports.markdown.significance(rounds, references),
    }
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            dj.files.write(output / name, text)
        written = [*texts, "accuracy.png", "rounds.csv"]
        dj.plotting.accuracy(rounds, output / "accuracy.png")
        dj.files.write(output / "rounds.csv", dj.reports.exports.tidy(rounds))
        if HTML.value:
            title = f"{dj.records.dataset_of(rounds[0])}, {rounds[0]['model']}"
            pictures = {"test accuracy": output / "accuracy.png"}
            page = dj.reports.exports.page(title, list(texts.values()), pictures)
            dj.files.write(output / "report.html", page)
            written.append("report.html")
        if TENSORBOARD_DIR.value:
            dj.reports.exports.tensorboard(rounds, pathlib.Path(TENSORBOARD_DIR.value))
    except OSError as error:
        raise dj.UserError(f"cannot write to {output}: {error.strerror}") from error
    print("\n".join(texts.values()))
    for name in written:
        print(output / name)
    if TENSORBOARD_DIR.value:
        print(f"{TENSORBOARD_DIR.value}: tensorboard --logdir={TENSORBOARD_DIR.value}")
    return []


def read(directories: list[str]) -> list[dj.records.Record]:
    """Returns the records of all directories.

    Raises:
      UserError: if there are none, their settings differ, or a round is in two directories.
    """
    rounds, directory_of, first_records = [], {}, {}
    for directory in directories:
        path = pathlib.Path(directory) / dj.records.FILE_NAME
        for record in dj.records.read(path):
            if not set(record) >= REQUIRED_FIELDS:
                raise dj.UserError(f"{path} holds a line that is not the record of a round")
            key = record["strategy"], record["seed"], record["round"]
            if key in directory_of:
                raise dj.UserError(
                    f"round {key[2]} of {key[0]}, seed {key[1]} is in {directory_of[key]} and in "
                    f"{directory}: give each seed once"
                )
            directory_of[key] = directory
            for other in (
                rounds[0] if rounds else record,
                first_records.setdefault(record["strategy"], record),
            ):
                if difference := describe_difference(record, other):
                    other_directory = directory_of[other["strategy"], other["seed"], other["round"]]
                    raise dj.UserError(
                        f"{directory} and {other_directory} are of different settings "
                        f"({difference}, there being the latter): report on them one by one"
                    )
            rounds.append(record)
    if not rounds:
        raise dj.UserError(f"no round is recorded in {', '.join(directories)}")
    return rounds


def describe_difference(record: dj.records.Record, other: dj.records.Record) -> str:
    """Returns the flags that keep two records from being reported together; "" if none do.

    Options of strategies matter to those that have them: other strategies may be compared, whatever
    they were, or whether there was such a flag at all.
    """
    names = dj.strategies.STRATEGIES
    free_names = set().union(*(dj.strategies.options(name) for name in names))
    if (name := record["strategy"]) == other["strategy"]:
        free_names = free_names - dj.strategies.options(name) if name in names else set()
    free_names |= FREE_FLAGS
    ours, theirs = (
        {name: value for name, value in {**BEFORE, **of["flags"]}.items() if name not in free_names}
        for of in (record, other)
    )
    return dj.run_directory.describe_difference(ours, theirs)


def published(rounds: list[dj.records.Record]) -> dj.reports.markdown.Published | None:
    """Returns the paper's numbers for the setting of the records; None if it has none."""
    table = paper.find_table(rounds[0])
    if table is None:
        return None
    names = {record["strategy"] for record in rounds}
    cells = {cell: numbers for cell, numbers in table.cells().items() if cell[0] in names}
    return dj.reports.markdown.Published(f"the paper's {table.title}", cells) if cells else None


if __name__ == "__main__":
    binary.launch(main)
