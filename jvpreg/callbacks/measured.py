"""What a `JacobianProbe` keeps of what a metric returned: an `Estimate` or a `SpectralDensity` of arrays."""

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, TypeVar

import keras
import numpy as np
from keras import ops

from jvpreg.common.typing import Tensor
from jvpreg.engine.finite import nan_unless
from jvpreg.estimators import Estimate, SpectralDensity

Result: TypeAlias = Estimate | SpectralDensity

Measured: TypeAlias = Mapping[str, Result]
"""The result of each metric, by the metric's name in `JacobianProbe.values`; each part that is not None is `(B, …)`."""

R = TypeVar("R", bound=Result)


def kept(found: Any, finite: Tensor) -> Result:
    """The parts `(B, …)` that are read later, as floats: NaN for examples that are not finite.

    Args:
        found: what a metric returned.
        finite: `(B,)`, which examples are.

    Raises:
        ValueError: it is not a number, or several, for each example.
    """
    if isinstance(found, SpectralDensity):
        result: Result = found._replace(num_matvecs=None)
    elif isinstance(found, Estimate):
        result = Estimate(found.value, converged=_of_numbers(found.converged, found.value))
    else:
        result = Estimate(ops.convert_to_tensor(found))

    def as_floats(part: Tensor) -> Tensor:
        if len(part.shape) == 0 or part.shape[0] != finite.shape[0]:
            raise ValueError(
                f"Expected a number, or several, for each of {finite.shape[0]} examples. "
                f"Received: a tensor of shape {tuple(part.shape)}."
            )
        is_complex = "complex" in keras.backend.standardize_dtype(part.dtype)
        return nan_unless(finite, ops.cast(part, "complex64" if is_complex else "float32"))

    return each_part(as_floats, result)


def _of_numbers(converged: Tensor | None, value: Tensor) -> Tensor | None:
    """`converged` as floats: NaN where the value is, since ReLU may hide from the outputs what is not finite."""
    if converged is None:
        return None
    return ops.where(ops.not_equal(value, value), math.nan, ops.cast(converged, "float32"))


def each_part(function: Callable, result: R) -> R:
    """The result with a function of each part that it has."""
    return type(result)(*(None if part is None else function(part) for part in result))


def as_parts(result: Result) -> dict[str, Any]:
    """The parts that a result has: files hold arrays only, and what Keras compiles returns tensors only."""
    return {name: part for name, part in result._asdict().items() if part is not None}


def from_parts(parts: Mapping[str, Any]) -> Result:
    """The result with these parts."""
    return SpectralDensity(**parts) if "points" in parts else Estimate(**parts)


def nothing_like(result: R, size: int) -> R:
    """NaN in the shapes of a result, for a batch of another size."""
    # Times NaN: a complex number has two parts.
    return each_part(lambda part: math.nan * np.ones((size, *np.shape(part)[1:]), part.dtype), result)
