"""Which dtypes have tangents, and which of several holds them all."""

import keras
from keras import ops

from jvpreg.common.typing import Tensor


def as_floats(tensors: list) -> list:
    """Inputs or outputs, integers as floats, so that tangents and probes can be like them. Integers do not count."""
    return [x if has_tangents(x) else ops.cast(x, keras.config.floatx()) for x in tensors]


def has_tangents(tensor: Tensor) -> bool:
    """Whether a tensor holds real or complex numbers, which can have a tangent."""
    return keras.backend.is_float_dtype(keras.backend.standardize_dtype(tensor.dtype)) or is_complex(tensor)


def is_complex(tensor: Tensor) -> bool:
    """Whether a tensor holds complex numbers."""
    return "complex" in keras.backend.standardize_dtype(tensor.dtype)


def widest_dtype(tensors: list) -> str:
    """The dtype of a vector that holds the entries of all of them without rounding: float32 at least."""
    dtypes = [keras.backend.standardize_dtype(x.dtype) for x in tensors if has_tangents(x)]
    complex_dtypes = [dtype for dtype in dtypes if "complex" in dtype]
    # Keras would combine complex128 and float32 into complex64.
    return max(complex_dtypes, key=len) if complex_dtypes else keras.backend.result_type("float32", *dtypes)
