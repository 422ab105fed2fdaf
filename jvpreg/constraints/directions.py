"""The directions in which a constraint looks: features, an array, or a function of the inputs."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from keras import ops, tree

from jvpreg.common import checks
from jvpreg.common.typing import Structure


class Directions:
    """Directions in the space of the inputs, as they are given to a constraint.

    Args:
        given: indices of features, for inputs `(B, D)`, as a list, a range or an array of integers; an array of floats
            `(P, …)`, the same directions for each example; or a function of the inputs that returns `(P, B, …)` or one
            direction `(B, …)`, or a list of such functions.
        argument: its name in errors.
        features_only: whether only features are allowed.

    Attributes:
        given: the argument; indices become a list.
        features: the indices, or None.

    Raises:
        ValueError: it is none of these.
    """

    def __init__(self, given: Any, argument: str, features_only: bool = False):
        if ops.is_tensor(given):
            given = ops.convert_to_numpy(ops.stop_gradient(checks.tensor(argument, given)))
        if isinstance(given, range) or (isinstance(given, np.ndarray) and given.ndim == 1 and given.dtype.kind in "iu"):
            given = [int(i) for i in given]
        self.given = given
        self.argument = argument
        self.features: list[int] | None = None
        self.functions: list[Callable] | None = None
        self.array: np.ndarray | None = None
        several = list(given) if isinstance(given, (list, tuple)) else []
        if callable(given):
            self.functions = [given]
        elif several and all(map(callable, several)):
            self.functions = several
        elif several and all(map(_is_index, several)):
            self.features = [int(i) for i in several]
        elif isinstance(given, np.ndarray) and given.dtype.kind == "f" and given.size and np.all(np.isfinite(given)):
            self.array = given
        if not self.features and (features_only or (self.functions is None and self.array is None)):
            others = "" if features_only else ", an array of finite floats (P, …), or functions of the inputs"
            raise checks.invalid(argument, f"a list of indices of features, from 0 on{others}", given)
        if self.features and len(set(self.features)) < len(self.features):
            raise checks.invalid(argument, "each feature once", self.features)

    @property
    def count(self) -> int | None:
        """P; None if it is known only at a call."""
        if self.functions:
            counts: list[int] = [getattr(function, "num_directions", 0) for function in self.functions]
            return sum(counts) if all(counts) else None
        return len(self.features) if self.features else len(self.array)  # type: ignore[arg-type]

    def check(self, inputs: Structure) -> None:
        """Raises a ValueError if they do not fit inputs `(B, …)`."""
        if self.functions:
            return
        leaves = tree.flatten(inputs)
        shape = tuple(leaves[0].shape[1:]) if len(leaves) == 1 else None
        if self.features and (shape is None or len(shape) != 1 or max(self.features) >= shape[0]):
            raise ValueError(
                f"Invalid value for argument `{self.argument}`. Expected features of inputs (B, D)"
                f"{f', from 0 to {shape[0] - 1}' if shape is not None and len(shape) == 1 else ''}. "
                f"Received: {self.argument}={self.features}, and inputs {[('B', *x.shape[1:]) for x in leaves]}"
            )
        if self.array is not None and (shape is None or shape != self.array.shape[1:]):
            raise ValueError(
                f"Invalid value for argument `{self.argument}`. Expected an array (P, …) like the inputs. "
                f"Received: an array {self.array.shape}, and inputs {[('B', *x.shape[1:]) for x in leaves]}"
            )

    def __call__(self, inputs: Structure) -> Structure:
        """Directions `(P, B, …)` at inputs `(B, …)`."""
        self.check(inputs)
        if self.functions:
            drawn = [_with_probes(function(inputs), inputs) for function in self.functions]
            return drawn[0] if len(drawn) == 1 else tree.map_structure(lambda *parts: ops.concatenate(parts), *drawn)
        x = tree.flatten(inputs)[0]
        shape = tuple(x.shape[1:])
        vectors = np.eye(shape[0])[self.features] if self.features else self.array
        vectors = ops.expand_dims(ops.convert_to_tensor(vectors, dtype=x.dtype), 1)
        return ops.broadcast_to(vectors, (vectors.shape[0], ops.shape(x)[0], *shape))


def _is_index(value: Any) -> bool:
    return checks.is_integer(value) and value >= 0


def _with_probes(drawn: Structure, inputs: Structure) -> Structure:
    """One direction `(B, …)` as `(1, B, …)`."""
    pairs: Sequence[tuple[Any, Any]] = list(zip(tree.flatten(drawn), tree.flatten(inputs), strict=False))
    if all(len(direction.shape) == len(x.shape) for direction, x in pairs):
        return tree.map_structure(lambda direction: ops.expand_dims(direction, 0), drawn)
    return drawn
