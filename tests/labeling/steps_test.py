"""The steps of a round by hand: folder, learner, proposal."""

import jax
import numpy as np
import pytest
from PIL import Image

import dynamical_jax as dj
from dynamical_jax import labeling

CLASSES = ("dark", "bright", "grey")


@pytest.fixture
def photos(tmp_path):
    """Twelve images of three classes, the last of which has a copy."""
    path = tmp_path / "photos"
    path.mkdir()
    generator = np.random.default_rng(0)
    for position in range(12):
        image = 100 * (position % 3) + generator.integers(0, 40, (6, 6))
        Image.fromarray(image.astype(np.uint8)).save(path / f"{position:02d}.png")
    (path / "copy.png").write_bytes((path / "11.png").read_bytes())
    return path


def read(photos, labels, cache_dir, size=None):
    paths = labeling.folder.find(str(photos), photos / "sheet.png")
    return labeling.folder.decode(str(photos), paths, labels, cache_dir=cache_dir, size=size)


def config(**fields):
    training = dj.TrainingConfig(max_epochs=3, learning_rate=0.1)
    return labeling.Config("linear", {}, training, 0)._replace(**fields)


def label(*positions):
    return {f"{position:02d}.png": CLASSES[position % 3] for position in positions}


def test_the_next_round_goes_on_from_where_this_one_ended(photos, tmp_path):
    folder = read(photos, label(0, 1, 3, 4), tmp_path)
    store = dj.store.Store(tmp_path / "checkpoint")
    start = labeling.learner.warm_start(folder, config(), store)
    assert (start.round_index, start.fit) == (0, None)
    learner, fit = labeling.learner.train(start, folder, config(), store)
    again = labeling.learner.warm_start(folder, config(), store)
    assert (again.round_index, again.fit) == (1, fit)
    jax.tree.map(np.testing.assert_array_equal, again.learner.variables, learner.variables)
    # More labels of the same classes: the same weights, but they have to be trained on.
    folder = read(photos, label(0, 1, 3, 4, 6), tmp_path)
    more = labeling.learner.warm_start(folder, config(), store)
    assert (more.fit, more.difference, more.new_classes) == (None, "", ())
    jax.tree.map(np.testing.assert_array_equal, more.learner.variables, learner.variables)


def test_a_new_class_leaves_the_logits_of_the_others(photos, tmp_path):
    folder = read(photos, label(0, 2), tmp_path)
    store = dj.store.Store(tmp_path / "checkpoint")
    start = labeling.learner.warm_start(folder, config(), store)
    learner, _ = labeling.learner.train(start, folder, config(), store)
    # The new one sorts first, and comes last.
    assert learner.class_names == ["dark", "grey"]
    folder = read(photos, label(1, 0, 2), tmp_path)
    grown = labeling.learner.warm_start(folder, config(), store)
    assert grown.new_classes == ("bright",)
    assert grown.learner.class_names == ["dark", "grey", "bright"]
    x = folder.x[:]
    known = learner.model.apply(learner.variables, x).logits
    logits = grown.learner.model.apply(grown.learner.variables, x).logits
    np.testing.assert_array_equal(logits[:, :2], known)
    np.testing.assert_array_equal(grown.learner.targets(folder), [2, 0, 1])


def test_another_kind_of_model_starts_anew_and_says_what_was(photos, tmp_path):
    folder = read(photos, label(0, 1), tmp_path)
    said = []
    store = dj.store.Store(tmp_path / "checkpoint", said.append)
    start = labeling.learner.warm_start(folder, config(), store)
    labeling.learner.train(start, folder, config(), store)
    assert said == []
    smaller = read(photos, label(0, 1), tmp_path, size=3)
    anew = labeling.learner.warm_start(smaller, config(), store)
    assert anew.difference == (
        "the earlier rounds had images of 6×6×1, and this one has images of 3×3×1"
    )
    assert (anew.round_index, anew.fit) == (1, None)
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(anew.learner.variables))
    labeling.learner.train(anew, smaller, config(), store)
    assert said == [f"the model is trained from the start: {anew.difference}"]


def network(path, checksum):
    preprocessing = dj.models.weights.Preprocessing(8, (0.5,), (0.5,), "bilinear")
    return labeling.learner.Network(path, checksum, {}, preprocessing, 8)


NEITHER = "neither --weights nor --features"
IMAGES = ({"model": "cnn", "image_size": [8, 8, 3]}, {})
VECTORS = ({"model": "linear", "features": "5"}, {"features": "/f.npz"})
MOVED = ({"model": "mlp", "features": "5"}, {"features": "/moved.npz"})
EMBEDDED = ({"model": "linear", "features": "9"}, {"network": network("/w.npz", 1)})
ELSEWHERE = ({"model": "mlp", "features": "9"}, {"network": network("/moved.npz", 1)})
OTHERS = ({"model": "linear", "features": "7"}, {"network": network("/w.npz", 1)})
TRAINED = ({"model": "vit_ti", "weights": "1"}, {"network": network("/w.npz", 1)})


@pytest.mark.parametrize(
    ("former", "now", "expected"),
    [
        (EMBEDDED, IMAGES, f"had --weights=/w.npz, and this one has {NEITHER}; give that again"),
        (VECTORS, IMAGES, f"had --features=/f.npz, and this one has {NEITHER}; give that again if"),
        (IMAGES, VECTORS, f"had {NEITHER}, and this one has --features=/f.npz; give neither again"),
        (VECTORS, EMBEDDED, "had --features=/f.npz, and this one has --weights=/w.npz; give that"),
        (TRAINED, EMBEDDED, "had --weights=/w.npz --train=all, and this one has --weights=/w.npz;"),
        ((VECTORS[0], {}), IMAGES, "had --features=…, and this one has neither"),  # As once kept.
        (VECTORS, MOVED, "had --model=linear, and this one has --model=mlp"),
        (EMBEDDED, ELSEWHERE, "had --model=linear, and this one has --model=mlp"),
        (EMBEDDED, OTHERS, "--weights=/w.npz gives other vectors than in the earlier rounds"),
    ],
)
def test_what_differs_is_said_in_flags_that_people_give(former, now, expected):
    (theirs, kept), (ours, has) = former, now
    facts = {"epochs": 1, "train_accuracy": 1.0}
    before = labeling.learner.Description(
        theirs, ["a", "b"], [0.0], [1.0], 0, 0, facts, kept.get("network"), kept.get("features")
    )
    told = labeling.learner.describe_difference(before, ours, config()._replace(**has))
    assert expected in told


def test_the_least_confident_are_asked_for_and_copies_are_not(photos, tmp_path):
    folder = read(photos, label(0, 1, 2), tmp_path)
    assert folder.num_copies == 1
    start = labeling.learner.warm_start(folder, config(), dj.store.Store(tmp_path / "c"))
    learner, _ = labeling.learner.train(start, folder, config(), dj.store.Store(tmp_path / "c"))
    strategy = dj.STRATEGIES["confidence"]()
    chosen = labeling.proposal.choose(strategy, folder, learner, 5, seed=0)
    every = labeling.proposal.predict(folder, learner, folder.unlabeled)
    least = sorted(every, key=lambda image: image.confidence)[:5]
    assert [image._replace(score=None) for image in chosen] == least
    assert len(labeling.proposal.choose(strategy, folder, learner, 99, seed=0)) == 9
    drawn = labeling.proposal.draw(folder, 99, seed=0)
    unlabeled = {folder.paths[row] for row in folder.unlabeled}
    assert {image.path for image in drawn} == unlabeled
    assert len({"11.png", "copy.png"} & unlabeled) == 1
    assert not unlabeled & set(folder.labels)


@pytest.mark.parametrize(
    ("filled", "message"),
    [
        ("path,label\n00.png,bright\n", "labels 00.png 'bright', but it is labeled 'dark'"),
        ("path,label\n05.png,grey\n99.png,dark\n", "1 labeled image is not in"),
    ],
)
def test_nothing_is_taken_over_of_a_proposal_that_cannot_be(photos, tmp_path, filled, message):
    table, proposal = tmp_path / "labels.csv", tmp_path / "to_label.csv"
    labeling.add_labels(table, label(0, 1))
    before = table.read_bytes()
    proposal.write_text(filled)
    paths = labeling.folder.find(str(photos), proposal)
    with pytest.raises(dj.UserError, match=message):
        labeling.folder.take_over(table, proposal, str(photos), paths)
    assert table.read_bytes() == before


def test_no_label_is_judged_by_a_model_that_has_seen_a_copy_of_it(photos, tmp_path, monkeypatch):
    for position in range(8):
        copy = photos / f"z{position:02d}.png"
        copy.write_bytes((photos / f"{position:02d}.png").read_bytes())
    names = {path.name: CLASSES[int(path.stem[-2:]) % 3] for path in sorted(photos.glob("*0*.png"))}
    folder = read(photos, names, tmp_path)
    judged = []

    def predict(part, model, rows):
        assert not set(folder.first[rows]) & set(folder.first[part.labeled])
        judged.extend(folder.paths[row] for row in rows)
        return [labeling.Proposed(folder.paths[row], "grey", 0.5) for row in rows]

    monkeypatch.setattr(labeling.proposal, "predict", predict)
    monkeypatch.setattr(labeling.learner, "fit_labels", lambda *_: (None, None))
    found = labeling.review.suspects(folder, config())
    assert sorted(judged) == sorted(names)
    assert {one.path for one in found} == {p for p, label in names.items() if label != "grey"}


def test_a_batch_has_one_of_near_copies(photos, tmp_path):
    folder = read(photos, label(0, 1), tmp_path)
    assert (folder.num_near, folder.copies) == (0, [("copy.png", "11.png")])
    # 0 to 3 are nearly the same, and so are 8, 9 and (by its copy) the last.
    near = np.array([0, 0, 0, 0, 4, 5, 6, 7, 8, 8, 10, 8, 8])
    folder = folder._replace(near=near)
    assert folder.num_near == 5
    assert labeling.folder.apart(folder).unlabeled.tolist() == [2, 4, 5, 6, 7, 8, 10]
    assert labeling.folder.apart(folder, [9, 7]).unlabeled.tolist() == [2, 4, 5, 6, 10]
    drawn = labeling.proposal.draw(folder, 12, 0)
    assert sorted(near[int(image.path[:2])] for image in drawn) == [0, 4, 5, 6, 7, 8, 10]


def test_near_copies_are_found_among_the_images(tmp_path):
    generator, photos = np.random.default_rng(0), tmp_path / "photos"
    photos.mkdir()
    for position in range(3):
        coarse = Image.fromarray(generator.integers(0, 255, (6, 6, 3), dtype=np.uint8))
        whole = coarse.resize((48, 48), Image.Resampling.BICUBIC)
        whole.save(photos / f"{position}.png")
        whole.save(photos / f"{position}.jpg", quality=70)
    paths = labeling.folder.find(str(photos), photos / "sheet.png")
    pictures = labeling.folder.read(str(photos), paths, near=3, cache_dir=tmp_path)
    assert paths[::2] == [f"{position}.jpg" for position in range(3)]
    assert pictures.near.tolist() == [0, 0, 2, 2, 4, 4]
    pictures = labeling.folder.read(str(photos), paths, cache_dir=tmp_path)
    assert pictures.near.tolist() == list(range(6))


def test_paths_are_relative_however_the_folder_is_written(photos, tmp_path, monkeypatch):
    (photos / "deep").mkdir()
    (photos / "01.png").rename(photos / "deep" / "01.png")
    (photos / "02.png").rename(photos / "deep" / "sheet.png")
    monkeypatch.chdir(tmp_path)
    sheet = photos / "sheet.png"
    (photos / "00.png").rename(sheet)
    expected = ["03.png", "04.png", "deep/01.png", "deep/sheet.png"]
    for folder in ("photos", "photos/", "./photos", str(photos), "photos/../photos//"):
        found = labeling.folder.find(folder, sheet)
        assert [path for path in found if path in expected or "sheet" in path] == expected
        assert all((photos / path).is_file() for path in found)
    monkeypatch.chdir(photos)
    assert "deep/01.png" in labeling.folder.find(".", sheet)


def test_what_a_killed_process_left_is_removed(photos, tmp_path):
    table, other = tmp_path / "labels.csv", tmp_path / "labels.csv.backup"
    labeling.add_labels(table, label(0))
    for name in ("labels.csv.123.partial", "other.csv.5.partial"):
        (tmp_path / name).write_text("path,la")
    other.write_text("mine")
    paths = labeling.folder.find(str(photos), tmp_path / "sheet.png")
    labeling.folder.take_over(table, tmp_path / "to_label.csv", str(photos), paths)
    left = {path.name for path in tmp_path.iterdir()}
    assert {"labels.csv", "labels.csv.backup", "other.csv.5.partial"} <= left
    assert "labels.csv.123.partial" not in left
