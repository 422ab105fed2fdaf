"""Layers that act in training only. The dropout family draws once, for the primal and all of its tangents."""

import math

import keras
from keras import layers, ops

from jvpreg.rules.families import gate, identity, linear, scale
from jvpreg.rules.registry import register_rule


def _drop(layer, x, noise_shape):
    if layer.rate == 1:
        return ops.zeros_like(x), gate(ops.zeros_like(x, dtype="bool"))
    # Dropout of ones shows the factors by which Keras would multiply with this seed. The factors are frozen: a mask
    # of one byte an element would be a quarter of them, but takes two or three passes instead of one product.
    factor = keras.random.dropout(ops.ones_like(x), layer.rate, noise_shape, layer.seed_generator)
    return x * factor, scale(factor)


@register_rule(layers.Dropout)
def dropout(layer, x, context):
    if not context.training or layer.rate == 0:
        return x, identity()
    return _drop(layer, x, layer.noise_shape)


@register_rule(layers.SpatialDropout1D, layers.SpatialDropout2D, layers.SpatialDropout3D)
def spatial_dropout(layer, x, context):
    if not context.training or layer.rate == 0:
        return x, identity()
    channels_first = getattr(layer, "data_format", "channels_last") == "channels_first"
    shape, ones = ops.shape(x), [1] * (len(x.shape) - 2)
    return _drop(layer, x, (*shape[:2], *ones) if channels_first else (shape[0], *ones, shape[-1]))


@register_rule(layers.GaussianDropout)
def gaussian_dropout(layer, x, context):
    if not context.training or layer.rate == 0:
        return x, identity()
    deviation = math.sqrt(layer.rate / (1 - layer.rate))
    noise = keras.random.normal(
        ops.shape(x), mean=1.0, stddev=deviation, dtype=layer.compute_dtype, seed=layer.seed_generator
    )
    return x * noise, scale(noise)


@register_rule(layers.GaussianNoise)
def gaussian_noise(layer, x, context):
    return layer.call(x, training=context.training), identity()


@register_rule(layers.AlphaDropout)
def alpha_dropout(layer, x, context):
    if not context.training or layer.rate == 0:
        return x, identity()
    # Klambauer et al. 2017: dropped units go to SELU's lower limit, then an affine map restores mean and variance.
    limit = -1.6732632423543772848170429916717 * 1.0507009873554804934193349852946
    slope = ((1 - layer.rate) * (1 + layer.rate * limit**2)) ** -0.5
    intercept = -slope * limit * layer.rate
    noise_shape = layer.noise_shape or (None,) * len(x.shape)
    noise_shape = [axis if size is None else size for size, axis in zip(noise_shape, ops.shape(x), strict=True)]
    kept = keras.random.uniform(noise_shape, seed=layer.seed_generator) >= layer.rate
    kept = ops.broadcast_to(kept, ops.shape(x))
    y = slope * ops.where(kept, x, limit) + intercept
    return ops.cast(y, x.dtype), gate(kept, slope)


@register_rule(layers.ActivityRegularization)
def activity_regularization(layer, x, context):
    # The engine records activity losses for every layer.
    return layer.call(x), linear(layer.call)
