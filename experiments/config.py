"""Every key of a study's YAML file. Nothing here imports Keras, so that a typing error is told at once."""

import dataclasses
import json
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
    """Train on a fixed, class-balanced subset of this many examples; on all of them by default."""

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
    """After each convolution; if not, the convolutions have biases."""

    dropout: Dropout = 0.0
    """Rate of the dropout on the last features, of a convolutional network before they are averaged."""


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
    """Random directions an example and step."""

    side: Literal["input", "output"] = "input"
    """Probe by `J u` with u like the input, or by `J^T v` with v like the logits."""

    interval: PositiveInt = 1
    """Compute the penalty every so many steps, multiplied by as many."""

    fraction: PositiveFraction = 1.0
    """Compute the penalty on this part of each batch."""


@dataclass
class ProbeConfig:
    """How often, and on how many test images, the health of the Jacobian is measured."""

    examples: PositiveInt = 64
    """The first so many test images."""

    every_epochs: PositiveInt = 1
    """Measure after every so many epochs."""

    singular_values: PositiveInt = 5
    """How many of the largest are measured; at most as many as there are classes."""

    pictures_every: PositiveInt = 5
    """Draw the pictures anew after every so many measurements, and at the end."""


@dataclass
class GuardConfig:
    """When the mean norm of the Jacobian counts as lost: against the median of the last five measurements."""

    action: Literal["warn", "stop", "off"] = "warn"
    """What to do about it; either way it is said in which layer it began."""

    explosion: PositiveFloat = 10.0
    """How many times the reference it may be."""

    collapse: PositiveFloat = 0.1
    """Which part of the reference it must be."""


@dataclass
class RobustnessConfig:
    """The disturbances of the report after training; all sizes in pixel units, white being 1."""

    examples: PositiveInt = 1000
    """Evaluate on the first so many test images."""

    noise: list[PositiveFloat] = field(default_factory=lambda: [0.05, 0.1, 0.2])
    """Standard deviations of the Gaussian noise."""

    epsilons: list[PositiveFloat] = field(default_factory=lambda: [2 / 255, 8 / 255])
    """Radii of the L-infinity balls that FGSM and PGD may search."""

    pgd_steps: PositiveInt = 10
    """Gradient steps of PGD."""

    pgd_step_size: PositiveFloat = 0.25
    """Length of a PGD step, as a part of epsilon."""


@dataclass
class WandbConfig:
    """Where the run is tracked."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto is online where a W&B login is found and offline where there is none."""

    project: str = "jvpreg"
    """The W&B project."""


@dataclass
class HostsConfig:
    """Several machines that train one model, on JAX: the same command on each, but for the index."""

    count: PositiveInt = 1
    """How many machines, or processes of one."""

    index: NonNegativeInt = 0
    """Which of them this is, from 0. Host 0 alone writes the run folder and tracks the run."""

    address: str | None = None
    """Where the others find host 0, as HOST:PORT; the port is free there."""

    timeout: PositiveInt = 100
    """So many seconds a host waits for the others: at the start, and in between for a sign of life."""


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
    """Examples a step."""

    seed: NonNegativeInt = 0
    """Seed of the weights, the batches, the probes, the noise and the attacks."""

    jit_compile: bool | Literal["auto"] = "auto"
    """XLA; auto leaves the choice to Keras."""

    precision: Literal["float32", "mixed_float16", "mixed_bfloat16"] = "float32"
    """The Keras dtype policy."""

    devices: PositiveInt = 1
    """Share each batch among so many GPUs, or parts of the CPU where there is none, on TensorFlow and JAX. Of several
    hosts each has so many."""

    layout: dict[str, list[str | None]] | None = None
    """Split these variables over the devices instead, on JAX: from regular expressions of their paths to an entry an
    axis, "model" where it is split and null where not."""

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
    """One run for each; 0 is the plain model."""

    timed_steps: PositiveInt = 20
    """Training steps of each model that are timed, in turn with the others, after training."""

    folder: str | None = None
    """Where the runs and the comparison go; by default one under runs/, named after data and model."""


def as_plain_dict(config: Any) -> dict[str, Any]:
    """A configuration as nested dicts of plain values, for YAML and W&B."""
    # Through JSON, because jsonargparse's restricted numbers are classes of their own.
    return json.loads(json.dumps(dataclasses.asdict(config)))
