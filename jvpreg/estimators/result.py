"""What an estimator returns."""

from typing import NamedTuple

from keras import ops

from jvpreg.common.typing import Structure, Tensor


class Estimate(NamedTuple):
    """A value for each example, and how far it may be off.

    For an example with an input or an output that is not finite, value, error and residual are NaN, and nothing has
    converged. The estimators of `jvpreg.estimators` give all parts but those that are said to be None; one of your own
    may leave out what it does not know.

    Attributes:
        value: `(B,)`, or `(B, k)` for several singular values or eigenvalues.
        sem: standard error of `value` over the random probes, like it; 0 if nothing was random.
        residual: like `value`, for iterations: how far the value found is from the true one, as each estimator defines
            it; 0 if nothing was iterated.
        converged: like `value`, boolean: whether `residual` is within the tolerance. None if the estimator never
            iterates.
        num_matvecs: products with `J` or `Jᵀ` that were computed for each example: an integer, or a scalar tensor if
            the number depends on when the iteration converged.
        vectors: the vectors that belong to the values, if the estimator returns any; otherwise None.
    """

    value: Tensor
    sem: Tensor = None
    residual: Tensor = None
    converged: Tensor = None
    num_matvecs: int | Tensor = None
    vectors: Structure = None


def exact(value: Tensor, num_matvecs: int) -> Estimate:
    """An estimate from the whole matrix: nothing was random, and nothing iterated."""
    zero = ops.zeros_like(value)
    return Estimate(value, zero, zero, None, num_matvecs)
