"""The `benchmark distill` study: what full-Jacobian and attention matching add to a student's training step.

By jvpreg, and by hand-written double backpropagation.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import keras
import numpy as np
from keras import ops

import jvpreg
from experiments.benchmark import biases_study, checked, entries, study
from experiments.benchmark.autodiff import PenalizedByAutodiff
from experiments.benchmark.biases_study import squares
from experiments.benchmark.checked import EXAMPLES, Check, check_gradient
from experiments.benchmark.config import DistillConfig
from experiments.benchmark.kinks import far_from_kinks
from experiments.benchmark.reference import Reference
from experiments.data import Split
from experiments.distill.cell import last_layers
from jvpreg.distillation import ActivationMatching, AttentionMatching, BiasJacobianMatching, JacobianMatching

LABELS = {
    "plain": "plain step of the student",
    "activation": "ActivationMatching",
    "full": "full-Jacobian + attention",
    "full_autodiff": "double backpropagation, the same",
}
WEIGHTS = {"activation": 0.1, "jacobian": 0.01, "bias_jacobian": 0.01, "attention": 1e-4}
STAGES = (2, 3, 4)


def network(config: DistillConfig, role: Literal["teacher", "student"]) -> keras.Model:
    """The plain model, with random biases."""
    model = config.model if role == "student" else config.teacher
    seed = config.seed + (role == "teacher")
    return biases_study.plain_model(dataclasses.replace(config, model=model, seed=seed))


def training_model(name: str, config: DistillConfig, **arguments: Any) -> keras.Model:
    """The model of an entry as it is timed: cross-entropy and Adam, where `arguments` of `compile` say nothing else."""
    student = network(config, "student")
    if name == "plain":
        model = student
    elif name == "full_autodiff":
        model = HandWritten(network(config, "teacher"), student)
    else:
        teacher = network(config, "teacher")
        model = jvpreg.JacobianDistiller(teacher, student, losses(teacher, student)[: None if name == "full" else 1])
    model.compile(**{**entries.timed_training(config), **arguments})
    return model


def losses(teacher: keras.Model, student: keras.Model) -> list[jvpreg.distillation.MatchingLoss]:
    """Those of full-Jacobian and attention matching."""
    pairs = [
        list(zip(*[last_layers(model, kind, STAGES) for model in (teacher, student)], strict=True))
        for kind in ("bias", "relu")
    ]
    return [
        ActivationMatching(WEIGHTS["activation"]),
        JacobianMatching(WEIGHTS["jacobian"]),
        BiasJacobianMatching(WEIGHTS["bias_jacobian"], pairs[0]),
        AttentionMatching(WEIGHTS["attention"], pairs[1]),
    ]


class HandWritten(PenalizedByAutodiff):
    """The same losses by the backend's own reverse mode within reverse mode, each network run once.

    Args:
        teacher: a chain of layers, which is frozen.
        base: the student, another one.
    """

    def __init__(self, teacher: keras.Model, base: keras.Model):
        super().__init__(base)
        self.teacher = teacher
        teacher.trainable = False

    def with_products(self, x):
        """The outputs, and the way back."""
        return differentiable(self.base, x)

    def penalty(self, kept, x, y, outputs):
        """The distances."""
        cotangent = ops.one_hot(ops.cast(y, "int32"), outputs.shape[1], dtype=outputs.dtype)
        theirs, of_teacher = differentiable(self.teacher, x)
        taught = keras.tree.map_structure(ops.stop_gradient, (theirs, *of_teacher(cotangent)))
        return ops.mean(distances(taught, (outputs, *kept(cotangent))))


def distances(teacher: Sequence, student: Sequence):
    """The weighted sum of the squared distances of outputs, input-Jacobians, bias-Jacobians and attention, `(B,)`."""
    (g, at_input, biases, attention), (f, at_own_input, own_biases, own_attention) = teacher, student
    total = WEIGHTS["activation"] * squares(f - g) + WEIGHTS["jacobian"] * squares(at_own_input - at_input)
    for ours, theirs in zip(own_biases, biases, strict=True):
        total = total + WEIGHTS["bias_jacobian"] * squares(ours - theirs)
    for ours, theirs in zip(own_attention, attention, strict=True):
        total = total + WEIGHTS["attention"] * squares(ours - theirs)
    return total


def differentiable(model: keras.Model, x):
    """The outputs of a chain of layers, and a function from a cotangent to its products.

    The products: the gradient at `x`, and a list of bias-Jacobians and one of attention maps, summed over channels.
    """
    biased, active = last_layers(model, "bias", STAGES), last_layers(model, "relu", STAGES)
    layers = model.layers[1:]  # the first is the input
    y, gradients, found = biases_study.differentiable(layers, x, biased, active)

    def products(cotangent):
        at_x, at_layers = gradients(cotangent)
        offsets = {name: ops.convert_to_tensor(model.get_layer(name).bias) for name in biased}
        biases = [ops.sum(at_layers[name] * offsets[name], axis=-1) for name in biased]
        return at_x, biases, [ops.sum(ops.abs(found[name]), axis=-1) for name in active]

    return y, products


def check(name: str, config: DistillConfig) -> Check:
    """Whether an entry, compiled as it is timed, trains on the distances that it claims to."""
    model = training_model(name, config, **entries.penalty_alone())
    split = checked_images(config)
    return check_gradient(model, split.images(), split.labels, functools.partial(exact_loss, name, config))


def checked_images(config: DistillConfig) -> Split:
    """The images at which entries are checked."""
    networks = [network(config, role) for role in ("teacher", "student")]
    return far_from_kinks(entries.images(config, config.batch_size), networks, EXAMPLES)


def exact_loss(name: str, config: DistillConfig, moved: list[np.ndarray]) -> float:
    """The distances in float64, by one reverse pass of each network, not jitted, at the student moved by so much."""
    split = checked_images(config)
    teacher, student = (Reference(network(config, role), "moving", split.images()) for role in ("teacher", "student"))
    with student.moved(moved):
        cotangent = ops.one_hot(split.labels, 10, dtype="float64")
        seen = []
        for reference in (teacher, student):
            outputs, products = differentiable(reference.model, reference.x)
            seen.append((outputs, *products(cotangent)))
        if name == "activation":
            return float(ops.mean(WEIGHTS["activation"] * ops.sum(ops.square(seen[1][0] - seen[0][0]), axis=-1)))
        return float(ops.mean(distances(*seen)))


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


STUDY = checked.benchmark("distill", LABELS, check, training_model, caption)
