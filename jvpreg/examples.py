"""Which operations of `keras.ops` keep the examples of a batch apart, and on its first axis."""

import math

from keras import tree

# Private: the operations' classes, by which a graph's nodes are known, have no public names.
from keras.src.ops import numpy as numpy_ops


def mixes_examples(operation, x) -> bool:
    """Whether the operation works along the first axis, or takes it from its place: examples are not apart after it."""
    if isinstance(operation, numpy_ops.Transpose):
        return operation.axes is None or operation.axes[0] != 0
    if isinstance(operation, numpy_ops.Tile):
        repeats = operation.repeats
        return not isinstance(repeats, int) and len(repeats) >= len(x.shape) and repeats[-len(x.shape)] != 1
    if isinstance(operation, numpy_ops.Ravel):
        return True
    rank = len(x.shape) + isinstance(operation, (numpy_ops.ExpandDims, numpy_ops.Stack))
    named = ("axis", "axes", "axis1", "axis2", "source", "destination")
    given = [getattr(operation, name) for name in named if hasattr(operation, name)]
    # No axis means all of them, or the flat tensor.
    return any(axes is None or 0 in [axis % rank for axis in tree.flatten(axes)] for axes in given)


def moves_examples(before, after) -> bool:
    """Whether a reshape makes another axis of that of the examples, as far as the sizes `(B, …)` are known."""
    sizes = [*before[1:], *after[1:]]
    known = all(isinstance(size, int) and size != -1 for size in sizes)
    return known and math.prod(before[1:]) != math.prod(after[1:])
