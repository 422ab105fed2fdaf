"""Pushforwards by what an operation is: linear, affine, a slope at each entry, a mask."""

from collections.abc import Callable, Iterable
from typing import Any

from keras import ops

from jvpreg.eager import cast, shape_of
from jvpreg.examples import kept
from jvpreg.folding import as_batch, each_probe, fold, unfold
from jvpreg.rules.contract import Pushforward


def linear(function: Callable) -> Pushforward:
    """The pushforward of an operation that is linear already: the operation itself.

    `function` maps one `(N, …)` tensor or more to one, example by example. The probes are folded into its batch,
    so that a convolution sees one batch of `P·B` tangents and runs once.
    """

    def push(*tangents):
        num_probes = shape_of(tangents[0])[0]
        return unfold(function(*(fold(tangent) for tangent in tangents)), num_probes)

    return Pushforward(push)


def affine(function: Callable, x, weights: Iterable[tuple[Any, Callable]], **arguments: Any) -> Pushforward:
    """As `linear`, for an operation with weights, in which it is linear too.

    `weights` pairs each variable (or None, which is left out) with `part(tangent, x)`: what the operation returns with
    one tangent of the variable, `(*shape,)`, in its place, at the input `x` (B, …), and without the other weights. The
    other arguments are those of `Pushforward`.
    """
    push = linear(function).function

    def probed(part):
        return lambda tangent, x: each_probe(lambda row: part(ops.cast(row, x.dtype), x[0]))(tangent)

    parts = [(variable, probed(part)) for variable, part in weights]
    return Pushforward(lambda tangent, x: push(tangent), x, weights=parts, **arguments)


def scale(slope) -> Pushforward:
    """The pushforward of a smooth elementwise operation; `slope` is its derivative at `x`, `(B, …)`."""

    def push(tangent, slope):
        return as_batch(ops.multiply, tangent, cast(slope, tangent.dtype))

    return Pushforward(push, slope, examples=kept)


def scale_by(slope: Callable, kernel: Callable, *frozen) -> Pushforward:
    """As `scale`, where the backend has one operation for the product.

    Args:
        slope: `slope(*frozen) -> (1, B, …)`, by which several tangents are multiplied: it is made once for all.
        kernel: `kernel(tangent, *frozen)`, the product for one tangent (1, B, …).
        *frozen: what the slope follows from, `(B, …)`.
    """

    def push(tangent, *frozen):
        if tangent.shape[0] == 1:
            return kernel(tangent, *frozen)
        return tangent * cast(slope(*frozen), tangent.dtype)

    return Pushforward(push, *frozen, examples=kept)


def gate(mask) -> Pushforward:
    """The pushforward that keeps a tangent where the boolean `mask` (B, …) holds and drops it elsewhere."""
    # A select, not a product with a cast mask: half the time of a ResNet-50 JVP in a TensorFlow graph. A kernel of the
    # backend's, where there is one, takes less still.
    return Pushforward(lambda tangent, mask: ops.where(mask, tangent, 0.0), mask, examples=kept)


def identity() -> Pushforward:
    """The pushforward of an operation that passes its input on, or only adds a constant."""
    return Pushforward(lambda tangent: tangent, examples=kept)
