"""The keys of `sparing`. Nothing here imports Keras, so that a typing error is told at once."""

from dataclasses import dataclass, field

from jsonargparse.typing import NonNegativeInt, PositiveInt

from experiments.config import DataConfig, ModelConfig, OptimizerConfig, PositiveFraction
from experiments.kinds import PositiveFloat


@dataclass
class SparingConfig:
    """Train with the penalty on every example of every step, on every so many steps, and on a part of each batch."""

    data: DataConfig = field(default_factory=lambda: DataConfig("cifar10", 5000))
    """Which images."""

    model: ModelConfig = field(default_factory=lambda: ModelConfig("vgg6", 16))
    """The architecture."""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The same for all runs."""

    strength: PositiveFloat = 0.001
    """Strength of the penalty, which is the mean of `‖J‖_F²`, by one random direction for each example."""

    intervals: list[PositiveInt] = field(default_factory=lambda: [4])
    """k: the penalty in every k-th step; a row for each."""

    fractions: list[PositiveFraction] = field(default_factory=lambda: [0.25])
    """The penalty on this fraction of each batch; a row for each."""

    seeds: list[NonNegativeInt] = field(default_factory=lambda: [0, 1, 2])
    """Seeds of the weights, the batches and the directions; the examples are always the same."""

    epochs: PositiveInt = 8
    """Passes over the training data."""

    batch_size: PositiveInt = 64
    """Examples in each step."""

    probed: PositiveInt = 512
    """Test images on which the whole Jacobian of the trained model is measured."""

    jit_compile: bool = False
    """XLA; on CPU a plain TensorFlow graph is faster."""

    folder: str = "runs/sparing"
    """Where the files go; cells that it holds are not trained again."""
