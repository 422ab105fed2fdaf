"""What is compared: products with the Jacobian, by jvpreg and by the backend's own autodiff.

Each product is a function of tensors alone, weights among them, so that it can be compiled with none of them constant.
"""

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

import jvpreg
from jvpreg.testing import compiled
from jvpreg.transpose import transpose


class Products:
    """Products with the Jacobians of one model at one point, as NumPy arrays.

    Args:
        model: with one input and one output.
        x: (B, …).
        jit: whether they run compiled.
    """

    def __init__(self, model: keras.Model, x: Any, jit: bool = False):
        self.model = model
        self.dtype = model.compute_dtype
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

    def weight_jvp(self, weight: Any, direction: Any) -> Any:
        """The derivative along a direction of one weight, by jvpreg."""
        return self._run(lambda x, u: self.linearize(x).jvp(weights=[(weight, u)]), direction)

    def completion(self) -> Any:
        """`J x` and the contributions of all intercepts, which sum to `f(x)`, by jvpreg."""

        def complete(x):
            lin = self.linearize(x)
            # Private: intercepts are pushed together, in one pass.
            taps = {name: ops.expand_dims(intercept, 0) for name, intercept in lin.intercepts.items()}
            return lin._push([ops.expand_dims(x, 0)], taps)[0][0]

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

    def autodiff_weight_jvp(self, weight: Any, direction: Any) -> Any:
        """The derivative along a direction of one weight, as `autodiff_jvp`."""

        def product(x, u):
            def outputs(value):
                with keras.StatelessScope(state_mapping=[(weight, value)]):
                    return self.model(x)

            return ops.jvp(outputs, (ops.convert_to_tensor(weight.value) + 0,), (u,))[1]

        return self._run(product, direction)

    def _run(self, function: Callable, *vectors: Any) -> Any:
        def stateless(values, x, *vectors):
            with keras.StatelessScope(state_mapping=list(zip(self.model.variables, values, strict=True))):
                return function(x, *vectors)

        tensors = [ops.convert_to_tensor(vector, self.dtype) for vector in vectors]
        product = self.compiled(stateless)(self.values, self.x, *tensors)
        assert keras.backend.standardize_dtype(product.dtype) == self.dtype
        return ops.convert_to_numpy(ops.stop_gradient(product))
