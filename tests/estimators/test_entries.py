"""The diagonal and the norms of rows: exact where they say so, with the variance that theory has elsewhere."""

import numpy as np
import pytest
from compare import normal
from matrices import assert_mean, estimated, operator

from jvpreg.estimators import diagonal, row_norms


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (6, 1), (6, 9), (9, 6), (6, 6)])
def test_exact_with_the_canonical_basis(shape):
    matrices = normal(4, *shape)
    matrices[1], matrices[2] = 0, 1e-6 * matrices[2]
    found = estimated(row_norms, matrices, num_probes=6)
    np.testing.assert_allclose(found.value, np.linalg.norm(matrices, axis=2), rtol=1e-13)
    assert not found.sem.any()
    assert found.num_matvecs == (shape[1] if shape[1] <= 6 else shape[0])
    if shape[0] == shape[1]:
        found = estimated(diagonal, matrices, num_matvecs=6)
        np.testing.assert_allclose(found.value, np.diagonal(matrices, axis1=1, axis2=2), rtol=1e-13)
        assert not found.sem.any()


def test_mean_and_variance_over_seeds():
    matrix = normal(12, 12) * np.linspace(0.2, 2, 12)
    found = estimated(diagonal, matrix.astype("float32"), 4, batch_size=4000)
    for i in range(12):
        assert_mean(found.value[:, i], matrix[i, i], found.sem[:, i])
    others = np.sum(matrix**2, axis=1) - np.diag(matrix) ** 2
    np.testing.assert_allclose(found.value.var(axis=0, ddof=1), others / 4, rtol=0.15)
    found = estimated(row_norms, matrix.astype("float32"), 4, batch_size=4000)
    squares = found.value.astype("float64") ** 2
    for i in range(12):
        assert_mean(squares[:, i], np.sum(matrix[i] ** 2), 2 * found.value[:, i] * found.sem[:, i])
    np.testing.assert_allclose(squares.var(axis=0, ddof=1), 2 * np.sum(matrix**2, axis=1) ** 2 / 4, rtol=0.2)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"`diagonal` is defined for a square Jacobian"):
        diagonal(operator(normal(3, 4)))
    with pytest.raises(ValueError, match=r"`num_probes`. Expected at least 2"):
        row_norms(operator(normal(3, 4)), 1)
