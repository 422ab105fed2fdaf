"""The inputs of a model: a user's structure of arrays as the flat list of tensors that the engine takes."""

import inspect
import weakref
from collections.abc import Callable

import keras
from keras import ops, tree

from jvpreg.common import checks, keras_private
from jvpreg.common.dtypes import has_tangents

_SIGNATURES: weakref.WeakKeyDictionary[Callable, inspect.Signature] = weakref.WeakKeyDictionary()


def flatten_inputs(model, structure, argument: str) -> list:
    """The leaves of a structure like the model's input, in the order of `model.inputs`; a dict goes by name.

    Args:
        model: a model or layer.
        structure: a tensor, or a list, tuple or dict of them.
        argument: what the caller calls the structure, for the error.

    Raises:
        ValueError: their number or a name does not fit.
    """
    graph = graph_of(model)
    if graph is None:
        return tree.flatten(structure)
    if isinstance(structure, dict):
        struct = keras_private.input_structure(graph)
        names = sorted(struct) if isinstance(struct, dict) else [x.name for x in graph.inputs]
        missing = [name for name in names if name not in structure]
        if missing:
            raise ValueError(
                f"Invalid value for argument `{argument}`. Expected a dict with the keys {names}, the inputs of "
                f"`{model.name}`. Received: keys {list(structure)}; add {missing}."
            )
        structure = [structure[name] for name in names]
    leaves = tree.flatten(structure)
    if len(leaves) != len(graph.inputs):
        raise ValueError(
            f"Invalid value for argument `{argument}`. Expected {len(graph.inputs)} tensor(s), one for each input of "
            f"`{model.name}`. Received: {len(leaves)}. Pass a list in the order of `model.inputs`, or a dict by name."
        )
    return leaves


def standardize_inputs(model, x) -> list:
    """The model's inputs as a flat list of tensors, in the order of `model.inputs`.

    Bytes become floats: those of an image stand for real numbers, and any float type holds them exactly. Other integers
    stay as they are: floats would round token ids, and integers have no derivative anyway.

    Raises:
        ValueError: a shape does not fit.
    """
    leaves = flatten_inputs(model, x, "x")
    if any(leaf is None for leaf in leaves):
        raise ValueError("Invalid value for argument `x`. Expected a tensor for each input. Received: None.")
    graph = graph_of(model)
    expected = [None] * len(leaves) if graph is None else graph.inputs
    inputs = []
    for i, (leaf, spec) in enumerate(zip(leaves, expected, strict=True)):
        tensor = checks.tensor("x", leaf, dtype=None if spec is None else spec.dtype)
        if keras.backend.standardize_dtype(tensor.dtype) == "uint8":
            tensor = ops.cast(tensor, keras.config.floatx())
        if spec is not None:
            tensor = _adjust_rank(tensor, spec.shape)
            if not _compatible(tensor.shape, spec.shape):
                raise ValueError(
                    f"Invalid value for argument `x`{f' (input {i})' if len(leaves) > 1 else ''}. Expected shape "
                    f"{_readable(spec.shape)}, as input `{spec.name}` of `{model.name}` has. "
                    f"Received: x with shape {_readable(tensor.shape)}."
                )
        inputs.append(tensor)
    batches = [tensor for tensor in inputs if len(tensor.shape)]
    if not batches or any(tensor.shape[0] == 0 for tensor in batches):
        raise ValueError(
            "Invalid value for argument `x`. Expected a batch (B, …) of one example at least. "
            f"Received: x with shape {[tuple(tensor.shape) for tensor in inputs]}."
        )
    sizes = {tensor.shape[0] for tensor in batches if isinstance(tensor.shape[0], int)}
    if len(sizes) > 1:
        raise ValueError(
            "Invalid value for argument `x`. Expected the same number of examples in every input. "
            f"Received: x with shapes {[tuple(tensor.shape) for tensor in inputs]}."
        )
    if graph is None:
        _check_input_spec(model, inputs)
    return inputs


def check_moving(tangents: list, inputs: list, argument: str, starts: Callable[[], list[str]]) -> None:
    """Raises if every tangent belongs to an input of integers; None is a zero tangent.

    Args:
        tangents: one for each input.
        inputs: as the model takes them.
        argument: what the caller calls the tangents.
        starts: returns the paths of layers by whose output there is a derivative.

    Raises:
        ValueError: there is no derivative.
    """
    given = [x for x, tangent in zip(inputs, tangents, strict=True) if tangent is not None]
    if given and not any(map(has_tangents, given)):
        dtypes = ", ".join(sorted({keras.backend.standardize_dtype(x.dtype) for x in given}))
        raise ValueError(
            f"Invalid value for argument `{argument}`. Expected real numbers: integers have no derivative. "
            f"Received: an input of integers ({dtypes}). {instead_of_integers(starts())}"
        )


def instead_of_integers(starts: list[str]) -> str:
    """What to do where a model takes integers alone, in words. `starts`: paths of its first layers of real numbers."""
    written = " or ".join(f'`at="{path}"`' for path in starts) or '`at="PATH OF THE EMBEDDING"`'
    return (
        "If they stand for real numbers, give the model floats; if they are token ids, look at what the embedding "
        f"returned: {written}."
    )


def graph_of(model: keras.Layer) -> keras.Model | None:
    """The model itself if its inputs are known: a functional one, or a Sequential one that is built; otherwise None."""
    built = isinstance(model, keras.Sequential) and hasattr(model, "inputs")
    return model if built or isinstance(model, keras.Function) else None


def call_signature(layer: keras.Layer) -> inspect.Signature:
    """The signature of a layer's `call`, without `self`. It is read once: that takes longer than a small layer."""
    function = getattr(layer.call, "__func__", None)
    if function is None:  # The function is an attribute of this layer object alone.
        return inspect.signature(layer.call)
    known = _SIGNATURES.get(function)
    if known is None:
        known = _SIGNATURES[function] = inspect.signature(layer.call)
    return known


def _adjust_rank(tensor, expected):
    """As Keras: a last axis of size 1 may be missing, or be one too many."""
    if len(tensor.shape) == len(expected) - 1 and expected[-1] == 1:
        return ops.expand_dims(tensor, -1)
    if len(tensor.shape) == len(expected) + 1 and tensor.shape[-1] == 1:
        return ops.squeeze(tensor, -1)
    return tensor


def _check_input_spec(layer, inputs) -> None:
    try:
        keras_private.check_inputs(layer, inputs if len(inputs) > 1 else inputs[0])
    except ValueError as error:
        raise ValueError(f"Invalid value for argument `x`. {error}") from error


def _compatible(shape, expected) -> bool:
    pairs = zip(shape, expected, strict=False)
    return len(shape) == len(expected) and all(a is None or b is None or a == b for a, b in pairs)


def _readable(shape) -> str:
    if len(shape) == 0:
        return "()"
    return "(" + ", ".join(["B", *("?" if size is None else str(size) for size in tuple(shape)[1:])]) + ")"
