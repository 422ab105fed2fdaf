"""The rules of Keras' layers and activations, a file a family; importing this package registers them."""

from jvpreg.rules import (
    activations,
    attention,
    convolution,
    core,
    elementwise,
    merging,
    normalization,
    ops,
    pooling,
    recurrent,
    reducing,
    regularization,
    reshaping,
)

__all__ = [
    "activations",
    "attention",
    "convolution",
    "core",
    "elementwise",
    "merging",
    "normalization",
    "ops",
    "pooling",
    "recurrent",
    "reducing",
    "regularization",
    "reshaping",
]
