"""The log of all answers, a JSON file beside the table of labels.

The table holds the present labels. The log holds their history: who gave which answer to which
image and when, including answers that were taken back or changed later, what the model had
predicted before it learned the answer, and why the image was asked for.
"""

import json
import os
import pathlib
import typing
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import msgspec

from dynamical_jax import files
from dynamical_jax.errors import UserError

LABEL, SKIP, BROKEN, UNDO = "label", "skip", "broken", "undo"

QUERY, AUDIT, RANDOM = "query", "audit", "random"
"""Why an image is asked for: the strategy wants it; it is one of those drawn at random that are
mixed in; it was drawn at random because there was no batch to take one from."""

GRID, AGAIN = "grid", "again"
"""It was shown in a grid of images with the same prediction; it had a label before."""

AT_RANDOM = (AUDIT, RANDOM)
"""Images drawn at random from the unlabeled ones: they measure the accuracy on the rest."""


class Answer(NamedTuple):
    """One answer.

    Attributes:
      path: of the image.
      what: `LABEL`, `SKIP`, `BROKEN` or `UNDO`.
      label: the class; of `UNDO` the one that counts again, "" for none.
      kind: why the image was asked for.
      round: how many batches had been chosen.
      predicted: the class that the model predicted; "" where there was no model, or it was trained
        on the image.
      confidence: the probability of that class.
      who: a person's name, or the number of a browser's tab.
      client: the number of the tab.
      time: in seconds since 1970.
      group: answers that were given, and are taken back, together.
      place: where the image stands, in [0, 1), in the order in which images are drawn at random in
        this round.
    """

    path: str
    what: str
    label: str
    kind: str
    round: int
    predicted: str
    confidence: float | None
    who: str
    client: str
    time: float
    group: int
    place: float = 1.0


class Batch(NamedTuple):
    """A batch that was chosen.

    Attributes:
      round: counts them, from 1.
      num_labeled: on how many labels the model was trained; 0 if there is no model.
      query: paths that the strategy wanted.
      audit: paths that were drawn at random.
      kappa: Cohen's, of the model's predictions with those of the model before it.
      kappa_size: on how many images, unlabeled at both times.
      time: in seconds since 1970.
    """

    round: int
    num_labeled: int
    query: list[str]
    audit: list[str]
    kappa: float | None
    kappa_size: int
    time: float


def _form(fields: Any) -> Any:
    """The type by which a dictionary of the fields of a `NamedTuple` is checked."""
    defaults = fields._field_defaults
    return msgspec.defstruct(
        fields.__name__,
        [
            (name, kind, defaults[name]) if name in defaults else (name, kind)
            for name, kind in typing.get_type_hints(fields).items()
        ],
    )


class _Line(msgspec.Struct):
    """A line of the log, which has one of these."""

    answer: _form(Answer) | None = None
    batch: _form(Batch) | None = None
    class_name: str | None = msgspec.field(name="class", default=None)


class Log:
    """The answers and batches so far, on disk and in memory.

    Args:
      path: of the file of JSON lines; the first entry creates it. An incomplete last line, left by
        a killed process, is removed.

    Attributes:
      answers: in their order.
      batches: likewise.
      classes: names, in the order in which they came.
    """

    def __init__(self, path: pathlib.Path):
        self._path = path
        self.answers: list[Answer] = []
        self.batches: list[Batch] = []
        self.classes: list[str] = []
        if not path.exists():
            return
        text = path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):
            os.truncate(path, len(whole))
        for number, line in enumerate(whole.split(b"\n")[:-1], start=1):
            try:
                # Decoded by json: msgspec refuses names of files whose bytes are no text.
                self._take(msgspec.convert(json.loads(line), _Line))
            except (ValueError, RecursionError, msgspec.MsgspecError) as error:
                raise UserError(f"line {number} of {path} cannot be used: {error}") from error

    def add(self, entries: Sequence[Answer | Batch | str]) -> None:
        """Adds answers, batches, or names of new classes; they are on disk when this returns.

        Raises:
          UserError: if they cannot be written; then nothing was added.
        """
        values = [_value(entry) for entry in entries]
        lines = (json.dumps(files.finite(value), allow_nan=False) + "\n" for value in values)
        try:
            files.add_text(self._path, "".join(lines))
        except OSError as error:
            raise UserError(f"cannot write {self._path}: {error.strerror}") from error
        for value in values:
            self._take(msgspec.convert(value, _Line))

    def _take(self, line: "_Line") -> None:
        if line.answer:
            self.answers.append(Answer(*msgspec.structs.astuple(line.answer)))
        if line.batch:
            self.batches.append(Batch(*msgspec.structs.astuple(line.batch)))
        if line.class_name is not None:
            self.classes.append(line.class_name)


def beside(table: pathlib.Path) -> pathlib.Path:
    """Returns the path of the log of a table of labels."""
    return table.with_suffix(".answers.jsonl")


def broken(answers: Iterable[Answer]) -> set[str]:
    """Returns the paths of images that are broken or of no class, as the last answers say.

    Where an image has a label in the table, from another program or an editor, the table counts.
    """
    last = {answer.path: answer.what for answer in answers if answer.what != SKIP}
    return {path for path, what in last.items() if what == BROKEN}


def _value(entry: Answer | Batch | str) -> dict[str, Any]:
    if isinstance(entry, str):
        return {"class": entry}
    name = "answer" if isinstance(entry, Answer) else "batch"
    return {name: entry._asdict()}
