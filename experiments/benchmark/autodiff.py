"""The competitors: the same penalty by the backend's own autodiff, with one primal pass a step.

Each product is a function `(model, x, draw) -> (y, product)`: `model` runs once, in training mode, at `x` (B, …);
`draw(like)` returns one direction like a tensor; the product is `J u` like `y`, or `Jᵀ v` like `x`.
"""

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from jvpreg.common import keras_private
from jvpreg.estimators.norms import squared_norm

Draw = Callable[[Any], Any]
Product = Callable[[keras.Model, Any, Draw], tuple[Any, Any]]


class PenalizedByAutodiff(keras.Model):
    """A model that is trained with a penalty on its derivatives, through Keras' own train step.

    A subclass has the methods `with_products` and `penalty`.

    Args:
        base: the model.
    """

    def __init__(self, base: keras.Model):
        super().__init__()
        self.base = base
        self.kept: Any = None
        self.built = True

    def with_products(self, x):
        """The base model's outputs in training mode, and what the penalty is computed from."""
        raise NotImplementedError

    def penalty(self, kept, x, y, outputs):
        """The penalty, from what `with_products` returned, the inputs, the labels and the outputs."""
        raise NotImplementedError

    def call(self, inputs, training=None):
        """What the base model computes; in training, what the penalty needs beside it, for `compute_loss`."""
        if not training or isinstance(inputs, keras.KerasTensor):
            return self.base(inputs, training=training)
        outputs, self.kept = self.with_products(inputs)
        return outputs

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """The loss as compiled, and the penalty of the same step."""
        loss = super().compute_loss(x, y, y_pred, sample_weight, training=training)
        if self.kept is None:
            return loss
        kept, self.kept = self.kept, None
        return loss + self.penalty(kept, x, y, y_pred)


class AutodiffModel(PenalizedByAutodiff):
    """With the penalty `strength × mean ‖product‖²`.

    Args:
        base: the model.
        product: computes the model's outputs, and with them a product with the Jacobian.
        draw: draws a direction.
        strength: of the penalty.
    """

    def __init__(self, base: keras.Model, product: Product, draw: Draw, strength: float):
        super().__init__(base)
        self.product, self.draw, self.strength = product, draw, strength
        self.tracker = keras.metrics.Mean(name="frobenius_norm_squared")

    def with_products(self, x):
        """The outputs, and the product."""
        return self.product(self.base, x, self.draw)

    def penalty(self, kept, x, y, outputs):
        """The penalty; its mean is a metric."""
        norm = ops.mean(squared_norm(ops.expand_dims(kept, 0)))
        self.tracker.update_state(norm)
        return self.strength * norm


class TwiceDifferentiable(keras_private.BatchNormalization):
    """Batch normalization whose second derivative is right on TensorFlow.

    The mean of `tf.nn.moments` has no gradient within the variance: to first order that is exact, but the gradient of
    a penalty on the Jacobian is of second order.
    """

    def moments(self, x):
        """The mean and the variance `(C,)`, by which all else is differentiated."""
        axes = [axis for axis in range(len(x.shape)) if axis != self.axis % len(x.shape)]
        mean = ops.mean(x, axis=axes, keepdims=True)
        variance = ops.mean(ops.square(x - mean), axis=axes)
        return ops.squeeze(mean, axis=axes), variance


def twice_differentiable(model: keras.Model) -> keras.Model:
    """The same model, with the same weights, for autodiff to differentiate twice."""
    if keras.backend.backend() != "tensorflow":
        return model

    def layer(original: keras.Layer) -> keras.Layer:
        mended = isinstance(original, keras.layers.BatchNormalization)
        return (TwiceDifferentiable if mended else type(original)).from_config(original.get_config())

    clone = keras.models.clone_model(model, clone_function=layer)
    clone.set_weights(model.get_weights())
    return clone


def forward(model: keras.Model, x: Any, draw: Draw) -> tuple[Any, Any]:
    """`J u` by the backend's forward mode, which gives the primal with it."""
    y, product, state = ops.jvp(_pure(model), (x,), (draw(x),), has_aux=True)
    _assign(model, state)
    return y, product


def backward(model: keras.Model, x: Any, draw: Draw) -> tuple[Any, Any]:
    """`Jᵀ v` by the backend's reverse mode on the tape of the primal; Keras differentiates it once more."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        # The weights are the outer tape's business: to watch them here too would record twice as much.
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(x)
            y = model(x, training=True)
        return y, tape.gradient(y, x, output_gradients=draw(y))
    if keras.backend.backend() == "torch":
        import torch

        x = x.detach().requires_grad_()
        y = model(x, training=True)
        return y, torch.autograd.grad(y, x, draw(y), create_graph=True)[0]
    import jax

    y, pull, state = jax.vjp(_pure(model), x, has_aux=True)
    _assign(model, state)
    return y, pull(draw(y))[0]


def _pure(model: keras.Model) -> Callable[[Any], tuple[Any, Any]]:
    """The model as a function without a state: from `x` to the outputs and the new moving statistics."""
    weights = [variable.value for variable in model.trainable_variables]
    state = [variable.value for variable in model.non_trainable_variables]
    return lambda x: model.stateless_call(weights, state, x, training=True)


def _assign(model: keras.Model, state: list[Any]) -> None:
    for variable, value in zip(model.non_trainable_variables, state, strict=True):
        variable.assign(value)
