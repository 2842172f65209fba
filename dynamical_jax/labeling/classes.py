"""Names of classes: which are names at all, and which may be the same class mistyped."""

import difflib
from collections.abc import Iterable, Mapping, Sequence

from dynamical_jax.errors import UserError

LONGEST_NAME = 100
"""Characters of a class name."""


def check_name(name: str) -> str:
    """Returns a class name as tables keep it, without space around it.

    Raises:
      UserError: if it is empty, too long, or not of one line of printable characters.
    """
    name = name.strip()
    if not name:
        raise UserError("a class needs a name")
    if len(name) > LONGEST_NAME:
        raise UserError(f"a class name has at most {LONGEST_NAME} characters, not {len(name)}")
    if not name.isprintable():
        raise UserError("a class name is one line of printable characters")
    return name


def check_known(labels: Mapping[str, str], known: Sequence[str]) -> None:
    """Raises `UserError` if a label is not one of the known classes.

    Args:
      labels: path → class name.
      known: names of classes.
    """
    for path, name in labels.items():
        if name not in known:
            alike = difflib.get_close_matches(name, known, 1)
            raise UserError(
                f"{path} is labeled {name!r}, which is none of --classes"
                + (f": is it {alike[0]!r}?" if alike else f" ({', '.join(known)})")
            )


def look_alikes(names: Iterable[str]) -> list[tuple[str, str]]:
    """Returns pairs of names that may be one class: the same but for capitals, marks or one letter.

    Short names, and those with digits, count as alike only if their letters are the same.

    >>> look_alikes(["horse", "Horse ", "hrose", "horses", "cat", "bat", "7", "8"])
    [('horse', 'Horse '), ('horse', 'hrose'), ('horse', 'horses')]
    """
    found, seen = [], {}
    for number, name in enumerate(dict.fromkeys(names)):
        plain = "".join(filter(str.isalnum, name.casefold()))
        keys = {plain}
        if len(plain) > 2 and not any(map(str.isdecimal, plain)):
            keys |= {plain[:i] + plain[i + 1 :] for i in range(len(plain))}
        others = [other for key in keys for other in seen.get(key, ())]
        others = [other for other in dict.fromkeys(others) if _nearly(plain, other[1])]
        if others and plain:
            found.append((min(others)[2], name))
        for key in keys:
            seen.setdefault(key, []).append((number, plain, name))
    return found


def _nearly(one: str, other: str) -> bool:
    """Whether words that are the same without a letter each differ in a letter, or two swapped."""
    if len(one) != len(other):
        return min(len(one), len(other)) >= 3
    differ = [i for i in range(len(one)) if one[i] != other[i]]
    if len(differ) < 2:
        return not differ or len(one) >= 5
    swapped = len(differ) == 2 and differ[1] == differ[0] + 1
    return swapped and len(one) >= 5 and one[differ[0]] == other[differ[1]]
