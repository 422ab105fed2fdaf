"""Selections and matrices beyond the table of cases: ties, singular matrices, equal eigenvalues."""

import keras
import numpy as np
import pytest
from compare import normal, numpy
from keras import layers, ops

import jvpreg

pytestmark = pytest.mark.usefixtures("float64")

# JAX compiles every operation by itself if it is not told to compile all of them together.
JIT = keras.backend.backend() == "jax"


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


U = normal(3, 3, seed=3)
EQUAL = np.diag([2.0, 2.0, 1.0])
SINGULAR = np.array([[1.0, 2.0, 0.0], [2.0, 4.0, 0.0], [0.0, 1.0, 1.0]])
ADJUGATE = np.array([[4.0, -2.0, 0.0], [-2.0, 1.0, 0.0], [2.0, -1.0, 0.0]])
# Within the range of diag(2, 0, 0), the inverse is 1 / 2; across it, a tangent turns the range.
INVERSE_OF_PART = np.zeros((3, 3))
INVERSE_OF_PART[0, 0] = -U[0, 0] / 4
INVERSE_OF_PART[0, 1:], INVERSE_OF_PART[1:, 0] = U[1:, 0] / 4, U[0, 1:] / 4


def rebuilt(x):
    u, s, vh = ops.svd(x)
    return ops.matmul(u * s[:, None], vh)


def rebuilt_symmetric(x):
    w, v = ops.eigh(x)
    return ops.einsum("bij,bj,bkj->bik", v, w, v)


# Name: a function of a matrix, the matrix, and its tangent along U, worked out by hand.
DEGENERATE = {
    "det of a singular matrix": (ops.det, SINGULAR, np.trace(ADJUGATE @ U)),
    "det of zero": (ops.det, np.zeros((3, 3)), 0.0),
    "equal eigenvalues": (lambda x: ops.sum(ops.eigh(x)[0], axis=-1), 2 * np.eye(3), np.trace(U)),
    "a matrix from its eigenvalues": (rebuilt_symmetric, np.diag([3.0, 2.0, 1.0]), (U + U.T) / 2),
    "equal singular values": (lambda x: ops.sum(ops.svd(x, compute_uv=False), axis=-1), EQUAL, np.trace(U)),
    "a matrix from its singular values": (rebuilt, np.diag([3.0, 2.0, 1.0]), U),
    "the inverse of a part": (ops.pinv, np.diag([2.0, 0.0, 0.0]), INVERSE_OF_PART),
    "the cubic norm of zero": (layers.Lambda(lambda x: ops.norm(x, 3, 1)), 0 * U, np.zeros(3)),
    "the norm -1 of zeros": (layers.Lambda(lambda x: ops.norm(x, -1, 1)), np.eye(3), np.zeros(3)),
}


@pytest.mark.parametrize("name", DEGENERATE)
def test_matrices_without_a_gap_or_an_inverse(name):
    function, matrix, expected = DEGENERATE[name]
    lin = linearized(function, matrix[None])
    product = numpy(lin.jvp(U[None]))[0]
    np.testing.assert_allclose(product, expected, rtol=1e-6, atol=1e-6)
    v = normal(1, *np.shape(product), seed=4)
    np.testing.assert_allclose(np.sum(numpy(lin.vjp(v))[0] * U), np.sum(v[0] * product), rtol=1e-6, atol=1e-6)


def test_the_logarithm_of_a_singular_determinant():
    lin = linearized(lambda x: ops.slogdet(x)[1], SINGULAR[None])
    assert numpy(lin.jvp(np.zeros((1, 3, 3)))) == 0
    assert np.abs(numpy(lin.jvp(np.eye(3)[None]))) > 1e6


def test_vectors_beside_the_singular_ones():
    """Nothing fixes each of them; the space that they span has a derivative."""

    def projection(x):
        u, _, vh = ops.svd(x, full_matrices=True)
        return ops.matmul(u[:, :, 2:], ops.transpose(u[:, :, 2:], (0, 2, 1))) + ops.sum(vh**2)

    x, u, step = normal(2, 4, 2), normal(2, 4, 2, seed=1), 1e-6
    lin = linearized(projection, x)
    ends = [numpy(projection(ops.convert_to_tensor(x + sign * step * u))) for sign in (1, -1)]
    np.testing.assert_allclose(numpy(lin.jvp(u)), (ends[0] - ends[1]) / (2 * step), rtol=1e-6, atol=1e-8)
    wide = linearized(lambda x: ops.svd(ops.transpose(x, (0, 2, 1)))[2][:, 2:], x)
    turned = linearized(lambda x: ops.transpose(ops.svd(x)[0], (0, 2, 1))[:, 2:], x)
    np.testing.assert_allclose(numpy(wide.jvp(u)) ** 2, numpy(turned.jvp(u)) ** 2, rtol=1e-8, atol=1e-10)


def test_attention_with_a_bias():
    """The bias has a tangent too. Against the softmax written out, since some backends round a constant to float32."""

    def attend(query, bias, operation):
        return operation(query, query[:, :, :2], ops.tanh(query[:, :, :2]), ops.tanh(bias))

    def written_out(query, key, value, bias):
        key, value = (ops.repeat(heads, 2, axis=2) for heads in (key, value))
        logits = ops.einsum("btnh,bsnh->bnts", query, key) / np.sqrt(2) + bias
        return ops.einsum("bnts,bsnh->btnh", ops.softmax(logits), value)

    query, bias = keras.Input((3, 4, 2)), keras.Input((4, 3, 3))
    model = keras.Model([query, bias], attend(query, bias, ops.dot_product_attention))
    shapes = [(3, 4, 2), (4, 3, 3)]
    jvpreg.testing.check_rule(model, shapes, reference=lambda *x: attend(*x, written_out), tolerance=1e-7, jit=JIT)


def test_a_separable_convolution_within_a_call():
    class Separable(layers.Layer):
        def build(self, shape):
            self.depthwise, self.pointwise = self.add_weight(shape=(2, 3, 2)), self.add_weight(shape=(1, 6, 2))

        def call(self, x):
            return ops.separable_conv(x, self.depthwise, self.pointwise, 1, data_format="channels_last")

    layer = Separable()
    layer(np.zeros((1, 4, 3)))
    assert not jvpreg.linearize(layer, normal(2, 4, 3), fallback="error").fallbacks
    jvpreg.testing.check_rule(layer, (4, 3), jit=JIT)


def test_histogram_equalization_has_no_slope():
    x = np.random.default_rng(0).uniform(0, 255, size=(1, 8, 8, 1)).astype("float32")
    layer = layers.ContrastLimitedAdaptiveHistogramEqualization(tile_grid_size=(2, 2), dtype="float32")
    lin = jvpreg.linearize(
        keras.Sequential([keras.Input((8, 8, 1)), layer, layers.Rescaling(2.0)]), x, fallback="error"
    )
    np.testing.assert_allclose(numpy(lin.outputs), 2 * numpy(layer(x)), rtol=1e-6)
    assert not numpy(lin.jvp(np.ones_like(x))).any()
