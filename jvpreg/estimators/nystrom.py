"""XNysTrace: the trace of a positive semidefinite operator by Nyström approximations, each without one vector."""

import keras
import numpy as np
from keras import ops

from jvpreg.common.typing import Tensor


def xnystrace(omega: Tensor, y: Tensor) -> Tensor:
    """Estimates of the trace `(B, m)`, one for each vector left out: its mean is unbiased.

    With `Y = A Ω` and `H = Ωᵀ Y`, the approximation `Y H⁻¹ Yᵀ` is exact on the space of Ω. Without the i-th vector it
    loses the part of the i-th column of `H⁻¹`, and what `A` has beside it is estimated by that vector alone.

    Args:
        omega: random vectors on the sphere of radius √n, the rows of `(B, m, n)`.
        y: their images by `A`, with entries of about 1.

    Reference: Epperly, Tropp & Webber (2024), "XTrace", section 2.3.
    """
    batch, count, size = ops.shape(omega)
    precision = float(np.finfo(keras.backend.standardize_dtype(omega.dtype)).eps)
    # A small multiple of the identity is added, and its trace taken off: H could be singular.
    length = ops.norm(ops.reshape(y, (batch, -1)), axis=-1)
    shift = ops.reshape(ops.where(length > 0, length, 1.0) * (precision / size**0.5), (-1, 1, 1))
    y = y + shift * omega
    columns = ops.transpose(omega, (0, 2, 1))
    h, gram = ops.matmul(y, columns), ops.matmul(omega, columns)
    # Both at once: on JAX on a CPU, two batches of decompositions side by side can wait for each other's threads.
    values, vectors = ops.eigh(ops.concatenate([(h + ops.transpose(h, (0, 2, 1))) / 2, gram]))
    vectors = vectors / ops.expand_dims(ops.sqrt(ops.maximum(values, precision * values[:, -1:])), 1)
    root, other = vectors[:batch], vectors[batch:]  # V with V Vᵀ = H⁻¹, and the same of ΩᵀΩ
    factor = ops.matmul(ops.transpose(root, (0, 2, 1)), y)  # the approximation is that of `factorᵀ factor`
    own = ops.sum(ops.square(root), axis=-1)
    lost = ops.sum(ops.square(ops.matmul(root, factor)), axis=-1) / own
    # Only the part of the vector that is orthogonal to the others counts: it is stretched to its average length.
    rest = (size - count + 1) * ops.sum(ops.square(other), axis=-1) / own
    known = ops.sum(ops.square(factor), axis=(1, 2))
    return ops.expand_dims(known - size * shift[:, 0, 0], -1) - lost + rest
