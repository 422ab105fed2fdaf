"""Slopes at kinks and at the ends of domains: finite wherever they can be, and 0 where nothing comes in or goes on.

The right slopes are worked out by hand. At a kink they are what the package's conventions say: 0 beside a flat piece
and where a root has no direction (equal numbers, a vector of zeros), and a tie goes to the first operand. Where a
backend's own autodiff has a finite slope at these points, it is this one; several have NaN, from 0 · ∞.
"""

import keras
import numpy as np
import pytest
from compare import numpy
from keras import layers, ops

import jvpreg
from jvpreg.engine.transpose import transpose

pytestmark = pytest.mark.usefixtures("float64")
INF = float("inf")


def total(function):
    return lambda t: function(t, axis=-1, keepdims=True)


def exponents(*numbers):
    return lambda t: ops.power(t, ops.convert_to_tensor(np.array([numbers], "float64")))


def masked(t):
    return ops.where(t > 0, t, -INF)


def padded(t):
    return ops.pad(t, [[0, 0], [1, 1]], constant_values=-INF)


ROOT = np.exp([1.0, 2.0]) / np.sum(np.exp([1.0, 2.0]))
SOFTMAX = np.diag(ROOT) - np.outer(ROOT, ROOT)
# Name: the function of a row of numbers, the row, and the Jacobian there (a row of slopes, if it is diagonal).
FINITE = {
    "x**0.0": (lambda t: t**0.0, [0, 2], [0, 0]),
    "power(x, 0)": (lambda t: ops.power(t, 0), [0, 2], [0, 0]),
    "x**1": (lambda t: t**1, [0, 2], [1, 1]),
    "x**2": (lambda t: t**2, [0, 2], [0, 4]),
    "x**3": (lambda t: t**3, [0, -2], [0, 12]),
    "x**1.5": (lambda t: t**1.5, [0, 4], [0, 3]),
    "x**tensor": (exponents(0, 1, 2, 3, 1.5), [0] * 5, [0, 1, 0, 0, 0]),
    "tensor**x": (lambda t: ops.power(ops.zeros_like(t), t), [2, 3], [0, 0]),
    "std": (total(ops.std), [0, 0, 0], [[0, 0, 0]]),
    "std of ones": (total(ops.std), [1, 1, 1], [[0, 0, 0]]),
    "var": (total(ops.var), [1, 1, 1], [[0, 0, 0]]),
    "norm": (total(ops.norm), [0, 0, 0], [[0, 0, 0]]),
    "norm, elsewhere": (total(ops.norm), [0, 3, 4], [[0, 0.6, 0.8]]),
    "root of a sum of squares": (lambda t: ops.sqrt(ops.sum(t * t, axis=-1, keepdims=True)), [0, 0], [[0, 0]]),
    "arctan2": (lambda t: ops.arctan2(t, 0 * t), [0, 1], [0, 0]),
    "abs": (ops.abs, [0, -2], [0, -1]),
    "maximum with a number": (lambda t: ops.maximum(t, 0.3), [0.1, 0.5], [0, 1]),
    "maximum of a number": (lambda t: ops.maximum(0.3, t), [0.1, 0.5], [0, 1]),
    "minimum with a number": (lambda t: ops.minimum(t, 0.3), [0.1, 0.5], [1, 0]),
    "minimum of a number": (lambda t: ops.minimum(0.3, t), [0.1, 0.5], [1, 0]),
    "maximum of equals": (lambda t: ops.maximum(t, 2 * t), [0, 1], [1, 2]),
    "root behind maximum": (lambda t: ops.maximum(ops.sqrt(t), 1e-3), [0, 4], [0, 0.25]),
    "root behind where": (lambda t: ops.where(t > 0, ops.sqrt(t), 0.0), [0, -1, 4], [0, 0, 0.25]),
    "power behind where": (lambda t: ops.where(t > 0, t**0.5, 0.0), [0, 4], [0, 0.25]),
    "rsqrt behind where": (lambda t: ops.where(t > 0, ops.rsqrt(t), 0.0), [0, 4], [0, -1 / 16]),
    "reciprocal behind where": (lambda t: ops.where(t > 0, ops.reciprocal(t), 0.0), [0, 2], [0, -0.25]),
    "1 / x behind where": (lambda t: ops.where(t > 0, 1 / t, 0.0), [0, 2], [0, -0.25]),
    "x**-1 behind where": (lambda t: ops.where(t > 0, t**-1.0, 0.0), [0, 2], [0, -0.25]),
    "x / x behind where": (lambda t: ops.where(t > 0, t / t, 0.0), [0, 2], [0, 0]),
    "log behind where": (lambda t: ops.where(t > 0, ops.log(t), 0.0), [0, -1, 2], [0, 0, 0.5]),
    "log2 behind where": (lambda t: ops.where(t > 0, ops.log2(t), 0.0), [0, 2], [0, 0.5 / np.log(2)]),
    "log10 behind where": (lambda t: ops.where(t > 0, ops.log10(t), 0.0), [0, 2], [0, 0.5 / np.log(10)]),
    "log1p behind where": (lambda t: ops.where(t > -1, ops.log1p(t), 0.0), [-1, 1], [0, 0.5]),
    "arcsin behind where": (lambda t: ops.where(t < 1, ops.arcsin(t), 0.0), [1, 0.6], [0, 1.25]),
    "arccos behind where": (lambda t: ops.where(t < 1, ops.arccos(t), 0.0), [1, 0.6], [0, -1.25]),
    "arctanh behind where": (lambda t: ops.where(t < 1, ops.arctanh(t), 0.0), [1, 0.5], [0, 4 / 3]),
    "arccosh behind where": (lambda t: ops.where(t > 1, ops.arccosh(t), 0.0), [1, 1.25], [0, 4 / 3]),
    "exp behind where": (lambda t: ops.where(t > 50, t, ops.log1p(ops.exp(t))), [800, 0], [1, 0.5]),
    "sinh behind where": (lambda t: ops.where(t > 50, t, ops.sinh(t)), [800, 0], [1, 1]),
    "cosh behind where": (lambda t: ops.where(t > 50, t, ops.cosh(t)), [800, 0], [1, 0]),
    "expm1 behind where": (lambda t: ops.where(t > 50, t, ops.expm1(t)), [800, 0], [1, 1]),
    "logsumexp of -inf": (lambda t: ops.where(t > 5, ops.logsumexp(t - INF, -1, True), 0.0), [1, 2], [0, 0]),
    "logaddexp of -inf": (lambda t: ops.where(t > 5, ops.logaddexp(t - INF, t - INF), 0.0), [1, 2], [0, 0]),
    "softmax": (lambda t: ops.softmax(masked(t)), [1, -1, 2], np.insert(np.insert(SOFTMAX, 1, 0, 0), 1, 0, 1)),
    "softplus": (ops.softplus, [800, -800], [1, 0]),
    "elu": (ops.elu, [800, -800], [1, 0]),
    "squareplus without b": (lambda t: ops.squareplus(t, 0), [0, 1, -1], [0, 1, 0]),
    "maximum over padding": (lambda t: total(ops.max)(padded(t)), [1, 2], [[0, 1]]),
}
if keras.backend.backend() != "torch":  # Torch's own gelu has NaN there, and its heaviside has no derivative
    FINITE["heaviside"] = (lambda t: ops.heaviside(ops.stop_gradient(t), t + 0.5), [0, 2, -1], [1, 0, 0])
    FINITE["gelu"] = (lambda t: ops.gelu(t, approximate=True), [1e200, -1e200, 0], [1, 0, 0.5])
# Ties for which the backends' own autodiff divides the slope otherwise.
TIES = {"maximum of equals", "abs"}
# Name: the function, the end, and the sign of its slope there.
INFINITE = {
    "sqrt": (ops.sqrt, 0, 1),
    "x**0.5": (lambda t: t**0.5, 0, 1),
    "rsqrt": (ops.rsqrt, 0, -1),
    "reciprocal": (ops.reciprocal, 0, -1),
    "x**-2.0": (lambda t: t**-2.0, 0, -1),
    "log": (ops.log, 0, 1),
    "log2": (ops.log2, 0, 1),
    "log10": (ops.log10, 0, 1),
    "log1p": (ops.log1p, -1, 1),
    "arcsin": (ops.arcsin, -1, 1),
    "arccos": (ops.arccos, 1, -1),
    "arccosh": (ops.arccosh, 1, 1),
    "arctanh": (ops.arctanh, 1, 1),
}


def linearized(function, row):
    x = np.array([row], "float64")
    symbol = keras.Input(x.shape[1:], dtype="float64")
    return jvpreg.linearize(keras.Model(symbol, layers.Lambda(function)(symbol)), x, fallback="error"), x


def autodiff(function, x, cotangent):
    """By the backend's own reverse mode, at x."""
    inputs, cotangents = [ops.convert_to_tensor(x)], [ops.convert_to_tensor(cotangent)]
    return transpose(lambda inputs: [function(inputs[0])], inputs, cotangents)


@pytest.mark.parametrize("name", FINITE)
def test_a_slope_is_finite_wherever_it_can_be(name):
    function, row, expected = FINITE[name]
    lin, x = linearized(function, row)
    expected = np.asarray(expected, "float64")
    expected = np.diag(expected) if expected.ndim == 1 else expected
    columns, rows = np.eye(expected.shape[1])[:, None], np.eye(expected.shape[0])[:, None]
    np.testing.assert_allclose(numpy(lin.jvp(columns))[:, 0].T, expected, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(numpy(lin.vjp(rows))[:, 0], expected, rtol=1e-12, atol=1e-15)
    by_autodiff = np.concatenate([numpy(gradient) for row in rows for gradient in autodiff(function, x, row)])
    known = np.isfinite(by_autodiff) & (name not in TIES)
    np.testing.assert_allclose(by_autodiff[known], expected[known], rtol=1e-12, atol=1e-15)
    full = jvpreg.full_jacobian(lin, None, target=np.ones((1, expected.shape[0])))
    np.testing.assert_allclose(numpy(full.completeness_error()), 0.0, atol=1e-7)  # a number may be rounded to float32


@pytest.mark.parametrize("name", INFINITE)
def test_at_an_end_a_tangent_of_zero_stays_zero(name):
    """The slope there is a very large number instead of infinity, so that 0 times it is 0 and not NaN."""
    function, end, sign = INFINITE[name]
    lin, _ = linearized(function, [end])
    for product in (lin.jvp, lin.vjp):
        np.testing.assert_array_equal(numpy(product(np.array([[0.0]]))), [[0.0]])
        assert sign * numpy(product(np.array([[2.0]])))[0, 0] > 1e299
        assert sign * numpy(product(np.array([[-2.0]])))[0, 0] < -1e299


@pytest.mark.slow
def test_a_penalty_trains_at_these_points():
    """The gradient of a penalty asks for the slope's own slope: with x K = 0, every function is at its end."""
    x = keras.Input((2,))
    t = layers.Dense(2, kernel_initializer="ones", name="dense")(x)
    roots = [ops.maximum(ops.sqrt(t), 1e-3), ops.where(t > 0, t**0.5, 0.0), ops.where(t > 0, 1 / t, 0.0)]
    norms = [total(ops.std)(t), layers.Lambda(total(ops.norm))(t), ops.arctan2(t, 0 * t)]
    powers = [t**exponent for exponent in (0.0, 1, 1.5, 2.0)] + [exponents(0, 1)(t)]
    model = jvpreg.JacobianModel(keras.Model(x, layers.Concatenate()([*roots, *norms, *powers])))
    # The loss is zero, since the gradient of a loss of the outputs would be NaN at the roots.
    model.compile(
        "sgd", lambda y, z: ops.zeros_like(z[:, :1]), jacobian_regularizers=[jvpreg.regularizers.JacobianNorm(1.0)]
    )
    history = model.fit(np.array([[1.0, -1.0]] * 3), np.zeros((3, 1)), verbose=0).history
    assert np.isfinite(history["loss"][0])
    kernel = numpy(model.base.get_layer("dense").kernel)
    assert np.all(np.isfinite(kernel))
    assert np.all(kernel != 1)


# Name: the function, the numbers, their dtype, the slopes. The squares of the numbers are out of the dtype's range.
OUT_OF_SQUARES = {
    "norm, large": (total(ops.norm), [300, 300, 300, 300], "float16", [0.5, 0.5, 0.5, 0.5]),
    "std, small": (total(ops.std), [1e-4, 3e-4], "float16", [-0.5, 0.5]),
    "std, large": (total(ops.std), [1e4, 3e4], "float16", [-0.5, 0.5]),
    "norm, huge": (total(ops.norm), [3e30, 4e30], "float32", [0.6, 0.8]),
    "norm, tiny": (total(ops.norm), [3e-30, 4e-30], "float32", [0.6, 0.8]),
    "arctan2, large": (lambda t: ops.arctan2(t[:, :1], t[:, 1:]), [300, 300], "float16", [1 / 600, -1 / 600]),
    "arctan2, tiny": (lambda t: ops.arctan2(t[:, :1], t[:, 1:]), [1e-25, 1e-25], "float32", [5e24, -5e24]),
}


@pytest.mark.parametrize("name", OUT_OF_SQUARES)
def test_a_slope_needs_no_square_of_its_point(name):
    function, row, dtype, expected = OUT_OF_SQUARES[name]
    symbol = keras.Input((len(row),), dtype=dtype)
    model = keras.Model(symbol, layers.Lambda(function, dtype=dtype)(symbol))
    lin = jvpreg.linearize(model, np.array([row], dtype), fallback="error")
    slopes = numpy(lin.jvp(np.eye(len(row), dtype=dtype)[:, None]))[:, 0, 0]
    np.testing.assert_allclose(slopes, expected, rtol=2e-3 if dtype == "float16" else 1e-5)
