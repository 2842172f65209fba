"""A frozen network is a pool of vectors: the same Δ, the same NTK, and embedded only once."""

import dataclasses
import os
import time

import filelock
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_weights
import toy
from PIL import Image

import dynamical_jax as dj
from dynamical_jax import embedding

pytest.importorskip("safetensors", reason="needs the extra weights")

WIDTH, NUM_CLASSES = 192, 3


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    return dj.models.weights.load(tiny_weights.save(path, tiny_weights.vit(num_classes=7)))


@pytest.fixture(scope="module")
def network(weights):
    """The whole network, its variables, and images."""
    x = toy.images(40)[..., :1]
    model = dj.models.pretrained(weights, NUM_CLASSES)
    return model, dj.models.init(model, jax.random.key(0), x), x


@pytest.fixture(scope="module")
def vectors(network):
    model, variables, x = network
    return np.asarray(jax.jit(model.apply)(variables, x).embedding)


class TestEmbed:
    def test_it_is_what_the_network_gives(self, weights, network, vectors, tmp_path):
        embedded = embedding.embed(weights, network[2], tmp_path)
        assert (embedded.shape, embedded.dtype) == ((40, WIDTH), np.float32)
        np.testing.assert_allclose(embedded[:], vectors, atol=1e-5)
        smaller = embedding.embed(weights, network[2], tmp_path, image_size=4)
        assert np.abs(smaller[:] - embedded[:]).max() > 0.1
        np.testing.assert_array_equal(
            embedding.embed(weights, network[2], tmp_path)[:], embedded[:]
        )

    def test_before_the_first_vector_there_are_none(self, tmp_path):
        store = embedding._Store(tmp_path / "empty", 3, filelock.FileLock(tmp_path / "lock"))
        assert store[np.array([], int)].shape == (0, 3)

    @pytest.fixture
    def seen(self, monkeypatch):
        """The images that went through the network."""
        embed, seen = embedding._vectors, []

        def watched(model, variables, x):
            seen.extend(x)
            return embed(model, variables, x)

        monkeypatch.setattr(embedding, "_vectors", watched)
        return seen

    def test_only_what_is_new_goes_through_the_network(self, weights, network, tmp_path, seen):
        x = network[2]
        first = embedding.embed(weights, x[:20], tmp_path)[:]
        order = np.random.default_rng(0).permutation(30)
        both = embedding.embed(weights, x[np.append(order, order[:5])], tmp_path)[:]
        assert len(seen) == 30
        np.testing.assert_array_equal(seen[20:], x[order[order >= 20]])
        back = np.argsort(order)
        np.testing.assert_array_equal(both[back][:20], first)
        np.testing.assert_array_equal(both[30:], both[:5])
        moved = dataclasses.replace(weights, path="elsewhere")
        np.testing.assert_array_equal(embedding.embed(moved, x[:20], tmp_path)[:], first)
        assert len(seen) == 30
        apart = embedding.embed(weights, x[:30], tmp_path / "other")[:]
        np.testing.assert_allclose(both[back], apart, atol=1e-5)

    def test_an_interruption_loses_one_block(self, weights, network, tmp_path, monkeypatch):
        monkeypatch.setattr(embedding, "BATCH_SIZE", 8)
        whole = embedding.embed(weights, network[2], tmp_path / "whole")[:]
        embed, done = embedding._vectors, []

        def killed(*arguments):
            done.append(len(arguments[2]))
            if len(done) == 3:
                raise KeyboardInterrupt
            return embed(*arguments)

        monkeypatch.setattr(embedding, "_vectors", killed)
        with pytest.raises(KeyboardInterrupt):
            embedding.embed(weights, network[2], tmp_path)
        for written in (*tmp_path.glob("*.vectors"), *tmp_path.glob("*.keys")):
            with written.open("ab") as file:
                file.write(b"half a row")
        again = embedding.embed(weights, network[2], tmp_path)[:]
        assert done[3:] == [8, 8, 8]
        np.testing.assert_array_equal(again, whole)
        (written,) = tmp_path.glob("*.vectors")  # Of which a power failure may lose more.
        with written.open("r+b") as file:
            file.truncate(written.stat().st_size - 1)
        again = embedding.embed(weights, network[2], tmp_path)[:]
        assert done[6:] == [1]
        np.testing.assert_allclose(again, whole, atol=1e-5)

    def test_files_alike_in_all_but_their_folder(self, weights, tmp_path, seen):
        paths = []
        for value, folder in ((0, "one"), (200, "other")):
            path = tmp_path / folder / "1.bmp"
            path.parent.mkdir()
            Image.fromarray(np.full((8, 8), value, np.uint8)).save(path)
            os.utime(path, (0, 0))
            paths.append(str(path))
        embedded = [embedding.embed_files(weights, [path], tmp_path)[0][:] for path in paths]
        assert np.abs(embedded[0] - embedded[1]).max() > 0.1
        both, rows = embedding.embed_files(weights, paths, tmp_path)  # In another common folder.
        np.testing.assert_array_equal(rows, [0, 1])
        np.testing.assert_array_equal(both[:], np.concatenate(embedded))
        assert len(seen) == 2

    def test_what_was_not_used_for_a_month_is_removed(self, weights, network, tmp_path):
        vectors = embedding.embed(weights, network[2][:8], tmp_path)[:]
        (used,) = tmp_path.glob("*.vectors")
        others = [tmp_path / f"embeddings-{name}.vectors" for name in ("old", "new")]
        for path, age in zip((used, *others), (31, 31, 29), strict=True):
            for file in (path, path.with_suffix(".keys")):
                file.touch()
                os.utime(file, (time.time() - 24 * 3600 * age,) * 2)
        again = embedding.embed(weights, network[2][:8], tmp_path)[:]
        np.testing.assert_array_equal(again, vectors)
        kept = {path.name for path in tmp_path.iterdir() if path.suffix in (".vectors", ".keys")}
        expected = {used, others[1]} | {p.with_suffix(".keys") for p in (used, others[1])}
        assert kept == {path.name for path in expected}
        assert time.time() - used.stat().st_mtime < 3600

    @pytest.mark.parametrize(
        "x", [np.zeros((4, 5), np.float32), toy.images(4), toy.images(4)[..., :1] / 255]
    )
    def test_images_that_a_network_does_not_take(self, weights, tmp_path, x):
        with pytest.raises(dj.UserError, match=r"takes images \[n, h, w, 1 or 3\] of uint8"):
            embedding.embed(weights, x, tmp_path)


def head_logits(head, vectors):
    """What the model of vectors computes, written down."""
    mean, std = vectors.mean(0), np.sqrt(vectors.var(0).mean())
    h = (vectors - mean[None]) / std
    return h @ head["kernel"] + head["bias"][None]


class TestFrozenBackbone:
    """θ is the last layer alone: what the network below it has of parameters does not count."""

    @pytest.fixture
    def fitted(self, vectors):
        y = np.arange(40) % NUM_CLASSES
        data = dj.Dataset(
            "own", dj.Examples(vectors, y), dj.Examples(vectors[:3], y[:3]), ("a", "b", "c")
        )
        model = dj.models.create("linear", data)
        labeled = dj.Examples(vectors[:10], y[:10])
        start = dj.models.init(model, jax.random.key(0), vectors)
        config = dj.TrainingConfig(max_epochs=5, learning_rate=1e-2)
        return model, start, dj.training.fit(model, start, labeled, config, 0).variables, labeled

    def test_change_of_training_dynamics(self, network, vectors, fitted):
        whole, frozen, x = network
        model, _, variables, labeled = fitted
        head = variables["params"]["model"]["fc"]

        @jax.jit
        def by_hand(head):
            """Δ by the gradients of the whole network with respect to its last layer."""

            def loss(head, image, label):
                outputs = whole.apply(frozen, image[None])
                # The statistics are constants, of all images.
                logits = (outputs.embedding - vectors.mean(0)[None]) / np.sqrt(
                    vectors.var(0).mean()
                ) @ head["kernel"] + head["bias"][None]
                label = jnp.argmax(logits[0]) if label is None else label
                return -jax.nn.log_softmax(logits[0])[label]

            grad_s = jax.vmap(jax.grad(loss), (None, 0, 0))(head, x[:10], labeled.y)
            grad_s = jax.tree.map(lambda leaf: leaf.sum(0), grad_s)
            grad_u = jax.vmap(jax.grad(lambda head, image: loss(head, image, None)), (None, 0))(
                head, x[10:]
            )
            flat = lambda tree, n: jnp.concatenate(
                [leaf.reshape(n, -1) for leaf in jax.tree.leaves(tree)], axis=1
            )
            g_u = flat(grad_u, 30)
            return jnp.sum(g_u**2, axis=1) + 2 * g_u @ flat(grad_s, 1)[0]

        view = dj.LearnerView(model.apply, variables, labeled, vectors[10:])
        query = dj.STRATEGIES["dynamical"]().query(jax.random.key(0), view, 30)
        expected = np.asarray(by_hand(head))
        np.testing.assert_allclose(query.scores, expected[query.positions], rtol=1e-3, atol=1e-4)

    def test_its_ntk_is_constant_over_training(self, vectors, fitted):
        model, start, variables, _ = fitted
        before, after = (
            np.asarray(dj.ntk.empirical_ntk(model.apply, each, vectors[:6]))
            for each in (start, variables)
        )
        np.testing.assert_allclose(before, after, rtol=1e-5)
        h = (vectors[:6] - vectors.mean(0)) / np.sqrt(vectors.var(0).mean())
        np.testing.assert_allclose(before, h @ h.T + 1, rtol=1e-3)
        moved = np.abs(variables["params"]["model"]["fc"]["kernel"]).max()
        assert moved > 0.01  # It was trained.


class TestFineTuning:
    def test_it_begins_with_the_weights_and_a_new_last_layer(self, network):
        _, variables, _ = network
        params, given = variables["params"]["model"], tiny_weights.vit(num_classes=7)
        np.testing.assert_array_equal(params["norm"]["scale"], given["norm.weight"])
        qkv = given["blocks.0.attn.qkv.weight"].T
        np.testing.assert_array_equal(params["block0"]["qkv"]["kernel"], qkv)
        assert params["head"]["kernel"].shape == (WIDTH, NUM_CLASSES)

    @pytest.mark.parametrize("optimizer", ["adam", pytest.param("sgd", marks=pytest.mark.slow)])
    def test_the_backbone_learns_at_its_own_rate(self, network, optimizer):
        model, variables, x = network
        labeled = dj.Examples(x[:8], np.arange(8) % NUM_CLASSES)
        changes = []
        for rate in (None, 2e-5):
            config = dj.TrainingConfig(
                optimizer, 1e-4, weight_decay=0.1, max_epochs=1, backbone_learning_rate=rate
            )
            fit = dj.training.fit(model, variables, labeled, config, 0)
            change = lambda new, old: np.asarray(new, np.float64) - np.asarray(old, np.float64)
            changes.append(jax.tree.map(change, fit.variables["params"], variables["params"]))
        same, slower = ({**change["model"]} for change in changes)
        np.testing.assert_array_equal(slower.pop("head")["kernel"], same.pop("head")["kernel"])
        for new, old in zip(jax.tree.leaves(slower), jax.tree.leaves(same), strict=True):
            np.testing.assert_allclose(new, 0.2 * old, atol=3e-7)  # Weights of 1 keep 7 digits.
        assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(same)) > 5e-6

    def test_rates_that_cannot_be(self, dataset):
        with pytest.raises(dj.UserError, match="the backbone's learning rate must be positive"):
            dj.TrainingConfig(backbone_learning_rate=0.0)
        model = toy.models()["cnn"]
        config = dj.TrainingConfig(backbone_learning_rate=1e-4)
        with pytest.raises(dj.UserError, match="only pretrained networks"):
            dj.training.fit(model, toy.variables(model), toy.examples(5), config, 0)
