"""A function of a linearization, compiled by Keras on every backend."""

from collections.abc import Callable

import keras
from keras import ops, tree

from jvpreg.freeze import linearize
from jvpreg.inputs import standardize_inputs


class Measurement(keras.Model):
    """A function of the linearization of a model at `x`, as a model that Keras compiles once.

    It follows the current weights, and runs the measured model as in inference.

    Args:
        base: the measured model.
        function: a `Linearization` to a dict of tensors `(B, …)`, or a dict of such dicts.
    """

    def __init__(self, base, function: Callable):
        # Named, because Keras would make a scope's name of the class's, which the base may have too.
        super().__init__(autocast=False, name="measurement")
        self.base = base
        self.function = function
        self.built = True
        # TensorFlow's XLA has no eigenvalues of a general matrix.
        self.compile(jit_compile=False if keras.backend.backend() == "tensorflow" else "auto")

    def call(self, x):
        """The function, of the linearization at `x`."""
        if any(isinstance(leaf, keras.KerasTensor) for leaf in tree.flatten(x)):
            return {"symbolic": keras.KerasTensor((tree.flatten(x)[0].shape[0],))}
        return self.function(linearize(self.base, x, training=False))

    def first_example(self, x) -> dict:
        """What it is of the first example of the batch `x`, uncompiled.

        Raises:
            NotImplementedError: the model cannot be linearized.
            ValueError: the batch does not fit the model, or the function does not.
        """
        try:
            standardize_inputs(self.base, x)
        except ValueError as error:
            raise ValueError(f"The batch of `JacobianProbe` does not fit the model. {error}") from error
        # Activity losses of the example must not stay behind in the layers.
        with keras.StatelessScope():
            found = self.function(linearize(self.base, tree.map_structure(lambda leaf: leaf[:1], x), training=False))
            return tree.map_structure(ops.convert_to_numpy, found)

    def is_finite(self, x) -> bool:
        """Whether the measured model's outputs are, uncompiled."""
        with keras.StatelessScope():
            outputs = self.base(tree.map_structure(ops.convert_to_tensor, x), training=False)
        return all(bool(ops.all(ops.isfinite(leaf))) for leaf in tree.flatten(outputs))
