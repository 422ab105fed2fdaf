"""The operations of `keras.ops` that reduce axes to a number, or divide by one: extrema, deviations and norms."""

import math

import keras
from keras import ops

from jvpreg.common.dtypes import has_tangents, is_complex
from jvpreg.common.keras_private import linalg, math_ops, nn, numpy_ops
from jvpreg.rules.contract import Declined, Gate, Pushforward
from jvpreg.rules.examples import along
from jvpreg.rules.registry import register_rule


def reduced_axes(operation, x) -> list[int]:
    """The axes that are reduced, counted from the end, so that a probe axis does not shift them."""
    axis = operation.axis
    axes = range(len(x.shape)) if axis is None else [axis] if isinstance(axis, int) else axis
    return [a % len(x.shape) - len(x.shape) for a in axes]


@register_rule(numpy_ops.Max, numpy_ops.Amax, numpy_ops.Min, numpy_ops.Amin)
def extremum(operation, x, context):
    axes = reduced_axes(operation, x)
    y = operation.call(x)
    wide = y if operation.keepdims else ops.expand_dims(y, sorted(axes))
    winners = ops.cast(ops.equal(x, wide), x.dtype)
    # Among equals the tangent is the mean, as the backends' gradients have it.
    # If no entry reaches `initial`, there is no winner.
    shares = winners / ops.maximum(ops.sum(winners, axis=axes, keepdims=True), 1)

    def push(tangent, shares):
        return ops.sum(shares * tangent, axis=axes, keepdims=operation.keepdims)

    return y, Gate(push, shares, masks=[lambda shares: shares > 0], examples=along(operation, x.shape))


@register_rule(numpy_ops.Var, numpy_ops.Std)
def variance(operation, x, context):
    if is_complex(x):
        raise Declined("a variance of complex numbers")
    axes = reduced_axes(operation, x)
    y = operation.call(x)
    centered = x - ops.mean(x, axis=axes, keepdims=True)
    factor = 2.0
    if isinstance(operation, numpy_ops.Std):
        # The slope at equal numbers is 0. It is not computed from y, whose own slope there is infinite.
        centered, factor = _unit(centered, axes, ops.mean), 1.0

    def push(tangent, centered):
        return factor * ops.mean(centered * tangent, axis=axes, keepdims=operation.keepdims)

    return y, Pushforward(push, centered, examples=along(operation, x.shape))


def _unit(x, axes, reduce):
    """x divided by the root of the sum or mean of its squares; 0 where that root is 0, since x is too.

    In units of its largest entry, in float32 at least: in 16 bits, a square of 300 is infinite, one of 1e-4 zero.
    """
    wide = ops.cast(x, keras.backend.result_type(x.dtype, "float32"))
    largest = ops.stop_gradient(ops.max(ops.abs(wide), axis=axes, keepdims=True))
    scaled = wide / ops.where(largest > 0, largest, 1.0)
    squared = reduce(ops.square(scaled), axis=axes, keepdims=True)
    return ops.cast(scaled * ops.rsqrt(ops.where(squared > 0, squared, 1.0)), x.dtype)


@register_rule(linalg.Norm)
def norm(operation, x, context):
    """A norm of vectors or of matrices: its slope is frozen, which is 0 where it has no direction."""
    if is_complex(x):
        raise Declined("a norm of complex numbers")
    axes, order = reduced_axes(operation, x), operation.ord

    def push(tangent, slope):
        return ops.sum(slope * tangent, axis=axes, keepdims=operation.keepdims)

    after = along(operation, x.shape)
    if has_tangents(x) and (order == "nuc" or (len(axes) == 2 and order in (2, -2))):
        slope = _slope_of_singular_values(order, x, axes)
        return push(x, slope), Pushforward(push, slope, examples=after)  # ‖A‖ = ⟨slope, A⟩
    # Not by the operation itself: on JAX it takes no list of axes.
    y = ops.norm(x, order, operation.axis and tuple(operation.axis), operation.keepdims)
    if order == 0 or not has_tangents(x):
        return y, None  # a count, or a norm of whole numbers
    affine = order in (1, math.inf, -math.inf) or (order == -1 and len(axes) == 2)
    masks = [(lambda slope: ops.stack([slope > 0, slope < 0], axis=-1)) if affine else None]
    return y, Gate(push, _slope_of_norm(order, x, axes), masks=masks, examples=after)


def _slope_of_norm(order, x, axes: list[int]):
    """The slope of a norm along axes, of the shape of x."""
    if order in (None, "fro") or (order == 2 and len(axes) == 1):
        return _unit(x, axes, ops.sum)
    size, best = ops.abs(x), ops.max if order in (1, math.inf) else ops.min
    if len(axes) == 2:  # the largest or the smallest sum, of columns or of rows
        summed, across = axes if abs(order) == 1 else axes[::-1]
        return ops.sign(x) * shares(ops.sum(size, axis=summed, keepdims=True), [across], best)
    if order == 1:
        return ops.sign(x)
    return ops.sign(x) * (shares(size, axes, best) if math.isinf(order) else _power_mean(size, axes, order))


def _slope_of_singular_values(order, x, axes: list[int]):
    """The slope of the sum, the largest or the smallest of the singular values σ, each of which has the slope u vᵀ."""
    u, s, vh = ops.svd(ops.moveaxis(x, axes, (-2, -1)), full_matrices=False)
    share = ops.ones_like(s) if order == "nuc" else shares(s, [-1], ops.max if order == 2 else ops.min)
    return ops.moveaxis(ops.matmul(u * ops.expand_dims(share, -2), vh), (-2, -1), axes)


def shares(x, axes: list[int], best):
    """1 at the largest or the smallest entry, and 0 elsewhere; several that are equal share it, as in autodiff."""
    winners = ops.cast(ops.equal(x, best(x, axis=axes, keepdims=True)), x.dtype)
    return winners / ops.sum(winners, axis=axes, keepdims=True)


def _power_mean(size, axes: list[int], order):
    """`(|x| / ‖x‖)^(p − 1)`, the slope of `(Σ |x|^p)^(1/p)` by |x|; 0 where x is 0."""
    largest = ops.stop_gradient(ops.max(size, axis=axes, keepdims=True))
    above = size > 0
    if order < 0:  # where one entry is 0, the norm is, and stays so
        above = ops.logical_and(above, ops.all(above, axis=axes, keepdims=True))
    scaled = ops.where(above, size, 1.0) / ops.where(largest > 0, largest, 1.0)
    total = ops.sum(ops.where(above, ops.power(scaled, order), 0.0), axis=axes, keepdims=True)
    total = ops.where(total > 0, total, 1.0)
    return ops.where(above, ops.power(scaled, order - 1) * ops.power(total, 1 / order - 1), 0.0)


@register_rule(math_ops.Logsumexp)
def logsumexp(operation, x, context):
    axes = reduced_axes(operation, x)
    y = operation.call(x)
    wide = y if operation.keepdims else ops.expand_dims(y, sorted(axes))

    def push(tangent, shares):
        return ops.sum(shares * tangent, axis=axes, keepdims=operation.keepdims)

    # If all entries are −∞, every share is 0.
    shares = ops.exp(ops.where(ops.isfinite(wide), x - wide, -float("inf")))
    return y, Pushforward(push, shares, examples=along(operation, x.shape), finite=False)


@register_rule(nn.Normalize)
def normalize(operation, x, context):
    """`x / max(‖x‖₂, ε)`."""
    if operation.order != 2:
        raise Declined("a norm of another order than 2")
    axes = reduced_axes(operation, x)
    floor = keras.config.epsilon() if operation.epsilon is None else operation.epsilon
    squares = ops.sum(ops.square(x), axis=axes, keepdims=True)
    inverse = ops.rsqrt(ops.maximum(squares, floor**2))
    y = operation.call(x)
    above = ops.cast(squares > floor**2, x.dtype)

    def push(tangent, y, inverse, above):
        return inverse * (tangent - above * y * ops.sum(y * tangent, axis=axes, keepdims=True))

    return y, Pushforward(push, y, inverse, above, examples=along(operation, x.shape))
