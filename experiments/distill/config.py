"""The keys of `distill`. Nothing here imports Keras, so that a typing error is told at once."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from jsonargparse.typing import NonNegativeInt, PositiveInt

from experiments.config import ModelConfig, OptimizerConfig
from experiments.kinds import NonNegativeFloat

Method = Literal[
    "cross-entropy",
    "activation",
    "i-Jacobian",
    "attention",
    "i-Jacobian + attention",
    "full-Jacobian",
    "full-Jacobian + attention",
]


@dataclass
class WeightsConfig:
    """Weights of the matching losses, beside a cross-entropy of weight 1."""

    activation: NonNegativeFloat = 0.3
    """Weight of the squared distance of the logits."""

    jacobian: NonNegativeFloat = 0.003
    """Weight of the squared distance of the input-Jacobians of the label's logit, for pixels with white = 1."""

    bias_jacobian: NonNegativeFloat = 0.1
    """Weight of the squared distance of the bias-Jacobians, summed over channels."""

    attention: NonNegativeFloat = 0.003
    """Weight of the squared distance of the attention maps."""


@dataclass
class DistillConfig:
    """Distill a teacher trained on all images into students that see few of them, by each of seven methods."""

    teacher: str = "runs/cifar10_vgg9/plain"
    """Folder of a finished `train` run of a VGG-n, whose data set is used."""

    student: ModelConfig = field(default_factory=lambda: ModelConfig("vgg11", 16))
    """A VGG-n."""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The same for all students."""

    weights: WeightsConfig = field(default_factory=WeightsConfig)
    """The same for all students."""

    methods: list[Method] = field(default_factory=lambda: list(get_args(Method)))
    """The rows of the table."""

    examples_per_class: list[PositiveInt] = field(default_factory=lambda: [50, 100, 500, 1000, 5000])
    """Images per class: one column of the table for each number."""

    seeds: list[NonNegativeInt] = field(default_factory=lambda: [0, 1])
    """Seeds of the weights and the batches; the examples are always the same."""

    student_sizes: list[Literal["vgg4", "vgg6", "vgg9", "vgg11"]] = field(default_factory=list)
    """Students that are compared by the last method, at the first number of examples."""

    stages: list[PositiveInt] = field(default_factory=lambda: [2, 3, 4])
    """Stages whose last convolutions are matched by bias-Jacobian and attention. The first stage has the size of the
    image, each further one half the size of the one before."""

    augment: bool = True
    """Random shifts and flips. Without them, what the losses see of the teacher is computed once for all epochs."""

    steps: PositiveInt = 1500
    """Training steps of every cell, rounded up to whole epochs."""

    batch_size: PositiveInt = 64
    """Examples in each step."""

    evaluations: PositiveInt = 10
    """How often accuracy and angle are measured in training, for the curves."""

    probed: PositiveInt = 512
    """Test images on which these are measured; the accuracy in the table is on all of them."""

    jit_compile: bool = False
    """XLA; on CPU a plain TensorFlow graph is faster."""

    folder: str = "runs/distill"
    """Where the files go; cells that it holds are not trained again."""
