"""How a classifier's accuracy falls under noise and under attack."""

from collections.abc import Callable
from functools import partial
from typing import Any

import keras
import numpy as np

import jvpreg
from experiments.config import RobustnessConfig
from experiments.data import Split

BATCH_SIZE = 250

Disturbance = Callable[[np.ndarray, np.ndarray], np.ndarray]


class LossGradient(keras.Model):
    """The gradient of each example's cross-entropy at the pixels, by the pullback of the linearized model.

    A Keras model so that Keras compiles it once on every backend: call `predict_on_batch`.

    Args:
        model: a classifier `(B, H, W, C) -> logits (B, K)`.
    """

    def __init__(self, model: keras.Model):
        super().__init__()
        self.classifier = model

    def call(self, inputs: list[Any]) -> Any:
        """From a list of images `(B, H, W, C)` and labels `(B,)`, the gradients `(B, H, W, C)`."""
        images, labels = inputs
        linearization = jvpreg.linearize(self.classifier, images, training=False)
        logits = linearization.outputs
        # d(cross-entropy)/d(logits) = softmax - onehot
        onehot = keras.ops.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
        return linearization.vjp(keras.ops.softmax(logits) - onehot)


def unchanged(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The images as they are; like any disturbance, a function of images `(B, H, W, C)` and labels `(B,)`."""
    return images


def add_noise(
    images: np.ndarray, labels: np.ndarray, *, deviation: float, generator: np.random.Generator
) -> np.ndarray:
    """Add Gaussian noise of a standard deviation in pixel units, and clip to [0, 1]."""
    noise = generator.standard_normal(images.shape, dtype=np.float32)
    return np.clip(images + np.float32(deviation) * noise, 0.0, 1.0)


def fgsm(images: np.ndarray, labels: np.ndarray, *, gradient: LossGradient, epsilon: float) -> np.ndarray:
    """The fast gradient sign method: one step to the border of the L-infinity ball, clipped to [0, 1].

    Args:
        images: `(B, H, W, C)` in [0, 1].
        labels: `(B,)`.
        gradient: of the classifier under attack.
        epsilon: the radius, in pixel units.

    Returns:
        The disturbed images, `(B, H, W, C)`.

    Reference:
        Goodfellow, Shlens & Szegedy, "Explaining and harnessing adversarial examples", 2015.
    """
    step = np.float32(epsilon) * np.sign(gradient.predict_on_batch([images, labels]))
    return np.clip(images + step, 0.0, 1.0)


def pgd(
    images: np.ndarray,
    labels: np.ndarray,
    *,
    gradient: LossGradient,
    epsilon: float,
    steps: int,
    step_size: float,
    generator: np.random.Generator,
) -> np.ndarray:
    """Projected gradient descent in the L-infinity ball, from a random start, clipped to [0, 1].

    Args:
        images: `(B, H, W, C)` in [0, 1].
        labels: `(B,)`.
        gradient: of the classifier under attack.
        epsilon: the radius, in pixel units.
        steps: gradient steps.
        step_size: length of a step, in pixel units.
        generator: draws the start, uniformly in the ball.

    Returns:
        The disturbed images, `(B, H, W, C)`.

    Reference:
        Madry et al., "Towards deep learning models resistant to adversarial attacks", 2018.
    """
    radius = np.float32(epsilon)
    lowest, highest = np.maximum(images - radius, 0.0), np.minimum(images + radius, 1.0)
    start = images + generator.uniform(-epsilon, epsilon, images.shape).astype(np.float32)
    disturbed = np.clip(start, lowest, highest)
    for _ in range(steps):
        step = np.float32(step_size) * np.sign(gradient.predict_on_batch([disturbed, labels]))
        disturbed = np.clip(disturbed + step, lowest, highest)
    return disturbed


def accuracy(model: keras.Model, split: Split, disturb: Disturbance = unchanged) -> float:
    """The part of the examples that a classifier gets right after a disturbance."""
    correct = 0
    for batch in split.parts(BATCH_SIZE):
        logits = model.predict_on_batch(disturb(batch.images(), batch.labels))
        correct += int(np.sum(np.argmax(logits, axis=-1) == batch.labels))
    return correct / len(split)


def evaluate(model: keras.Model, split: Split, config: RobustnessConfig, seed: int) -> dict[str, Any]:
    """The accuracy of a classifier, clean and under every disturbance of the configuration.

    Args:
        model: `(B, H, W, C) -> logits (B, K)`; not changed.
        split: the test images, of which the first `config.examples` are used.
        config: the disturbances.
        seed: of the noise and of the starts of PGD, which are the same for every model.

    Returns:
        The number of `examples`, and accuracies as fractions of 1 on these: `clean`; under Gaussian `noise`, by its
        standard deviation as text; under the attacks `fgsm` and `pgd`, by their radius as text.
    """
    split = split.take(slice(config.examples))
    gradient = LossGradient(model)

    def many_steps(epsilon: float) -> Disturbance:
        return partial(
            pgd,
            gradient=gradient,
            epsilon=epsilon,
            steps=config.pgd_steps,
            step_size=config.pgd_step_size * epsilon,
            generator=np.random.default_rng(seed),
        )

    def accuracies(family: Callable[[float], Disturbance], sizes: list[float]) -> dict[str, float]:
        return {f"{size:.3g}": accuracy(model, split, family(size)) for size in sizes}

    return {
        "examples": len(split),
        "clean": accuracy(model, split),
        "noise": accuracies(
            lambda deviation: partial(add_noise, deviation=deviation, generator=np.random.default_rng(seed)),
            config.noise,
        ),
        "fgsm": accuracies(lambda epsilon: partial(fgsm, gradient=gradient, epsilon=epsilon), config.epsilons),
        "pgd": accuracies(many_steps, config.epsilons),
    }
