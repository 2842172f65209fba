"""A progress bar for the work of a round, if there is a terminal."""

import tqdm

from dynamical_jax.active_learning import Reporter
from dynamical_jax.training import Evaluation


class Bar(Reporter):
    """Shows the progress of `active_learning.Experiment`.

    Args:
      position: on which line of the terminal, 0 for the first.

    Attributes:
      status: text at the end of the bar, about the whole comparison.
    """

    def __init__(self, position: int = 0):
        # disable=None: off where standard error is no terminal.
        self._bar = tqdm.tqdm(disable=None, leave=False, dynamic_ncols=True, position=position)
        self.status = ""

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def start(self, name: str, num_rounds: int, max_epochs: int) -> None:
        """Starts the bar of a run.

        Args:
          name: name of the run.
          num_rounds: number of queries.
          max_epochs: largest number of epochs of training.
        """
        self._name, self._num_rounds, self._max_epochs = name, num_rounds, max_epochs
        self._total, self._seen = None, ""

    def begin(self, round_index: int) -> None:
        """Starts the bar of a round."""
        self._round = f"{self._name}, round {round_index}/{self._num_rounds}"
        self._total, self._seen = None, ""

    def epoch(self, epoch: int, labeled: Evaluation | None, target: float | None) -> None:
        """Shows the epochs, and the loss on the labeled set with the loss at which training stops.

        If the loss decides, nobody knows the number of epochs, so the bar shows no end.
        """
        if labeled is not None:
            goal = "" if target is None else f" → {target:.2g}"
            self._seen = f"loss {labeled.loss:.2g}{goal}, {labeled.accuracy:.1%} right"
        total = self._max_epochs if target is None else None
        self._show("training", epoch, total, "epochs", self._seen)

    def scored(self, done: int, total: int) -> None:
        """Shows how many examples of the pool are scored."""
        self._show("scoring", done, total, "examples")

    def write(self, line: str) -> None:
        """Prints a line to standard output without breaking the bar."""
        self._bar.write(line)

    def _show(self, part: str, done: int, total: int | None, unit: str, detail: str = "") -> None:
        if self._bar.disable:
            return
        if (part, total) != self._total:
            self._total = (part, total)
            self._bar.reset()
            self._bar.total, self._bar.unit = total, f" {unit}"
            self._bar.set_description_str(f"{self._round}, {part}")
        self._bar.set_postfix_str("; ".join(filter(None, (detail, self.status))), refresh=False)
        self._bar.update(done - self._bar.n)


class Bars:
    """A bar for each run that is being played, on lines below each other."""

    def __init__(self):
        self._bars: list[Bar] = []
        self._free: list[Bar] = []

    def __enter__(self) -> "Bars":
        return self

    def __exit__(self, *exception: object) -> None:
        for bar in self._bars:
            bar.__exit__()

    def take(self) -> Bar:
        """Returns a bar that no other run uses, the uppermost."""
        if not self._free:
            self._bars.append(Bar(len(self._bars)))
            return self._bars[-1]
        bar = min(self._free, key=self._bars.index)
        self._free.remove(bar)
        return bar

    def give_back(self, bar: Bar) -> None:
        """Lets another run have a bar."""
        self._free.append(bar)

    def write(self, line: str) -> None:
        """Prints a line to standard output without breaking the bars."""
        tqdm.tqdm.write(line)
