"""Fourier transforms, and complex numbers as pairs: linear along the last axes, with any number of axes before them.

A tangent of a complex number is complex. Real and imaginary parts and conjugates are linear over the real numbers.
"""

import keras
import numpy as np
from keras import ops

from jvpreg.common.keras_private import math_ops, numpy_ops
from jvpreg.rules.contract import Pushforward
from jvpreg.rules.examples import along, besides, kept
from jvpreg.rules.registry import register_rule


@register_rule(math_ops.RFFT, math_ops.STFT, math_ops.ExtractSequences, math_ops.ViewAsReal)
def along_last(operation, x, context):
    return operation.call(x), Pushforward(operation.call, examples=along(operation, x.shape))


@register_rule(math_ops.ViewAsComplex)
def view_as_complex(operation, x, context):
    """Not by the operation itself, which on TensorFlow multiplies a real tensor by 1j."""

    def pair(x):
        dtype = "complex128" if keras.backend.standardize_dtype(x.dtype) == "float64" else "complex64"
        real, imaginary = (ops.cast(part, dtype) for part in ops.unstack(x, 2, axis=-1))
        return real + ops.convert_to_tensor(np.array(1j, dtype)) * imaginary

    return pair(x), Pushforward(pair, examples=besides([-1], len(x.shape)))


@register_rule(math_ops.FFT, math_ops.FFT2, math_ops.IFFT2, math_ops.IRFFT, math_ops.ISTFT)
def of_pair(operation, x, context):
    """Of a pair of real and imaginary parts, either of which may have no tangent."""
    real, _ = x

    def push(*tangents):
        given = next(tangent for tangent in tangents if tangent is not None)
        return operation.call(tuple(ops.zeros_like(given) if t is None else t for t in tangents))

    return operation.call(x), Pushforward(push, takes_none=True, examples=along(operation, real.shape))


@register_rule(
    numpy_ops.Conj, numpy_ops.Conjugate, numpy_ops.Deg2rad, numpy_ops.Imag, numpy_ops.Rad2deg, numpy_ops.Real
)
def entrywise(operation, x, context):
    return operation.call(x), Pushforward(operation.call, examples=kept)
