"""A penalty of weight 0 is reported, but not differentiated: 0 times the infinite slope of a root at 0 would be NaN."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import jvpreg
from jvpreg.distillation import ActivationMatching, MatchingLoss
from jvpreg.layers import JacobianPenalty
from jvpreg.regularizers import JacobianRegularizer, Scheduled


class RootMatching(MatchingLoss):
    def see(self, view, sites, directions):
        return view.outputs

    def distance(self, teacher, student):
        return ops.sqrt(ops.sum((teacher[0] - student[0]) ** 2, axis=-1))


class Root(JacobianRegularizer):
    def directions(self, inputs, labels, seed):
        return ops.expand_dims(ops.zeros_like(inputs), 0)

    def penalty(self, seen):
        return ops.sqrt(ops.sum(seen.jvp[0] ** 2, axis=-1))


def network():
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input((3,)), layers.Dense(4, "tanh"), layers.Dense(2)])


def distiller():
    model = jvpreg.JacobianDistiller(network(), network(), [ActivationMatching(1.0), RootMatching(0.0)])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    return model


def compiled():
    model = jvpreg.JacobianModel(network())
    model.compile(keras.optimizers.SGD(0.1), "mse", jacobian_regularizers=[Root(0.0)])
    return model


def layer():
    model = keras.Sequential([keras.Input((3,)), JacobianPenalty(network(), [Root(0.0)])])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    return model


@pytest.mark.parametrize("make", [distiller, compiled, layer])
def test_a_weight_of_zero_gives_no_gradient(make):
    x, y = np.eye(3, dtype="float32"), np.ones((3, 2), "float32")
    model, plain = make(), network()
    plain.compile(keras.optimizers.SGD(0.1), "mse")
    model.train_on_batch(x, y)
    plain.train_on_batch(x, y)
    for found, expected in zip(model.trainable_weights, plain.trainable_weights, strict=True):
        np.testing.assert_allclose(*map(ops.convert_to_numpy, (found, expected)), rtol=1e-5, atol=1e-7)


class Rising(Scheduled, JacobianRegularizer):
    """Its strength is 0, but its schedule gives it a weight."""

    def strength_at(self, step):
        return 1.0

    def directions(self, inputs, labels, seed):
        return ops.expand_dims(ops.ones_like(inputs), 0)

    def penalty(self, seen):
        return ops.sum(seen.jvp[0] ** 2, axis=-1)


def test_what_is_scheduled_has_a_gradient():
    model = jvpreg.JacobianModel(network())
    model.compile(
        keras.optimizers.SGD(0.1),
        loss=lambda labels, outputs: 0.0 * ops.sum(outputs, axis=-1),
        jacobian_regularizers=[Rising(0.0)],
    )
    x, y = np.eye(3, dtype="float32"), np.ones((3, 2), "float32")
    before, after = (model.train_on_batch(x, y, return_dict=True)["rising"] for _ in range(2))
    assert after < 0.9 * before
