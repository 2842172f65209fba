"""Words of messages: counted things, and names of which there are only a few."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from dynamical_jax.errors import UserError


def count(number: int, one: str, more: str | None = None) -> str:
    """Returns a number and what is counted, in the singular or the plural.

    >>> count(1, "image"), count(2, "image"), count(1, "is a copy", "are copies")
    ('1 image', '2 images', '1 is a copy')
    """
    return f"{number} {one if number == 1 else more or f'{one}s'}"


def check_known(what: str, name: Any, known: Iterable[str], more: str = "") -> None:
    """Raises `UserError`, with the names that there are, if a name is none of these.

    Args:
      what: has such a name.
      name: is looked for.
      known: the choices.
      more: what else is a choice, for the end of the message.
    """
    choices = list(known)
    if name not in choices:
        alike = difflib.get_close_matches(str(name), choices, 1)
        meant = f" (is it {alike[0]!r}?)" if alike else ""
        raise UserError(f"unknown {what} {name!r}{meant}; choose from {', '.join(choices)}{more}")


class Registry(dict[str, Any]):
    """A dictionary by names, whose `registry[name]` for any other is a `UserError`.

    Args:
      what: has such names, for the message.
      named: name → value.
    """

    def __init__(self, what: str, named: Mapping[str, Any]):
        super().__init__(named)
        self.what = what

    def __missing__(self, name: Any) -> Any:
        check_known(self.what, name, self)
