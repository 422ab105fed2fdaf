"""Parts of the Jacobian by random probes: its diagonal, and the norms of its rows."""

from keras import ops

from jvpreg import probes as probes_module
from jvpreg.common import checks
from jvpreg.common.typing import Seed, Tensor
from jvpreg.estimators.norms import mean_and_sem, root_of_mean
from jvpreg.estimators.operator import Operator, as_operator, by_example, check_square, magnitude
from jvpreg.estimators.result import Estimate, exact
from jvpreg.linearization import Linearization


@by_example
def diagonal(linearization: Linearization | Operator, num_matvecs: int = 32, seed: Seed = 0) -> Estimate:
    """`J_ii` of each example, for a square Jacobian: how much each output depends on the input at the same place.

    The mean of `u ⊙ J u` over random signs u.

    Args:
        linearization: from `jvpreg.linearize`, or an `Operator`.
        num_matvecs: products `J u` for each example. If there are at least as many as dimensions, the result is exact.
        seed: an integer or a `keras.random.SeedGenerator`.

    Returns:
        An `Estimate`, each part `(B, n)`, unbiased. The variance of one product is the sum of the squares of the other
        entries of the row.

    Raises:
        ValueError: an argument is out of its range, or `J` is not square.

    Reference: Bekas, Kokiopoulou & Saad (2007), "An estimator for the diagonal of a matrix".

    Example:

    >>> import keras, numpy as np, jvpreg
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(3, kernel_initializer="identity")])
    >>> estimate = jvpreg.estimators.diagonal(jvpreg.linearize(model, np.zeros((1, 3))))
    >>> keras.ops.convert_to_numpy(estimate.value).tolist()
    [[1.0, 1.0, 1.0]]
    """
    checks.seed("seed", seed, generator=True)
    operator = as_operator(linearization)
    check_square(operator, "diagonal")
    checks.count("num_matvecs", num_matvecs)
    size = operator.shape[0]
    if num_matvecs >= size:
        return exact(ops.einsum("pbp->bp", operator.matvec(operator.basis())), size)
    checks.count("num_matvecs", num_matvecs, least=2)
    signs = operator.draw("rademacher", num_matvecs, seed)
    images = operator.matvec(signs)
    unit = ops.expand_dims(magnitude(images), -1)
    value, sem = (unit * part for part in mean_and_sem(signs * images / unit))
    return Estimate(value, sem, ops.zeros_like(value), None, num_matvecs)


@by_example
def row_norms(
    linearization: Linearization | Operator, num_probes: int = 16, probes: str = "gaussian", seed: Seed = 0
) -> Estimate:
    """`‖J_i‖`, the norm of each row of each example's Jacobian: how sensitive each output is to all inputs.

    Args:
        linearization: from `jvpreg.linearize`, or an `Operator`.
        num_probes: products `J u` for each example. If there are at least as many as outputs or as inputs, the result
            is exact.
        probes: the kind of random directions: see `jvpreg.probes.draw`.
        seed: an integer or a `keras.random.SeedGenerator`.

    Returns:
        An `Estimate`, each part `(B, m)` for m outputs. If it is not exact, `value` is the root of an unbiased estimate
        of `‖J_i‖²`, and `sem` its standard error over the probes, to first order.

    Raises:
        ValueError: `num_probes` is less than 2 and not exact, or `probes` is unknown.

    Example:

    >>> import keras, numpy as np, jvpreg
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, kernel_initializer="ones")])
    >>> estimate = jvpreg.estimators.row_norms(jvpreg.linearize(model, np.zeros((1, 4))))
    >>> keras.ops.convert_to_numpy(estimate.value).tolist()
    [[2.0, 2.0]]
    """
    checks.choice("probes", probes, probes_module.KINDS)
    checks.seed("seed", seed, generator=True)
    checks.count("num_probes", num_probes)
    operator = as_operator(linearization)
    outputs, inputs = operator.shape
    if num_probes >= inputs:
        return _exact_norms(operator.matvec(operator.basis()), 0, inputs)
    if num_probes >= outputs and operator.has_transpose:
        rows = operator.rmatvec(operator.transpose.basis())
        return _exact_norms(rows, 2, outputs)
    if num_probes < 2:
        raise checks.invalid("num_probes", "at least 2: one probe has no standard error", num_probes)
    products = operator.matvec(operator.draw(probes, num_probes, seed))
    unit = ops.expand_dims(magnitude(products), -1)
    return root_of_mean(ops.square(products / unit), unit, num_probes)


def _exact_norms(products: Tensor, axis: int, num_matvecs: int) -> Estimate:
    """The norms along an axis of products `(P, B, n)`; of rows, which are P, they are transposed."""
    unit = ops.expand_dims(magnitude(products), -1)
    squares = ops.sum(ops.square(products / unit), axis=axis)
    return exact(unit * ops.sqrt(squares if axis == 0 else ops.transpose(squares)), num_matvecs)
