"""Round after round on a tiny pool: memory, open files and memory maps stay as they are.

For `SOAK_MINUTES`; by default 2. Each round is recorded and saved, and the first run is restored,
as a process does that goes on with it. Not more: of each array that is restored TensorStore 0.1.86
keeps 6 KiB for good (`TensorStore.spec().to_json()` gives back lists and dictionaries that are
never freed).
"""

import gc
import os
import time

import jax
import numpy as np
import psutil
import pytest
import toy

import dynamical_jax as dj
from dynamical_jax.runs.checkpoints import Checkpoints

MINUTES = float(os.environ.get("SOAK_MINUTES", 2))
NAMES = ("dynamical", "badge", "albl")
COMPILED = "/jax/core/compile/backend_compile_duration"


def holdings():
    gc.collect()
    process = psutil.Process()
    with open("/proc/self/maps", "rb") as maps:
        return {
            "MiB": process.memory_info().rss / 2**20,
            "open files": process.num_fds(),
            "maps": sum(1 for _ in maps),
            "threads": process.num_threads(),
            "Python's objects": len(gc.get_objects()),
        }


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_rounds_leave_nothing_behind(tmp_path, dataset):
    if not os.path.exists("/proc/self/maps"):
        pytest.skip("no /proc")
    programs = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: event == COMPILED and programs.append(seconds)
    )
    end = time.monotonic() + 60 * MINUTES
    model = toy.models()["batch_norm"]
    config = dj.TrainingConfig(max_epochs=2, target_accuracy=0.5)
    rounds, seed, samples = 0, 0, []
    while time.monotonic() < end or len(samples) < 20:
        experiment = dj.Experiment(
            dataset,
            model,
            dj.strategies.create(NAMES[seed % len(NAMES)]),
            dj.Budget(6, 3, 5),
            config,
            seed,
        )
        checkpoints, state = Checkpoints(tmp_path / "kept"), experiment.init()
        while state.round_index <= experiment.budget.num_rounds:
            state, result = experiment.step(state)
            dj.files.append(tmp_path / "rounds.jsonl", dj.records.make(result, {"seed": seed}))
            checkpoints.save(state)
            rounds += 1
        if seed == 0:
            assert checkpoints.restore(experiment) is not None
        checkpoints.remove()
        seed += 1
        if seed % len(NAMES) == 0:
            samples.append({"rounds": rounds, "programs compiled": len(programs), **holdings()})
    # By half of the time all is compiled, and the caches of all libraries are full.
    first, last = samples[len(samples) // 2], samples[-1]
    print(f"{rounds} rounds; of the second half, from round {first['rounds']} on:")
    for name, before in first.items():
        print(f"  {name:18}{before:10.0f}{last[name]:10.0f}")
    half = [(sample["rounds"], sample["MiB"]) for sample in samples[len(samples) // 2 :]]
    per_round = 1024 * np.polyfit(*zip(*half, strict=True), 1)[0]
    print(f"  memory grows by {per_round:.1f} KiB a round")
    assert last["programs compiled"] == first["programs compiled"]
    assert last["open files"] <= first["open files"]
    assert last["maps"] <= first["maps"] + 50
    assert last["threads"] <= first["threads"] + 2  # Libraries start those of their pools late.
    # In the first minutes caches still fill.
    assert last["Python's objects"] <= 1.05 * first["Python's objects"]
    assert per_round < 40
