"""Selections and matrices beyond the table of cases: ties, singular matrices, equal eigenvalues."""

import keras
import numpy as np
import pytest
from compare import normal, numpy
from keras import ops

import jvpreg

pytestmark = pytest.mark.usefixtures("float64")


def linearized(function, *points):
    symbols = [keras.Input(batch_shape=point.shape, dtype=point.dtype) for point in points]
    model = keras.Model(symbols, function(*symbols))
    return jvpreg.linearize(model, points if len(points) > 1 else points[0], fallback="error")


@pytest.mark.parametrize("extremum", ["max", "min"])
def test_extrema_of_segments(extremum):
    """On small integers: Keras computes them in float32 on Torch. Equal entries share the tangent."""
    x = np.array([[3, 1], [2, 5], [3, 4], [9, 9], [0, 0], [7, -7], [0, -1]], "float64")
    ids = np.array([0, 0, 0, -1, 2, -1, 2], "int32")  # none is in segment 1; two are in no segment
    u = normal(3, 7, 2)
    lin = linearized(lambda x, ids: getattr(ops, f"segment_{extremum}")(x, ids, num_segments=3), x, ids)
    best = getattr(np, extremum)
    for segment, rows in ((0, [0, 1, 2]), (2, [4, 6])):
        wins = x[rows] == best(x[rows], axis=0)
        expected = (u[:, rows] * wins / wins.sum(0)).sum(1)
        np.testing.assert_array_equal(numpy(lin.outputs)[segment], best(x[rows], axis=0))
        np.testing.assert_allclose(numpy(lin.jvp([u, None]))[:, segment], expected, rtol=1e-14, atol=1e-15)
    assert not numpy(lin.jvp([u, None]))[:, 1].any()
