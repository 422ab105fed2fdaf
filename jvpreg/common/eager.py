"""What Keras does with trees of tensors, and looks for symbols in, without the trees where there is but one tensor.

Run eagerly, on Torch above all, they take more time than many an operation.
"""

from collections.abc import Callable

from keras import ops, tree


def map_leaves(function: Callable, structure):
    """`tree.map_structure`, without a tree where the structure is but a leaf."""
    nested = isinstance(structure, (list, tuple, dict))
    return tree.map_structure(function, structure) if nested else function(structure)


def leaves_of(structure) -> list:
    """`tree.flatten`, likewise."""
    return tree.flatten(structure) if isinstance(structure, (list, tuple, dict)) else [structure]


def shape_of(tensor) -> tuple:
    """`ops.shape`, only where a size is unknown."""
    shape = tuple(tensor.shape)
    return ops.shape(tensor) if None in shape else shape


def cast(tensor, dtype):
    """`ops.cast`, only where there is something to cast."""
    return tensor if tensor.dtype == dtype else ops.cast(tensor, dtype)
