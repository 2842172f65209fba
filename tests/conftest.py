import collections
import os
import pathlib
import sys
import tempfile

import jax
import psutil
import pytest
import toy
from absl import flags
from absl.testing import flagsaver

import dynamical_jax as dj

# Most of the time goes into compiling programs that run once; less is gained by optimising them.
# Without the fusion emitters compiling takes half as long again: 28 s instead of 53 s of CPU for
# training_test.py. Programs this small are not worth dividing among threads: 7.5 instead of 8.7 s
# for the convolutions of layers_test.py. Processes that tests start inherit it. Flags that a newer
# XLA does not know end the process with a line that names them; JAX 0.12 lacks the last one.
FAST_TO_COMPILE = (
    "--xla_backend_optimization_level=0",
    "--xla_cpu_parallel_codegen_split_count=1",
    *(["--xla_cpu_use_fusion_emitters=false"] if jax.__version_info__ < (0, 11) else []),
)
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FAST_TO_COMPILE])


def pytest_addoption(parser):
    parser.addoption("--cpu", action="store_true", help="show the CPU seconds of each test file")


def cpu_seconds():
    """Of this process and of its children that have ended: other work on the machine is not in."""
    return sum(os.times()[:4])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    item.cpu_start = cpu_seconds()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    if call.when == "teardown":  # Workers send these properties to the process that reports.
        item.user_properties.append(("cpu", cpu_seconds() - item.cpu_start))
    return (yield)


def pytest_terminal_summary(terminalreporter, config):
    if not config.getoption("--cpu"):
        return
    seconds = collections.Counter()
    for report in terminalreporter.getreports(""):
        seconds[report.nodeid.partition("::")[0]] += dict(report.user_properties).get("cpu", 0)
    terminalreporter.section("CPU seconds, without imports and collection")
    for file, spent in [*seconds.most_common(30), ("all", seconds.total())]:
        terminalreporter.write_line(f"{spent:8.1f} {file}")


def pytest_configure(config):
    """Lets the workers of a test run, and the tests of a worker, share compiled programs.

    Several runs share them, too, if they are given one directory: see `mutants.py`.
    """
    if "DYNAMICAL_JAX_TEST_CACHE" not in os.environ:  # Workers inherit it.
        directory = tempfile.TemporaryDirectory(prefix="dynamical_jax-tests-")
        os.environ["DYNAMICAL_JAX_TEST_CACHE"] = directory.name
        config.add_cleanup(directory.cleanup)
    compiled = os.path.join(os.environ["DYNAMICAL_JAX_TEST_CACHE"], "compiled")
    jax.config.update("jax_compilation_cache_dir", compiled)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@pytest.fixture
def cache_dir():
    """For binaries, which keep compiled programs there: those of all tests."""
    return os.environ["DYNAMICAL_JAX_TEST_CACHE"]


@pytest.fixture(autouse=True)
def _strict_arrays():
    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def drawn_pictures():
    """For tests that look at pictures."""


@pytest.fixture(autouse=True)
def _undrawn_pictures(request, monkeypatch):
    # Drawing takes a quarter of a second, often longer than all else that a binary does.
    if "drawn_pictures" not in request.fixturenames:
        draw_nothing = lambda picture, path, **options: pathlib.Path(path).touch()
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", draw_nothing)


@pytest.fixture(autouse=True, scope="module")
def _memory_maps():
    # Each compiled program holds memory and some memory maps, of which Linux allows a process
    # 65,530: when they are used up, XLA crashes in the middle of some innocent test. Without need
    # programs are kept: many modules compile the same ones.
    yield
    maps = pathlib.Path("/proc/self/maps")
    too_many = maps.exists() and maps.read_bytes().count(b"\n") > 45_000
    if too_many or psutil.Process().memory_info().rss > 3e9:
        jax.clear_caches()


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def dataset():
    return toy.dataset()


_MODELS = {}


@pytest.fixture
def run_binary(capsys, cache_dir, monkeypatch):
    """Runs a binary's main with flags; returns exit status, standard output, standard error.

    Models that are equal are one object in all runs: JAX keeps a traced program for an object.
    """
    standardized = dj.models.Standardized

    def make(*arguments):
        model = standardized(*arguments)
        return _MODELS.setdefault(model, model)

    monkeypatch.setattr(dj.models, "Standardized", make)
    if not flags.FLAGS.is_parsed():
        flags.FLAGS([sys.argv[0]])

    def run(binary, *arguments, **values):
        if "cache_dir" in flags.FLAGS:  # Not where only the report was imported.
            values = {"cache_dir": cache_dir, **values}
        with flagsaver.flagsaver(**values):
            status = binary.main([binary.__name__, *arguments])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def run_benchmark(capfd):
    """Runs a benchmark's main on the smallest setting, with flags.

    Returns exit status, standard output and standard error, those of its workers included.
    """
    if not flags.FLAGS.is_parsed():
        flags.FLAGS([sys.argv[0]])

    def run(binary, *arguments, **values):
        key_flags = {flag.name for flag in flags.FLAGS.get_key_flags_for_module(binary)}
        once = {"repetitions": 1} if "repetitions" in key_flags else {}
        with flagsaver.flagsaver(**{**once, **values}):
            status = binary.main([binary.__name__, *arguments])
        return status, *capfd.readouterr()

    return run
