"""The background thread of a session: runs jobs one after the other."""

import queue
import threading
from collections.abc import Callable

from dynamical_jax.errors import UserError, describe


class _StoppedError(Exception):
    """Ends a job when the session is closed."""


class Worker:
    """Runs jobs one after the other in a thread.

    Args:
      lock: held whenever the attributes change; hold it to call `add_job`.
      on_failure: called with the name of a job that failed, with the lock held.

    Attributes:
      doing: the current task, "" for none.
      share: the share of it that is done, if known.
      error: of the last job, "" where there was none.
    """

    def __init__(self, lock: threading.RLock, on_failure: Callable[[str], None]):
        self._lock, self._on_failure = lock, on_failure
        self.doing, self.error = "", ""
        self.share: float | None = None
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._pending: set[str] = set()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="labeling", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def close(self, timeout: float | None = None) -> bool:
        """Ends the current task at its next `report`; returns whether the thread has ended.

        Args:
          timeout: seconds to wait; by default as long as it takes.
        """
        self._closing = True
        self._jobs.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout)
        return not self._thread.is_alive()

    @property
    def is_busy(self) -> bool:
        """Whether a job is running or queued."""
        return bool(self._pending)

    def add_job(self, name: str, job: Callable[[], None]) -> None:
        """Queues a job, unless one of this name is queued or running."""
        if name not in self._pending:
            self._pending.add(name)
            self.doing = self.doing or "starting"
            self._jobs.put(lambda: self._run(name, job))

    def report(self, text: str, share: float | None = None) -> None:
        """Called by a job with the name of the current task, and the share of it that is done."""
        if self._closing:
            raise _StoppedError
        self.doing, self.share = text, share

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()

    def _run(self, name: str, job: Callable[[], None]) -> None:
        """Runs a job; its error is kept to be shown."""
        error = ""
        try:
            job()
        except _StoppedError:
            return
        except UserError as wrong:
            error = str(wrong)
        except OSError as wrong:
            error = describe(wrong)
        except Exception as wrong:  # The person goes on labeling whatever the model does.
            error = f"{type(wrong).__name__}: {str(wrong).partition(chr(10))[0]}"
        with self._lock:
            if error:
                self._on_failure(name)
            self._pending.discard(name)
            self.error = error
            self.doing, self.share = ("starting" if self._pending else ""), None
