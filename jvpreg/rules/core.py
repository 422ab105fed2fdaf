"""Dense, and the layers that pass their input on."""

from keras import layers, ops

from jvpreg.registry import identity, linear, register_rule


@register_rule(layers.Dense, activation="activation")
def dense(layer, x, context):
    kernel = ops.cast(layer.kernel, x.dtype)
    y = ops.matmul(x, kernel)
    if layer.bias is not None:
        y = ops.add(y, ops.cast(layer.bias, x.dtype))
    return y, linear(lambda tangent: ops.matmul(tangent, kernel))


@register_rule(layers.Identity)
def pass_on(layer, x, context):
    return x, identity()
