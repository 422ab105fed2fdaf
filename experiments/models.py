"""The architectures: functional Keras models from pixels in [0, 1] to logits.

Each model normalizes its input itself, so that Jacobians, noise and attacks are all in pixel units.
"""

import keras
import numpy as np
from keras import layers

from experiments.config import ModelConfig
from experiments.data import Dataset, channel_moments

# Convolutions in each stage; stages are parted by 2x2 max pooling and their width doubles up to eight times.
VGG_STAGES = {"vgg4": (1, 1, 1, 1), "vgg6": (1, 1, 2, 2), "vgg9": (1, 1, 2, 2, 3), "vgg11": (1, 2, 2, 3, 3)}
RESNET20_BLOCKS = (3, 3, 3)
BATCH_MOMENTUM = 0.9  # of the moving statistics; Keras' 0.99 lags by hundreds of steps, which is epochs of the digits


def build(config: ModelConfig, dataset: Dataset) -> keras.Model:
    """The model for a data set, with its normalization set to the training images.

    Args:
        config: architecture and width.
        dataset: gives the image shape, the number of classes, and the mean and variance of each channel.

    Returns:
        A functional model `(B, H, W, C) -> (B, num_classes)`. Its convolutions are `conv1`, `conv2`, ...
        and its last layer is `logits`, which stays in float32 under mixed precision.
    """
    pixels = keras.Input(dataset.image_shape, name="pixels")
    mean, variance = channel_moments(dataset.train)
    features = normalization(mean, variance)(pixels)
    if config.name == "linear":
        features = layers.Flatten(name="flatten")(features)
    elif config.name == "mlp":
        features = _hidden_layers(features, config.width)
    elif config.name == "resnet20":
        features = _resnet(features, config)
    else:
        features = _vgg(features, config, VGG_STAGES[config.name])
    if config.dropout:
        features = layers.Dropout(config.dropout, name="dropout")(features)
    if len(features.shape) == 4:
        features = layers.GlobalAveragePooling2D(name="average")(features)
    logits = layers.Dense(dataset.num_classes, dtype="float32", name="logits")(features)
    return keras.Model(pixels, logits, name=config.name)


def normalization(mean: np.ndarray, variance: np.ndarray) -> layers.Normalization:
    """Standardize each channel, given its mean and variance, both `(C,)`.

    The constants are Python floats so that the layer survives saving.
    """
    return layers.Normalization(mean=mean.tolist(), variance=variance.tolist(), name="normalization")


def _hidden_layers(features: keras.KerasTensor, width: int) -> keras.KerasTensor:
    features = layers.Flatten(name="flatten")(features)
    for number in (1, 2):
        features = layers.Dense(width, kernel_initializer="he_normal", name=f"dense{number}")(features)
        features = layers.ReLU(name=f"relu{number}")(features)
    return features


def _vgg(features: keras.KerasTensor, config: ModelConfig, stages: tuple[int, ...]) -> keras.KerasTensor:
    number = 0
    for stage, convolutions in enumerate(stages):
        if stage > 0 and min(features.shape[1:3]) >= 2:  # an 8x8 digit is down to one pixel after three
            features = layers.MaxPooling2D(2, name=f"pool{stage}")(features)
        for _ in range(convolutions):
            number += 1
            features = _convolution(
                features, config.width * min(2**stage, 8), number, normalized=config.batch_normalization
            )
            features = layers.ReLU(name=f"relu{number}")(features)
    return features


def _resnet(features: keras.KerasTensor, config: ModelConfig) -> keras.KerasTensor:
    width, normalized = config.width, config.batch_normalization
    features = layers.ReLU(name="relu1")(_convolution(features, width, number=1, normalized=normalized))
    number = 1
    for stage, blocks in enumerate(RESNET20_BLOCKS):
        for block in range(blocks):
            strides = 2 if stage > 0 and block == 0 else 1
            features = _residual_block(features, width * 2**stage, number, strides, normalized)
            number += 2
    return features


def _residual_block(
    features: keras.KerasTensor, width: int, number: int, strides: int, normalized: bool
) -> keras.KerasTensor:
    shortcut = features
    if strides > 1:
        shortcut = layers.Conv2D(width, 1, strides, use_bias=not normalized, name=f"shortcut{number + 1}")(features)
        if normalized:
            shortcut = layers.BatchNormalization(momentum=BATCH_MOMENTUM, name=f"shortcut_norm{number + 1}")(shortcut)
    features = _convolution(features, width, number + 1, strides, normalized)
    features = layers.ReLU(name=f"relu{number + 1}")(features)
    features = _convolution(features, width, number + 2, normalized=normalized)
    features = layers.Add(name=f"add{number + 2}")([features, shortcut])
    return layers.ReLU(name=f"relu{number + 2}")(features)


def _convolution(
    features: keras.KerasTensor, width: int, number: int, strides: int = 1, normalized: bool = True
) -> keras.KerasTensor:
    """A 3x3 convolution and its batch normalization, if any, whose offset makes a bias superfluous."""
    convolution = layers.Conv2D(
        width, 3, strides, padding="same", use_bias=not normalized, kernel_initializer="he_normal", name=f"conv{number}"
    )
    if not normalized:
        return convolution(features)
    return layers.BatchNormalization(momentum=BATCH_MOMENTUM, name=f"norm{number}")(convolution(features))
