import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

import dynamical_jax as dj
from dynamical_jax.models import layers

# Parameters of the official PyTorch models with 10 classes.
NUM_PARAMETERS = {
    ("cnn", ()): 62_006,
    ("resnet18", (("stem", "imagenet"),)): 11_181_642,
    ("resnet18", (("stem", "cifar"),)): 11_173_962,
    ("vgg11", ()): 128_807_306,
}


def shapes(module, x):
    """Variables and outputs as shapes only: nothing is computed."""

    def apply(key, x):
        return module.init_with_output(key, x)

    return jax.eval_shape(apply, jax.random.key(0), jax.ShapeDtypeStruct(x, jnp.float32))


@pytest.mark.parametrize(("name", "options"), NUM_PARAMETERS)
def test_sizes_are_those_of_the_official_models(name, options):
    module = dj.models.MODELS[name](num_classes=10, **dict(options))
    outputs, variables = shapes(module, (2, 32, 32, 3))
    count = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert count == NUM_PARAMETERS[name, options]
    assert outputs.logits.shape == (2, 10)
    assert outputs.embedding.shape == (2, {"cnn": 84, "resnet18": 512, "vgg11": 4096}[name])


@pytest.mark.parametrize("size", [4, 8, 15, 16, 32])
def test_cnn_takes_small_images(size):
    outputs, _ = shapes(dj.models.CNN(7), (2, size, size, 1))
    assert outputs.logits.shape == (2, 7)


@pytest.mark.parametrize(("module", "size"), [(dj.models.CNN(10), 3), (dj.models.VGG11(10), 16)])
def test_too_small_images_are_refused(module, size):
    with pytest.raises(dj.UserError, match="needs images of at least"):
        shapes(module, (2, size, size, 3))


def test_unknown_names_list_the_choices(dataset):
    with pytest.raises(dj.UserError, match="unknown model 'alexnet'; choose from cnn, resnet18"):
        dj.models.create("alexnet", dataset)
    with pytest.raises(dj.UserError, match="unknown stem 'mnist'; choose from imagenet, cifar"):
        shapes(dj.models.ResNet18(10, stem="mnist"), (1, 32, 32, 3))


def test_initialisations_have_the_spread_of_pytorch():
    key = jax.random.key(0)
    kernel = layers.default_kernel(key, (5, 5, 40, 60))
    assert np.abs(kernel).max() <= 1 / np.sqrt(1000)
    np.testing.assert_allclose(kernel.std(), 1 / np.sqrt(3 * 1000), rtol=0.02)
    bias = layers.default_bias(1000)(key, (5000,))
    np.testing.assert_allclose(bias.std(), 1 / np.sqrt(3 * 1000), rtol=0.03)
    kernel = layers.kaiming_normal(key, (3, 3, 40, 60))
    np.testing.assert_allclose(kernel.std(), np.sqrt(2 / (9 * 60)), rtol=0.02)


def test_standardized_images_have_mean_0_and_deviation_1(dataset):
    class Identity(dj.models.CNN):
        def __call__(self, x, train=False):
            return dj.Outputs(x, x)

    module = dj.models.Standardized(Identity(3), dataset.mean, dataset.std)
    x = module.apply({}, dataset.pool.x).logits
    np.testing.assert_allclose(x.mean(axis=(0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(x.std(axis=(0, 1, 2)), 1, rtol=1e-5)
    constant = dj.models.Standardized(Identity(3), (7.0, 7.0), (0.0, 0.0))
    np.testing.assert_array_equal(constant.apply({}, np.full((1, 2, 2, 2), 7, np.uint8)).logits, 0)


@pytest.mark.slow  # Nor do scores, in gradients_test.py.
def test_evaluation_does_not_depend_on_batch_mates():
    for name, model in toy.models().items():
        variables = toy.variables(model)
        x = toy.images(4)
        apply = jax.jit(model.apply)
        together = apply(variables, x).logits
        alone = apply(variables, x[:1]).logits
        np.testing.assert_allclose(together[:1], alone, atol=1e-5, err_msg=name)


def test_adaptive_average_pool():
    x = jnp.arange(5.0).reshape(1, 5, 1, 1) * jnp.ones((1, 5, 1, 2))
    # Rows 0–1, 1–3 and 3–4 of five, as ⌊i 5/3⌋ to ⌈(i+1) 5/3⌉ says.
    pooled = layers.adaptive_average_pool(x, 3)
    np.testing.assert_allclose(pooled[0, :, 0, 0], [0.5, 2, 3.5])
    assert pooled.shape == (1, 3, 3, 2)
    np.testing.assert_allclose(layers.adaptive_average_pool(jnp.full((1, 1, 1, 1), 3.0), 7), 3)


@pytest.mark.parametrize("name", ["cnn", pytest.param("resnet18", marks=pytest.mark.slow)])
def test_a_grown_model_says_of_old_classes_what_it_said(name):
    few, more = (dj.models.MODELS[name](num_classes) for num_classes in (2, 4))
    x = jax.random.normal(jax.random.key(0), (3, 8, 8, 3))
    old, fresh = (
        dj.models.init(model, jax.random.key(seed), x) for seed, model in ((1, few), (2, more))
    )
    grown = dj.models.grow(old, fresh)
    logits = jax.jit(more.apply)(grown, x).logits
    assert logits.shape == (3, 4)
    np.testing.assert_allclose(logits[:, :2], jax.jit(few.apply)(old, x).logits, rtol=1e-5)
    assert np.abs(logits[:, 2:] - logits[:, :2]).max() > 0
