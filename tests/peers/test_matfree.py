"""Singular values and traces are those of matfree, on JAX."""

import keras
import numpy as np
import pytest
from compare import assert_close, normal, randomize
from keras import layers

import jvpreg

decomp = pytest.importorskip("matfree.decomp")
stochtrace = pytest.importorskip("matfree.stochtrace")
jax = pytest.importorskip("jax")
if keras.backend.backend() != "jax":
    pytest.skip("matfree is for JAX", allow_module_level=True)

SIZE = 5


@pytest.fixture
def lin(float64):
    x = keras.Input((SIZE,))
    y = layers.Dense(7, activation="gelu")(x)
    return jvpreg.linearize(randomize(keras.Model(x, layers.Dense(SIZE)(y))), normal(3, SIZE))


def product(lin, example):
    """`J u` of one example, as matfree calls it."""
    return lambda u: lin.jvp(jax.numpy.zeros((3, SIZE)).at[example].set(u))[example]


def test_singular_values(lin):
    ours = jvpreg.estimators.singular_values(lin).value
    bidiagonalize = decomp.bidiag(SIZE)
    for example in range(3):
        theirs = bidiagonalize(product(lin, example), jax.numpy.arange(1.0, SIZE + 1.0))
        assert_close(ours[example], np.linalg.svd(theirs.J_small, compute_uv=False), 1e-12)


def test_trace(lin):
    ours = jvpreg.estimators.trace(lin, num_matvecs=2 * SIZE).value
    # Probes that are orthogonal and as many as dimensions make Hutchinson's estimate exact.
    estimate = stochtrace.estimator_monte_carlo(
        stochtrace.monte_carlo_trace(), lambda key: SIZE**0.5 * jax.numpy.eye(SIZE)
    )
    theirs = [estimate(product(lin, example), jax.random.key(0)).mean() for example in range(3)]
    assert_close(ours, np.array(theirs), 1e-12)
