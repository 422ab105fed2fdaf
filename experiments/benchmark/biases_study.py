"""The `benchmark biases` study: what penalties on bias-Jacobians add to a training step.

By jvpreg, and by hand-written double backpropagation.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import keras
import numpy as np
from keras import ops

import jvpreg
from experiments.benchmark import checked, entries, study
from experiments.benchmark.autodiff import PenalizedByAutodiff
from experiments.benchmark.checked import EXAMPLES, Check, check_gradient
from experiments.benchmark.config import BiasesConfig
from experiments.benchmark.kinks import far_from_kinks
from experiments.benchmark.reference import Reference
from experiments.data import Split
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
        gradients = kept(ops.one_hot(ops.cast(y, "int32"), outputs.shape[1], dtype=outputs.dtype))
        norm = ops.mean(squared_norms(self.base, self.names, self.with_input, *gradients))
        self.tracker.update_state(norm)
        return self.strength * norm


def squared_norms(model: keras.Model, names: Sequence[str], with_input: bool, at_input, at_layers: dict[str, Any]):
    """`‖∂f/∂y ⊙ b‖²` of the named layers, summed, if wanted with `‖∂f/∂x‖²`: `(B,)`, from the gradients by each."""
    layers = [layer for layer in model.layers if layer.name in names]
    total = squares(at_input) if with_input else 0.0
    return total + sum(squares(at_layers[layer.name] * ops.convert_to_tensor(layer.bias)) for layer in layers)


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


def check(entry: Entry, config: BiasesConfig) -> Check:
    """Whether an entry, compiled as it is timed, trains on the penalty that it claims to."""
    model = training_model(entry, config, strength=1.0, **entries.penalty_alone())
    split = checked_images(config)
    return check_gradient(model, split.images(), split.labels, functools.partial(exact_penalty, entry, config))


def checked_images(config: BiasesConfig) -> Split:
    """The images at which entries are checked."""
    return far_from_kinks(entries.images(config, config.batch_size), [plain_model(config)], EXAMPLES)


def exact_penalty(entry: Entry, config: BiasesConfig, moved: list[np.ndarray]) -> float:
    """The penalty in float64, by one reverse pass that is not jitted, at the weights moved by so much."""
    split = checked_images(config)
    exact = Reference(plain_model(config), "moving", split.images())
    with exact.moved(moved):
        names = convolutions(exact.model, entry)
        outputs, gradients, _ = differentiable(exact.model.layers[1:], exact.x, names)
        found = gradients(ops.one_hot(split.labels, outputs.shape[1], dtype="float64"))
        return float(ops.mean(squared_norms(exact.model, names, entry.with_input, *found)))


def caption(summary: dict[str, Any]) -> str:
    """What the figures mean and where they are from."""
    settings = summary["settings"]
    return (
        f"{study.subject(settings)}, biases and no normalization; the label's logit. Ratios to the plain step of the "
        f"same round, median and quartiles of {settings['rounds']} rounds. Errors are relative, of one step's penalty "
        "and of its gradient by the weights, against one reverse pass in float64 that is not jitted; above "
        f"{settings['tolerance']:g} a step is wrong and is not timed. First s: seconds of the first call, compilation "
        f"included. {study.ran_on(summary)}"
    )


NAMED = {entry.name: entry for entry in ENTRIES}

STUDY = checked.benchmark(
    "biases",
    {name: entry.label for name, entry in NAMED.items()},
    lambda name, config: check(NAMED[name], config),
    lambda name, config: training_model(NAMED[name], config),
    caption,
)
