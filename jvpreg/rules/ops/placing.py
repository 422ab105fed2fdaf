"""Operations that take a block at given indices out of a tensor, or put or sum one there: linear in what they move."""

from collections.abc import Callable, Sequence

import keras
from keras import ops, tree

from jvpreg.common.keras_private import core, math_ops
from jvpreg.rules.contract import Declined, Pushforward
from jvpreg.rules.examples import MIXED, kept
from jvpreg.rules.families import each_input
from jvpreg.rules.folding import each_probe
from jvpreg.rules.registry import register_rule


def _held(indices) -> list:
    """The tensors in indices, which are inputs of the operation too."""
    return [leaf for leaf in tree.flatten(indices) if ops.is_tensor(leaf)]


def _with_probes(indices, frozen: Sequence):
    """The indices of a block with all probes: 0 along their axis, and what is frozen in place of tensors."""
    if ops.is_tensor(indices):
        return ops.concatenate([ops.zeros((1,), indices.dtype), frozen[0][0]])
    remaining = iter(frozen)
    return (0, *(next(remaining)[0] if ops.is_tensor(index) else index for index in indices))


def _whole(indices, sizes: Sequence, of: Sequence) -> list[bool]:
    """For each axis whether a block of these sizes takes all of it, as far as that is known."""
    if ops.is_tensor(indices):
        return [False] * len(of)
    triples = zip(indices, sizes, of, strict=True)
    return [not ops.is_tensor(start) and start == 0 and size in (-1, whole) for start, size, whole in triples]


def _where_taken(whole: Sequence[bool]) -> Callable:
    """Where the examples are after an operation on a block: where they were, if it has all of them."""

    def after(*places):
        place = kept(*places)
        return place if place.axis >= 0 and whole[place.axis] else MIXED

    return after


@register_rule(core.Slice)
def slice_block(operation, x, start_indices, context):
    # If a call reads a batch size that is not known, the shape has None for it.
    sizes = list(operation.shape)
    whole = _whole(start_indices, sizes, x.shape)
    if None in [size for size, all_of_it in zip(sizes, whole, strict=True) if not all_of_it]:
        raise Declined("the size of its slice is not known")
    count = len(_held(start_indices))

    def take(x, start, leading=()):
        rest = ops.shape(x)[len(leading) :]
        known = [n if all_of_it else size for n, size, all_of_it in zip(rest, sizes, whole, strict=True)]
        return ops.slice(x, start, (*leading, *known))

    def push(tangent, *others):
        return take(tangent, _with_probes(start_indices, others[count:]), ops.shape(tangent)[:1])

    after = _where_taken(whole)

    def examples(place, *of_indices):
        return MIXED if place is None else after(place)

    return take(x, start_indices), Pushforward(push, *_held(start_indices), takes_none=True, examples=examples)


@register_rule(core.SliceUpdate)
def update_block(operation, x, start_indices, updates, context):
    held = _held(start_indices)
    whole = _whole(start_indices, updates.shape, x.shape)

    def push(tangent, *others):
        moved = others[len(held)]
        given = tangent if tangent is not None else moved
        # An input without a tangent (an empty cache) gets zeros for as many examples as the other has.
        leading = ops.shape(given)[: 2 if whole[0] else 1]
        both = [_zeros_like(a, leading) if t is None else t for a, t in ((x, tangent), (updates, moved))]
        return _put(both[0], _with_probes(start_indices, others[len(held) + 1 :]), both[1])

    after = _where_taken(whole)
    return _put(x, start_indices, updates), Pushforward(
        push, *held, takes_none=True, examples=lambda *places: after(places[0], places[-1])
    )


def _put(x, start, updates):
    """`ops.slice_update`, on TensorFlow by an operation that has a gradient, which Keras' own there has not."""
    if keras.backend.backend() != "tensorflow":
        return ops.slice_update(x, start, updates)
    import tensorflow as tf

    start = tf.cast(tf.stack(start), "int32") if isinstance(start, (tuple, list)) else start
    ends = {"begin": start, "end": start + tf.shape(updates), "strides": tf.ones_like(start)}
    return tf.raw_ops.TensorStridedSliceUpdate(input=x, value=updates, **ends)


def _zeros_like(x, leading: Sequence):
    """The zero tangent of x; `leading` are its first axes, the probes before those of x."""
    return ops.zeros((*leading, *ops.shape(x)[len(leading) - 1 :]), x.dtype)


def _probes_last(function: Callable, *tangents):
    """`function` of tangents `(P, …)` with the probes on their last axis, along which it does the same to each."""
    if tangents[0].shape[0] == 1:
        return each_probe(function)(*tangents)
    return ops.moveaxis(function(*(ops.moveaxis(tangent, 0, -1) for tangent in tangents)), -1, 0)


@register_rule(core.Scatter)
def scatter(operation, indices, values, context):
    def push(values, indices):
        probes = () if values.shape[0] == 1 else ops.shape(values)[:1]
        shape = (*operation.shape, *probes)
        return _probes_last(lambda values: ops.scatter(indices[0], values, shape), values)

    parts = [push] if not ops.is_tensor(indices) else [None, push]
    frozen = [ops.convert_to_tensor(indices)]
    return operation.call(indices, values), Pushforward(
        each_input(*parts), *frozen, takes_none=True, examples="coupled"
    )


@register_rule(core.ScatterUpdate)
def scatter_update(operation, x, indices, updates, context):
    """Entries that are put into x, or added to it: a tangent moves likewise."""
    if operation.reduction not in (None, "add"):
        raise Declined(f"the reduction {operation.reduction!r}")
    fixed = not ops.is_tensor(indices)

    def push(tangent, *others):
        moved, at = others[-2:]

        def update(x, updates):
            return ops.scatter_update(x, at[0], updates, operation.reduction)

        return _probes_last(update, tangent, moved)

    # A tangent that is missing is filled with zeros: where an entry is replaced, that of x is lost.
    y = operation.call(x, indices, updates)
    return y, Pushforward(push, ops.convert_to_tensor(indices) if fixed else indices, examples="coupled")


def _by_segment(place, *of_ids):
    """Where the examples are after a sum over segments of the first axis."""
    known = [p for p in of_ids if p is not None]
    return MIXED if place is None or known or place.axis == 0 else place


@register_rule(math_ops.SegmentSum)
def segment_sum(operation, x, segment_ids, context):
    push = _of_segments(lambda tangent, ids: operation.call(tangent, ids))
    y = operation.call(x, segment_ids)
    return y, Pushforward(push, ops.convert_to_tensor(segment_ids), takes_none=True, examples=_by_segment)


@register_rule(math_ops.SegmentProd)
def segment_prod(operation, x, segment_ids, context):
    """Each entry's slope is the product of the others: see `jvpreg.rules.ops.products`."""
    y = operation.call(x, segment_ids)
    ids = ops.convert_to_tensor(segment_ids)
    count = y.shape[0]
    zero = x == 0
    own = ops.clip(ids, 0, count - 1)  # an index beyond the segments is dropped, and so is its slope
    product = operation.call(ops.where(zero, 1.0, x), ids)
    zeros = ops.segment_sum(ops.cast(zero, x.dtype), ids, count)
    product, zeros = ops.take(product, own, axis=0), ops.take(zeros, own, axis=0)
    others = ops.where(zeros == ops.cast(zero, x.dtype), product / ops.where(zero, 1.0, x), 0.0)

    def push(tangent, others, ids):
        sums = _of_segments(lambda tangent, ids: ops.segment_sum(tangent, ids, count))
        return sums(tangent * others, ids)

    parts = [push] if not ops.is_tensor(segment_ids) else [push, None]
    return y, Pushforward(each_input(*parts), others, ids, takes_none=True, examples="coupled")


def _of_segments(function: Callable) -> Callable:
    """A sum over segments of the first axis, as a map of tangents: with the probes behind it, if there are several."""

    def push(tangent, *others):
        ids = others[-1][0]
        if tangent.shape[0] == 1:
            return each_probe(lambda row: function(row, ids))(tangent)
        return ops.moveaxis(function(ops.moveaxis(tangent, 0, 1), ids), 1, 0)

    return push
