"""Every key of a study's YAML file. Nothing here imports Keras, so that a typing error is reported at once."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from jsonargparse.typing import NonNegativeInt, PositiveInt

from experiments.kinds import Dropout, NonNegativeFloat, PositiveFloat, PositiveFraction


@dataclass
class DataConfig:
    """Which images, and how many of them."""

    name: Literal["digits", "cifar10", "cifar100"] = "digits"
    """digits comes with scikit-learn; the others through tensorflow-datasets, under TFDS_DATA_DIR."""

    train_examples: PositiveInt | None = None
    """Train on a fixed, class-balanced subset of this many examples; by default on all."""

    augment: bool = True
    """Random shifts by up to 4 pixels and left-right flips. Digits are never augmented."""


@dataclass
class ModelConfig:
    """Which architecture, and how wide."""

    name: Literal["linear", "mlp", "vgg4", "vgg6", "vgg9", "vgg11", "resnet20"] = "vgg4"
    """VGG-n has n convolutions, each with batch normalization, and one dense head."""

    width: PositiveInt = 64
    """Channels of the first stage, or units of each hidden layer of the MLP. A linear model has none."""

    batch_normalization: bool = True
    """Batch normalization after each convolution; without it, the convolutions have biases."""

    dropout: Dropout = 0.0
    """Rate of the dropout on the last features; in a convolutional network, before they are averaged."""


@dataclass
class OptimizerConfig:
    """How the weights move. The learning rate falls to zero along a cosine, step by step."""

    name: Literal["adam", "sgd"] = "adam"
    """sgd has Nesterov momentum 0.9."""

    learning_rate: PositiveFloat = 1e-3
    """The highest learning rate, at the first step."""

    weight_decay: NonNegativeFloat = 0.0
    """Decoupled decay of the kernels; biases and batch normalization are left alone."""


@dataclass
class JacobianConfig:
    """The penalty `strength * mean(||J||_F^2)` on the Jacobian of the logits at the input pixels."""

    strength: NonNegativeFloat = 0.0
    """0 trains the plain model, with no penalty at all."""

    num_probes: PositiveInt = 1
    """Random directions for each example in each step."""

    side: Literal["input", "output"] = "input"
    """Probe by `J u` with u like the input, or by `J^T v` with v like the logits."""

    interval: PositiveInt = 1
    """k: compute the penalty in every k-th step, multiplied by k."""

    fraction: PositiveFraction = 1.0
    """Compute the penalty on this fraction of each batch."""


@dataclass
class ProbeConfig:
    """How often, and on how many test images, the health of the Jacobian is measured."""

    examples: PositiveInt = 64
    """The number of test images, taken from the first on."""

    every_epochs: PositiveInt = 1
    """Measure after every n-th epoch."""

    singular_values: PositiveInt = 5
    """How many of the largest singular values are measured; at most the number of classes."""

    pictures_every: PositiveInt = 5
    """Draw the pictures after every n-th measurement, and at the end."""


@dataclass
class GuardConfig:
    """When the mean norm of the Jacobian counts as lost, compared with the median of the last five measurements."""

    action: Literal["warn", "stop", "off"] = "warn"
    """stop ends training, warn goes on; both warn, and say in which layer it began. off: there is no guard."""

    explosion: PositiveFloat = 10.0
    """A norm above this many times the median counts as an explosion."""

    collapse: PositiveFloat = 0.1
    """A norm below this fraction of the median counts as a collapse."""


@dataclass
class RobustnessConfig:
    """The disturbances of the report after training; all sizes in pixel units, white being 1."""

    examples: PositiveInt = 1000
    """The number of test images, taken from the first on."""

    noise: list[PositiveFloat] = field(default_factory=lambda: [0.05, 0.1, 0.2])
    """Standard deviations of the Gaussian noise."""

    epsilons: list[PositiveFloat] = field(default_factory=lambda: [2 / 255, 8 / 255])
    """Radii of the L-infinity balls that FGSM and PGD may search."""

    pgd_steps: PositiveInt = 10
    """Gradient steps of PGD."""

    pgd_step_size: PositiveFloat = 0.25
    """Length of a PGD step, as a fraction of epsilon."""


@dataclass
class WandbConfig:
    """Where the run is tracked."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto is online if there is a W&B login and a network, otherwise offline."""

    project: str = "jvpreg"
    """The W&B project."""


@dataclass
class HostsConfig:
    """Several machines that train one model, on JAX: the same command on each, except for the index."""

    count: PositiveInt = 1
    """The number of machines, or of processes on one."""

    index: NonNegativeInt = 0
    """The number of this one, from 0. Host 0 alone writes the run folder and tracks the run."""

    address: str | None = None
    """The address of host 0, as HOST:PORT; the port must be free there."""

    timeout: PositiveInt = 100
    """How many seconds a host waits for the others at the start, and for a sign of life later."""


@dataclass
class TrainConfig:
    """Train one model and report its Jacobian and its robustness."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    jacobian: JacobianConfig = field(default_factory=JacobianConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    robustness: RobustnessConfig = field(default_factory=RobustnessConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    hosts: HostsConfig = field(default_factory=HostsConfig)

    epochs: PositiveInt = 10
    """Passes over the training data."""

    batch_size: PositiveInt = 128
    """Examples in each step."""

    seed: NonNegativeInt = 0
    """Seed of the weights, the batches, the probes, the noise and the attacks."""

    jit_compile: bool | Literal["auto"] = "auto"
    """XLA; auto leaves the choice to Keras."""

    precision: Literal["float32", "mixed_float16", "mixed_bfloat16"] = "float32"
    """The Keras dtype policy."""

    devices: PositiveInt = 1
    """Share each batch among this many GPUs, on TensorFlow and JAX; if there is none, among parts of the CPU. With
    several hosts, each has this many."""

    layout: dict[str, list[str | None]] | None = None
    """Split these variables over the devices instead, on JAX: a dict from a regular expression of their paths to one
    entry for each axis: "model" if it is split, otherwise null."""

    folder: str | None = None
    """The run folder; by default one under runs/, named after data, model, strength and seed."""

    resume: bool | Literal["auto"] = False
    """Continue the interrupted run that the folder holds; auto starts one if it holds none."""


@dataclass
class CompareConfig:
    """Train the same configuration at several strengths of the penalty and set the results side by side."""

    train: TrainConfig = field(default_factory=TrainConfig)
    """The configuration that all runs share; strength, folder and resume are set by the comparison."""

    strengths: list[NonNegativeFloat] = field(default_factory=lambda: [0.0, 0.01])
    """One run for each strength; 0 is the plain model."""

    timed_steps: PositiveInt = 20
    """Training steps that are timed for each model, in turn with the others, after training."""

    folder: str | None = None
    """Where the runs and the comparison go; by default one under runs/, named after data and model."""


def as_plain_dict(config: Any, without: Sequence[str] = ()) -> dict[str, Any]:
    """A configuration as nested dicts of plain values, for YAML and W&B; without some keys."""
    # Through JSON, because the restricted numbers of jsonargparse have classes of their own.
    plain = json.loads(json.dumps(dataclasses.asdict(config)))
    return {key: value for key, value in plain.items() if key not in without}
