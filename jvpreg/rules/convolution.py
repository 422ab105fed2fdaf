"""Convolutions of every kind: the kernel is the linear part, the bias drops out of the tangent."""

from keras import layers, ops

from jvpreg.registry import linear, register_rule


def _affine(layer, x, convolve):
    y = convolve(x)
    if layer.bias is not None:
        channels = (1, -1, *[1] * layer.rank) if layer.data_format == "channels_first" else (-1,)
        y = ops.add(y, ops.reshape(ops.cast(layer.bias, x.dtype), channels))
    return y, linear(convolve)


def _causal(layer, x):
    """The input as the convolution is to see it, and the padding that is left to do."""
    if layer.padding != "causal":
        return x, layer.padding
    (kernel_size,), (dilation,) = layer.kernel_size, layer.dilation_rate
    before = (dilation * (kernel_size - 1), 0)
    steps_last = layer.data_format == "channels_first"
    return ops.pad(x, ((0, 0), (0, 0), before) if steps_last else ((0, 0), before, (0, 0))), "valid"


@register_rule(layers.Conv1D, layers.Conv2D, layers.Conv3D, activation="activation")
def convolution(layer, x, context):
    kernel = ops.cast(layer.kernel, x.dtype)

    def convolve(x):
        x, padding = _causal(layer, x)
        return ops.conv(
            x,
            kernel,
            strides=list(layer.strides),
            padding=padding,
            dilation_rate=layer.dilation_rate,
            data_format=layer.data_format,
        )

    return _affine(layer, x, convolve)


@register_rule(layers.DepthwiseConv1D, layers.DepthwiseConv2D, activation="activation")
def depthwise_convolution(layer, x, context):
    kernel = ops.cast(layer.kernel, x.dtype)

    def convolve(x):
        return ops.depthwise_conv(
            x,
            kernel,
            strides=layer.strides,
            padding=layer.padding,
            dilation_rate=layer.dilation_rate,
            data_format=layer.data_format,
        )

    return _affine(layer, x, convolve)


@register_rule(layers.SeparableConv1D, layers.SeparableConv2D, activation="activation")
def separable_convolution(layer, x, context):
    depthwise_kernel = ops.cast(layer.depthwise_kernel, x.dtype)
    pointwise_kernel = ops.cast(layer.pointwise_kernel, x.dtype)

    def convolve(x):
        return ops.separable_conv(
            x,
            depthwise_kernel,
            pointwise_kernel,
            strides=layer.strides,
            padding=layer.padding,
            dilation_rate=layer.dilation_rate,
            data_format=layer.data_format,
        )

    return _affine(layer, x, convolve)


@register_rule(layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose, activation="activation")
def transposed_convolution(layer, x, context):
    kernel = ops.cast(layer.kernel, x.dtype)

    def convolve(x):
        return ops.conv_transpose(
            x,
            kernel,
            strides=list(layer.strides),
            padding=layer.padding,
            output_padding=layer.output_padding,
            dilation_rate=layer.dilation_rate,
            data_format=layer.data_format,
        )

    return _affine(layer, x, convolve)
