"""The right answer: the penalty of each example in float64, by the backend's autodiff, never jitted."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, Literal

import keras
import numpy as np
from keras import ops

import jvpreg
from experiments.benchmark import autodiff
from experiments.benchmark.directions import known_directions

Derivative = Literal["moving", "frozen", "coupled"]


class Reference:
    """A model in float64, and the penalties of its Jacobian at a batch.

    Args:
        model: the model.
        derivative: what its batch normalization does; see `Normalization`.
        x: the batch, `(B, …)`.
    """

    def __init__(self, model: keras.Model, derivative: Derivative, x: np.ndarray):
        def layer_in_float64(layer: Any) -> Any:
            if isinstance(layer, keras.layers.BatchNormalization):
                return Normalization(layer, derivative)
            return type(layer).from_config({**layer.get_config(), "dtype": "float64"})

        with float64():
            self.x = ops.convert_to_tensor(x, dtype="float64")
            self.model = keras.models.clone_model(
                model, input_tensors=keras.Input(x.shape[1:], dtype="float64"), clone_function=layer_in_float64
            )
            self.model.set_weights(model.get_weights())
            self.weights = [ops.convert_to_numpy(variable) for variable in self.model.trainable_variables]
            outputs = np.float32(ops.convert_to_numpy(self.model(self.x)))
        self.like = {"input": x, "output": outputs}

    @contextlib.contextmanager
    def moved(self, step: list[np.ndarray]) -> Iterator[None]:
        """Keras and the backend compute in float64, and the weights are moved by `step`."""
        with float64():
            for variable, weight, change in zip(self.model.trainable_variables, self.weights, step, strict=True):
                variable.assign(weight + change)
            yield

    def penalties(self, side: Literal["input", "output"], num_probes: int, step: list[np.ndarray]) -> np.ndarray:
        """The penalty of each example at the weights moved by `step`, in the known directions at `step` 0: `(B,)`."""
        product = autodiff.forward if side == "input" else autodiff.backward
        # As the entry draws them: in float32, of its own inputs and outputs.
        directions = ops.convert_to_numpy(known_directions(self.like[side], num_probes))
        norms = []
        with self.moved(step):
            for vector in ops.convert_to_tensor(directions, dtype="float64"):
                _, products = product(self.model, self.x, functools.partial(_given, vector))
                products = ops.convert_to_numpy(products)
                norms.append(np.sum(products**2, axis=tuple(range(1, products.ndim))))
        return np.mean(norms, axis=0)


class Normalization(keras.layers.Layer):
    """Batch normalization with a derivative that is chosen.

    Args:
        layer: the layer whose place it takes.
        derivative: "moving" statistics, or those of the batch, which to a tangent are constant ("frozen") or move
            along ("coupled").
    """

    def __init__(self, layer: keras.layers.BatchNormalization, derivative: Derivative):
        super().__init__(name=layer.name, dtype="float64", trainable=layer.trainable)
        self.epsilon, self.derivative = layer.epsilon, derivative

    def build(self, shape):
        """The variables of `keras.layers.BatchNormalization`, in its order."""
        size = (shape[-1],)
        self.gamma, self.beta = self.add_weight(size, name="gamma"), self.add_weight(size, name="beta")
        self.mean = self.add_weight(size, name="mean", trainable=False)
        self.variance = self.add_weight(size, name="variance", trainable=False)

    def call(self, x, mask=None):
        """`x` (B, …, C), standardized along all axes but the last, scaled and shifted. Keras passes `mask` None."""
        if self.derivative == "moving":
            mean, variance = ops.convert_to_tensor(self.mean), ops.convert_to_tensor(self.variance)
        else:
            axes = list(range(len(x.shape) - 1))
            # Not `ops.moments`: on TensorFlow its mean has no gradient of its own.
            mean = ops.mean(x, axis=axes)
            variance = ops.mean(ops.square(x - mean), axis=axes)
        if self.derivative == "frozen":
            mean, variance = ops.stop_gradient(mean), ops.stop_gradient(variance)
        return self.gamma * (x - mean) / ops.sqrt(variance + self.epsilon) + self.beta


def _given(vector: Any, like: Any) -> Any:
    return vector


@contextlib.contextmanager
def float64() -> Iterator[None]:
    """Keras and the backend compute in float64."""
    with contextlib.ExitStack() as stack:
        if keras.backend.backend() == "jax":
            import jax

            x64: Any = jax if hasattr(jax, "enable_x64") else jax.experimental  # by the version of JAX
            stack.enter_context(x64.enable_x64(True))
        stack.enter_context(jvpreg.testing.float64())
        yield
