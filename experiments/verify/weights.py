"""Random weights at which a deep model has a Jacobian worth comparing: neither vanishing nor exploding.

As Keras initializes them, the Jacobian of MobileNet has a norm of 1e-20, and the blocks of ConvNeXt are next to
switched off.
"""

from typing import Any

import keras
import numpy as np
from keras import layers, ops, tree

import jvpreg

CALIBRATION_EXAMPLES = 16


def inputs(model: keras.Model, num_examples: int, random: np.random.Generator) -> np.ndarray:
    """Random inputs `(num_examples, …)` in float32: pixels from 0 to 255 where the model scales them itself."""
    shape = (num_examples, *model.input_shape[1:])
    scales = any(isinstance(layer, layers.Rescaling | layers.Normalization) for layer in model.layers)
    drawn = random.uniform(0, 255, shape) if scales else random.normal(size=shape)
    return drawn.astype("float32")


def draw(model: keras.Model, random: np.random.Generator, examples: Any = None) -> None:
    """Draw the weights, and set the moving statistics to those that random inputs have.

    Kernels are normal with variance 2 over their fan-in (recurrent ones stay orthogonal), scales uniform in 0.5 to
    1.5, biases normal with standard deviation 0.1, and so are the offsets of normalizations, but with mean 1. The
    statistics are those of 16 random inputs in one pass in training mode, so that each normalization normalizes.

    With offsets around 0, a normalization and a ReLU multiply the squared norm of a tangent by π / (π − 1): in deep
    models rounding grows until it moves masks, and float32 is off by several percent, whoever computes the product.

    Reference: Yang et al. (2019), "A Mean Field Theory of Batch Normalization".
    """
    for variable in model.trainable_variables:
        if "recurrent" not in variable.name:
            variable.assign(_drawn(variable, random))
    known = jvpreg.layer_paths(model).values()
    normalizations = [layer for layer in known if isinstance(layer, layers.BatchNormalization)]
    if not normalizations:
        return
    momenta = [layer.momentum for layer in normalizations]
    for layer in normalizations:
        layer.momentum = 0.0
    if examples is None:
        examples = inputs(model, CALIBRATION_EXAMPLES, random)
    model(tree.map_structure(ops.convert_to_tensor, examples), training=True)
    for layer, momentum in zip(normalizations, momenta, strict=True):
        layer.momentum = momentum


def _drawn(variable, random: np.random.Generator) -> np.ndarray:
    shape = tuple(variable.shape)
    if len(shape) > 1:
        # The kernel of a depthwise convolution, (height, width, channels, 1), sees one channel at a time.
        fan_in = np.prod(shape[:2] if len(shape) == 4 and shape[3] == 1 else shape[:-1])
        return random.normal(scale=np.sqrt(2 / fan_in), size=shape)
    if variable.name in ("beta", "bias"):
        return random.normal(float(variable.name == "beta"), 0.1, shape)
    return random.uniform(0.5, 1.5, size=shape)
