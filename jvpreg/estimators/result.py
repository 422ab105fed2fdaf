"""What an estimator returns."""

from typing import Any, NamedTuple


class Estimate(NamedTuple):
    """A value for each example, and how far it may be off.

    Of an example of which an input or an output is not finite, value, error and residual are NaN, and nothing has
    converged.

    Attributes:
        value: `(B,)`, or `(B, k)` for several singular values or eigenvalues.
        sem: standard error of `value` over the random probes, like it; 0 where nothing was drawn at random.
        residual: like `value`, for iterations: how far what was found is from what it stands for, as the estimator
            says; 0 where nothing was iterated.
        converged: like `value`, boolean: whether `residual` is within the tolerance.
        num_matvecs: products with `J` or `Jᵀ` that were spent on each example: an integer, or a scalar tensor where
            the number depends on when the iteration converged.
        vectors: what belongs to the values, where the estimator says so; else None.
    """

    value: Any
    sem: Any
    residual: Any
    converged: Any
    num_matvecs: Any
    vectors: Any = None
