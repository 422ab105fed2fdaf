"""Paths of layers: what a layer is called in a model's frozen graph, in logs and in arguments.

A functional or Sequential model calls its layers by their names, which its summary shows: `dense_3`, and within a model
in it `encoder/dense_3`. The paths within a subclassed layer are attributes: `encoder.conv1`, `blocks.0.conv`. Keras'
own names count the layers of the whole process, so they differ from one model of a class to the next.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras

from jvpreg.common import keras_private
from jvpreg.rules.registry import find_rule, unwrap

MOST_LISTED = 12  # paths in an error


def layer_paths(model: keras.Layer) -> dict[str, keras.Layer]:
    """The layers of a model by their paths, which every argument that names a layer takes.

    Args:
        model: a Keras model or layer; for a `JacobianModel`, the paths are those of the model in it.

    Returns:
        A dict from path to layer, a layer before those in it. In a subclassed model or layer, a path is what one writes
        to reach the layer: `"blocks.0.conv"` for `model.blocks[0].conv`. If the user has named the layer, its path ends
        in this name instead, and arguments accept both. In a functional or Sequential model the path is the layer's
        name. A layer that is found twice has the path where it was found first.

    Raises:
        ValueError: `model` is no Keras model or layer.

    Example:

    >>> import keras, jvpreg
    >>> class Net(keras.Model):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.blocks = [keras.layers.Dense(4), keras.layers.Dense(4, name="middle")]
    ...         self.head = keras.layers.Dense(2)
    >>> list(jvpreg.layer_paths(Net()))
    ['blocks.0', 'middle', 'head']
    """
    model = unwrap(model)
    if not isinstance(model, keras.Layer):
        raise ValueError(
            f"Invalid value for argument `model`. Expected a Keras model or layer. Received: model={model!r}"
        )
    return {name: layer for name, _, layer in walk(model)}


def walk(owner: Any, name: str = "", path: str = "") -> Iterator[tuple[str, str, keras.Layer]]:
    """The layers within one: what each is called, how its attributes reach it, and itself, each layer once.

    Args:
        owner: a model or layer.
        name: its path so far; empty for the model itself.
        path: the same by attributes alone.
    """
    yield from _walk(owner, name, path, not is_graph(owner), {id(owner)})


def _walk(
    owner: Any, name: str, path: str, by_attributes: bool, seen: set[int]
) -> Iterator[tuple[str, str, keras.Layer]]:
    held = _attributes_of(owner) if by_attributes else [(layer.name, layer) for layer in owner.layers]
    # What runs in place of a wrapper is named.
    pairs = [(attribute, unwrap(layer)) for attribute, layer in held]
    names = [attribute if by_attributes and is_made_up(layer) else layer.name for attribute, layer in pairs]
    mark = "." if by_attributes else "/"
    for own, (attribute, layer) in zip(names, pairs, strict=True):
        if id(layer) in seen or isinstance(layer, keras.layers.InputLayer):
            continue
        seen.add(id(layer))
        # Two layers of one name are told apart by their attributes.
        own = own if names.count(own) == 1 else attribute
        at = join(name, mark, own), join(path, mark, attribute)
        yield *at, layer
        if is_graph(layer) or find_rule(layer) is None:
            yield from _walk(layer, *at, by_attributes or not is_graph(layer), seen)


def join(owner: str, mark: str, own: str) -> str:
    """The path of a layer within its owner; in the model itself, it is the layer's own name."""
    return f"{owner}{mark}{own}" if owner else own


def is_graph(operation: Any) -> bool:
    """Whether an operation is a graph of others: a Sequential or functional model with Keras' own `call`."""
    graph = isinstance(operation, (keras.Sequential, keras.Function))
    return graph and type(operation).call.__module__.split(".")[0] == "keras"


def is_made_up(layer: keras.Layer) -> bool:
    """Whether Keras made up the name of a layer, from its class."""
    return re.fullmatch(rf"{keras_private.name_of_class(type(layer).__name__)}(_\d+)?", layer.name) is not None


def stable_name(layer: keras.Layer) -> str:
    """A layer's name, without Keras' counter."""
    return keras_private.name_of_class(type(layer).__name__) if is_made_up(layer) else layer.name


def _attributes_of(owner: Any) -> list[tuple[str, keras.Layer]]:
    """The layers that a layer or model holds, each with its attribute, in the order in which Keras tracked them."""
    if is_graph(owner):
        return [(f"layers.{i}", layer) for i, layer in enumerate(owner.layers)]
    attributes = keras_private.attributes(owner)
    single = {key: value for key, value in attributes.items() if isinstance(value, keras.Layer)}
    held = {key: value for key, value in attributes.items() if isinstance(value, (Mapping, list, tuple))}
    found: dict[int, tuple[str, keras.Layer]] = {}
    for attribute, layer in (pair for part in (single, held) for pair in _within(part)):
        found.setdefault(id(layer), (attribute, layer))
    held_by_keras = keras_private.layers_within(owner, itself=False, recursive=False)
    return [found[id(layer)] for layer in held_by_keras if id(layer) in found]


def _within(value: Any, path: str = "") -> Iterator[tuple[str, keras.Layer]]:
    if isinstance(value, keras.Layer):
        yield path, value
    elif isinstance(value, (Mapping, list, tuple)):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _within(item, join(path, ".", str(key)))


def is_within(name: str, path: str) -> bool:
    """Whether a name is a path, or lies within it."""
    return name == path or name.startswith((f"{path}/", f"{path}."))


def unknown(argument: str, path: str, known: Sequence[str], what: str, owner: str = "") -> ValueError:
    """The error for a path that is none of those known.

    Args:
        argument: the argument's name, as its caller writes it.
        path: what was received.
        known: the paths that exist.
        what: what was expected, in words.
        owner: whose argument it is, if its name alone does not tell.
    """
    shown = list(known[:MOST_LISTED])
    more = f" and {len(known) - len(shown)} more (see `jvpreg.layer_paths`)" if len(known) > len(shown) else ""
    ends = [name for name in known if name.endswith((f"/{path}", f".{path}"))]
    near = ends[:1] or difflib.get_close_matches(path, known, n=1)
    meant = f". Did you mean {near[0]!r}?" if near else ""
    of = f" of {owner}" if owner else ""
    return ValueError(
        f"Invalid value for argument `{argument}`{of}. Expected {what}: {shown}{more}. Received: {path!r}{meant}"
    )
