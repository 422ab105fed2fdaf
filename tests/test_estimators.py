"""Estimators against numpy's SVD of explicit Jacobians."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import jvpreg
from jvpreg.estimators import frobenius_norm, top_singular_value

RANDOM = np.random.default_rng(0)
ORTHOGONAL = np.linalg.qr(RANDOM.normal(size=(6, 6)))[0]
MATRICES = {
    "wide": RANDOM.normal(size=(6, 4)),
    "tall": RANDOM.normal(size=(4, 6)),
    "one output": RANDOM.normal(size=(6, 1)),
    "one input": RANDOM.normal(size=(1, 6)),
    "scalar": np.array([[-2.5]]),
    "rank one": np.outer(RANDOM.normal(size=6), RANDOM.normal(size=4)),
    "rank two": RANDOM.normal(size=(6, 2)) @ RANDOM.normal(size=(2, 6)),
    "zero": np.zeros((6, 4)),
    "identity": np.eye(6),
    "repeated": ORTHOGONAL * np.array([3.0, 3.0, 3.0, 1.0, 1.0, 0.0]),
    "tiny": 1e-6 * RANDOM.normal(size=(6, 4)),
    "wide range": ORTHOGONAL @ np.diag(10.0 ** np.arange(-3, 3)) @ ORTHOGONAL.T,
}


def linearized(matrix, batch=2):
    """A model whose Jacobian is `matrixᵀ`, for every example."""
    model = keras.Sequential([keras.Input((matrix.shape[0],)), layers.Dense(matrix.shape[1])])
    model.set_weights([matrix, np.ones(matrix.shape[1])])
    return jvpreg.linearize(model, np.ones((batch, matrix.shape[0])))


def numbers(estimate):
    return [ops.convert_to_numpy(part) for part in estimate[:3]]


def compiled(function):
    """`function` from arrays to a tuple of arrays, compiled by the backend where it can."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.function(function, jit_compile=True)
    if keras.backend.backend() == "jax":
        import jax

        return jax.jit(function)
    pytest.skip("torch runs it as it is")


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("matrix", MATRICES.values(), ids=MATRICES.keys())
def test_against_the_svd(matrix):
    lin = linearized(matrix)
    expected = np.linalg.svd(matrix, compute_uv=False)
    value, sem, residual = numbers(top_singular_value(lin))
    np.testing.assert_allclose(value, expected[0], rtol=1e-10, atol=1e-14)
    assert np.all(residual <= 1e-8 * max(expected[0], 1e-8))
    assert value.shape == sem.shape == residual.shape == (2,)
    for side in ("input", "output", None):
        value, sem, residual = numbers(frobenius_norm(lin, side=side))
        np.testing.assert_allclose(value, np.linalg.norm(matrix), rtol=1e-12, atol=1e-14)
        assert not sem.any()
        assert not residual.any()


@pytest.mark.parametrize("name", ["rank one", "zero", "tiny", "repeated", "wide range"])
def test_against_the_svd_in_float32(name):
    matrix = MATRICES[name]
    value, _, _ = numbers(top_singular_value(linearized(matrix)))
    np.testing.assert_allclose(value, np.linalg.norm(matrix, 2), rtol=1e-5, atol=1e-12)


@pytest.mark.usefixtures("float64")
def test_several_inputs_and_outputs():
    a, b = keras.Input((2, 2)), keras.Input((3,))
    flat = layers.Concatenate()([layers.Flatten()(a), b])
    model = keras.Model([a, b], [layers.Dense(4, use_bias=False)(flat), layers.Dense(1, use_bias=False)(b)])
    lin = jvpreg.linearize(model, [np.ones((2, 2, 2)), np.ones((2, 3))])
    w1, w2 = model.get_weights()
    matrix = np.concatenate([w1, np.concatenate([np.zeros((4, 1)), w2])], axis=1)
    np.testing.assert_allclose(numbers(top_singular_value(lin))[0], np.linalg.norm(matrix, 2), rtol=1e-10)
    np.testing.assert_allclose(numbers(frobenius_norm(lin))[0], np.linalg.norm(matrix), rtol=1e-10)


@pytest.mark.usefixtures("float64")
def test_every_example_has_a_jacobian_of_its_own():
    model = keras.Sequential([keras.Input((5,)), layers.Dense(6, activation="tanh"), layers.Dense(3)])
    x = RANDOM.normal(size=(7, 5))
    lin = jvpreg.linearize(model, x)
    jacobians = ops.convert_to_numpy(lin.jvp(np.broadcast_to(np.eye(5)[:, None], (5, 7, 5)).copy()))
    singular = np.linalg.svd(jacobians.transpose(1, 2, 0), compute_uv=False)
    np.testing.assert_allclose(numbers(top_singular_value(lin))[0], singular[:, 0], rtol=1e-10)
    np.testing.assert_allclose(numbers(frobenius_norm(lin))[0], np.linalg.norm(singular, axis=1), rtol=1e-10)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("num_iterations", [1, 3, 6])
def test_before_convergence_it_is_a_lower_bound_within_the_residual_of_a_singular_value(num_iterations):
    matrix = np.random.default_rng(3).normal(size=(40, 30))
    singular = np.linalg.svd(matrix, compute_uv=False)
    estimate = top_singular_value(linearized(matrix, batch=20), num_iterations)
    value, _, residual = numbers(estimate)
    assert estimate.num_matvecs == 2 * num_iterations
    # The starting vectors differ between examples.
    assert np.ptp(value) > 1e-6
    assert np.all(value <= singular[0] * (1 + 1e-12))
    assert np.all(np.abs(value[:, None] - singular).min(axis=1) <= residual)
    assert np.all(residual > 1e-6)


@pytest.mark.parametrize("side", ["input", "output"])
def test_the_standard_error_covers(side):
    # Each example has draws of its own, so a batch is a sample of seeds.
    matrix = np.random.default_rng(4).normal(size=(60, 50)) * np.linspace(0.1, 3, 50)
    estimate = frobenius_norm(linearized(matrix, batch=1000), num_probes=16, side=side)
    value, sem, _ = numbers(estimate)
    assert estimate.num_matvecs == 16
    error = value - np.linalg.norm(matrix)
    np.testing.assert_allclose(np.sqrt(np.mean(sem**2)), error.std(), rtol=0.1)
    # Student's t of 15 degrees of freedom: 93.6% lie within two standard errors.
    covered = np.mean(np.abs(error) < 2 * sem)
    assert 0.90 < covered < 0.97


def test_compiled_it_is_the_same():
    matrix = MATRICES["wide"].astype("float32")
    model = keras.Sequential([keras.Input((6,)), layers.Dense(4)])
    model.set_weights([matrix, np.ones(4)])

    def estimates(x):
        lin = jvpreg.linearize(model, x)
        return top_singular_value(lin)[:3], frobenius_norm(lin)[:3]

    x = np.ones((2, 6), "float32")
    eager = estimates(x)
    results = compiled(estimates)(x)
    for ours, theirs in zip(results, eager, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(ops.convert_to_numpy(one), ops.convert_to_numpy(other), rtol=1e-4, atol=1e-6)


def test_one_seed_draws_one_number():
    lin = linearized(np.random.default_rng(5).normal(size=(30, 30)))
    first, again, other = (numbers(frobenius_norm(lin, 4, seed=seed))[0] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.all(first != other)


def test_bad_arguments():
    lin = linearized(MATRICES["wide"])
    with pytest.raises(ValueError, match=r"`num_probes`. Expected at least 2: one probe has no standard error"):
        frobenius_norm(lin, num_probes=1)
    with pytest.raises(ValueError, match="`side`"):
        frobenius_norm(lin, side="both")
    with pytest.raises(ValueError, match=r"`num_iterations`. Expected an integer, 1 or more. Received: 0"):
        top_singular_value(lin, num_iterations=0)
