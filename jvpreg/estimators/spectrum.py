"""Singular values by Golub-Kahan-Lanczos bidiagonalization."""

import keras
import numpy as np
from keras import ops, tree

from jvpreg import probes
from jvpreg.estimators.result import Estimate
from jvpreg.linearization import Linearization


def top_singular_value(linearization: Linearization, num_iterations: int = 10, seed=0) -> Estimate:
    """`σ₁` of each example's Jacobian.

    Golub-Kahan-Lanczos with full reorthogonalization, started in the smaller of the two spaces; an iteration costs
    one `jvp` and one `vjp`. With as many iterations as that space has dimensions the value is exact. All examples
    run at once.

    Args:
        linearization: from `jvpreg.linearize`.
        num_iterations: the number of steps; more than the smaller dimension are not run.
        seed: of the starting vector: an integer or a `keras.random.SeedGenerator`.

    Returns:
        An `Estimate`; `value` is a lower bound of `σ₁`, within `residual` of a singular value.

    Raises:
        ValueError: `num_iterations` is less than 1.

    Reference: Balestriero & Baraniuk (2021), algorithm 4; Golub & Kahan (1965).

    Example:

    >>> import keras, numpy as np, jvpreg
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, kernel_initializer="ones")])
    >>> estimate = jvpreg.estimators.top_singular_value(jvpreg.linearize(model, np.zeros((1, 3))))
    >>> round(float(keras.ops.convert_to_numpy(estimate.value)[0]), 4)
    2.4495
    """
    if not isinstance(num_iterations, int) or num_iterations < 1:
        raise ValueError(
            f"Invalid value for argument `num_iterations`. Expected an integer, 1 or more. Received: {num_iterations!r}"
        )
    inputs, outputs = _space(linearization.inputs), linearization.outputs
    input_size, output_size = probes.dimension(inputs), probes.dimension(outputs)

    def push(vectors):
        return _flat(linearization.jvp(_like(inputs, vectors)))

    def pull(vectors):
        return _flat(linearization.vjp(_like(outputs, vectors)))

    # σ(J) = σ(Jᵀ): start where there are fewer dimensions, and no part of the start lies in a large null space.
    small, matvec, rmatvec = (outputs, pull, push) if output_size <= input_size else (inputs, push, pull)
    num_iterations = min(num_iterations, input_size, output_size)
    start = _flat(probes.draw("gaussian", small, 1, seed))
    alphas, betas = _bidiagonalize(matvec, rmatvec, start, num_iterations, max(input_size, output_size))
    # Rows of the upper bidiagonal matrix: α_j on the diagonal, β_j right of it.
    diagonal = ops.expand_dims(ops.transpose(alphas), -1) * ops.eye(num_iterations, dtype=alphas.dtype)
    above = ops.expand_dims(ops.transpose(betas), -1) * ops.eye(num_iterations, k=1, dtype=betas.dtype)
    left, values, _ = ops.svd(diagonal + above)
    residual = betas[-1] * ops.abs(left[:, -1, 0])
    return Estimate(values[:, 0], ops.zeros_like(residual), residual, 2 * num_iterations)


def _bidiagonalize(matvec, rmatvec, start, num_iterations: int, large: int):
    """The diagonal `(m, B)` and superdiagonal `(m, B)` of A's bidiagonal form, from `start` `(B, n)`."""
    batch, small = ops.shape(start)
    precision = 10 * float(np.finfo(keras.backend.standardize_dtype(start.dtype)).eps)
    vector, _ = _normalized(start, ops.zeros_like(start[:, :1]))
    rights = ops.slice_update(
        ops.zeros((num_iterations + 1, batch, small), start.dtype), (0, 0, 0), ops.expand_dims(vector, 0)
    )
    lefts = ops.zeros((num_iterations, batch, large), start.dtype)
    alphas = betas = ops.zeros((num_iterations, batch), start.dtype)

    def step(j, state):
        vector, rights, lefts, alphas, betas, largest = state
        left = _orthogonalize(matvec(vector), lefts)
        left, alpha = _normalized(left, precision * largest)
        largest = ops.maximum(largest, alpha)
        vector = _orthogonalize(rmatvec(left), rights)
        vector, beta = _normalized(vector, precision * largest)
        lefts = ops.slice_update(lefts, (j, 0, 0), ops.expand_dims(left, 0))
        rights = ops.slice_update(rights, (j + 1, 0, 0), ops.expand_dims(vector, 0))
        alphas = ops.slice_update(alphas, (j, 0), ops.transpose(alpha))
        betas = ops.slice_update(betas, (j, 0), ops.transpose(beta))
        return vector, rights, lefts, alphas, betas, largest

    state = (vector, rights, lefts, alphas, betas, ops.zeros_like(start[:, :1]))
    _, _, _, alphas, betas, _ = ops.fori_loop(0, num_iterations, step, state)
    return alphas, betas


def _orthogonalize(vector, basis):
    """`vector` (B, n) without its part in the span of `basis` (m, B, n), unused rows of which are zero."""
    for _ in range(2):  # Twice is enough (Kahan, Parlett).
        coefficients = ops.einsum("jbn,bn->jb", basis, vector)
        vector = vector - ops.einsum("jb,jbn->bn", coefficients, basis)
    return vector


def _normalized(vector, floor):
    """The unit vector and its length `(B, 1)`; both zero where the length is not above `floor` (breakdown)."""
    length = ops.norm(vector, axis=-1, keepdims=True)
    alive = length > floor
    return ops.where(alive, vector / ops.where(alive, length, 1.0), 0.0), ops.where(alive, length, 0.0)


def _space(inputs):
    return inputs[0] if len(inputs) == 1 else inputs


def _flat(structure):
    """(1, B, …) leaves to one (B, n)."""
    leaves = [ops.reshape(leaf[0], (ops.shape(leaf)[1], -1)) for leaf in tree.flatten(structure)]
    return leaves[0] if len(leaves) == 1 else ops.concatenate(leaves, axis=-1)


def _like(structure, vectors):
    """(B, n) to leaves (1, B, …)."""
    return probes.split(ops.expand_dims(vectors, 0), structure)
