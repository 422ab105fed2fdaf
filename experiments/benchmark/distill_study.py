"""The `benchmark distill` study: what full-Jacobian and attention matching add to a student's training step."""

import functools
from typing import Any

import numpy as np
from keras import ops

from experiments.benchmark import checked, distill_entries, entries, study
from experiments.benchmark.check import EXAMPLES, Check, check_gradient
from experiments.benchmark.config import DistillConfig
from experiments.benchmark.distill_entries import LABELS, WEIGHTS
from experiments.benchmark.kinks import far_from_kinks
from experiments.benchmark.reference import Reference, float64
from experiments.data import Split


def check(name: str, config: DistillConfig) -> Check:
    """Whether an entry, compiled as it is timed, trains on the distances that it claims to."""
    model = distill_entries.training_model(name, config, **entries.penalty_alone())
    split = checked_images(config)
    return check_gradient(model, split.images(), split.labels, functools.partial(exact_loss, name, config))


def checked_images(config: DistillConfig) -> Split:
    """The images at which entries are checked."""
    networks = [distill_entries.network(config, role) for role in ("teacher", "student")]
    return far_from_kinks(entries.images(config, config.batch_size), networks, EXAMPLES)


def exact_loss(name: str, config: DistillConfig, moved: list[np.ndarray]) -> float:
    """The distances in float64, by one reverse pass of each network, not jitted, at the student moved by so much."""
    split = checked_images(config)
    exact = [
        Reference(distill_entries.network(config, role), "moving", split.images()) for role in ("teacher", "student")
    ]
    with float64():
        student = exact[1]
        for variable, weight, change in zip(student.model.trainable_variables, student.weights, moved, strict=True):
            variable.assign(weight + change)
        cotangent = ops.one_hot(split.labels, 10, dtype="float64")
        seen = []
        for reference in exact:
            outputs, products = distill_entries.differentiable(reference.model, reference.x)
            seen.append((outputs, *products(cotangent)))
        if name == "activation":
            return float(ops.mean(WEIGHTS["activation"] * ops.sum(ops.square(seen[1][0] - seen[0][0]), axis=-1)))
        return float(ops.mean(distill_entries.distances(*seen)))


def caption(summary: dict[str, Any]) -> str:
    """What the figures mean and where they are from."""
    settings = summary["settings"]
    teacher = settings["teacher"]
    return (
        f"{study.subject(settings)}; teacher {teacher['name']} of width {teacher['width']}; biases and no "
        "normalization, three pairs of layers, the label's logit. Ratios to the plain step of the same round, median "
        f"and quartiles of {settings['rounds']} rounds. Errors are relative, of one step's distances and of their "
        "gradient by the weights, against one reverse pass of each network in float64 that is not jitted; above "
        f"{settings['tolerance']:g} a step is wrong and is not timed. First s: seconds of the first call, compilation "
        f"included. {study.ran_on(summary)}"
    )


STUDY = checked.benchmark("distill", LABELS, check, distill_entries.training_model, caption)
