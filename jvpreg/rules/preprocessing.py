"""Layers that prepare images. Those that draw at random, or equalize, do so in training only."""

from keras import layers, ops

from jvpreg.rules.contract import Declined, Pushforward
from jvpreg.rules.families import identity, linear
from jvpreg.rules.ops.reducing import shares
from jvpreg.rules.registry import register_rule


@register_rule(
    layers.AugMix,
    layers.CutMix,
    layers.Equalization,
    layers.MixUp,
    layers.RandAugment,
    layers.RandomBrightness,
    layers.RandomColorDegeneration,
    layers.RandomColorJitter,
    layers.RandomContrast,
    layers.RandomElasticTransform,
    layers.RandomErasing,
    layers.RandomFlip,
    layers.RandomGaussianBlur,
    layers.RandomGrayscale,
    layers.RandomHue,
    layers.RandomInvert,
    layers.RandomPerspective,
    layers.RandomPosterization,
    layers.RandomRotation,
    layers.RandomSaturation,
    layers.RandomSharpness,
    layers.RandomShear,
    layers.RandomTranslation,
    layers.RandomZoom,
    layers.Solarization,
)
def augmentation(layer, x, context):
    if context.training:
        # Nearly all are piecewise linear in the images, and some draw again when they run again: left to autodiff.
        raise Declined("it transforms its images at random", to_autodiff=True)
    return x, identity()


@register_rule(layers.RandomCrop)
def random_crop(layer, x, context):
    if context.training:
        raise Declined("it crops at random", to_autodiff=True)
    return layer.call(x, training=False), linear(lambda tangent: layer.call(tangent, training=False))


@register_rule(layers.AutoContrast)
def auto_contrast(layer, x, context):
    """`(x − min) / (max − min)` in each channel of an image, in the range of its values."""
    if len(x.shape) != 4:
        raise Declined("an image without a batch")
    axes = [-3, -2]  # Of all images: it reads these as height and width wherever the channels are.
    low, high = (best(x, axis=axes, keepdims=True) for best in (ops.min, ops.max))
    flat = ops.equal(low, high)  # a channel that it passes on as it is
    width = ops.where(flat, ops.ones_like(low), high - low)
    lower, upper = layer.value_range

    def push(tangent, place, width, flat, lowest, highest):
        by_low, by_high = (ops.sum(share * tangent, axis=axes, keepdims=True) for share in (lowest, highest))
        moved = tangent - by_low - place * (by_high - by_low)
        return ops.where(flat, tangent, (upper - lower) / width * moved)

    residuals = (x - low) / width, width, flat, shares(x, axes, ops.min), shares(x, axes, ops.max)
    return layer.call(x), Pushforward(push, *residuals)


@register_rule(layers.ContrastLimitedAdaptiveHistogramEqualization)
def histogram_equalization(layer, x, context):
    """It looks up whole numbers: piecewise constant."""
    return layer.call(x), None
