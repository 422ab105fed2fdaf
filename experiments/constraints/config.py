"""The keys of `constraints`. Nothing here imports Keras, so that a typing error is told at once."""

from dataclasses import dataclass, field
from typing import Literal

from jsonargparse.typing import PositiveInt

from experiments.config import DataConfig, ModelConfig
from experiments.kinds import NonNegativeFloat, PositiveFloat


@dataclass
class ConstraintsConfig:
    """Train the same network without a constraint, with penalties on its violation, and with multipliers."""

    problem: Literal["monotone", "divergence", "derivative", "invariance"] = "monotone"
    """monotone: a regression on the diabetes patients of scikit-learn. divergence: a noisy field in the plane.
    derivative: a function of which few values are known, with and without its gradients. invariance: images, against
    augmentation."""

    data: DataConfig = field(default_factory=DataConfig)
    """The images of `invariance`."""

    model: ModelConfig = field(default_factory=lambda: ModelConfig("vgg4", 16))
    """The network of `invariance`; the others train two hidden layers of `width` units with tanh."""

    width: PositiveInt = 32
    """Units of each hidden layer."""

    steps: PositiveInt = 2000
    """Training steps; in `invariance`, those of the runs with a constraint."""

    measurements: PositiveInt = 10
    """How often the violation is measured during training."""

    batch_size: PositiveInt = 64
    """Examples in each step."""

    points: PositiveInt = 128
    """In `divergence`, where the constraint is not at the data: points at which it is looked at in each step."""

    learning_rate: PositiveFloat = 0.01
    """Learning rate of Adam at the first step; it falls to zero along a cosine."""

    strengths: list[NonNegativeFloat] = field(default_factory=lambda: [0.0, 1.0, 10.0, 100.0])
    """Strengths of the fixed penalties; 0 is the network without a constraint."""

    rho: PositiveFloat | None = 10.0
    """rho of the augmented Lagrangian; None trains none."""

    update_every: PositiveInt = 10
    """Steps from one update of the multipliers to the next."""

    examples: list[PositiveInt] = field(default_factory=lambda: [8, 16, 32, 64])
    """In `derivative`: how many points are known."""

    noise: NonNegativeFloat = 0.1
    """In `divergence`: the standard deviation of the noise on each component of the field."""

    angle: PositiveFloat = 15.0
    """In `invariance`: test images are turned by up to this many degrees, like augmented images."""

    shift: PositiveFloat = 1.0
    """In `invariance`: they are also moved by up to this many pixels."""

    seeds: PositiveInt = 3
    """Runs of each setting, with splits, noise and weights of their own."""

    folder: str | None = None
    """Where the files go; by default runs/constraints_PROBLEM."""
