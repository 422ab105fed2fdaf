"""Activations: piecewise-linear ones freeze a mask, smooth ones their slope, softmax-like ones their output.

At a kink beside a flat piece the slope is 0, so `ReLU'(0) = 0` on every backend.
"""

import functools
import math

import keras
import numpy as np
from keras import activations, layers, ops

from jvpreg.rules.contract import Declined, Gate, Pushforward
from jvpreg.rules.examples import besides, kept
from jvpreg.rules.families import gate, identity, scale, scale_by
from jvpreg.rules.folding import fold, unfold
from jvpreg.rules.registry import find_rule, register_elementwise, register_rule
from jvpreg.rules.softmax import from_end

SELU_SCALE = 1.0507009873554804934193349852946
SELU_ALPHA = 1.6732632423543772848170429916717


def _torch_kernel(name: str):
    """The gradient of an activation as one operation of Torch; None on other backends, and for ONNX, which has none."""
    if keras.backend.backend() != "torch":
        return None
    import torch

    return None if torch.onnx.is_in_onnx_export() else getattr(torch.ops.aten, name)


# Piecewise-linear activations freeze a mask alone, one byte an element. ReLU freezes its output instead if the backend
# has a kernel for its gradient.


def _slope_in_use(function, x, **kwargs):
    """The negative slope as the backend uses it: TensorFlow's kernel rounds it to float32."""
    return -function(-ops.ones((), x.dtype), **kwargs)


@register_rule(activations.linear)
def linear(function, x, context):
    return x, identity()


def _by_kernel(slope, y) -> Gate:
    """Slope 1 where the output `y` of ReLU is positive, otherwise `slope` (0 or more), by the backend's gradient.

    Selects are slow in a plain TensorFlow graph and on Torch, as `benchmark layers` shows. Only `y` is frozen, which
    plain training keeps as well.
    """

    def mask(y):
        return y > 0

    # y is constant wherever it has a derivative.
    if keras.backend.backend() == "torch":
        relu, leaky = _torch_kernel("threshold_backward"), _torch_kernel("leaky_relu_backward")

        def push_by_torch(tangent, y):
            return leaky(tangent, y.detach(), slope, True) if slope else relu(tangent, y.detach(), 0)

        return Gate(push_by_torch, y, masks=[mask], examples=kept, transposed="itself", homogeneous=True)
    import tensorflow as tf

    slope = float(np.float32(slope))  # rounded as by the layer's own kernel

    def push(tangent, y):
        y = tf.stop_gradient(y)
        if tangent.shape[0] != 1:
            # A tangent that is dropped becomes NaN, not 0, if it is infinite: so does TensorFlow's own gradient.
            kept = tf.cast(mask(y), tangent.dtype)
            return tangent * (slope + (1 - slope) * kept if slope else kept)
        # Reshaped, as around a convolution: the graph's optimizer removes two reshapes that undo each other.
        both = {"gradients": fold(tangent), "features": fold(y)}
        image = tf.raw_ops.LeakyReluGrad(**both, alpha=slope) if slope else tf.raw_ops.ReluGrad(**both)
        return unfold(image, 1)

    return Gate(push, y, masks=[mask], examples=kept, transposed="itself", homogeneous=True)


def _has_kernels(context) -> bool:
    return context.prefers_kernels or _torch_kernel("threshold_backward") is not None


@register_rule(activations.relu)
def relu(function, x, context, negative_slope=0.0, max_value=None, threshold=0.0):
    y = function(x, negative_slope=negative_slope, max_value=max_value, threshold=threshold)
    if max_value is None and threshold == 0 and negative_slope >= 0 and _has_kernels(context):
        return y, _by_kernel(negative_slope, y)
    above = x > threshold
    if max_value is None and negative_slope and threshold == 0:
        return y, gate(above, otherwise=_slope_in_use(function, x, negative_slope=negative_slope))
    if max_value is None:
        return y, gate(above, otherwise=negative_slope)
    between = ops.logical_and(above, x < max_value)
    if not negative_slope:
        return y, gate(between)

    def push(tangent, above, between):
        return ops.where(between, tangent, ops.where(above, 0.0, negative_slope * tangent))

    return y, Gate(push, above, between, examples=kept)


@register_rule(activations.relu6)
def relu6(function, x, context):
    return function(x), gate(ops.logical_and(x > 0, x < 6))


@register_rule(activations.leaky_relu)
def leaky_relu(function, x, context, negative_slope=0.2):
    y = function(x, negative_slope=negative_slope)
    if negative_slope >= 0 and _has_kernels(context):
        return y, _by_kernel(negative_slope, y)
    return y, gate(x > 0, otherwise=_slope_in_use(function, x, negative_slope=negative_slope))


@register_rule(activations.hard_tanh)
def hard_tanh(function, x, context):
    return function(x), gate(ops.abs(x) < 1)


@register_rule(activations.hard_shrink, activations.soft_shrink)
def shrink(function, x, context, threshold=0.5):
    return function(x, threshold=threshold), gate(ops.abs(x) > threshold)


@register_rule(activations.threshold)
def threshold(function, x, threshold, default_value, context):
    return function(x, threshold, default_value), gate(x > threshold)


@register_rule(activations.hard_sigmoid)
def hard_sigmoid(function, x, context):
    return function(x), gate(ops.abs(x) < 3, 1 / 6)


@register_rule(activations.sparse_sigmoid)
def sparse_sigmoid(function, x, context):
    return function(x), gate(ops.abs(x) < 1, 1 / 2)


# Smooth activations: each states its derivative, in a form that does not cancel.


@register_elementwise(
    activations.tanh,
    kernel=functools.partial(_torch_kernel, "tanh_backward"),
    curvature=lambda x, y: -2 * y * (1 - y) * (1 + y),
)
def tanh(x, y):
    return (1 - y) * (1 + y)


@register_elementwise(activations.tanh_shrink)
def tanh_shrink(x, y):
    return ops.square(ops.tanh(x))


@register_elementwise(
    activations.sigmoid,
    kernel=functools.partial(_torch_kernel, "sigmoid_backward"),
    curvature=lambda x, y: y * (1 - y) * (1 - 2 * y),
)
def sigmoid(x, y):
    return y * (1 - y)


@register_elementwise(activations.log_sigmoid)
def log_sigmoid(x, y):
    return ops.sigmoid(-x)


def _slope_of_sigmoid(x, y):
    return ops.sigmoid(x) * ops.sigmoid(-x)


@register_elementwise(activations.softplus, curvature=_slope_of_sigmoid)
def softplus(x, y):
    return ops.sigmoid(x)


@register_elementwise(activations.softsign)
def softsign(x, y):
    return 1 / ops.square(1 + ops.abs(x))


@register_elementwise(activations.exponential, curvature=lambda x, y: y)
def exponential(x, y):
    return y


@register_elementwise(activations.elu)
def elu(x, y, alpha=1.0):
    # exp of the negative part only: exp of a large x would overflow in the branch that is not taken.
    return ops.where(x > 0, 1.0, alpha * ops.exp(ops.minimum(x, 0)))


@register_elementwise(activations.celu)
def celu(x, y, alpha=1.0):
    return ops.where(x > 0, 1.0, ops.exp(ops.minimum(x, 0) / alpha))


@register_elementwise(activations.selu)
def selu(x, y):
    return SELU_SCALE * elu(x, y, alpha=SELU_ALPHA)


@register_rule(activations.silu)
def silu(function, x, context):
    gate = ops.sigmoid(x)  # for both: TensorFlow's graphs would not share it by themselves
    y = x * gate
    return y, scale(gate + y * (1 - gate))


@register_rule(activations.gelu)
def gelu(function, x, context, approximate=False):
    kernel = _torch_kernel("gelu_backward")
    if kernel is not None:
        kernel = functools.partial(kernel, approximate="tanh" if approximate else "none")
        slope = functools.partial(_gelu_slope, approximate=approximate)
        return function(x, approximate=approximate), scale_by(slope, kernel, x)
    if context.prefers_kernels and not approximate:
        import tensorflow as tf

        below = 0.5 * tf.math.erfc(-_gelu_root() * x)  # for both, and as TensorFlow's own GELU computes it
        return x * below, scale(below + x * _gelu_density(x))
    return function(x, approximate=approximate), scale(_gelu_slope(x, approximate))


def _gelu_slope(x, approximate):
    if approximate:
        scale, cubic = math.sqrt(2 / math.pi), _in_backend(0.044715)
        x = ops.clip(x, -40, 40)  # beyond, the slope is 0 or 1 to the last digit, and x³ may overflow
        inner = ops.tanh(scale * (x + cubic * x**3))
        return 0.5 * (1 + inner) + 0.5 * x * (1 - inner) * (1 + inner) * scale * (1 + 3 * cubic * x**2)
    return 0.5 * (1 + ops.erf(_gelu_root() * x)) + x * _gelu_density(x)


def _gelu_density(x):
    return _gelu_root() / math.sqrt(math.pi) * ops.exp(-ops.square(_gelu_root() * x))


def _gelu_root() -> float:
    return _in_backend(math.sqrt(1 / 2))


def _in_backend(constant: float) -> float:
    """A constant of GELU as the backend uses it: TensorFlow rounds it to float32."""
    return float(np.float32(constant)) if keras.backend.backend() == "tensorflow" else constant


@register_elementwise(activations.mish)
def mish(x, y):
    inner = ops.tanh(ops.softplus(x))
    return inner + x * (1 - inner) * (1 + inner) * ops.sigmoid(x)


@register_elementwise(activations.hard_silu)
def hard_silu(x, y):
    return ops.where(x >= 3, 1.0, ops.where(x > -3, (2 * x + 3) / 6, 0.0))


@register_elementwise(activations.squareplus)
def squareplus(x, y, b=4):
    if b == 0:  # ReLU
        return ops.cast(x > 0, x.dtype)
    return 0.5 * (1 + x / ops.sqrt(ops.square(x) + b))


@register_elementwise(activations.sparse_plus)
def sparse_plus(x, y):
    return ops.clip((x + 1) / 2, 0, 1)


# Activations that mix the entries of one axis.


@register_rule(activations.glu)
def glu(function, x, context, axis=-1):
    axis = from_end(axis, x)
    value, logit = ops.split(x, 2, axis=axis)
    gate = ops.sigmoid(logit)

    def push(tangent, gate, slope):
        value_tangent, logit_tangent = ops.split(tangent, 2, axis=axis)
        return value_tangent * gate + slope * logit_tangent

    return function(x, axis=axis), Pushforward(
        push, gate, value * gate * (1 - gate), examples=besides([axis], len(x.shape))
    )


# The same activations as layers.


@register_rule(layers.Activation)
def activation(layer, x, context):
    return apply_activation(layer.activation, x, context, path=layer.path)


def apply_activation(function, x, context, path):
    """Runs the rule of an activation, given as a function of `keras.activations` or as a layer."""
    rule = find_rule(function)
    if rule is None:
        raise Declined(f"`{path}` has an activation without a rule")
    return rule.function(function, x, context=context)


@register_rule(layers.ReLU)
def relu_layer(layer, x, context):
    return relu(
        activations.relu,
        x,
        context,
        negative_slope=float(layer.negative_slope),
        max_value=layer.max_value,
        threshold=float(layer.threshold),
    )


@register_rule(layers.LeakyReLU)
def leaky_relu_layer(layer, x, context):
    return leaky_relu(activations.leaky_relu, x, context, negative_slope=float(layer.negative_slope))


@register_rule(layers.ELU)
def elu_layer(layer, x, context):
    alpha = float(layer.alpha)
    y = activations.elu(x, alpha=alpha)
    return y, scale(elu(x, y, alpha=alpha))


@register_rule(layers.PReLU)
def prelu(layer, x, context):
    alpha = ops.cast(layer.alpha, x.dtype)

    def push(tangent, x):
        return ops.where(x > 0, tangent, alpha * tangent)

    def part(u, x):
        return ops.expand_dims(u, 1) * ops.minimum(x, 0)

    y = ops.maximum(x, 0) + alpha * ops.minimum(x, 0)
    return y, Gate(push, x, masks=[lambda x: x > 0], weights=[(layer.alpha, part)])
