"""The entries of `benchmark distill`: full-Jacobian and attention matching by jvpreg and written by hand."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import keras
from keras import ops

import jvpreg
from experiments.benchmark import biases_entries
from experiments.benchmark.biases_entries import squares, through
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
    defaults = {
        "loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        "optimizer": keras.optimizers.Adam(),
        "jit_compile": config.jit_compile,
    }
    student = network(config, "student")
    if name == "plain":
        model = student
    elif name == "full_autodiff":
        model = HandWritten(network(config, "teacher"), student)
    else:
        teacher = network(config, "teacher")
        model = jvpreg.JacobianDistiller(teacher, student, losses(teacher, student)[: None if name == "full" else 1])
    model.compile(**{**defaults, **arguments})
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


class HandWritten(keras.Model):
    """The same losses by the backend's own reverse mode within reverse mode, each network run once.

    Args:
        teacher: a chain of layers, which is frozen.
        base: the student, another one.
    """

    def __init__(self, teacher: keras.Model, base: keras.Model):
        super().__init__()
        self.teacher, self.base = teacher, base
        teacher.trainable = False
        self.products: Any = None
        self.built = True

    def call(self, inputs, training=None):
        """What the student computes; in training, the way back beside it, for `compute_loss`."""
        if not training or isinstance(inputs, keras.KerasTensor):
            return self.base(inputs, training=training)
        outputs, self.products = differentiable(self.base, inputs)
        return outputs

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """The loss as compiled, and the distances of the same step."""
        loss = super().compute_loss(x, y, y_pred, sample_weight, training=training)
        if self.products is None:
            return loss
        products, self.products = self.products, None
        cotangent = ops.one_hot(ops.cast(y, "int32"), y_pred.shape[1], dtype=y_pred.dtype)
        outputs, of_teacher = differentiable(self.teacher, x)
        taught = keras.tree.map_structure(ops.stop_gradient, (outputs, *of_teacher(cotangent)))
        return loss + ops.mean(distances(taught, (y_pred, *products(cotangent))))


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
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(x)
            y, found = through(layers, x, dict.fromkeys([*biased, *active]))

        def gradients(cotangent):
            at_x, *at_layers = tape.gradient(y, [x, *[found[name] for name in biased]], output_gradients=cotangent)
            return at_x, dict(zip(biased, at_layers, strict=True))
    else:
        import jax

        shapes = jax.eval_shape(lambda x: through(layers, x, dict.fromkeys(biased))[1], x)
        zeros = {name: ops.zeros(shape.shape, shape.dtype) for name, shape in shapes.items()}
        nothing = dict.fromkeys(active)
        y, gradients, found = jax.vjp(lambda x, taps: through(layers, x, nothing | taps), x, zeros, has_aux=True)

    def products(cotangent):
        at_x, at_layers = gradients(cotangent)
        offsets = {name: ops.convert_to_tensor(model.get_layer(name).bias) for name in biased}
        biases = [ops.sum(at_layers[name] * offsets[name], axis=-1) for name in biased]
        return at_x, biases, [ops.sum(ops.abs(found[name]), axis=-1) for name in active]

    return y, products
