"""Tables in which a person labels images: labels so far, and images to label next.

Both are CSV files with the columns `path`, relative to the folder of images, and `label`, a class
name. A proposal is a table of images to label whose labels are empty, with columns that may help:
when they are filled in, `add_labels` takes them over.

What is written can be read back, whatever a file is called. A path that a table cannot hold as it
is (spaces at its ends, control characters, bytes that are no UTF-8) is written as `bytes:` and its
bytes, quoted as in a URL. A cell that a spreadsheet would take for a formula begins with `./` if it
is a path, else with an apostrophe.
"""

import codecs
import contextlib
import csv
import glob
import io
import os
import pathlib
import re
import shutil
import time
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import filelock

from dynamical_jax import files
from dynamical_jax.errors import UserError

COLUMNS = ("path", "label")
PROPOSAL_COLUMNS = (*COLUMNS, "predicted", "confidence", "score", "rank")
PREDICTED = ("predicted", "confidence")
BYTES = "bytes:"
FORMULA = re.compile(r"'*[=+\-@]")
"""What a spreadsheet would run, or what `_cell` made of that."""

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
"""Control characters and line breaks; a space of any width is none."""

LOCK_TIMEOUT = 60
"""Seconds to wait for another process, which holds a table for a moment only."""


class Proposed(NamedTuple):
    """An image that is to be labeled; the field `label` of its row is for a person to fill in.

    Attributes:
      path: relative to the folder of images.
      predicted: the class that the model takes it for; empty where there is no model.
      confidence: the model's probability of that class.
      score: the strategy's.
    """

    path: str
    predicted: str = ""
    confidence: float | None = None
    score: float | None = None


class Labels(NamedTuple):
    """The labels that a person has written into a table.

    Attributes:
      by_path: path → class name, of the rows with a label, in their order.
      num_right: rows whose prediction is the label, in a proposal.
      num_predicted: rows with a label and a prediction.
    """

    by_path: dict[str, str]
    num_right: int
    num_predicted: int


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[None]:
    """Lets no other process read or write a table meanwhile that asks for this, too.

    Raises:
      UserError: if another one holds it for `LOCK_TIMEOUT` seconds.
    """
    lock = filelock.FileLock(path.absolute().with_name(f".{path.name}.lock"))
    try:
        with files.naming(path, lock.lock_file):
            held = lock.acquire(timeout=LOCK_TIMEOUT)
    except filelock.Timeout as error:
        raise UserError(f"{path} is in use by another process: wait for it") from error
    with held:
        yield


def remove_partial(path: pathlib.Path) -> None:
    """Removes what killed processes have left of their work on a table; call it when it is locked.

    The table itself is whole: what is written becomes it in the end.
    """
    for left in path.parent.glob(f"{glob.escape(path.name)}.*.partial"):
        with contextlib.suppress(OSError):
            left.unlink()


def read_labels(path: pathlib.Path, folder: str) -> Labels:
    """Returns the labels of a table, or of what has been filled in of a proposal.

    If there is no file, there are no labels. Other columns, rows without a label, and rows that are
    there twice are ignored.

    Args:
      path: the table.
      folder: of the images.

    Raises:
      UserError: if it is no such table, or gives an image two labels.
    """
    labels: dict[str, str] = {}
    right = predicted = 0
    for line, row in _rows(path):
        label = row["label"]
        if not label:
            continue
        name = _relative(_path(row["path"]), folder)
        if labels.setdefault(name, label) != label:
            raise UserError(
                f"line {line} of {path} labels {name} {label!r}, a line before it {labels[name]!r}"
            )
        guess = row.get("predicted", "")
        predicted += bool(guess)
        right += guess == label
    return Labels(labels, right, predicted)


def join_labels(
    labels: Mapping[str, str], more: Mapping[str, str], path: pathlib.Path
) -> dict[str, str]:
    """Returns the labels of two tables together.

    Args:
      labels: path → class name.
      more: likewise.
      path: of `more`, for the message.

    Raises:
      UserError: if they label an image differently.
    """
    for name in set(labels) & set(more):
        if labels[name] != more[name]:
            raise UserError(
                f"{path} labels {name} {more[name]!r}, but it is labeled {labels[name]!r} already"
            )
    return {**labels, **more}


def write_proposal(
    path: pathlib.Path, proposed: Iterable[Proposed], like: pathlib.Path | None = None
) -> None:
    """Writes images to label, the first the most wanted, whole or not at all.

    A table that stands there is replaced; if it has columns that are not ours, notes of a person,
    say, it is kept under a name with the time in it.

    Args:
      path: the table.
      proposed: its rows.
      like: a table whose delimiter and byte-order mark this one shall have, since the same program
        will open it.
    """
    if not set(_header(path)) <= set(PROPOSAL_COLUMNS):
        shutil.copy2(path, path.with_suffix(f".{time.strftime('%Y%m%dT%H%M%S')}.csv"))
    files.write(path, proposal_text(proposed, like))


def is_replaceable(path: pathlib.Path, is_ours: bool = False) -> bool:
    """Whether `write_proposal` made the table that stands there, or there is none.

    Args:
      path: the table.
      is_ours: whether it is known to have made it; columns that only help may then be gone.

    Raises:
      UserError: if it seems to have made it, but path or label is gone, or has another name now.
    """
    header = _header(path)
    is_ours |= set(PROPOSAL_COLUMNS[2:]) <= set(header)
    if header and is_ours:
        _check_columns(path, header)
    return is_ours or not header


def holds_labels(path: pathlib.Path) -> bool:
    """Whether a table has the columns path and label."""
    return set(COLUMNS) <= set(_header(path))


def proposal_text(proposed: Iterable[Proposed], like: pathlib.Path | None = None) -> str:
    """Returns what `write_proposal` writes."""
    table = io.StringIO(newline="")
    delimiter = "," if like is None else _text(like)[1]
    writer = csv.writer(table, lineterminator="\n", delimiter=delimiter)
    writer.writerow(PROPOSAL_COLUMNS)
    for rank, image in enumerate(proposed, start=1):
        numbers = ("" if x is None else f"{x:.6g}" for x in (image.confidence, image.score))
        writer.writerow([_path_cell(image.path), "", _cell(image.predicted), *numbers, rank])
    return _mark(like) + table.getvalue()


def prediction_text(predictions: Iterable[tuple[str, Sequence[str], Sequence[float]]]) -> str:
    """Returns a table of predictions: columns path, predicted, confidence, predicted_2 and so on.

    Args:
      predictions: (path, class names, probabilities) of each image, the most probable class first.
    """
    rows = list(predictions)
    count = max((len(names) for _, names, _ in rows), default=1)
    header = ["path"]
    for rank in range(1, max(count, 1) + 1):
        header += [f"{name}_{rank}" if rank > 1 else name for name in PREDICTED]
    table = io.StringIO(newline="")
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(header)
    for path, names, probabilities in rows:
        cells = [_path_cell(path)]
        for name, probability in zip(names, probabilities, strict=True):
            cells += [_cell(name), f"{probability:.6g}"]
        writer.writerow(cells + [""] * (len(header) - len(cells)))
    return table.getvalue()


def may_hold_predictions(path: pathlib.Path) -> bool:
    """Returns whether there is no file, or one that holds a `prediction_text`."""
    header = _header(path)
    return not header or header[:3] == ["path", *PREDICTED]


def read_proposal(path: pathlib.Path, folder: str) -> list[Proposed]:
    """Returns the images of a proposal, whether a label was filled in or not.

    None if there is no file. Numbers that a person has spoiled are left out.

    Args:
      path: the table.
      folder: of the images.

    Raises:
      UserError: if it is no such table.
    """

    def number(cell: str) -> float | None:
        with contextlib.suppress(ValueError):
            return float(cell)
        return None

    return [
        Proposed(
            _relative(_path(row["path"]), folder),
            row.get("predicted", ""),
            number(row.get("confidence", "")),
            number(row.get("score", "")),
        )
        for _, row in _rows(path)
    ]


def add_labels(path: pathlib.Path, labels: Mapping[str, str]) -> None:
    """Adds rows to a table of labels, whole or not at all, in its own form.

    It is made if it is not there. Other columns stay as they are, and are empty in the new rows.
    """
    text, delimiter = _text(path)
    header = next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), COLUMNS)
    columns = [_column(name) for name in header]
    end = "\r\n" if "\r\n" in text else "\n"
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, columns, delimiter=delimiter, lineterminator=end)
    if not text:
        writer.writeheader()
    writer.writerows(
        {"path": _path_cell(name), "label": _cell(label)} for name, label in labels.items()
    )
    between = end if text and not text.endswith("\n") else ""
    files.write(path, f"{_mark(path)}{text}{between}{table.getvalue()}")


def change_labels(path: pathlib.Path, labels: Mapping[str, str | None], folder: str) -> None:
    """Gives images labels in a table, new or others than before, or takes them away.

    Whole or not at all, in the table's own form. A row that has nothing but its label goes with it.

    Args:
      path: the table; it is made if it is not there.
      labels: path → class name; None takes the label away.
      folder: of the images.
    """
    text, delimiter = _text(path)
    rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))
    columns = [_column(name) for name in rows[0]] if rows else []
    kept, found = rows[:1], set()
    for row in rows[1:]:
        cells = dict(zip(columns, row, strict=False))
        name = cells.get("path", "").strip()
        name = name and _relative(_path(name), folder)
        if name in labels:
            found.add(name)
            others = {key for key, cell in cells.items() if key not in COLUMNS and cell.strip()}
            if labels[name] is None and not others:
                continue
            cells["label"] = _cell(labels[name] or "")
            row = [cells.get(column, "") for column in columns]
        kept.append(row)
    if found:
        table = io.StringIO(newline="")
        end = "\r\n" if "\r\n" in text else "\n"
        csv.writer(table, delimiter=delimiter, lineterminator=end).writerows(kept)
        files.write(path, _mark(path) + table.getvalue())
    if new := {name: label for name, label in labels.items() if label and name not in found}:
        add_labels(path, new)


def _rows(path: pathlib.Path) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of a table with the numbers of their lines, cells stripped; none without a file."""
    text, delimiter = _text(path)
    if not text:
        return
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        columns = [_column(name) for name in next(lines)]
        _check_columns(path, columns)
        if twice := sorted({name for name in columns if name and columns.count(name) > 1}):
            raise UserError(f"line 1 of {path} names the column {twice[0]} twice")
        for cells in lines:
            if len(cells) > len(columns):
                raise UserError(f"line {lines.line_num} of {path} has more cells than the header")
            cells += [""] * (len(columns) - len(cells))
            row = dict(zip(columns, (cell.strip() for cell in cells), strict=True))
            for name in COLUMNS:
                if CONTROL.search(row[name]):
                    raise UserError(
                        f"line {lines.line_num} of {path} has a line break or a control character "
                        f"in its {name}: {row[name]!r}"
                    )
            for name in ("label", "predicted"):
                row[name] = _plain(row.get(name, ""))
            if row["path"]:
                yield lines.line_num, row
            elif row["label"]:
                raise UserError(f"line {lines.line_num} of {path} has a label but no path")
    except csv.Error as error:
        raise UserError(f"line {lines.line_num} of {path} is no CSV: {error}") from error


def _path_cell(path: str) -> str:
    """A path as it stands in a table."""
    is_text = not any("\ud800" <= character <= "\udfff" for character in path)
    if path != path.strip() or CONTROL.search(path) or not is_text or path.startswith(BYTES):
        return BYTES + urllib.parse.quote(os.fsencode(path))
    return f"./{path}" if path.startswith(("=", "+", "-", "@", "'")) else path


def _path(cell: str) -> str:
    """The path that a cell stands for."""
    if cell.startswith(BYTES):
        return os.fsdecode(urllib.parse.unquote_to_bytes(cell.removeprefix(BYTES)))
    return cell


def _cell(text: str) -> str:
    """A label as it stands in a table."""
    return f"'{text}" if FORMULA.match(text) and not _is_number(text) else text


def _plain(cell: str) -> str:
    """The label that a cell stands for."""
    return cell[1:] if cell.startswith("'") and FORMULA.match(cell) else cell


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _check_columns(path: pathlib.Path, columns: Sequence[str]) -> None:
    """Raises `UserError` unless path and label are among the columns of a table."""
    if not set(COLUMNS) <= set(columns):
        raise UserError(
            f"{path} has the columns {', '.join(columns)}; it needs path and label, and stays as "
            "it is until it has them"
        )


def _header(path: pathlib.Path) -> list[str]:
    """The columns of a table; none where there is nothing."""
    text, delimiter = _text(path)
    try:
        cells = next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), [])
    except csv.Error as error:
        raise UserError(f"line 1 of {path} is no CSV: {error}") from error
    return [_column(name) for name in cells]


def _column(name: str) -> str:
    """The name of a column; of ours, capital letters do not matter."""
    name = name.strip()
    return name.lower() if name.lower() in COLUMNS else name


def _text(path: pathlib.Path) -> tuple[str, str]:
    """A table as it stands there, and its delimiter; "" where there is nothing."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            text = file.read()
    except FileNotFoundError:
        return "", ","
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8; save it as CSV in UTF-8") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    # Spreadsheets of many countries write semicolons.
    return text if text.strip() else "", max(",;\t", key=text.partition("\n")[0].count)


def _mark(path: pathlib.Path | None) -> str:
    """The byte-order mark of a table, if it has one."""
    if path is None or not path.exists():
        return ""
    return "\ufeff" if path.read_bytes().startswith(codecs.BOM_UTF8) else ""


def _relative(path: str, folder: str) -> str:
    """A path as `images.find` has it, relative to the folder, however it was written."""
    return pathlib.PurePath(os.path.relpath(os.path.join(folder, path), folder)).as_posix()
