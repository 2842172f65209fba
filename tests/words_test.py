"""What messages say of names that there are only a few of."""

import pytest

import dynamical_jax as dj


@pytest.mark.parametrize(
    ("look_up", "message"),
    [
        (
            lambda: dj.STRATEGIES["dynamicl"],
            "unknown strategy 'dynamicl' (is it 'dynamical'?); cho",
        ),
        (
            lambda: dj.models.MODELS["resnet"],
            "unknown model 'resnet' (is it 'resnet18'?); choose f",
        ),
        (
            lambda: dj.models.check_name("x", "vectors"),
            "unknown model 'x'; choose from linear, mlp",
        ),
        (
            lambda: dj.TrainingConfig("adm"),
            "unknown optimizer 'adm' (is it 'adam'?); choose from a",
        ),
        (lambda: dj.datasets.load("cifr10"), "unknown dataset 'cifr10' (is it 'cifar10'?); choose"),
    ],
)
def test_the_choices_and_what_may_have_been_meant(look_up, message):
    with pytest.raises(dj.UserError) as caught:
        look_up()
    assert str(caught.value).startswith(message)


def test_a_registry_is_a_dictionary():
    assert dj.STRATEGIES.get("dynamicl") is None
    assert "dynamicl" not in dj.STRATEGIES
    assert dj.STRATEGIES["dynamical"] is dj.strategies.Dynamical
