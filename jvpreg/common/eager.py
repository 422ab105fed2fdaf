"""Keras' functions for trees of tensors, and its searches for symbols, without a tree if there is only one tensor.

In eager mode, above all on Torch, they take more time than many operations.
"""

from collections.abc import Callable

import keras
from keras import ops, tree

from jvpreg.common.typing import DType, Structure, Tensor


def map_leaves(function: Callable, structure: Structure) -> Structure:
    """`tree.map_structure`, without a tree if the structure is a single leaf."""
    nested = isinstance(structure, (list, tuple, dict))
    return tree.map_structure(function, structure) if nested else function(structure)


def leaves_of(structure: Structure) -> list:
    """`tree.flatten`, likewise."""
    return tree.flatten(structure) if isinstance(structure, (list, tuple, dict)) else [structure]


def shape_of(tensor: Tensor) -> tuple:
    """`ops.shape`, only where a size is unknown."""
    shape = tuple(tensor.shape)
    return ops.shape(tensor) if None in shape else shape


def cast(tensor: Tensor, dtype: DType) -> Tensor:
    """`ops.cast`, only where there is something to cast."""
    return tensor if tensor.dtype == dtype else ops.cast(tensor, dtype)


def runs_eagerly(tensor: Tensor) -> bool:
    """Whether operations on a tensor run as they are called, so that Python holds what they return."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.executing_eagerly()
    if keras.backend.backend() == "jax":
        import jax

        return not isinstance(tensor, jax.core.Tracer)
    return True
