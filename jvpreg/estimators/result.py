"""What an estimator returns."""

from typing import Any, NamedTuple


class Estimate(NamedTuple):
    """A value for each example, and how far it may be off.

    Attributes:
        value: `(B,)`.
        sem: standard error of `value` over the random probes, `(B,)`; 0 where the value is exact.
        residual: `(B,)`, for iterations: how far the pair found is from a singular pair, `‖Jᵀu − σv‖`; 0 otherwise.
        num_matvecs: products with `J` or `Jᵀ` that were spent on each example.
    """

    value: Any
    sem: Any
    residual: Any
    num_matvecs: int
