"""Singular values and eigenvalues by block Krylov spaces and Rayleigh-Ritz."""

from typing import NamedTuple

import keras
import numpy as np
from keras import ops, tree

from jvpreg import probes
from jvpreg.common import checks
from jvpreg.common.typing import Seed, Tensor
from jvpreg.estimators.krylov import block_krylov, orthonormal, precision, probed, without
from jvpreg.estimators.operator import Operator, as_operator, by_example, magnitude, spaces
from jvpreg.estimators.result import Estimate
from jvpreg.linearization import Linearization


class RitzValues(NamedTuple):
    """Singular triplets of an upright operator within a subspace, the largest first, and how good they are.

    Attributes:
        values: σ, `(B, k)`.
        inputs: v, `(B, k, n)`.
        images: A v, `(B, k, m)`.
        gram_residual: `‖AᵀA v − σ² v‖`, `(B, k)`.
    """

    values: Tensor
    inputs: Tensor
    images: Tensor
    gram_residual: Tensor

    @property
    def residual(self) -> Tensor:
        """A bound: there is a singular value at most this far from σ."""
        # σ² is within ρ of an eigenvalue λ of AᵀA, and |σ − √λ| = |σ² − λ| / (σ + √λ), which is at most √ρ too.
        root = ops.sqrt(self.gram_residual)
        positive = self.values > 0
        return ops.where(positive, ops.minimum(root, self.gram_residual / ops.where(positive, self.values, 1.0)), root)


@by_example
def top_singular_values(
    linearization: Linearization | Operator,
    k: int = 1,
    tolerance: float = 1e-3,
    num_iterations: int = 10,
    max_restarts: int = 10,
    seed: Seed = 0,
) -> Estimate:
    """The k largest singular values of each example's Jacobian, with their vectors.

    A block of k random vectors spans a Krylov space of `JᵀJ` (of `J Jᵀ`, if there are fewer outputs than inputs). It
    takes the products `J v` and `Jᵀ u` of Balestriero & Baraniuk's algorithm 4, and keeps all of them. Rayleigh-Ritz
    gives the best approximations within that space, after each step. If the memory is full, the best half of the space
    is kept, and it grows on from there. A block of k finds a value that is repeated up to k times. All examples run at
    once, until all of them have converged.
    If the smaller side has no more than `2·k·num_iterations` dimensions, the Jacobian is materialized instead, which
    costs no more and is exact.

    Args:
        linearization: from `jvpreg.linearize`, or an `Operator`.
        k: how many singular values.
        tolerance: relative to σ₁: a value has converged if its residual is at most `tolerance·σ₁`.
        num_iterations: steps until the memory is full: it holds `k·num_iterations` vectors of both sides. A step is
            `2·k` products.
        max_restarts: it gives up after `num_iterations·(max_restarts + 1)` steps.
        seed: of the starting vectors: an integer or a `keras.random.SeedGenerator`.

    Returns:
        An `Estimate`, each part `(B, k)`. `value` is a lower bound of each, the largest first; there is a singular
        value at most `residual` from it, and the error itself is of the order of its square. `vectors` are the left
        singular vectors, `(k, B, …)` like the outputs, and the right ones, like the inputs; those of a zero value are
        arbitrary.

    Raises:
        ValueError: an argument is out of its range.

    Reference: Golub & Kahan (1965); Wu & Simon (2000), "Thick-restart Lanczos method for large symmetric eigenvalue
    problems"; Musco & Musco (2015), "Randomized block Krylov methods"; Balestriero & Baraniuk (2021), algorithm 4.

    Example:

    >>> import keras, numpy as np, jvpreg
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, kernel_initializer="ones")])
    >>> estimate = jvpreg.estimators.top_singular_values(jvpreg.linearize(model, np.zeros((1, 3))), k=2)
    >>> [round(float(value), 4) for value in keras.ops.convert_to_numpy(estimate.value)[0]]
    [2.4495, 0.0]
    """
    operator = as_operator(linearization)
    ritz, unit, converged, num_matvecs = _triplets(operator, k, tolerance, num_iterations, max_restarts, seed)
    # Not the left vectors of the SVD: for repeated values, rounding may pair them with other right vectors.
    right, left = _completed(ritz.inputs, ritz.images)
    if operator.upright is not operator:
        right, left = left, right
    vectors = tuple(ops.transpose(rows, (1, 0, 2)) for rows in (left, right))
    if isinstance(linearization, Linearization):
        inputs, outputs = spaces(linearization)
        right_vectors = linearization.pack_inputs(tree.flatten(probes.split(vectors[1], inputs)))
        vectors = probes.split(vectors[0], outputs), right_vectors
    value, residual = unit * ritz.values, unit * ritz.residual
    return Estimate(value, ops.zeros_like(value), residual, converged, num_matvecs, vectors)


@by_example
def spectral_norm(
    linearization: Linearization | Operator,
    tolerance: float = 1e-3,
    num_iterations: int = 10,
    max_restarts: int = 10,
    seed: Seed = 0,
) -> Estimate:
    """`σ₁` of each example's Jacobian: `top_singular_values` with `k=1`, each part `(B,)`.

    Args:
        linearization: from `jvpreg.linearize`, or an `Operator`.
        tolerance: as in `top_singular_values`.
        num_iterations: as in `top_singular_values`.
        max_restarts: as in `top_singular_values`.
        seed: as in `top_singular_values`.

    Returns:
        An `Estimate` without vectors.

    Example:

    >>> import keras, numpy as np, jvpreg
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, kernel_initializer="ones")])
    >>> estimate = jvpreg.estimators.spectral_norm(jvpreg.linearize(model, np.zeros((1, 3))))
    >>> round(float(keras.ops.convert_to_numpy(estimate.value)[0]), 4)
    2.4495
    """
    estimate = top_singular_values(linearization, 1, tolerance, num_iterations, max_restarts, seed)
    value, sem, residual, converged = (part[:, 0] for part in estimate[:4])
    return Estimate(value, sem, residual, converged, estimate.num_matvecs)


@by_example
def top_eigenvalues(
    linearization: Linearization | Operator,
    k: int = 1,
    tolerance: float = 1e-3,
    num_iterations: int = 20,
    max_restarts: int = 10,
    seed: Seed = 0,
) -> Estimate:
    """The k eigenvalues of largest magnitude: of `J` if it is square, otherwise of `J Jᵀ`.

    A square `J` takes Arnoldi's method in blocks of k + 2, with Rayleigh-Ritz. (The orthogonal iteration of Balestriero
    & Baraniuk's algorithm 2 uses only the last power, and finds only real eigenvalues.) Eigenvalues and vectors are
    complex, and conjugate pairs are found as pairs. For another `J`, the eigenvalues are the squares of
    `top_singular_values`, and real.

    Args:
        linearization: from `jvpreg.linearize`, or an `Operator`.
        k: how many eigenvalues.
        tolerance: relative to |λ₁|: a value has converged if its residual is at most `tolerance·|λ₁|`.
        num_iterations: steps between restarts; the memory is that of `2·(k + 2)·num_iterations` vectors.
        max_restarts: the largest number of restarts.
        seed: of the starting vectors: an integer or a `keras.random.SeedGenerator`.

    Returns:
        An `Estimate`, each part `(B, k)`. For a square `J`, `value` is complex, the largest in magnitude first; in a
        conjugate pair the one with the positive imaginary part comes first. `residual` is `‖J v − λ v‖` with `‖v‖ = 1`:
        λ is an exact eigenvalue of a matrix at this distance from `J`. If `J` is far from normal, its own eigenvalues
        may be further away. For `J Jᵀ` there is an eigenvalue within `residual`. `vectors` are the eigenvectors `(B, k,
        n)` of a square `J`.

    Raises:
        ValueError: an argument is out of its range.

    It does not run under XLA on TensorFlow, which cannot compute eigenvalues of a general matrix.

    Reference: Balestriero & Baraniuk (2021), algorithm 2; Saad (2011), "Numerical Methods for Large Eigenvalue
    Problems".

    Example:

    >>> import keras, numpy as np, jvpreg
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, use_bias=False)])
    >>> model.set_weights([np.array([[0.0, 1.0], [-1.0, 0.0]])])  # a rotation
    >>> estimate = jvpreg.estimators.top_eigenvalues(jvpreg.linearize(model, np.zeros((1, 2))), k=2)
    >>> np.round(keras.ops.convert_to_numpy(estimate.value), 4).tolist()
    [[1j, -1j]]
    """
    operator = as_operator(linearization)
    if not operator.is_square:
        ritz, unit, _, num_matvecs = _triplets(operator, k, tolerance, num_iterations // 2 or 1, max_restarts, seed)
        value = ops.square(unit * ritz.values)
        converged = ritz.gram_residual <= tolerance * ops.square(ritz.values[:, :1])
        return Estimate(value, ops.zeros_like(value), unit**2 * ritz.gram_residual, converged, num_matvecs)
    _check_iteration(k, tolerance, num_iterations, max_restarts, seed, operator.shape[0])
    return _arnoldi(operator, k, tolerance, num_iterations, max_restarts, seed)


def _arnoldi(
    operator: Operator, k: int, tolerance: float, num_iterations: int, max_restarts: int, seed: Seed
) -> Estimate:
    """For a square Jacobian: of the whole matrix if it is small, otherwise by Arnoldi's method with restarts."""
    size, batch = operator.shape[0], operator.batch_size
    # Two more than asked for: a conjugate pair then restarts as its whole plane, and the k-th value is separated.
    width = k + 2
    if size <= width * num_iterations:
        basis, images, unit = _matrix(operator)
        return _eigenvalue_estimate(_eigenpairs(basis, images, k), unit, tolerance, size)

    unit = operator.magnitude(seed)
    matvec = probed(operator.over(unit).matvec)

    def cycle(i: Tensor, _real: Tensor, _imaginary: Tensor, _residual: Tensor, *rows: Tensor) -> tuple:
        # A pair has one row for the real and one for the imaginary part; they span the same plane.
        upper = ops.expand_dims(_imaginary >= 0, -1)
        start = ops.where(upper, *rows)
        basis, images = block_krylov(lambda rows: (matvec(rows),), start, num_iterations, (size,))
        return i + 1, *_eigenpairs(basis, images, width)

    def unfinished(i: Tensor, real: Tensor, imaginary: Tensor, residual: Tensor, *_: Tensor) -> Tensor:
        largest = ops.sqrt(real**2 + imaginary**2)[:, :1]
        return ops.logical_and(i <= max_restarts, ops.logical_not(ops.all(residual[:, :k] <= tolerance * largest)))

    start = ops.transpose(operator.draw("gaussian", width, seed), (1, 0, 2))
    nothing = ops.zeros((batch, width), operator.dtype)
    state = (ops.convert_to_tensor(0), nothing, nothing, nothing + np.inf, start, ops.zeros_like(start))
    cycles, *found = ops.while_loop(unfinished, cycle, state)
    num_matvecs = cycles * (width * num_iterations) + 1
    return _eigenvalue_estimate([part[:, :k] for part in found], ops.expand_dims(unit, -1), tolerance, num_matvecs)


def _eigenpairs(basis: Tensor, images: Tensor, k: int) -> tuple:
    """The k Ritz pairs of largest magnitude: real and imaginary parts of λ, ‖A v − λ v‖, and the parts of v."""
    # The basis are the columns of V, and H = Vᵀ A V; here its rows hold the components of the images.
    projected = ops.matmul(basis, ops.transpose(images, (0, 2, 1)))
    values, coefficients = ops.eig(projected)
    real, imaginary = ops.real(values), ops.imag(values)
    magnitude = ops.sqrt(real**2 + imaginary**2)
    # Rounding must not decide which value of a pair comes first.
    order = ops.argsort(-magnitude * (1 + 1e-6 * ops.sign(imaginary)), axis=-1)[:, :k]
    real, imaginary = (ops.take_along_axis(part, order, axis=-1) for part in (real, imaginary))
    columns = [
        ops.take_along_axis(ops.transpose(part, (0, 2, 1)), ops.expand_dims(order, -1), axis=1)
        for part in (ops.real(coefficients), ops.imag(coefficients))
    ]
    rows = [ops.matmul(part, basis) for part in columns]
    applied = [ops.matmul(part, images) for part in columns]
    a, b = ops.expand_dims(real, -1), ops.expand_dims(imaginary, -1)
    off_real = applied[0] - (a * rows[0] - b * rows[1])
    off_imaginary = applied[1] - (a * rows[1] + b * rows[0])
    residual = ops.sqrt(ops.sum(off_real**2 + off_imaginary**2, axis=-1))
    return real, imaginary, residual, *rows


def _eigenvalue_estimate(pairs: list | tuple, unit: Tensor, tolerance: float, num_matvecs: int | Tensor) -> Estimate:
    real, imaginary, residual, rows_real, rows_imaginary = pairs
    value = _complex(unit * real, unit * imaginary)
    converged = residual <= tolerance * ops.sqrt(real**2 + imaginary**2)[:, :1]
    vectors = _complex(rows_real, rows_imaginary)
    return Estimate(value, ops.zeros_like(real), unit * residual, converged, num_matvecs, vectors)


def _complex(real: Tensor, imaginary: Tensor) -> Tensor:
    # Not `ops.view_as_complex`, which has only single precision on TensorFlow.
    dtype = "complex128" if keras.backend.standardize_dtype(real.dtype) == "float64" else "complex64"
    return ops.cast(real, dtype) + 1j * ops.cast(imaginary, dtype)


def _triplets(
    operator: Operator, k: int, tolerance: float, num_iterations: int, max_restarts: int, seed: Seed
) -> tuple:
    """The k largest triplets of the upright operator divided by its unit; the unit; `converged`; the products."""
    _check_iteration(k, tolerance, num_iterations, max_restarts, seed, min(operator.shape))
    operator = operator.upright
    size = operator.shape[1]
    if size <= 2 * k * num_iterations:
        (ritz, unit), num_matvecs = materialized_triplets(operator, k), size
    else:
        unit = operator.magnitude(seed)
        operator, unit = operator.over(unit), ops.expand_dims(unit, -1)
        start = ops.transpose(operator.draw("gaussian", k, seed), (1, 0, 2))
        steps, ritz = _lanczos_triplets(operator, start, tolerance, num_iterations, max_restarts)
        num_matvecs = steps * (2 * k) + 1
    return ritz, unit, ritz.residual <= tolerance * ritz.values[:, :1], num_matvecs


def _lanczos_triplets(
    operator: Operator, start: Tensor, tolerance: float, num_iterations: int, max_restarts: int
) -> tuple:
    """The steps that it took, and the k largest triplets, from k rows `start` (B, k, n) to begin with.

    Block Lanczos for `AᵀA` with thick restarts: if the memory is full, the best half of the Ritz vectors is kept. Their
    images are known, and what these have outside of the space is all in the next block: so it grows on from there.
    """
    forward, backward = probed(operator.matvec), probed(operator.rmatvec)
    batch, k, _ = ops.shape(start)
    capacity, dtype = max(num_iterations, 2), start.dtype
    kept = capacity // 2

    def step(i: Tensor, filled: Tensor, following: Tensor, largest: Tensor, *state: Tensor) -> tuple:
        spaces = list(state[:3])
        block = orthonormal(following, floor=precision(dtype) * largest, basis=spaces[0])
        image = forward(block)
        returned = backward(image)
        at = (zero, filled * k, zero)  # JAX wants one type
        new = block, image, returned
        spaces = [ops.slice_update(rows, at, part) for rows, part in zip(spaces, new, strict=True)]
        largest = ops.maximum(largest, ops.max(ops.norm(returned, axis=-1), axis=-1, keepdims=True))
        # From the whole space: the part of it that a restart drops must not come back.
        following = without(returned, spaces[0])
        values, right = _right_vectors(spaces[1])
        ritz = _ritz(values[:, :k], right[:, :k], *spaces)

        def restarted() -> list:
            best = right[:, : kept * k]
            return [
                ops.concatenate([ops.matmul(best, rows), ops.zeros_like(rows[:, kept * k :])], 1) for rows in spaces
            ]

        filled = filled + 1
        spaces = ops.cond(filled < capacity, lambda: spaces, restarted)
        filled = ops.where(filled < capacity, filled, kept)
        return i + 1, filled, following, largest, *spaces, *ritz

    def unfinished(i: Tensor, filled: Tensor, following: Tensor, largest: Tensor, *state: Tensor) -> Tensor:
        ritz = RitzValues(*state[3:])
        done = ops.all(ritz.residual <= tolerance * ritz.values[:, :1])
        return ops.logical_and(i < num_iterations * (max_restarts + 1), ops.logical_not(done))

    outputs, size = operator.shape
    spaces = [ops.zeros((batch, capacity * k, length), dtype) for length in (size, outputs, size)]
    nothing, zero = ops.zeros((batch, k), dtype), ops.convert_to_tensor(0, "int32")
    images = ops.zeros((batch, k, outputs), dtype)
    state = (zero, zero, start, nothing[:, :1], *spaces, nothing, start, images, nothing + np.inf)
    steps, *state = ops.while_loop(unfinished, step, state)
    return steps, RitzValues(*state[6:])


def _matrix(operator: Operator) -> tuple:
    """The canonical basis, its images divided by the operator's unit, and the unit, `(B, 1)`."""
    images = operator.matvec(operator.basis())
    unit = ops.expand_dims(magnitude(images), -1)
    basis, images = (ops.transpose(vectors, (1, 0, 2)) for vectors in (operator.basis(), images / unit))
    return basis, images, unit


def materialized_triplets(operator: Operator, k: int) -> tuple:
    """The k largest triplets of an upright operator divided by its unit, from its whole matrix; the unit, `(B, 1)`."""
    basis, images, unit = _matrix(operator)
    values, right = _right_vectors(images)
    returned = ops.matmul(images, ops.transpose(images, (0, 2, 1)))
    return _ritz(values[:, :k], right[:, :k], basis, images, returned), unit


def _ritz(values: Tensor, right: Tensor, basis: Tensor, images: Tensor, returned: Tensor) -> RitzValues:
    """Rayleigh-Ritz: `A` within the rows of `basis`, where `images` are their `A v` and `returned` their `AᵀA v`."""
    inputs = ops.matmul(right, basis)
    off = ops.matmul(right, returned) - ops.expand_dims(values**2, -1) * inputs
    return RitzValues(values, inputs, ops.matmul(right, images), ops.norm(off, axis=-1))


def _right_vectors(images: Tensor) -> tuple:
    """The singular values of `A` within a space `(B, s)`, and the coefficients `(B, s, s)` of its right vectors."""
    # The SVD of the triangle R is that of all images; their Gram matrix would lose half of the digits.
    _, triangle = ops.qr(ops.transpose(images, (0, 2, 1)))
    _, values, right = ops.svd(triangle)
    return values, right


def _completed(*spaces: Tensor) -> list[Tensor]:
    """Orthonormal rows `(B, k, n)` of each space, from rows of which some may be zero or not complete.

    A singular value of zero has such vectors if the space became invariant before it was complete.
    """
    # All at once: on JAX on a CPU, two batches of decompositions side by side can wait for each other's threads. Zeros
    # below the columns stay zeros, since a Householder reflection has no part there.
    sizes = [rows.shape[-1] for rows in spaces]
    padded = [ops.pad(rows, [(0, 0), (0, 0), (0, max(sizes) - size)]) for rows, size in zip(spaces, sizes, strict=True)]
    columns, triangle = ops.qr(ops.transpose(ops.stack(padded), (0, 1, 3, 2)))
    signs = ops.where(ops.diagonal(triangle, axis1=2, axis2=3) < 0, -1.0, 1.0)
    rows = ops.transpose(columns, (0, 1, 3, 2)) * ops.cast(ops.expand_dims(signs, -1), columns.dtype)
    return [found[..., :size] for found, size in zip(ops.unstack(rows, len(spaces)), sizes, strict=True)]


def _check_iteration(k: int, tolerance: float, num_iterations: int, max_restarts: int, seed: Seed, size: int) -> None:
    checks.count("k", k, most=size)
    checks.count("num_iterations", num_iterations)
    checks.count("max_restarts", max_restarts, least=0)
    checks.number("tolerance", tolerance, above=0)
    checks.seed("seed", seed, generator=True)
