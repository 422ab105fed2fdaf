"""The operations of `keras.ops` on one input, entry by entry: each by its slope, which is finite wherever it can be."""

import math
from collections.abc import Callable

import keras
from keras import activations, ops

from jvpreg.common.dtypes import has_tangents, is_complex
from jvpreg.common.eager import cast
from jvpreg.common.keras_private import activation_ops, core, math_ops, nn, numpy_ops
from jvpreg.rules.contract import Declined, Gate, Pushforward
from jvpreg.rules.examples import kept
from jvpreg.rules.families import gate, identity, scale
from jvpreg.rules.registry import find_rule, register_rule

SLOPES: dict[type, Callable] = {
    numpy_ops.Negative: lambda x, y: -ops.ones_like(x),
    numpy_ops.Square: lambda x, y: 2 * x,
    numpy_ops.Exp: lambda x, y: without_infinity(y),
    numpy_ops.Exp2: lambda x, y: without_infinity(math.log(2) * y),
    numpy_ops.Expm1: lambda x, y: without_infinity(y + 1),
    numpy_ops.Sin: lambda x, y: ops.cos(x),
    numpy_ops.Cos: lambda x, y: -ops.sin(x),
    numpy_ops.Tan: lambda x, y: 1 + y * y,
    numpy_ops.Arctan: lambda x, y: 1 / (1 + x * x),
    numpy_ops.Sinh: lambda x, y: without_infinity(ops.cosh(x)),
    numpy_ops.Cosh: lambda x, y: without_infinity(ops.sinh(x)),
    numpy_ops.Tanh: lambda x, y: (1 - y) * (1 + y),
    numpy_ops.Arcsinh: lambda x, y: ops.rsqrt(1 + x * x),
    numpy_ops.Sinc: lambda x, y: _slope_of_sinc(x, y),
    numpy_ops.I0: lambda x, y: _bessel_i1(x),
    math_ops.Erf: lambda x, y: (2 / math.sqrt(math.pi)) * ops.exp(-x * x),
    math_ops.Erfc: lambda x, y: -(2 / math.sqrt(math.pi)) * ops.exp(-x * x),
}


def _slope_of_sinc(x, y):
    """`(cos z − sin z / z) / x` for z = πx; around 0, where the two cancel, its power series."""
    z = math.pi * x
    small = ops.abs(z) < 0.3
    square = ops.where(small, z * z, 0.0)
    series = -1 / 3 + square * (1 / 30 + square * (-1 / 840 + square * (1 / 45360 - square / 3991680)))
    return ops.where(small, math.pi * z * series, (ops.cos(z) - y) / ops.where(small, 1.0, x))


def _bessel_i1(x):
    """The derivative of `i0`, which `keras.ops` lacks: the modified Bessel function of the first kind, of order 1."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.math.special.bessel_i1(x)
    if keras.backend.backend() == "jax":
        import jax

        return jax.scipy.special.i1(x)
    import torch

    return torch.special.i1(x)


CURVATURES: dict[type, Callable] = {
    numpy_ops.Square: lambda x, y: 2 * ops.ones_like(x),
    numpy_ops.Exp: SLOPES[numpy_ops.Exp],
    numpy_ops.Sin: lambda x, y: -y,
    numpy_ops.Cos: lambda x, y: -y,
    numpy_ops.Tanh: lambda x, y: -2 * y * (1 - y) * (1 + y),
}

OVERFLOWING = (numpy_ops.Exp, numpy_ops.Exp2, numpy_ops.Expm1, numpy_ops.Sinh, numpy_ops.Cosh, numpy_ops.I0)


@register_rule(*SLOPES)
def elementwise(operation, x, context):
    _decline_others(operation, x)
    y = operation.call(x)
    slope, curvature = SLOPES[type(operation)](x, y), CURVATURES.get(type(operation))
    return y, scale(slope, finite=not isinstance(operation, OVERFLOWING), curvature=curvature)


@register_rule(numpy_ops.Absolute, numpy_ops.Abs, numpy_ops.Fabs)
def absolute(operation, x, context):
    """The sign is frozen, 0 at 0."""
    _decline_others(operation, x)
    sign = ops.sign(x)

    def push(tangent, sign):
        return tangent * cast(sign, tangent.dtype)

    return operation.call(x), Gate(push, sign, masks=[lambda sign: sign > 0], examples=kept)


# Operations whose slope is infinite at an end of their domain: the slope, where it is finite, and a point inside.
ENDS: dict[type, tuple[Callable, Callable, float]] = {
    numpy_ops.Reciprocal: (lambda x: -ops.square(ops.reciprocal(x)), lambda x: x != 0, 1.0),
    numpy_ops.Sqrt: (lambda x: 0.5 / ops.sqrt(x), lambda x: x > 0, 1.0),
    math_ops.Rsqrt: (lambda x: -0.5 * ops.rsqrt(x) / x, lambda x: x > 0, 1.0),
    numpy_ops.Cbrt: (lambda x: 1 / (3 * ops.square(ops.cbrt(x))), lambda x: x != 0, 1.0),
    numpy_ops.Log: (lambda x: 1 / x, lambda x: x != 0, 1.0),
    numpy_ops.Log2: (lambda x: 1 / (math.log(2) * x), lambda x: x != 0, 1.0),
    numpy_ops.Log10: (lambda x: 1 / (math.log(10) * x), lambda x: x != 0, 1.0),
    numpy_ops.Log1p: (lambda x: 1 / (1 + x), lambda x: x != -1, 0.0),
    numpy_ops.Arcsin: (lambda x: ops.rsqrt((1 - x) * (1 + x)), lambda x: ops.abs(x) < 1, 0.0),
    numpy_ops.Arccos: (lambda x: -ops.rsqrt((1 - x) * (1 + x)), lambda x: ops.abs(x) < 1, 0.0),
    numpy_ops.Arccosh: (lambda x: ops.rsqrt((x - 1) * (x + 1)), lambda x: x > 1, 2.0),
    numpy_ops.Arctanh: (lambda x: 1 / ((1 - x) * (1 + x)), lambda x: ops.abs(x) != 1, 0.0),
    math_ops.Erfinv: (
        lambda x: without_infinity(0.5 * math.sqrt(math.pi) * ops.exp(ops.square(ops.erfinv(x)))),
        lambda x: ops.abs(x) < 1,
        0.0,
    ),
}


@register_rule(*ENDS)
def elementwise_with_ends(operation, x, context):
    _decline_others(operation, x)
    slope, inside, point = ENDS[type(operation)]
    return operation.call(x), scale_to_the_end(x, slope, inside(x), point)


def _decline_others(operation, x) -> None:
    """Leaves complex numbers to autodiff: there `abs` has no slope, and the domain of a logarithm has no end.

    Whole numbers have no tangents, and the backend may have no slope of them.
    """
    if not has_tangents(x):
        raise Declined("its input has no tangents")
    if is_complex(x) and not isinstance(operation, (numpy_ops.Negative, numpy_ops.Square)):
        raise Declined("its input is complex")


def scale_to_the_end(x, slope: Callable, inside, point: float) -> Pushforward:
    """Multiplies by `slope(x)`; where not `inside`, by a `large` number with the sign of the slope at `point`."""
    finite = slope(ops.where(inside, x, point))
    return scale(ops.where(inside, finite, ops.sign(finite) * large(x.dtype)), finite=False)


def large(dtype) -> float:
    """A number in place of an infinite slope: infinity times the zero tangent of an untaken branch would be NaN."""
    return {"float16": 1e4, "float64": 1e300}.get(keras.backend.standardize_dtype(dtype), 1e37)


def without_infinity(slope):
    return ops.clip(slope, -large(slope.dtype), large(slope.dtype))


# The operations that are activations too, with the arguments that they hold.
ACTIVATIONS: dict[type, tuple] = {
    nn.Relu: (activations.relu,),
    nn.Relu6: (activations.relu6,),
    nn.LeakyRelu: (activations.leaky_relu, "negative_slope"),
    nn.Elu: (activations.elu, "alpha"),
    nn.Celu: (activations.celu, "alpha"),
    nn.Selu: (activations.selu,),
    nn.Gelu: (activations.gelu, "approximate"),
    nn.Silu: (activations.silu,),
    nn.HardSilu: (activations.hard_silu,),
    nn.Sigmoid: (activations.sigmoid,),
    nn.HardSigmoid: (activations.hard_sigmoid,),
    nn.LogSigmoid: (activations.log_sigmoid,),
    nn.Softplus: (activations.softplus,),
    nn.Softsign: (activations.softsign,),
    nn.Softmax: (activations.softmax, "axis"),
    nn.LogSoftmax: (activations.log_softmax, "axis"),
    nn.Squareplus: (activations.squareplus, "b"),
    nn.TanhShrink: (activations.tanh_shrink,),
    nn.HardTanh: (activations.hard_tanh,),
    nn.Glu: (activations.glu, "axis"),
    nn.HardShrink: (activations.hard_shrink, "threshold"),
    nn.SoftShrink: (activations.soft_shrink, "threshold"),
    nn.Sparsemax: (activations.sparsemax, "axis"),
    nn.SparsePlus: (activations.sparse_plus,),
    nn.SparseSigmoid: (activations.sparse_sigmoid,),
    nn.Threshold: (activations.threshold, "threshold", "default_value"),
}


def _as_activation(function, operation, names, x, context):
    rule = find_rule(function)
    assert rule is not None  # tests/rules/test_rules.py holds every activation to it.
    return rule.function(function, x, context=context, **{name: getattr(operation, name) for name in names})


@register_rule(*ACTIVATIONS)
def activation(operation, x, context):
    function, *names = ACTIVATIONS[type(operation)]
    return _as_activation(function, operation, names, x, context)


@register_rule(activation_ops.ReLU)
def relu(operation, x, context):
    return _as_activation(activations.relu, operation, ("negative_slope", "max_value", "threshold"), x, context)


@register_rule(numpy_ops.Clip)
def clip(operation, x, context):
    return operation.call(x), gate(ops.logical_and(x > operation.x_min, x < operation.x_max))


@register_rule(numpy_ops.NanToNum)
def nan_to_num(operation, x, context):
    return operation.call(x), gate(ops.isfinite(x))


@register_rule(core.SaturateCast)
def saturate_cast(operation, x, context):
    """A cast with a slope of 0 beyond the largest number of the dtype."""
    if not has_tangents(x):
        return operation.call(x), None
    largest = ops.cast(operation.call(ops.convert_to_tensor(float("inf"), x.dtype)), x.dtype)

    def push(tangent, inside):
        return ops.cast(ops.where(inside, tangent, 0.0), operation.dtype)

    return operation.call(x), Gate(push, ops.abs(x) <= largest, examples=kept)


@register_rule(numpy_ops.Angle)
def angle(operation, x, context):
    """Of `x = r e^{iφ}`, φ: its tangent is the part of `t / x` along the circle. That of a real number is constant."""
    if not is_complex(x):
        return operation.call(x), None
    squared = ops.square(ops.real(x)) + ops.square(ops.imag(x))
    # Only the squares are selected: on TensorFlow Keras selects complex128 in complex64.
    inverse = ops.conj(x) * ops.cast(1 / ops.where(squared > 0, squared, 1.0), x.dtype)
    return operation.call(x), Pushforward(lambda t, inverse: ops.imag(t * inverse), inverse, examples=kept)


@register_rule(numpy_ops.View)
def view(operation, x, context):
    """The same bits, read as another dtype: a function of them that has no derivative."""
    y = operation.call(x)
    return y, identity() if y.dtype == x.dtype else None
