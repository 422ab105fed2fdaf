"""A small model, data for it, and `fit`: what the tests of the callbacks share."""

import keras
import numpy as np
from keras import layers

import jvpreg
from jvpreg.regularizers import JacobianNorm


def make_model(wrapped=False, activity_regularizer=None):
    """A model of six inputs and three outputs, with every kind of state: batch statistics, dropout, an optimizer."""
    keras.utils.set_random_seed(1)
    base = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(8, activation="tanh", activity_regularizer=activity_regularizer, name="first"),
            layers.BatchNormalization(name="norm"),
            layers.Dropout(0.3, seed=2, name="dropout"),
            layers.Dense(3, name="last"),
        ]
    )
    model = jvpreg.JacobianModel(base, seed=3) if wrapped else base
    regularizers = {"jacobian_regularizers": [JacobianNorm(0.05)]} if wrapped else {}
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), **regularizers)
    return model


def data(size=24):
    random = np.random.default_rng(0)
    return random.normal(size=(size, 6)).astype("float32"), random.integers(0, 3, size)


def fit(model, *callbacks, **kwargs):
    x, y = data()
    return model.fit(x, y, **{"batch_size": 8, "verbose": 0, "shuffle": False, "callbacks": [*callbacks], **kwargs})


class NeverBegins(keras.callbacks.Callback):
    """Fails if training begins: for tests of an error that must come before."""

    def on_train_begin(self, logs=None):
        raise AssertionError("training began")


class Scale(keras.callbacks.Callback):
    """Multiplies the kernel of a layer at the beginning of epochs."""

    def __init__(self, layer, factors):
        super().__init__()
        self.layer, self.factors = layer, factors

    def on_epoch_begin(self, epoch, logs=None):
        layer = getattr(self.model, "base", self.model).get_layer(self.layer)
        kernel, bias = layer.get_weights()
        layer.set_weights([kernel * self.factors.get(epoch, 1.0), bias])


def still_model():
    """A model whose weights training does not change; only a callback does."""
    model = make_model()
    for name in ("first", "norm"):
        model.get_layer(name).trainable = False  # Otherwise a NaN in the loss would make all weights NaN.
    model.compile(keras.optimizers.SGD(0.0), model.loss)
    return model
