"""Sums over the spectrum by stochastic Lanczos quadrature: log-determinants, inverses, densities."""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from keras import ops

from jvpreg.common import checks
from jvpreg.common.typing import Seed, Tensor
from jvpreg.estimators.krylov import bidiagonal, lanczos
from jvpreg.estimators.materialized import singular_values
from jvpreg.estimators.norms import mean_and_sem
from jvpreg.estimators.operator import Operator, as_operator, by_example, check_square
from jvpreg.estimators.result import Estimate, exact
from jvpreg.linearization import Linearization


class Quadrature(NamedTuple):
    """Spectral measures, as nodes with weights that sum to 1.

    Attributes:
        nodes: `(P, B, m)`, one measure for each of P random vectors: eigenvalues of a symmetric operator, or singular
            values of another, divided by its unit.
        weights: like `nodes`.
        size: how many eigenvalues each measure stands for.
        num_matvecs: products that were computed for each example.
        unit: of the operator, `(B, 1)`.
        coarser: the measures after half of the iterations; None if the measure is exact, and P is 1.
    """

    nodes: Tensor
    weights: Tensor
    size: int
    num_matvecs: int
    unit: Tensor
    coarser: Any = None  # a `Quadrature`, for those who know that it is there

    def sums(self, function: Callable) -> Tensor:
        """`Σ_i f(λ_i)` over the spectrum, by each of the P measures: `(P, B)`.

        `function` gets the nodes, which are over the unit. The caller scales back.
        """
        # A node without weight does not count, even if f is infinite there.
        counts = self.weights > 0
        values = ops.where(counts, function(ops.where(counts, self.nodes, 1.0)), 0.0)
        return self.size * ops.sum(self.weights * values, axis=-1)

    def residual(self, function: Callable) -> Tensor:
        """How much `Σ_i f(λ_i)` changed in the second half of the iterations, `(B,)`."""
        # The last step alone says too little: if f has a kink at 0, the error falls only like 1/m.
        sums = ops.mean(self.sums(function), axis=0)
        return (
            ops.zeros_like(sums) if self.coarser is None else ops.abs(sums - ops.mean(self.coarser.sums(function), 0))
        )

    def sem(self, samples: Tensor) -> Tensor:
        """The standard error of the mean of samples `(P, B)`; 0 if the measure is exact."""
        return ops.zeros_like(samples[0]) if self.coarser is None else mean_and_sem(samples)[1]

    def estimate(self, function: Callable, tolerance: float) -> Estimate:
        """`Σ_i f(λ_i)` of each example."""
        samples, residual = self.sums(function), self.residual(function)
        value = ops.mean(samples, axis=0)
        return Estimate(value, self.sem(samples), residual, residual <= tolerance * ops.abs(value), self.num_matvecs)


def singular_quadrature(
    linearization: Linearization | Operator, num_probes: int, num_iterations: int, seed: Seed
) -> Quadrature:
    """The measure of the singular values over the smaller side: of the roots of the eigenvalues of `JᵀJ` or `J Jᵀ`.

    If that side has no more than `num_probes·num_iterations` dimensions, the Jacobian is materialized, which is exact.
    """
    checks.count("num_probes", num_probes, least=2)
    checks.count("num_iterations", num_iterations, least=2)
    checks.seed("seed", seed, generator=True)
    operator = as_operator(linearization).upright
    outputs, size = operator.shape
    if size <= num_probes * num_iterations:
        values = singular_values(operator).value
        unit = ops.where(values[:, :1] > 0, values[:, :1], 1.0)
        nodes = ops.expand_dims(values / unit, 0)
        return Quadrature(nodes, ops.full_like(nodes, 1 / size), size, size, unit)
    unit = operator.magnitude(seed)
    over = operator.over(unit)
    start = operator.draw("sphere", num_probes, seed) / math.sqrt(size)
    entries = bidiagonal(over.matvec, over.rmatvec, start, num_iterations, outputs)
    return _measures(_singular, entries, size, 2, ops.expand_dims(unit, -1))


def _symmetric_quadrature(operator: Operator, num_probes: int, num_iterations: int, seed: Seed) -> Quadrature:
    """The measure of the eigenvalues of a symmetric operator."""
    size = operator.shape[1]
    unit = operator.magnitude(seed)
    start = operator.draw("sphere", num_probes, seed) / math.sqrt(size)
    entries = lanczos(operator.over(unit).matvec, start, num_iterations)
    return _measures(_symmetric, entries, size, 1, ops.expand_dims(unit, -1))


def _measures(solve: Callable, entries: tuple, size: int, products: int, unit: Tensor) -> Quadrature:
    """The measures of matrices with these entries on the diagonal and beside it, each `(m, P, B)`; one in a step.

    `solve` gets the entries, and returns nodes and weights `(P, B, m)`; a step takes so many `products`.
    """
    num_iterations, count = entries[0].shape[0], entries[0].shape[1]
    half = num_iterations // 2
    # Both at once: on JAX on a CPU, two batches of decompositions side by side can wait for each other's threads. The
    # coarser matrix is padded with nodes that are not connected to it, have no weight, and lie within the spectrum.
    first = ops.reshape(ops.arange(num_iterations), (-1, 1, 1)) < half
    joined = ops.reshape(ops.arange(num_iterations), (-1, 1, 1)) < half - 1
    alphas, betas = entries
    alphas = ops.concatenate([alphas, ops.where(first, alphas, alphas[:1])], axis=1)
    betas = ops.concatenate([betas, ops.where(joined, betas, 0.0)], axis=1)
    diagonal, beside = (ops.expand_dims(ops.transpose(part, (1, 2, 0)), -1) for part in (alphas, betas))
    matrix = diagonal * ops.eye(num_iterations, dtype=alphas.dtype)
    nodes, weights = solve(matrix, beside * ops.eye(num_iterations, k=1, dtype=alphas.dtype))
    coarser = Quadrature(nodes[count:], weights[count:], size, products * count * half + 1, unit)
    return Quadrature(nodes[:count], weights[:count], size, products * count * num_iterations + 1, unit, coarser)


def _symmetric(diagonal: Tensor, above: Tensor) -> tuple:
    """Nodes and weights of tridiagonal matrices, by Golub and Welsch."""
    nodes, vectors = ops.eigh(diagonal + above + ops.swapaxes(above, -1, -2))
    return nodes, ops.square(vectors[..., 0, :])


def _singular(diagonal: Tensor, above: Tensor) -> tuple:
    """Nodes and weights of `BᵀB` from bidiagonal matrices B; the nodes are the roots of its eigenvalues."""
    _, nodes, right = ops.svd(diagonal + above)
    return nodes, ops.square(right[..., :, 0])


@by_example
def log_determinant(
    linearization: Linearization | Operator,
    of: Literal["JJT", "J"] = "JJT",
    num_probes: int = 8,
    num_iterations: int = 20,
    tolerance: float = 1e-2,
    shift: float = 1.0,
    seed: Seed = 0,
) -> Estimate:
    """`log |det(s I + A)|` of each example, where A is `J Jᵀ` (or `JᵀJ`, if that is smaller) or a square `J` itself.

    With a shift s of 1 it is always defined for `J Jᵀ`. With 0 it is the logarithm of the change of volume: `log |det
    J|`, as normalizing flows have it, and for `J Jᵀ` twice that.

    By stochastic Lanczos quadrature. If A has no more than `num_probes·num_iterations` dimensions, it is materialized,
    and the result is exact.

    Args:
        linearization: from `jvpreg.linearize`, or an `Operator`.
        of: `"JJT"`, or `"J"`: a square Jacobian, which must be symmetric unless it is small enough to be materialized
            or the shift is 0.
        num_probes: random vectors.
        num_iterations: Lanczos iterations from each; the memory is that of `num_probes·num_iterations` vectors, for
            `"JJT"` of both sides.
        tolerance: relative to the value, which has converged if the residual is at most `tolerance` times the value.
        shift: s, a number of 0 or more.
        seed: an integer or a `keras.random.SeedGenerator`.

    Returns:
        An `Estimate`, each part `(B,)`; −∞ if the matrix is singular and was materialized. `residual` is how much the
        value changed in the second half of the iterations. For `of="J"` with a shift the relative asymmetry `‖J v − Jᵀ
        v‖ / ‖J v‖` of a random vector, times the value, is added: for a Jacobian that is not symmetric this is no
        estimate, and it does not converge.

    Raises:
        ValueError: an argument is out of its range, or `J` is not square.

    Reference: Balestriero & Baraniuk (2021), section 4.2; Ubaru, Chen & Saad (2017), "Fast estimation of tr(f(A)) via
    stochastic Lanczos quadrature".

    Example:

    >>> import keras, numpy as np, jvpreg
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(3, kernel_initializer="identity")])
    >>> estimate = jvpreg.estimators.log_determinant(jvpreg.linearize(model, np.zeros((1, 3))))
    >>> round(float(keras.ops.convert_to_numpy(estimate.value)[0]), 4)  # 3 log 2
    2.0794
    """
    checks.choice("of", of, ("JJT", "J"))
    checks.number("tolerance", tolerance, above=0)
    shift = checks.number("shift", shift, least=0)
    operator = as_operator(linearization)
    if of == "J":
        check_square(operator, 'log_determinant(of="J")')
    if of == "J" and shift:
        return _of_symmetric(operator, num_probes, num_iterations, tolerance, shift, seed)
    measure = singular_quadrature(operator, num_probes, num_iterations, seed)
    return measure.estimate(_logarithm(measure.unit, shift, 2 if of == "JJT" else 1), tolerance)


def _logarithm(unit: Tensor, shift: float, power: int) -> Callable:
    """`log(s + (unit·σ)²)` as a function of σ; without a shift `power · log(unit·σ)`."""
    if not shift:
        return lambda sigma: power * (ops.log(unit) + ops.log(sigma))
    return lambda sigma: math.log(shift) + ops.log1p(ops.square(unit / math.sqrt(shift) * sigma))


def _of_symmetric(
    operator: Operator, num_probes: int, num_iterations: int, tolerance: float, shift: float, seed: Seed
) -> Estimate:
    """`log |det(s I + J)|` of a square Jacobian, which is symmetric or small enough to be materialized."""
    checks.count("num_probes", num_probes, least=2)
    checks.count("num_iterations", num_iterations, least=2)
    checks.seed("seed", seed, generator=True)
    if operator.shape[0] <= num_probes * num_iterations:
        return _exact_log_determinant(operator, shift)
    measure = _symmetric_quadrature(operator, num_probes, num_iterations, seed)
    found = measure.estimate(lambda values: ops.log(ops.abs(shift + measure.unit * values)), tolerance)
    residual = found.residual + _asymmetry(operator, operator.draw("sphere", 1, seed)) * ops.abs(found.value)
    converged = residual <= tolerance * ops.abs(found.value)
    return found._replace(residual=residual, converged=converged, num_matvecs=found.num_matvecs + 2)


def _asymmetry(operator: Operator, vector: Tensor) -> Tensor:
    """`‖J v − Jᵀ v‖ / ‖J v‖` of a vector `(1, B, n)`, as `(B,)`."""
    image = operator.matvec(vector)
    length = ops.norm(image[0], axis=-1)
    return ops.norm((image - operator.rmatvec(vector))[0], axis=-1) / ops.where(length > 0, length, 1.0)


def _exact_log_determinant(operator: Operator, shift: float) -> Estimate:
    """The exact value for a square Jacobian that is small enough to be materialized."""
    size = operator.shape[0]
    matrix = ops.transpose(operator.matvec(operator.basis()), (1, 2, 0))
    # Not `ops.slogdet`, which TensorFlow does not have under XLA.
    triangle = ops.qr(shift * ops.eye(size, dtype=operator.dtype) + matrix)[1]
    value = ops.sum(ops.log(ops.abs(ops.diagonal(triangle, axis1=1, axis2=2))), axis=-1)
    return exact(value, size)._replace(converged=ops.isfinite(value))


@by_example
def inverse_frobenius_norm(
    linearization: Linearization | Operator,
    num_probes: int = 8,
    num_iterations: int = 20,
    tolerance: float = 1e-2,
    seed: Seed = 0,
) -> Estimate:
    """`‖J⁻¹‖_F` of each example, for a square Jacobian: the root of `Σ 1/σ_i²`.

    By stochastic Lanczos quadrature from the bidiagonalization of `J`, without solving; exact if `J` has no more than
    `num_probes·num_iterations` dimensions. The smallest singular values count most and are found last: look at
    `converged`.

    Args:
        linearization: from `jvpreg.linearize`, or an `Operator`.
        num_probes: random vectors.
        num_iterations: Lanczos iterations from each.
        tolerance: relative to the value, which has converged if the residual is at most `tolerance` times the value.
        seed: an integer or a `keras.random.SeedGenerator`.

    Returns:
        An `Estimate`, each part `(B,)`; infinite if `J` is singular and was materialized. `residual` is how much the
        value changed in the second half of the iterations.

    Raises:
        ValueError: an argument is out of its range, or `J` is not square.

    Reference: Balestriero & Baraniuk (2021), section 4.2; Kenney, Laub & Reese (1998).

    Example:

    >>> import keras, numpy as np, jvpreg
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4, kernel_initializer="identity")])
    >>> estimate = jvpreg.estimators.inverse_frobenius_norm(jvpreg.linearize(model, np.zeros((1, 4))))
    >>> round(float(keras.ops.convert_to_numpy(estimate.value)[0]), 4)
    2.0
    """
    checks.number("tolerance", tolerance, above=0)
    operator = as_operator(linearization)
    check_square(operator, "inverse_frobenius_norm")
    measure = singular_quadrature(operator, num_probes, num_iterations, seed)
    unit, found = measure.unit[:, 0], measure.estimate(lambda sigma: ops.square(1 / sigma), tolerance)
    value = ops.sqrt(found.value)
    # The errors are multiplied by the slope of the root.
    sem, residual = (part / (2 * value) for part in (found.sem, found.residual))
    return Estimate(value / unit, sem / unit, residual / unit, residual <= tolerance * value, found.num_matvecs)


class SpectralDensity(NamedTuple):
    """The density of the singular values of each example's smaller side.

    Attributes:
        points: the singular values at which the density is given, from 0 upwards, `(B, G)`.
        value: `(B, G)`; its integral over all values is 1.
        sem: standard error of `value` over the random vectors, `(B, G)`; 0 if it is exact.
        num_matvecs: products that were computed for each example; None if they were not counted.
    """

    points: Tensor
    value: Tensor
    sem: Tensor
    num_matvecs: int | None = None


@by_example
def spectral_density(
    linearization: Linearization | Operator,
    num_points: int = 64,
    width: float = 0.02,
    num_probes: int = 8,
    num_iterations: int = 20,
    seed: Seed = 0,
) -> SpectralDensity:
    """How the singular values of each example's Jacobian are distributed, over those of its smaller side.

    By stochastic Lanczos quadrature, or from the materialized Jacobian if its smaller side has no more than
    `num_probes·num_iterations` dimensions. In both cases each value is spread out to a Gaussian.

    Args:
        linearization: from `jvpreg.linearize`, or an `Operator`.
        num_points: G.
        width: standard deviation of the Gaussian, in units of the largest singular value found.
        num_probes: random vectors.
        num_iterations: Lanczos iterations from each.
        seed: an integer or a `keras.random.SeedGenerator`.

    Returns:
        A `SpectralDensity`. The points reach from 0 to 1.1 times the largest value found.

    Raises:
        ValueError: an argument is out of its range.

    Reference: Lin, Saad & Yang (2016), "Approximating spectral densities of large matrices".

    Example:

    >>> import keras, numpy as np, jvpreg
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(3, kernel_initializer="identity")])
    >>> density = jvpreg.estimators.spectral_density(jvpreg.linearize(model, np.zeros((1, 3))))
    >>> points, value = map(keras.ops.convert_to_numpy, density[:2])
    >>> round(float(points[0][value[0].argmax()]), 1)
    1.0
    """
    checks.count("num_points", num_points, least=2)
    checks.number("width", width, above=0)
    found = singular_quadrature(linearization, num_probes, num_iterations, seed)
    sigma = found.nodes
    largest = ops.max(sigma, axis=(0, 2))
    unit = ops.expand_dims(ops.where(largest > 0, largest, 1.0), -1)
    relative = unit * ops.linspace(0.0, 1.1, num_points, dtype=sigma.dtype)
    scale = width * unit

    def at(points: Tensor) -> Tensor:
        # The part of a Gaussian below 0 is reflected: there are no singular values there.
        at = ops.reshape(points, (1, -1, 1))
        height = sum(ops.exp(-0.5 * ((sigma + sign * at) / ops.expand_dims(scale, 0)) ** 2) for sign in (-1, 1))
        sample = ops.sum(found.weights * height, axis=-1) / (scale[:, 0] * math.sqrt(2 * math.pi))
        return ops.stack([ops.mean(sample, axis=0), found.sem(sample)])

    # (G, P, B, m) would be too large, so the points are computed one after the other.
    value, sem = ops.unstack(ops.transpose(ops.map(at, ops.transpose(relative)), (1, 2, 0)))
    return SpectralDensity(found.unit * relative, value / found.unit, sem / found.unit, found.num_matvecs)
