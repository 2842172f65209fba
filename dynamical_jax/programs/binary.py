"""Starts programs, checks their command lines, and reports errors in one line."""

import os
import sys
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
from absl import app, flags, logging

from dynamical_jax.errors import UserError

CHECKED_MODULES = ("dynamical_jax.", "experiments.", "theory.")
"""Prefixes of the modules whose flags a program must read, or refuse."""


def start(program: types.ModuleType) -> None:
    """Runs a program with the flags of the command line, and exits with its status.

    For console scripts and files that only call this: --help shows the docstring and the key flags
    of the program.

    Args:
      program: its `main` takes the command line without flags and returns the exit status.
    """
    sys.modules["__main__"].__doc__ = program.__doc__
    for flag in flags.FLAGS.get_key_flags_for_module(program):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
    logging.set_verbosity(logging.WARNING)  # JAX and matplotlib chat at INFO.
    app.run(program.main)


def run_main(run: Callable[[], list[str]], interrupted: str = "interrupted") -> int | None:
    """Runs a program; returns the exit status. A `UserError` is one line without a traceback.

    Args:
      run: does the work; returns a line for each part that failed.
      interrupted: is printed if the user stops the program.
    """
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            failures = run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    except BrokenPipeError:  # The reader of our output has stopped reading, as `head` does.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else None


def _show_warning(message: Any, category: type, *location: Any) -> None:
    """Prints a warning in one line, without the place in the code that it comes from."""
    text = str(message) if category is UserWarning else f"{category.__name__}: {message}"
    print(f"warning: {text}", file=sys.stderr)


def check_command_line(argv: list[str], module: Any) -> None:
    """Raises `UserError` if an argument or a flag of the command line would have no effect.

    Args:
      argv: the command line without its flags.
      module: the program; its key flags are those that it reads.
    """
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; flags look like --dataset=cifar10")
    read_names = {flag.name for flag in flags.FLAGS.get_key_flags_for_module(module)}
    for module_name, module_flags in flags.FLAGS.flags_by_module_dict().items():
        for flag in module_flags if module_name.startswith(CHECKED_MODULES) else ():
            if flag.name not in read_names and not flag.using_default_value:
                raise UserError(f"--{flag.name} has no effect here; --help lists what has")


def keep_compiled_programs(cache_dir: str) -> None:
    """Makes JAX keep compiled programs in `cache_dir` between processes."""
    compiled = os.path.join(cache_dir, "compiled")
    try:
        os.makedirs(compiled, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {compiled}: {error.strerror}") from error
    jax.config.update("jax_compilation_cache_dir", compiled)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def parse_positive(flag: str, values: Sequence[str]) -> list[int]:
    """Returns the values of a list flag as positive integers.

    Raises:
      UserError: if there are none, or one is no positive integer.
    """
    if not values or not all(value.isdecimal() and int(value) for value in values):
        raise UserError(f"{flag} must be positive whole numbers, got {','.join(values)!r}")
    return [int(value) for value in values]
