"""A function of a linearization, compiled by Keras on every backend, and the batch on which it is measured."""

import numbers
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from jvpreg.common import replicas
from jvpreg.common.typing import ArrayLike, Structure
from jvpreg.engine.inputs import standardize_inputs
from jvpreg.products import linearize


class Measurement(keras.Model):
    """A function of the linearization of a model at `x`, as a model that Keras compiles once.

    It uses the current weights, and runs the measured model in inference mode.

    Args:
        base: the measured model.
        function: a `Linearization` to a dict of tensors `(B, …)`, or a dict of such dicts.
    """

    def __init__(self, base: keras.Model, function: Callable):
        # The name is given: Keras would make one from the class's name, and the base may have the same.
        super().__init__(autocast=False, name="measurement")
        self.base = base
        self.function = function
        self.built = True
        self._undivided: Callable | None = None
        # TensorFlow's XLA cannot compute eigenvalues of a general matrix.
        self.compile(jit_compile=False if keras.backend.backend() == "tensorflow" else "auto")

    def call(self, x: Structure) -> Structure:
        """The function at the linearization at `x`."""
        if any(isinstance(leaf, keras.KerasTensor) for leaf in tree.flatten(x)):
            return {"symbolic": keras.KerasTensor((tree.flatten(x)[0].shape[0],))}
        return self.function(linearize(self.base, x, training=False))

    def make_predict_function(self, force: bool = False) -> Callable:
        """As Keras'. In the scope of a strategy with several replicas, each of them would measure the whole batch."""
        if not replicas.is_scope():
            return super().make_predict_function(force)
        if self._undivided is None or force:
            self._undivided = replicas.undivided(lambda data: self.predict_step(data[0]))
        self.predict_function = self._undivided
        return self.predict_function

    def first_example(self, x: Structure) -> dict:
        """The function's result for the first example of the batch `x`, uncompiled.

        Raises:
            NotImplementedError: the model cannot be linearized.
            ValueError: the batch does not fit the model, or the function does not.
        """
        try:
            standardize_inputs(self.base, x)
        except ValueError as error:
            raise ValueError(f"The batch of `JacobianProbe` does not fit the model. {error}") from error
        # Activity losses of the example must not stay in the layers.
        with keras.StatelessScope():
            found = self.function(linearize(self.base, tree.map_structure(lambda leaf: leaf[:1], x), training=False))
            return tree.map_structure(ops.convert_to_numpy, found)

    def is_finite(self, x: Structure) -> bool:
        """Whether the outputs of the measured model are finite, uncompiled."""
        with keras.StatelessScope():
            outputs = self.base(tree.map_structure(ops.convert_to_tensor, x), training=False)
        return all(bool(ops.all(ops.isfinite(leaf))) for leaf in tree.flatten(outputs))


def as_arrays(x: Structure) -> Structure:
    """A batch as NumPy arrays, whichever library its tensors are of.

    Raises:
        ValueError: it is not a batch of numbers.
    """
    # A list of numbers, or of lists of numbers, is one array; any other list is a list of inputs.
    rows = isinstance(x, (list, tuple)) and all(isinstance(leaf, numbers.Number) for leaf in tree.flatten(x))
    return as_array("x", x) if rows else tree.map_structure(lambda leaf: as_array("x", leaf), x)


def as_array(argument: str, given: ArrayLike) -> np.ndarray:
    """A tensor of any library as an array.

    Raises:
        ValueError: it is not a tensor, or not of numbers.
    """
    array: Any = None
    if isinstance(given, (list, tuple)) or hasattr(given, "__array__"):
        try:
            # Torch refuses to convert a tensor that has a gradient or lies on a GPU.
            array = np.asarray(given.detach().cpu() if hasattr(given, "detach") else given)
        # For example lists of different lengths, numbers that NumPy does not know, ragged tensors.
        except (TypeError, ValueError, RuntimeError):
            array = None
    if array is None or array.ndim == 0 or array.dtype.kind in "OSUMm":
        raise ValueError(
            f"Invalid value for argument `{argument}`. Expected arrays or tensors of numbers, (B, …). "
            f"Received: {type(given).__name__}{'' if array is None else f' of {array.dtype}, {array.shape}'}. "
            "From a dataset or generator, pass one batch: `next(iter(dataset))`."
        )
    return array
