"""Round after round on a tiny pool: memory, open files and memory maps stay as they are.

For `SOAK_MINUTES`; by default 2.
"""

import gc
import os
import time

import numpy as np
import psutil
import pytest
import toy

import dynamical_jax as dj
from dynamical_jax.runs.checkpoints import Checkpoints

MINUTES = float(os.environ.get("SOAK_MINUTES", 2))
WARM_UP = 4  # Runs of each strategy, by then all programs are compiled, and caches are filled.


def holdings():
    gc.collect()
    process = psutil.Process()
    with open("/proc/self/maps", "rb") as maps:
        return process.memory_info().rss / 2**20, process.num_fds(), sum(1 for _ in maps)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_rounds_leave_nothing_behind(tmp_path, dataset):
    if not os.path.exists("/proc/self/maps"):
        pytest.skip("no /proc")
    end = time.monotonic() + 60 * MINUTES
    model = toy.models()["batch_norm"]
    config = dj.TrainingConfig(max_epochs=2, target_accuracy=0.5)
    names, rounds, seed, samples = ("dynamical", "badge", "albl"), 0, 0, []
    while time.monotonic() < end or len(samples) < 3:
        experiment = dj.Experiment(
            dataset,
            model,
            dj.strategies.create(names[seed % len(names)]),
            dj.Budget(6, 3, 5),
            config,
            seed,
        )
        checkpoints, state = Checkpoints(tmp_path / "kept"), experiment.init()
        while state.round_index <= experiment.budget.num_rounds:
            state, result = experiment.step(state)
            dj.files.append(tmp_path / "rounds.jsonl", dj.records.make(result, {"seed": seed}))
            checkpoints.save(state)
            assert checkpoints.restore(experiment) is not None
            rounds += 1
        checkpoints.remove()
        seed += 1
        if seed >= WARM_UP * len(names) and seed % len(names) == 0:
            samples.append((rounds, *holdings()))
    (at, *first), (rounds, *last) = samples[0], samples[-1]
    print(f"{rounds} rounds; from round {at} to the last:")
    for name, before, after in zip(("MiB", "open files", "maps"), first, last, strict=True):
        print(f"  {name:12}{before:10.0f}{after:10.0f}")
    per_round = np.polyfit(*np.array(samples, float).T[:2], 1)[0]
    print(f"  memory grows by {1024 * per_round:.1f} KiB a round")
    assert last[1] <= first[1]
    assert last[2] <= first[2] + 50
    assert per_round * 1024 < 40
