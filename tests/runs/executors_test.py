"""Runs that are played elsewhere leave the records of runs that are played here."""

import os
import pathlib
import pickle
import signal
import subprocess
import sys

import psutil
import pytest
import toy

import dynamical_jax as dj
from dynamical_jax.runs import comparison, playing, processes, records, run_directory

ROOT = pathlib.Path(__file__).parent.parent.parent


def runs_of(dataset, strategies):
    config = dj.TrainingConfig(max_epochs=6, batch_size=8)
    budget = dj.Budget(initial_size=6, batch_size=4, num_rounds=2)
    return [
        comparison.Run(
            name,
            dj.Experiment(dataset, toy.models()["batch_norm"], strategy, budget, config, seed),
            {"flags": {}},
        )
        for seed in (0, 1)
        for name, strategy in strategies.items()
    ]


def play(path, runs, executor):
    with run_directory.open_locked(str(path), {}, print) as directory:
        failures = comparison.play(runs, directory, 2, executor)
    rounds = records.read(path / "rounds.jsonl")
    for record in rounds:
        del record["seconds"], record["git_commit"]
    return failures, sorted(rounds, key=lambda r: (r["strategy"], r["seed"], r["round"]))


@pytest.fixture(scope="module")
def expected(dataset, tmp_path_factory):
    strategies = {name: dj.STRATEGIES[name]() for name in ("dynamical", "random")}
    return play(tmp_path_factory.mktemp("here"), runs_of(dataset, strategies), None)


def of(rounds, *strategies):
    return [record for record in rounds if record["strategy"] in strategies]


@pytest.mark.slow
@pytest.mark.skipif(processes.num_cores() < 2, reason="needs two cores")
def test_two_processes(dataset, expected, tmp_path, capsys):
    strategies = {
        "dynamical": dj.STRATEGIES["dynamical"](),
        "lethal": toy.Lethal(),
        "failing": toy.Failing(),
        "random": dj.STRATEGIES["random"](),
    }
    # A lethal one in front of others, which a new process plays.
    runs = [
        run
        for run in runs_of(dataset, strategies)
        if run.experiment.seed == 0 or run.strategy in ("dynamical", "random")
    ]
    with pytest.warns(UserWarning, match="about to fall"):
        failures, rounds = play(tmp_path, runs, processes.Processes(2))
    assert of(rounds, "dynamical", "random") == expected[1]
    assert len(rounds) == len(expected[1])  # The others fail in their first round.
    assert sorted(failures) == [
        "failing, seed 0: FloatingPointError: fell over",
        "lethal, seed 0: its process was ended by SIGKILL, as when memory runs out",
    ]
    assert "Traceback" in (tmp_path / "errors.log").read_text()
    assert capsys.readouterr().out.count("round 1/2") == 4
    left = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert not [name for name in left if name.startswith(("dynamical", "random"))]


def fragile(losses):
    """An executor of one's own, on a machine that is lost after so many messages, or a record."""

    def executor(runs, begin):
        for number, run in runs.items():
            while True:
                told = []

                def tell(message, told=told):
                    last = pickle.loads(told[-1]).method if told else None
                    if losses and losses[0] in (len(told), last):
                        losses.pop(0)
                        raise KeyboardInterrupt  # Which nothing on its way catches.
                    told.append(pickle.dumps(message))

                # As it would be there: nothing in common with this process.
                elsewhere, start = pickle.loads(pickle.dumps((run, begin(number))))
                try:
                    processes.play_elsewhere(elsewhere, start, tell)
                except KeyboardInterrupt:
                    lost = True
                else:
                    lost = False
                yield from ((number, pickle.loads(message)) for message in told)
                if not lost:
                    break

    return executor


@pytest.mark.parametrize(
    "losses", [pytest.param([], marks=pytest.mark.slow), [1, "record", 12, "record"]]
)
def test_a_lost_run_goes_on_from_its_last_checkpoint(
    dataset, expected, tmp_path, capsys, monkeypatch, losses
):
    monkeypatch.setattr(playing, "WORTH_SAVING", 0)
    strategies = {name: dj.STRATEGIES[name]() for name in ("dynamical", "random")}
    count = len(losses)
    found = play(tmp_path, runs_of(dataset, strategies), fragile(losses))
    assert found == expected
    assert losses == []
    assert capsys.readouterr().out.count("continued at round") >= count - 1


def test_more_processes_than_cores():
    many = processes.num_cores() + 1
    with pytest.raises(dj.UserError, match=f"cannot divide .* cores? among {many} processes"):
        processes.Processes(many)


def test_what_cannot_be_sent(dataset, tmp_path):
    strategy = dj.STRATEGIES["random"]()
    strategy.on_choice = lambda: None
    with pytest.raises(dj.UserError, match="at the top of a module"):
        play(tmp_path, runs_of(dataset, {"random": strategy}), processes.Processes(1))


def test_gpus_are_divided(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    shares = [processes._gpu_environment(slot, 2) for slot in range(2)]
    assert shares == [{"CUDA_VISIBLE_DEVICES": "3"}, {"CUDA_VISIBLE_DEVICES": "5"}]
    assert processes._gpu_environment(3, 4) == {
        "CUDA_VISIBLE_DEVICES": "5",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.375",
    }
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert processes._gpu_environment(0, 2) == {}


PROGRAM = (
    *(sys.executable, "-m", "experiments.active_learning", "--num_seeds=1", "--num_rounds=4"),
    *("--initial_size=20", "--batch_size=10", "--checkpoint_every=2"),
)


def outcome(directory):
    rounds = records.read(directory / "rounds.jsonl")
    for record in rounds:
        del record["seconds"], record["flags"], record["git_commit"]
    return sorted(rounds, key=lambda r: (r["strategy"], r["seed"], r["round"]))


@pytest.fixture(scope="module")
def on_one_core(tmp_path_factory):
    path = tmp_path_factory.mktemp("one-core")
    environment = {**os.environ, "NPROC": "1"}
    command = [*PROGRAM, f"--output_dir={path}"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env=environment)
    return outcome(path)


@pytest.mark.slow
@pytest.mark.skipif(processes.num_cores() < 2, reason="needs two cores")
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_the_program_with_workers_is_stopped_and_continues(tmp_path, on_one_core, end):
    command = [*PROGRAM, "--workers=2", f"--output_dir={tmp_path}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, **pipes, start_new_session=True)
    for line in process.stdout:
        if "round 1/4" in line:
            break
    children = psutil.Process(process.pid).children(recursive=True)
    assert len([child for child in children if "spawn_main" in " ".join(child.cmdline())]) == 2
    os.killpg(process.pid, end) if end == signal.SIGINT else process.kill()
    _, errors = process.communicate()
    if end == signal.SIGINT:
        assert process.returncode == 130
        assert errors == "interrupted; the same command continues from here\n"
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert outcome(tmp_path) == on_one_core


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's processes and sockets on this machine.
def test_a_ray_cluster_of_two_nodes_one_of_which_is_killed(tmp_path, on_one_core, monkeypatch):
    cluster_utils = pytest.importorskip("ray.cluster_utils", reason="needs the extra 'cluster'")
    # What a user has on each machine by installing the package.
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    nodes = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        workers = [nodes.add_node(num_cpus=1) for _ in range(2)]
        command = [*PROGRAM, f"--ray_address={nodes.address}", f"--output_dir={tmp_path}"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command, cwd=ROOT, **pipes)
        said = []
        for line in process.stdout:
            said.append(line)
            if "round 1/4" in line and workers:
                nodes.remove_node(workers.pop(), allow_graceful=False)
                break
        rest, errors = process.communicate()
    finally:
        nodes.shutdown()
    print("".join(said), rest, errors)
    assert process.returncode == 0
    assert "error: " not in errors  # Ray itself has something to say about the node.
    assert len(workers) == 1
    assert "continued at round" in rest
    assert outcome(tmp_path) == on_one_core
