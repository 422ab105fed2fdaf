"""What the estimators are tried on: a UNet whose Jacobian is square, and matrices with a known spectrum."""

import keras
import numpy as np

from experiments.verify.architectures import unet


def square_unet(image_size: int, seed: int) -> keras.Model:
    """The UNet of `verify`, never trained, with as many channels out as in."""
    keras.utils.set_random_seed(seed)
    network = unet((image_size, image_size, 3))
    features = network.layers[-1].input
    return keras.Model(network.input, keras.layers.Conv2D(3, 1, name="pixels")(features))


def images(image_size: int, number: int, seed: int) -> np.ndarray:
    """Random inputs `(B, H, W, 3)`, standard normal, as in the paper."""
    shape = (number, image_size, image_size, 3)
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def symmetric(eigenvalues: np.ndarray, seed: int) -> np.ndarray:
    """A symmetric matrix with those eigenvalues, in a random basis."""
    n = len(eigenvalues)
    basis = np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))[0]
    return basis * eigenvalues @ basis.T
