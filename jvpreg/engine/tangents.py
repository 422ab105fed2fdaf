"""Tangents as users give them, and products as they get them."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import keras
from keras import ops, tree

from jvpreg.common import checks
from jvpreg.common.dtypes import has_tangents
from jvpreg.common.typing import Structure, Tensor
from jvpreg.engine.inputs import flatten_inputs, graph_of


def standardize_tangents(flat: list, like: list, names: list[tuple[str, str]]) -> tuple[list, bool]:
    """Flat tangents `(P, …)` with the dtypes of `like`, and whether the probe axis was there."""
    tangents: list = []
    given: dict[int, list] = {0: [], 1: []}
    for vector, x, (name, like_name) in zip(flat, like, names, strict=True):
        if vector is None:
            tangents.append(None)
            continue
        tangent = checks.tensor(name, vector, dtype=x.dtype)
        extra = len(tangent.shape) - len(x.shape)
        shape = tuple(tangent.shape)[extra:] if extra >= 0 else ()
        fits = all(a is None or b is None or a == b for a, b in zip(shape, x.shape, strict=False))
        if extra not in (0, 1) or not fits or (extra and tangent.shape[0] == 0):
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
    """The names of `count` tensors for an error, which tells the tensor if there are several."""
    return [(name, like_name if count == 1 else f"{like_name} (tensor {i})") for i in range(count)]


def check_count(flat: list, like: list, name: str, like_name: str) -> None:
    """Raises unless there is a tensor, or None, for each of `like`, and at least one tensor."""
    if len(flat) != len(like):
        raise ValueError(
            f"Invalid value for argument `{name}`. Expected {len(like)} tensor(s), one for each of {like_name}. "
            f"Received: {len(flat)}."
        )
    if all(vector is None for vector in flat):
        raise ValueError(f"Invalid value for argument `{name}`. Expected at least one tensor. Received: None.")


def flatten_tangents(model, x, u, name: str = "u") -> list:
    """The leaves of tangents `u` like the model's input `x`, in the order of its inputs; None is zero.

    Raises:
        ValueError: their number or a name does not fit.
    """
    return flatten_like(u, x, name, "x") if graph_of(model) is None else flatten_inputs(model, u, name)


class InputStructure:
    """The structure of `x` as the user gave it, and how its leaves lie in the flat list of a model's inputs.

    Args:
        model: a model or layer.
        x: its input, already checked. Entries of a dict that the model does not take are left out.
    """

    def __init__(self, model: Any, x: Structure):
        counter = itertools.count()
        numbered = tree.map_structure(lambda leaf: next(counter), x)
        order = flatten_inputs(model, numbered, "x")
        self._model = model
        self._places = {number: place for place, number in enumerate(order)}
        if isinstance(numbered, dict):
            numbered = {name: part for name, part in numbered.items() if set(tree.flatten(part)) <= set(order)}
        self._numbered = numbered

    def flatten(self, structure, argument: str) -> list:
        """The leaves of a structure like `x`, in the order of the model's inputs."""
        return flatten_tangents(self._model, self._numbered, structure, argument)

    def pack(self, leaves: list) -> Structure:
        """A structure like `x` of leaves in the order of the model's inputs."""
        return tree.map_structure(lambda number: leaves[self._places[number]], self._numbered)


def flatten_like(given, like, name: str, like_name: str = "the outputs") -> list:
    """The leaves of a structure like that of `like`, in the same order; None in place of a part is zero.

    Raises:
        ValueError: it has other keys, or another number of parts.
    """
    arranged = _arranged(given, like, name, like_name)
    # Where `like` is one tensor, a list of numbers is one tensor too.
    return tree.flatten(arranged) if isinstance(like, (dict, list, tuple)) else [arranged]


def _arranged(given, like, name: str, like_name: str):
    if given is None:
        return tree.map_structure(lambda _: None, like)
    if isinstance(like, dict):
        if not isinstance(given, dict) or set(given) != set(like):
            received = f"keys {list(given)}" if isinstance(given, dict) else f"{name}={checks.described(given)}"
            raise ValueError(
                f"Invalid value for argument `{name}`. Expected a dict with the keys {list(like)}, like {like_name}. "
                f"Received: {received}."
            )
        # In the order of `like`, whose leaves these are paired with.
        return type(like)((key, _arranged(given[key], part, name, like_name)) for key, part in like.items())
    if isinstance(given, dict):
        several = isinstance(like, (list, tuple))
        expected = f"{len(like)} tensor(s), one for each of {like_name}" if several else "a tensor"
        raise checks.invalid(name, expected, given)
    if isinstance(like, (list, tuple)):
        if len(like) == 1 and not isinstance(given, (list, tuple)):
            given = [given]
        if not isinstance(given, (list, tuple)) or len(given) != len(like):
            number = len(given) if isinstance(given, (list, tuple)) else 1
            raise ValueError(
                f"Invalid value for argument `{name}`. Expected {len(like)} tensor(s), one for each of {like_name}. "
                f"Received: {number}."
            )
        return [_arranged(part, each, name, like_name) for part, each in zip(given, like, strict=True)]
    return given[0] if isinstance(given, (list, tuple)) and len(given) == 1 and hasattr(given[0], "shape") else given


def weight_pairs(weights: Any) -> list[tuple[Any, Any]]:
    """Pairs of a weight, or its path, and a tangent that is not None, as `Linearization.jvp` takes them."""
    pairs = list(weights.items()) if isinstance(weights, Mapping) else weights if weights is not None else []
    if not isinstance(pairs, (list, tuple)) or not all(
        isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in pairs
    ):
        raise ValueError(
            "Invalid value for argument `weights`. Expected a dict from paths of weights to tangents, or a list of "
            f"pairs (variable, tangent). Received: weights={checks.described(weights)}"
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


def zeros(num_probes: int | Tensor, like: Tensor) -> Tensor:
    """Zero tangents `(P, B, …)` of `like` (B, …); in floats if `like` holds integers."""
    return ops.zeros((num_probes, *ops.shape(like)), dtype=like.dtype if has_tangents(like) else None)


def pack_products(products: list, structure: Structure, probed: bool) -> Structure:
    """Flat products `(P, B, …)` as users get them: in a structure, in float32 at least, without P if none was given."""
    return tree.pack_sequence_as(structure, as_given(products, probed))


def as_given(products: list, probed: bool) -> list:
    """Flat products `(P, B, …)` in float32 at least, without P if none was given."""
    return [at_least_float32(p if probed else p[0]) for p in products]


def at_least_float32(tensor: Tensor) -> Tensor:
    """A tensor of 16 bits in float32; any other as it is."""
    dtype = keras.backend.standardize_dtype(tensor.dtype)
    return ops.cast(tensor, "float32") if dtype in ("float16", "bfloat16") else tensor
