"""The answers of each client of a session, which it may take back step by step."""

from collections.abc import Iterable
from typing import NamedTuple

from dynamical_jax.labeling import answers
from dynamical_jax.labeling.answers import Answer


class State(NamedTuple):
    """The state of an image before an answer, for undo."""

    label: str
    broken: bool


def histories(log: Iterable[Answer]) -> dict[str, list[list[tuple[str, State]]]]:
    """Returns the answers that each client may take back, from the log of earlier sessions."""
    state: dict[str, State] = {}
    histories: dict[str, list[list[tuple[str, State]]]] = {}
    groups: dict[str, int] = {}
    for answer in log:
        history = histories.setdefault(answer.client, [])
        before = state.get(answer.path, State("", False))
        if answer.what == answers.UNDO:
            if history and groups.get(answer.client) != -answer.group:
                history.pop()
                groups[answer.client] = -answer.group
            state[answer.path] = State(answer.label, False)
            continue
        if groups.get(answer.client) != answer.group:
            history.append([])
            groups[answer.client] = answer.group
        history[-1].append((answer.path, before))
        if answer.what == answers.LABEL:
            state[answer.path] = State(answer.label, False)
        elif answer.what == answers.BROKEN:
            state[answer.path] = State("", True)
    return histories
