"""Layers that move entries about, or resample them by fixed weights: each is its own pushforward."""

from keras import layers

from jvpreg.rules.families import linear
from jvpreg.rules.registry import register_rule


@register_rule(
    layers.Flatten,
    layers.Reshape,
    layers.Permute,
    layers.RepeatVector,
    layers.Cropping1D,
    layers.Cropping2D,
    layers.Cropping3D,
    layers.CenterCrop,
    layers.Resizing,
    layers.ZeroPadding1D,
    layers.ZeroPadding2D,
    layers.ZeroPadding3D,
    layers.UpSampling1D,
    layers.UpSampling2D,
    layers.UpSampling3D,
)
def rearrange(layer, x, context):
    return layer.call(x), linear(layer.call, homogeneous=True)
