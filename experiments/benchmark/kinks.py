"""Images at which a network is checked: far from its kinks, where rounding cannot choose another linear map."""

from collections.abc import Sequence

import keras
import numpy as np
from keras import ops, tree

from experiments.data import Split


def far_from_kinks(candidates: Split, networks: Sequence[keras.Model], number: int) -> Split:
    """The candidates whose ReLUs are farthest from zero, and whose poolings' winners are clearest.

    Elsewhere two programs that round differently are both right, of two neighbouring linear maps.

    Args:
        candidates: to choose from.
        networks: of ReLU, max pooling by two, and layers that are smooth.
        number: how many to choose.
    """
    images = candidates.images()
    margin = np.min([network_margin(network, images) for network in networks], axis=0)
    return candidates.take(np.sort(np.argsort(margin)[-number:]))


def network_margin(network: keras.Model, images: np.ndarray) -> np.ndarray:
    """How far each image is from the nearest kink, in units of the largest number at that layer: `(B,)`."""
    kinks = [layer for layer in network.layers if isinstance(layer, keras.layers.ReLU | keras.layers.MaxPooling2D)]
    inner = keras.Model(network.inputs, [layer.input for layer in kinks])
    values = map(ops.convert_to_numpy, tree.flatten(inner([images])))
    return np.min(
        [
            (windows_margin(value) if isinstance(layer, keras.layers.MaxPooling2D) else smallest(np.abs(value)))
            / np.max(np.abs(value))
            for layer, value in zip(kinks, values, strict=True)
        ],
        axis=0,
    )


def windows_margin(value: np.ndarray) -> np.ndarray:
    """Between the largest and the second number of the windows of two by two that ReLU left alive: `(B,)`."""
    batch, height, width, channels = value.shape
    windows = value.reshape(batch, height // 2, 2, width // 2, 2, channels).transpose(0, 1, 3, 5, 2, 4)
    second, first = np.moveaxis(np.sort(windows.reshape(batch, -1, 4))[..., -2:], -1, 0)
    return smallest(np.where(first > 0, first - second, np.inf))


def smallest(value: np.ndarray) -> np.ndarray:
    """The smallest number of each example: `(B,)`."""
    return np.min(value.reshape(len(value), -1), axis=1)
