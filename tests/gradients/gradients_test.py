import jax
import numpy as np
import optax
import pytest
import toy

import dynamical_jax as dj
from dynamical_jax import gradients
from dynamical_jax.gradients import scoring

NAMES = list(toy.models())


def setting(name, size):
    model = toy.models()[name]
    return model.apply, toy.variables(model), toy.examples(size)


@pytest.mark.parametrize("name", NAMES)
def test_set_gradient_is_the_sum_of_gradients(name):
    apply, variables, examples = setting(name, 7)
    reference = jax.jit(gradients.per_example_gradients, static_argnums=0)
    each = reference(apply, variables, *examples)
    expected = jax.tree.map(lambda leaf: leaf.sum(axis=0), each)
    for chunk_size in (3, 16):  # With padding in the last block, and in the only one.
        gradient = gradients.set_gradient(apply, variables, examples, chunk_size)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradient, expected
        )


@pytest.mark.parametrize("name", ["cnn", pytest.param("batch_norm", marks=pytest.mark.slow)])
@pytest.mark.parametrize("engine", gradients.ENGINES)
def test_chunk_size_changes_nothing(name, engine):
    apply, variables, (x, y) = setting(name, 11)
    direction = gradients.set_gradient(apply, variables, dj.Examples(x, y))
    whole = gradients.norms_and_products(apply, variables, x, direction, engine=engine)
    for chunk_size in (4, 64):
        parts = gradients.norms_and_products(
            apply, variables, x, direction, engine=engine, chunk_size=chunk_size
        )
        np.testing.assert_array_equal(parts.label, whole.label)
        np.testing.assert_allclose(parts.squared_norm, whole.squared_norm, rtol=1e-5)
        np.testing.assert_allclose(parts.inner_product, whole.inner_product, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("engine", gradients.ENGINES)
def test_score_does_not_depend_on_batch_mates(name, engine):
    apply, variables, (x, y) = setting(name, 11)
    direction = gradients.set_gradient(apply, variables, dj.Examples(x, y))
    others = np.concatenate([x[:1], toy.images(10, seed=9)])
    one, two = (
        gradients.norms_and_products(apply, variables, batch, direction, engine=engine)
        for batch in (x, others)
    )
    np.testing.assert_allclose(one.squared_norm[0], two.squared_norm[0], rtol=1e-5)
    np.testing.assert_allclose(one.inner_product[0], two.inner_product[0], rtol=1e-4)
    assert abs(one.squared_norm[1] - two.squared_norm[1]) > 1e-3  # The mates did differ.


def test_terms_from_the_gradients_themselves():
    apply, variables, (x, y) = setting("batch_norm", 5)
    direction = gradients.set_gradient(apply, variables, dj.Examples(x, y))
    terms = gradients.norms_and_products(apply, variables, x, direction, labels=y)
    for i in range(5):
        own = gradients.set_gradient(apply, variables, dj.Examples(x[i : i + 1], y[i : i + 1]))
        np.testing.assert_allclose(terms.squared_norm[i], optax.tree.norm(own) ** 2, rtol=1e-4)
        np.testing.assert_allclose(
            terms.inner_product[i], optax.tree.vdot(own, direction), rtol=1e-4
        )


def test_labels_are_the_predictions():
    apply, variables, (x, y) = setting("cnn", 11)
    direction = gradients.set_gradient(apply, variables, dj.Examples(x, y))
    predictions = np.argmax(jax.jit(apply)(variables, x).logits, axis=-1)
    pseudo = gradients.norms_and_products(apply, variables, x, direction)
    given = gradients.norms_and_products(apply, variables, x, direction, labels=predictions)
    np.testing.assert_array_equal(pseudo.label, predictions)
    np.testing.assert_allclose(pseudo.squared_norm, given.squared_norm, rtol=1e-6)


def test_progress_and_empty_pool():
    apply, variables, (x, y) = setting("cnn", 5)
    direction = gradients.set_gradient(apply, variables, dj.Examples(x, y))
    seen = []
    gradients.norms_and_products(
        apply, variables, x, direction, chunk_size=2, on_progress=lambda *at: seen.append(at)
    )
    assert seen == [(2, 5), (4, 5), (5, 5)]
    assert gradients.norms_and_products(apply, variables, x[:0], direction).label.shape == (0,)


def test_unknown_engine():
    with pytest.raises(dj.UserError, match="unknown engine 'warp'; choose from factored, vmap"):
        gradients.norms_and_products(len, {}, np.zeros(1), None, engine="warp")


@pytest.mark.slow  # That of a Gram matrix does, too: gram_test.py.
def test_chunk_size_follows_free_memory(monkeypatch):
    apply, variables, (x, y) = setting("cnn", 64)
    direction = gradients.set_gradient(apply, variables, dj.Examples(x, y))
    sizes = []

    def run(engine, free):
        monkeypatch.setattr(scoring.resources, "free_device_memory", lambda: free)
        at = []
        terms = gradients.norms_and_products(
            apply,
            variables,
            x,
            direction,
            engine=engine,
            on_progress=lambda done, total: at.append(done),
        )
        sizes.append(at[0])
        return terms

    ample = run("vmap", 2**40)
    short = run("vmap", 10 * 2**20)
    none = run("vmap", 1)
    assert sizes[0] == 64
    assert 1 < sizes[1] < 64
    assert sizes[2] == 1
    for terms in (short, none):
        np.testing.assert_allclose(terms.squared_norm, ample.squared_norm, rtol=1e-5)


def test_halved_blocks_have_whole_rows_for_each_device():
    def run_of(limit, sizes):
        def run(positions, count):
            sizes.append(len(positions))
            if len(positions) > limit:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
            return positions[:count]

        return run

    for block_size, limit, expected in (
        (20, 10, [20, 8, 8, 8]),
        (12, 4, [12, 4, 4, 4, 4, 4]),
    ):
        sizes = []
        parts = gradients.map_blocks(run_of(limit, sizes), 20, block_size, smallest=4)
        assert sizes[: len(expected)] == expected
        assert all(size % 4 == 0 for size in sizes)
        np.testing.assert_array_equal(np.concatenate(parts), np.arange(20))
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        gradients.map_blocks(run_of(3, []), 20, 20, smallest=4)


def test_the_next_block_is_begun_before_one_is_waited_for():
    events = []

    def run(positions, count):
        events.append(("begun", int(positions[0])))
        return positions[:count]

    done = lambda at, total: events.append(("done", at))
    parts = list(gradients.each_block(run, 10, 4, done))
    np.testing.assert_array_equal(np.concatenate(parts), np.arange(10))
    begun = [("begun", 0), ("begun", 4), ("done", 4), ("begun", 8), ("done", 8), ("done", 10)]
    assert events == begun


@pytest.mark.parametrize(
    ("limit", "expected"), [(8, [4, 4, 4]), (6, [4, 4, 4, 4, 4]), (3, [4, 4, 4] + [2] * 6)]
)
def test_where_two_blocks_are_too_much_they_run_alone(limit, expected):
    sizes, under_way = [], set()

    class Late:
        def __init__(self, positions, count):
            self.positions, self.size = positions[:count], len(positions)
            sizes.append(self.size)
            under_way.add(self)

        def block_until_ready(self):
            needed = sum(one.size for one in under_way)
            under_way.clear() if needed > limit else under_way.discard(self)
            if needed > limit:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    found = [part.positions for part in gradients.each_block(Late, 12, 4)]
    np.testing.assert_array_equal(np.concatenate(found), np.arange(12))
    assert sizes == expected


def test_scores_come_over_once(monkeypatch):
    apply, variables, (x, y) = setting("cnn", 16)
    direction = gradients.set_gradient(apply, variables, dj.Examples(x, y))
    fetch, times = scoring.parallel.fetch, []
    monkeypatch.setattr(scoring.parallel, "fetch", lambda tree: times.append(1) or fetch(tree))
    gradients.norms_and_products(apply, variables, x, direction, chunk_size=4)
    assert len(times) == 1


def test_out_of_memory_halves_the_block(monkeypatch):
    apply, variables, (x, y) = setting("cnn", 16)
    direction = gradients.set_gradient(apply, variables, dj.Examples(x, y))
    expected = gradients.norms_and_products(apply, variables, x, direction)
    score_block, sizes = scoring._score_block, []

    def limited(apply, engine, variables, block, direction, mesh):
        sizes.append(len(block.x))
        if len(block.x) > 4:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return score_block(apply, engine, variables, block, direction, mesh)

    monkeypatch.setattr(scoring, "_score_block", limited)
    terms = gradients.norms_and_products(apply, variables, x, direction, chunk_size=16)
    assert sizes == [16, 8, 4, 4, 4, 4]
    np.testing.assert_allclose(terms.squared_norm, expected.squared_norm, rtol=1e-5)
    np.testing.assert_array_equal(terms.label, expected.label)

    def broken(*arguments):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(scoring, "_score_block", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        gradients.norms_and_products(apply, variables, x, direction, chunk_size=16)
