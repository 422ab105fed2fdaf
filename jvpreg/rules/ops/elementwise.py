"""The operations of `keras.ops` on one input, entry by entry: each by its slope, which is finite wherever it can be."""

import math
from collections.abc import Callable

import keras
from keras import activations, ops

from jvpreg.common.dtypes import is_complex
from jvpreg.common.keras_private import activation_ops, math_ops, nn, numpy_ops
from jvpreg.rules.contract import Declined, Pushforward
from jvpreg.rules.families import gate, scale
from jvpreg.rules.registry import find_rule, register_rule

SLOPES: dict[type, Callable] = {
    numpy_ops.Absolute: lambda x, y: ops.sign(x),
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
    math_ops.Erf: lambda x, y: (2 / math.sqrt(math.pi)) * ops.exp(-x * x),
}


OVERFLOWING = (numpy_ops.Exp, numpy_ops.Exp2, numpy_ops.Expm1, numpy_ops.Sinh, numpy_ops.Cosh)


@register_rule(*SLOPES)
def elementwise(operation, x, context):
    _decline_complex(operation, x)
    y = operation.call(x)
    return y, scale(SLOPES[type(operation)](x, y), finite=not isinstance(operation, OVERFLOWING))


# Operations whose slope is infinite at an end of their domain: the slope, where it is finite, and a point inside.
ENDS: dict[type, tuple[Callable, Callable, float]] = {
    numpy_ops.Reciprocal: (lambda x: -ops.square(ops.reciprocal(x)), lambda x: x != 0, 1.0),
    numpy_ops.Sqrt: (lambda x: 0.5 / ops.sqrt(x), lambda x: x > 0, 1.0),
    math_ops.Rsqrt: (lambda x: -0.5 * ops.rsqrt(x) / x, lambda x: x > 0, 1.0),
    numpy_ops.Log: (lambda x: 1 / x, lambda x: x != 0, 1.0),
    numpy_ops.Log2: (lambda x: 1 / (math.log(2) * x), lambda x: x != 0, 1.0),
    numpy_ops.Log10: (lambda x: 1 / (math.log(10) * x), lambda x: x != 0, 1.0),
    numpy_ops.Log1p: (lambda x: 1 / (1 + x), lambda x: x != -1, 0.0),
    numpy_ops.Arcsin: (lambda x: ops.rsqrt((1 - x) * (1 + x)), lambda x: ops.abs(x) < 1, 0.0),
    numpy_ops.Arccos: (lambda x: -ops.rsqrt((1 - x) * (1 + x)), lambda x: ops.abs(x) < 1, 0.0),
    numpy_ops.Arccosh: (lambda x: ops.rsqrt((x - 1) * (x + 1)), lambda x: x > 1, 2.0),
    numpy_ops.Arctanh: (lambda x: 1 / ((1 - x) * (1 + x)), lambda x: ops.abs(x) != 1, 0.0),
}


@register_rule(*ENDS)
def elementwise_with_ends(operation, x, context):
    _decline_complex(operation, x)
    slope, inside, point = ENDS[type(operation)]
    return operation.call(x), scale_to_the_end(x, slope, inside(x), point)


def _decline_complex(operation, x) -> None:
    """Leaves complex numbers to autodiff: there `abs` has no slope, and the domain of a logarithm has no end."""
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
