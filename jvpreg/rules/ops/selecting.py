"""The operations of `keras.ops` that select entries: sorting, the k largest, quantiles, extrema of segments.

What is frozen at `x` is which entries were selected: their indices, or a share for each of several that are equal.
"""

import math

import keras
from keras import ops

from jvpreg.common.eager import shape_of
from jvpreg.common.keras_private import math_ops, numpy_ops
from jvpreg.rules.contract import Declined, Gate, Pushforward
from jvpreg.rules.examples import GONE, MIXED, along, besides, kept
from jvpreg.rules.folding import each_probe
from jvpreg.rules.ops.reducing import reduced_axes
from jvpreg.rules.registry import register_rule


@register_rule(math_ops.TopK)
def top_k(operation, x, context):
    """The k largest values have the tangents of the entries that they are; the indices have none."""
    values, indices = operation.call(x)

    def push(tangent, indices):
        return ops.take_along_axis(tangent, indices, axis=-1), None

    return (values, indices), Pushforward(push, indices, examples=besides([-1], len(x.shape)))


@register_rule(numpy_ops.Sort)
def sort(operation, x, context):
    flat = operation.axis is None
    axis = -1 if flat else operation.axis % len(x.shape) - len(x.shape)
    order = ops.argsort(x, axis=operation.axis)

    def push(tangent, order):
        tangent = ops.reshape(tangent, (ops.shape(tangent)[0], -1)) if flat else tangent
        return ops.take_along_axis(tangent, order, axis=axis)

    return operation.call(x), Pushforward(push, order, examples=along(operation, x.shape))


@register_rule(numpy_ops.Median, numpy_ops.Percentile, numpy_ops.Quantile)
def quantile(operation, x, *q, context):
    """Between the two entries that are next to it in their order, with a share of each."""
    if any(map(ops.is_tensor, q)):
        raise Declined("a probability that is a tensor")
    axes = sorted(reduced_axes(operation, x))

    def merged(entries):
        """The reduced axes as one, the last."""
        entries = ops.moveaxis(entries, axes, list(range(-len(axes), 0)))
        return ops.reshape(entries, (*ops.shape(entries)[: -len(axes)], -1))

    # Of the numbers 0, 1, …, a quantile is its own place: so the same operation tells places, by any of its methods.
    arguments = {"method": operation.method} if q else {}
    # Not by the operation itself: on JAX it takes no list of axes.
    call = type(operation)(axis=tuple(axes), keepdims=operation.keepdims, **arguments).call
    size = math.prod(shape_of(x)[axis] for axis in axes)
    numbers = ops.cast(ops.arange(size), keras.backend.result_type(x.dtype, "float32"))
    places = ops.cast(type(operation)(axis=None, **arguments).call(numbers, *q), numbers.dtype)
    share = places - ops.floor(places)
    order = ops.argsort(merged(x), axis=-1)
    several = len(places.shape) > 0

    def at(places):
        entries = ops.take(order, ops.clip(ops.cast(places, "int32"), 0, size - 1), axis=-1)
        return entries if several else ops.expand_dims(entries, -1)

    def push(tangent, below, above):
        tangent = merged(tangent)
        left, right = (ops.take_along_axis(tangent, places, axis=-1) for places in (below, above))
        picked = left + ops.cast(share, tangent.dtype) * (right - left)
        picked = ops.moveaxis(picked, -1, 1) if several else ops.squeeze(picked, -1)
        return ops.expand_dims(picked, axes) if operation.keepdims else picked

    reduced = along(operation, x.shape)

    def after(*given):
        place = reduced(*given)
        return place._replace(axis=place.axis + 1) if several and place.axis >= 0 else place

    pushforward = Pushforward(push, at(ops.floor(places)), at(ops.floor(places) + 1), examples=after)
    return call(x, *q), pushforward


@register_rule(math_ops.SegmentMax, math_ops.SegmentMin)
def segment_extremum(operation, x, segment_ids, context):
    """Among equals the tangent is the mean, as the backends' gradients have it."""
    y = operation.call(x, segment_ids)
    count = ops.shape(y)[0]
    ids = ops.convert_to_tensor(segment_ids)

    def of_own(values, ids):
        """For each entry the value of its segment. The entries of no segment, which are left out, get any."""
        return ops.take(values, ops.clip(ids, 0, count - 1), axis=0)

    def total(entries, ids):
        """The sum of each segment; not by `ops.segment_sum`, which on Torch rounds to float32."""
        inside = ops.logical_and(ids >= 0, ids < count)
        places = ops.expand_dims(ops.where(inside, ids, count), -1)
        return ops.scatter(places, entries, (count + 1, *ops.shape(entries)[len(ids.shape) :]))[:count]

    best = of_own(y, ids)
    if keras.backend.backend() == "torch":  # where the extrema themselves are rounded to float32
        winners = ops.equal(ops.cast(x, "float32"), ops.cast(best, "float32"))
    else:
        winners = ops.equal(x, best)
    winners = ops.cast(winners, x.dtype)
    shares = winners / ops.maximum(of_own(total(winners, ids), ids), 1)

    def push(tangent, *others):
        shares, ids = others[-2:]
        return each_probe(lambda row: total(shares[0] * row, ids[0]))(tangent)

    def after(place, *of_ids):
        place = kept(place, *of_ids)
        if place in (MIXED, GONE) or place.axis < len(ids.shape):
            return MIXED
        return place._replace(axis=place.axis - len(ids.shape) + 1)

    masks = [lambda shares: shares > 0, None]
    return y, Gate(push, shares, ids, masks=masks, takes_none=True, examples=after)
