"""The paper's tables: settings to run and numbers to compare with."""

import functools
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import dynamical_jax as dj


class Table(NamedTuple):
    """A table of the paper, test accuracies in percent.

    Attributes:
      name: as in `--preset`.
      flags: of its setting, beside those of the protocol, which are the defaults.
      mean: strategy → one number for each round; in Table 1, way to spend the budget → one number.
      std: likewise, the standard deviation over five runs; Table 1 has none.
    """

    name: str
    flags: Mapping[str, Any]
    mean: Mapping[str, Any]
    std: Mapping[str, Any]

    @property
    def title(self) -> str:
        """The name that the paper gives it."""
        return self.name.partition("-")[0].replace("table", "Table ")

    def cells(self) -> dict[tuple[str, int], tuple[float, float]]:
        """Returns mean and standard deviation (NaN: none given) for each (strategy, labels)."""
        first = self.flags["initial_size"]
        if "budget" in self.flags:
            last = first + self.flags["budget"]
            return {(name, last): (mean, math.nan) for name, mean in self.mean.items()}
        step = self.flags["batch_size"]
        return {
            (name, first + step * index): (mean, self.std[name][index])
            for name, means in self.mean.items()
            for index, mean in enumerate(means)
        }


@functools.cache
def tables() -> dict[str, Table]:
    """Returns all tables by name."""
    return {
        name: Table(name, table["flags"], table["mean"], table.get("std", {}))
        for name, table in _file()["tables"].items()
    }


def strategies() -> list[str]:
    """Returns the names of the strategies that the tables compare, in the order of the registry."""
    compared = set().union(*(table.mean for table in tables().values()))
    return [name for name in dj.STRATEGIES if name in compared]


def find_table(record: dj.records.Record) -> Table | None:
    """Returns the table with the setting of a record; seeds and number of rounds may differ."""
    flags = record["flags"]
    for table in tables().values():
        setting = {**_file()["protocol"], **table.flags}
        setting.pop("num_rounds", None)
        # A program without the flag (γ in the comparison of several γ) cannot differ in it.
        same = all(
            name not in flags or flags[name] in (value if isinstance(value, list) else [value])
            for name, value in setting.items()
        )
        if same and ("budget" in flags) == ("budget" in setting):
            return table
    return None


@functools.cache
def _file() -> dict[str, Any]:
    path = pathlib.Path(__file__).with_name("paper.json")
    return json.loads(path.read_text(encoding="utf-8"))
