"""The operations of `keras.ops`, as they stand between the layers of a graph, or within a layer that is opened up.

Here the first axis of a value need not be the batch, and some inputs are weights or constants of any shape: a tangent
is `(P, *primal.shape)`, and operations of several inputs sum one linear map for each input that has a tangent.
"""

from jvpreg.rules.ops import (
    elementwise,
    fourier,
    imaging,
    linear_algebra,
    losses,
    moving,
    operands,
    placing,
    products,
    reducing,
    selecting,
    without_tangent,
    written_out,
)

__all__ = [
    "elementwise",
    "fourier",
    "imaging",
    "linear_algebra",
    "losses",
    "moving",
    "operands",
    "placing",
    "products",
    "reducing",
    "selecting",
    "without_tangent",
    "written_out",
]
