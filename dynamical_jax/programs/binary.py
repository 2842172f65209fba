"""What every program does, whatever its flags: those of the package, and the checkout's."""

import os
import sys
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
from absl import app, flags, logging

from dynamical_jax.errors import UserError

OURS = ("dynamical_jax.", "experiments.", "theory.")
"""Where flags are defined that a program should not be given in vain."""


def start(program: types.ModuleType) -> None:
    """Runs a program as the command line asks, and exits with its status.

    A console script, or a file that only calls this, is then as good as the program itself: --help
    shows the program's docstring and its key flags.

    Args:
      program: its `main` takes the command line without flags and returns the exit status.
    """
    sys.modules["__main__"].__doc__ = program.__doc__
    for flag in flags.FLAGS.get_key_flags_for_module(program):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
    logging.set_verbosity(logging.WARNING)  # JAX and matplotlib chat at INFO.
    app.run(program.main)


def run_main(run: Callable[[], list[str]], interrupted: str = "interrupted") -> int | None:
    """Runs a binary; returns the exit status. What can be explained is one line, no traceback.

    Args:
      run: does the work; returns a line for each part that failed.
      interrupted: is printed where the user stops it.
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
    except BrokenPipeError:  # Who reads our output has had enough, as `head` does.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else None


def _show_warning(message: Any, category: type, *where: Any) -> None:
    """Prints what the user should know in one line; where it was found is for other programs."""
    text = str(message) if category is UserWarning else f"{category.__name__}: {message}"
    print(f"warning: {text}", file=sys.stderr)


def check_command_line(argv: list[str], module: Any) -> None:
    """Raises `UserError` if something is given that would have no effect.

    Args:
      argv: what is left of the command line after the flags.
      module: the binary; its key flags are those that it reads.
    """
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; flags look like --dataset=cifar10")
    read = {flag.name for flag in flags.FLAGS.get_key_flags_for_module(module)}
    for where, defined in flags.FLAGS.flags_by_module_dict().items():
        for flag in defined if where.startswith(OURS) else ():
            if flag.name not in read and not flag.using_default_value:
                raise UserError(f"--{flag.name} has no effect here; --help lists what has")


def keep_compiled_programs(cache_dir: str) -> None:
    """Lets JAX keep compiled programs between processes."""
    compiled = os.path.join(cache_dir, "compiled")
    try:
        os.makedirs(compiled, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {compiled}: {error.strerror}") from error
    jax.config.update("jax_compilation_cache_dir", compiled)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def parse_positive(flag: str, values: Sequence[str]) -> list[int]:
    """Returns the numbers that a list flag holds.

    Raises:
      UserError: if there are none, or others than positive whole ones.
    """
    if not values or not all(value.isdecimal() and int(value) for value in values):
        raise UserError(f"{flag} must be positive whole numbers, got {','.join(values)!r}")
    return [int(value) for value in values]
