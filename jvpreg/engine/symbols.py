"""Symbols for tensors in a call that is traced, and what Keras knows of tensors only: shapes, and sums."""

import contextlib
import string

import keras
from keras import ops, tree

from jvpreg.common.eager import map_leaves
from jvpreg.common.keras_private import numpy_ops
from jvpreg.engine.arguments import symbol_of
from jvpreg.rules.registry import find_rule


def is_symbol(leaf) -> bool:
    """Whether it is a symbol."""
    return isinstance(leaf, keras.KerasTensor)


def symbols_in(structure) -> list:
    """The symbols among the leaves of a structure."""
    return [leaf for leaf in tree.flatten(structure) if is_symbol(leaf)]


def specified(layer, args: tuple, kwargs: dict):
    """Symbols for what a layer returns: as Keras infers them, otherwise as its call returns them of symbols."""
    outputs, error = None, None
    if not _states_what_another_call_returns(layer):
        try:
            outputs = layer.compute_output_spec(*args, **kwargs)
            if not _has_unknown(outputs) or _has_unknown((args, kwargs)):
                return outputs
        except Exception as failed:  # Some layers have arguments that they do not state.
            error = failed
    try:
        # The layer runs later: then it draws its random numbers, and adds its losses.
        with keras.StatelessScope(), losses_in(layer, []):
            found = layer.call(*args, **kwargs)
    except Exception as failed:
        if error is None and outputs is None:
            return layer.compute_output_spec(*args, **kwargs)
        found, error = None, error or failed
    if not any(is_symbol(leaf) or ops.is_tensor(leaf) for leaf in tree.flatten(found)):
        if outputs is None:
            raise error or NotImplementedError("its `call` returns no tensor")
        return outputs
    return map_leaves(lambda leaf: symbol_of(leaf) if is_symbol(leaf) or ops.is_tensor(leaf) else leaf, found)


@contextlib.contextmanager
def losses_in(layer, losses: list):
    """A context in which the losses that a layer adds in its own call go to a list, as symbols."""
    own = vars(layer) if isinstance(layer, keras.Layer) else {}
    if own:
        own["add_loss"] = lambda loss: losses.extend(tree.flatten(loss))
    try:
        yield
    finally:
        own.pop("add_loss", None)


def _states_what_another_call_returns(layer) -> bool:
    """Whether a layer has a `call` of its own, and inherits what it says of its outputs from another layer."""
    if find_rule(layer) is not None:  # One of Keras' own, such as a recurrent one.
        return False
    order = type(layer).__mro__
    states = ("compute_output_spec", "compute_output_shape")
    stated = next(i for i, kind in enumerate(order) if any(name in vars(kind) for name in states))
    called = next(i for i, kind in enumerate(order) if "call" in vars(kind))
    return called < stated and order[stated] is not keras.Layer


def _has_unknown(structure) -> bool:
    return any(size is None for symbol in symbols_in(structure) for size in symbol.shape)


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


def _sum(by_keras, symbol, other):
    return _added(symbol, other) if _misread(symbol, other) else by_keras(symbol, other)


def _sum_reflected(by_keras, symbol, other):
    return _added(other, symbol) if _misread(other, symbol) else by_keras(symbol, other)


def _added(a, b):
    return ops.subtract(a, ops.negative(b))


def _misread(a, b) -> bool:
    """Whether Keras' own `add` takes `b` for a bias along another axis than it has, as no sum of tensors does.

    On TensorFlow, it takes (B, 1, 1, 1) for a bias if there are B channels.
    """
    if keras.backend.backend() != "tensorflow" or not (hasattr(a, "shape") and hasattr(b, "shape")):
        return False
    long = [axis - len(b.shape) for axis, size in enumerate(b.shape) if size != 1]
    if len(long) != 1 or len(a.shape) < 2 or b.shape[long[0]] is None:
        return False
    size, axes = b.shape[long[0]], (-1, 1 - len(a.shape))
    taken = [axis for axis in axes if a.shape[axis] == size]
    return bool(taken) and long[0] != taken[0]


SHAPES = (
    (numpy_ops.GetItem, "compute_output_spec", _shape_of_item),
    (numpy_ops.Repeat, "compute_output_spec", _shape_of_repeated),
    (numpy_ops.Einsum, "compute_output_spec", _shape_of_einsum),
    (keras.KerasTensor, "__add__", _sum),
    (keras.KerasTensor, "__radd__", _sum_reflected),
)
"""What is replaced in Keras so that symbols can be sliced, repeated, multiplied and added as tensors can."""
