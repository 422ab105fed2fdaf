"""What all singular values say together: ranks and Schatten norms."""

from keras import ops

from jvpreg.common import checks
from jvpreg.common.typing import Seed, Tensor
from jvpreg.estimators.materialized import singular_values
from jvpreg.estimators.norms import frobenius_norm
from jvpreg.estimators.operator import Operator, as_operator, by_example
from jvpreg.estimators.quadrature import singular_quadrature
from jvpreg.estimators.result import Estimate
from jvpreg.estimators.spectrum import spectral_norm
from jvpreg.linearization import Linearization


@by_example
def stable_rank(
    linearization: Linearization | Operator,
    num_probes: int = 16,
    tolerance: float = 1e-3,
    num_iterations: int = 10,
    max_restarts: int = 10,
    seed: Seed = 0,
) -> Estimate:
    """`‖J‖_F² / σ₁²` of each example: between 1 and the rank.

    Args:
        linearization: from `jvpreg.linearize`, or an `Operator`.
        num_probes: for the norm: see `frobenius_norm`. If the smaller side has no more dimensions than this, the
            Jacobian is materialized, and all is exact.
        tolerance: for σ₁: see `top_singular_values`.
        num_iterations: for σ₁: see `top_singular_values`.
        max_restarts: for σ₁: see `top_singular_values`.
        seed: for both: an integer or a `keras.random.SeedGenerator`.

    Returns:
        An `Estimate`, each part `(B,)`: `sem` is from the norm, `residual` from σ₁, to first order. 0 for a zero
        Jacobian.

    Raises:
        ValueError: an argument is out of its range.

    Example:

    >>> import keras, numpy as np, jvpreg
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(3, kernel_initializer="identity")])
    >>> estimate = jvpreg.estimators.stable_rank(jvpreg.linearize(model, np.zeros((1, 3))))
    >>> round(float(keras.ops.convert_to_numpy(estimate.value)[0]), 4)
    3.0
    """
    checks.count("num_probes", num_probes, least=2)
    checks.number("tolerance", tolerance, above=0)
    checks.count("num_iterations", num_iterations)
    checks.count("max_restarts", max_restarts, least=0)
    checks.seed("seed", seed, generator=True)
    operator = as_operator(linearization)
    if min(operator.shape) <= num_probes:
        every = singular_values(operator)
        largest, num_matvecs = every.value[:, 0], every.num_matvecs
        residual, converged = ops.zeros_like(largest), ops.isfinite(largest)
        unit = ops.where(largest > 0, largest, 1.0)
        value = ops.sum(ops.square(every.value / ops.expand_dims(unit, -1)), axis=-1)
        sem = ops.zeros_like(value)
    else:
        norm = frobenius_norm(operator, num_probes, seed=seed)
        top = spectral_norm(operator, tolerance, num_iterations, max_restarts, seed)
        largest, residual, converged = top.value, top.residual, top.converged
        num_matvecs = norm.num_matvecs + top.num_matvecs
        unit = ops.where(largest > 0, largest, 1.0)
        # The quotient is squared, not its parts: their squares may overflow.
        ratio = ops.where(largest > 0, norm.value / unit, 0.0)
        value, sem = ops.square(ratio), 2 * ratio * (norm.sem / unit)
    return Estimate(value, sem, 2 * value * (residual / unit), converged, num_matvecs)


@by_example
def effective_rank(
    linearization: Linearization | Operator,
    num_probes: int = 8,
    num_iterations: int = 20,
    tolerance: float = 1e-2,
    seed: Seed = 0,
) -> Estimate:
    """`exp(H)` of each example, where H is the entropy of the singular values, normalized to sum to 1.

    By stochastic Lanczos quadrature; exact if the smaller side has no more than `num_probes·num_iterations` dimensions.

    Args:
        linearization: from `jvpreg.linearize`, or an `Operator`.
        num_probes: random vectors.
        num_iterations: Lanczos iterations from each.
        tolerance: relative to the value, which has converged if the residual is at most `tolerance` times the value.
        seed: an integer or a `keras.random.SeedGenerator`.

    Returns:
        An `Estimate`, each part `(B,)`, `sem` and `residual` to first order; 0 for a zero Jacobian.

    Raises:
        ValueError: an argument is out of its range.

    Reference: Roy & Vetterli (2007), "The effective rank".

    Example:

    >>> import keras, numpy as np, jvpreg
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(3, kernel_initializer="identity")])
    >>> estimate = jvpreg.estimators.effective_rank(jvpreg.linearize(model, np.zeros((1, 3))))
    >>> round(float(keras.ops.convert_to_numpy(estimate.value)[0]), 4)
    3.0
    """
    checks.number("tolerance", tolerance, above=0)
    found = singular_quadrature(linearization, num_probes, num_iterations, seed)
    sums, weighted = found.sums(_sigma), found.sums(_sigma_log_sigma)
    total, mean = ops.mean(sums, axis=0), ops.mean(weighted, axis=0)
    positive = total > 0
    divisor = ops.where(positive, total, 1.0)
    # H = log S − (Σ σ log σ) / S, where S = Σ σ.
    value = ops.where(positive, ops.exp(ops.log(divisor) - mean / divisor), 0.0)
    slopes = value * (1 / divisor + mean / divisor**2), -value / divisor
    sem = found.sem(slopes[0] * sums + slopes[1] * weighted)
    residual = ops.abs(slopes[0]) * found.residual(_sigma) + ops.abs(slopes[1]) * found.residual(_sigma_log_sigma)
    return Estimate(value, sem, residual, residual <= tolerance * value, found.num_matvecs)


@by_example
def schatten_norm(
    linearization: Linearization | Operator,
    order: float = 1.0,
    num_probes: int = 8,
    num_iterations: int = 20,
    tolerance: float = 1e-2,
    seed: Seed = 0,
) -> Estimate:
    """`(Σ σ_i^p)^(1/p)` of each example: the nuclear norm for p = 1, the Frobenius norm for p = 2.

    By stochastic Lanczos quadrature; exact if the smaller side has no more than `num_probes·num_iterations` dimensions.

    Args:
        linearization: from `jvpreg.linearize`, or an `Operator`.
        order: p, a positive number.
        num_probes: random vectors.
        num_iterations: Lanczos iterations from each.
        tolerance: relative to the value, which has converged if the residual is at most `tolerance` times the value.
        seed: an integer or a `keras.random.SeedGenerator`.

    Returns:
        An `Estimate`, each part `(B,)`, `sem` and `residual` to first order; 0 for a zero Jacobian.

    Raises:
        ValueError: an argument is out of its range.

    Reference: Dudley, Saibaba & Alexanderian (2022), "Monte Carlo estimators for the Schatten p-norm of symmetric
    positive semidefinite matrices".

    Example:

    >>> import keras, numpy as np, jvpreg
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(3, kernel_initializer="identity")])
    >>> estimate = jvpreg.estimators.schatten_norm(jvpreg.linearize(model, np.zeros((1, 3))))
    >>> round(float(keras.ops.convert_to_numpy(estimate.value)[0]), 4)
    3.0
    """
    order = checks.number("order", order, above=0)
    checks.number("tolerance", tolerance, above=0)
    found = singular_quadrature(linearization, num_probes, num_iterations, seed)

    def power(sigma: Tensor) -> Tensor:
        return ops.power(sigma, order)

    total = ops.mean(found.sums(power), axis=0)
    positive = total > 0
    unit = found.unit[:, 0]
    value = ops.where(positive, ops.power(ops.where(positive, total, 1.0), 1 / order), 0.0)
    slope = ops.where(positive, value / (order * ops.where(positive, total, 1.0)), 0.0)
    sem, residual = slope * found.sem(found.sums(power)), slope * found.residual(power)
    return Estimate(unit * value, unit * sem, unit * residual, residual <= tolerance * value, found.num_matvecs)


def _sigma(sigma: Tensor) -> Tensor:
    return sigma


def _sigma_log_sigma(sigma: Tensor) -> Tensor:
    return sigma * ops.log(ops.where(sigma > 0, sigma, 1.0))
