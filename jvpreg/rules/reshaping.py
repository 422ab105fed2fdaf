"""Layers that move entries about, or resample them by fixed weights: each is its own pushforward."""

from keras import layers

from jvpreg.rules.contract import Declined
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
    return layer.call(x), linear(layer.call)


@register_rule(layers.RandomCrop)
def random_crop(layer, x, context):
    if context.training:
        raise Declined("it crops at random", to_autodiff=True)
    return layer.call(x, training=False), linear(lambda tangent: layer.call(tangent, training=False))
