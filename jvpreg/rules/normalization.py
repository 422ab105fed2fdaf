"""Batch normalization in its three modes, normalization within an example, and shifts and scales by constants."""

import math

import keras
from keras import layers, ops

from jvpreg.common import keras_private
from jvpreg.common.eager import cast, shape_of
from jvpreg.common.keras_private import nn
from jvpreg.rules.contract import ChannelScale, Declined, Pushforward
from jvpreg.rules.examples import along, besides, kept
from jvpreg.rules.families import each_input
from jvpreg.rules.folding import fold, sum_of_products, unfold
from jvpreg.rules.registry import register_rule


def _along(axis: int, vector, x):
    """A per-channel `vector` (C,), shaped to broadcast along `axis` of `x` and of tangents of `x`.

    A tangent (P, C) of such a vector keeps its probe axis, and gets one for the batch.
    """
    if axis % len(x.shape) == len(x.shape) - 1 and len(vector.shape) == 1:
        return vector
    shape = [1] * (len(x.shape) - 1)
    shape[axis - 1 if axis > 0 else axis] = vector.shape[-1]
    return ops.reshape(vector, shape if len(vector.shape) == 1 else (ops.shape(vector)[0], 1, *shape))


@register_rule(layers.BatchNormalization)
def batch_normalization(layer, x, context, mask=None):
    # As Keras: statistics and the affine map in float32 at least, whatever the compute dtype.
    dtype = keras.backend.result_type(x.dtype, "float32")
    original, dtype_out, x = x, x.dtype, cast(x, dtype)
    mode = context.batch_statistics if layer.trainable else "moving"
    if mode == "moving":
        mean, variance = ops.cast(layer.moving_mean, dtype), ops.cast(layer.moving_variance, dtype)
    else:
        mean, variance = _batch_moments(layer, x, context, mask)
    gamma = ops.cast(layer.gamma, dtype) if layer.scale else None
    beta = ops.cast(layer.beta, dtype) if layer.center else None
    inverse_deviation = ops.rsqrt(variance + layer.epsilon)
    slope = inverse_deviation if gamma is None else gamma * inverse_deviation
    offset = -mean * slope if beta is None else beta - mean * slope
    vector = slope
    slope, offset = _along(layer.axis, slope, x), _along(layer.axis, offset, x)
    if keras.backend.backend() == "torch":  # which has a kernel for batch normalization
        y = ops.batch_normalization(x, mean, variance, layer.axis, offset=beta, scale=gamma, epsilon=layer.epsilon)
    else:
        y = x * slope + offset

    def standardize(x):
        return (ops.cast(x, dtype) - _along(layer.axis, mean, x)) * _along(layer.axis, inverse_deviation, x)

    def along(u, x):
        return _along(layer.axis, ops.cast(u, dtype), x[0])

    y = cast(y, dtype_out)
    weights = [(layer.gamma, lambda u, x: along(u, x) * standardize(x[0])), (layer.beta, along)]
    if mode == "moving":

        def along_variance(u, x):
            return -0.5 * along(u, x) * slope * _along(layer.axis, inverse_deviation, x[0]) * standardize(x[0])

        weights += [
            (layer.moving_mean, lambda u, x: -slope * along(u, x)),
            (layer.moving_variance, along_variance),
        ]
    if mode != "coupled":
        return y, ChannelScale(original, vector, layer.axis, offset, weights=weights)
    return y, _coupled(layer, x, slope, standardize(x), mask)


def _coupled(layer, x, slope, standardized, mask) -> Pushforward:
    """The pushforward of a batch normalization whose statistics move with every example."""
    dtype, channel = x.dtype, layer.axis % len(x.shape)
    # Every axis of a tangent (P, B, …) but the probes and the channels.
    reduced = [axis + 1 for axis in range(len(x.shape)) if axis != channel]

    def average(tangent, kept):
        if not kept:
            return ops.mean(tangent, axis=reduced, keepdims=True)
        # As Keras: it adds an epsilon to the number of steps that are not masked.
        count = ops.sum(ops.cast(kept[0], dtype), axis=reduced, keepdims=True) + keras.config.epsilon()
        return ops.sum(ops.where(kept[0], tangent, 0.0), axis=reduced, keepdims=True) / count

    def push_coupled(tangent, standardized, *kept):
        """The derivative of the batch map: the statistics move with every example."""
        wide = ops.cast(tangent, dtype)
        centered = wide - average(wide, kept)
        return ops.cast(slope * (centered - standardized * average(standardized * centered, kept)), tangent.dtype)

    weights = [
        (layer.gamma, lambda u, standardized, *kept: _along(layer.axis, ops.cast(u, dtype), x) * standardized),
        (layer.beta, lambda u, standardized, *kept: _along(layer.axis, ops.cast(u, dtype), x)),
    ]
    kept = [] if mask is None else [ops.broadcast_to(ops.expand_dims(ops.cast(mask, "bool"), -1), ops.shape(x))]
    return Pushforward(push_coupled, standardized, *kept, weights=weights, examples="coupled")


def _batch_moments(layer, x, context, mask):
    """The statistics of the batch; in training they also enter the moving averages, once."""
    if layer.renorm:
        raise NotImplementedError(
            f"`{layer.path}` uses batch renormalization, which has no rule on batch statistics. "
            'Set `renorm=False`, or linearize with `batch_statistics="moving"`.'
        )
    moments = keras_private.batch_moments(layer, x, mask)  # Under a mask, with an epsilon of Keras' own.
    mean, variance = (ops.reshape(moment, layer.moving_mean.shape) for moment in moments)
    if context.training:
        for moving, current in ((layer.moving_mean, mean), (layer.moving_variance, variance)):
            old = ops.cast(moving, x.dtype)
            moving.assign(old * layer.momentum + current * (1.0 - layer.momentum))
    return mean, variance


@register_rule(layers.Rescaling)
def rescaling(layer, x, context):
    slope = ops.cast(layer.scale, x.dtype)
    if len(slope.shape) > 0 and keras.config.image_data_format() == "channels_first":
        slope = ops.reshape(slope, (*slope.shape, *[1] * (3 - len(slope.shape))))
    return layer.call(x), Pushforward(lambda tangent: tangent * slope)


@register_rule(layers.Normalization)
def normalization(layer, x, context):
    deviation = ops.maximum(ops.sqrt(ops.cast(layer.variance, x.dtype)), keras.config.epsilon())
    return layer.call(x), Pushforward(lambda t: t * deviation if layer.invert else t / deviation)


@register_rule(nn.BatchNorm)
def batch_normalization_by(operation, x, mean, variance, offset=None, scale=None, context=None):
    """`(x − mean) / deviation · scale + offset`, with vectors (C,) that are inputs like x."""
    y = operation.call(x, mean, variance, offset, scale)
    dtype = keras.backend.result_type(x.dtype, "float32")
    wide, mean = cast(x, dtype), cast(mean, dtype)
    inverse = ops.rsqrt(cast(variance, dtype) + operation.epsilon)
    slope = inverse if scale is None else inverse * cast(scale, dtype)

    def along(vector):
        return _along(operation.axis, vector, x)

    def standardized(x, mean, inverse):
        return (x - along(mean)) * along(inverse)

    def by_variance(t, x, mean, inverse, slope):
        return -0.5 * along(t * slope * inverse) * standardized(x, mean, inverse)

    parts = [
        lambda t, x, mean, inverse, slope: t * along(slope),
        lambda t, x, mean, inverse, slope: -along(t * slope) * ops.ones_like(x),
        by_variance,
    ]
    if offset is not None:
        parts.append(lambda t, x, *others: along(t) * ops.ones_like(x))
    if scale is not None:
        parts.append(lambda t, x, mean, inverse, slope: along(t) * standardized(x, mean, inverse))

    def in_dtype(part):
        return lambda tangent, *residuals: part(cast(tangent, dtype), *residuals)

    push = each_input(*map(in_dtype, parts))
    return y, Pushforward(push, wide, mean, inverse, slope, takes_none=True, examples=kept)


# ---------------------------------------------------------------- within an example


def _standardized(x, axes, epsilon, center: bool):
    """`(x − mean) / deviation` over the axes, and the deviation's inverse; the mean is 0 if not `center`.

    The moments are not those of `ops.moments`: on TensorFlow, the mean within that variance has no gradient, which is
    right to first order, and wrong for the gradient of a penalty on a tangent.
    """
    centered = x - ops.mean(x, axis=axes, keepdims=True) if center else x
    inverse = ops.rsqrt(ops.mean(ops.square(centered), axis=axes, keepdims=True) + epsilon)
    return centered * inverse, inverse


def _push_standardized(tangent, y, slope, axes, center: bool, context, unit=1.0):
    """The tangent of `scale · standardized(x)`.

    Args:
        tangent: of x, (P, B, …).
        y: the standardized x; or x in another `unit`, centered and not yet divided by its deviation.
        slope: the scale divided by the deviation.
        axes: the axes over which x is standardized, counted from the end.
        center: whether the mean is subtracted.
        context: see `Context`.
        unit: the square of the factor that makes y standardized.
    """
    count = math.prod(shape_of(y)[axis] for axis in axes)
    count = count if isinstance(count, int) else ops.cast(count, y.dtype)
    # Few sums of large tensors: y has a mean of zero, so that tangents need not be centered first.
    image = slope * tangent - y * (slope * (unit * sum_of_products(y, tangent, axes, context) / count))
    return image - slope * _mean(tangent, axes, context) if center else image


def _mean(tangent, axes, context):
    if axes == [-1] and context.under_xla:
        size = tangent.shape[-1]
        return ops.expand_dims(ops.matmul(tangent, ops.full((size,), 1 / size, tangent.dtype)), -1)
    return unfold(ops.mean(fold(tangent), axis=axes, keepdims=True), ops.shape(tangent)[0])


@register_rule(nn.LayerNorm, nn.RMSNorm)
def layer_normalization(operation, x, gamma=None, beta=None, context=None, **kwargs):
    """`γ (x − mean) / deviation + β` over the last axes, whose shape γ and β have."""
    gamma = kwargs.get("scale", gamma)
    center = isinstance(operation, nn.LayerNorm)
    if center and operation.rms_scaling:
        raise Declined("the deprecated `rms_scaling`")
    axes = [operation.axis] if isinstance(operation.axis, int) else list(operation.axis)
    axes = [axis % len(x.shape) - len(x.shape) for axis in axes]
    dtype = keras.backend.result_type(x.dtype, "float32")
    wide = ops.cast(x, dtype)
    epsilon = keras.config.epsilon() if operation.epsilon is None else operation.epsilon
    standardized, inverse = _standardized(wide, axes, epsilon, center)

    def spread(vector, leading: int):
        """A weight's values along `axes`, or its tangent with `leading` = 1 axis for the probes."""
        shape = [x.shape[axis] if axis in axes else 1 for axis in range(-len(x.shape), 0)]
        return ops.reshape(ops.cast(vector, dtype), (*ops.shape(vector)[:leading], *shape))

    y = standardized if gamma is None else standardized * spread(gamma, 0)
    y = y if beta is None else y + spread(beta, 0)

    def by_input(tangent, standardized, inverse):
        image = _push_standardized(ops.cast(tangent, dtype), standardized, inverse, axes, center, context)
        return image if gamma is None else image * spread(gamma, 0)

    def by_gamma(u, standardized, inverse):
        return spread(u, 1) * standardized

    def by_beta(u, standardized, inverse):
        return spread(u, 1) * ops.ones_like(standardized)

    weight_parts = [part for part, weight in ((by_gamma, gamma), (by_beta, beta)) if weight is not None]
    push, after = each_input(by_input, *weight_parts), besides(axes, len(x.shape))
    return ops.cast(y, x.dtype), Pushforward(push, standardized, inverse, takes_none=True, examples=after)


@register_rule(layers.GroupNormalization)
def group_normalization(layer, x, context):
    dtype = keras.backend.result_type(x.dtype, "float32")
    channel, rank = layer.axis % len(x.shape), len(x.shape) + 1
    axes = [axis - rank for axis in range(1, rank) if axis != channel]

    def grouped(tensor):
        """(…, C, …) as (…, groups, C / groups, …), for x and tangents of x."""
        shape, at = ops.shape(tensor), channel + len(tensor.shape) - len(x.shape)
        return ops.reshape(tensor, (*shape[:at], layer.groups, x.shape[channel] // layer.groups, *shape[at + 1 :]))

    def along(vector):
        return _along(layer.axis, ops.cast(vector, dtype), x)

    entries = grouped(ops.cast(x, dtype))
    centered = entries - ops.mean(entries, axis=axes, keepdims=True)
    inverse = ops.rsqrt(ops.mean(ops.square(centered), axis=axes, keepdims=True) + layer.epsilon)
    slope = inverse * grouped(along(layer.gamma)) if layer.scale else inverse
    y = ops.reshape(centered * slope, ops.shape(x))
    y = y + along(layer.beta) if layer.center else y

    def push(tangent, centered, inverse, slope):
        entries = grouped(ops.cast(tangent, dtype))
        image = _push_standardized(entries, centered, slope, axes, True, context, ops.square(inverse))
        return ops.reshape(image, ops.shape(tangent))

    def along_gamma(u, centered, inverse, slope):
        return along(u) * ops.reshape(centered * inverse, (1, -1, *ops.shape(x)[1:]))

    weights = [(layer.gamma, along_gamma), (layer.beta, lambda u, *residuals: along(u))]
    return ops.cast(y, layer.compute_dtype), Pushforward(push, centered, inverse, slope, weights=weights)


@register_rule(nn.Moments)
def moments(operation, x, context):
    axes = [operation.axes] if isinstance(operation.axes, int) else list(operation.axes)
    axes = [axis % len(x.shape) - len(x.shape) for axis in axes]
    keepdims = operation.keepdims
    centered = x - ops.mean(x, axis=axes, keepdims=True)

    def push(tangent, centered):
        mean = ops.mean(tangent, axis=axes, keepdims=keepdims)
        return mean, 2 * ops.mean(centered * tangent, axis=axes, keepdims=keepdims)

    mean = ops.mean(x, axis=axes, keepdims=keepdims)
    variance = ops.mean(ops.square(centered), axis=axes, keepdims=keepdims)
    return (mean, variance), Pushforward(push, centered, examples=along(operation, x.shape))
