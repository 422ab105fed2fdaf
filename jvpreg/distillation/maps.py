"""Maps: feature maps with their channels summed, `(B, *sizes)`; and how two of them get the same size."""

from collections.abc import Sequence

import numpy as np
from keras import ops

from jvpreg.common.typing import Tensor


def shrink(tensor: Tensor, sizes: Sequence[int], keep_sum: bool) -> Tensor:
    """A map `(B, …)` on fewer positions, `(B, *sizes)`: each new one stands for the area that it covers.

    By matrix products, which have gradients of any order on every backend.

    Args:
        tensor: the map.
        sizes: at most its own, axis by axis.
        keep_sum: whether a new position gets the sum of what it covers; otherwise the mean.
    """
    for axis, size in enumerate(sizes, start=1):
        length = tensor.shape[axis]
        if size != length:
            cover = ops.convert_to_tensor(coverage(length, size, keep_sum), dtype=tensor.dtype)
            moved = ops.moveaxis(tensor, axis, -1)
            tensor = ops.moveaxis(ops.matmul(moved, cover), -1, axis)
    return tensor


def alike(teacher: Tensor, student: Tensor, keep_sum: bool) -> tuple:
    """Two maps, each shrunk to the smaller of the two sizes, axis by axis."""
    sizes = [min(a, b) for a, b in zip(teacher.shape[1:], student.shape[1:], strict=True)]
    return shrink(teacher, sizes, keep_sum), shrink(student, sizes, keep_sum)


def coverage(length: int, size: int, keep_sum: bool) -> np.ndarray:
    """The part of each of `length` positions that each of `size` longer positions covers, `(length, size)`."""
    edges, new_edges = np.arange(length + 1), np.linspace(0.0, length, size + 1)
    start = np.maximum(edges[:-1, None], new_edges[:-1])
    stop = np.minimum(edges[1:, None], new_edges[1:])
    overlap = np.clip(stop - start, 0.0, None)
    return overlap if keep_sum else overlap * size / length
