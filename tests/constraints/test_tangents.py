"""The transforms of images do what their names say, and the tangents are their derivatives."""

import math

import keras
import numpy as np
import pytest

import jvpreg
from jvpreg.constraints import tangents
from tests.constraints.fields import numbers

ALL = [tangents.Translation, tangents.Rotation, tangents.Scaling, tangents.Brightness]
# The second derivative of the interpolation jumps at a pixel. Differences are then right to first order only, so the
# step is small.
STEP = 1e-7


def images(count=3, height=9, width=7, channels=2, seed=0):
    return np.random.default_rng(seed).uniform(size=(count, height, width, channels))


def moved(transform, x, direction, amount):
    if transform.num_directions == 1:
        return numbers(transform.transform(x, amount))
    return numbers(transform.transform(x, amount * np.eye(2)[direction]))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("size", [1.0, 0.3])
@pytest.mark.parametrize("kind", ALL)
def test_a_tangent_is_the_finite_difference_of_the_transform(kind, size):
    x = images()
    transform = kind(size=size)
    directions = numbers(transform(x))
    assert directions.shape == (transform.num_directions, *x.shape)
    for number, direction in enumerate(directions):
        ahead, behind = (moved(transform, x, number, sign * STEP * size) for sign in (1, -1))
        np.testing.assert_allclose(direction, (ahead - behind) / (2 * STEP), atol=10 * STEP)
        # The derivative is the same from both sides: the interpolation has no kink at a pixel.
        here = moved(transform, x, number, 0.0)
        np.testing.assert_allclose((ahead - here) / STEP, (here - behind) / STEP, atol=1e-4)
        np.testing.assert_allclose(here, x, atol=1e-12)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", [tangents.Rotation, tangents.Scaling, tangents.Translation])
def test_a_quadratic_picture_is_moved_exactly(kind):
    # Cubic convolution is exact for parabolas; away from the border the transform must be that of the plane.
    rows, columns = np.meshgrid(np.arange(21.0) - 10, np.arange(17.0) - 8, indexing="ij")

    def picture(y, x):
        return (0.3 * y**2 - 0.2 * x * y + 0.1 * x**2 + y - 2 * x)[None, ..., None]

    amount = np.array([0.6, -1.3]) if kind is tangents.Translation else 0.2
    if kind is tangents.Translation:
        source = rows - 0.6, columns + 1.3
    elif kind is tangents.Rotation:  # Counterclockwise, y pointing down: what is to the right moves up.
        source = (
            math.cos(0.2) * rows + math.sin(0.2) * columns,
            math.cos(0.2) * columns - math.sin(0.2) * rows,
        )
    else:
        source = rows / math.exp(0.2), columns / math.exp(0.2)
    found = numbers(kind().transform(picture(rows, columns), amount))
    inside = (slice(None), slice(6, 15), slice(5, 12))
    np.testing.assert_allclose(found[inside], picture(*source)[inside], atol=1e-10)


def test_what_is_to_the_right_is_rotated_upwards():
    x = np.zeros((1, 11, 11, 1), "float32")
    x[0, 5, 9, 0] = 1.0
    found = numbers(tangents.Rotation().transform(x, math.pi / 2))
    assert np.unravel_index(found[0, :, :, 0].argmax(), (11, 11)) == (1, 5)


def test_a_whole_pixel_is_a_shift():
    x = images().astype("float32")
    found = numbers(tangents.Translation().transform(x, [2.0, -1.0]))
    np.testing.assert_allclose(found[:, 2:, :-1], x[:, :-2, 1:], atol=1e-5)


def test_each_image_has_an_amount_of_its_own():
    x = images().astype("float32")
    amounts = np.array([0.0, 0.2, -0.4], "float32")
    for kind in (tangents.Rotation, tangents.Scaling, tangents.Brightness):
        together = numbers(kind().transform(x, amounts))
        apart = [numbers(kind().transform(x[i : i + 1], amounts[i])) for i in range(3)]
        np.testing.assert_allclose(together, np.concatenate(apart), atol=1e-5)
    shifts = np.array([[0, 0], [1.5, 0], [0, -2.0]], "float32")
    together = numbers(tangents.Translation().transform(x, shifts))
    apart = [numbers(tangents.Translation().transform(x[i : i + 1], shifts[i])) for i in range(3)]
    np.testing.assert_allclose(together, np.concatenate(apart), atol=1e-5)


def test_inside_a_step_the_batch_may_be_unknown():
    base = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Flatten(), keras.layers.Dense(2)])
    model = jvpreg.JacobianModel(base)
    invariant = jvpreg.constraints.Invariant([kind() for kind in ALL])
    model.compile("sgd", "mse", jacobian_regularizers=[invariant])
    x = np.random.default_rng(0).uniform(size=(10, 8, 8, 1)).astype("float32")
    logs = model.fit(x, np.zeros((10, 2)), batch_size=4, verbose=0).history
    assert logs["invariant/violation_max"][0] > 0
