"""Products along axes: each entry's slope is the product of the others, which is exact at zeros too.

With one zero among the factors, only its own slope is not zero; with two, none is. So zeros are counted, and divided
by nowhere.
"""

from keras import ops

from jvpreg.common.eager import cast
from jvpreg.common.keras_private import numpy_ops
from jvpreg.rules.contract import Pushforward
from jvpreg.rules.examples import along
from jvpreg.rules.ops.reducing import reduced_axes
from jvpreg.rules.registry import register_rule


@register_rule(numpy_ops.Prod)
def prod(operation, x, context):
    axes = reduced_axes(operation, x)
    y = operation.call(x)
    wide = ops.cast(x, y.dtype)
    zero = wide == 0
    zeros = ops.cast(zero, y.dtype)
    factors = ops.where(zero, 1.0, wide)
    product = ops.prod(factors, axis=axes, keepdims=True)
    others = ops.where(ops.sum(zeros, axis=axes, keepdims=True) == zeros, product / factors, 0.0)

    def push(tangent, others):
        return ops.sum(others * cast(tangent, others.dtype), axis=axes, keepdims=operation.keepdims)

    return y, Pushforward(push, others, examples=along(operation, x.shape))


@register_rule(numpy_ops.Cumprod)
def cumprod(operation, x, context):
    y = operation.call(x)
    flat = operation.axis is None
    wide = ops.cast(ops.ravel(x) if flat else x, y.dtype)
    axis = -1 if flat else operation.axis % len(x.shape) - len(x.shape)
    zero = wide == 0
    factors = ops.where(zero, 1.0, wide)
    product = ops.cumprod(factors, axis=axis)
    before = ops.cumsum(ops.cast(zero, y.dtype), axis=axis)

    def push(tangent, factors, zero, product, before):
        tangent = cast(tangent, product.dtype)
        if flat:
            tangent = ops.reshape(tangent, (ops.shape(tangent)[0], -1))
        # After the first zero, only the tangent of that zero counts.
        along_zeros = ops.cumsum(ops.where(zero, tangent, 0.0), axis=axis)
        without_zeros = ops.cumsum(ops.where(zero, 0.0, tangent / factors), axis=axis)
        return product * ops.where(before == 0, without_zeros, ops.where(before == 1, along_zeros, 0.0))

    examples = "coupled" if flat else along(operation, x.shape)
    return y, Pushforward(push, factors, zero, product, before, examples=examples)
