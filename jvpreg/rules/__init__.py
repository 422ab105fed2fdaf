"""The rules of Keras' layers and activations, a file a family; importing this package registers them."""

from jvpreg.rules import (
    activations,
    convolution,
    core,
    merging,
    normalization,
    pooling,
    regularization,
    reshaping,
)

__all__ = [
    "activations",
    "convolution",
    "core",
    "merging",
    "normalization",
    "pooling",
    "regularization",
    "reshaping",
]
