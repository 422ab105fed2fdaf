"""The entries of `benchmark biases`: bias-Jacobian penalties by jvpreg and by hand-written double backpropagation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import keras
import numpy as np
from keras import ops

import jvpreg
from experiments.benchmark import entries
from experiments.benchmark.autodiff import PenalizedByAutodiff
from experiments.benchmark.config import BiasesConfig
from jvpreg.estimators.norms import squared_norm

STRENGTH = 1e-3


@dataclass(frozen=True)
class Entry:
    """One way to take a training step.

    Attributes:
        name: in the files.
        label: in the table.
        layers: whose bias-Jacobians are penalized; None for the plain step.
        with_input: whether the input-Jacobian is penalized too.
        autodiff: whether it is written by hand, by the backend's own reverse mode within reverse mode.
    """

    name: str
    label: str
    layers: Literal["last", "all"] | None = None
    with_input: bool = False
    autodiff: bool = False


ENTRIES = (
    Entry("plain", "plain step"),
    Entry("last", "BiasJacobianNorm, last convolution", "last"),
    Entry("last_autodiff", "double backpropagation, last convolution", "last", autodiff=True),
    Entry("all", "BiasJacobianNorm, every convolution", "all"),
    Entry("all_autodiff", "double backpropagation, every convolution", "all", autodiff=True),
    Entry("full", "FullJacobianNorm, every convolution", "all", with_input=True),
    Entry("full_autodiff", "double backpropagation, every convolution and input", "all", True, autodiff=True),
)


def plain_model(config: BiasesConfig) -> keras.Model:
    """The plain model, not compiled, with random biases: at zero, where they begin, there is nothing to penalize."""
    model = entries.plain_model(config)
    random = np.random.default_rng(config.seed)
    for layer in model.layers:
        if isinstance(layer, keras.layers.Conv2D):
            layer.bias.assign(random.normal(0.0, 0.1, layer.bias.shape))
    return model


def convolutions(model: keras.Model, entry: Entry) -> list[str]:
    """Names of the layers whose bias-Jacobians an entry penalizes."""
    names = [layer.name for layer in model.layers if isinstance(layer, keras.layers.Conv2D)]
    return names[-1:] if entry.layers == "last" else names


def training_model(entry: Entry, config: BiasesConfig, **arguments: Any) -> keras.Model:
    """The model of an entry as it is timed: cross-entropy and Adam, where `arguments` of `compile` say nothing else."""
    strength = arguments.pop("strength", STRENGTH)
    arguments = {**entries.timed_training(config), **arguments}
    base = plain_model(config)
    if entry.layers is None:
        base.compile(**arguments)
        return base
    layers = convolutions(base, entry)
    if entry.autodiff:
        model: keras.Model = DoubleBackpropagation(base, layers, entry.with_input, strength)
        model.compile(**arguments)
        return model
    regularizer = (
        jvpreg.regularizers.FullJacobianNorm(strength, layers=layers, name="penalty")
        if entry.with_input
        else jvpreg.regularizers.BiasJacobianNorm(strength, layers=layers, name="penalty")
    )
    model = jvpreg.JacobianModel(base, seed=config.seed)
    model.compile(jacobian_regularizers=[regularizer], **arguments)
    return model


class DoubleBackpropagation(PenalizedByAutodiff):
    """The same penalty by autodiff: the label's logit is differentiated by what the convolutions return.

    Args:
        base: a chain of layers.
        layers: names of those whose `‖∂f/∂y ⊙ b‖²` is penalized; nothing below the first of them is differentiated
            twice, if the input is not.
        with_input: whether `‖∂f/∂x‖²` is added.
        strength: of the penalty.
    """

    def __init__(self, base: keras.Model, layers: Sequence[str], with_input: bool, strength: float):
        super().__init__(base)
        self.names, self.with_input, self.strength = list(layers), with_input, strength
        self.tracker = keras.metrics.Mean(name="penalty")

    def with_products(self, x):
        """The outputs, and the way back."""
        first = 1 if self.with_input else [layer.name for layer in self.base.layers].index(self.names[0])
        below, above = self.base.layers[1:first], self.base.layers[first:]  # the first is the input
        for layer in below:
            x = layer(x)
        return differentiable(above, x, self.names)[:2]

    def penalty(self, kept, x, y, outputs):
        """The penalty; its mean is a metric."""
        at_input, at_layers = kept(ops.one_hot(ops.cast(y, "int32"), outputs.shape[1], dtype=outputs.dtype))
        biases = {
            layer.name: ops.convert_to_tensor(layer.bias) for layer in self.base.layers if layer.name in self.names
        }
        norm = squares(at_input) if self.with_input else 0.0
        norm = ops.mean(norm + sum(squares(at_layers[name] * bias) for name, bias in biases.items()))
        self.tracker.update_state(norm)
        return self.strength * norm


def squares(tensor):
    """Of the entries of each example, summed: `(B,)`."""
    return squared_norm(ops.expand_dims(tensor, 0))[0]


def differentiable(layers: Sequence[keras.Layer], x, names: Sequence[str], watched: Sequence[str] = ()):
    """A chain of layers, and a function from the cotangent of its output to the gradients at `x` and at `names`.

    Returns:
        The output, that function, and what the layers returned that are named or `watched`, by name.
    """
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        # The weights are the outer tape's business: to watch them here too would record twice as much.
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(x)
            y, found = through(layers, x, dict.fromkeys([*names, *watched]))

        def gradients(cotangent):
            at_x, *at_layers = tape.gradient(y, [x, *(found[name] for name in names)], output_gradients=cotangent)
            return at_x, dict(zip(names, at_layers, strict=True))

        return y, gradients, found
    import jax

    shapes = jax.eval_shape(lambda x: through(layers, x, dict.fromkeys(names))[1], x)
    zeros = {name: ops.zeros(shape.shape, shape.dtype) for name, shape in shapes.items()}
    return jax.vjp(lambda x, taps: through(layers, x, dict.fromkeys(watched) | taps), x, zeros, has_aux=True)


def through(layers: Sequence[keras.Layer], x, taps: dict[str, Any]):
    """The output of a chain of layers, and what those returned that are named, with something added to it."""
    found = {}
    for layer in layers:
        x = layer(x)
        if layer.name in taps:
            x = x if taps[layer.name] is None else x + taps[layer.name]
            found[layer.name] = x
    return x, found
