"""The keys of `health`. Nothing here imports Keras, so that a typing error is told at once."""

from dataclasses import dataclass, field

from jsonargparse.typing import PositiveInt

from experiments.config import TrainConfig
from experiments.kinds import NonNegativeFloat, PositiveFloat


@dataclass
class HealthConfig:
    """Train healthy and unhealthy settings, and see when the loss and when the Jacobian tells them apart."""

    train: TrainConfig = field(default_factory=TrainConfig)
    """The healthy setting; the others differ from it in one key each. Probe, guard and W&B keys are not used."""

    healthy_runs: PositiveInt = 4
    """Seeds of the healthy runs. A run is told apart once it leaves their range."""

    large_learning_rate: PositiveFloat = 0.1
    """Learning rate of the run that learns too fast."""

    strong_penalty: NonNegativeFloat = 0.3
    """Strength of the penalty of the run that is regularized too much."""

    loss_examples: PositiveInt = 512
    """Test images on which the loss is measured."""

    every_batches: PositiveInt = 20
    """Measure after every n-th batch, and after the first, second, fourth, eighth and so on."""

    folder: str = "runs/health"
    """Where the files go."""
