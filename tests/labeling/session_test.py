"""A session without a server: what is handed out, what is kept, what a killed process leaves."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import toy
from PIL import Image

import dynamical_jax as dj
from dynamical_jax import labeling
from dynamical_jax.labeling import answers, choosing, standing, tables
from dynamical_jax.labeling.session import NewAnswer

CLASSES = ("dark", "bright", "grey")


def name(position):
    return f"{position:02d}.png"


def truth(path):
    return CLASSES[int(path[:2]) % 3]


@pytest.fixture
def photos(tmp_path):
    """Thirty images of three classes."""
    path = tmp_path / "photos"
    path.mkdir()
    generator = np.random.default_rng(0)
    for position in range(30):
        image = 100 * (position % 3) + generator.integers(0, 40, (6, 6))
        Image.fromarray(image.astype(np.uint8)).save(path / name(position))
    return path


@pytest.fixture
def settings(photos, tmp_path):
    return settings_of(photos, tmp_path)


def settings_of(photos, folder):
    training = dj.TrainingConfig(max_epochs=3, learning_rate=0.1)
    return choosing.Settings(
        str(photos),
        folder / "labels.csv",
        folder / "to_label.csv",
        dj.STRATEGIES["confidence"](),
        labeling.Config("linear", {}, training, 0),
        {"cache_dir": folder / "cache"},
        batch_size=6,
        audit_fraction=1 / 3,
        classes=CLASSES,
    )


def choose(folder, settings, is_open, report):
    """Takes the place of the model: the first images are wanted; of all, the truth is predicted."""
    report("choosing", 0.5)
    if len(folder.class_names) < 2:
        return choosing.choose(folder, settings, is_open, report)
    rows = np.setdiff1d(folder.readable, folder.labeled)
    predicted = {
        folder.paths[row]: tables.Proposed(folder.paths[row], truth(folder.paths[row]), 0.75, 1.0)
        for row in rows
    }
    chosen = [predicted[folder.paths[row]] for row in folder.unlabeled]
    chosen = [image for image in chosen if is_open(image.path)][: settings.batch_size]
    return choosing.Chosen(chosen[:-2], chosen[-2:], predicted, {})


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


def start(settings, chooser=choose, **options):
    return labeling.Session(settings, chooser, **options)


def label(sitting, client, count=1, of=truth):
    """Labels what is handed out, one after the other; returns what that was."""
    given = []
    for _ in range(count):
        sitting.wait()
        (offer,) = sitting.offers(client)
        sitting.answer(client, [NewAnswer(offer.id, "label", of(offer.path))])
        given.append(offer)
    return given


def on_disk(settings):
    return labeling.read_labels(settings.table, settings.images).by_path


def test_each_label_is_on_disk_before_the_next_picture(settings):
    with start(settings) as sitting:
        for number in range(1, 31):
            (offer,) = label(sitting, "me")
            assert on_disk(settings)[offer.path] == truth(offer.path)
            assert len(on_disk(settings)) == number
        sitting.wait()
        assert sitting.offers("me") == []
        assert sitting.status()["finished"]
    assert on_disk(settings) == {name(position): truth(name(position)) for position in range(30)}
    log = answers.Log(answers.beside(settings.table))
    assert [(one.path, one.label) for one in log.answers] == list(on_disk(settings).items())


def test_the_first_are_drawn_at_random_then_what_is_wanted_with_some_at_random(settings):
    with start(settings) as sitting:
        first = label(sitting, "me", 6)
        assert {offer.kind for offer in first} == {"random"}
        second = label(sitting, "me", 6)
        assert sorted(offer.kind for offer in second) == ["audit"] * 2 + ["query"] * 4
        assert {offer.predicted for offer in second} <= set(CLASSES)
        batch = sitting.log.batches[-1]
        assert {o.path for o in second if o.kind == "audit"} == set(batch.audit)
        assert batch.num_labeled == 6


def test_random_images_while_the_next_batch_is_chosen_and_no_query_is_withdrawn(settings):
    begin, go_on = threading.Event(), threading.Event()

    def slow(folder, *rest):
        if len(folder.labels) >= 6:
            rest[-1]("choosing", None)
            begin.set()
            assert go_on.wait(10)
        return choose(folder, *rest)

    with start(settings, slow) as sitting:
        label(sitting, "me", 5)
        (last,) = sitting.offers("me")
        sitting.answer("me", [NewAnswer(last.id, "label", truth(last.path))])
        assert begin.wait(10)
        shown = sitting.offers("me", 9)
        assert [offer.kind for offer in shown] == ["random"] * 3
        assert sitting.status()["doing"] == "choosing"
        go_on.set()
        sitting.wait()
        # What was shown comes first, and is not asked for a second time by the new batch.
        after = sitting.offers("me", 9)
        assert after[:3] == [
            offer._replace(predicted=truth(offer.path), confidence=0.75) for offer in shown
        ]
        assert len({offer.path for offer in after}) == len(after) == 9
        assert {offer.kind for offer in after[3:]} == {"query", "audit"}


def test_what_the_log_tells_of_the_model_before_it_learned(settings):
    wrong = lambda path: "grey" if path == name(3) else truth(path)
    with start(settings) as sitting:
        label(sitting, "me", 18, wrong)
        labels = on_disk(settings)
        found = standing.points(sitting.log.answers, sitting.log.batches, labels)
        assert len(found) == 12  # The first six were labeled before there was a model.
        assert sum(not point.right for point in found) == (name(3) in list(labels)[6:])
        assert {(p.round, p.num_labeled) for p in found} == {(2, 6), (3, 12)}
        progress = sitting.progress()
        json.dumps(progress, allow_nan=False)
        assert [part["random"]["total"] for part in progress["rounds"]] == [2, 2]
        assert [part["query"]["total"] for part in progress["rounds"]] == [4, 4]
        assert progress["now"]["total"] == 4


def test_undo_goes_back_step_by_step_and_across_sittings(settings):
    with start(settings) as sitting:
        one, two, three = label(sitting, "me", 3)
        assert [offer.path for offer in sitting.undo("me")] == [three.path]
        assert three.path not in on_disk(settings)
        assert sitting.offers("me")[0].path == three.path
        sitting.answer("me", [NewAnswer(one.id, "label", "grey")])
        assert on_disk(settings)[one.path] == "grey"
        assert sitting.undo("other") == []
    with start(settings) as sitting:
        assert sitting.undo("me")[0].label == truth(one.path)
        assert on_disk(settings)[one.path] == truth(one.path)
        assert [offer.path for offer in sitting.undo("me")] == [two.path]
        assert list(on_disk(settings)) == [one.path]
        assert [offer.path for offer in sitting.undo("me")] == [one.path]
        assert sitting.undo("me") == []
        assert on_disk(settings) == {}


def test_a_grid_is_taken_back_as_a_whole(settings):
    with start(settings) as sitting:
        assert sitting.grid("me") == []  # There is no model.
        label(sitting, "me", 6)
        sitting.wait()
        shown = sitting.grid("me", count=4)
        assert len({offer.predicted for offer in shown}) == 1
        assert not {o.path for o in sitting.grid("you", shown[0].predicted)} & {
            offer.path for offer in shown
        }
        sitting.answer("me", [NewAnswer(offer.id, "label", offer.predicted) for offer in shown])
        assert len(on_disk(settings)) == 10
        assert len(sitting.undo("me")) == 4
        assert len(on_disk(settings)) == 6


def test_skipped_and_broken(settings):
    with start(settings) as sitting:
        sitting.wait()
        skipped, broken = sitting.offers("me", 2)
        sitting.answer("me", [NewAnswer(skipped.id, "skip")])
        sitting.answer("me", [NewAnswer(broken.id, "broken")])
        given = label(sitting, "me", 20)
        assert not {skipped.path, broken.path} & {offer.path for offer in given}
        assert not {skipped.path, broken.path} & set(on_disk(settings))
        (offer,) = sitting.offers("me")
        sitting.answer("me", [NewAnswer(offer.id, "broken")])
        assert [offer.path for offer in sitting.undo("me")] == [offer.path]
        assert sitting.status()["aside"] == 2
    # Those of no class stay aside; who skipped an image may know better the next time.
    with start(settings) as sitting:
        sitting.wait()
        assert sitting.status()["aside"] == 1
        given = label(sitting, "me", 9)
        assert skipped.path in {offer.path for offer in given}
        sitting.answer("me", [NewAnswer(broken.id, "label", "grey")])
        assert on_disk(settings)[broken.path] == "grey"


def test_two_people(settings):
    clock = Clock()
    with start(settings, clock=clock) as sitting:
        sitting.wait()
        mine, yours = sitting.offers("me", 4), sitting.offers("you", 4)
        assert len(mine) == 4
        assert yours
        assert not {offer.path for offer in mine} & {offer.path for offer in yours}
        clock.now += 59
        assert not {offer.path for offer in mine} & {o.path for o in sitting.offers("third", 4)}
        clock.now += 2
        late = sitting.offers("third", 6)
        assert mine[0].path in {offer.path for offer in late}
        sitting.answer("me", [NewAnswer(mine[0].id, "label", "dark")], "Anna")
        (conflict,) = sitting.answer("third", [NewAnswer(mine[0].id, "label", "grey")], "Ben")
        assert conflict == (mine[0].path, "grey", "dark", "Anna")
        assert on_disk(settings) == {mine[0].path: "grey"}
        both = [(one.who, one.label) for one in sitting.log.answers]
        assert both == [("Anna", "dark"), ("Ben", "grey")]
        # It is not Anna's any more: her undo leaves it as it is.
        assert sitting.undo("me") == []
        assert on_disk(settings) == {mine[0].path: "grey"}


def test_many_threads_lose_nothing(settings):
    with start(settings) as sitting:

        def work(client):
            while offers := sitting.offers(client, 3):
                sitting.answer(client, [NewAnswer(offers[0].id, "label", truth(offers[0].path))])

        threads = [threading.Thread(target=work, args=(f"c{i}",)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        sitting.wait()
    labels = on_disk(settings)
    assert labels == {path: truth(path) for path in labels}
    given = [one.path for one in sitting.log.answers]
    assert sorted(given) == sorted(labels)
    assert len(labels) == 30


def test_classes_are_added_and_kept(settings):
    settings = settings._replace(classes=())
    with start(settings) as sitting:
        assert sitting.class_names == []
        assert sitting.add_class(" owl ") == "owl"
        assert sitting.add_class("owl") == "owl"
        sitting.wait()
        (offer,) = sitting.offers("me")
        with pytest.raises(dj.UserError, match="there is no class 'cat': add it first"):
            sitting.answer("me", [NewAnswer(offer.id, "label", "cat")])
        for bad in ("", "  ", "a\nb", "x" * 101, "a\x00"):
            with pytest.raises(dj.UserError, match="class"):
                sitting.add_class(bad)
        with pytest.raises(dj.UserError, match="there is no such image"):
            sitting.answer("me", [NewAnswer("../../etc/passwd", "label", "owl")])
    assert on_disk(settings) == {}
    with start(settings._replace(classes=("ant",))) as sitting:
        assert sitting.class_names == ["owl", "ant"]
    # Nor does a label that another program gave move the keys.
    labeling.add_labels(settings.table, {name(0): "aardvark"})
    with start(settings) as sitting:
        assert sitting.class_names == ["owl", "ant", "aardvark"]
    with start(settings._replace(classes=("bee",))) as sitting:
        assert sitting.class_names == ["owl", "ant", "aardvark", "bee"]


def test_what_goes_wrong_is_said_and_labeling_goes_on(settings):
    def diverges(folder, *rest):
        if len(folder.labels) == 6:
            raise dj.errors.DivergedError("training diverged")
        return choose(folder, *rest)

    with start(settings, diverges) as sitting:
        label(sitting, "me", 6)
        sitting.wait()
        assert sitting.status()["error"] == "training diverged"
        assert {offer.kind for offer in label(sitting, "me", 6)} == {"random"}
        sitting.wait()
        assert sitting.status()["error"] == ""
        assert {offer.kind for offer in label(sitting, "me", 6)} == {"query", "audit"}


def test_what_others_write_into_the_table_counts(settings):
    with start(settings) as sitting:
        label(sitting, "me", 2)
        text = settings.table.read_text()
        free = next(name(i) for i in range(30) if name(i) not in text)
        settings.table.write_text(f"{text}{free},yeti\n")
        label(sitting, "me", 4)
        sitting.wait()
        assert on_disk(settings)[free] == sitting.labels[free] == "yeti"
        assert sitting.class_names == [*CLASSES, "yeti"]
        assert free not in {offer.path for offer in sitting.offers("me", 9)}


# The model.


def test_the_batch_is_what_select_would_ask_for(settings, photos):
    """By the model that select would have trained, of which it then trains no other."""
    settings = settings._replace(audit_fraction=0.0)
    labels = {name(i): truth(name(i)) for i in range(5)}
    labeling.add_labels(settings.table, labels)
    with start(settings, choosing.choose) as sitting:
        sitting.wait()
        offered = sitting.offers("me", 9)
    folder = labeling.folder.decode(
        str(photos), labeling.folder.find(str(photos), photos / "x.png"), labels,
        **settings.reading,
    )  # fmt: skip
    kept = labeling.learner.warm_start(folder, settings.config, settings.store)
    assert kept.fit is not None
    other = dj.store.Store(settings.table.with_name("other"))
    own = labeling.learner.warm_start(folder, settings.config, other)
    own, _ = labeling.learner.train(own, folder, settings.config, other)
    want = labeling.proposal.choose(settings.strategy, folder, own, 6, 0)
    assert [offer.path for offer in offered] == [image.path for image in want]
    assert [offer.confidence for offer in offered] == [image.confidence for image in want]
    # And the table of images to label is that of select, in which a person may go on.
    assert [image.path for image in tables.read_proposal(settings.output, str(photos))] == [
        image.path for image in want
    ]


@pytest.mark.slow  # 3 s: 40 seeds; standing_test.py has the sample.
def test_what_is_drawn_at_random_is_drawn_from_all_and_asked_for_once(settings, photos):
    """Over many seeds the strategy's own favourite is among them as often as chance has it."""
    labels = {name(i): truth(name(i)) for i in range(6)}
    folder = labeling.folder.decode(
        str(photos), labeling.folder.find(str(photos), photos / "x.png"), labels,
        **settings.reading,
    )  # fmt: skip
    drawn = 0
    for seed in range(40):
        seeded = settings._replace(config=settings.config._replace(seed=seed))
        chosen = choosing.choose(folder, seeded, lambda path: path != name(29), lambda *_: None)
        audit, query = ({image.path for image in part} for part in (chosen.audit, chosen.query))
        assert (len(audit), len(query)) == (2, 4)
        assert not audit & query
        assert name(29) not in audit | query | set(labels)
        least = sorted(chosen.predictions.values(), key=lambda image: image.confidence)
        favourite = [image.path for image in least if image.path != name(29)][:4]
        drawn += len(audit & set(favourite))
    # 14 are expected. Of what the strategy leaves over there would be none.
    assert 3 <= drawn <= 30


def test_an_unfinished_batch_goes_on_with_what_the_model_took_it_for(settings):
    labeling.add_labels(settings.table, {name(i): truth(name(i)) for i in range(5)})
    with start(settings, choosing.choose) as sitting:
        before = label(sitting, "me", 2)
        left = sitting.offers("me", 9)
    # Of what is left, a person fills in one in a spreadsheet.
    text = settings.output.read_text()
    settings.output.write_text(text.replace(f"{left[0].path},,", f"{left[0].path},dark,"))
    with start(settings, choosing.choose) as sitting:
        sitting.wait()
        assert sitting.num_taken_over == 1
        assert sitting.labels[left[0].path] == "dark"
        assert [o.path for o in sitting.offers("me", 9)] == [o.path for o in left[1:]]
        assert [o.kind for o in sitting.offers("me", 9)] == [o.kind for o in left[1:]]
        assert sitting.status()["has_model"]
        assert len(sitting.predictions()) == 30 - 8
        assert len(sitting.log.batches) == 1
        # It may be labeled otherwise now, and the next sitting is not told two things.
        offer = before[0]._replace(id=left[0].id)
        sitting.answer("me", [NewAnswer(offer.id, "label", "grey")])
    with start(settings, choosing.choose) as sitting:
        assert sitting.labels[left[0].path] == "grey"


def test_a_second_look_finds_what_is_wrong(settings, tmp_path):
    training = dj.TrainingConfig(max_epochs=60, learning_rate=0.1)
    settings = settings._replace(config=settings.config._replace(training=training))
    labels = {name(i): truth(name(i)) for i in range(24)} | {name(3): "grey"}
    labeling.add_labels(settings.table, labels)
    with start(settings) as sitting:
        assert sitting.progress()["suspects"] is None
        sitting.review()
        sitting.wait()
        assert sitting.status()["error"] == ""
        (suspect, *_) = sitting.progress()["suspects"]
        assert (suspect["path"], suspect["label"], suspect["predicted"]) == (
            name(3), "grey", "dark",
        )  # fmt: skip
        sitting.answer("me", [NewAnswer(suspect["id"], "label", "dark")])
        assert name(3) not in {one["path"] for one in sitting.progress()["suspects"]}


def test_the_grid_shows_no_picture_that_the_statistics_need_unseen(settings):
    with start(settings) as sitting:
        label(sitting, "me", 6)
        sitting.wait()
        batch = sitting.log.batches[-1]
        assert batch.audit
        shown = [offer for kind in CLASSES for offer in sitting.grid("you", kind)]
        assert {offer.kind for offer in shown} == {"grid"}
        assert not {offer.path for offer in shown} & {*batch.audit, *batch.query}


def test_copies_of_what_is_labeled_are_not_asked_for(settings, photos):
    for position in range(9):  # Each of them is the first of two with the same pixels.
        shutil.copy(photos / name(position), photos / f"z{name(position)}")
    labeling.add_labels(settings.table, {f"z{name(i)}": truth(name(i)) for i in range(9)})
    copies = {name(i) for i in range(9)} | {f"z{name(i)}" for i in range(9)}
    of = lambda path: truth(path.removeprefix("z"))

    def choose(folder, settings, is_open, report):
        predicted = {path: tables.Proposed(path, of(path), 0.75) for path in folder.paths}
        return choosing.Chosen([], [], predicted, {})

    with start(settings, choose) as sitting:
        sitting.wait()
        asked = {offer.path for kind in CLASSES for offer in sitting.grid("me", kind)}
        sitting.wait()
        asked |= {offer.path for offer in label(sitting, "me", 21, of)}
        assert asked == {name(i) for i in range(9, 30)}
        assert not asked & copies


def test_a_round_without_new_labels_is_no_agreement(settings):
    with start(settings) as sitting:
        label(sitting, "me", 12)
        sitting.wait()
        agreed = [batch.kappa for batch in sitting.log.batches]
        for _ in range(6):
            sitting.wait()
            (offer,) = sitting.offers("me")
            sitting.answer("me", [NewAnswer(offer.id, "skip")])
        sitting.wait()
        *before, last = sitting.log.batches
        assert len(before) == len(agreed)
        assert last.num_labeled == before[-1].num_labeled
        assert last.kappa is None


def test_a_killed_process_loses_nothing(settings, photos):
    """A process that labels as fast as it can and says what it has done is killed at any moment."""
    command = [sys.executable, __file__, str(photos), str(photos.parent)]
    environment = {**os.environ, "PYTHONPATH": f"{toy.ROOT}{os.pathsep}{toy.ROOT / 'tests'}"}
    told = {}
    for kill_after in (4, 1):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(kill_after):
            path = process.stdout.readline().strip()
            assert path not in told
            told[path] = truth(path)
        os.kill(process.pid, signal.SIGKILL)
        rest = process.communicate()[0].split()
        told |= {path: truth(path) for path in rest}
        labels = on_disk(settings)
        # One may have been on disk, and not told yet.
        assert told.items() <= labels.items()
        assert len(labels) <= len(told) + 1
        told = labels
    with start(settings) as sitting:
        assert sitting.labels == told
        # A label is in the table first: each of the two kills may have kept one from the log.
        assert len(told.keys() - {one.path for one in sitting.log.answers}) <= 2


def test_a_torn_line_of_the_log_is_dropped(settings):
    with start(settings) as sitting:
        label(sitting, "me", 2)
    path = answers.beside(settings.table)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"answer": {"path": "05.p')
    log = answers.Log(path)
    assert len(log.answers) == 2
    assert path.read_bytes() == whole
    for spoiled in (b"{\n", b'{"answer": {"path": "a"}}\n', b"3\n"):
        path.write_bytes(whole + spoiled)
        with pytest.raises(dj.UserError, match=r"line \d+ of .* cannot be used"):
            answers.Log(path)


def label_until_killed(photos, folder):
    """What the process that is killed does."""
    with start(settings_of(photos, folder)) as sitting:
        while given := label(sitting, "me"):
            print(given[0].path, flush=True)


if __name__ == "__main__":
    label_until_killed(*map(pathlib.Path, sys.argv[1:]))
