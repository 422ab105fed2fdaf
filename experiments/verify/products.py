"""What is compared: products with the Jacobian, by jvpreg and by the backend's own autodiff.

Each product is a function of tensors alone, weights among them, so that it can be compiled with none of them constant.
"""

from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

import jvpreg
from jvpreg.engine.transpose import transpose
from jvpreg.testing import compiled


def stateless(model: keras.Model, function: Callable) -> Callable:
    """`function(…)` as `(values, …) -> function(…)`, with those values for the variables of the model."""

    def with_values(values, *tensors):
        with keras.StatelessScope(state_mapping=list(zip(model.variables, values, strict=True))):
            return function(*tensors)

    return with_values


class Products:
    """Products with the Jacobians of one model at one point, as NumPy arrays.

    Args:
        model: with one input and one output.
        x: (B, …).
        jit: whether they run compiled.
    """

    def __init__(self, model: keras.Model, x: Any, jit: bool = False):
        self.model = model
        # In mixed precision, that of the weights: x and vectors are given in it, and Keras casts.
        self.dtype = model.variable_dtype
        self.x = ops.convert_to_tensor(x, self.dtype)
        self.values = [ops.convert_to_tensor(variable.value) for variable in model.variables]
        self.compiled = compiled if jit else lambda function: function

    def linearize(self, x: Any) -> jvpreg.Linearization:
        """The model frozen at `x`; an error where a node has no rule."""
        return jvpreg.linearize(self.model, x, fallback="error")

    def jvp(self, u: Any) -> Any:
        """`J u` by jvpreg."""
        return self._run(lambda x, u: self.linearize(x).jvp(u), u)

    def vjp(self, v: Any) -> Any:
        """`Jᵀ v` by jvpreg."""
        return self._run(lambda x, v: self.linearize(x).vjp(v), v)

    def weight_jvp(self, weights: Sequence, directions: Sequence) -> Any:
        """The derivative along a direction of each of some weights, by jvpreg."""
        return self._run(lambda x, *u: self.linearize(x).jvp(weights=list(zip(weights, u, strict=True))), *directions)

    def completion(self) -> Any:
        """`J x` and the contributions of all intercepts, which sum to `f(x)`, by jvpreg."""

        def complete(x):
            lin = self.linearize(x)
            return lin.jvp(x, taps=lin.intercepts)

        return self._run(complete)

    def outputs(self) -> Any:
        """`f(x)` by the model itself."""
        return self._run(self.model)

    def autodiff_jvp(self, u: Any) -> Any:
        """`J u` by `tf.autodiff.ForwardAccumulator`, `jax.jvp` or `torch.func.jvp`."""
        return self._run(lambda x, u: ops.jvp(self.model, (x,), (u,))[1], u)

    def autodiff_vjp(self, v: Any) -> Any:
        """`Jᵀ v` by reverse mode."""
        return self._run(lambda x, v: transpose(lambda inputs: [self.model(inputs[0])], [x], [v])[0], v)

    def autodiff_weight_jvp(self, weights: Sequence, directions: Sequence) -> Any:
        """The derivative along a direction of each of some weights, as `autodiff_jvp`."""

        def product(x, *u):
            def outputs(*values):
                with keras.StatelessScope(state_mapping=list(zip(weights, values, strict=True))):
                    return self.model(x)

            return ops.jvp(outputs, tuple(ops.convert_to_tensor(weight.value) + 0 for weight in weights), u)[1]

        return self._run(product, *directions)

    def _run(self, function: Callable, *vectors: Any) -> Any:
        tensors = [ops.convert_to_tensor(vector, self.dtype) for vector in vectors]
        product = self.compiled(stateless(self.model, function))(self.values, self.x, *tensors)
        # Autodiff's product with a model in mixed precision has 16 bits.
        assert keras.backend.standardize_dtype(product.dtype) in (self.dtype, self.model.compute_dtype)
        return ops.convert_to_numpy(ops.cast(ops.stop_gradient(product), self.dtype))
