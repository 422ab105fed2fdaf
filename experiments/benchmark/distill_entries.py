"""The entries of `benchmark distill`: full-Jacobian and attention matching by jvpreg and written by hand."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import keras
from keras import ops

import jvpreg
from experiments.benchmark import biases_entries, entries
from experiments.benchmark.autodiff import PenalizedByAutodiff
from experiments.benchmark.biases_entries import squares
from experiments.benchmark.config import DistillConfig
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
    return biases_entries.plain_model(dataclasses.replace(config, model=model, seed=seed))


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
    y, gradients, found = biases_entries.differentiable(layers, x, biased, active)

    def products(cotangent):
        at_x, at_layers = gradients(cotangent)
        offsets = {name: ops.convert_to_tensor(model.get_layer(name).bias) for name in biased}
        biases = [ops.sum(at_layers[name] * offsets[name], axis=-1) for name in biased]
        return at_x, biases, [ops.sum(ops.abs(found[name]), axis=-1) for name in active]

    return y, products
