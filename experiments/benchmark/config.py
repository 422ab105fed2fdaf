"""The keys of the benchmarks. Nothing here imports Keras, so that a typing error is told at once."""

from dataclasses import dataclass, field
from typing import Literal

from jsonargparse.typing import NonNegativeInt, PositiveInt

from experiments.config import ModelConfig
from experiments.kinds import PositiveFloat


@dataclass
class TimingConfig:
    """How calls are compiled, checked and timed."""

    batch_size: PositiveInt = 64
    """Examples in each step, or in each call."""

    jit_compile: bool = True
    """Compile by XLA on TensorFlow, by `jax.jit` on JAX, by `torch.compile` on Torch. Otherwise: a plain graph on
    TensorFlow, eager on JAX and Torch."""

    rounds: PositiveInt = 30
    """How often each entry is timed, in turn with the others."""

    warmup: NonNegativeInt = 2
    """Turns of each entry after the first call and before the rounds that count."""

    tolerance: PositiveFloat = 1e-4
    """Relative error (of a product; of a penalty or its gradient) above which an entry is wrong and is not timed."""

    seed: NonNegativeInt = 0
    """Seed of the inputs, the weights and the directions."""

    folder: str | None = None
    """Where the files go; by default runs/benchmark/STUDY-BACKEND-MODE."""


@dataclass
class BenchmarkConfig(TimingConfig):
    """A model on random images, and how often it is timed."""

    model: ModelConfig = field(default_factory=lambda: ModelConfig("vgg6", 32))
    """The architecture."""

    image_size: PositiveInt = 32
    """Height and width of the random images."""


@dataclass
class StepConfig(BenchmarkConfig):
    """Measure what a penalty on the Jacobian adds to a training step, on the backend that KERAS_BACKEND names."""

    batch_normalization: Literal["training", "inference"] = "training"
    """training: batch statistics, which are constant in jvpreg's tangents and move in autodiff's, so that the
    derivatives differ. inference: moving averages, with which all ways compute the same."""

    memory: bool = True
    """Measure the peak memory of each entry, in a process of its own."""

    memory_steps: PositiveInt = 3
    """Steps during which the peak memory is measured."""

    only: list[str] | None = None
    """Names of the entries to measure beside the plain step; all of them by default."""


@dataclass
class BiasesConfig(BenchmarkConfig):
    """Measure what penalties on bias-Jacobians add to a training step, on the backend that KERAS_BACKEND names."""

    model: ModelConfig = field(default_factory=lambda: ModelConfig("vgg6", 32, batch_normalization=False))
    """A VGG-n without normalization, whose convolutions have biases."""


@dataclass
class DistillConfig(BiasesConfig):
    """Measure what full-Jacobian and attention matching add to a training step, on the backend of KERAS_BACKEND."""

    teacher: ModelConfig = field(default_factory=lambda: ModelConfig("vgg9", 32, batch_normalization=False))
    """A VGG-n without normalization, of at least four stages, like the student, `model`."""


@dataclass
class WeightsConfig(BenchmarkConfig):
    """Measure what a product along each kernel of a model costs, on the backend that KERAS_BACKEND names."""

    num_probes: PositiveInt = 1
    """Directions of each weight, pushed at once."""


@dataclass
class ProbeConfig(BenchmarkConfig):
    """Measure what the health of the Jacobian costs: norms, singular values, ranks, in forward passes."""

    model: ModelConfig = field(default_factory=lambda: ModelConfig("vgg9", 16))
    """The architecture with few outputs, whose Jacobians the estimators materialize."""

    rounds: PositiveInt = 9
    """How often each entry is timed, in turn with the others."""

    warmup: NonNegativeInt = 1
    """Turns of each entry after the first call and before the rounds that count."""

    unet_image_size: PositiveInt = 32
    """Height and width of the images of the UNet, which has an output for each pixel; a multiple of 4."""

    unet_batch_size: PositiveInt = 8
    """Images of the UNet, whose Jacobians are left to iterations."""


@dataclass
class ProductsConfig(TimingConfig):
    """What the studies of `J u` on architectures of `verify` share."""

    batch_size: PositiveInt = 2
    """Examples in each call."""

    image_size: PositiveInt | None = None
    """Height and width of images, for the architectures that take images; by default the smallest that each takes."""

    rounds: PositiveInt = 15
    """How often each entry is timed, in turn with the others."""

    warmup: NonNegativeInt = 1
    """Turns of each entry after the first call and before the rounds that count."""

    tolerance: PositiveFloat = 1e-3
    """Relative error of a product above which an entry is wrong and is not timed. If autodiff in float32 without jit
    has a larger error, twice that error is allowed."""


@dataclass
class JvpConfig(ProductsConfig):
    """Measure what one Jacobian-vector product costs, on whole architectures and on the backend of KERAS_BACKEND."""

    only: list[str] | None = None
    """Names of the architectures, as keras.applications has them, or RNN and UNet; by default the 13 of the paper."""

    along: list[Literal["input", "weight"]] = field(default_factory=lambda: ["input", "weight"])
    """Along the input, and along the kernel in the middle of the model."""

    num_probes: PositiveInt = 1
    """Directions, pushed in one call."""

    time_limit: PositiveInt = 1800
    """Seconds that an architecture may take; its row has what was measured until then."""


@dataclass
class ProbesConfig(ProductsConfig):
    """Measure what several Jacobian-vector products at one point cost, on the backend that KERAS_BACKEND names."""

    architecture: str = "VGG16"
    """Name of the architecture, as in `verify`."""

    counts: list[PositiveInt] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32, 64])
    """Numbers of directions, pushed in one call."""


@dataclass
class IterateConfig(ProductsConfig):
    """Measure what Jacobian-vector products at one point, each of which waits for the one before, cost."""

    architecture: str = "VGG16"
    """Name of the architecture, as in `verify`."""

    counts: list[PositiveInt] = field(default_factory=lambda: [1, 4, 16])
    """Numbers of products, at least two."""


@dataclass
class LayersConfig(TimingConfig):
    """Measure how much slower a layer with its product is than the layer alone, layer by layer, on the backend that
    KERAS_BACKEND names."""

    batch_size: PositiveInt = 32
    """Images, or sequences."""

    image_size: PositiveInt = 32
    """Height and width of the images."""

    channels: PositiveInt = 32
    """Channels of the images, before and after a layer."""

    sequence_length: PositiveInt = 64
    """Steps of the sequences."""

    units: PositiveInt = 128
    """Numbers in each step of a sequence, before and after a layer; a multiple of 8, the heads of attention."""

    num_probes: PositiveInt = 1
    """Directions, pushed at once."""

    only: list[str] | None = None
    """Names of the layers to measure; all of them by default."""


@dataclass
class MemoryConfig(BenchmarkConfig):
    """Measure the memory of a frozen model and its products beside that of plain training, each in a process of its
    own, on the processor, on the backend that KERAS_BACKEND names."""

    batch_size: PositiveInt = 256
    """Images in each call: enough that their activations stand out from the noise of a few megabytes."""

    num_probes: PositiveInt = 8
    """Directions of the entry with several products at once."""


@dataclass
class ScaleConfig(TimingConfig):
    """Measure how the cost of `f(x)` and `J u` grows with batch, width, depth and probes, one at a time around a base
    point, for a chain of convolutions, on the backend that KERAS_BACKEND names."""

    batch_size: PositiveInt = 16
    """Images at the base point."""

    width: PositiveInt = 32
    """Channels at the base point."""

    depth: PositiveInt = 4
    """Convolutions at the base point."""

    num_probes: PositiveInt = 1
    """Directions at the base point."""

    batch_sizes: list[PositiveInt] = field(default_factory=lambda: [4, 8, 16, 32, 64])
    """Images of each point of the first panel."""

    widths: list[PositiveInt] = field(default_factory=lambda: [8, 16, 32, 64, 128])
    """Channels of each point of the second panel."""

    depths: list[PositiveInt] = field(default_factory=lambda: [1, 2, 4, 8, 16])
    """Convolutions of each point of the third panel."""

    probes: list[PositiveInt] = field(default_factory=lambda: [1, 2, 4, 8, 16])
    """Directions of each point of the fourth panel."""

    image_size: PositiveInt = 16
    """Height and width of the images."""
