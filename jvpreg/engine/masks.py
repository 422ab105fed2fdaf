"""Keras' masks, as `Layer.__call__` fills them in and leaves them on outputs. A mask is frozen: it has no tangent."""

from collections.abc import Callable, Container
from typing import Any

import keras
from keras import ops, tree

from jvpreg.common.eager import leaves_of, map_leaves
from jvpreg.common.keras_private import get_mask, layers_within, set_mask
from jvpreg.engine.inputs import call_signature
from jvpreg.engine.node import Value


def fill_in(layer: keras.Layer, args: tuple, kwargs: dict) -> dict:
    """A layer's keyword arguments with the masks that Keras takes from its inputs; masks that are given win.

    That is `mask` if one argument holds tensors, otherwise `<argument>_mask` for each that does.
    """
    given = _bind(layer, args, kwargs)
    tensors = [name for name, value in given.items() if _holds_tensors(value)]
    names = {"mask" if len(tensors) == 1 else f"{name}_mask": name for name in tensors}
    takes = call_signature(layer).parameters
    missing = [mask for mask in names if mask in takes and given.get(mask) is None]
    return kwargs | {mask: masks_of(given[names[mask]]) for mask in missing if any_of(masks_of(given[names[mask]]))}


def split(layer, args: tuple, kwargs: dict, taken: Container[str]) -> tuple[dict, dict]:
    """The masks among a layer's keyword arguments, and the others. `taken`: the names of its rule's parameters.

    A rule may take `mask` even if the layer's call does not: merging layers look for masks on their inputs.
    """
    if not isinstance(layer, keras.Layer):
        return {}, kwargs
    parameters = call_signature(layer).parameters
    names = {"mask", *(f"{name}_mask" for name in parameters)}
    masks = {name: mask for name, mask in kwargs.items() if name in names and any_of(mask)}
    if "mask" in taken and "mask" not in parameters:
        masks["mask"] = masks_of(first_argument(layer, args, kwargs))
    return masks, {name: value for name, value in kwargs.items() if name not in names}


def on_outputs(layer: keras.Layer, inputs, previous, outputs, new_value: Callable):
    """The outputs with the masks that Keras leaves on them.

    Args:
        layer: its `compute_mask` says what becomes of a mask.
        inputs: primal values of its first argument.
        previous: the masks that it was given, otherwise those of its first argument.
        outputs: its output values.
        new_value: makes a value of a new mask.
    """
    values = leaves_of(outputs)
    if not layer.supports_masking or all(not isinstance(y, Value) or y.mask is not None for y in values):
        return outputs
    masks = layer.compute_mask(inputs, tree.map_structure(primal_of, previous))
    if masks is None:
        return outputs
    known = {id(mask.primal): mask for mask in tree.flatten(previous) if isinstance(mask, Value)}
    # As Keras: outputs beyond the shorter list have no mask.
    for i, mask in enumerate(tree.flatten(masks)[: len(values)]):
        if mask is not None and isinstance(values[i], Value) and values[i].mask is None:
            values[i] = values[i].with_mask(known.get(id(mask)) or new_value(ops.convert_to_tensor(mask)))
    return tree.pack_sequence_as(outputs, values)


def values_among(*arguments) -> list[Value]:
    """The values among arguments, in the order in which `map_leaves` visits them, and then their masks."""
    leaves: list[Value] = []
    # Not `tree.flatten`: it sorts the keys of a dict, and on Torch `map_leaves` does not.
    map_leaves(lambda leaf: leaves.append(leaf) if isinstance(leaf, Value) else None, arguments)
    return leaves + list({leaf.mask.slot: leaf.mask for leaf in leaves if leaf.mask is not None}.values())


def symbols(args: tuple, kwargs: dict, make: Callable) -> tuple[Any, list]:
    """The arguments with symbols for values, which carry their masks; and the symbols, in `values_among`'s order."""
    values = values_among(args, kwargs)
    made = [make(value) for value in values]
    by_slot = {value.slot: symbol for value, symbol in zip(values, made, strict=True)}
    for value, symbol in zip(values, made, strict=True):
        if value.mask is not None:
            set_mask(symbol, by_slot[value.mask.slot])
    places = iter(made)
    return map_leaves(lambda leaf: next(places) if isinstance(leaf, Value) else leaf, (args, kwargs)), made


def left_on(symbols: list) -> list:
    """The masks that a call left on the symbols that it returned; a symbol itself stands for no mask."""

    def mask_of(symbol):
        mask = get_mask(symbol)
        return mask if isinstance(mask, keras.KerasTensor) else symbol

    return [mask_of(symbol) for symbol in symbols]


def first_argument(layer: keras.Layer, args: tuple, kwargs: dict):
    """The argument on whose masks those of the outputs depend."""
    return next(iter(_bind(layer, args, kwargs).values()))


def masks_of(structure):
    """The masks of the values in a structure, None where there is none."""
    if isinstance(structure, Value):
        return structure.mask
    return map_leaves(lambda leaf: leaf.mask if isinstance(leaf, Value) else None, structure)


def primal_of(leaf):
    """A leaf's tensor, whether it is a value or a tensor already."""
    return leaf.primal if isinstance(leaf, Value) else leaf


def under(leaf, mask: Value | None):
    """A value under a mask if it has none yet; any other leaf as it is."""
    return leaf.with_mask(leaf.mask or mask) if isinstance(leaf, Value) else leaf


def any_of(masks) -> bool:
    """Whether there is a mask in a structure of them."""
    return any(mask is not None for mask in leaves_of(masks))


def _bind(layer, args: tuple, kwargs: dict) -> dict[str, Any]:
    signature = call_signature(layer)
    return signature.bind_partial(
        *args, **{key: value for key, value in kwargs.items() if key in signature.parameters}
    ).arguments


def _holds_tensors(argument) -> bool:
    leaves = tree.flatten(argument)
    tensors = [isinstance(leaf, (Value, keras.Variable)) or ops.is_tensor(leaf) for leaf in leaves]
    if not tree.is_nested(argument):
        return tensors[0]
    return bool(leaves) and all(known or leaf is None for known, leaf in zip(tensors, leaves, strict=True))


def check_seen(operation, args: tuple, kwargs: dict, name: str) -> None:
    """Raises if an operation that is left to autodiff has layers in it that would not see the mask of its input."""
    masked = any(value.mask is not None for value in values_among(args))
    inner = isinstance(operation, keras.Layer) and layers_within(operation, itself=False)
    if masked and inner and not any("mask" in key for key in kwargs):
        raise NotImplementedError(
            f"`{name}` is left to autodiff, and the layers in it would not see the mask of its input. Let its "
            "`call` take `mask` and pass it on, or multiply by the mask before the layer."
        )


def leave_on(outputs) -> None:
    """Leaves the masks of a model's outputs on their tensors, as Keras does: the loss weighs by them."""
    for value in tree.flatten(outputs):
        if value.mask is not None:
            set_mask(value.primal, value.mask.primal)
