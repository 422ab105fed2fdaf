"""Batch normalization in its three modes, and the layers that shift and scale by constants."""

import keras
from keras import layers, ops

from jvpreg.registry import Pushforward, register_rule


def _along(axis: int, vector, x):
    """A per-channel `vector` (C,), shaped to broadcast along `axis` of `x` and of tangents of `x`."""
    shape = [1] * (len(x.shape) - 1)
    shape[axis - 1 if axis > 0 else axis] = -1
    return ops.reshape(vector, shape)


@register_rule(layers.BatchNormalization)
def batch_normalization(layer, x, context):
    # As Keras: statistics and the affine map in float32 at least, whatever the compute dtype.
    dtype = keras.backend.result_type(x.dtype, "float32")
    dtype_out, x = x.dtype, ops.cast(x, dtype)
    mode = context.batch_statistics if layer.trainable else "moving"
    if mode == "moving":
        mean, variance = ops.cast(layer.moving_mean, dtype), ops.cast(layer.moving_variance, dtype)
    else:
        mean, variance = _batch_moments(layer, x, context)
    gamma = ops.cast(layer.gamma, dtype) if layer.scale else None
    beta = ops.cast(layer.beta, dtype) if layer.center else None
    y = ops.batch_normalization(x, mean, variance, axis=layer.axis, offset=beta, scale=gamma, epsilon=layer.epsilon)
    inverse_deviation = ops.rsqrt(variance + layer.epsilon)
    slope = inverse_deviation if gamma is None else gamma * inverse_deviation
    slope = _along(layer.axis, slope, x)

    def push(tangent):
        return ops.cast(ops.cast(tangent, dtype) * slope, tangent.dtype)

    y = ops.cast(y, dtype_out)
    if mode != "coupled":
        return y, Pushforward(push)

    standardized = (x - _along(layer.axis, mean, x)) * _along(layer.axis, inverse_deviation, x)
    channel = layer.axis % len(x.shape)
    # Every axis of a tangent (P, B, …) but the probes and the channels.
    reduced = [axis + 1 for axis in range(len(x.shape)) if axis != channel]

    def push_coupled(tangent, standardized):
        """The derivative of the batch map: the statistics move with every example."""
        wide = ops.cast(tangent, dtype)
        mean_moved = ops.mean(wide, axis=reduced, keepdims=True)
        deviation_moved = ops.mean(standardized * wide, axis=reduced, keepdims=True)
        return ops.cast(slope * (wide - mean_moved - standardized * deviation_moved), tangent.dtype)

    return y, Pushforward(push_coupled, standardized, couples_examples=True)


def _batch_moments(layer, x, context):
    """The statistics of the batch; in training they also enter the moving averages, once."""
    if layer.renorm:
        raise NotImplementedError(
            f"`{layer.path}` uses batch renormalization, which has no rule on batch statistics. "
            'Set `renorm=False`, or linearize with `batch_statistics="moving"`.'
        )
    channel = layer.axis % len(x.shape)
    axes = [axis for axis in range(len(x.shape)) if axis != channel]
    mean, variance = ops.moments(x, axes=axes, synchronized=layer.synchronized)
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
