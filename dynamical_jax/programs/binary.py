"""Starts programs, checks their command lines, and reports errors in one line."""

import math
import os
import re
import sys
import types
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import jax
from absl import app, flags, logging

from dynamical_jax import parallel
from dynamical_jax.errors import UserError, describe

CHECKED_MODULES = ("dynamical_jax.", "experiments.", "theory.", "benchmarks.")
"""Prefixes of the modules whose flags a program must read, or refuse."""

LARGEST = 2**31 - 1
"""The largest whole number that a flag takes, besides seeds, which have their own limit."""

EXAMPLES = {"images": "photos", "dataset": "cifar10", "labels": "labels.csv", "top": "3"}
"""Flag → value: a program that has one of them names the first as an example."""

_LONG_WORD = re.compile(r"(\S{100})\S{900,}")
_READERS: dict[str, tuple[str, tuple[str, ...]]] = {}
_MAY_BE_INFINITE: set[str] = set()


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
    launch(program.main)


def launch(main: Callable[[list[str]], int | None]) -> None:
    """Runs a program with the command line of this process, and exits with its status.

    Args:
      main: takes the command line without flags, as `parse_flags` returns it.
    """
    logging.set_verbosity(logging.WARNING)  # JAX and matplotlib chat at INFO.
    try:
        app.run(main, flags_parser=parse_flags)
    except BrokenPipeError:
        _stop_printing()
        sys.exit(1)


def parse_flags(argv: list[str]) -> list[str]:
    """Reads the flags of a command line; returns it without them.

    Exits with status 1 after one line if there is no such flag, or it has no such value.
    """
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        why = str(error).replace(" ?", "?").rstrip(".")
        why = re.sub(r"\('Non-boolean argument to boolean flag', .*\)", "it takes no value", why)
        _say(f"error: {why} (--help lists all flags)")
        sys.exit(1)


def _stop_printing() -> None:
    """Prints to nowhere, since the reader has stopped reading, as `head` does."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run_main(run: Callable[[], list[str]], interrupted: str = "interrupted") -> int | None:
    """Runs a program; returns the exit status. A `UserError` is one line without a traceback.

    Likewise what the system refuses: files, and memory.

    Args:
      run: does the work; returns a line for each part that failed.
      interrupted: is printed if the user stops the program.
    """
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            failures = run()
    except UserError as error:
        _say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    except BrokenPipeError:
        _stop_printing()
        return 1
    except OSError as error:
        if error.errno is None:
            raise
        _say(f"error: {describe(error)}")
        return 1
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        why = str(error).partition("\n")[0] or "no more can be had"
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            _say(f"error: there is not enough memory: {why}")
        elif jax.distributed.is_initialized():
            _say(f"error: {parallel.lost(why)}")
        else:
            raise
        return 1
    for failure in failures:
        _say(f"error: {failure}")
    return 1 if failures else None


def _show_warning(message: Any, category: type, *location: Any) -> None:
    """Prints a warning in one line, without the place in the code that it comes from."""
    if not parallel.speaks():
        return
    text = str(message) if category is UserWarning else f"{category.__name__}: {message}"
    _say(f"warning: {text}")


def _say(text: str) -> None:
    """Prints a message to standard error, in one line whatever names and values are in it."""
    text = " ".join(text.splitlines())
    text = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
    print(_LONG_WORD.sub(r"\1…", text), file=sys.stderr)


def check_command_line(argv: list[str], module: Any) -> None:
    """Raises `UserError` if an argument or a flag of the command line would have no effect.

    Likewise if a number is not finite, where infinity has no meaning, or too large.

    Args:
      argv: the command line without its flags.
      module: the program; its key flags are those that it reads.
    """
    key_flags = flags.FLAGS.get_key_flags_for_module(module)
    read_names = {flag.name for flag in key_flags}
    if len(argv) > 1:
        name = next((name for name in EXAMPLES if name in read_names), "name")
        example = f"--{name}={EXAMPLES.get(name, 'value')}"
        raise UserError(f"unexpected argument {argv[1]!r}; flags look like {example}")
    for name in given():
        if name not in read_names:
            raise UserError(f"--{name} has no effect here; --help lists what has")
    for flag in key_flags:
        _check_number(flag)


def read_by(flag: flags.FlagHolder, kind: str, readers: Iterable[str]) -> None:
    """Declares that a flag has an effect only where one of `readers` is chosen.

    Args:
      flag: of a program that calls `check_read`.
      kind: of the choice, such as "strategy".
      readers: the choices of that kind that read the flag.
    """
    _READERS[flag.name] = kind, tuple(readers)


def check_read(**chosen: Collection[str]) -> None:
    """Raises `UserError` if a flag is given that nothing reads that is chosen.

    Args:
      **chosen: kind → what is chosen of it. Flags that choices of other kinds read are not looked
        at: call again when these are known.
    """
    for name, (kind, readers) in _READERS.items():
        if kind in chosen and is_given(name) and not set(readers) & set(chosen[kind]):
            raise UserError(
                f"--{name} has no effect with {', '.join(chosen[kind])}, only with "
                f"{', '.join(readers)}"
            )


def given() -> list[str]:
    """Returns the names of all flags of ours that are on the command line."""
    return [
        flag.name
        for module_name, module_flags in flags.FLAGS.flags_by_module_dict().items()
        for flag in (module_flags if module_name.startswith(CHECKED_MODULES) else ())
        if not flag.using_default_value
    ]


def is_given(name: str) -> bool:
    """Whether a flag is on the command line."""
    return not flags.FLAGS[name].using_default_value


def list_given(group: Iterable[flags.FlagHolder]) -> str:
    """Returns those of some flags that are given, as "--optimizer, --max_epochs"; "" for none."""
    return ", ".join(f"--{flag.name}" for flag in group if is_given(flag.name))


def allow_infinity(flag: flags.FlagHolder) -> None:
    """Declares that infinity is a value of a flag that has a meaning."""
    _MAY_BE_INFINITE.add(flag.name)


def _check_number(flag: flags.Flag) -> None:
    """Raises `UserError` if a flag is no number that programs can compute with."""
    value, name = flag.value, f"--{flag.name}"
    if isinstance(value, float):
        finite = math.isfinite(value) or (value == math.inf and flag.name in _MAY_BE_INFINITE)
        if not finite:
            raise UserError(f"{name} must be a finite number, got {value}")
    elif isinstance(value, int) and "seed" not in flag.name and abs(value) > LARGEST:
        raise UserError(f"{name} must be at most {LARGEST}, got {value}")


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
    # No more digits than `LARGEST` has: Python refuses to read thousands of them.
    if not values or not all(
        value.isdecimal() and len(value) <= 10 and 0 < int(value) <= LARGEST for value in values
    ):
        raise UserError(f"{flag} must be positive whole numbers, got {','.join(values)!r}")
    return [int(value) for value in values]
