"""The network: an injected image, the fixed point of one convolution, and a linear head."""

import keras
from keras import layers

import jvpreg

LAYER = "equilibrium"


def cell(shape: tuple[int, int, int]) -> keras.Model:
    """`relu(normalize(conv(z) + x))`, for x and z of the same shape; normalized in groups, within an example."""
    x, z = keras.Input(shape, name="x"), keras.Input(shape, name="z")
    features = layers.Add()([layers.Conv2D(shape[-1], 3, padding="same", name="conv")(z), x])
    features = layers.GroupNormalization(4, name="norm")(features)
    return keras.Model([x, z], layers.ReLU()(features), name="cell")


def build(image_shape: tuple[int, int, int], num_classes: int, width: int, **arguments) -> keras.Model:
    """A model `(B, H, W, C)` to logits `(B, num_classes)`; `arguments` are those of `FixedPoint`.

    With `unrolled=k`, k plain iterations of the same cell from z = 0 instead.
    """
    pixels = keras.Input(image_shape, name="pixels")
    x = layers.Rescaling(4.0, offset=-2.0)(pixels)
    x = layers.Conv2D(width, 3, strides=2, padding="same", name="inject")(x)
    step = cell(x.shape[1:])
    if unrolled := arguments.pop("unrolled", 0):
        z = layers.Rescaling(0.0)(x)
        for _ in range(unrolled):
            z = step([x, z])
    else:
        z = jvpreg.layers.FixedPoint(step, name=LAYER, **arguments)(x)
    features = layers.GlobalAveragePooling2D()(z)
    return keras.Model(pixels, layers.Dense(num_classes, name="logits")(features))
