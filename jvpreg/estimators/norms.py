"""Norms of the Jacobian by random probes."""

import math
from typing import Literal

from keras import ops, tree

from jvpreg import probes as probes_module
from jvpreg.common import checks
from jvpreg.common.typing import Seed, Structure, Tensor
from jvpreg.estimators.nystrom import xnystrace
from jvpreg.estimators.operator import Operator, as_operator, by_example, magnitude
from jvpreg.estimators.result import Estimate, exact
from jvpreg.linearization import Linearization


def squared_norm(products: Structure) -> Tensor:
    """`‖·‖²` of each probe's product with each example: a structure of `(P, B, …)` to `(P, B)`."""
    return sum(ops.sum(ops.square(ops.reshape(t, (*ops.shape(t)[:2], -1))), axis=-1) for t in tree.flatten(products))


def root(square: Tensor) -> Tensor:
    """The square root of numbers that are not negative, with slope 0 at 0, where it is infinite."""
    zero = square == 0
    return ops.where(zero, 0.0, ops.sqrt(ops.where(zero, 1.0, square)))


@by_example
def frobenius_norm(
    linearization: Linearization | Operator,
    num_probes: int = 16,
    side: Literal["input", "output"] | None = None,
    probes: str = "sphere",
    method: Literal["hutchinson", "xnystrace"] = "hutchinson",
    seed: Seed = 0,
) -> Estimate:
    """`‖J‖_F` of each example.

    Hutchinson's estimate of `‖J‖_F² = tr JᵀJ` averages `‖J u‖²`. XNysTrace approximates `JᵀJ` within the space of all
    vectors but one, in turn, and estimates only the rest: if the singular values decay, its error is far smaller.

    Args:
        linearization: from `jvpreg.linearize`, or an `Operator`.
        num_probes: products for each example. If there are at least as many as the side has dimensions, the canonical
            basis is used, and the norm is exact.
        side: `"input"` pushes directions forward, `"output"` pulls cotangents back; by default the side of smaller
            dimension, if both are possible.
        probes: the kind of random directions: see `jvpreg.probes.draw`, and `jvpreg.regularizers.JacobianNorm` for
            their variances.
        method: `"hutchinson"` or `"xnystrace"`: by as many products with `Jᵀ` as with `J`, of vectors on the sphere.
        seed: an integer or a `keras.random.SeedGenerator`.

    Returns:
        An `Estimate`. If it is not exact, `value` is the root of an unbiased estimate of `‖J‖_F²`, and `sem` its
        standard error over the probes, to first order. For `"orthogonal"` probes `sem` is too large: they vary less
        than independent ones; for XNysTrace, whose estimates share their products, it is too small: about 0.4 of the
        spread if the singular values decay.

    Raises:
        ValueError: `num_probes` is less than 2 (XNysTrace: 4) and not exact, or `side`, `probes` or `method` is
            unknown.

    Reference: Balestriero & Baraniuk (2021), equation 13; Epperly, Tropp & Webber (2024), "XTrace".

    Example:

    >>> import keras, numpy as np, jvpreg
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, kernel_initializer="ones")])
    >>> estimate = jvpreg.estimators.frobenius_norm(jvpreg.linearize(model, np.zeros((1, 3))))
    >>> [round(float(keras.ops.convert_to_numpy(part)[0]), 4) for part in (estimate.value, estimate.sem)]
    [2.4495, 0.0]
    """
    checks.choice("side", side, ("input", "output", None))
    checks.choice("probes", probes, probes_module.KINDS)
    checks.choice("method", method, ("hutchinson", "xnystrace"))
    checks.seed("seed", seed, generator=True)
    checks.count("num_probes", num_probes)
    operator = _from_side(as_operator(linearization), side)
    if num_probes >= operator.shape[1]:
        return _exact_norm(operator)
    if num_probes < 2:
        raise checks.invalid("num_probes", "at least 2: one probe has no standard error", num_probes)
    if method == "xnystrace":
        checks.count("num_probes", num_probes, least=4)
        return root_of_mean(*_xnystrace(operator, num_probes // 2, seed))
    products = operator.matvec(operator.draw(probes, num_probes, seed))
    unit = magnitude(products)
    return root_of_mean(squared_norm(products / ops.expand_dims(unit, -1)), unit, num_probes)


def _from_side(operator: Operator, side: str | None) -> Operator:
    """The operator whose inputs are those of a side; by default of the one with fewer."""
    outputs_are_fewer = operator.shape[0] <= operator.shape[1] and operator.has_transpose
    return operator.transpose if side == "output" or (side is None and outputs_are_fewer) else operator


def _xnystrace(operator: Operator, count: int, seed: Seed) -> tuple:
    """Estimates of `‖J‖_F²` over a squared unit, `(m, B)`; the unit, `(B,)`; and the number of products."""
    omega = operator.draw("sphere", count, seed)
    images = operator.matvec(omega)
    # Divided twice, since the square of the unit may overflow.
    unit = magnitude(images)
    returned = operator.rmatvec(images / ops.expand_dims(unit, -1))
    unit = ops.sqrt(unit) * ops.sqrt(magnitude(returned))
    y = returned / ops.expand_dims(magnitude(returned), -1)
    rows = (ops.transpose(vectors, (1, 0, 2)) for vectors in (omega, y))
    return ops.transpose(xnystrace(*rows)), unit, 2 * count


def _exact_norm(operator: Operator) -> Estimate:
    """The Frobenius norm of the whole matrix, column by column."""
    products = operator.matvec(operator.basis())
    unit = magnitude(products)
    squares = ops.sum(squared_norm(products / ops.expand_dims(unit, -1)), axis=0)
    return exact(unit * ops.sqrt(squares), operator.shape[1])


def mean_and_sem(samples: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of samples `(P, …)` over P, and its standard error."""
    count = samples.shape[0]
    deviation = ops.std(samples, axis=0) * math.sqrt(count / (count - 1))
    return ops.mean(samples, axis=0), deviation / math.sqrt(count)


def root_of_mean(samples: Tensor, unit: Tensor, num_matvecs: int) -> Estimate:
    """The root of the mean of estimates `(P, …)` of a square, which are over the square of a unit, such as `(B,)`."""
    mean, sem = mean_and_sem(samples)
    value = ops.sqrt(mean)
    # The error is multiplied by the square root's slope, 1 / (2 value); a zero norm has no slope.
    sem = unit * sem / ops.where(value > 0, 2 * value, 1.0)
    value = unit * value
    return Estimate(value, sem, ops.zeros_like(value), None, num_matvecs)
