"""Layers that prepare images. Those that draw at random, or equalize, do so in training only."""

from keras import layers, ops

from jvpreg.common.replaced import replaced
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
    """What is drawn is drawn once, as Keras draws it, and frozen. What it does to the images is opened up."""
    if not context.training:
        return x, identity()
    if len(x.shape) != 4:
        raise Declined("an image without a batch", to_autodiff=True)
    if isinstance(layer, layers.RandomElasticTransform):
        raise Declined("its operation draws a field that it does not return", to_autodiff=True)
    drawn = layer.get_random_transformation(x, training=True)
    # The operation that blurs takes these as constants.
    constants = {"blur_factor": drawn.pop("blur_factor")} if isinstance(layer, layers.RandomGaussianBlur) else {}

    def transform(images, drawn):
        with replaced([(type(layer.backend), "__getattr__", _of_symbols)]):
            return layer.transform_images(images, {**drawn, **constants} if constants else drawn, training=True)

    return context.linearize(transform, x, drawn=drawn)


def _of_symbols(before, backend, name: str):
    """What a layer that prepares images finds in its own backend, by `keras.ops`, which take symbols too."""
    if name in ("core", "linalg", "math", "nn", "numpy"):
        return ops
    return getattr(ops, name, None) or before(backend, name)


@register_rule(layers.RandomCrop)
def random_crop(layer, x, context):
    """The same window of all images: linear."""
    place = layer.get_random_transformation(x, training=context.training)

    def crop(images):
        return layer.transform_images(images, place, training=context.training)

    return crop(x), linear(crop)


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
