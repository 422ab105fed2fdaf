"""A Keras model as `jvpreg.clone` wants a network: of layers that are affine, ReLU or max pooling, on `[x, u, 0]`."""

from typing import Any

import keras
from keras import layers

import jvpreg

AFFINE = (
    layers.Conv2D,
    layers.Conv2DTranspose,
    layers.Dense,
    layers.BatchNormalization,
    layers.Add,
    layers.Concatenate,
    layers.AveragePooling2D,
    layers.GlobalAveragePooling2D,
    layers.ZeroPadding2D,
    layers.Flatten,
    layers.Reshape,
    layers.Dropout,
)
"""In inference mode, where their own activation is none."""


class NotPiecewiseLinearError(Exception):
    """The model has a layer that `jvpreg.clone` has no form of; the message names it."""


class Clone(layers.Layer):
    """A layer on a concatenated batch of P directions, `((P+2)·B, …)`: its state is that of the part of `x`.

    Args:
        layer: it does what this layer does.
        num_probes: P.
    """

    def __init__(self, layer: keras.Layer, num_probes: int):
        super().__init__(name=f"clone_{layer.name}")
        self.layer, self.num_probes = layer, num_probes
        self.is_relu = activation(layer) is keras.activations.relu or isinstance(layer, layers.ReLU)
        if self.is_relu and hasattr(layer, "activation"):
            layer.activation = keras.activations.linear

    def build(self, input_shape):
        """Build the layer."""
        self.layer.build(input_shape)

    def compute_output_shape(self, input_shape):
        """That of the layer; without it Keras would run `call` on batches that do not divide."""
        return self.layer.compute_output_shape(input_shape)

    def call(self, h, mask=None):
        """What the layer returns for each part, by the state of the first one. Keras passes `mask` None."""
        if isinstance(self.layer, layers.MaxPooling2D):
            pool = self.layer
            return jvpreg.clone.max_pool(
                h, pool.pool_size, pool.strides, pool.padding, pool.data_format, num_probes=self.num_probes
            )
        if not isinstance(self.layer, layers.ReLU | layers.Activation):
            h = self.layer(h)
        return jvpreg.clone.activation(h, num_probes=self.num_probes) if self.is_relu else h


def activation(layer: keras.Layer) -> Any:
    """What the layer applies to its outputs; None if it has no such thing."""
    return getattr(layer, "activation", None)


def cloned(model: keras.Model, num_probes: int) -> keras.Model:
    """The model, with its weights, for concatenated batches of P directions.

    Raises:
        NotPiecewiseLinearError: a layer is neither affine nor ReLU nor max pooling.
    """

    def clone(layer: keras.Layer) -> keras.Layer:
        if not is_piecewise_linear(layer):
            raise NotPiecewiseLinearError(f"`{layer.name}` ({type(layer).__name__}) is not piecewise linear.")
        return Clone(type(layer).from_config(layer.get_config()), num_probes)

    made = keras.models.clone_model(model, clone_function=clone)
    made.set_weights(model.get_weights())
    return made


def is_piecewise_linear(layer: keras.Layer) -> bool:
    """Whether the layer has a form in `jvpreg.clone`."""
    if activation(layer) not in (None, keras.activations.linear, keras.activations.relu):
        return False
    if isinstance(layer, layers.ReLU):
        # Not that of MobileNet, which is at most 6.
        return layer.max_value is None and not layer.negative_slope and not layer.threshold
    return isinstance(layer, (*AFFINE, layers.MaxPooling2D, layers.Activation))
