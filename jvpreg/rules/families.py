"""Pushforwards by what an operation is: linear, a slope or a mask at each entry, a sum over its inputs.

An operation with weights in which it is linear is an `Affine`, of `jvpreg.rules.contract`.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

from keras import ops

from jvpreg.common import checks
from jvpreg.common.eager import cast
from jvpreg.common.typing import ArrayLike, Tensor
from jvpreg.rules.contract import Gate, Pushforward
from jvpreg.rules.examples import kept
from jvpreg.rules.folding import as_batch, folded


def linear(function: Callable, **facts: Any) -> Pushforward:
    """The pushforward of an operation that is linear already: the operation itself.

    `function` maps one `(N, …)` tensor or more to one, example by example. The probes are folded into its batch,
    so that a convolution sees one batch of `P·B` tangents and runs once. The `facts` are those of a `Pushforward`.
    """
    return Pushforward(folded(function), **facts)


def identity() -> Pushforward:
    """The pushforward of an operation that passes its input on, or only adds a constant."""
    return Pushforward(lambda tangent: tangent, examples=kept, transposed="itself")


def scale(
    slope: Tensor,
    *frozen: Tensor,
    weights: Iterable[tuple[Any, Callable]] = (),
    finite: bool = True,
    curvature: Callable | None = None,
) -> Pushforward:
    """The pushforward of a smooth elementwise operation; `slope` is its derivative at `x`, `(B, …)`.

    Args:
        slope: the derivative by x.
        *frozen: what the parts of weights need besides, `(B, …)` with as many axes as the slope.
        weights: as of `Pushforward`: a pair for each weight, whose part takes `(tangent, slope, *frozen)`, the tangent
            in the dtype of the slope.
        finite: as of `Pushforward`.
        curvature: as of `Pushforward`: `curvature(x, y)`, the second derivative; found by autodiff if it is not stated.
    """
    for residual in frozen:
        if len(residual.shape) != len(slope.shape):
            raise checks.invalid("frozen", f"tensors with {len(slope.shape)} axes, as the slope has", residual)

    def in_dtype(part: Callable) -> Callable:
        return lambda tangent, *residuals: part(cast(tangent, slope.dtype), *residuals)

    def push(tangent: Tensor, slope: Tensor, *_: Tensor) -> Tensor:
        return as_batch(ops.multiply, tangent, cast(slope, tangent.dtype))

    parts = [(variable, in_dtype(part)) for variable, part in weights]
    facts: dict[str, Any] = {"examples": kept, "finite": finite, "curvature": curvature, "transposed": "itself"}
    return Pushforward(push, slope, *frozen, weights=parts, **facts)


def scale_by(slope: Callable, kernel: Callable, *frozen: Tensor, curvature: Callable | None = None) -> Pushforward:
    """As `scale`, if the backend has one operation for the product.

    Args:
        slope: `slope(*frozen) -> (1, B, …)`, the slope; several tangents share it.
        kernel: `kernel(tangent, *frozen)`, the product for one tangent (1, B, …).
        *frozen: what the slope is computed from, `(B, …)`.
        curvature: as of `scale`.
    """

    def push(tangent: Tensor, *frozen: Tensor) -> Tensor:
        if tangent.shape[0] == 1:
            return kernel(tangent, *frozen)
        return tangent * cast(slope(*frozen), tangent.dtype)

    return Pushforward(push, *frozen, examples=kept, curvature=curvature, transposed="itself")


def gate(mask: Tensor, slope: Any = 1, otherwise: Any = 0) -> Gate:
    """The pushforward with one slope where the boolean `mask` (B, …) holds, and another one elsewhere.

    By default it keeps a tangent where the mask holds, and drops it elsewhere. Slopes are the same for all examples.
    """

    def times(number: ArrayLike, tangent: Tensor) -> Tensor:
        known = number if isinstance(number, (int, float)) else None
        return 0.0 if known == 0 else tangent if known == 1 else number * tangent

    def push(tangent: Tensor, mask: Tensor) -> Tensor:
        # A select, not a product with a cast mask: it takes half the time of a ResNet-50 JVP in a TensorFlow graph. If
        # the backend has a kernel for it, that takes less still.
        return ops.where(mask, times(slope, tangent), times(otherwise, tangent))

    return Gate(push, mask, examples=kept, transposed="itself")


def plus(a: Tensor, b: Tensor) -> Tensor:
    """The sum of two tangents. Keras' own would round one of complex128 to complex64."""
    return a + b if a.dtype == b.dtype else ops.add(a, b)


def each_input(*parts: Callable | None) -> Callable:
    """The function of a pushforward that sums a part for each input that has a tangent; it takes None for the others.

    Args:
        *parts: for each input, `part(tangent, *residuals) -> tangent`, linear in the tangent `(P, *input.shape)`; None
            for an input that has no tangents, as an index has none.
    """

    def push(*arguments: Tensor) -> Tensor:
        tangents, residuals = arguments[: len(parts)], arguments[len(parts) :]
        moved = [(part, t) for part, t in zip(parts, tangents, strict=True) if part is not None and t is not None]
        return functools.reduce(plus, [part(tangent, *residuals) for part, tangent in moved])

    return push
