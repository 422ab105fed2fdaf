"""Matrices with a given spectrum, operators made of them, and estimates as NumPy arrays."""

import keras
import numpy as np
from keras import ops, tree

from jvpreg.estimators import Estimate, Operator


def orthogonal(size, count, seed):
    """`count` orthonormal columns."""
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0][:, :count]


def with_singular_values(values, rows, columns, seed=0):
    left, right = orthogonal(rows, len(values), seed), orthogonal(columns, len(values), seed + 1)
    return (left * np.asarray(values, float)) @ right.T


def with_eigenvalues(values, size, seed=0):
    """A real normal matrix. Give one value of each conjugate pair; the remaining eigenvalues are zero."""
    matrix, i = np.zeros((size, size)), 0
    for value in values:
        if np.iscomplex(value):
            matrix[i : i + 2, i : i + 2] = [[value.real, value.imag], [-value.imag, value.real]]
            i += 2
        else:
            matrix[i, i] = np.real(value)
            i += 1
    basis = orthogonal(size, size, seed)
    return basis @ matrix @ basis.T


def operator(matrices, batch_size=None, transposed=True, **kwargs):
    """The operator of one matrix for each example `(B, m, n)`, or of one `(m, n)` for all examples."""
    matrices = ops.convert_to_tensor(matrices)
    dtype = keras.backend.standardize_dtype(matrices.dtype)
    if len(matrices.shape) == 2:
        equations, batch_size = ("mn,pbn->pbm", "mn,pbm->pbn"), batch_size or 1
    else:
        equations, batch_size = ("bmn,pbn->pbm", "bmn,pbm->pbn"), matrices.shape[0]
    forward, backward = (lambda v, equation=equation: ops.einsum(equation, matrices, v) for equation in equations)
    return Operator(
        forward, backward if transposed else None, tuple(matrices.shape[-2:]), batch_size, dtype=dtype, **kwargs
    )


def estimated(estimator, matrices, *args, batch_size=None, **kwargs):
    """An estimate of matrices as NumPy arrays. On JAX it is compiled, since operations one by one take minutes."""

    def run(matrices):
        return tuple(estimator(operator(matrices, batch_size), *args, **kwargs))

    if keras.backend.backend() == "jax":
        import jax

        run = jax.jit(run)
    return Estimate(*numbers(run(matrices)))


def numbers(structure):
    """A structure of tensors as arrays."""
    return tree.map_structure(
        lambda part: part if part is None else np.asarray(ops.convert_to_numpy(part)), tuple(structure)
    )


def assert_mean(samples, expected, sems=None, between=(0.9, 1.1)):
    """Check that samples have the expected mean, and that reported standard errors are as large as their spread."""
    spread = samples.std(ddof=1)
    assert abs(samples.mean() - expected) < 5 * spread / np.sqrt(len(samples))
    assert spread > 1e-6 * abs(expected)
    if sems is not None:
        assert between[0] < np.sqrt(np.mean(sems**2)) / spread < between[1]
