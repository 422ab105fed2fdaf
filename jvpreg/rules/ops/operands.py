"""Operations of several inputs: the sum of one linear map for each input that has a tangent."""

import functools
import math
import string
from collections.abc import Callable
from typing import Any

from keras import ops

from jvpreg.common.dtypes import has_tangents, is_complex
from jvpreg.common.eager import cast as convert
from jvpreg.common.keras_private import nn, numpy_ops
from jvpreg.rules.contract import Declined, Gate, Pushforward
from jvpreg.rules.examples import broadcast, kept, multiplied
from jvpreg.rules.families import each_input, identity, scale
from jvpreg.rules.folding import align, each_probe, fold, folded, unfold
from jvpreg.rules.ops.elementwise import large, scale_to_the_end, without_infinity
from jvpreg.rules.ops.moving import is_finite_number, is_number
from jvpreg.rules.registry import register_rule


def _like(operand, tangent):
    """An operand as it is given, in the dtype of the tangent that it is multiplied with."""
    return operand if is_number(operand) else convert(operand, tangent.dtype)


def _partials(operands, parts: list[Callable], y, *residuals, finite: bool = True, gates: bool = False) -> Pushforward:
    """The pushforward of an operation of two broadcast operands, as one map `part(tangent, *residuals)` for each.

    The residuals are the operands, or have the output's shape; if `gates`, they are masks. A number among the operands
    has no tangent.
    """
    rank = len(y.shape)
    dtype = y.dtype if is_complex(y) else None  # to which real tangents are cast
    kept = [residual for residual in residuals if not is_number(residual)]
    # A tangent that is smaller than the output is broadcast to it.
    smaller = any(not is_number(a) and tuple(a.shape) != tuple(y.shape) for a in operands)

    def of_values(part):
        def push(tangent, *frozen):
            remaining, tangent = iter(frozen), align(tangent, rank + 1)
            values = [residual if is_number(residual) else next(remaining) for residual in residuals]
            return part(convert(tangent, dtype or tangent.dtype), *values)

        return push

    total = each_input(*(of_values(part) for part, a in zip(parts, operands, strict=True) if not is_number(a)))

    def push(*arguments):
        image = total(*arguments)
        return image + ops.zeros_like(arguments[-1], dtype=image.dtype) if smaller else image

    finite = finite and all(is_finite_number(a) for a in operands if is_number(a))
    after = broadcast(*(len(operand.shape) for operand in operands if not is_number(operand)))
    facts: dict[str, Any] = {"takes_none": True, "finite": finite, "examples": after}
    if gates:
        facts["masks"] = [*(lambda mask: mask for _ in kept), *([None] if smaller else [])]
    return (Gate if gates else Pushforward)(push, *kept, *([y] if smaller else []), **facts)


@register_rule(numpy_ops.Add, numpy_ops.Subtract)
def add(operation, a, b, context):
    sign = 1 if isinstance(operation, numpy_ops.Add) else -1
    y = operation.call(a, b)
    return y, _partials((a, b), [lambda t: t, lambda t: sign * t], y)


@register_rule(numpy_ops.Multiply)
def multiply(operation, a, b, context):
    y = operation.call(a, b)
    parts = [lambda t, a, b: t * _like(b, t), lambda t, a, b: t * _like(a, t)]
    pushforward, rank = _partials((a, b), parts, y, a, b), len(y.shape) + 1
    if not is_number(a) and not is_number(b):
        pushforward.second = lambda u, w, inputs: _crossed(u, w, lambda s, t: align(s, rank) * align(t, rank))
    return y, pushforward


def _crossed(u, w, product: Callable):
    """The second derivative of a product of two operands: `u₀ w₁ + w₀ u₁`; None if it is zero."""
    pairs = [(s, t) for s, t in ((u[0], w[1]), (w[0], u[1])) if s is not None and t is not None]
    if pairs:
        images = [product(s, t) for s, t in (pairs[:1] if u is w or (u[0] is w[0] and u[1] is w[1]) else pairs)]
        return images[0] * 2 if len(images) < len(pairs) else sum(images[1:], images[0])
    return None


@register_rule(numpy_ops.Divide, numpy_ops.TrueDivide)
def divide(operation, a, b, context):
    y = operation.call(a, b)
    if is_number(b):
        return y, _partials((a, b), [lambda t, b, y: t / b, lambda t, b, y: -t * y / b], y, b, y)
    if is_complex(y):
        raise Declined("a quotient of complex numbers")

    def inverse(b, tangent):
        """`1 / b`; a very large number in place of 1 / 0, so that a tangent of zero stays zero."""
        b = _like(b, tangent)
        return ops.where(b == 0, large(tangent.dtype), 1 / ops.where(b == 0, ops.ones_like(b), b))

    quotient = without_infinity(operation.call(a, ops.where(b == 0, ops.ones_like(b), b)))
    parts = [lambda t, b, y: t * inverse(b, t), lambda t, b, y: -t * y * inverse(b, t)]
    return y, _partials((a, b), parts, y, b, quotient, finite=False)


@register_rule(numpy_ops.Power)
def power(operation, a, b, context):
    y = operation.call(a, b)
    if is_complex(y):
        raise Declined("a power of complex numbers")
    base = ops.cast(a, y.dtype)
    if is_number(b):
        return y, _power_of_a_number(operation, base, b)
    exponent = ops.cast(b, y.dtype)
    # base ** (exponent − 1) is not computed where it is 0⁰ or infinite.
    infinite = ops.logical_and(base == 0, exponent < 1)
    constant = ops.logical_or(exponent == 0, exponent == 1)
    by_base = exponent * operation.call(ops.where(ops.logical_or(infinite, constant), 1.0, base), exponent - 1)
    by_base = ops.where(infinite, by_base * large(y.dtype), by_base)
    positive = ops.where(base > 0, base, 1.0)
    by_exponent = operation.call(positive, exponent) * ops.log(positive)
    parts = [lambda t, by_base, by_exponent: t * by_base, lambda t, by_base, by_exponent: t * by_exponent]
    return y, _partials((a, b), parts, y, by_base, by_exponent, finite=False)


def _power_of_a_number(operation, base, exponent) -> Pushforward:
    """The pushforward of `base ** exponent` for a number. Exponents 0 and 1, and 2 in the slope, need no power."""
    if exponent == 0:
        return Pushforward(ops.zeros_like, examples=kept)
    if exponent == 1:
        return identity()
    if exponent == 2:
        return scale(2 * base)
    if exponent > 2:
        return scale(exponent * operation.call(base, exponent - 1))
    inside = base != 0 if exponent == int(exponent) else base > 0
    if exponent < 1:
        return scale_to_the_end(base, lambda x: exponent * operation.call(x, exponent - 1), inside, 1.0)
    slope = exponent * operation.call(ops.where(inside, base, 1.0), exponent - 1)
    return scale(ops.where(inside, slope, 0.0))


@register_rule(numpy_ops.DivideNoNan)
def divide_no_nan(operation, a, b, context):
    """`a / b`, and 0 with a slope of 0 where b is 0."""
    y = operation.call(a, b)
    divisor = ops.broadcast_to(ops.cast(b, y.dtype), ops.shape(y))
    inverse = ops.where(divisor == 0, 0.0, 1 / ops.where(divisor == 0, 1.0, divisor))
    parts = [lambda t, inverse, y: t * inverse, lambda t, inverse, y: -t * y * inverse]
    return y, _partials((a, b), parts, y, inverse, y)


@register_rule(numpy_ops.Mod, numpy_ops.Fmod)
def remainder(operation, a, b, context):
    """`a − n b`, where n is a whole number."""
    y = operation.call(a, b)
    if not has_tangents(y):
        return y, _partials((a, b), [lambda t, n: t, lambda t, n: t], y, ops.zeros_like(y))
    divisor = ops.cast(b, y.dtype)
    n = ops.round((ops.cast(a, y.dtype) - y) / ops.where(divisor == 0, 1.0, divisor))
    return y, _partials((a, b), [lambda t, n: t, lambda t, n: -n * t], y, n)


@register_rule(numpy_ops.Ldexp, numpy_ops.Nextafter)
def of_first(operation, a, b, context):
    """`a · 2^b` for a whole number b, and the number next to a in the direction of b: b has no tangent."""
    y = operation.call(a, b)
    slope = operation.call(ops.ones_like(y), b) if isinstance(operation, numpy_ops.Ldexp) else ops.ones_like(y)
    return y, _partials((a, b), [lambda t, slope: slope * t, lambda t, slope: ops.zeros_like(t)], y, slope)


@register_rule(numpy_ops.Hypot)
def hypot(operation, a, b, context):
    """The length of (a, b). At the origin its slope is 0."""
    y = operation.call(a, b)
    length = ops.where(y > 0, y, 1.0)
    parts = [lambda t, by_a, by_b: t * by_a, lambda t, by_a, by_b: t * by_b]
    return y, _partials((a, b), parts, y, a / length, b / length)


@register_rule(nn.Polar)
def polar(operation, radius, angle, context):
    """`r e^{iφ}`: complex, from two real numbers."""
    y = operation.call(radius, angle)
    unit = operation.call(ops.ones_like(radius), angle)
    turned = operation.call(radius, angle + math.pi / 2)
    return y, _partials((radius, angle), [lambda t, a, b: t * a, lambda t, a, b: t * b], y, unit, turned)


@register_rule(numpy_ops.Maximum, numpy_ops.Minimum, numpy_ops.Fmax, numpy_ops.Fmin)
def select(operation, a, b, context):
    y = operation.call(a, b)
    # A tie goes to the first operand. In the dtype of the output, to which a number is rounded.
    better = ops.greater_equal if isinstance(operation, (numpy_ops.Maximum, numpy_ops.Fmax)) else ops.less_equal
    first = better(ops.cast(a, y.dtype), ops.cast(b, y.dtype))
    if isinstance(operation, (numpy_ops.Fmax, numpy_ops.Fmin)):  # What is no number loses, on either side.
        first = ops.logical_or(first, ops.isnan(ops.cast(b, y.dtype)))
    first = ops.broadcast_to(first, ops.shape(y))
    parts = [lambda t, first: ops.where(first, t, 0.0), lambda t, first: ops.where(first, 0.0, t)]
    return y, _partials((a, b), parts, y, first, gates=True)


@register_rule(numpy_ops.Logaddexp, numpy_ops.Logaddexp2)
def logaddexp(operation, a, b, context):
    y = operation.call(a, b)
    unit = 1.0 if isinstance(operation, numpy_ops.Logaddexp) else math.log(2)
    share = ops.sigmoid(unit * ops.where(ops.equal(a, b), ops.zeros_like(y), a - b))  # equal ones may be infinite
    return y, _partials((a, b), [lambda t, share: t * share, lambda t, share: t * (1 - share)], y, share)


@register_rule(numpy_ops.Arctan2)
def arctan2(operation, a, b, context):
    """The angle of (b, a). At the origin, where it is not defined, its slope is 0."""
    y = operation.call(a, b)
    # In units of the larger of the two, whose square may be no number any more.
    largest = ops.stop_gradient(ops.maximum(ops.abs(a), ops.abs(b)))
    unit = ops.where(largest > 0, largest, 1.0)
    x, z = b / unit, a / unit
    squared = x * x + z * z
    inverse = 1 / ops.where(squared > 0, squared, 1.0)
    parts = [lambda t, by_a, by_b: t * by_a, lambda t, by_a, by_b: t * by_b]
    return y, _partials((a, b), parts, y, x * inverse / unit, -z * inverse / unit)


@register_rule(numpy_ops.Heaviside)
def heaviside(operation, a, b, context):
    """A step with the value b at 0. Torch has no derivative of it."""
    y = operation.call(a, b)
    at_step = ops.broadcast_to(ops.equal(a, 0), ops.shape(y))
    return y, _partials((a, b), [lambda t, at: ops.zeros_like(t), lambda t, at: ops.where(at, t, 0.0)], y, at_step)


@register_rule(numpy_ops.Where)
def where(operation, condition, a, b, context):
    y = operation.call(condition, a, b)
    chosen = ops.broadcast_to(ops.cast(condition, "bool"), ops.shape(y))
    parts = [lambda t, c: ops.zeros_like(t), lambda t, c: ops.where(c, t, 0.0), lambda t, c: ops.where(c, 0.0, t)]
    return y, _partials((condition, a, b), parts, y, chosen, gates=True)


@register_rule(
    numpy_ops.Matmul,
    numpy_ops.Einsum,
    numpy_ops.Tensordot,
    numpy_ops.Dot,
    numpy_ops.Inner,
    numpy_ops.Correlate,
    numpy_ops.Kron,
    numpy_ops.Outer,
    numpy_ops.Vdot,
)
def contract(operation, *operands, context):
    """A product of tensors, linear in each of them while the others are frozen."""
    ranks = [len(operand.shape) for operand in operands]

    def part(i, tangent, *residuals):
        """The product with a tangent in place of operand `i`; of all probes at once if that is possible."""
        before, after = ([operand[0] for operand in others] for others in (residuals[:i], residuals[i + 1 :]))

        def product(tangent, call=operation.call):
            return call(*before, tangent, *after)

        if tangent.shape[0] == 1:
            return each_probe(product)(tangent)
        probed = _probed(operation.subscripts, i) if isinstance(operation, numpy_ops.Einsum) else None
        if probed is not None:
            return product(tangent, functools.partial(ops.einsum, probed))
        if isinstance(operation, numpy_ops.Matmul) and min(ranks) >= 2:
            if i == 0 and ranks[1] == 2:  # rows times a matrix
                return unfold(product(fold(tangent)), ops.shape(tangent)[0])
            return product(align(tangent, max(ranks) + 1))
        return each_probe(product)(tangent)

    push = each_input(*(functools.partial(part, i) for i in range(len(operands))))
    after = multiplied(operation, ranks)
    second = _second_of_product(operation, ranks) if len(operands) == 2 else None
    return operation.call(*operands), Pushforward(push, *operands, takes_none=True, examples=after, second=second)


def _second_of_product(operation, ranks: list[int]) -> Callable:
    def product(s, t):
        probed = _probed(operation.subscripts, 0, 1) if isinstance(operation, numpy_ops.Einsum) else None
        if probed is not None:
            return ops.einsum(probed, s, t)
        if isinstance(operation, numpy_ops.Matmul) and min(ranks) >= 2:
            return operation.call(align(s, max(ranks) + 1), align(t, max(ranks) + 1))
        return each_probe(operation.call)(s, t)

    return lambda u, w, inputs: _crossed(u, w, product)


def _probed(subscripts: str, *places: int) -> str | None:
    """Subscripts with a probe index on operands and on the result; None if they do not name the result."""
    operands, arrow, result = subscripts.replace(" ", "").partition("->")
    if not arrow or "." in subscripts:
        return None
    probes = next(letter for letter in string.ascii_letters if letter not in subscripts)
    given = operands.split(",")
    for i in places:
        given[i] = probes + given[i]
    return f"{','.join(given)}->{probes}{result}"


@register_rule(nn.SeparableConv)
def separable_convolution(operation, x, depthwise_kernel, pointwise_kernel, context):
    push = each_input(
        lambda t, x, depthwise, pointwise: folded(lambda t: operation.call(t, depthwise[0], pointwise[0]))(t),
        lambda t, x, depthwise, pointwise: each_probe(lambda u: operation.call(x[0], u, pointwise[0]))(t),
        lambda t, x, depthwise, pointwise: each_probe(lambda u: operation.call(x[0], depthwise[0], u))(t),
    )
    operands = x, depthwise_kernel, pointwise_kernel
    return operation.call(*operands), Pushforward(push, *operands, takes_none=True)


@register_rule(nn.Conv, nn.DepthwiseConv, nn.ConvTranspose)
def convolution(operation, x, kernel, context):
    call = operation.call
    if isinstance(operation, nn.ConvTranspose):
        # Not by the operation itself: its `call` passes its arguments on in the wrong order.
        names = ("strides", "padding", "output_padding", "data_format", "dilation_rate")
        call = functools.partial(ops.conv_transpose, **{name: getattr(operation, name) for name in names})

    push = each_input(
        lambda t, x, kernel: folded(lambda t: call(t, kernel[0]))(t),
        lambda t, x, kernel: each_probe(lambda u: call(x[0], u))(t),
    )
    return call(x, kernel), Pushforward(push, x, kernel, takes_none=True)
