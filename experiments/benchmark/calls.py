"""Compiled calls of functions of tensors, as they are timed."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

import jvpreg


def prepared(
    model: keras.Model, function: Callable, jit: bool | None, tensors: Sequence[np.ndarray]
) -> Callable[[], Any]:
    """`function(values, *tensors)` as a call without arguments, which waits for what it returns.

    Args:
        model: whose variables have the `values`.
        function: takes the values, and tensors; see `experiments.verify.products.stateless`.
        jit: see `compiled`.
        tensors: what it is called with.
    """
    # A partial, because TensorFlow takes functions of one code for one that is traced again, and warns.
    jitted = compiled(functools.partial(function), jit)
    # As arguments, so that nothing of them is computed when compiling.
    held, given = values(model), [ops.convert_to_tensor(tensor) for tensor in tensors]

    def call() -> Any:
        results = jitted(held, *given)
        wait(results)
        return results

    return call


def values(model: keras.Model) -> list:
    """Of the model's variables, as tensors; on Torch, without a graph of autodiff's."""
    return [ops.stop_gradient(ops.convert_to_tensor(variable.value)) for variable in model.variables]


def compiled(function: Callable, jit: bool | None) -> Callable:
    """The function by XLA, or by `torch.compile`; or else as a graph on TensorFlow, and as it is on JAX and Torch.

    With None it stays as it is.
    """
    if jit:
        return jvpreg.testing.compiled(function)
    if jit is None or keras.backend.backend() != "tensorflow":
        return function
    import tensorflow as tf

    return tf.function(function, autograph=False)


def wait(results: Any) -> None:
    """Wait until results are computed: JAX returns before, and so does every backend on a GPU."""
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        jax.block_until_ready(results)
    elif backend == "tensorflow":
        import tensorflow as tf

        tf.test.experimental.sync_devices()
    else:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
