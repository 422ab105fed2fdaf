"""The probe axis: in front of the batch, folded into it, and of size 1 before what is frozen."""

from collections.abc import Callable

import keras
from keras import ops, tree

from jvpreg.common.eager import shape_of
from jvpreg.common.typing import Tensor


def fold(tangent):
    """(P, B, …) to (P·B, …)."""
    shape = shape_of(tangent)
    static = isinstance(shape[1], int)
    return ops.reshape(tangent, (shape[0] * shape[1] if static else -1, *shape[2:]))


def unfold(tangent, num_probes):
    """(P·B, …) to (P, B, …)."""
    shape = shape_of(tangent)
    static = isinstance(shape[0], int)
    return ops.reshape(tangent, (num_probes, shape[0] // num_probes if static else -1, *shape[1:]))


def with_probe_axis(residual: Tensor) -> Tensor:
    """(B, …) to (1, B, …)."""
    if keras.backend.backend() != "tensorflow" or len(residual.shape) == 0:
        return ops.expand_dims(residual, 0)
    # Reshaped, as by `unfold`: the optimizer of TensorFlow's graphs removes two reshapes that undo each other.
    return unfold(residual, 1)


def as_batch(function: Callable, tangent, *residuals):
    """`function` of a tangent `(P, B, …)` and residuals `(1, B, …)`; it takes any number of leading axes.

    On TensorFlow it gets them folded, as a convolution does, so that no reshape stands between the two.
    """
    several = residuals and tangent.shape[0] != 1
    if keras.backend.backend() != "tensorflow" or several or any(len(t.shape) < 2 for t in (tangent, *residuals)):
        return function(tangent, *residuals)
    return unfold(function(fold(tangent), *map(fold, residuals)), shape_of(tangent)[0])


def align(tangent, rank: int):
    """A tangent (P, …) with axes of size 1 after the probes, up to `rank`, so that it broadcasts as its primal does."""
    missing = rank - len(tangent.shape)
    if missing <= 0:
        return tangent
    shape = shape_of(tangent)
    return ops.reshape(tangent, (shape[0], *[1] * missing, *shape[1:]))


def folded(function: Callable) -> Callable:
    """A linear `function` of one `(N, …)` tensor or more to one, example by example, as a map of `(P, B, …)`."""

    def push(*tangents):
        num_probes = shape_of(tangents[0])[0]
        return unfold(function(*(fold(tangent) for tangent in tangents)), num_probes)

    return push


def each_probe(function: Callable) -> Callable:
    """A linear `function` of tensors of any shape, to one tensor or a tuple, as a map of `(P, …)` to `(P, …)`.

    For operations whose first axis need not be the batch, so that probes cannot be folded into it.
    """

    def push(*tangents):
        num_probes = tangents[0].shape[0]
        if num_probes is None:
            return ops.map(lambda rows: function(*rows), tangents)
        if num_probes == 1:
            return tree.map_structure(lambda image: ops.expand_dims(image, 0), function(*(t[0] for t in tangents)))
        images = [function(*rows) for rows in zip(*map(ops.unstack, tangents), strict=True)]
        return tree.map_structure(lambda *rows: ops.stack(rows), *images)

    return push


def sum_of_products(frozen, tangent, axes, context):
    """`Σ frozen · tangent` over `axes`, counted from the end and kept, of `(1, B, …)` and `(P, B, …)`."""
    axes = [axes] if isinstance(axes, int) else list(axes)
    if axes == [-1] and context.under_xla:
        # On a CPU, XLA sums a product with a probe axis much more slowly than it computes a dot product.
        return ops.expand_dims(ops.einsum("...i,p...i->p...", frozen[0], tangent), -1)
    return ops.sum(frozen * tangent, axis=axes, keepdims=True)
