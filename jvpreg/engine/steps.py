"""The steps of a `call` on symbols, so that two calls can be compared."""

import functools
from typing import Any, NamedTuple

import keras
import numpy as np

TRACES = "_jvpreg_traces"
"""The attribute of a layer that holds what is remembered of its calls."""

PLAIN = (bool, int, float, complex, str, bytes, type(None), np.generic, np.dtype)
"""Types whose values are compared; anything else is the same if it is the same object."""


class Step(NamedTuple):
    """What a call did with symbols.

    Attributes:
        operation: the operation or layer that it called.
        attributes: those of an operation; empty for a layer.
        arguments: with which arguments.
        outputs: what it returned.
    """

    operation: Any
    attributes: dict[str, Any]
    arguments: tuple
    outputs: Any

    @classmethod
    def of(cls, operation, args: tuple, kwargs: dict, outputs) -> "Step":
        """The step of an operation that was called with these arguments."""
        attributes = {} if isinstance(operation, keras.Layer) else attributes_of(operation)
        return cls(operation, attributes, copied((args, kwargs)), outputs)

    def is_of(self, operation, args: tuple, kwargs: dict) -> bool:
        """Whether it is that of this operation, or layer, with these arguments."""
        if isinstance(operation, keras.Layer):
            alike = operation is self.operation
        else:
            alike = type(operation) is type(self.operation) and same(attributes_of(operation), self.attributes)
        return alike and same((args, kwargs), self.arguments)


def attributes_of(operation) -> dict[str, Any]:
    """The attributes of an operation or a layer that not every operation, or layer, has."""
    common = _common(keras.Layer if isinstance(operation, keras.Layer) else keras.Operation)
    return {key: copied(value) for key, value in vars(operation).items() if key not in common}


@functools.cache
def _common(kind: type) -> frozenset[str]:
    # With a name, since Keras would count one without, and number those of the user differently.
    return frozenset(vars(kind(name="any"))) | {TRACES}


def copied(structure):
    """A structure with lists and dicts of its own, which do not change with those that were given."""
    if isinstance(structure, dict):
        return {key: copied(value) for key, value in structure.items()}
    if isinstance(structure, (list, tuple)):
        return tuple(map(copied, structure))
    return set(structure) if isinstance(structure, set) else structure


def same(one, other) -> bool:
    """Whether two structures are alike: the same objects in them, or equal numbers and texts."""
    if one is other:
        return True
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if type(one) is not type(other):
        return False
    if isinstance(one, slice):
        return same((one.start, one.stop, one.step), (other.start, other.stop, other.step))
    return isinstance(one, (*PLAIN, set)) and bool(one == other)


def leaves_in(structure) -> list:
    """The leaves of lists, tuples, dicts and slices."""
    if isinstance(structure, dict):
        structure = tuple(structure.values())
    if isinstance(structure, slice):
        structure = structure.start, structure.stop, structure.step
    return (
        [leaf for part in structure for leaf in leaves_in(part)]
        if isinstance(structure, (list, tuple))
        else [structure]
    )
