"""Tangents as users give them, and products as they get them."""

from collections.abc import Mapping, Sequence
from typing import Any

import keras
from keras import ops, tree


def standardize_tangents(flat: list, like: list, names: list[tuple[str, str]]) -> tuple[list, bool]:
    """Flat tangents `(P, …)` with the dtypes of `like`, and whether the probe axis was there."""
    tangents: list = []
    given: dict[int, list] = {0: [], 1: []}
    for vector, x, (name, like_name) in zip(flat, like, names, strict=True):
        if vector is None:
            tangents.append(None)
            continue
        tangent = ops.convert_to_tensor(vector, dtype=x.dtype)
        extra = len(tangent.shape) - len(x.shape)
        shape = tuple(tangent.shape)[extra:] if extra >= 0 else ()
        fits = all(a is None or b is None or a == b for a, b in zip(shape, x.shape, strict=False))
        if extra not in (0, 1) or not fits:
            raise ValueError(
                f"Invalid value for argument `{name}`. Expected shape {tuple(x.shape)}, like {like_name}, or "
                f"(P, {str(tuple(x.shape))[1:-1]}) with a leading axis of P probes. "
                f"Received: {name} with shape {tuple(tangent.shape)}."
            )
        tangents.append(tangent if extra else ops.expand_dims(tangent, 0))
        given[extra].append(tuple(tangent.shape))
    if (given[0] and given[1]) or len({shape[0] for shape in given[1]}) > 1:
        raise ValueError(
            f"Invalid value for argument `{names[0][0]}`. Expected the same number of probes in every tensor. "
            f"Received: shapes {[*given[0], *given[1]]}."
        )
    return tangents, bool(given[1])


def each_name(name: str, like_name: str, count: int) -> list[tuple[str, str]]:
    """The names of `count` tensors, for an error: of several it tells which one."""
    return [(name, like_name if count == 1 else f"{like_name} (tensor {i})") for i in range(count)]


def check_count(flat: list, like: list, name: str, like_name: str) -> None:
    """Raises unless there is a vector, or None, for each of `like`, and one at least."""
    if len(flat) != len(like):
        raise ValueError(
            f"Invalid value for argument `{name}`. Expected {len(like)} tensor(s), one for each of {like_name}. "
            f"Received: {len(flat)}."
        )
    if all(vector is None for vector in flat):
        raise ValueError(f"Invalid value for argument `{name}`. Expected at least one tensor. Received: None.")


def weight_pairs(weights: Any) -> list[tuple[Any, Any]]:
    """Pairs of a weight, or its path, and a tangent that is not None, as `Linearization.jvp` takes them."""
    pairs = list(weights.items()) if isinstance(weights, Mapping) else list(weights or [])
    if not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in pairs):
        raise ValueError(
            "Invalid value for argument `weights`. Expected a dict from paths of weights to tangents, or a list of "
            f"pairs (variable, tangent). Received: {[type(pair).__name__ for pair in pairs]}."
        )
    return [(key, tangent) for key, tangent in pairs if tangent is not None]


def weight_tangents(pairs: Sequence[tuple[Any, Any]], known: Sequence) -> list[tuple[Any, Any]]:
    """Variables among the `known` ones, each with the tangent that it has among the `weight_pairs`."""
    found: list[tuple[Any, Any]] = []
    for key, tangent in pairs:
        matches = [v for v in known if (v.path == key if isinstance(key, str) else v is key)]
        name = key if isinstance(key, str) else getattr(key, "path", key)
        if len(matches) != 1:
            raise ValueError(
                "Invalid value for argument `weights`. Expected weights of the linearized model: "
                f"{[v.path for v in known]}. Received: {name!r}"
                + (f", the path of {len(matches)} weights: pass a list of (variable, tangent)." if matches else ".")
            )
        if any(variable is matches[0] for variable, _ in found):
            raise ValueError(
                "Invalid value for argument `weights`. Expected one tangent for each weight. "
                f"Received: {name!r} more than once."
            )
        found.append((matches[0], tangent))
    return found


def zeros(num_probes, like):
    """Zero tangents `(P, B, …)` of `like` (B, …)."""
    return ops.zeros((num_probes, *ops.shape(like)), dtype=like.dtype)


def pack_products(products: list, structure, probed: bool):
    """Flat products `(P, B, …)` as users get them: in a structure, in float32 at least, without P if they gave none."""
    return tree.pack_sequence_as(structure, [at_least_float32(p if probed else p[0]) for p in products])


def at_least_float32(tensor):
    """A tensor of 16 bits in float32; any other as it is."""
    dtype = keras.backend.standardize_dtype(tensor.dtype)
    return ops.cast(tensor, "float32") if dtype in ("float16", "bfloat16") else tensor
