"""The replicas of `tf.distribute`: each takes a part of a batch, and some results are those of the batch as a whole.

On one device all of this is the identity; also on JAX, whose arrays are those of all devices together.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
from keras import ops

from jvpreg.common.typing import Tensor


def number() -> int:
    """The number of replicas that take this step; 1 if it is not taken by replicas."""
    context = _context()
    return 1 if context is None else context.num_replicas_in_sync


def is_scope() -> bool:
    """Whether this is the scope of a strategy of several replicas, outside of their steps."""
    if keras.backend.backend() != "tensorflow":
        return False
    import tensorflow as tf

    return tf.distribute.in_cross_replica_context() and tf.distribute.get_strategy().num_replicas_in_sync > 1


def undivided(function: Callable) -> Callable:
    """A function that is compiled and run as a whole, in the scope of a strategy."""
    import tensorflow as tf

    return tf.function(function, reduce_retracing=True, autograph=False)


def total(tensors: list) -> list:
    """The sum of each tensor over the replicas."""
    context = _context()
    return tensors if context is None or not tensors else context.all_reduce("sum", tensors)


def gathered(tensor: Tensor) -> Tensor:
    """The tensors of all replicas, of one shape: `(number of replicas, …)`. Those of the others have no gradient."""
    return total([_in_its_place(tensor)])[0]


def part_of_batch(size: int | Tensor) -> tuple:
    """The number of examples in the whole batch, if this replica has `size` of them, and the index of its first one."""
    if number() == 1:
        return size, 0
    # As floats: 32-bit integers are kept on the host, where devices do not sum them.
    sizes = ops.cast(gathered(ops.cast(size, "float32")), "int32")
    return ops.sum(sizes), ops.sum(sizes[: _place()])


def own_part(tensor: Tensor, size: int | Tensor, start: int | Tensor, axis: int = 0) -> Tensor:
    """This replica's part, for its `size` examples, of a tensor that was made for the whole batch."""
    if number() == 1:
        return tensor
    return ops.take(tensor, start + ops.arange(size), axis=axis)


def chosen_here(chosen: Tensor, size: int | Tensor, start: int | Tensor) -> Tensor:
    """Of the indices of chosen examples of the whole batch, those of this replica, counted from its first example."""
    if number() == 1:
        return chosen
    here = ops.logical_and(chosen >= start, chosen < start + size)
    return ops.take(chosen, ops.nonzero(here)[0]) - start


def whole_batch(tensor: Tensor) -> Tensor:
    """The whole batch, `(B, …)`, of which `tensor` is this replica's part. That of other replicas has no gradient."""
    if number() == 1:
        return tensor
    size = ops.shape(tensor)[0]
    batch, start = part_of_batch(size)

    def zeros(count: Tensor) -> Tensor:
        return ops.zeros((count, *ops.shape(tensor)[1:]), "float64")

    # As floats, which devices sum: those of 64 bits hold every number of 32.
    placed = ops.concatenate([zeros(start), ops.cast(tensor, "float64"), zeros(batch - start - size)])
    return ops.cast(total([placed])[0], tensor.dtype)


def own_points(points: Tensor) -> Tensor:
    """This replica's share of the points `(N, …)`, all of which every replica has drawn."""
    count, replicas, place = ops.shape(points)[0], number(), _place()
    return points if replicas == 1 else points[count * place // replicas : count * (place + 1) // replicas]


def rolled(tensor: Tensor) -> Tensor:
    """For each example the one before it in the whole batch, for the first one the last: `(B, …)`."""
    if number() == 1:
        return ops.roll(tensor, 1, axis=0)
    size = ops.shape(tensor)[0]
    # A sum: at the end of the data a replica may have no example, and so no last one.
    sizes, lasts = gathered(ops.cast(size, "float32")), gathered(ops.sum(tensor[-1:], axis=0))
    # The nearest earlier replica that has an example; the search ends at this replica itself.
    order = ops.convert_to_tensor([(_place() - i) % number() for i in range(1, number() + 1)])
    nearest = ops.take(order, ops.argmax(ops.take(sizes, order) > 0))
    return ops.concatenate([ops.expand_dims(lasts[nearest], 0), tensor], axis=0)[:size]


class Combined(NamedTuple):
    """The results of several replicas, combined.

    Attributes:
        for_loss: the means of all. Their gradient is the contribution of this replica's examples, times the number of
            replicas, since Keras divides losses by that number and sums the gradients.
        means: the means of all.
        measured: the measured numbers of all.
        sums: the sums of all.
    """

    for_loss: Any
    means: Any
    measured: list
    sums: list


def combine(means, counts, measured: Sequence = (), kinds: Sequence[tuple[int, str]] = (), sums: Sequence = ()):
    """Combines the results of replicas, by one reduction.

    Args:
        means: over this replica's examples, `(R,)`.
        counts: the number of these examples, `(R,)`.
        measured: further numbers.
        kinds: for each of these, the index of the mean to which it belongs, and its kind: `"max"`; others are averaged.
        sums: over this replica's examples, tensors of any shape.

    Returns:
        A `Combined`.
    """
    if number() == 1:
        return Combined(means, means, list(measured), list(sums))
    means = ops.where(counts > 0, means, 0.0)
    weighed = [ops.where(counts[i] > 0, value, 0.0) * counts[i] for value, (i, _) in zip(measured, kinds, strict=True)]
    apart = [_in_its_place(value) for value in measured]
    parts = [ops.stop_gradient(part) for part in (means * counts, counts, *weighed, *apart, *sums)]
    products, examples, *rest = total(parts)
    examples = ops.maximum(examples, 1.0)
    added, each, sums = rest[: len(weighed)], rest[len(weighed) : 2 * len(weighed)], rest[2 * len(weighed) :]
    overall = products / examples
    scaled = means * (number() * counts / examples)
    for_loss = scaled + ops.stop_gradient(overall - scaled)
    found = [
        ops.max(one) if kind == "max" else value / examples[i]
        for value, one, (i, kind) in zip(added, each, kinds, strict=True)
    ]
    return Combined(for_loss, overall, found, sums)


def _in_its_place(tensor):
    """A tensor as this replica's row of `(number of replicas, …)`, zero elsewhere."""
    row = ops.reshape(ops.arange(number()) == _place(), (-1, *[1] * len(tensor.shape)))
    return ops.where(row, ops.expand_dims(tensor, 0), ops.zeros((), tensor.dtype))


def _place() -> int:
    """The number of this replica, from 0."""
    context = _context()
    return 0 if context is None else context.replica_id_in_sync_group


def _context():
    if keras.backend.backend() != "tensorflow":
        return None
    import tensorflow as tf

    context = tf.distribute.get_replica_context()
    return None if context is None or context.num_replicas_in_sync == 1 else context
