"""The layers that `benchmark layers` measures, one a row."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import keras
import numpy as np
from keras import layers

from experiments.benchmark.config import LayersConfig

DROPPED = 0.5
HEADS = 8


@dataclass(frozen=True)
class Case:
    """One layer.

    Attributes:
        name: of the layer.
        data: what it is applied to: images `(B, H, W, C)` or sequences `(B, T, units)`.
        make: makes it, given the sizes.
        num_inputs: how many of them it takes.
        apply: applies it to them.
        expected: `f(x)` and `J u`, given what was received for `f(x)`, the inputs and the directions, where numbers
            are drawn that no reference can draw again; it runs in training mode. None: by autodiff, at inference.
    """

    name: str
    data: Literal["image", "sequence"]
    make: Callable[[LayersConfig], keras.Layer]
    num_inputs: int = 1
    apply: Callable[[keras.Layer, list], Any] = lambda layer, inputs: layer(inputs if len(inputs) > 1 else inputs[0])
    expected: Callable[[np.ndarray, list, list], tuple[np.ndarray, np.ndarray]] | None = None

    def input_shape(self, config: LayersConfig) -> tuple[int, ...]:
        """Of one input, without the batch."""
        if self.data == "sequence":
            return (config.sequence_length, config.units)
        return (config.image_size, config.image_size, config.channels)

    def model(self, config: LayersConfig) -> keras.Model:
        """A model of this one layer, in the dtype that Keras is set to."""
        inputs = [keras.Input(self.input_shape(config)) for _ in range(self.num_inputs)]
        return keras.Model(inputs, self.apply(self.make(config), inputs))


def dropped(y: np.ndarray, xs: list, us: list) -> tuple[np.ndarray, np.ndarray]:
    """What dropout returns, and its product, by the mask that shows in the output."""
    slope = (y != 0) / (1 - DROPPED)
    return slope * xs[0], slope * us[0]


CASES = (
    Case("Dense", "sequence", lambda c: layers.Dense(c.units)),
    Case("Conv2D", "image", lambda c: layers.Conv2D(c.channels, 3, padding="same")),
    Case("DepthwiseConv2D", "image", lambda c: layers.DepthwiseConv2D(3, padding="same")),
    Case("SeparableConv2D", "image", lambda c: layers.SeparableConv2D(c.channels, 3, padding="same")),
    Case("Conv2DTranspose", "image", lambda c: layers.Conv2DTranspose(c.channels, 2, strides=2)),
    Case("BatchNormalization", "image", lambda c: layers.BatchNormalization()),
    Case("GroupNormalization", "image", lambda c: layers.GroupNormalization(min(8, c.channels))),
    Case("LayerNormalization", "sequence", lambda c: layers.LayerNormalization()),
    Case("ReLU", "image", lambda c: layers.ReLU()),
    Case("LeakyReLU", "image", lambda c: layers.LeakyReLU()),
    Case("GELU", "image", lambda c: layers.Activation("gelu")),
    Case("SiLU", "image", lambda c: layers.Activation("silu")),
    Case("Softmax", "sequence", lambda c: layers.Softmax()),
    Case("MaxPooling2D", "image", lambda c: layers.MaxPooling2D()),
    Case("AveragePooling2D", "image", lambda c: layers.AveragePooling2D(2)),
    Case("GlobalAveragePooling2D", "image", lambda c: layers.GlobalAveragePooling2D()),
    Case("UpSampling2D", "image", lambda c: layers.UpSampling2D()),
    Case("Dropout", "image", lambda c: layers.Dropout(DROPPED, seed=c.seed), expected=dropped),
    Case("Add", "image", lambda c: layers.Add(), num_inputs=2),
    Case("Concatenate", "image", lambda c: layers.Concatenate(), num_inputs=2),
    Case("SimpleRNN", "sequence", lambda c: layers.SimpleRNN(c.units, return_sequences=True)),
    Case("LSTM", "sequence", lambda c: layers.LSTM(c.units, return_sequences=True)),
    Case("GRU", "sequence", lambda c: layers.GRU(c.units, return_sequences=True)),
    Case(
        "MultiHeadAttention",
        "sequence",
        lambda c: layers.MultiHeadAttention(HEADS, c.units // HEADS),
        apply=lambda layer, inputs: layer(inputs[0], inputs[0]),
    ),
)
