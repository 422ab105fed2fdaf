"""The inputs of a model: a user's structure of arrays as the flat list of tensors that the engine takes."""

import keras
from keras import ops, tree


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
        # Private: the only place where Keras keeps the names of a dict of inputs.
        struct = graph._inputs_struct
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
    """The model's inputs as a flat list of floating-point tensors, in the order of `model.inputs`.

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
        tensor = ops.convert_to_tensor(leaf, dtype=None if spec is None else spec.dtype)
        if not keras.backend.is_float_dtype(keras.backend.standardize_dtype(tensor.dtype)):
            # Bytes of an image: the same numbers as floats, since integers have no tangents.
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
    sizes = {tensor.shape[0] for tensor in inputs if len(tensor.shape) and isinstance(tensor.shape[0], int)}
    if len(sizes) > 1:
        raise ValueError(
            "Invalid value for argument `x`. Expected the same number of examples in every input. "
            f"Received: x with shapes {[tuple(tensor.shape) for tensor in inputs]}."
        )
    if graph is None:
        _check_input_spec(model, inputs)
    return inputs


def hold_integers(model, x) -> list[bool]:
    """Whether each of the model's inputs holds integers, as far as Keras' mixed precision knows."""
    leaves, graph = flatten_inputs(model, x, "x"), graph_of(model)
    expected = leaves if graph is None else graph.inputs
    dtypes = [keras.backend.standardize_dtype(getattr(leaf, "dtype", type(leaf))) for leaf in expected]
    return [not keras.backend.is_float_dtype(dtype) for dtype in dtypes]


def graph_of(model):
    """The functional graph of a model, which a Sequential model keeps inside; None for a layer."""
    model = getattr(model, "_functional", model)
    return model if isinstance(model, keras.Function) else None


def _adjust_rank(tensor, expected):
    """As Keras: a last axis of size 1 may be left out, or be too many."""
    if len(tensor.shape) == len(expected) - 1 and expected[-1] == 1:
        return ops.expand_dims(tensor, -1)
    if len(tensor.shape) == len(expected) + 1 and tensor.shape[-1] == 1:
        return ops.squeeze(tensor, -1)
    return tensor


def _check_input_spec(layer, inputs) -> None:
    try:
        # Private, and what `Layer.__call__` checks first.
        layer._assert_input_compatibility(inputs if len(inputs) > 1 else inputs[0])
    except ValueError as error:
        raise ValueError(f"Invalid value for argument `x`. {error}") from error


def _compatible(shape, expected) -> bool:
    pairs = zip(shape, expected, strict=False)
    return len(shape) == len(expected) and all(a is None or b is None or a == b for a, b in pairs)


def _readable(shape) -> str:
    return "(" + ", ".join(["B", *("?" if size is None else str(size) for size in tuple(shape)[1:])]) + ")"
