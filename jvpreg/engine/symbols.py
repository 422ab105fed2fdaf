"""Shapes that Keras knows of tensors and not of symbols: of `x[:3]`, of an unknown size, of an `einsum` in capitals."""

import contextlib
import functools
import string

import keras

from jvpreg.common.keras_private import numpy_ops


def _shape_of_item(by_keras, operation, x, key):
    """Keras itself knows the shape of `x[:3,]` only, and not that of `x[:3]` or `x[...]`."""
    return by_keras(operation, x, (key,) if isinstance(key, slice) or key is Ellipsis or key is None else key)


def _shape_of_repeated(by_keras, operation, x):
    """Keras itself does not know the shape if a row is repeated for each example, and their number is not known."""
    if operation.repeats is not None:
        return by_keras(operation, x)
    shape = [None] if operation.axis is None else list(x.shape)
    shape[operation.axis or 0] = None
    return keras.KerasTensor(shape, dtype=x.dtype)


def _shape_of_einsum(by_keras, operation, *operands):
    """Keras itself looks for small letters only."""
    given = operation.subscripts
    small = dict(zip(sorted(set(filter(str.isalpha, given))), string.ascii_lowercase, strict=False))
    operation.subscripts = "".join(small.get(letter, letter) for letter in given)
    try:
        return by_keras(operation, *operands)
    finally:
        operation.subscripts = given


@contextlib.contextmanager
def shapes_of_symbols():
    """A context in which symbols can be sliced, repeated and multiplied as tensors can."""
    spec = "compute_output_spec"
    changes = [
        (numpy_ops.GetItem, _shape_of_item),
        (numpy_ops.Repeat, _shape_of_repeated),
        (numpy_ops.Einsum, _shape_of_einsum),
    ]
    before = [getattr(operation, spec) for operation, _ in changes]
    for (operation, shape), by_keras in zip(changes, before, strict=True):
        setattr(operation, spec, functools.partialmethod(_with_spec, shape, by_keras))
    try:
        yield
    finally:
        for (operation, _), by_keras in zip(changes, before, strict=True):
            setattr(operation, spec, by_keras)


def _with_spec(operation, shape, by_keras, *args, **kwargs):
    return shape(by_keras, operation, *args, **kwargs)
