"""Norms by random probes: exact where they say so, unbiased and with the variance that theory has elsewhere."""

import numpy as np
import pytest
from compare import normal
from keras import ops
from matrices import assert_mean, estimated, operator, with_singular_values

from jvpreg.estimators import Operator, frobenius_norm

SEEDS = 4000
ROWS, COLUMNS = 12, 9
MATRIX = normal(ROWS, COLUMNS) * np.linspace(0.2, 2, COLUMNS)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("side", ["input", "output", None])
@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (6, 1), (6, 4), (4, 6), (5, 5)])
def test_exact_with_the_canonical_basis(shape, side):
    matrices = normal(4, *shape)
    matrices[1], matrices[2] = 0, 1e-6 * matrices[2]
    found = estimated(frobenius_norm, matrices, num_probes=6, side=side)
    np.testing.assert_allclose(found.value, np.linalg.norm(matrices, axis=(1, 2)), rtol=1e-13)
    assert not found.sem.any()
    assert found.num_matvecs == {"input": shape[1], "output": shape[0], None: min(shape)}[side]


@pytest.mark.parametrize("scale", [1e-20, 1e-6, 1e6, 1e18])
@pytest.mark.parametrize("num_probes", [4, 16])
def test_of_any_size_in_float32(num_probes, scale):
    unit, scaled = (
        estimated(frobenius_norm, (s * MATRIX).astype("float32"), num_probes=num_probes) for s in (1, scale)
    )
    for one, other in zip(unit[:2], scaled[:2], strict=True):
        np.testing.assert_allclose(other, scale * one, rtol=1e-5)
    assert unit.value > 0


def variance(kind, matrix):
    """The variance of ‖J u‖² for one probe, from MATHEMATICS.md; for signs it is Hutchinson's formula."""
    gram, size = matrix.T @ matrix, matrix.shape[1]
    squared, norm = np.sum(gram**2), np.trace(gram)
    return {
        "gaussian": 2 * squared,
        "sphere": 2 * size / (size + 2) * (squared - norm**2 / size),
        "rademacher": 2 * (squared - np.sum(np.diag(gram) ** 2)),
    }[kind]


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("kind", ["gaussian", "sphere", "rademacher"])
def test_mean_and_variance_over_seeds(kind, side):
    # Each example has draws of its own, so that a batch is a sample of seeds.
    num_probes = 4
    found = estimated(frobenius_norm, MATRIX.astype("float32"), num_probes, side=side, probes=kind, batch_size=SEEDS)
    squares = found.value.astype("float64") ** 2
    assert_mean(squares, np.sum(MATRIX**2), 2 * found.value * found.sem)
    expected = variance(kind, MATRIX if side == "input" else MATRIX.T) / num_probes
    np.testing.assert_allclose(squares.var(ddof=1), expected, rtol=0.15)
    assert found.num_matvecs == num_probes


def test_the_standard_error_covers():
    matrix = normal(60, 50, seed=4) * np.linspace(0.1, 3, 50)
    found = estimated(frobenius_norm, matrix.astype("float32"), num_probes=16, batch_size=1000)
    error = found.value - np.linalg.norm(matrix)
    np.testing.assert_allclose(np.sqrt(np.mean(found.sem**2)), error.std(), rtol=0.1)
    # Student's t of 15 degrees of freedom: 93.6% lie within two standard errors.
    assert 0.90 < np.mean(np.abs(error) < 2 * found.sem) < 0.97


def test_orthogonal_probes_vary_less_than_they_say():
    found = estimated(frobenius_norm, MATRIX.astype("float32"), 6, probes="orthogonal", batch_size=1000)
    squares = found.value.astype("float64") ** 2
    assert_mean(squares, np.sum(MATRIX**2), 2 * found.value * found.sem, between=(1.2, 3))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("probes", ["every sign", "basis"])
def test_over_all_probes_it_is_the_norm(monkeypatch, probes):
    """If all probes are enumerated instead of drawn, their mean is exact."""
    matrix = normal(7, 5)
    every = np.array(np.meshgrid(*[[-1.0, 1.0]] * 5)).reshape(5, -1).T if probes == "every sign" else 5**0.5 * np.eye(5)
    monkeypatch.setattr(Operator, "draw", lambda *_: ops.convert_to_tensor(every[:, None]))
    found = estimated(frobenius_norm, matrix, num_probes=4, side="input")
    np.testing.assert_allclose(found.value, np.linalg.norm(matrix), rtol=1e-13)
    squares = np.sum((every @ matrix.T) ** 2, axis=1)
    np.testing.assert_allclose(found.sem, squares.std(ddof=1) / np.sqrt(len(every)) / (2 * found.value), rtol=1e-12)


def test_one_seed_draws_one_number():
    matrix = normal(30, 30, seed=5).astype("float32")
    first, again, other = (estimated(frobenius_norm, matrix, 4, seed=seed).value for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert first != other


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("num_probes", 0, r"`num_probes`. Expected an integer, 1 or more. Received: num_probes=0"),
        (
            "num_probes",
            1,
            r"`num_probes`. Expected at least 2: one probe has no standard error. Received: num_probes=1",
        ),
        ("side", "both", r"`side`. Expected \"input\", \"output\" or None. Received: side='both'"),
        ("probes", "cube", r"`probes`. Expected .gaussian., .*Received: probes='cube'"),
    ],
)
def test_bad_arguments(argument, value, message):
    with pytest.raises(ValueError, match=message):
        frobenius_norm(operator(np.eye(3)), **{argument: value})


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e18])
def test_by_nystroem_where_singular_values_decay(scale):
    matrix = scale * with_singular_values(0.7 ** np.arange(40), 50, 40)
    error = {}
    for method in ("hutchinson", "xnystrace"):
        found = estimated(frobenius_norm, matrix.astype("float32"), 24, method=method, batch_size=300)
        assert found.num_matvecs == 24
        error[method] = np.sqrt(np.mean((found.value / np.linalg.norm(matrix) - 1) ** 2))
    assert error["xnystrace"] < error["hutchinson"] / 10
    assert_mean((found.value / scale).astype("float64") ** 2, np.linalg.norm(matrix / scale) ** 2)


def test_the_method_is_one_of_two():
    with pytest.raises(ValueError, match=r"`method`. Expected .hutchinson. or .xnystrace."):
        frobenius_norm(operator(MATRIX), method="xtrace")
    with pytest.raises(ValueError, match=r"`num_probes`. Expected an integer, 4 or more"):
        frobenius_norm(operator(MATRIX), 3, method="xnystrace")
