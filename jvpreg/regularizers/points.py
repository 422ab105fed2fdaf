"""Points away from the data at which regularizers look."""

from collections.abc import Callable

import keras
from keras import ops, tree

from jvpreg.common import checks, replicas
from jvpreg.common.dtypes import has_tangents
from jvpreg.common.seeds import independent
from jvpreg.common.typing import Seed, Structure, Tensor


def by_labels(function: Callable) -> Callable:
    """Marks a sampler of points that takes the labels too: `(inputs, seed, labels) -> points (N, …)`."""
    function.by_labels = True  # type: ignore[attr-defined]
    return function


@by_labels
def between_kinds(inputs: Structure, seed: Seed, labels: Structure | None) -> Structure:
    """Points between examples of two kinds, each a random part of the way from one to the other: N is half the batch.

    Each pair has an example of either kind, in whatever order they come. If there are fewer of one kind, its examples
    are used again. Integers beside floats are those of the example with the larger label.

    Args:
        inputs: `(B, …)`, or a structure of them.
        seed: a `keras.random.SeedGenerator`.
        labels: `(B,)` or `(B, 1)`: those of one kind are larger than the middle between the smallest and the largest.

    Raises:
        ValueError: the labels are not one number for each example.
    """
    numbers = replicas.whole_batch(_numbers(labels))
    larger = ops.cast(numbers > (ops.min(numbers) + ops.max(numbers)) / 2, "int32")
    # First all examples with the larger label.
    order = ops.argsort(1 - larger)
    size, count = ops.shape(larger)[0], ops.sum(larger)
    pairs = ops.arange((size + 1) // 2, dtype="int32")
    part = keras.random.uniform(ops.shape(pairs), dtype="float32", seed=independent(seed))
    # All of this is the same on every replica, which takes its share of the pairs.
    pairs, part = replicas.own_points(pairs), replicas.own_points(part)
    # If all examples are of one kind, none of them is larger, and a pair is an example with itself.
    one = ops.take(order, pairs % ops.where(count > 0, count, size))
    other = ops.take(order, count + pairs % (size - count))

    def points(x: Structure) -> Structure:
        whole = replicas.whole_batch(ops.convert_to_tensor(x))
        start = ops.take(whole, one, axis=0)
        return towards(start, ops.take(whole, other, axis=0), part) if has_tangents(start) else start

    return tree.map_structure(points, inputs)


def towards(start: Tensor, end: Tensor, part: Tensor) -> Tensor:
    """Points `(N, …)`, each a part `(N,)` of the way from one to another."""
    return start + ops.cast(ops.reshape(part, (-1, *[1] * (len(start.shape) - 1))), start.dtype) * (end - start)


def _numbers(labels: Structure | None) -> Tensor:
    """Labels as one number for each example, `(B,)`."""
    leaves = [leaf for leaf in tree.flatten(labels) if leaf is not None]
    if len(leaves) != 1 or any(size != 1 for size in leaves[0].shape[1:]):
        expected = 'labels (B,) or (B, 1), which tell real examples from generated ones, for points at="between"'
        raise checks.invalid("y", expected, labels)
    return ops.cast(ops.reshape(leaves[0], (-1,)), "float32")
