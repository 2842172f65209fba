"""The empirical NTK against its definition, neural-tangents, and the limit of infinite width."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

import dynamical_jax as dj
from dynamical_jax import gradients, ntk
from dynamical_jax.ntk import compatibility, empirical

installed = pytest.mark.skipif(
    not compatibility.is_installed(), reason="neural-tangents is not installed"
)


@functools.cache
def network(widths=(8, 8), num_classes=3, size=7):
    model = dj.models.NTKCNN(num_classes, widths)
    x = jax.random.normal(jax.random.key(0), (size, 5, 5, 2))
    return model, dj.models.init(model, jax.random.key(1), x), x


@pytest.mark.parametrize("name", ["cnn", pytest.param("batch_norm", marks=pytest.mark.slow)])
def test_by_definition(name):
    # The gradient of one logit of one example at a time.
    model = toy.models()[name]
    variables, x = toy.variables(model), jnp.asarray(toy.images(4))
    rest = {key: value for key, value in variables.items() if key != "params"}

    @jax.jit
    def gradient(params, i, k):
        logit = lambda params: model.apply({"params": params, **rest}, x[i][None]).logits[0, k]
        return jnp.concatenate(
            [jnp.ravel(leaf) for leaf in jax.tree.leaves(jax.grad(logit)(params))]
        )

    rows = np.array([[gradient(variables["params"], i, k) for k in range(3)] for i in range(4)])
    expected = np.einsum("nkp,mlp->nmkl", rows, rows)
    full = ntk.empirical_ntk(model.apply, variables, x, trace=False)
    np.testing.assert_allclose(full, expected, rtol=1e-4, atol=1e-5 * expected.max())
    traced = ntk.empirical_ntk(model.apply, variables, x)
    np.testing.assert_allclose(traced, np.einsum("nmkk->nm", expected) / 3, rtol=1e-4)


@pytest.mark.slow  # As in dynamics_test.py.
def test_training_dynamics_by_kernel_and_by_gradient():
    model, variables, x = network()
    y = np.arange(7) % 3
    residual = dj.losses.residual(toy.outputs(model.apply, variables, x).logits, y)
    full = ntk.empirical_ntk(model.apply, variables, x, trace=False)
    grad_s = gradients.set_gradient(model.apply, variables, dj.Examples(x, y))
    np.testing.assert_allclose(
        dj.dynamics.training_dynamics_from_kernel(full, residual),
        dj.dynamics.training_dynamics(grad_s),
        rtol=1e-4,
    )


@pytest.mark.parametrize("options", [{"memory_bytes": 30_000}, {"chunk_size": 2}])
def test_parts_and_chunks_change_nothing(options):
    model, variables, x = network()
    seen = []
    one = ntk.empirical_ntk(model.apply, variables, x, x[:3])
    two = ntk.empirical_ntk(
        model.apply, variables, x, x[:3], **options, on_progress=lambda *at: seen.append(at)
    )
    np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)
    done, total = seen[-1]
    assert done == total
    assert sorted(seen) == seen


@pytest.mark.parametrize("trace", [pytest.param(True, marks=pytest.mark.slow), False])
def test_on_disk_and_in_memory_are_equal(trace, tmp_path, monkeypatch):
    model, variables, x = network()
    file = tmp_path / "kernel.npy"
    in_memory = ntk.empirical_ntk(model.apply, variables, x, x[:3], trace=trace)
    on_disk = ntk.empirical_ntk(model.apply, variables, x, x[:3], trace=trace, file=file)
    np.testing.assert_array_equal(on_disk, in_memory)
    assert isinstance(on_disk, np.memmap)
    # Two rows of the kernel at a time, and several parts of the parameters.
    monkeypatch.setattr(empirical, "BLOCK_BYTES", 2 * in_memory[:1].nbytes)
    blocks = ntk.empirical_ntk(
        model.apply, variables, x, x[:3], trace=trace, file=file, memory_bytes=30_000
    )
    np.testing.assert_allclose(blocks, in_memory, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(np.load(file), blocks)
    assert [path.name for path in tmp_path.iterdir()] == ["kernel.npy"]


def test_an_interrupted_kernel_does_not_take_the_name_of_a_whole_one(tmp_path):
    model, variables, x = network()

    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ntk.empirical_ntk(
            model.apply, variables, x, file=tmp_path / "kernel.npy", on_progress=interrupt
        )
    assert [path.name for path in tmp_path.iterdir()] == ["kernel.npy.partial"]


def test_a_disk_that_is_too_small_is_seen_first(tmp_path, monkeypatch):
    model, variables, x = network()
    disk = empirical.resources.shutil
    usage = disk.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(disk, "disk_usage", lambda path: usage)
    options = {"file": tmp_path / "kernel.npy"}
    with pytest.raises(dj.UserError, match="7 × 7 numbers needs 1 KiB on the disk of"):
        ntk.empirical_ntk(model.apply, variables, x, **options)
    monkeypatch.undo()
    with pytest.raises(dj.UserError, match=r"cannot write /.*kernel\.npy: No such file"):
        ntk.empirical_ntk(model.apply, variables, x, file=tmp_path / "nowhere" / "kernel.npy")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("engine", ["factored", pytest.param("vmap", marks=pytest.mark.slow)])
def test_from_sketch(engine):
    model, variables, x = network()
    theta = ntk.empirical_ntk(model.apply, variables, x)
    size = np.sqrt(np.outer(np.diag(theta), np.diag(theta)))
    sketched = functools.partial(
        ntk.from_sketch, model.apply, variables, size=256, engine=engine, chunk_size=8
    )
    errors = np.stack([(sketched(x, seed=seed) - theta) / size for seed in range(24)])
    assert np.sqrt(np.mean(errors**2)) < 1.5 / np.sqrt(256)
    # Over seeds they cancel out: the mean of 24 of them is within five standard errors.
    assert np.max(np.abs(errors.mean(axis=0))) < 5 * np.sqrt(2 / 256 / 24)
    np.testing.assert_allclose(sketched(x, x[:3]), sketched(x)[:, :3], rtol=1e-4, atol=1e-6)
    with pytest.raises(dj.UserError, match="must be at least 1, got 0"):
        ntk.from_sketch(model.apply, variables, x, size=0)


@pytest.mark.parametrize("chunk_size", [3, 7, 32])
def test_combined_gradients_give_the_quadratic_form(chunk_size):
    model, variables, x = network()
    weights = np.random.default_rng(0).normal(size=(7, 4))
    theta = ntk.empirical_ntk(model.apply, variables, x)
    found = ntk.combined_gradients(model.apply, variables, x, weights, chunk_size=chunk_size)
    k = found.shape[0]
    np.testing.assert_allclose(
        np.einsum("kcp,kdp->cd", found, found) / k, weights.T @ theta @ weights, rtol=1e-5
    )
    parts = [
        ntk.combined_gradients(model.apply, variables, x[part], weights[part])
        for part in (slice(0, 2), slice(2, 7))
    ]
    np.testing.assert_allclose(sum(parts), found, rtol=1e-5, atol=1e-6)


def test_a_block_for_which_memory_runs_out_counts_once(monkeypatch):
    model, variables, x = network()
    weights = np.random.default_rng(0).normal(size=(7, 2))
    expected = ntk.combined_gradients(model.apply, variables, x, weights)
    add = empirical._add_combination

    def add_few(total, rows, of_rows):
        if len(rows) > 2:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return add(total, rows, of_rows)

    monkeypatch.setattr(empirical, "_add_combination", add_few)
    found = ntk.combined_gradients(model.apply, variables, x, weights)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_small_eigenvalues_survive_float32_parameters():
    # Two images nearly the same: λ_max / λ_min is beyond what products in float32 can tell apart.
    model, variables, x = network()
    x = jnp.concatenate([x, x[:1] + 1e-4 * jax.random.normal(jax.random.key(2), x[:1].shape)])
    targets = np.eye(3)[np.arange(8) % 3]
    kernel = ntk.empirical_ntk(model.apply, variables, x)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), variables)
        exact = ntk.empirical_ntk(model.apply, wide, x.astype(jnp.float64))
    least, *_, most = np.linalg.eigvalsh(exact)
    assert least < 1e-8 * most
    bound = dj.generalization.generalization_bound
    np.testing.assert_allclose(bound(kernel, targets), bound(exact, targets), rtol=1e-3)


def test_parts_cover_the_parameters_within_the_limit():
    leaves = [np.zeros(shape) for shape in ((3,), (4,), (25,), (2,), (10,), (1,))]
    parts = empirical._parts(leaves, 10)
    assert parts == [
        ((0, 1), 0, 7),
        ((2,), 0, 10),
        ((2,), 10, 20),
        ((2,), 20, 25),
        ((3,), 0, 2),
        ((4,), 0, 10),
        ((5,), 0, 1),
    ]


def test_too_large_says_how_large(monkeypatch):
    model, variables, x = network()
    monkeypatch.setattr(empirical.resources, "free_memory", lambda: 300)
    with pytest.raises(dj.UserError, match=r"7 × 7 numbers needs 1 KiB of memory, and 1 KiB are"):
        ntk.empirical_ntk(model.apply, variables, x)


@installed
@pytest.mark.filterwarnings("ignore:size requires ndarray:DeprecationWarning")  # Theirs, in 2.
@pytest.mark.parametrize("implementation", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("trace", [pytest.param(True, marks=pytest.mark.slow), False])
def test_against_neural_tangents(implementation, trace):
    model, variables, x = network()
    ours = ntk.empirical_ntk(model.apply, variables, x, x[:4], trace=trace)
    theirs = ntk.reference_ntk(
        model.apply, variables, x, x[:4], trace=trace, implementation=implementation
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.slow  # 4 s.
@installed
def test_approaches_the_infinite_width_kernel():
    # 𝒦 → Θ ⊗ I_K: diagonal blocks approach Θ, the others 0.
    errors = []
    for width in (8, 64, 512):
        model, variables, x = network((width, width), size=4)
        infinite = ntk.infinite_width_ntk(x, depth=2)
        full = ntk.empirical_ntk(model.apply, variables, x, trace=False)
        limit = np.einsum("nm,kl->nmkl", infinite, np.eye(3))
        errors.append(np.abs(full - limit).max() / infinite.max())
    assert errors[2] < errors[1] < errors[0]
    assert errors[2] < 0.15


@installed
def test_blocks_of_the_infinite_width_kernel():
    x = np.random.default_rng(0).normal(size=(5, 3, 3, 1))
    whole = ntk.infinite_width_ntk(x, x[1:4], depth=2)
    for block in (1, 2):
        memory = block**2 * bytes_of_a_pair(3)
        parts = ntk.infinite_width_ntk(x, x[1:4], depth=2, memory_bytes=memory)
        np.testing.assert_allclose(parts, whole, rtol=1e-12)
    np.testing.assert_allclose(ntk.infinite_width_ntk(x, depth=2)[:, 1:4], whole, rtol=1e-12)
    with pytest.raises(dj.UserError, match="two images of 3 × 3 pixels needs 0 MiB, and 0 MiB"):
        ntk.infinite_width_ntk(x, memory_bytes=bytes_of_a_pair(3) - 1)


def bytes_of_a_pair(side):
    return dj.ntk.reference.PAIRS_HELD * 8 * side**4


@installed
def test_kernel_regression_of_an_ill_conditioned_kernel():
    # It gives its own training set back, which float32 could not.
    generator = np.random.default_rng(0)
    basis, _ = np.linalg.qr(generator.normal(size=(24, 24)))
    kernel = basis @ np.diag(np.logspace(-9, 0, 24)) @ basis.T
    y = generator.normal(size=(24, 2))
    np.testing.assert_allclose(ntk.kernel_regression(kernel, y, kernel), y, atol=1e-5)


@installed
def test_kernel_regression_is_equation_3():
    generator = np.random.default_rng(0)
    features = generator.normal(size=(9, 20))
    kernel, y = features @ features.T, generator.normal(size=(6, 2))
    train, to_train, rate = kernel[:6, :6], kernel[6:, :6], 0.3
    eigenvalues, v = np.linalg.eigh(train)
    for time in (0.1, 2.0):
        decay = v @ np.diag(1 - np.exp(-rate * eigenvalues * time)) @ v.T
        expected = to_train @ np.linalg.inv(train) @ decay @ y
        outputs = ntk.kernel_regression(train, y, to_train, time, rate)
        np.testing.assert_allclose(outputs, expected, rtol=1e-6)
    np.testing.assert_allclose(
        ntk.kernel_regression(train, y, to_train), to_train @ np.linalg.solve(train, y), rtol=1e-6
    )


@pytest.mark.slow  # 4 s; above, kernel regression is Eq. 3.
@installed
def test_a_wide_network_trained_is_kernel_regression():
    # Full-batch gradient descent on ½‖f − Y‖², from its own start f_0: f − f_0 follows Eq. 3.
    model, variables, x = network((512, 512), num_classes=1, size=6)
    y = jnp.asarray([[1.0], [-1.0], [1.0], [1.0]])
    kernel = ntk.empirical_ntk(model.apply, variables, x)
    rate = float(0.5 / np.linalg.eigvalsh(kernel[:4, :4])[-1])

    @jax.jit
    def train(params):
        def loss(params):
            return jnp.sum((model.apply({"params": params}, x[:4]).logits - y) ** 2) / 2

        step = lambda _, params: jax.tree.map(
            lambda p, g: p - rate * g, params, jax.grad(loss)(params)
        )
        return jax.lax.fori_loop(0, 60, step, params)

    apply = jax.jit(model.apply)
    start = apply(variables, x).logits
    end = apply({"params": train(variables["params"])}, x).logits
    moved = ntk.kernel_regression(kernel[:4, :4], y - start[:4], kernel[:, :4], 60.0, rate)
    assert np.abs(end - start).max() > 0.5
    np.testing.assert_allclose(end - start, moved, atol=0.05)


def test_an_untested_jax_is_named(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (1, 4, 0))
    monkeypatch.setattr(jax, "__version__", "1.4.0")
    with pytest.raises(dj.UserError, match=r"JAX from 0.10 to before 0.13, this is 1.4.0"):
        compatibility.neural_tangents.__wrapped__()


def test_not_installed_says_what_to_install(monkeypatch):
    monkeypatch.setattr(compatibility, "is_installed", lambda: False)
    with pytest.raises(dj.UserError, match=r"pip install 'dynamical-jax\[theory\]'"):
        compatibility.neural_tangents.__wrapped__()
