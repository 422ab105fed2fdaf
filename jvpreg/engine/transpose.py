"""The transpose of a linear map, by the backend's reverse mode: the one place that touches it."""

import functools
from collections.abc import Callable, Sequence

import keras


def transpose(function: Callable, inputs: Sequence, cotangents: Sequence) -> list:
    """Applies the transpose of a linear map.

    Args:
        function: a linear map from a list of tensors to a list of tensors.
        inputs: tensors with the shapes and dtypes of its inputs; their values do not matter.
        cotangents: one tensor for each of its outputs.

    Returns:
        A list like `inputs`: `functionᵀ(cotangents)`.
    """
    return _TRANSPOSES[keras.backend.backend()](function, list(inputs), list(cotangents))


def _tensorflow(function, inputs, cotangents):
    import tensorflow as tf

    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(inputs)
        outputs = function(inputs)
    gradients = tape.gradient(
        outputs, inputs, output_gradients=cotangents, unconnected_gradients=tf.UnconnectedGradients.ZERO
    )
    # For rows that were looked up, TensorFlow returns the gradient as slices.
    return [tf.convert_to_tensor(gradient) for gradient in gradients]


def _jax(function, inputs, cotangents):
    import jax

    _, pull = jax.vjp(function, inputs)
    return pull(cotangents)[0]


def _torch(function, inputs, cotangents):
    return _recorded_by_torch(function, inputs)(cotangents)


_TRANSPOSES = {"tensorflow": _tensorflow, "jax": _jax, "torch": _torch}


def transposed(function: Callable, inputs: Sequence) -> Callable[[Sequence], list]:
    """The transpose of a linear map, as a function of cotangents that is called many times.

    On Torch the map runs once, at the first call, and is recorded. Other backends run it again at each call: a compiler
    then leaves out what the transpose does not need.

    Args:
        function: as in `transpose`.
        inputs: as in `transpose`.
    """
    if keras.backend.backend() != "torch":
        return lambda cotangents: transpose(function, inputs, cotangents)
    recorded = functools.cache(lambda: _recorded_by_torch(function, list(inputs)))
    return lambda cotangents: recorded()(list(cotangents))


def _recorded_by_torch(function, inputs):
    import torch

    with torch.enable_grad():
        # Inputs that follow from weights stay connected to them: the result is differentiated by the weights too.
        inputs = [x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in inputs]
        outputs = function(inputs)

    def pull(cotangents):
        # An output that no input reaches has no graph, and a zero transpose.
        reached = [(y, v) for y, v in zip(outputs, cotangents, strict=True) if y.requires_grad]
        if not reached:
            return [torch.zeros_like(tensor) for tensor in inputs]
        # A penalty in training differentiates the result once more; probes and evaluation run under `no_grad`.
        differentiated = torch.is_grad_enabled()
        with torch.enable_grad():
            gradients = torch.autograd.grad(
                [y for y, _ in reached],
                inputs,
                [v for _, v in reached],
                retain_graph=True,
                create_graph=differentiated,
                allow_unused=True,
                materialize_grads=True,
            )
        return list(gradients)

    return pull
