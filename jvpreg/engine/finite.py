"""Which examples of a batch are finite, and NaN in place of what is computed for the others.

The Jacobian may be finite where the input is not: the slope of ReLU at NaN is 0. So whatever is computed from the
Jacobian becomes NaN for an example whose input or output is not finite.
"""

import math

import keras
from keras import ops, tree

from jvpreg.common.dtypes import has_tangents
from jvpreg.engine.frozen_model import FrozenModel


def finite_examples(linearization: FrozenModel):
    """Whether all inputs and outputs of each example are finite: `(B,)`."""
    found = ops.ones((ops.shape(linearization.inputs[0])[0],), "bool")
    # Not the outputs alone: a ReLU that TensorFlow fuses with a product makes 0 of NaN.
    for leaf in (*linearization.inputs, *tree.flatten(linearization.outputs)):
        if has_tangents(leaf):
            finite, axes = ops.isfinite(leaf), tuple(range(1, len(leaf.shape)))
            found = ops.logical_and(found, ops.all(finite, axis=axes) if axes else finite)
    return found


def nan_unless(finite, tensor, axis: int = 0):
    """A tensor with NaN, or False, for examples that are not finite; `axis` is that of the examples."""
    rows = ops.reshape(finite, [-1 if i == axis else 1 for i in range(len(tensor.shape))])
    dtype = keras.backend.standardize_dtype(tensor.dtype)
    if dtype == "bool":
        return ops.logical_and(tensor, rows)
    nan = ops.convert_to_tensor(math.nan, "float32")
    # A complex number has two parts.
    nan = ops.cast(nan, dtype) * (1 + 1j) if "complex" in dtype else ops.cast(nan, dtype)
    return ops.where(rows, tensor, nan)
