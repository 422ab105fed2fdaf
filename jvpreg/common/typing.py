"""Names for what signatures take and return.

Keras has no type that is common to the tensors of its backends, nor one for what it can make a tensor of: to a type
checker, most of these are `Any`. Their names tell a reader what is meant.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import keras

Tensor: TypeAlias = Any
"""A tensor of the backend's, symbolic or not, or a `keras.Variable`."""

ArrayLike: TypeAlias = Any
"""What `keras.ops.convert_to_tensor` takes: a tensor, a NumPy array, a number, or nested lists of numbers."""

Structure: TypeAlias = Any
"""An array or tensor, or a nested list, tuple or dict of them, as `keras.tree` knows it."""

Shape: TypeAlias = tuple[int | None, ...]
"""Of one tensor, None where a dimension is not known."""

Shapes: TypeAlias = Any
"""A shape, or a nested list, tuple or dict of them."""

DType: TypeAlias = Any
"""A name, such as `"float32"`, or a dtype of the backend's or of NumPy's."""

Seed: TypeAlias = int | keras.random.SeedGenerator
"""What random numbers are drawn by."""

Config: TypeAlias = dict[str, Any]
"""What `get_config` returns and `from_config` takes."""

Logs: TypeAlias = dict[str, Any]
"""What Keras tells a callback: names of metrics and their values."""

WeightTangents: TypeAlias = Mapping[str, Tensor] | Sequence[tuple[keras.Variable, Tensor]]
"""Tangents of weights: a dict by the variables' paths, or pairs, since Keras' variables cannot be keys."""

DirectionsLike: TypeAlias = Any
"""Indices of features, an array of directions `(P, …)`, or a function of the inputs, or several, that return them."""
