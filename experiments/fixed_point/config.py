"""The keys of `fixed_point`. Nothing here imports Keras, so that a typing error is told at once."""

from dataclasses import dataclass, field

from jsonargparse.typing import NonNegativeInt, PositiveInt

from experiments.config import DataConfig, OptimizerConfig
from experiments.kinds import NonNegativeFloat, PositiveFloat


@dataclass
class FixedPointConfig:
    """Train a fixed-point network at several strengths of the penalty; measure its gradients and its memory."""

    data: DataConfig = field(default_factory=DataConfig)
    """The images."""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """How the weights move."""

    width: PositiveInt = 16
    """Channels of the fixed point, which has half the height and width of the image."""

    tolerance: PositiveFloat = 1e-3
    """Tolerance of the solves in training."""

    max_iterations: PositiveInt = 30
    """Largest number of iterations of each solve in training."""

    strengths: list[NonNegativeFloat] = field(default_factory=lambda: [0.0, 1e-3])
    """Strengths of the penalty `strength * mean(||df/dz||_F^2)`; 0 is the plain model."""

    seeds: list[NonNegativeInt] = field(default_factory=lambda: [0])
    """Seeds: one run for each, at each strength."""

    epochs: PositiveInt = 5
    """Passes over the training data."""

    batch_size: PositiveInt = 64
    """Examples in each step."""

    probed: PositiveInt = 16
    """Test images on which the spectral radius is measured."""

    evaluated: PositiveInt = 1000
    """Test images on which the accuracy is measured."""

    tolerances: list[PositiveFloat] = field(default_factory=lambda: [1e-1, 1e-2, 1e-4, 1e-6, 1e-8])
    """Tolerances at which the gradient is measured, in float64, on as many training images as are probed."""

    depths: list[PositiveInt] = field(default_factory=lambda: [5, 20, 40])
    """Iterations at which the memory of a training step is measured."""

    memory_batch_size: PositiveInt = 256
    """Examples in each of these steps."""

    folder: str = "runs/fixed_point"
    """Where the files go."""
