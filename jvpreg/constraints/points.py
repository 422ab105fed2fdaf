"""Points away from the data at which a constraint must hold: functions `(inputs, seed) -> points (N, …)`."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from jvpreg.common import checks, replicas
from jvpreg.common.dtypes import has_tangents
from jvpreg.common.seeds import independent
from jvpreg.common.typing import ArrayLike, Config, Seed, Structure
from jvpreg.regularizers.points import towards


@keras.saving.register_keras_serializable(package="jvpreg", name="between")
def between(inputs: Structure, seed: Seed) -> Structure:
    """Points between data: each example is moved a random part of the way to the next example of its batch.

    Integers beside floats, such as codes of categories, have nothing between them: a point keeps those of its example.

    Args:
        inputs: `(B, …)`, or a structure of them.
        seed: a `keras.random.SeedGenerator`.

    Returns:
        Points like `inputs`.

    Raises:
        ValueError: no input holds floats.

    Example:

    >>> import keras, numpy as np, jvpreg
    >>> points = jvpreg.constraints.between(np.array([[0.0], [1.0]]), keras.random.SeedGenerator(0))
    >>> bool(keras.ops.all(points >= 0)), bool(keras.ops.all(points <= 1))
    (True, True)
    """
    leaves = [checks.tensor("inputs", x) for x in tree.flatten(inputs)]
    if not leaves or any(len(x.shape) == 0 for x in leaves):
        raise checks.invalid("inputs", "tensors (B, …)", inputs)
    if not any(map(has_tangents, leaves)):
        raise checks.invalid("inputs", "floats, between which there are others", inputs)
    seed = checks.seed("seed", seed, generator=True)
    size = ops.shape(leaves[0])[0]
    batch, start = replicas.part_of_batch(size)
    part = keras.random.uniform((batch,), dtype="float32", seed=independent(seed))
    part = replicas.own_part(part, size, start)

    def moved(x: Structure) -> Structure:
        x = ops.convert_to_tensor(x)
        if not has_tangents(x):
            return x
        return towards(x, replicas.rolled(x), part)

    return tree.map_structure(moved, inputs)


@keras.saving.register_keras_serializable(package="jvpreg")
class Box:
    """Points drawn uniformly from a box, new ones in each step: a sampler of a domain.

    Args:
        low: a number, or an array like one example.
        high: like `low`, and nowhere below it.
        num_points: N.

    Raises:
        ValueError: the box is empty, or N is not a positive integer.

    Example:

    >>> import keras, numpy as np, jvpreg
    >>> box = jvpreg.constraints.Box(-1.0, [1.0, 2.0], num_points=64)
    >>> tuple(box(np.zeros((8, 2)), keras.random.SeedGenerator(0)).shape)
    (64, 2)
    """

    def __init__(self, low: ArrayLike, high: ArrayLike, num_points: int):
        bounds = [checks.array("low", low), checks.array("high", high)]
        if not _fit(*bounds) or np.any(bounds[0] > bounds[1]):
            raise checks.invalid("low", f"numbers like `high`, nowhere above it, which is {high!r}", low)
        self.low, self.high = (bound.tolist() for bound in bounds)
        self.num_points = checks.count("num_points", num_points)

    def __call__(self, inputs: Structure, seed: Seed) -> Structure:
        """Points `(N, …)` like `inputs` (B, …)."""
        self.check(inputs)
        inputs = ops.convert_to_tensor(inputs)
        low, high = (ops.convert_to_tensor(bound, dtype=inputs.dtype) for bound in (self.low, self.high))
        part = keras.random.uniform((self.num_points, *inputs.shape[1:]), dtype=inputs.dtype, seed=independent(seed))
        return low + replicas.own_points(part) * (high - low)

    def check(self, inputs: Structure) -> None:
        """Raises a ValueError if it is not a box of inputs `(B, …)`."""
        leaves = tree.flatten(inputs)
        if len(leaves) != 1:
            raise ValueError(
                "Invalid value for argument `at`. Expected a function `(inputs, seed) -> points` with points for each "
                f"of the {len(leaves)} inputs of the model. Received: {self!r}, a box of one input"
            )
        shape = tuple(leaves[0].shape[1:])
        for name in ("low", "high"):
            sizes = np.shape(getattr(self, name))
            pairs = zip(sizes, shape, strict=False)
            if sizes and (len(sizes) != len(shape) or any(size is not None and own != size for own, size in pairs)):
                expected = f"a number, or an array like one example, {shape}"
                raise checks.invalid(name, expected, np.asarray(getattr(self, name)))

    def get_config(self) -> Config:
        """The arguments of `__init__`."""
        return {"low": self.low, "high": self.high, "num_points": self.num_points}

    @classmethod
    def from_config(cls, config: Config) -> "Box":
        """The box that `get_config` described."""
        return cls(**config)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Box) and self.get_config() == other.get_config()

    def __hash__(self) -> int:
        return hash(str(self.get_config()))

    def __repr__(self) -> str:
        return f"Box(low={self.low}, high={self.high}, num_points={self.num_points})"


def _fit(low: np.ndarray, high: np.ndarray) -> bool:
    try:
        np.broadcast_shapes(low.shape, high.shape)
    except ValueError:
        return False
    return True


def as_points(given: Any) -> str | Callable:
    """The meaning of `at`: `"data"`, a function, or the path of a layer.

    Raises:
        ValueError: it is none of these.
    """
    if isinstance(given, str) and given == "between":
        return between
    if (isinstance(given, str) and given) or callable(given):
        return given
    expected = '"data", "between", a function `(inputs, seed) -> points`, or the path of a layer'
    raise checks.invalid("at", expected, given)
