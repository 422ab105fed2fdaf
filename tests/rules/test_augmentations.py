"""Layers that draw what they do to images, in training: drawn once, as Keras draws it, and frozen."""

import keras
import numpy as np
import pytest
from compare import JAX, assert_close, normal, numpy
from keras import layers

import jvpreg

RANGE = {"value_range": (-4, 4)}

AUGMENTATIONS = {
    "CutMix": lambda: layers.CutMix(seed=1),
    "MixUp": lambda: layers.MixUp(seed=1),
    "RandomBrightness": lambda: layers.RandomBrightness(0.3, **RANGE, seed=1),
    "RandomColorDegeneration": lambda: layers.RandomColorDegeneration(0.7, **RANGE, seed=1),
    "RandomContrast": lambda: layers.RandomContrast(0.3, **RANGE, seed=1),
    "RandomCrop": lambda: layers.RandomCrop(3, 4, seed=1),
    "RandomErasing": lambda: layers.RandomErasing(1.0, **RANGE, seed=1),
    "RandomFlip": lambda: layers.RandomFlip(seed=1),
    "RandomGaussianBlur": lambda: layers.RandomGaussianBlur(1.0, sigma=(0.5, 1.0), **RANGE, seed=1),
    "RandomGrayscale": lambda: layers.RandomGrayscale(0.6, seed=1),
    "RandomInvert": lambda: layers.RandomInvert(0.6, **RANGE, seed=1),
    "RandomPerspective": lambda: layers.RandomPerspective(1.0, seed=1),
    "RandomRotation": lambda: layers.RandomRotation(0.2, seed=1),
    "RandomSaturation": lambda: layers.RandomSaturation(0.6, **RANGE, seed=1),
    "RandomSharpness": lambda: layers.RandomSharpness(0.6, **RANGE, seed=1),
    "RandomShear": lambda: layers.RandomShear(0.3, 0.2, seed=1),
    "RandomTranslation": lambda: layers.RandomTranslation(0.3, 0.3, seed=1),
    "RandomZoom": lambda: layers.RandomZoom(0.4, seed=1),
    "Solarization": lambda: layers.Solarization(**RANGE, seed=1),
}
# TensorFlow moves pixels in float32, and its gradient of `hsv_to_rgb` is not that of the function.
NOT_ON_TENSORFLOW = ("RandomSaturation", "RandomRotation", "RandomShear", "RandomTranslation", "RandomZoom")
QUICK = ("MixUp", "RandomBrightness", "RandomCrop", "RandomFlip")


@pytest.mark.parametrize("kind", QUICK if JAX else AUGMENTATIONS)
def test_what_is_drawn_is_frozen(kind):
    if kind in NOT_ON_TENSORFLOW and keras.backend.backend() == "tensorflow":
        pytest.skip("no reference")
    with jvpreg.testing.float64():
        # On Torch some change their input in place: it is a tensor of the model's own.
        model = keras.Sequential([keras.Input((5, 6, 3)), layers.Rescaling(1.0), AUGMENTATIONS[kind]()])
        x, seeds = normal(3, 5, 6, 3), model.non_trainable_variables
        before = list(map(numpy, seeds))
        y, after = model(x, training=True), list(map(numpy, seeds))
        for seed, value in zip(seeds, before, strict=True):
            seed.assign(value)
        lin = jvpreg.linearize(model, x, training=True, fallback="error")
        assert_close(lin.outputs, y, 1e-13)
        for seed, value in zip(seeds, after, strict=True):
            np.testing.assert_array_equal(numpy(seed), value)
        jvpreg.testing.check_rule(model, (5, 6, 3), training=True)
