"""Sums over the spectrum and its density, against the whole spectrum."""

import numpy as np
import pytest
from compare import normal
from keras import ops
from matrices import assert_mean, estimated, numbers, operator, with_eigenvalues, with_singular_values

from jvpreg.estimators import (
    Operator,
    SpectralDensity,
    effective_rank,
    inverse_frobenius_norm,
    log_determinant,
    schatten_norm,
    spectral_density,
)

SIZE = 40
SMALL = {"num_probes": 4, "num_iterations": 8}  # 32 dimensions at most are materialized
MATRICES = {
    "random": normal(SIZE, SIZE) / 4,
    "decaying": with_singular_values(0.8 ** np.arange(SIZE), SIZE, SIZE),
    "well conditioned": with_singular_values(np.linspace(1, 3, SIZE), SIZE, SIZE),
}
POSITIVE = {
    "decaying": with_eigenvalues(2 * 0.8 ** np.arange(SIZE), SIZE),
    "well conditioned": with_eigenvalues(np.linspace(1, 3, SIZE), SIZE),
}


def log_determinant_of(matrix, of):
    matrix = matrix @ matrix.T if of == "JJT" else matrix
    return np.linalg.slogdet(np.eye(len(matrix)) + matrix)[1]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (4, 6), (6, 4), (6, 6)])
def test_small_ones_are_exact(shape):
    matrices = normal(3, *shape)
    matrices[1] = 0
    found = estimated(log_determinant, matrices)
    np.testing.assert_allclose(found.value, [log_determinant_of(m, "JJT") for m in matrices], atol=1e-12)
    assert found.num_matvecs == min(shape)
    if shape[0] == shape[1]:
        found = estimated(log_determinant, matrices, of="J")
        np.testing.assert_allclose(found.value, [log_determinant_of(m, "J") for m in matrices], atol=1e-12)
        found = estimated(inverse_frobenius_norm, matrices)
        inverse = [np.linalg.norm(np.linalg.inv(m)) for m in matrices[[0, 2]]]
        np.testing.assert_allclose(found.value[[0, 2]], inverse, rtol=1e-10)
        assert found.value[1] == np.inf
    assert not found.sem.any()
    assert not found.residual.any()
    assert found.converged.all()
    found = estimated(schatten_norm, matrices, order=3)
    values = np.linalg.svd(matrices, compute_uv=False)
    np.testing.assert_allclose(found.value, np.sum(values**3, axis=1) ** (1 / 3), rtol=1e-10)
    for shift, of in [(0, "JJT"), (3, "JJT"), *([(0, "J"), (3, "J")] if shape[0] == shape[1] else [])]:
        found = estimated(log_determinant, matrices[[0, 2]], of, shift=shift)
        if of == "J":
            expected = np.linalg.slogdet(matrices[[0, 2]] + shift * np.eye(shape[0]))[1]
        else:
            expected = np.sum(np.log(shift + values[[0, 2]] ** 2), axis=1)
        np.testing.assert_allclose(found.value, expected, atol=1e-10)


@pytest.mark.parametrize("name", MATRICES)
def test_mean_and_standard_error_over_seeds(name):
    matrix = MATRICES[name]
    found = estimated(log_determinant, matrix.astype("float32"), **SMALL, batch_size=1000)
    assert_mean(found.value, log_determinant_of(matrix, "JJT"), found.sem)
    assert found.num_matvecs == 1 + 2 * 4 * 8
    assert found.converged.all()


@pytest.mark.parametrize("name", POSITIVE)
def test_mean_and_standard_error_of_a_symmetric_one(name):
    matrix = POSITIVE[name]
    found = estimated(log_determinant, matrix.astype("float32"), "J", **SMALL, batch_size=1000)
    assert_mean(found.value, log_determinant_of(matrix, "J"), found.sem)
    assert found.converged.all()


def test_the_inverse_over_seeds():
    matrix = MATRICES["well conditioned"]
    found = estimated(inverse_frobenius_norm, matrix.astype("float32"), **SMALL, batch_size=1000)
    # The square is the mean that is estimated without bias; its root is off by a part of the variance.
    assert_mean(
        found.value.astype("float64") ** 2, np.linalg.norm(np.linalg.inv(matrix)) ** 2, 2 * found.value * found.sem
    )
    assert found.converged.mean() > 0.9


def test_small_singular_values_keep_their_digits():
    """A matrix of `JᵀJ` in float32 would have 1e-8 where rounding leaves 1e-7."""
    matrix = with_singular_values([*np.linspace(1, 2, SIZE - 5), *[1e-4] * 5], SIZE, SIZE)
    found = estimated(inverse_frobenius_norm, matrix.astype("float32"), num_probes=2, num_iterations=12, batch_size=500)
    assert_mean(found.value.astype("float64") ** 2, np.linalg.norm(np.linalg.inv(matrix)) ** 2)


@pytest.mark.parametrize(("order", "of"), [(1, None), (3, None), (0, "JJT"), (0, "J")])
def test_other_sums_over_seeds(order, of):
    matrix, values = MATRICES["well conditioned"].astype("float32"), np.linspace(1, 3, SIZE)
    if of is None:
        found = estimated(schatten_norm, matrix, order, **SMALL, batch_size=1000)
        powers, expected = found.value.astype("float64") ** order, np.sum(values**order)
        assert_mean(powers, expected, order * powers / found.value * found.sem)
    else:
        found = estimated(log_determinant, matrix, of, **SMALL, shift=0, batch_size=1000)
        assert_mean(found.value, (2 if of == "JJT" else 1) * np.sum(np.log(values)), found.sem)


def test_the_effective_rank_over_seeds():
    matrix = MATRICES["well conditioned"]
    values = np.linspace(1, 3, SIZE)
    part = values / values.sum()
    found = estimated(effective_rank, matrix.astype("float32"), **SMALL, batch_size=1000)
    assert_mean(found.value.astype("float64"), np.exp(-np.sum(part * np.log(part))), found.sem)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("estimator", [log_determinant, inverse_frobenius_norm, effective_rank])
def test_from_every_direction_of_a_basis_nothing_is_left_to_chance(monkeypatch, estimator):
    """With the canonical basis instead of random vectors, and enough steps, the estimate is the exact sum."""
    matrix = MATRICES["well conditioned"]
    basis = np.sqrt(SIZE) * np.eye(SIZE)[:, None]
    draw = Operator.draw
    monkeypatch.setattr(
        Operator,
        "draw",
        lambda self, kind, count, seed: ops.convert_to_tensor(basis) if count == 2 else draw(self, kind, count, seed),
    )
    found = estimated(estimator, matrix, num_probes=2, num_iterations=19)
    exact = estimated(estimator, matrix)
    assert exact.num_matvecs == SIZE
    np.testing.assert_allclose(found.value, exact.value, rtol=1e-8)


@pytest.mark.usefixtures("float64")
def test_a_jacobian_that_is_not_symmetric_does_not_converge():
    matrices = np.stack([np.eye(SIZE) + 0.5 * normal(SIZE, SIZE) / SIZE**0.5, np.eye(SIZE)])
    found = estimated(log_determinant, matrices, "J", **SMALL)
    assert found.converged.tolist() == [False, True]
    assert found.residual[0] > 0.1 * found.value[0]


@pytest.mark.usefixtures("float64")
def test_the_residual_says_where_more_steps_are_needed():
    """The inverse of a nearly singular matrix: 8 steps are too few for a spectrum of 12 orders of magnitude."""
    matrices = np.stack([with_singular_values(np.geomspace(1e-6, 1, SIZE), SIZE, SIZE), MATRICES["well conditioned"]])
    found = estimated(inverse_frobenius_norm, matrices, **SMALL)
    assert not found.converged[0]
    assert found.residual[0] > 0.05 * found.value[0]
    assert found.residual[1] < 0.02 * found.value[1]


@pytest.mark.parametrize("scale", [1e-20, 1e-6, 1e6, 1e20])
@pytest.mark.parametrize("options", [{}, SMALL], ids=["materialized", "quadrature"])
def test_of_any_size_in_float32(scale, options):
    matrix = MATRICES["well conditioned"]
    for estimator, power in ((inverse_frobenius_norm, -1), (effective_rank, 0)):
        unit, scaled = (estimated(estimator, (s * matrix).astype("float32"), **options) for s in (1, scale))
        np.testing.assert_allclose(scaled.value, scale**power * unit.value, rtol=2e-3)
        assert np.all(scaled.sem <= 1.01 * scale**power * unit.sem + 1e-30)


def density_of(matrices, batch_size=None, **kwargs):
    def density(of_matrices):
        return (*spectral_density(of_matrices, **kwargs), None)

    return SpectralDensity(*estimated(density, matrices, batch_size=batch_size)[:4])


@pytest.mark.parametrize("options", [{}, SMALL], ids=["materialized", "quadrature"])
def test_the_density_is_one(options):
    matrices = np.stack([MATRICES["random"], 1e6 * MATRICES["decaying"], np.zeros((SIZE, SIZE)), 1e-20 * np.eye(SIZE)])
    for given in (matrices, matrices[:, :35], matrices[:, :, :35]):
        found = density_of(given.astype("float32"), **options, num_points=64)
        np.testing.assert_allclose(np.trapezoid(found.value, found.points), 1, rtol=1e-3)
        assert np.all(found.value >= 0)
        largest = np.linalg.norm(given, 2, axis=(1, 2))
        np.testing.assert_allclose(found.points[[0, 1, 3], -1], 1.1 * largest[[0, 1, 3]], rtol=0.05)
        if not options:
            assert not found.sem.any()


@pytest.mark.parametrize("options", [{"num_probes": 2, "num_iterations": 50}, {"num_probes": 3, "num_iterations": 30}])
def test_the_density_matches_a_histogram(options):
    """Of a matrix of 100 dimensions, materialized and by quadrature, in ten bins; the mean of 20 seeds."""
    matrix = normal(120, 100, seed=3)
    exact = np.linalg.svd(matrix, compute_uv=False)
    found = density_of(matrix.astype("float32"), **options, num_points=100, width=0.01, batch_size=20)
    edges = np.linspace(0, 1.1 * exact[0], 11)
    bins = np.histogram(exact, edges)[0] / len(exact)
    received = []
    for points, value in zip(found.points, found.value, strict=True):
        cumulated = np.concatenate([[0], np.cumsum((value[1:] + value[:-1]) / 2 * np.diff(points))])
        received.append(np.diff(np.interp(edges, points, cumulated)))
    np.testing.assert_allclose(np.mean(received, axis=0), bins, atol=0.05 if options["num_probes"] == 3 else 0.02)
    assert bins.max() > 0.1


@pytest.mark.usefixtures("float64")
def test_the_standard_error_of_the_density():
    matrix = MATRICES["random"]
    exact = density_of(matrix, num_points=12, width=0.1)
    many = numbers(spectral_density(operator(matrix, 400), num_points=12, width=0.1, **SMALL))
    # The points of each example end at the largest value that was found for it, so compare that end.
    np.testing.assert_allclose(many[0][:, -1], exact.points[0, -1], rtol=0.05)
    spread = many[1].std(axis=0)
    middle = slice(2, 9)
    np.testing.assert_allclose(np.sqrt(np.mean(many[2] ** 2, axis=0))[middle], spread[middle], rtol=0.25)
    np.testing.assert_allclose(many[1].mean(axis=0)[middle], exact.value[0][middle], rtol=0.1)


@pytest.mark.parametrize("estimator", [log_determinant, inverse_frobenius_norm, effective_rank, spectral_density])
@pytest.mark.parametrize("argument", ["num_probes", "num_iterations"])
def test_bad_numbers(estimator, argument):
    for value in (1, 0, 2.5):
        with pytest.raises(
            ValueError, match=rf"`{argument}`. Expected an integer, 2 or more. Received: {argument}={value}"
        ):
            estimator(operator(np.eye(3)), **{argument: value})


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"`of`. Expected \"JJT\" or \"J\". Received: of='JTJ'"):
        log_determinant(operator(np.eye(3)), of="JTJ")
    with pytest.raises(ValueError, match=r"`width`. Expected a finite number above 0. Received: width=0"):
        spectral_density(operator(np.eye(3)), width=0)
    with pytest.raises(ValueError, match=r"`num_points`. Expected an integer, 2 or more. Received: num_points=1"):
        spectral_density(operator(np.eye(3)), num_points=1)
    with pytest.raises(ValueError, match=r"`log_determinant\(of=\"J\"\)` is defined for a square.*Received: 3 outputs"):
        log_determinant(operator(normal(3, 4)), of="J")
    with pytest.raises(ValueError, match=r"`inverse_frobenius_norm` is defined for a square.*Received: 3 outputs"):
        inverse_frobenius_norm(operator(normal(3, 4)))
