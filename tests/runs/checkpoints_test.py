"""A run continued from its checkpoints is the run that was not interrupted."""

import json

import jax
import numpy as np
import pytest
import toy

import dynamical_jax as dj
from dynamical_jax.runs import comparison, playing, records, run_directory
from dynamical_jax.runs.checkpoints import Checkpoints

FLAGS = {"max_epochs": 6, "gammas": [1.0, np.inf]}


def experiment(dataset, strategy="dynamical", model="batch_norm", max_epochs=6, **fields):
    config = dj.TrainingConfig(max_epochs=max_epochs, batch_size=8)
    budget = dj.Budget(initial_size=6, batch_size=4, num_rounds=2)
    model = toy.models().get(model, model)
    given = {"model": model, "strategy": dj.STRATEGIES[strategy]()}
    return dj.Experiment(dataset, **{**given, **fields}, budget=budget, training_config=config)


def outcome(rounds):
    kept = [records.make(round_result, {}) for round_result in rounds]
    for record in kept:
        del record["seconds"]
    return kept


class Killed(BaseException):
    """As `kill -9` would: nothing may catch it."""


@pytest.mark.parametrize("strategy", ["dynamical", pytest.param("albl", marks=pytest.mark.slow)])
def test_from_every_epoch_and_round_the_rest_is_the_same(dataset, tmp_path, strategy, monkeypatch):
    experiment_ = experiment(dataset, strategy, max_epochs=3)
    expected = outcome(experiment_.run())  # Several epochs at a time; from here on one by one.
    monkeypatch.setattr(dj.training, "SHORT_CALL", 0.0)
    states = []

    def keep(state):
        checkpoints = Checkpoints(tmp_path / str(len(states)))
        checkpoints.save(state)
        states.append(checkpoints)

    state = experiment_.init()
    keep(state)
    while state.round_index <= 2:
        state, _ = experiment_.step(state, save=keep)
        keep(state)
    assert len(states) == 1 + 3 * (3 + 1)
    for checkpoints in states[:-1]:
        fresh = experiment(dataset, strategy, max_epochs=3)
        state, rounds = checkpoints.restore(fresh), []
        first = state.round_index
        while state.round_index <= 2:
            state, round_result = fresh.step(state)
            rounds.append(round_result)
        assert outcome(rounds) == expected[first:]


class TestDamage:
    @pytest.fixture
    def saved(self, dataset, tmp_path):
        said = []
        checkpoints = Checkpoints(tmp_path / "run", said.append)
        experiment_ = experiment(dataset)
        state, _ = experiment_.step(experiment_.init())
        for round_index in range(1, 4):
            checkpoints.save(state._replace(round_index=round_index))
        return checkpoints, experiment_, said, tmp_path / "run"

    def test_the_newest_two_are_kept(self, saved):
        checkpoints, experiment_, said, path = saved
        names = ["round-00002-epoch-0000000", "round-00003-epoch-0000000"]
        assert sorted(p.name for p in path.iterdir()) == sorted(
            [*names, *(f"{name}.json" for name in names)]
        )
        assert checkpoints.restore(experiment_).round_index == 3
        assert said == []

    def test_a_file_cut_short(self, saved):
        checkpoints, experiment_, said, path = saved
        files = [p for p in (path / "round-00003-epoch-0000000").rglob("*") if p.is_file()]
        largest = max(files, key=lambda file: file.stat().st_size)
        with largest.open("r+b") as file:
            file.truncate(largest.stat().st_size // 2)
        assert checkpoints.restore(experiment_).round_index == 2
        (line,) = said
        assert (
            "round-00003-epoch-0000000 is damaged (files are missing or not what was written)"
            in line
        )

    def test_killed_before_the_manifest_was_written(self, saved):
        checkpoints, experiment_, said, path = saved
        (path / "round-00003-epoch-0000000.json").unlink()
        assert checkpoints.restore(experiment_).round_index == 2
        (line,) = said
        assert "round-00003-epoch-0000000 was not finished: removed" in line

    def test_a_torn_manifest(self, saved):
        checkpoints, experiment_, said, path = saved
        (path / "round-00003-epoch-0000000.json").write_text('{"round_in')
        (path / "round-00002-epoch-0000000.json").write_text("")
        assert checkpoints.restore(experiment_) is None
        assert len(said) == 2

    @pytest.mark.parametrize(
        ("change", "why"),
        [
            ({"epoch": -1}, r"`int` >= 0 - at `$.epoch`"),
            ({"round_index": "three"}, r"`int`, got `str` - at `$.round_index`"),
            ({"seconds": [1]}, r"`object`, got `array` - at `$.seconds`"),
            ({"best_test_accuracy": 7}, r"`float` <= 1.0 - at `$.best_test_accuracy`"),
            ({"files": 3}, r"`object`, got `int` - at `$.files`"),
        ],
    )
    def test_a_manifest_that_means_nothing(self, saved, change, why):
        checkpoints, experiment_, said, path = saved
        manifest = path / "round-00003-epoch-0000000.json"
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **change}))
        assert checkpoints.restore(experiment_).round_index == 2
        (line,) = said
        assert why in line
        aside = sorted(p.name for p in (path / "damaged").iterdir())
        assert aside == ["round-00003-epoch-0000000", "round-00003-epoch-0000000.json"]
        assert checkpoints.restore(experiment_).round_index == 2
        assert said == [line]  # What is set aside is not looked at again.

    def test_numbers_that_are_not_finite_are_not_saved(self, saved):
        checkpoints, experiment_, said, _ = saved
        state = checkpoints.restore(experiment_)
        spoiled = jax.tree.map(lambda leaf: leaf * np.nan, state.variables)
        checkpoints.save(state._replace(round_index=4, variables=spoiled))
        assert checkpoints.restore(experiment_).round_index == 3
        assert said == []

    def test_numbers_that_are_not_finite_are_not_used(self, saved, monkeypatch):
        checkpoints, experiment_, said, _ = saved
        state = checkpoints.restore(experiment_)
        spoiled = jax.tree.map(lambda leaf: leaf * np.inf, state.variables)
        with monkeypatch.context() as before:  # As an earlier version would have done.
            before.setattr(dj.store, "_is_finite", lambda leaves: True)
            checkpoints.save(state._replace(round_index=4, variables=spoiled))
        assert checkpoints.restore(experiment_).round_index == 3
        (line,) = said
        assert "it holds numbers that are not finite" in line

    def test_a_changed_byte(self, saved):
        checkpoints, experiment_, said, path = saved
        files = [p for p in (path / "round-00003-epoch-0000000").rglob("*") if p.is_file()]
        largest = max(files, key=lambda file: file.stat().st_size)
        content = bytearray(largest.read_bytes())
        content[len(content) // 2] ^= 1
        largest.write_bytes(content)
        assert checkpoints.restore(experiment_).round_index == 2
        assert "not what was written" in said[0]

    def test_of_a_model_of_another_size(self, dataset, tmp_path):
        said, states = [], Checkpoints(tmp_path / "run", print)
        narrow, wide = (toy.standardized(dj.models.NTKCNN(3, (width,))) for width in (4, 5))
        states.save(experiment(dataset, model=narrow).init())
        states = Checkpoints(tmp_path / "run", said.append)
        assert states.restore(experiment(dataset, model=wide)) is None
        assert "a model of another size" in said[0]

    def test_of_another_model(self, saved, dataset):
        checkpoints, _, said, _ = saved
        assert checkpoints.restore(experiment(dataset, model="cnn")) is None
        assert "another model or optimizer" in said[0]


class TestRunDirectory:
    def test_other_flags_are_named(self, tmp_path):
        with run_directory.open_locked(str(tmp_path), FLAGS) as directory:
            directory.append(toy.record("a", 0, 0, 0.5))
        other = {"max_epochs": 7, "gammas": [1.0, 2.0], "new": None}
        with (
            pytest.raises(
                dj.UserError,
                match=r"\(--gammas=1.0,inf there and 1.0,2.0 here, --max_epochs=6 there and 7",
            ),
            run_directory.open_locked(str(tmp_path), other),
        ):
            pass
        with run_directory.open_locked(str(tmp_path), FLAGS) as directory:
            assert len(directory.done["a", 0]) == 1
            assert directory.done["a", 1] == []

    def test_where_nothing_was_done_other_flags_are_welcome(self, tmp_path):
        with run_directory.open_locked(str(tmp_path), FLAGS):
            pass
        with run_directory.open_locked(str(tmp_path), {**FLAGS, "max_epochs": 7}):
            pass
        assert not (tmp_path / "rounds.jsonl").exists()

    def test_a_second_process_is_refused(self, tmp_path):
        with (
            run_directory.open_locked(str(tmp_path), FLAGS),
            pytest.raises(dj.UserError, match="in use by another process"),
            run_directory.open_locked(str(tmp_path), FLAGS),
        ):
            pass
        with run_directory.open_locked(str(tmp_path), FLAGS):  # Given back.
            pass

    def test_a_round_that_is_missing(self, tmp_path):
        with run_directory.open_locked(str(tmp_path), FLAGS) as directory:
            for index in (0, 2):
                directory.append(toy.record("a", 0, index, 0.5))
        with (
            pytest.raises(dj.UserError, match="lacks a round of a, seed 0"),
            run_directory.open_locked(str(tmp_path), FLAGS),
        ):
            pass

    def test_records_of_unknown_making(self, tmp_path):
        dj.files.append(tmp_path / "rounds.jsonl", {"strategy": "a", "seed": 0})
        with (
            pytest.raises(dj.UserError, match=r"holds records, but no readable flags.json"),
            run_directory.open_locked(str(tmp_path), FLAGS),
        ):
            pass

    def test_directory_that_cannot_be_made(self, tmp_path):
        (tmp_path / "file").write_text("")
        with (
            pytest.raises(dj.UserError, match="cannot write to"),
            run_directory.open_locked(str(tmp_path / "file" / "run"), FLAGS),
        ):
            pass


@pytest.fixture(scope="module")
def expected(dataset, tmp_path_factory):
    """The records of a run that nothing interrupts."""
    _, rounds = TestPlay().play(tmp_path_factory.mktemp("whole"), dataset)
    return rounds


class TestPlay:
    def play(self, path, dataset, **fields):
        runs = [
            comparison.Run(name, experiment(dataset, name, **fields), {"flags": {}})
            for name in ("dynamical", "random")
        ]
        with run_directory.open_locked(str(path), FLAGS) as directory:
            failures = comparison.play(runs, directory, checkpoint_every=2)
        rounds = records.read(path / "rounds.jsonl")
        for record in rounds:
            del record["seconds"]
        return failures, rounds

    @pytest.mark.parametrize(
        ("at", "count"),
        [
            ("append", 3),
            ("save", 5),
            *(pytest.param("append", count, marks=pytest.mark.slow) for count in (1, 5)),
            *(pytest.param("save", count, marks=pytest.mark.slow) for count in (1, 3)),
        ],
    )
    def test_killed_before_or_after_a_record(
        self, dataset, expected, tmp_path, monkeypatch, at, count
    ):
        monkeypatch.setattr(playing, "WORTH_SAVING", 0)
        where = {"append": (run_directory.RunDirectory, "append"), "save": (Checkpoints, "save")}
        owner, name = where[at]
        original, calls = getattr(owner, name), []

        def killed(self, *arguments):
            calls.append(1)
            if len(calls) == count:
                raise Killed
            original(self, *arguments)

        monkeypatch.setattr(owner, name, killed)
        with pytest.raises(Killed):
            self.play(tmp_path / "killed", dataset)
        failures, rounds = self.play(tmp_path / "killed", dataset)
        assert failures == []
        assert rounds == expected
        assert not (tmp_path / "killed" / "checkpoints").exists()

    def test_checkpoints_of_an_earlier_life_are_removed(
        self, dataset, expected, tmp_path, monkeypatch
    ):
        stale = Checkpoints(tmp_path / "run" / "checkpoints" / "dynamical-seed-0")
        experiment_ = experiment(dataset)
        state = experiment_.init()
        stale.save(state._replace(round_index=2))
        flags = json.dumps(dj.files.finite(FLAGS))
        (tmp_path / "run" / run_directory.FLAGS_NAME).write_text(flags)
        append, calls = run_directory.RunDirectory.append, []

        def killed(self, record):
            calls.append(append(self, record))
            if len(calls) == 2:  # As many rounds are recorded as the stale state believes.
                raise Killed

        monkeypatch.setattr(run_directory.RunDirectory, "append", killed)
        with pytest.raises(Killed):
            self.play(tmp_path / "run", dataset)
        monkeypatch.setattr(run_directory.RunDirectory, "append", append)
        failures, rounds = self.play(tmp_path / "run", dataset)
        assert (failures, rounds) == ([], expected)

    def test_a_round_that_comes_out_differently(self, dataset, tmp_path):
        # As on another machine: what is recorded cannot be continued.
        self.play(tmp_path, dataset)
        rounds = records.read(tmp_path / "rounds.jsonl")
        (tmp_path / "rounds.jsonl").unlink()
        for record in rounds[:2]:
            dj.files.append(tmp_path / "rounds.jsonl", {**record, "test_loss": 7.0})
        failures, _ = self.play(tmp_path, dataset)
        (failure,) = failures
        assert "round 0 came out differently when it was played again (test_loss)" in failure


@pytest.mark.slow  # Above, runs that save are continued.
def test_saving_changes_nothing(dataset):
    experiment_ = experiment(dataset, evaluate_every=1)
    state, seen = experiment_.init(), []
    for expected in outcome(experiment_.run()):
        state, round_result = experiment_.step(
            state, save=lambda state: seen.append(state.underway)
        )
        assert outcome([round_result]) == [expected]
    assert [underway.epoch for underway in seen] == [1, 2, 3, 4, 5, 6] * 3
    assert set(seen[0].seconds) >= {"train", "evaluate"}
