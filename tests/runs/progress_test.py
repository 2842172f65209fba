"""What the bar shows on a terminal."""

import io
import sys

from dynamical_jax.runs.progress import Bar
from dynamical_jax.training import Evaluation


class Terminal(io.StringIO):
    def isatty(self):
        return True


def terminal_of(monkeypatch):
    # Within the test: pytest puts its own in place between fixtures and test.
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("COLUMNS", "200")
    return sys.stderr


def last(terminal):
    return [part for part in terminal.getvalue().split("\r") if part.strip()][-1]


def test_loss_beside_its_target_and_no_end_that_nobody_knows(monkeypatch):
    terminal = terminal_of(monkeypatch)
    with Bar() as bar:
        bar.start("random, seed 0", num_rounds=4, max_epochs=500)
        for round_index in (0, 1):  # The second comes after scoring, which has a total.
            bar.begin(round_index)
            bar.epoch(1, None, 0.002)
            bar.epoch(5, Evaluation(0.25, 0.125), 0.002)
            bar.epoch(6, None, 0.002)
            bar._bar.refresh()
            shown = last(terminal)
            assert f"random, seed 0, round {round_index}/4, training: 6 epochs" in shown
            assert "loss 0.12 → 0.002, 25.0% right" in shown
            assert "%|" not in shown
            assert "500" not in shown
            bar.scored(10, 1000)
            bar._bar.refresh()
            assert "1%|" in last(terminal)
            assert "10/1000" in last(terminal)


def test_epochs_of_how_many_where_their_number_decides(monkeypatch):
    terminal = terminal_of(monkeypatch)
    with Bar() as bar:
        bar.start("random, seed 0", num_rounds=4, max_epochs=500)
        bar.begin(0)
        bar.epoch(5, Evaluation(0.25, 0.125), None)
        bar._bar.refresh()
        assert "5/500" in last(terminal)
        assert "loss 0.12, 25.0% right" in last(terminal)
