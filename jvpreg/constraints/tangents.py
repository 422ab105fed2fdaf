"""Directions in which an image moves when it is translated, rotated, scaled or made brighter.

Each is a transform of images `(B, H, W, C)` in floating point, `transform(images, amount)`. A call returns its
derivative by the amount, at amount zero. Between pixels, images are interpolated by cubic convolution (Keys,
a = −1/2): its derivative at a pixel is the central difference, while bilinear interpolation has only one-sided
derivatives there. Beyond their border, images have the values of the border.
"""

from typing import Any

import keras
from keras import ops

from jvpreg.common import checks
from jvpreg.common.typing import Config, Tensor


class _Transform:
    """A transform with one amount or two.

    Args:
        size: the unit of the direction, which is the derivative by `amount / size`.
    """

    num_directions = 1

    def __init__(self, size: float = 1.0):
        self.size = checks.number("size", size, above=0)

    def __call__(self, images: Tensor) -> Tensor:
        """The directions `(P, B, H, W, C)` at images `(B, H, W, C)`."""
        rows, columns = _differences(_checked(images))
        return self.size * ops.stack([rows * y + columns * x for y, x in self._velocities(images)])

    def _velocities(self, images: Tensor) -> list[tuple]:
        """For each direction, the velocity along rows and columns of the place from which a pixel is taken."""
        raise NotImplementedError

    def get_config(self) -> Config:
        """The arguments of `__init__`."""
        return {"size": self.size}

    @classmethod
    def from_config(cls, config: Config) -> "_Transform":
        """The transform that `get_config` described."""
        return cls(**config)


@keras.saving.register_keras_serializable(package="jvpreg.tangents")
class Translation(_Transform):
    """Two directions: a shift downwards and a shift to the right.

    Args:
        size: the unit, in pixels.

    Example:

    >>> import numpy as np, jvpreg
    >>> tuple(jvpreg.constraints.tangents.Translation()(np.ones((5, 8, 8, 1), "float32")).shape)
    (2, 5, 8, 8, 1)
    """

    num_directions = 2

    def transform(self, images: Tensor, amount: Tensor) -> Tensor:
        """Images moved down and to the right by `amount`, `(B, 2)` or `(2,)`, in pixels."""
        images = _checked(images)
        amount = checks.tensor("amount", amount, images.dtype)
        if len(amount.shape) not in (1, 2) or amount.shape[-1] != 2 or not _of_each(amount.shape[:-1], images):
            raise checks.invalid("amount", "pixels (B, 2) or (2,)", amount)
        amount = ops.broadcast_to(amount, (ops.shape(images)[0], 2))
        rows, columns = _grid(images)
        return resample(images, rows - amount[:, 0, None, None], columns - amount[:, 1, None, None])

    def _velocities(self, images: Tensor) -> list[tuple]:
        return [(-1.0, 0.0), (0.0, -1.0)]


@keras.saving.register_keras_serializable(package="jvpreg.tangents")
class Rotation(_Transform):
    """A rotation about the centre of the image, counterclockwise for the viewer.

    Args:
        size: the unit, in radians.

    Example:

    >>> import math, jvpreg
    >>> per_degree = jvpreg.constraints.tangents.Rotation(size=math.pi / 180)
    """

    def transform(self, images: Tensor, amount: Tensor) -> Tensor:
        """Images turned by `amount`, `(B,)` or a number, in radians."""
        images = _checked(images)
        (rows, columns), (y, x) = _grid(images), _from_centre(images)
        cosine, sine = (f(_per_image(images, amount)) for f in (ops.cos, ops.sin))
        moved_y, moved_x = cosine * y + sine * x, cosine * x - sine * y
        return resample(images, rows - y + moved_y, columns - x + moved_x)

    def _velocities(self, images: Tensor) -> list[tuple]:
        y, x = _from_centre(images)
        return [(x[..., None], -y[..., None])]


@keras.saving.register_keras_serializable(package="jvpreg.tangents")
class Scaling(_Transform):
    """An enlargement about the centre of the image.

    Args:
        size: the unit, a logarithm: 0.1 enlarges by a factor of about 1.1.

    Example:

    >>> import jvpreg
    >>> jvpreg.constraints.tangents.Scaling(size=0.1).num_directions
    1
    """

    def transform(self, images: Tensor, amount: Tensor) -> Tensor:
        """Images larger by a factor `exp(amount)`, `(B,)` or a number."""
        images = _checked(images)
        (rows, columns), (y, x) = _grid(images), _from_centre(images)
        smaller = ops.exp(-_per_image(images, amount))
        return resample(images, rows - y + smaller * y, columns - x + smaller * x)

    def _velocities(self, images: Tensor) -> list[tuple]:
        y, x = _from_centre(images)
        return [(-y[..., None], -x[..., None])]


@keras.saving.register_keras_serializable(package="jvpreg.tangents")
class Brightness(_Transform):
    """The same number added to each pixel.

    Args:
        size: the unit, in the pixels' own unit.

    Example:

    >>> import numpy as np, jvpreg
    >>> float(jvpreg.constraints.tangents.Brightness(0.5)(np.zeros((1, 2, 2, 1), "float32"))[0, 0, 0, 0, 0])
    0.5
    """

    def transform(self, images: Tensor, amount: Tensor) -> Tensor:
        """Images brighter by `amount`, `(B,)` or a number."""
        images = _checked(images)
        return images + _per_image(images, amount)[..., None]

    def __call__(self, images: Tensor) -> Tensor:
        """The direction, `(1, B, H, W, C)`."""
        return self.size * ops.expand_dims(ops.ones_like(_checked(images)), 0)


def resample(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Images `(B, H, W, C)` taken at fractional places `(B, H, W)`, by cubic convolution."""
    height, width, channels = images.shape[1:]
    top, left = ops.floor(rows), ops.floor(columns)
    vertical, horizontal = _weights(rows - top), _weights(columns - left)
    flat = ops.reshape(images, (-1, height * width, channels))
    result = ops.zeros_like(images)
    for i in range(4):
        row = ops.clip(ops.cast(top, "int32") + (i - 1), 0, height - 1)
        for j in range(4):
            column = ops.clip(ops.cast(left, "int32") + (j - 1), 0, width - 1)
            place = ops.reshape(row * width + column, (-1, height * width, 1))
            taken = ops.reshape(ops.take_along_axis(flat, place, axis=1), ops.shape(images))
            result = result + (vertical[i] * horizontal[j])[..., None] * taken
    return result


def _weights(t: Tensor) -> tuple:
    """The weights of the four neighbours of a place, which is t past the second: `a = −1/2` (Keys, 1981)."""
    square, cube = t * t, t * t * t
    return (
        -0.5 * cube + square - 0.5 * t,
        1.5 * cube - 2.5 * square + 1.0,
        -1.5 * cube + 2.0 * square + 0.5 * t,
        0.5 * cube - 0.5 * square,
    )


def _differences(images: Tensor) -> tuple[Tensor, Tensor]:
    """The central differences along rows and columns, each `(B, H, W, C)`."""
    height, width = images.shape[1:3]
    padded = ops.concatenate([images[:, :1], images, images[:, -1:]], axis=1)
    rows = (padded[:, 2:] - padded[:, :height]) / 2
    padded = ops.concatenate([images[:, :, :1], images, images[:, :, -1:]], axis=2)
    return rows, (padded[:, :, 2:] - padded[:, :, :width]) / 2


def _grid(images: Tensor) -> tuple[Tensor, Tensor]:
    """The row and the column of each pixel, `(1, H, W)`."""
    height, width = images.shape[1:3]
    rows, columns = ops.meshgrid(ops.arange(height), ops.arange(width), indexing="ij")
    return ops.cast(rows, images.dtype)[None], ops.cast(columns, images.dtype)[None]


def _from_centre(images: Tensor) -> tuple[Tensor, Tensor]:
    """The distance of each pixel from the centre, down and to the right, `(1, H, W)`."""
    rows, columns = _grid(ops.convert_to_tensor(images))
    height, width = images.shape[1:3]
    return rows - (height - 1) / 2, columns - (width - 1) / 2


def _per_image(images: Tensor, amount: Tensor) -> Tensor:
    """An amount for each image, `(B, 1, 1)`."""
    amount = checks.tensor("amount", amount, images.dtype)
    if len(amount.shape) > 1 or not _of_each(amount.shape, images):
        raise checks.invalid("amount", "a number, or one for each image (B,)", amount)
    return ops.broadcast_to(ops.reshape(amount, (-1, 1, 1)), (ops.shape(images)[0], 1, 1))


def _of_each(axes: Any, images: Tensor) -> bool:
    """Whether there is one amount for all images, or one for each, as far as the number of images is known."""
    return all(size in (1, None, images.shape[0]) or images.shape[0] is None for size in axes)


def _checked(images: Tensor) -> Tensor:
    images = checks.tensor("images", images)
    if len(images.shape) != 4 or not keras.backend.is_float_dtype(keras.backend.standardize_dtype(images.dtype)):
        raise checks.invalid("images", "floats (B, H, W, C)", images)
    return images
