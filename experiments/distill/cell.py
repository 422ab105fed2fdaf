"""One cell: a student, its teacher, a method and a number of examples."""

import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

import jvpreg
from experiments import data, models, robustness
from experiments.distill.config import DistillConfig, WeightsConfig
from experiments.train import optimizer
from jvpreg.distillation import (
    ActivationMatching,
    AttentionMatching,
    BiasJacobianMatching,
    JacobianMatching,
    MatchingLoss,
)

MATCHED: dict[str, tuple[str, ...]] = {
    "cross-entropy": (),
    "activation": ("activation",),
    "i-Jacobian": ("activation", "jacobian"),
    "attention": ("activation", "attention"),
    "i-Jacobian + attention": ("activation", "jacobian", "attention"),
    "full-Jacobian": ("activation", "jacobian", "bias_jacobian"),
    "full-Jacobian + attention": ("activation", "jacobian", "bias_jacobian", "attention"),
}
"""What each method matches, beside the labels: section 7.1 of Srinivas & Fleuret (2018)."""

ANGLE = "jacobian_matching_angle"


def losses(
    method: str, weights: WeightsConfig, teacher: keras.Model, student: keras.Model, stages: Sequence[int]
) -> list[MatchingLoss]:
    """The matching losses of a method."""
    biases, features = ([last_layers(model, kind, stages) for model in (teacher, student)] for kind in ("bias", "relu"))
    made = {
        "activation": lambda: ActivationMatching(weights.activation),
        "jacobian": lambda: JacobianMatching(weights.jacobian),
        "bias_jacobian": lambda: BiasJacobianMatching(weights.bias_jacobian, list(zip(*biases, strict=True))),
        "attention": lambda: AttentionMatching(weights.attention, list(zip(*features, strict=True))),
    }
    return [made[name]() for name in MATCHED[method]]


def last_layers(model: keras.Model, kind: str, stages: Sequence[int]) -> list[str]:
    """The last "relu" of each stage of a VGG-n, or the last layer with a "bias" or its normalization."""
    numbers = np.cumsum(models.VGG_STAGES[model.name])
    names = {layer.name for layer in model.layers}
    if kind == "bias":
        kind = "norm" if "norm1" in names else "conv"
    return [f"{kind}{numbers[stage - 1]}" for stage in stages]


def trained(
    config: DistillConfig, method: str, teacher: keras.Model, student: keras.Model, dataset: data.Dataset, seed: int
) -> dict[str, Any]:
    """Train one cell.

    Args:
        config: the study's.
        method: a key of `MATCHED`.
        teacher: the teacher.
        student: the student, not trained yet.
        dataset: the few training images, and all test images.
        seed: of the batches.

    Returns:
        `test_accuracy` in [0, 1] and the `angle` between the input-Jacobians on test images in degrees, at the end, and
        the `history` of both in training.
    """
    batches = data.training_batches(dataset, config.batch_size, seed, config.augment)
    epochs = math.ceil(config.steps / len(batches))
    every = max(1, epochs // config.evaluations)
    probed = dataset.test.take(slice(config.probed))
    matching = losses(method, config.weights, teacher, student, config.stages)
    # A distance of weight 0 is measured only: by its angle every method is held against the teacher.
    measured = [] if "jacobian" in MATCHED[method] else [JacobianMatching(0.0)]
    compiled: dict[str, Any] = {
        "loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        "metrics": ["accuracy"],
        "jit_compile": config.jit_compile,
    }
    model = jvpreg.JacobianDistiller(teacher, student, matching, seed) if matching else jvpreg.JacobianModel(student)
    model.compile(optimizer=optimizer(config.optimizer, epochs * len(batches)), **compiled)
    fit: dict[str, Any] = {
        "epochs": epochs,
        "verbose": 0,
        "validation_data": (probed.images(), probed.labels),
        "validation_freq": every,
        "validation_batch_size": config.batch_size,
    }
    if batches.augment or not matching:
        history = model.fit(batches, shuffle=False, callbacks=[batches.order_epochs()], **fit).history
    else:
        x, y = dataset.train.images(), dataset.train.labels
        history = model.fit(model.with_teacher(x, y), y, batch_size=config.batch_size, **fit).history
    last = jvpreg.JacobianDistiller(teacher, student, measured or matching, seed)
    last.compile(**compiled)
    logs = last.evaluate(probed.images(), probed.labels, batch_size=config.batch_size, verbose=0, return_dict=True)
    return {
        "test_accuracy": robustness.accuracy(student, dataset.test),
        "train_accuracy": history["accuracy"][-1],
        "angle": logs[ANGLE],
        "steps": epochs * len(batches),
        "history": curves(history, len(batches), every),
    }


def curves(history: dict[str, list[float]], steps: int, every: int) -> dict[str, list[float]]:
    """Accuracies and angles, and the training steps after which they were measured."""
    count = len(history["val_accuracy"])
    found = {"val_accuracy": history["val_accuracy"]}
    if ANGLE in history:
        found |= {"train_angle": history[ANGLE][every - 1 :: every], "val_angle": history[f"val_{ANGLE}"]}
    return {"step": [every * steps * (i + 1) for i in range(count)], **found}
