"""The keys of `gan`. Nothing here imports Keras, so that a typing error is told at once."""

from dataclasses import dataclass, field

from jsonargparse.typing import NonNegativeInt, PositiveInt

from experiments.kinds import NonNegativeFloat, PositiveFloat


@dataclass
class GanConfig:
    """Train a Wasserstein GAN on the digits of scikit-learn, with and without a gradient penalty on its critic."""

    strengths: list[NonNegativeFloat] = field(default_factory=lambda: [0.0, 10.0])
    """Strengths of the penalty, which is the mean of `(‖∇f‖ − 1)²` between real and generated digits; a row for each,
    and 0 is no penalty."""

    seeds: list[NonNegativeInt] = field(default_factory=lambda: [0, 1, 2])
    """Seeds of the weights, the batches and the noise."""

    epochs: PositiveInt = 30
    """Passes over the digits; the generator takes a step for each batch."""

    critic_steps: PositiveInt = 3
    """Steps of the critic for each step of the generator, each with real digits of its own."""

    batch_size: PositiveInt = 64
    """Real digits in each step, and as many generated ones."""

    width: PositiveInt = 128
    """Units of each of the two hidden layers of both networks."""

    noise: PositiveInt = 16
    """Numbers from which a digit is generated."""

    learning_rate: PositiveFloat = 0.001
    """Of both networks' Adam."""

    snapshots: PositiveInt = 5
    """How often the networks are looked at, evenly over the epochs; also before the first one."""

    shown: PositiveInt = 16
    """Digits in each picture of the first seed, of the same noise."""

    folder: str = "runs/gan"
    """Where the files go; cells that it holds are not trained again."""
