"""The spaces themselves: orthonormal whatever is left of the directions, and the images those of the basis."""

import numpy as np
import pytest
from compare import normal
from keras import ops
from matrices import numbers, orthogonal, with_singular_values

from jvpreg.estimators.krylov import block_krylov, lanczos, orthonormal

BASIS = orthogonal(20, 6, seed=0).T
NEW = normal(3, 20, seed=1)
ROWS = {
    "new": NEW,
    "one of zeros first": np.stack([0 * NEW[0], NEW[1], NEW[2]]),
    "one within the basis first": np.stack([BASIS[0] - BASIS[3], NEW[1], NEW[2]]),
    "all within the basis": BASIS[1:4],
    "all zeros": 0 * NEW,
    "close to the basis": BASIS[:3] + 1e-6 * NEW,
    "of very different lengths": NEW * np.array([[1e-6], [1.0], [1e3]]),
    "one twice": np.stack([NEW[0], NEW[0], NEW[1]]),
}


@pytest.mark.usefixtures("float64")
def test_orthonormal_rows():
    rows, count = np.stack(list(ROWS.values())), len(ROWS)
    basis = np.broadcast_to(BASIS, (count, *BASIS.shape)).copy()
    largest = np.linalg.norm(rows, axis=2).max(axis=1, keepdims=True)
    found = numbers([orthonormal(*map(ops.convert_to_tensor, (rows, 1e-14 * np.maximum(largest, 1), basis)))])[0]
    for b, name in enumerate(ROWS):
        gram = found[b] @ found[b].T
        alive = np.diag(gram) > 0.5
        np.testing.assert_allclose(gram, np.diag(alive.astype(float)), atol=1e-13, err_msg=name)
        np.testing.assert_allclose(found[b] @ BASIS.T, 0, atol=1e-13, err_msg=name)
        # Nothing of the rows is lost.
        every = np.concatenate([BASIS, found[b]])
        scale = np.linalg.norm(rows[b], axis=1, keepdims=True) + 1e-30
        np.testing.assert_allclose((rows[b] - rows[b] @ every.T @ every) / scale, 0, atol=1e-8, err_msg=name)
        expected = {"one of zeros first": 2, "one within the basis first": 2, "all zeros": 0, "all within the basis": 0}
        if name in expected:
            assert alive.sum() == expected[name], name
        elif name != "one twice":
            assert alive.all(), name


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("rank", [20, 2, 0])
def test_a_space_and_its_images(rank):
    matrix = with_singular_values(np.linspace(1, 2, rank), 20, 20)
    matrices, start = ops.convert_to_tensor(matrix @ matrix.T), ops.convert_to_tensor(normal(2, 3, 20))
    basis, images = numbers(block_krylov(lambda rows: (ops.matmul(rows, matrices),), start, 4, (20,)))
    np.testing.assert_allclose(images, basis @ matrix @ matrix.T, atol=1e-12)
    gram = basis @ basis.transpose(0, 2, 1)
    alive = np.diagonal(gram, axis1=1, axis2=2) > 0.5
    np.testing.assert_allclose(gram, alive[:, None] * np.eye(12), atol=1e-13)
    # Three rows of images that span two directions make a third of rounding, once.
    assert alive.sum(axis=1).tolist() == [{20: 12, 2: 6, 0: 3}[rank]] * 2


@pytest.mark.usefixtures("float64")
def test_tridiagonal_matrices():
    """They have the moments of the matrix, and the whole of its spectrum after all steps."""
    matrix = with_singular_values(np.linspace(1, 2, 6), 6, 6)
    matrix = matrix @ matrix.T
    start = normal(3, 2, 6)
    start = start / np.linalg.norm(start, axis=-1, keepdims=True)
    tensor = ops.convert_to_tensor(matrix)
    alphas, betas = numbers(lanczos(lambda v: ops.matmul(v, tensor), ops.convert_to_tensor(start), 6))
    for p in range(3):
        for b in range(2):
            beside = betas[:-1, p, b]
            tridiagonal = np.diag(alphas[:, p, b]) + np.diag(beside, 1) + np.diag(beside, -1)
            np.testing.assert_allclose(np.linalg.eigvalsh(tridiagonal), np.linalg.eigvalsh(matrix), atol=1e-12)
            for power in range(8):
                moment = start[p, b] @ np.linalg.matrix_power(matrix, power) @ start[p, b]
                received = np.linalg.matrix_power(tridiagonal, power)[0, 0]
                np.testing.assert_allclose(received, moment, rtol=1e-10)
