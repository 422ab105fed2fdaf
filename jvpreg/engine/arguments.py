"""The arguments of an operation: as a rule takes them, as a layer casts them, and symbols for them."""

import functools
import inspect
import re
from dataclasses import replace

import keras
from keras import ops

from jvpreg.common.dtypes import has_tangents
from jvpreg.common.eager import leaves_of, map_leaves
from jvpreg.common.keras_private import casts_inputs
from jvpreg.engine.inputs import call_signature
from jvpreg.engine.node import Value


def symbol_of(tensor) -> keras.KerasTensor:
    """A symbol of the tensor's shape and dtype."""
    return keras.KerasTensor(tuple(tensor.shape), dtype=keras.backend.standardize_dtype(tensor.dtype))


@functools.cache
def parameters_of(function) -> list[str]:
    """The names of a function's parameters, in their order."""
    return list(inspect.signature(function).parameters)


def map_arguments(function, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The arguments with `function` of each leaf, called in their order: the keys of a dict are not sorted."""
    positional = tuple(map_leaves(function, argument) for argument in args)
    return positional, {name: map_leaves(function, argument) for name, argument in kwargs.items()}


def as_taken(operation, args: tuple, kwargs: dict, taken: list[str]) -> tuple[tuple, dict]:
    """The arguments in the order of a rule's parameters; after the first, by the names of the call's parameters."""
    if isinstance(operation, keras.Layer):
        names = list(call_signature(operation).parameters)[1 : len(args)]
        named = {name: value for name, value in zip(names, args[1:], strict=False) if name in taken}
        args = (*args[:1], *(value for name, value in zip(names, args[1:], strict=False) if name not in taken))
        kwargs = named | kwargs
    order = [name for name in taken if name in kwargs]
    return args, {name: kwargs[name] for name in [*order, *(name for name in kwargs if name not in order)]}


def kind_of(operation) -> str:
    """The name of an operation's class, as Keras would write it: `reduce_max` of a `ReduceMax`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(operation).__name__).lower()


def input_dtype(operation) -> str | None:
    """The dtype to which a layer casts its inputs (mixed precision), or None."""
    casts = isinstance(operation, keras.Layer) and casts_inputs(operation)
    return operation.compute_dtype if casts else None


def autocast(value: Value, dtype):
    """A primal value as a layer sees it that casts its inputs to `dtype` (None: it does not cast)."""
    own = keras.backend.standardize_dtype(value.primal.dtype)
    kept = dtype in (None, own) or not keras.backend.is_float_dtype(own)
    return value.primal if kept else ops.cast(value.primal, dtype)


def computed_in(operation, leaf):
    """An argument as a layer of Keras computes with it: integers become floats, unless the layer returns integers."""
    whole = isinstance(leaf, Value) and not leaf.has_tangents
    if not whole or not isinstance(operation, keras.Layer) or type(operation).__module__.split(".")[0] != "keras":
        return leaf
    symbol = symbol_of(leaf.primal)
    try:
        computed = operation.compute_output_spec(symbol)
    except Exception:  # A layer of several inputs: merged integers stay integers, or meet floats.
        return leaf
    floats = has_tangents(leaves_of(computed)[0])
    return replace(leaf, primal=ops.cast(leaf.primal, operation.compute_dtype)) if floats else leaf
