"""The keys of `regularization`. Nothing here imports Keras, so that a typing error is told at once."""

from dataclasses import dataclass, field

from jsonargparse.typing import NonNegativeInt, PositiveInt

from experiments.config import DataConfig, Dropout, ModelConfig, OptimizerConfig
from experiments.kinds import PositiveFloat


@dataclass
class RegularizationConfig:
    """Train with dropout, decay or a bias-Jacobian penalty on the last convolution, on few examples a class."""

    data: DataConfig = field(default_factory=lambda: DataConfig("cifar10"))
    """Which images; `train_examples` is set by the study."""

    model: ModelConfig = field(default_factory=lambda: ModelConfig("vgg9", 16))
    """A VGG-n; `dropout` is set by the study."""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The same for all runs."""

    examples_per_class: list[PositiveInt] = field(default_factory=lambda: [50, 100, 500])
    """Images per class: one column of the table for each number."""

    seeds: list[NonNegativeInt] = field(default_factory=lambda: [0, 1])
    """Seeds of the weights and the batches; the examples are always the same."""

    dropout: list[Dropout] = field(default_factory=lambda: [0.5])
    """Rates of the dropout after the last convolution, a row for each."""

    bias_decay: list[PositiveFloat] = field(default_factory=lambda: [0.1])
    """Weights of the squared norm of the last convolution's bias (the offset of its normalization), a row for each."""

    bias_jacobian: list[PositiveFloat] = field(default_factory=lambda: [100.0])
    """Strengths of `BiasJacobianNorm` at the last convolution, for the label's logit, a row for each."""

    steps: PositiveInt = 1500
    """Training steps of every cell, rounded up to whole epochs."""

    batch_size: PositiveInt = 64
    """Examples in each step."""

    probed: PositiveInt = 512
    """Test images on which the bias-Jacobian of the trained model is measured."""

    jit_compile: bool = False
    """XLA; on CPU a plain TensorFlow graph is faster."""

    folder: str = "runs/regularization"
    """Where the files go; cells that it holds are not trained again."""
