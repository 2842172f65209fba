"""Records in forms that other programs read: a tidy table, one HTML page, TensorBoard's events."""

import base64
import csv
import html
import importlib.util
import io
import math
import pathlib
import shutil
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dynamical_jax.errors import UserError
from dynamical_jax.runs import records

FIRST_COLUMNS = ("dataset", "model", "strategy", "seed", "round", "num_labeled")
SCALARS = ("test_accuracy", "best_test_accuracy", "train_accuracy", "test_loss", "train_loss")
"""Fields that become curves of TensorBoard, where they are recorded."""

STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
th, td { padding: .2rem .8rem; border-bottom: 1px solid #8886; }
th, td { text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
th { cursor: pointer; } th[aria-sort]::after { content: " ▲"; }
th[aria-sort=descending]::after { content: " ▼"; }
img { max-width: 100%; background: white; }
"""
SCRIPT = """
for (const head of document.querySelectorAll("th")) head.addEventListener("click", () => {
  const table = head.closest("table"), body = table.tBodies[0], at = head.cellIndex;
  const descending = head.getAttribute("aria-sort") === "ascending";
  const value = (row) => row.cells[at].textContent.replaceAll("\\u2212", "-").trim();
  const number = (text) => {
    const found = text.match(/[-+]?\\d+(\\.\\d+)?/);
    return found ? Number(found[0]) : NaN;
  };
  const compare = (a, b) => {
    const one = number(value(a)), other = number(value(b));
    if (Number.isNaN(one) !== Number.isNaN(other)) return Number.isNaN(one) ? 1 : -1;
    const order = Number.isNaN(one) ? value(a).localeCompare(value(b)) : one - other;
    return descending ? -order : order;
  };
  for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", descending ? "descending" : "ascending");
  body.append(...[...body.rows].sort(compare));
});
"""


def tidy(rounds: Iterable[records.Record]) -> str:
    """Returns a table in CSV: a row for each round, a column for each value that is one number.

    `pandas.read_csv` reads it; what a round does not have is empty.
    """
    rounds = list(rounds)
    names = dict.fromkeys(FIRST_COLUMNS)
    names |= {
        name: None for record in rounds for name, value in record.items() if _is_number(value)
    }
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, list(names), extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: record.get(name) for name in names} for record in rounds)
    return table.getvalue()


def page(title: str, texts: Sequence[str], pictures: Mapping[str, pathlib.Path]) -> str:
    """Returns a page of HTML that needs no other file: pictures, and tables to sort by a click.

    Args:
      title: of the page.
      texts: in Markdown.
      pictures: name → PNG file.

    Raises:
      UserError: if the package `markdown` is not installed.
    """
    check_installed("markdown")
    import markdown  # here, because it is an extra

    shown = [
        f'<p><img alt="{html.escape(name)}" src="data:image/png;base64,'
        f'{base64.b64encode(path.read_bytes()).decode()}"></p>'
        for name, path in pictures.items()
    ]
    parts = [markdown.markdown(html.escape(text, False), extensions=["tables"]) for text in texts]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join([*shown, *parts])
        + f"\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def tensorboard(rounds: Iterable[records.Record], directory: pathlib.Path) -> list[pathlib.Path]:
    """Writes TensorBoard's event files; returns the folders, one for each strategy and seed.

    The steps are numbers of labels. Folders that were written before are replaced.

    Raises:
      UserError: if the package `tensorboardX` is not installed.
    """
    check_installed("tensorboardX")
    import tensorboardX  # here, because it is an extra

    runs: dict[tuple[str, int], list[records.Record]] = {}
    for record in rounds:
        runs.setdefault((record["strategy"], record["seed"]), []).append(record)
    folders = []
    for (strategy, seed), of_run in runs.items():
        folder = directory / f"{strategy}-{seed}"
        shutil.rmtree(folder, ignore_errors=True)
        with tensorboardX.SummaryWriter(str(folder)) as writer:
            for record in of_run:
                for name in SCALARS:
                    if _is_number(value := record.get(name)):
                        writer.add_scalar(name, value, record["num_labeled"])
        folders.append(folder)
    return folders


def check_installed(package: str) -> None:
    """Raises `UserError` if a package of the extra `report` is missing."""
    if importlib.util.find_spec(package) is None:
        raise UserError(f"this needs {package}: pip install 'dynamical-jax[report]'")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
