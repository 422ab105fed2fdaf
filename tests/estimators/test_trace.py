"""The trace by three methods: unbiased, with the variance that theory has, and the better ones better."""

import numpy as np
import pytest
from compare import normal
from keras import ops
from matrices import assert_mean, estimated, operator, with_eigenvalues

from jvpreg.estimators import Operator, trace

METHODS = ["hutchinson", "hutch++", "xtrace"]
SIZE = 30
MATRICES = {
    "decaying": with_eigenvalues(0.7 ** np.arange(SIZE), SIZE),
    "flat": normal(SIZE, SIZE),
    "far from normal": np.triu(normal(SIZE, SIZE, seed=1)),
    "slowly decaying": with_eigenvalues(1 / np.arange(1, SIZE + 1), SIZE),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MATRICES)
def test_mean_and_standard_error_over_seeds(name, method):
    matrix = MATRICES[name]
    found = estimated(trace, matrix.astype("float32"), 12, method, batch_size=1000)
    # XTrace's samples share their products: see its docstring.
    between = (0.6, 1.1) if method == "xtrace" else (0.9, 1.1)
    assert_mean(found.value.astype("float64"), np.trace(matrix), found.sem, between)
    assert found.num_matvecs == 12
    assert found.converged is None


@pytest.mark.parametrize("name", MATRICES)
def test_the_variance_of_hutchinson(name):
    symmetric = (MATRICES[name] + MATRICES[name].T) / 2
    found = estimated(trace, MATRICES[name].astype("float32"), 4, "hutchinson", batch_size=4000)
    expected = 2 * (np.sum(symmetric**2) - np.sum(np.diag(symmetric) ** 2)) / 4
    np.testing.assert_allclose(found.value.var(ddof=1), expected, rtol=0.15)


@pytest.mark.usefixtures("float64")
def test_over_all_signs_hutchinson_is_the_trace(monkeypatch):
    matrix = normal(6, 6)
    every = np.array(np.meshgrid(*[[-1.0, 1.0]] * 6)).reshape(6, -1).T
    monkeypatch.setattr(Operator, "draw", lambda *_: ops.convert_to_tensor(every[:, None]))
    found = estimated(trace, matrix, 4, "hutchinson")
    np.testing.assert_allclose(found.value, np.trace(matrix), rtol=1e-13)
    samples = np.einsum("pi,ij,pj->p", every, matrix, every)
    np.testing.assert_allclose(found.sem, samples.std(ddof=1) / 8, rtol=1e-12)


@pytest.mark.parametrize("values", [0.6 ** np.arange(60), np.linspace(1, 2, 60), [2.0, 1.0]], ids=str)
def test_of_a_positive_matrix(values):
    matrix = with_eigenvalues(values, 60)
    found = estimated(trace, matrix.astype("float32"), 24, "xnystrace", batch_size=500)
    assert found.num_matvecs == 24
    if len(values) == 2:  # The rank is used up: the trace is exact.
        np.testing.assert_allclose(found.value, 3, rtol=1e-5)
        return
    assert_mean(found.value.astype("float64"), np.trace(matrix), found.sem, (0.25, 1.1))
    other = estimated(trace, matrix.astype("float32"), 24, "xtrace", batch_size=500)
    assert found.value.std() < 0.8 * other.value.std()


def test_on_a_spectrum_that_decays_the_better_methods_are_better():
    """All methods have the same number of products. The root mean square of 200 errors varies by 5%."""
    matrix = with_eigenvalues(0.6 ** np.arange(60), 60).astype("float32")
    error = {}
    for method in METHODS:
        found = estimated(trace, matrix, 24, method, batch_size=200)
        assert found.num_matvecs == 24
        error[method] = np.sqrt(np.mean((found.value - np.trace(matrix)) ** 2))
    assert error["hutch++"] < error["hutchinson"] / 4
    assert error["xtrace"] < error["hutch++"] / 2


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("num_matvecs", [6, 7, 100])
def test_exact_with_as_many_products_as_dimensions(num_matvecs, method):
    matrices = normal(4, 6, 6)
    found = estimated(trace, matrices, num_matvecs, method)
    np.testing.assert_allclose(found.value, np.trace(matrices, axis1=1, axis2=2), rtol=1e-12, atol=1e-13)
    assert not found.sem.any()
    assert found.num_matvecs == 6


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("method", ["hutch++", "xtrace"])
def test_exact_where_the_rank_is_used_up(method):
    """If the rank is lower than the number of vectors, R is singular. XTrace knows |ω|, so the identity is exact."""
    matrices = np.stack(
        [np.zeros((20, 20)), np.outer(normal(20), normal(20, seed=1)), np.diag([1.0, 2.0] + [0.0] * 18)]
        + ([np.eye(20)] if method == "xtrace" else [])
    )
    found = estimated(trace, matrices, 12, method)
    np.testing.assert_allclose(found.value, np.trace(matrices, axis1=1, axis2=2), atol=1e-12)
    np.testing.assert_allclose(found.sem, 0, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_of_any_size_in_float32(scale, method):
    matrix = MATRICES["decaying"]
    unit, scaled = (estimated(trace, (s * matrix).astype("float32"), 12, method) for s in (1, scale))
    for one, other in zip(unit[:2], scaled[:2], strict=True):
        np.testing.assert_allclose(other, scale * one, rtol=1e-3)
    assert unit.sem > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"method": "hutch"},
            r"`method`. Expected .hutchinson., .hutch\+\+., .xtrace. or .xnystrace.. Received: method='hutch'",
        ),
        ({"num_matvecs": 0}, r"`num_matvecs`. Expected an integer, 1 or more. Received: num_matvecs=0"),
        ({"num_matvecs": 3}, r"`num_matvecs`. Expected an integer, 4 or more. Received: num_matvecs=3"),
        ({"num_matvecs": 5, "method": "hutch++"}, r"`num_matvecs`. Expected an integer, 6 or more. Received: .*=5"),
        ({"num_matvecs": 1, "method": "hutchinson"}, r"`num_matvecs`. Expected an integer, 2 or more. Received: .*=1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        trace(operator(np.eye(9)), **arguments)


def test_only_of_what_is_square():
    with pytest.raises(ValueError, match=r"`trace` is defined for a square Jacobian.*Received: 3 outputs and 4 inputs"):
        trace(operator(normal(3, 4)))
