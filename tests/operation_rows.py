"""Rows for operations of `keras.ops` that move, sum, multiply or transform entries: `cases.py` takes them up.

The last operation of each function is the one that the row is for.
"""

import math

import keras
import numpy as np
from keras import ops


def _positive(x):
    return ops.exp(0.3 * x)


def _bounded(x):
    return 0.9 * ops.tanh(x)


def _with_nan(x):
    """NaN in a few places, the same in each example."""
    return ops.where(ops.convert_to_tensor(np.arange(12).reshape(4, 3) % 5 == 1), float("nan"), x)


def _with_zeros(x):
    """A zero in the second row, and two in the third column."""
    return ops.where(ops.convert_to_tensor(np.isin(np.arange(12).reshape(4, 3), (2, 4, 8))), 0.0, x)


# On inputs (4, 3).
UNARY = {
    "slice": lambda x: ops.slice(x, (0, 1, 0), (3, 2, 3)),
    "slice-at-an-index": lambda x: ops.slice(x, (0, ops.argmax(x[0, :2, 0]), 0), (3, 2, 3)),
    "scatter": lambda x: ops.scatter(ops.convert_to_tensor([[0], [2], [0]]), x, (4, 4, 3)),
    "array": ops.array,
    "fliplr": ops.fliplr,
    "flipud": ops.flipud,
    "trace": lambda x: ops.trace(x, 1, 1, 2),
    "trapezoid": lambda x: ops.trapezoid(x, dx=0.5, axis=1),
    "diag": lambda x: ops.diag(x[:, 0, 0]),
    "diagflat": lambda x: ops.diagflat(x[:, :2, 0]),
    "prod": lambda x: ops.prod(_with_zeros(x), axis=(1, 2)),
    "prod-with-keepdims": lambda x: ops.prod(_with_zeros(x), axis=1, keepdims=True),
    "cumprod": lambda x: ops.cumprod(_with_zeros(x), axis=1),
    "cumprod-flat": lambda x: ops.cumprod(x),
    "fabs": ops.fabs,
    "cbrt": lambda x: ops.cbrt(_positive(x)),
    "deg2rad": ops.deg2rad,
    "rad2deg": ops.rad2deg,
    "erfc": ops.erfc,
    "erfinv": lambda x: ops.erfinv(_bounded(x)),
    "sinc": ops.sinc,
    "sinc-near-zero": lambda x: ops.sinc(0.1 * x),
    "i0": ops.i0,
    "nan-to-num": lambda x: ops.nan_to_num(_with_nan(x)),
    "saturate-cast": lambda x: ops.saturate_cast(x, "float64"),
    "mod-a-number": lambda x: ops.mod(x, 0.7),
    "hard-shrink": ops.hard_shrink,
    "soft-shrink": ops.soft_shrink,
    "threshold": lambda x: ops.threshold(x, 0.3, -1.0),
    "sparse-plus": ops.sparse_plus,
    "sparse-sigmoid": ops.sparse_sigmoid,
    "conj": lambda x: ops.real(ops.conj(ops.polar(x, x))),
    "extract-sequences": lambda x: ops.extract_sequences(x, 2, 1),
    "rfft": lambda x: ops.rfft(x)[0],
    "stft": lambda x: ops.stft(ops.reshape(x, (-1, 12)), 4, 2, 4)[1],
    "append": lambda x: ops.append(x, 2 * x, axis=1),
    "array-split": lambda x: ops.array_split(x, 3, axis=1),
    "average": lambda x: ops.average(x, weights=_positive(ops.sin(x)), axis=-1),
    "corrcoef": lambda x: ops.corrcoef(x[:, :, 0]),
    "dsplit": lambda x: ops.dsplit(x, 3),
    "dstack": lambda x: ops.dstack([x, ops.sin(x)]),
    "geomspace": lambda x: ops.geomspace(_positive(x), 2 * _positive(x), 3),
    "hsplit": lambda x: ops.hsplit(x, 2),
    "linspace": lambda x: ops.linspace(x, ops.sin(x), 3, endpoint=False),
    "logspace": lambda x: ops.logspace(0.1 * x, 0.2 * x, 3),
    "meshgrid": lambda x: ops.meshgrid(x[0, :, 0], x[0, 0]),
    "nancumprod": lambda x: ops.nancumprod(_with_nan(x), axis=1),
    "nancumsum": lambda x: ops.nancumsum(_with_nan(x), axis=1),
    "nanmax": lambda x: ops.nanmax(_with_nan(x), axis=1),
    "nanmean": lambda x: ops.nanmean(_with_nan(x), axis=1),
    "nanmin": lambda x: ops.nanmin(_with_nan(x), axis=1, keepdims=True),
    "nanprod": lambda x: ops.nanprod(_with_nan(x), axis=1),
    "nanstd": lambda x: ops.nanstd(_with_nan(x), axis=1),
    "nansum": lambda x: ops.nansum(_with_nan(x), axis=(1, 2)),
    "nanvar": lambda x: ops.nanvar(_with_nan(x), axis=1),
    "ptp": lambda x: ops.ptp(x, axis=1),
    "select": lambda x: ops.select([x > 0.5, x > -0.5], [x, 2 * x], 0.3),
    "vander": lambda x: ops.vander(x[:, 0, 0], 3),
    "vsplit": lambda x: ops.vsplit(x, [1]),
    "binary-crossentropy": lambda x: ops.binary_crossentropy(ops.sigmoid(x[:, 1:]), ops.sigmoid(x[:, :-1])),
    "binary-crossentropy-of-logits": lambda x: ops.binary_crossentropy(
        ops.sigmoid(x[:, 1:]), x[:, :-1], from_logits=True
    ),
    "categorical-crossentropy": lambda x: ops.categorical_crossentropy(ops.softmax(x[:, 1:]), ops.softmax(x[:, :-1])),
    "sparse-categorical-crossentropy": lambda x: ops.sparse_categorical_crossentropy(
        ops.argmax(x, axis=-1), x, from_logits=True
    ),
    "psnr": lambda x: ops.psnr(x[:, 1:], x[:, :-1], 2.0),
    "cdist": lambda x: ops.cdist(x, ops.sin(x) + 1),
}

# Of two inputs, with their shapes.
BINARY = {
    "slice-update": (lambda x, y: ops.slice_update(x, (0, 1, 0), y), (4, 3), (2, 3)),
    "scatter-update": (lambda x, y: ops.scatter_update(x, [[0, 1], [2, 3]], y[:2, 0]), (4, 3), (1, 3)),
    "scatter-update-by-adding": (
        lambda x, y: ops.scatter_update(x, [[0, 1], [0, 1]], y[:2, 0], reduction="add"),
        (4, 3),
        (1, 3),
    ),
    "mod": (lambda x, y: ops.mod(x, _positive(y)), (4, 3), (1, 3)),
    "fmod": (lambda x, y: ops.fmod(x, _positive(y)), (4, 3), (1, 3)),
    "divide-no-nan": (lambda x, y: ops.divide_no_nan(x, ops.relu(y)), (4, 3), (4, 1)),
    "fmax": (lambda x, y: ops.fmax(_with_nan(x), y), (4, 3), (1, 3)),
    "fmin": (lambda x, y: ops.fmin(x, _with_nan(y)), (4, 3), (4, 3)),
    "hypot": (ops.hypot, (4, 3), (1, 3)),
    "logaddexp2": (ops.logaddexp2, (4, 3), (4, 3)),
    "ldexp": (lambda x, y: ops.ldexp(x, ops.cast(3 * y, "int32")), (4, 3), (4, 3)),
    "nextafter": (ops.nextafter, (4, 3), (4, 3)),
    "real": (lambda x, y: ops.real(ops.polar(x, y)), (4, 3), (4, 3)),
    "imag": (lambda x, y: ops.imag(ops.conjugate(ops.polar(x, y))), (4, 3), (4, 3)),
    "inner": (lambda x, y: ops.inner(x, y[0]), (4, 3), (2, 3)),
    "kron": (lambda x, y: ops.kron(x[0], y[0]), (2, 3), (2, 2)),
    "outer": (ops.outer, (2,), (3,)),
    "vdot": (lambda x, y: ops.vdot(x[:, 0, 0], y[:, 0, 0]), (4, 3), (4, 3)),
    "correlate": (lambda x, y: ops.correlate(x[0, :, 0], y[0], mode="same"), (4, 3), (2,)),
    "fft": (lambda x, y: ops.fft((x, y))[0], (4, 3), (4, 3)),
    "fft2": (lambda x, y: ops.fft2((x, y))[1], (4, 3), (4, 3)),
    "ifft2": (lambda x, y: ops.ifft2((x, y))[1], (4, 3), (4, 3)),
    "irfft": (lambda x, y: ops.irfft((x, y)), (4, 3), (4, 3)),
    "istft": (lambda x, y: ops.istft((x, y), 4, 2, 4), (6, 3), (6, 3)),
    "view-as-real": (lambda x, y: ops.view_as_real(ops.polar(x, y)), (4, 3), (4, 3)),
    "map-coordinates": (lambda x, y: ops.image.map_coordinates(x[0], ops.abs(y[0]), 1), (4, 3), (2, 5)),
}

# Of images (4, 6, 3).
IMAGES = {
    "crop-images": lambda x: ops.image.crop_images(x, 1, 1, 1, 2),
    "pad-images": lambda x: ops.image.pad_images(x, 1, 0, 2, 1),
    "extract-patches": lambda x: ops.image.extract_patches(x, 2),
    "rgb-to-grayscale": ops.image.rgb_to_grayscale,
    "gaussian-blur": lambda x: ops.image.gaussian_blur(x, (3, 3), (0.5, 0.7)),
    "sobel-edges": ops.image.sobel_edges,
    "depth-to-space": lambda x: ops.depth_to_space(ops.concatenate([x, ops.sin(x[..., :1])], axis=-1), 2),
    "space-to-depth": lambda x: ops.space_to_depth(x, 2),
    "unfold": lambda x: ops.unfold(x, 2),
    "fold": lambda x: ops.fold(ops.reshape(x, (-1, 12, 6)), (3, 4), (2, 2)),
    "rgb-to-hsv": lambda x: ops.image.rgb_to_hsv(ops.sigmoid(x)),
    "hsv-to-rgb": lambda x: ops.image.hsv_to_rgb(ops.sigmoid(x)),
}

if keras.backend.backend() != "torch":  # There Keras takes only a number, and looks for vectors along any axis.
    BINARY["cross"] = (ops.cross, (4, 3), (4, 3))
    BINARY["cross-in-a-plane"] = (lambda x, y: ops.cross(x, y, axis=1), (2, 3), (2, 3))
    UNARY["full"] = lambda x: ops.full((3, 2), ops.mean(x[0]))
    UNARY["full-like"] = lambda x: ops.full_like(x, ops.mean(x[0]))


def _variance(x):
    known = ops.convert_to_tensor(np.arange(12).reshape(4, 3) % 5 != 1)
    count = ops.sum(ops.cast(known, x.dtype), axis=0)
    mean = ops.sum(ops.where(known, x, 0.0), axis=1, keepdims=True) / count
    return ops.sum(ops.square(ops.where(known, x - mean, 0.0)), axis=1) / count


def _colours(hue, saturation, value):
    """Red, green and blue by the formula without cases."""
    steps = [ops.mod(n + 6 * hue, 6.0) for n in (5, 3, 1)]
    parts = [ops.maximum(0.0, ops.minimum(ops.minimum(step, 4 - step), 1.0)) for step in steps]
    return ops.stack([value * (1 - saturation * part) for part in parts], axis=-1)


# What a row's Jacobian is compared with, where autodiff has no derivative of the operation, or a wrong one.
REFERENCES = {
    "real": lambda x, y: x * ops.cos(y),
    "imag": lambda x, y: -x * ops.sin(y),
    "conj": lambda x: x * ops.cos(x),
    "view-as-real": lambda x, y: ops.stack([x * ops.cos(y), x * ops.sin(y)], axis=-1),
    "slice-update": lambda x, y: ops.concatenate([x[:, :1], y, x[:, 3:]], axis=1),
    "hsv-to-rgb": lambda x: _colours(*ops.unstack(ops.sigmoid(x), axis=-1)),
    "logaddexp2": lambda x, y: ops.log(ops.exp(math.log(2) * x) + ops.exp(math.log(2) * y)) / math.log(2),
    "ldexp": lambda x, y: x * 2.0 ** ops.cast(ops.cast(3 * y, "int32"), "float64"),
    "nanvar": _variance,
    "nanstd": lambda x: ops.sqrt(_variance(x)),
    "vander": lambda x: ops.stack([x[:, 0, 0] ** 2, x[:, 0, 0], ops.ones_like(x[:, 0, 0])], axis=-1),
}

# Operations without a row of their own: complex ones, which other rows end in a real number, and those that are checked
# in `test_operations.py`.
APART = {
    *("Abs", "Angle", "Conj", "Conjugate", "Polar", "View", "ViewAsComplex"),
    *("AffineTransform", "ElasticTransform", "PerspectiveTransform", "ScaleAndTranslate", "SegmentProd", "SegmentSum"),
}
if keras.backend.backend() == "jax":  # It has no gradient of it, which training by the primal would need.
    APART.add("Nextafter")
    del BINARY["nextafter"]
if keras.backend.backend() == "torch":
    APART |= {"Full", "FullLike", "Cross"}
