"""What is measured: the entries, and the model that each of them trains."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import keras
import numpy as np
from keras import ops

import jvpreg
from experiments import models
from experiments.benchmark import autodiff
from experiments.benchmark.config import BenchmarkConfig, StepConfig
from experiments.benchmark.directions import KnownDirection, KnownJacobianNorm, known_directions
from experiments.benchmark.reference import Derivative
from experiments.data import Dataset, Split
from jvpreg.constraints import Invariant, tangents

STRENGTH = 1e-3


@dataclass(frozen=True)
class Entry:
    """One way to take a training step.

    Attributes:
        name: in the files, and of the key `only`.
        label: in the table and in the figure.
        side: of the Jacobian that the penalty is probed from; None for the plain step.
        product: computes the product by autodiff; None where jvpreg does.
        num_probes: directions an example.
        interval: steps from one penalty to the next, which are timed as one turn.
        fraction: the part of a batch that the penalty sees.
        constraints: whether each probe is a constraint of its own.
    """

    name: str
    label: str
    side: Literal["input", "output"] | None = None
    product: autodiff.Product | None = None
    num_probes: int = 1
    interval: int = 1
    fraction: float = 1.0
    constraints: bool = False

    def derivative(self, config: StepConfig) -> Derivative | Literal["none"]:
        """What is differentiated: nothing, or the map with its batch statistics moving, frozen or coupled."""
        if self.side is None:
            return "none"
        if config.batch_normalization == "inference":
            return "moving"
        return "frozen" if self.product is None else "coupled"


ENTRIES = (
    Entry("plain", "plain step"),
    Entry("norm_1", "JacobianNorm, 1 probe", "input"),
    Entry("norm_4", "JacobianNorm, 4 probes", "input", num_probes=4),
    Entry("norm_interval", "JacobianNorm, interval=4", "input", interval=4),
    Entry("norm_fraction", "JacobianNorm, fraction=0.25", "input", fraction=0.25),
    Entry("norm_output", "JacobianNorm, side=output", "output"),
    Entry("constraint", "1 constraint of 1 tangent", "input", constraints=True),
    Entry("constraints", "3 constraints of 1 tangent each", "input", num_probes=3, constraints=True),
    Entry("double_backpropagation", "double backpropagation", "output", autodiff.backward),
    Entry("forward_autodiff", "forward autodiff", "input", autodiff.forward),
)


def plain_model(config: BenchmarkConfig) -> keras.Model:
    """The plain model, not compiled; always the same one for a seed."""
    keras.utils.set_random_seed(config.seed)
    split = images(config, config.batch_size)
    return models.build(config.model, Dataset("random", split, split, num_classes=10))


def base_model(config: StepConfig) -> keras.Model:
    """The plain model with its batch normalization in the mode that is measured."""
    model = plain_model(config)
    if config.batch_normalization == "inference":
        for layer in model.layers:
            layer.trainable = not isinstance(layer, keras.layers.BatchNormalization)
    return model


def images(config: BenchmarkConfig, number: int) -> Split:
    """Random images and labels."""
    generator = np.random.default_rng(config.seed)
    size = config.image_size
    pixels = generator.integers(0, 256, size=(number, size, size, 3), dtype=np.uint8)
    return Split(pixels, generator.integers(0, 10, size=number, dtype=np.int32), white=255)


def batch_step(model: keras.Model, config: BenchmarkConfig) -> Callable[[], object]:
    """A training step of a compiled model on random images; it returns its loss, and so is waited for."""
    split = images(config, config.batch_size)
    batch = split.images(), split.labels
    return lambda: model.train_on_batch(*batch)


def checked_model(entry: Entry, config: StepConfig) -> keras.Model:
    """The model of an entry with known directions; its first step moves the weights by the penalty's gradient alone.

    It moves them by `interval` times the gradient, which is what makes up for the steps without a penalty.
    """
    return training_model(entry, config, 1.0, known=True, **penalty_alone())


def penalty_alone() -> dict[str, Any]:
    """Arguments of `compile` with which a step moves the weights by the penalty's gradient, and nothing else."""

    def nothing(labels, outputs):
        return 0.0 * ops.sum(outputs, axis=-1)

    return {"loss": nothing, "optimizer": keras.optimizers.SGD(1.0)}


def timed_training(config: BenchmarkConfig) -> dict[str, Any]:
    """Arguments of `compile` with which a step is timed: cross-entropy and Adam."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return {"loss": loss, "optimizer": keras.optimizers.Adam(), "jit_compile": config.jit_compile}


def training_model(
    entry: Entry, config: StepConfig, strength: float = STRENGTH, known: bool = False, **arguments: Any
) -> keras.Model:
    """The model of an entry as it is timed: cross-entropy and Adam, where `arguments` of `compile` say nothing else."""
    base = base_model(config)
    arguments = {**timed_training(config), **arguments}
    if entry.side is None:
        base.compile(**arguments)
        return base
    if entry.product is not None:
        seed = keras.random.SeedGenerator(config.seed)

        def draw(like):
            drawn = known_directions(like, 1) if known else jvpreg.probes.draw("gaussian", like, 1, seed)
            return drawn[0]

        model = autodiff.AutodiffModel(autodiff.twice_differentiable(base), entry.product, draw, strength)
        model.seed = seed  # tracked, so that it advances in a compiled step
        model.compile(**arguments)
        return model
    model = jvpreg.JacobianModel(base, seed=config.seed)
    model.compile(
        jacobian_regularizers=_regularizers(entry, strength, known),
        jacobian_interval=entry.interval,
        jacobian_fraction=entry.fraction,
        **arguments,
    )
    return model


def _regularizers(entry: Entry, strength: float, known: bool) -> list[jvpreg.regularizers.JacobianRegularizer]:
    """The penalty on the norm; or a constraint for each of its probes, which add up to the same penalty."""
    if not entry.constraints:
        assert entry.side is not None
        norm = KnownJacobianNorm if known else jvpreg.regularizers.JacobianNorm
        return [norm(strength, num_probes=entry.num_probes, side=entry.side, name="frobenius_norm_squared")]
    fields: list[Any] = [tangents.Rotation(), tangents.Scaling(), tangents.Brightness()]
    if known:
        fields = [KnownDirection(probe) for probe in range(entry.num_probes)]
    share = strength / entry.num_probes
    return [Invariant(fields[i], enforcement=share, name=f"invariant_{i}") for i in range(entry.num_probes)]
