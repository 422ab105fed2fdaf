"""Operations that are shorthand for others: each is written out in `keras.ops` that have rules, and linearized as that.

The written-out call runs in place of the operation. Its nodes lie within a node of the operation's name.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from jvpreg.common.keras_private import image, math_ops, nn, numpy_ops
from jvpreg.rules.registry import register_wrapper

WRITTEN_OUT: dict[type, Callable] = {}
"""The calls that stand for operations: `call(operation, *arguments)`."""


def written_out(*operations: type) -> Callable:
    """Registers `call(operation, *arguments)` as what operations of these classes compute."""

    def decorate(call: Callable) -> Callable:
        for operation in operations:
            WRITTEN_OUT[operation] = call
            register_wrapper(operation, functools.partial(_bound, call))
        return call

    return decorate


def _bound(call: Callable, operation: Any) -> Callable:
    def written(*args, **kwargs):
        return call(operation, *args, **kwargs)

    written.__name__ = operation.name
    return written


# ---------------------------------------------------------------- joining and splitting


@written_out(numpy_ops.Append)
def append(operation, a, b):
    return ops.concatenate([ops.ravel(a), ops.ravel(b)] if operation.axis is None else [a, b], operation.axis or 0)


@written_out(numpy_ops.Dstack)
def dstack(operation, tensors):
    def deep(x):
        x = ops.expand_dims(x, 0) if len(x.shape) == 1 else x
        return ops.expand_dims(x, -1) if len(x.shape) == 2 else x

    return ops.concatenate([deep(x) for x in tensors], axis=2)


@written_out(numpy_ops.Hsplit, numpy_ops.Vsplit, numpy_ops.Dsplit)
def split_along(operation, x):
    axis = {numpy_ops.Vsplit: 0, numpy_ops.Hsplit: min(1, len(x.shape) - 1), numpy_ops.Dsplit: 2}[type(operation)]
    return ops.split(x, operation.indices_or_sections, axis=axis)


@written_out(numpy_ops.ArraySplit)
def array_split(operation, x):
    given, size = operation.indices_or_sections, x.shape[operation.axis]
    if not isinstance(given, int):
        return ops.split(x, given, axis=operation.axis)
    # The first parts are longer by one, if the size is no multiple.
    sizes = [size // given + (i < size % given) for i in range(given)]
    return ops.split(x, [sum(sizes[:i]) for i in range(1, given)], axis=operation.axis)


@written_out(numpy_ops.Meshgrid)
def meshgrid(operation, *tensors):
    rank = len(tensors)
    flat = [ops.ravel(x) for x in tensors]
    order = [1, 0, *range(2, rank)] if operation.indexing == "xy" and rank > 1 else list(range(rank))
    # Tensor i lies along the axis that it has in the grid.
    sizes = [flat[i].shape[0] for i in order]
    along = [ops.reshape(x, [-1 if axis == order.index(i) else 1 for axis in range(rank)]) for i, x in enumerate(flat)]
    return [ops.broadcast_to(x, sizes) for x in along]


@written_out(numpy_ops.Select)
def select(operation, conditions, choices, default=0):
    result = default if ops.is_tensor(default) else ops.zeros_like(choices[0]) + default
    for condition, choice in reversed(list(zip(conditions, choices, strict=True))):
        result = ops.where(condition, choice, result)
    return result


@written_out(nn.SeparableConv)
def separable_conv(operation, x, depthwise_kernel, pointwise_kernel):
    deep = ops.depthwise_conv(
        x,
        depthwise_kernel,
        operation.strides,
        operation.padding,
        operation.data_format,
        operation.dilation_rate,
    )
    return ops.conv(deep, pointwise_kernel, 1, "valid", operation.data_format)


@written_out(numpy_ops.Full)
def full(operation, fill_value):
    return ops.cast(ops.broadcast_to(fill_value, operation.shape), operation.dtype or keras.config.floatx())


@written_out(numpy_ops.FullLike)
def full_like(operation, x, fill_value):
    filling = ops.cast(fill_value, operation.dtype or x.dtype)
    return ops.zeros_like(x, dtype=operation.dtype) + filling


# ---------------------------------------------------------------- reductions, and those that leave out NaN


@written_out(numpy_ops.Ptp)
def ptp(operation, x):
    largest, smallest = (reduce(x, operation.axis, keepdims=operation.keepdims) for reduce in (ops.max, ops.min))
    return largest - smallest


@written_out(numpy_ops.Average)
def average(operation, x, weights=None):
    if weights is None:
        return ops.mean(x, axis=operation.axis)
    dtype = keras.backend.result_type(x.dtype, weights.dtype, float)
    x, weights = ops.cast(x, dtype), ops.cast(weights, dtype)
    if len(weights.shape) < len(x.shape):
        axis = operation.axis % len(x.shape)
        weights = ops.reshape(weights, [-1 if i == axis else 1 for i in range(len(x.shape))]) + ops.zeros_like(x)
    return ops.sum(x * weights, axis=operation.axis) / ops.sum(weights, axis=operation.axis)


def _without_nan(x, filling: float):
    return ops.where(ops.isnan(x), filling, x)


def _count(x, axis, keepdims=True):
    """How many numbers there are along an axis."""
    return ops.sum(ops.cast(ops.logical_not(ops.isnan(x)), x.dtype), axis=axis, keepdims=keepdims)


@written_out(numpy_ops.Nansum)
def nansum(operation, x):
    return ops.sum(_without_nan(x, 0.0), axis=operation.axis, keepdims=operation.keepdims)


@written_out(numpy_ops.Nanprod)
def nanprod(operation, x):
    return ops.prod(_without_nan(x, 1.0), axis=operation.axis, keepdims=operation.keepdims)


@written_out(numpy_ops.Nancumsum)
def nancumsum(operation, x):
    return ops.cumsum(_without_nan(x, 0.0), axis=operation.axis, dtype=operation.dtype)


@written_out(numpy_ops.Nancumprod)
def nancumprod(operation, x):
    return ops.cumprod(_without_nan(x, 1.0), axis=operation.axis, dtype=operation.dtype)


@written_out(numpy_ops.Nanmax, numpy_ops.Nanmin)
def nan_extremum(operation, x):
    largest = isinstance(operation, numpy_ops.Nanmax)
    reduce, worst = (ops.max, -float("inf")) if largest else (ops.min, float("inf"))
    y = reduce(_without_nan(x, worst), axis=operation.axis, keepdims=operation.keepdims)
    return ops.where(_count(x, operation.axis, operation.keepdims) > 0, y, float("nan"))


@written_out(numpy_ops.Nanmean)
def nanmean(operation, x):
    total = ops.sum(_without_nan(x, 0.0), axis=operation.axis, keepdims=operation.keepdims)
    return total / _count(x, operation.axis, operation.keepdims)


@written_out(numpy_ops.Nanvar, numpy_ops.Nanstd)
def nanvar(operation, x):
    mean = ops.sum(_without_nan(x, 0.0), axis=operation.axis, keepdims=True) / _count(x, operation.axis)
    # NaN is replaced before it is squared: the slope of the square would be NaN.
    squares = ops.square(ops.where(ops.isnan(x), mean, x) - mean)
    y = ops.sum(squares, axis=operation.axis, keepdims=operation.keepdims) / _count(
        x, operation.axis, operation.keepdims
    )
    return ops.sqrt(y) if isinstance(operation, numpy_ops.Nanstd) else y


@written_out(numpy_ops.Corrcoef)
def corrcoef(operation, x):
    centered = x - ops.mean(x, axis=-1, keepdims=True)
    unit = centered / ops.sqrt(ops.sum(ops.square(centered), axis=-1, keepdims=True))
    return ops.matmul(unit, ops.swapaxes(unit, -1, -2))


@written_out(numpy_ops.Cross)
def cross(operation, a, b):
    def entries(x, axis):
        found = ops.unstack(x, x.shape[axis], axis=axis)
        return found if len(found) == 3 else [*found, None]

    (a0, a1, a2), (b0, b1, b2) = entries(a, operation.axisa), entries(b, operation.axisb)
    last = a0 * b1 - a1 * b0
    if a2 is None and b2 is None:  # vectors in a plane
        return last
    a2, b2 = (ops.zeros_like(other) if x is None else x for x, other in ((a2, a0), (b2, b0)))
    return ops.stack([a1 * b2 - a2 * b1, a2 * b0 - a0 * b2, last], axis=operation.axisc)


@written_out(math_ops.CDist)
def cdist(operation, a, b):
    return ops.sqrt(ops.sum(ops.square(ops.expand_dims(a, -2) - ops.expand_dims(b, -3)), axis=-1))


# ---------------------------------------------------------------- sequences of numbers between two


def _between(operation, start, stop):
    """Evenly spaced numbers from `start` to `stop`, along a new axis."""
    count = operation.num - 1 if operation.endpoint else operation.num
    shares = [i / max(count, 1) for i in range(operation.num)]
    return ops.stack([start * (1 - share) + stop * share for share in shares], axis=operation.axis)


@written_out(numpy_ops.Linspace)
def linspace(operation, start, stop):
    if operation.retstep:
        raise NotImplementedError("`keras.ops.linspace` with `retstep=True` cannot be linearized: compute the step.")
    return _between(operation, start, stop)


@written_out(numpy_ops.Logspace)
def logspace(operation, start, stop):
    return ops.exp(math.log(operation.base) * _between(operation, start, stop))


@written_out(numpy_ops.Geomspace)
def geomspace(operation, start, stop):
    start, stop = (x if ops.is_tensor(x) else ops.convert_to_tensor(x) for x in (start, stop))
    return ops.sign(start) * ops.exp(_between(operation, ops.log(ops.abs(start)), ops.log(ops.abs(stop))))


@written_out(numpy_ops.Vander)
def vander(operation, x):
    count = x.shape[0] if operation.N is None else operation.N
    exponents = range(count) if operation.increasing else reversed(range(count))
    return ops.stack([ops.power(x, exponent) for exponent in exponents], axis=-1)


# ---------------------------------------------------------------- losses


@written_out(nn.BinaryCrossentropy)
def binary_crossentropy(operation, target, output):
    if operation.from_logits:
        return ops.softplus(output) - target * output
    floor = keras.config.epsilon()
    output = ops.clip(output, floor, 1 - floor)
    return -(target * ops.log(output) + (1 - target) * ops.log(1 - output))


def _log_probabilities(operation, output):
    if operation.from_logits:
        return ops.log_softmax(output, axis=operation.axis)
    floor = keras.config.epsilon()
    return ops.log(ops.clip(output / ops.sum(output, axis=operation.axis, keepdims=True), floor, 1 - floor))


@written_out(nn.CategoricalCrossentropy)
def categorical_crossentropy(operation, target, output):
    return -ops.sum(target * _log_probabilities(operation, output), axis=operation.axis)


@written_out(nn.SparseCategoricalCrossentropy)
def sparse_categorical_crossentropy(operation, target, output):
    axis = operation.axis % len(output.shape)
    target = ops.cast(target, "int32")
    target = target if len(target.shape) == len(output.shape) else ops.expand_dims(target, axis)
    log_probabilities = _log_probabilities(operation, output)
    return -ops.squeeze(ops.take_along_axis(log_probabilities, target, axis=axis), axis=axis)


@written_out(nn.PSNR)
def psnr(operation, a, b):
    return 20 * math.log10(operation.max_val) - 10 * ops.log10(ops.mean(ops.square(a - b)))


# ---------------------------------------------------------------- colours


def _channel_axis(operation) -> int:
    return -1 if (operation.data_format or keras.config.image_data_format()) == "channels_last" else -3


@written_out(image.RGBToHSV)
def rgb_to_hsv(operation, x):
    x = ops.where(ops.abs(x) < _epsilon(x), ops.zeros_like(x), x)
    red, green, blue = ops.unstack(x, 3, axis=_channel_axis(operation))
    value = ops.maximum(ops.maximum(red, green), blue)
    spread = value - ops.minimum(ops.minimum(red, green), blue)
    saturation = ops.where(value > 0, spread / ops.where(value > 0, value, 1.0), 0.0)
    unit = 1 / (6 * ops.where(spread > 0, spread, 1.0))
    hue = ops.where(ops.equal(value, green), unit * (blue - red) + 2 / 6, unit * (red - green) + 4 / 6)
    hue = ops.where(ops.equal(value, red), unit * (green - blue), hue)
    hue = ops.where(spread > 0, hue, 0.0) + ops.cast(hue < 0, x.dtype)
    return ops.stack([hue, saturation, value], axis=_channel_axis(operation))


def _epsilon(x) -> float:
    """The distance from 1 to the next number of the dtype, below which Keras takes a colour for 0."""
    return {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float64": 2.0**-52}.get(
        keras.backend.standardize_dtype(x.dtype), 2.0**-23
    )


@written_out(image.HSVToRGB)
def hsv_to_rgb(operation, x):
    hue, saturation, value = ops.unstack(x, 3, axis=_channel_axis(operation))
    angle = 6 * ops.mod(hue, 1.0)
    red = ops.clip(ops.abs(angle - 3) - 1, 0.0, 1.0)
    green = ops.clip(2 - ops.abs(angle - 2), 0.0, 1.0)
    blue = ops.clip(2 - ops.abs(angle - 4), 0.0, 1.0)
    parts = [value * (1 - saturation + saturation * part) for part in (red, green, blue)]
    return ops.stack(parts, axis=_channel_axis(operation))
