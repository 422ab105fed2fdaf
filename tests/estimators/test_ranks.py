"""Stable and effective rank, against the whole spectrum."""

import numpy as np
import pytest
from compare import normal
from matrices import assert_mean, estimated, operator, with_singular_values

from jvpreg.estimators import effective_rank, stable_rank

SPECTRA = {
    "flat": np.ones(6),
    "rank one": [3.0, 0, 0, 0, 0, 0],
    "rank two": [2.0, 2.0, 0, 0, 0, 0],
    "decaying": 0.5 ** np.arange(6),
    "zero": np.zeros(6),
}


def effective(values):
    part = values[values > 0] / values.sum() if np.any(values) else np.zeros(0)
    return np.exp(-np.sum(part * np.log(part))) if len(part) else 0.0


def stable(values):
    return np.sum(values**2) / values[0] ** 2 if np.any(values) else 0.0


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("shape", ["tall", "wide"])
@pytest.mark.parametrize(("estimator", "expected"), [(stable_rank, stable), (effective_rank, effective)])
def test_small_ones_are_exact(estimator, expected, shape):
    matrices = np.stack([with_singular_values(values, 8, 6) for values in SPECTRA.values()])
    if shape == "wide":
        matrices = matrices.transpose(0, 2, 1).copy()
    found = estimated(estimator, matrices)
    exact = [expected(np.asarray(values)) for values in SPECTRA.values()]
    np.testing.assert_allclose(found.value, exact, rtol=1e-10, atol=1e-13)
    assert not found.sem.any()
    assert not found.residual.any()
    assert found.converged.all()
    assert found.num_matvecs == 6


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("estimator", [stable_rank, effective_rank])
def test_of_a_zero_jacobian_and_of_a_low_rank_without_its_matrix(estimator):
    matrices = np.stack([np.zeros((60, 50)), with_singular_values([2.0], 60, 50)])
    num_iterations = 10 if estimator is stable_rank else 8
    found = estimated(estimator, matrices, num_probes=4, num_iterations=num_iterations)
    assert np.isfinite(found.sem).all()
    assert np.isfinite(found.residual).all()
    assert found.value[0] == found.sem[0] == 0
    # The matrix has one value only, so the estimate spreads as that of the norm does.
    assert abs(found.value[1] - 1) < 5 * found.sem[1]


@pytest.mark.slow
def test_the_stable_rank_over_seeds():
    values = np.linspace(0.2, 3, 40)
    matrix = with_singular_values(values, 45, 40)
    found = estimated(stable_rank, matrix.astype("float32"), num_probes=8, tolerance=1e-4, batch_size=1000)
    assert_mean(found.value.astype("float64"), stable(values[::-1]), found.sem)
    assert found.converged.all()
    assert found.num_matvecs > 8


@pytest.mark.usefixtures("float64")
def test_the_residual_of_the_largest_value_carries_over():
    values = 0.999 ** np.arange(60)
    matrix = with_singular_values(values, 60, 60)
    found = estimated(
        stable_rank, matrix, num_probes=16, tolerance=1e-12, num_iterations=2, max_restarts=1, batch_size=50
    )
    assert not found.converged.any()
    assert np.all(found.residual > 1e-3 * found.value)
    assert_mean(found.value / found.value.mean(), 1.0)


@pytest.mark.parametrize("scale", [1e-20, 1e-6, 1e6, 1e20])
@pytest.mark.parametrize("size", [10, 60])
def test_of_any_size_in_float32(size, scale):
    matrix = normal(size, size)
    unit, scaled = (estimated(stable_rank, (s * matrix).astype("float32")) for s in (1, scale))
    np.testing.assert_allclose(scaled.value, unit.value, rtol=2e-3)
    np.testing.assert_allclose(scaled.sem, unit.sem, rtol=2e-3)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"`num_probes`. Expected an integer, 2 or more. Received: num_probes=1"):
        stable_rank(operator(np.eye(3)), num_probes=1)
    with pytest.raises(ValueError, match=r"`tolerance`. Expected a finite number above 0. Received: tolerance=-1"):
        stable_rank(operator(normal(30, 30).astype("float32")), tolerance=-1)
