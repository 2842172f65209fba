"""Programs in processes of their own, which have imported all there is to import when they begin.

A server imports the programs once, which takes seconds, and forks for each. JAX starts no thread
before it computes, so that forking is safe.
"""

import importlib
import multiprocessing
import os
import sys

PROGRAMS = ("experiments.active_learning", "dynamical_jax.programs.select")

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(list(PROGRAMS))


def start(module, *flags):
    """Starts a program; returns its process."""
    process = _context.Process(target=_play, args=(module, [module, *map(str, flags)]))
    process.start()
    return process


def _play(module, argv):
    from absl import flags

    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    program = importlib.import_module(module)
    sys.exit(program.main(flags.FLAGS(argv)))
