"""Convolutions of every kind: the kernel is the linear part, the bias drops out of the tangent."""

import keras
from keras import layers, ops

from jvpreg.rules.contract import Affine
from jvpreg.rules.core import kernel_parts
from jvpreg.rules.registry import register_rule


def _affine(layer, x, convolve, parts, scale, transposed=None):
    """`convolve(x, *kernels)` with a bias.

    `parts` are the pairs `(variable, part(u, x))` of the kernels; `scale(slope)` returns the kernels with which the
    channels of the output are multiplied by a slope (C,); `transposed` is that of `Affine`.
    """
    channels_first = layer.data_format == "channels_first"

    def spread(bias):
        return ops.reshape(bias, (1, -1, *[1] * layer.rank) if channels_first else (-1,))

    def scaled(slope, axis):
        if axis != (1 if channels_first else layer.rank + 1):
            return None
        kernels = scale(slope)
        return lambda x: convolve(x, *kernels)

    return Affine(convolve, x, parts, layer.bias, spread, scaled, transposed)


def _causal(layer, x):
    """The input, padded if the convolution is causal, and the padding that the operation itself has to do."""
    if layer.padding != "causal":
        return x, layer.padding
    (kernel_size,), (dilation,) = layer.kernel_size, layer.dilation_rate
    before = (dilation * (kernel_size - 1), 0)
    steps_last = layer.data_format == "channels_first"
    return ops.pad(x, ((0, 0), (0, 0), before) if steps_last else ((0, 0), before, (0, 0))), "valid"


@register_rule(layers.Conv1D, layers.Conv2D, layers.Conv3D, activation="activation")
def convolution(layer, x, context):
    def convolve(x, kernel=layer.kernel):
        x, padding = _causal(layer, x)
        return ops.conv(
            x,
            ops.cast(kernel, x.dtype),
            strides=list(layer.strides),
            padding=padding,
            dilation_rate=layer.dilation_rate,
            data_format=layer.data_format,
        )

    parts = kernel_parts(layer, lambda u, x: convolve(x, u))
    transposed = _transposed_by_torch(layer, x, layer.kernel)
    return _affine(layer, x, convolve, parts, lambda slope: [layer.kernel * slope], transposed)


def _transposed_by_torch(layer, x, kernel):
    """The transpose by the kernel that Torch's own backward pass runs; None on other backends, and for ONNX."""
    if keras.backend.backend() != "torch":
        return None
    import torch

    if torch.onnx.is_in_onnx_export() or not torch.is_tensor(x) or x.device.type == "meta":
        return None
    last = layer.data_format == "channels_last"
    sizes = x.shape[1:-1] if last else x.shape[2:]
    reach = [dilation * (size - 1) for dilation, size in zip(layer.dilation_rate, layer.kernel_size, strict=True)]
    before, after = _padding(layer, sizes, reach)
    even = before == after
    channels = x.shape[-1] if last else x.shape[1]
    padded = sizes if even else [sum(parts) for parts in zip(before, sizes, after, strict=True)]

    def transposed(v):
        weight = torch.movedim(ops.cast(kernel, v.dtype), (-1, -2), (0, 1))
        shape = (v.shape[0], *padded, channels) if last else (v.shape[0], channels, *padded)
        # Only the shape and the layout of the input count.
        like = v.new_empty(shape)
        if last:
            v, like = torch.movedim(v, -1, 1), torch.movedim(like, -1, 1)
        groups = channels // weight.shape[1]
        rank = len(sizes)
        options = (layer.strides, before if even else [0] * rank, layer.dilation_rate, False, [0] * rank, groups)
        pulled, *_ = torch.ops.aten.convolution_backward(v, like, weight, None, *options, [True, False, False])
        if not even:
            pulled = pulled[(..., *(slice(i, i + size) for i, size in zip(before, sizes, strict=True)))]
        return torch.movedim(pulled, 1, -1) if last else pulled

    return transposed


def _padding(layer, sizes, reach) -> tuple[list[int], list[int]]:
    """How many zeros stand before and after the entries of each spatial axis."""
    if layer.padding == "causal":
        return list(reach), [0] * len(reach)
    if layer.padding == "valid":
        return [0] * len(reach), [0] * len(reach)
    needs = [(-(-n // s) - 1) * s + r + 1 - n for n, s, r in zip(sizes, layer.strides, reach, strict=True)]
    return [max(need, 0) // 2 for need in needs], [max(need, 0) - max(need, 0) // 2 for need in needs]


@register_rule(layers.DepthwiseConv1D, layers.DepthwiseConv2D, activation="activation")
def depthwise_convolution(layer, x, context):
    def convolve(x, kernel=layer.kernel):
        return ops.depthwise_conv(
            x,
            ops.cast(kernel, x.dtype),
            strides=layer.strides,
            padding=layer.padding,
            dilation_rate=layer.dilation_rate,
            data_format=layer.data_format,
        )

    def scale(slope):
        return [layer.kernel * ops.reshape(slope, layer.kernel.shape[-2:])]

    return _affine(layer, x, convolve, [(layer.kernel, lambda u, x: convolve(x, u))], scale)


@register_rule(layers.SeparableConv1D, layers.SeparableConv2D, activation="activation")
def separable_convolution(layer, x, context):
    def convolve(x, depthwise_kernel=layer.depthwise_kernel, pointwise_kernel=layer.pointwise_kernel):
        return ops.separable_conv(
            x,
            ops.cast(depthwise_kernel, x.dtype),
            ops.cast(pointwise_kernel, x.dtype),
            strides=layer.strides,
            padding=layer.padding,
            dilation_rate=layer.dilation_rate,
            data_format=layer.data_format,
        )

    weights = [
        (layer.depthwise_kernel, lambda u, x: convolve(x, depthwise_kernel=u)),
        (layer.pointwise_kernel, lambda u, x: convolve(x, pointwise_kernel=u)),
    ]

    def scale(slope):
        return [layer.depthwise_kernel, layer.pointwise_kernel * slope]

    return _affine(layer, x, convolve, weights, scale)


@register_rule(layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose, activation="activation")
def transposed_convolution(layer, x, context):
    def convolve(x, kernel=layer.kernel):
        return ops.conv_transpose(
            x,
            ops.cast(kernel, x.dtype),
            strides=list(layer.strides),
            padding=layer.padding,
            output_padding=layer.output_padding,
            dilation_rate=layer.dilation_rate,
            data_format=layer.data_format,
        )

    parts = [(layer.kernel, lambda u, x: convolve(x, u))]
    return _affine(layer, x, convolve, parts, lambda slope: [layer.kernel * ops.expand_dims(slope, -1)])
