"""Random inputs of the zoos' models."""

from collections.abc import Callable
from typing import Any

import numpy as np

Draw = Callable[[np.random.Generator, int], Any]


def normal(*shape: int) -> Draw:
    """Normal numbers `(B, *shape)`."""
    return lambda random, batch: random.normal(size=(batch, *shape)).astype("float32")


def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Draw:
    """Uniform numbers `(B, *shape)`: pixels, coordinates."""
    return lambda random, batch: random.uniform(low, high, (batch, *shape)).astype("float32")


def whole(below: int, *shape: int) -> Draw:
    """Whole numbers `(B, *shape)`: token ids, categories."""
    return lambda random, batch: random.integers(0, below, (batch, *shape)).astype("int32")


def padding(length: int) -> Draw:
    """Masks `(B, length)` of sentences of several lengths: 1 where there is a token."""
    return lambda random, batch: (np.arange(length) < length - np.arange(batch)[:, None] % length).astype("int32")


def named(**draws: Draw) -> Draw:
    """A dict of inputs."""
    return lambda random, batch: {name: draw(random, batch) for name, draw in draws.items()}
