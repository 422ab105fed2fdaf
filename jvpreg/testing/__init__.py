"""Checks that a pushforward rule is right, for the package's rules and for a user's own."""

import contextlib
from collections.abc import Callable, Iterator

import keras
import numpy as np
from keras import ops

from jvpreg.common import checks, keras_private
from jvpreg.common.typing import Seed, Shapes
from jvpreg.products import BatchStatistics
from jvpreg.testing.case import Case

__all__ = ["check_rule", "compiled", "float64"]


def check_rule(
    layer: keras.Layer,
    input_shape: Shapes,
    *,
    batch_size: int = 3,
    training: bool = False,
    batch_statistics: BatchStatistics | None = None,
    jit: bool = False,
    reference: Callable | None = None,
    tolerance: float = 1e-10,
    seed: int = 0,
) -> None:
    """Checks a layer's rule, in float64: one line tests a rule that you wrote.

    Checks, in this order: the primal against the layer's own call; the pullback against un-jitted autodiff; the
    pushforward against central finite differences; several probes against one; linearity; adjointness
    `⟨J u, v⟩ = ⟨u, Jᵀ v⟩`; completeness `f(x) = J x + Σ contributions`; the kernel of an `Affine` with a slope for each
    channel; one example taken out of the batch; that the rule has a part for every trainable weight that matters; the
    pushforward of each weight; and the gradient of the penalty `‖J u‖²` by the input and the weights against central
    finite differences.

    Args:
        layer: a layer, which is copied through its config, in float64, with new random weights; or a model, which is
            used as it is and must be of float64.
        input_shape: without the batch; a list of shapes for several inputs.
        batch_size: B.
        training: as in `linearize`.
        batch_statistics: as in `linearize`.
        jit: whether the engine runs compiled (XLA; `torch.compile`). The reference never does.
        reference: `reference(*inputs) -> outputs`, the map whose Jacobian is expected; by default the layer itself.
        tolerance: the largest relative error. Only for finite differences it is always 1e-6.
        seed: of inputs, weights and directions.

    Raises:
        AssertionError: the rule is wrong; the message says which check failed.
        RuntimeError: the backend cannot compute in float64.

    Example:

    >>> import keras, jvpreg
    >>> jvpreg.testing.check_rule(keras.layers.Dense(4, activation="tanh"), (3,))
    """
    if not isinstance(layer, keras.Layer):
        raise checks.invalid("layer", "a Keras layer or model", layer)
    shapes = input_shape if isinstance(input_shape, list) else [input_shape]
    if not shapes or not all(isinstance(s, (tuple, list)) and all(map(checks.is_integer, s)) for s in shapes):
        raise checks.invalid("input_shape", "a shape without the batch, or a list of them", input_shape)
    checks.count("batch_size", batch_size)
    checks.boolean("jit", jit)
    checks.function("reference", reference, "a function of the inputs", optional=True)
    checks.number("tolerance", tolerance, above=0)
    checks.seed("seed", seed)
    with float64():
        _check_rule(layer, input_shape, batch_size, training, batch_statistics, jit, reference, tolerance, seed)


def _check_rule(
    layer: keras.Layer,
    input_shape: Shapes,
    batch_size: int,
    training: bool,
    batch_statistics: BatchStatistics | None,
    jit: bool,
    reference: Callable | None,
    tolerance: float,
    seed: Seed,
) -> None:
    shapes = [input_shape] if isinstance(input_shape, tuple) else list(input_shape)
    random = np.random.default_rng(seed)
    if not isinstance(layer, keras.Model):
        layer = type(layer).from_config({**layer.get_config(), "dtype": "float64"})
    inputs = [ops.convert_to_tensor(random.normal(size=(batch_size, *shape))) for shape in shapes]
    packed = inputs if len(inputs) > 1 else inputs[0]
    layer(packed)
    for variable in layer.variables:
        if "seed" not in variable.path:
            low = 0.5 if "variance" in variable.path else -0.8
            variable.assign(random.uniform(low, low + 1.6, size=variable.shape))
    case = Case(layer, inputs, training, batch_statistics, reference, random, tolerance)
    run = compiled if jit else lambda function: function
    case.check_products(run)
    case.check_weights(run)
    case.check_penalty_gradient(run)


@contextlib.contextmanager
def float64() -> Iterator[None]:
    """A context in which Keras computes in float64: models made in it are of float64, on every backend.

    Raises:
        RuntimeError: the backend cannot.

    Example:

    >>> import keras, jvpreg
    >>> with jvpreg.testing.float64():
    ...     keras.layers.Dense(2).compute_dtype
    'float64'
    """
    if keras.backend.standardize_dtype(ops.convert_to_tensor(np.zeros(1)).dtype) != "float64":
        raise RuntimeError(
            "Checks are computed in float64, which this backend has turned off. On JAX, call "
            '`jax.config.update("jax_enable_x64", True)` first, or set JAX_ENABLE_X64=1.'
        )
    floatx, policy = keras.config.floatx(), keras.config.dtype_policy()
    try:
        keras.config.set_floatx("float64")
        keras.config.set_dtype_policy("float64")
        with keras_private.float64_kept():
            yield
    finally:
        keras.config.set_floatx(floatx)
        keras.config.set_dtype_policy(policy)


def compiled(function: Callable) -> Callable:
    """The function, compiled by the backend: XLA on TensorFlow and JAX, `torch.compile` on Torch."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        return tf.function(function, jit_compile=True, autograph=False)
    if backend == "jax":
        import jax

        return jax.jit(function)
    import torch

    return torch.compile(function)
