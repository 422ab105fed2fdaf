"""Krylov spaces of a batch of operators: one product in each step, for all examples and all vectors at once.

Vectors are the rows of `(B, k, n)`. A basis is orthonormal, except for rows of zeros: these stand for directions
that the space does not have, because it is invariant already.
"""

from collections.abc import Callable, Sequence

import keras
import numpy as np
from keras import ops

from jvpreg.common.typing import DType, Tensor


def probed(product: Callable) -> Callable:
    """A product of `(P, B, n)` as a product of rows `(B, P, n)`."""
    return lambda rows: ops.transpose(product(ops.transpose(rows, (1, 0, 2))), (1, 0, 2))


def block_krylov(apply: Callable, start: Tensor, num_iterations: int, sizes: Sequence[int]) -> tuple:
    """An orthonormal basis of the space that `start` and its images span, and the images of the basis.

    Args:
        apply: maps rows `(B, k, n)` to a tuple of images `(B, k, sizes[i])`; the last image spans the next step.
        start: `(B, k, n)`, k independent rows.
        num_iterations: q.
        sizes: of the images.

    Returns:
        The basis `(B, q·k, n)` and, for each of the images, `(B, q·k, sizes[i])`.
    """
    batch, width, size = ops.shape(start)
    dtype = start.dtype
    block = orthonormal(start, floor=ops.zeros((batch, 1), dtype))
    basis = ops.zeros((batch, num_iterations * width, size), dtype)
    images = [ops.zeros((batch, num_iterations * width, image_size), dtype) for image_size in sizes]

    def step(j: Tensor, state: tuple) -> tuple:
        block, largest, basis, *images = state
        applied = apply(block)
        at = (0, j * width, 0)
        basis = ops.slice_update(basis, at, block)
        images = [ops.slice_update(stored, at, new) for stored, new in zip(images, applied, strict=True)]
        largest = ops.maximum(largest, ops.max(ops.norm(applied[-1], axis=-1), axis=-1, keepdims=True))
        block = orthonormal(applied[-1], floor=precision(dtype) * largest, basis=basis)
        return block, largest, basis, *images

    state = ops.fori_loop(0, num_iterations, step, (block, ops.zeros((batch, 1), dtype), basis, *images))
    return tuple(state[2:])


def orthonormal(rows: Tensor, floor: Tensor, basis: Tensor | None = None) -> Tensor:
    """Orthonormal rows `(B, k, n)` that span the same space, without that of `basis`.

    A row of which no more than `floor` (B, 1) is left becomes zero. If rows depend on each other, one of them becomes
    an arbitrary direction.
    """
    for shortest in (floor, 0.5):  # Twice is enough (Kahan, Parlett).
        if basis is not None:
            rows = without(rows, basis)
        # The second time a row has length 1, unless only rounding was left of it.
        alive = ops.norm(rows, axis=-1) > shortest
        # Zeros go last. Before other rows, QR makes a zero an arbitrary direction, perhaps one of the basis.
        order = ops.expand_dims(ops.argsort(ops.where(alive, 0, 1), axis=-1), -1)
        alive = ops.take_along_axis(ops.expand_dims(alive, -1), order, axis=1)
        rows = ops.where(alive, ops.take_along_axis(rows, order, axis=1), 0.0)
        columns, _ = ops.qr(ops.transpose(rows, (0, 2, 1)))
        rows = ops.where(alive, ops.transpose(columns, (0, 2, 1)), 0.0)
    return rows


def without(rows: Tensor, basis: Tensor) -> Tensor:
    """Rows `(…, k, n)` without their part in the space of an orthonormal basis, `(…, m, n)`."""
    # What is left may be small: a second time removes what cancellation has left in it.
    for _ in range(2):
        rows = rows - ops.matmul(ops.matmul(rows, ops.swapaxes(basis, -1, -2)), basis)
    return rows


def lanczos(product: Callable, start: Tensor, num_iterations: int) -> tuple:
    """The tridiagonal matrices of a symmetric operator, from each of many starting vectors.

    Args:
        product: `(P, B, n)` to `(P, B, n)`, symmetric.
        start: unit vectors `(P, B, n)`.
        num_iterations: m.

    Returns:
        The diagonals and the entries beside them, each `(m, P, B)`; the last entry beside is not part of the matrix.
    """
    probes, batch, size = ops.shape(start)
    dtype = start.dtype
    basis = ops.zeros((probes, batch, num_iterations, size), dtype)
    alphas = betas = ops.zeros((num_iterations, probes, batch), dtype)

    def step(j: Tensor, state: tuple) -> tuple:
        vector, largest, basis, alphas, betas = state
        basis = _with_row(basis, j, vector)
        image = product(vector)
        alpha = ops.sum(vector * image, axis=-1)
        largest = ops.maximum(largest, ops.norm(image, axis=-1))
        # Against all of them, not only the last two: otherwise values that have converged appear again as ghosts.
        beta, vector = _unit_without(image, basis, largest)
        alphas = ops.slice_update(alphas, (j, 0, 0), ops.expand_dims(alpha, 0))
        betas = ops.slice_update(betas, (j, 0, 0), ops.expand_dims(beta, 0))
        return vector, largest, basis, alphas, betas

    state = (start, ops.zeros((probes, batch), dtype), basis, alphas, betas)
    return tuple(ops.fori_loop(0, num_iterations, step, state)[3:])


def bidiagonal(forward: Callable, backward: Callable, start: Tensor, num_iterations: int, size: int) -> tuple:
    """The bidiagonal matrices of an operator `A`, from each of many starting vectors, by Golub and Kahan.

    With a basis V of `n` and one U of `m` dimensions, `A V = U B`. So the singular values of B are those of `A` within
    the space, and the small ones keep the digits that a matrix of `AᵀA` would lose.

    Args:
        forward: `A v`, `(P, B, n)` to `(P, B, m)`.
        backward: `Aᵀ u`, `(P, B, m)` to `(P, B, n)`.
        start: unit vectors `(P, B, n)`.
        num_iterations: of products with both.
        size: m.

    Returns:
        The diagonals of B and the entries above them, each `(num_iterations, P, B)`; the last entry above is not part
        of the matrix. If the space has become invariant, the first entry stands for those that it does not have.
    """
    dtype = start.dtype
    probes, batch, columns = ops.shape(start)
    rights = ops.zeros((probes, batch, num_iterations, columns), dtype)
    lefts = ops.zeros((probes, batch, num_iterations, size), dtype)
    alphas = betas = ops.zeros((num_iterations, probes, batch), dtype)

    def step(j: Tensor, state: tuple) -> tuple:
        right, largest, rights, lefts, alphas, betas = state
        rights = _with_row(rights, j, right)
        image = forward(right)
        largest = ops.maximum(largest, ops.norm(image, axis=-1))
        alpha, left = _unit_without(image, lefts, largest)
        lefts = _with_row(lefts, j, left)
        beta, following = _unit_without(backward(left), rights, largest)
        missing = ops.sum(ops.square(right), axis=-1) < 0.5
        alphas = ops.slice_update(alphas, (j, 0, 0), ops.expand_dims(ops.where(missing, alphas[0], alpha), 0))
        betas = ops.slice_update(betas, (j, 0, 0), ops.expand_dims(beta, 0))
        return following, largest, rights, lefts, alphas, betas

    state = (start, ops.zeros((probes, batch), dtype), rights, lefts, alphas, betas)
    return tuple(ops.fori_loop(0, num_iterations, step, state)[4:])


def _with_row(basis: Tensor, j: Tensor, vector: Tensor) -> Tensor:
    """A basis `(P, B, m, n)` with `vector` (P, B, n) as its j-th row."""
    return ops.slice_update(basis, (0, 0, j, 0), ops.expand_dims(vector, 2))


def _unit_without(vector: Tensor, basis: Tensor, largest: Tensor) -> tuple:
    """The length of a vector `(P, B, n)` without its part in a space, and its direction; zeros for rounding alone."""
    vector = without(ops.expand_dims(vector, 2), basis)[:, :, 0]
    length = ops.norm(vector, axis=-1)
    alive = length > precision(vector.dtype) * largest
    length = ops.where(alive, length, 0.0)
    divisor = ops.expand_dims(ops.where(alive, length, 1.0), -1)
    return length, ops.where(ops.expand_dims(alive, -1), vector / divisor, 0.0)


def precision(dtype: DType) -> float:
    """The relative length below which a remainder of a vector is only rounding."""
    return 10 * float(np.finfo(keras.backend.standardize_dtype(dtype)).eps)
