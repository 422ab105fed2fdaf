"""Attacks on a linear classifier, whose worst case in an L-infinity ball is known exactly."""

import keras
import numpy as np
import pytest

from experiments import robustness
from experiments.config import RobustnessConfig
from experiments.data import Split

SHAPE = (4, 4, 1)


@pytest.fixture(scope="module")
def split():
    # From 64 to 191 of 255: no ball of a radius below 0.25 leaves [0, 1], so clipping plays no part.
    generator = np.random.default_rng(0)
    return Split(generator.integers(64, 192, (600, *SHAPE), np.uint8), generator.integers(0, 2, 600, np.int32), 255)


@pytest.fixture(scope="module")
def linear():
    pixels = keras.Input(SHAPE)
    model = keras.Model(pixels, keras.layers.Dense(2)(keras.layers.Flatten()(pixels)))
    weights = np.random.default_rng(0).normal(size=16)
    weights -= weights.mean()  # so that the images, which are all of medium grey, lie on both sides
    model.layers[-1].set_weights([np.stack([weights, -weights], axis=1), np.zeros(2)])
    return model


def margins(model, split):
    """Each example's logit of its label minus the other one, and the weights of that difference."""
    kernel, bias = model.layers[-1].get_weights()
    logits = split.images().reshape(len(split), -1).astype(np.float64) @ kernel + bias
    own = np.arange(len(split)), split.labels
    other = np.arange(len(split)), 1 - split.labels
    return logits[own] - logits[other], (kernel[:, 0] - kernel[:, 1]).astype(np.float64)


@pytest.mark.every_backend
@pytest.mark.parametrize("epsilon", [0.01, 0.03, 0.05])
def test_both_attacks_reach_the_worst_case_of_a_linear_classifier(linear, split, epsilon):
    config = RobustnessConfig(examples=600, noise=[], epsilons=[epsilon], pgd_steps=10, pgd_step_size=0.25)
    report = robustness.evaluate(linear, split, config, seed=0)
    margin, difference = margins(linear, split)
    # The worst disturbance takes epsilon times the 1-norm of the weights' difference off the margin.
    worst = np.mean(margin > epsilon * np.abs(difference).sum())
    assert 0.02 < worst < report["clean"]  # else the test would show nothing
    assert report["clean"] == pytest.approx(np.mean(margin > 0))
    assert report["fgsm"][f"{epsilon:.3g}"] == pytest.approx(worst)
    assert report["pgd"][f"{epsilon:.3g}"] == pytest.approx(worst)


def test_the_gradient_is_that_of_the_cross_entropy(linear, split):
    images, labels = split.images()[:50], split.labels[:50]
    gradient = robustness.LossGradient(linear).predict_on_batch([images, labels])
    margin, difference = margins(linear, split)
    # d/dx log(1 + exp(-margin)) = -sigmoid(-margin) * dmargin/dx
    sign = np.where(labels == 0, 1.0, -1.0)
    expected = -(sign / (1.0 + np.exp(margin[:50])))[:, None] * difference
    np.testing.assert_allclose(gradient.reshape(50, -1), expected, rtol=1e-4, atol=1e-6)


def test_attacks_stay_in_the_ball_and_in_the_unit_range(linear):
    generator = np.random.default_rng(0)
    images = generator.choice([0.0, 0.02, 0.5, 1.0], (40, *SHAPE)).astype(np.float32)
    labels = generator.integers(0, 2, 40)
    gradient = robustness.LossGradient(linear)
    attacks = {
        "fgsm": robustness.fgsm(images, labels, gradient=gradient, epsilon=0.1),
        "pgd": robustness.pgd(
            images, labels, gradient=gradient, epsilon=0.1, steps=3, step_size=0.2, generator=generator
        ),
    }
    for disturbed in attacks.values():
        assert disturbed.dtype == np.float32
        assert disturbed.min() >= 0.0
        assert disturbed.max() <= 1.0
        assert np.abs(disturbed - images).max() <= 0.1 + 1e-6


def test_noise_has_its_deviation_and_is_the_same_for_every_model(linear, split):
    grey = np.full((200, *SHAPE), 0.5, np.float32)
    noisy = [
        robustness.add_noise(grey, np.zeros(200), deviation=0.05, generator=np.random.default_rng(1)) for _ in range(2)
    ]
    np.testing.assert_array_equal(*noisy)
    assert noisy[0].std() == pytest.approx(0.05, rel=0.05)
    config = RobustnessConfig(examples=100, noise=[0.1, 0.2], epsilons=[])
    assert robustness.evaluate(linear, split, config, 5) == robustness.evaluate(linear, split, config, 5)
