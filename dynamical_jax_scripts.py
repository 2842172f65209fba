"""Console scripts. They answer Ctrl-C before JAX is imported, which takes seconds."""

import importlib
import os
import signal
import sys
from typing import Any, NoReturn


def embed() -> None:
    """Runs dynamical-embed."""
    _start("embed")


def label() -> None:
    """Runs dynamical-label."""
    _start("label")


def predict() -> None:
    """Runs dynamical-predict."""
    _start("predict")


def select() -> None:
    """Runs dynamical-select."""
    _start("select")


def _start(name: str) -> None:
    signal.signal(signal.SIGINT, _interrupt)
    program = importlib.import_module(f"dynamical_jax.programs.{name}")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # From here on the program answers.
    program.start()


def _interrupt(*_: Any) -> NoReturn:
    print("interrupted; nothing was begun", file=sys.stderr, flush=True)
    os._exit(130)  # An exception in the middle of an import would leave a traceback.
