"""Models of fields and functions that tutorials build, small, each with the operations that the tutorial uses."""

import math

import keras
from keras import layers, ops

from experiments.verify.zoos import draws
from experiments.verify.zoos.member import Member

register = keras.saving.register_keras_serializable("zoos")


@register
class Encoding(layers.Layer):
    """Places as sines and cosines of several frequencies, beside themselves."""

    def call(self, places):
        """(..., 3) to (..., 15)."""
        encoded = [places]
        for i in range(2):
            encoded += [ops.sin(2.0**i * places), ops.cos(2.0**i * places)]
        return ops.concatenate(encoded, axis=-1)


@register
class Rendering(layers.Layer):
    """The colour of a ray: of its samples, each seen through those before it."""

    def call(self, predictions):
        """(B, S, 4) to (B, 3)."""
        colours, density = ops.sigmoid(predictions[..., :-1]), ops.relu(predictions[..., -1])
        opacity = 1.0 - ops.exp(-density * 0.5)
        passed = ops.cumprod(1.0 - opacity + 1e-10, axis=-1)
        passed = ops.concatenate([ops.ones_like(passed[:, :1]), passed[:, :-1]], axis=-1)
        return ops.sum(ops.expand_dims(opacity * passed, -1) * colours, axis=-2)


def nerf():
    """Colours and densities of samples along a ray, rendered."""
    inputs = keras.Input((5, 3))
    encoded = Encoding()(inputs)
    x = encoded
    for i in range(4):
        x = layers.Dense(16, activation="relu")(x)
        if i == 1:
            x = layers.concatenate([x, encoded], axis=-1)
    return keras.Model(inputs, Rendering()(layers.Dense(4)(x)))


@register
class SpectralConvolution(layers.Layer):
    """A convolution with a kernel as long as the signal, by the products of the lowest frequencies."""

    def __init__(self, modes=3, **kwargs):
        super().__init__(**kwargs)
        self.modes = modes

    def build(self, shape):
        """A complex matrix for each frequency."""
        size = (self.modes, shape[-1], shape[-1])
        self.real = self.add_weight(size, name="real_kernel")
        self.imaginary = self.add_weight(size, name="imaginary_kernel")

    def call(self, x):
        """(B, N, C) to the same."""
        length = x.shape[1]
        real, imaginary = ops.rfft(ops.transpose(x, (0, 2, 1)))
        real, imaginary = real[..., : self.modes], imaginary[..., : self.modes]

        def product(part, kernel):
            return ops.einsum("bim,mio->bom", part, kernel)

        def padded(part):
            return ops.pad(part, ((0, 0), (0, 0), (0, length // 2 + 1 - self.modes)))

        products = (
            padded(product(real, self.real) - product(imaginary, self.imaginary)),
            padded(product(real, self.imaginary) + product(imaginary, self.real)),
        )
        return ops.transpose(ops.irfft(products, fft_length=length), (0, 2, 1))

    def get_config(self):
        """The arguments of `__init__`."""
        return {**super().get_config(), "modes": self.modes}


def fourier_operator():
    """From a function on a grid to another: the values and the places, lifted, convolved twice and projected."""
    inputs = keras.Input((8, 2))
    x = layers.Dense(4)(inputs)
    for _ in range(2):
        x = layers.Activation("gelu")(SpectralConvolution()(x) + layers.Conv1D(4, 1)(x))
    return keras.Model(inputs, layers.Dense(1)(layers.Dense(8, activation="gelu")(x)))


@register
class Sine(layers.Layer):
    """A layer of SIREN: the sine of a dense layer times a frequency."""

    def __init__(self, units, frequency=30.0, first=False, **kwargs):
        super().__init__(**kwargs)
        self.units, self.frequency, self.first = units, frequency, first

    def build(self, shape):
        """A kernel in the bounds that the authors give."""
        bound = 1 / shape[-1] if self.first else math.sqrt(6 / shape[-1]) / self.frequency
        self.kernel = self.add_weight(
            (shape[-1], self.units), keras.initializers.RandomUniform(-bound, bound), name="kernel"
        )
        self.bias = self.add_weight((self.units,), "zeros", name="bias")

    def call(self, x):
        """(B, D) to (B, units)."""
        return ops.sin(self.frequency * (ops.matmul(x, self.kernel) + self.bias))

    def get_config(self):
        """The arguments of `__init__`."""
        return {**super().get_config(), "units": self.units, "frequency": self.frequency, "first": self.first}


def siren():
    """A picture as a function of the place."""
    return keras.Sequential([keras.Input((2,)), Sine(8, first=True), Sine(8, frequency=3.0), layers.Dense(3)])


@register
class RealNVP(keras.Model):
    """A normalizing flow of affine couplings, each of half of the numbers by the other half."""

    def __init__(self, num_couplings=4, **kwargs):
        super().__init__(**kwargs)
        self.num_couplings = num_couplings
        self.masks = [[0.0, 1.0], [1.0, 0.0]] * (num_couplings // 2)
        self.couplings = [self.coupling() for _ in range(num_couplings)]

    @staticmethod
    def coupling():
        """The scale and the translation of half of the numbers."""
        inputs = keras.Input((2,))
        scale = layers.Dense(2, activation="tanh")(layers.Dense(8, activation="relu")(inputs))
        shift = layers.Dense(2)(layers.Dense(8, activation="relu")(inputs))
        return keras.Model(inputs, [scale, shift])

    def call(self, x):
        """(B, 2) to the latent (B, 2) and the logarithm of the determinant (B,)."""
        log_determinant, direction = 0, -1
        for i in range(self.num_couplings)[::direction]:
            mask = ops.convert_to_tensor(self.masks[i], x.dtype)
            kept = x * mask
            reversed_mask = 1 - mask
            scale, shift = self.couplings[i](kept)
            scale, shift, gate = scale * reversed_mask, shift * reversed_mask, (direction - 1) / 2
            x = reversed_mask * (x * ops.exp(direction * scale) + direction * shift * ops.exp(gate * scale)) + kept
            log_determinant += gate * ops.sum(scale, axis=1)
        return x, log_determinant


MEMBERS = (
    Member("NeRF", nerf, draws.normal(5, 3)),
    Member("Fourier operator", fourier_operator, draws.normal(8, 2)),
    Member("SIREN", siren, draws.uniform(2, low=-1.0)),
    Member("RealNVP", RealNVP, draws.normal(2)),
)
