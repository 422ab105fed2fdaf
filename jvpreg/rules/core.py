"""Dense, and the layers that pass on their input, or its steps that are not masked."""

from keras import layers, ops

from jvpreg.common import keras_private
from jvpreg.rules.contract import Affine
from jvpreg.rules.examples import besides
from jvpreg.rules.families import gate, identity
from jvpreg.rules.registry import register_rule


def kernel_parts(layer, apply) -> list:
    """The parts `apply(u, x)` of a layer's kernel, and of the two factors whose product LoRA adds to it."""
    parts = [(keras_private.kernel(layer), apply)]
    if layer.lora_enabled:
        weight, left, right = layer.lora_alpha / layer.lora_rank, layer.lora_kernel_a, layer.lora_kernel_b
        parts += [
            (left, lambda u, x: apply(weight * ops.matmul(u, right), x)),
            (right, lambda u, x: apply(weight * ops.matmul(left, u), x)),
        ]
    return parts


@register_rule(layers.Dense, activation="activation")
def dense(layer, x, context):
    kernel = ops.cast(layer.kernel, x.dtype)
    parts = kernel_parts(layer, lambda u, x: ops.matmul(x, u))

    def transposed(v):
        return ops.matmul(v, ops.transpose(kernel))

    after = besides([-1], len(x.shape))
    return Affine(lambda x: ops.matmul(x, kernel), x, parts, layer.bias, transposed=transposed, examples=after)


@register_rule(layers.Identity)
def pass_on(layer, x, context):
    return x, identity()


@register_rule(layers.Masking)
def masking(layer, x, context):
    kept = ops.any(ops.not_equal(x, layer.mask_value), axis=-1, keepdims=True)
    return ops.where(kept, x, 0), gate(kept)
