"""The architectures: those of Balestriero & Baraniuk (2021), and a member of each family of `keras.applications`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import keras
from keras import layers

from experiments.errors import ExperimentError

NUM_CLASSES = 10


@dataclass(frozen=True)
class Architecture:
    """One model to verify.

    Attributes:
        name: in the table, and of the key `only`.
        input_shape: without the batch; the smallest that it takes.
        make: returns the model, in the dtype that Keras is set to.
        paper: whether Balestriero & Baraniuk time it.
    """

    name: str
    input_shape: tuple[int, ...]
    make: Callable[[tuple[int, ...]], keras.Model]
    paper: bool = False

    def __reduce__(self):
        """By its name, for another process: a function within a function cannot be pickled."""
        return find, (self.name,)


def rnn(input_shape: tuple[int, ...]) -> keras.Model:
    """A simple recurrent layer and an LSTM on it."""
    x = keras.Input(input_shape)
    y = layers.LSTM(32)(layers.SimpleRNN(32, return_sequences=True)(x))
    return keras.Model(x, layers.Dense(NUM_CLASSES)(y))


def unet(input_shape: tuple[int, ...]) -> keras.Model:
    """Two levels down by max pooling and up again, joined by concatenation; the logits are those of each pixel."""

    def block(y, filters):
        for _ in range(2):
            y = layers.Conv2D(filters, 3, padding="same", use_bias=False)(y)
            y = layers.ReLU()(layers.BatchNormalization()(y))
        return y

    x = keras.Input(input_shape)
    first = block(x, 8)
    second = block(layers.MaxPooling2D()(first), 16)
    y = block(layers.MaxPooling2D()(second), 32)
    for skipped, filters in ((second, 16), (first, 8)):
        y = layers.Conv2DTranspose(filters, 2, strides=2)(y)
        y = block(layers.Concatenate()([skipped, y]), filters)
    return keras.Model(x, layers.Conv2D(NUM_CLASSES, 1)(y))


def _application(name: str, size: int = 32, paper: bool = False) -> Architecture:
    def make(input_shape):
        return getattr(keras.applications, name)(
            weights=None, input_shape=input_shape, classes=NUM_CLASSES, classifier_activation=None
        )

    return Architecture(name, (size, size, 3), make, paper)


ARCHITECTURES = (
    Architecture("RNN", (16, 8), rnn, paper=True),
    Architecture("UNet", (16, 16, 3), unet, paper=True),
    _application("VGG16", paper=True),
    _application("VGG19", paper=True),
    _application("InceptionV3", 75, paper=True),
    _application("ResNet50", paper=True),
    _application("ResNet101", paper=True),
    _application("ResNet152", paper=True),
    _application("EfficientNetB0", paper=True),
    _application("EfficientNetB1", paper=True),
    _application("DenseNet121", paper=True),
    _application("DenseNet169", paper=True),
    _application("DenseNet201", paper=True),
    _application("ResNet50V2"),
    _application("MobileNet"),
    _application("MobileNetV2"),
    _application("MobileNetV3Small"),
    _application("EfficientNetV2B0"),
    _application("Xception", 71),
    _application("ConvNeXtTiny"),
    _application("NASNetMobile"),
    _application("InceptionResNetV2", 75),
)


def named(key: str, names: Sequence[str]) -> list[Architecture]:
    """The architectures of these names, in the order of the table.

    Args:
        key: of the configuration, which an error names.
        names: of architectures.

    Raises:
        ExperimentError: where a name is not known.
    """
    known = [architecture.name for architecture in ARCHITECTURES]
    for name in names:
        if name not in known:
            raise ExperimentError(f"{key}: there is no architecture {name!r}. Expected names among {', '.join(known)}.")
    return [architecture for architecture in ARCHITECTURES if architecture.name in names]


def find(name: str) -> Architecture:
    """The architecture of that name."""
    return next(architecture for architecture in ARCHITECTURES if architecture.name == name)
