"""`Linearization.gains`, which the guard goes by: node by node, against norms of what autodiff says."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import jvpreg

pytestmark = pytest.mark.usefixtures("float64")


def test_each_node_against_the_jacobian_of_its_own():
    x = keras.Input((5,))
    y = layers.Dense(4, activation="tanh", name="first")(x)
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(6, name="a"), layers.Dense(4, name="b")], name="inner")
    model = keras.Model(x, layers.Add(name="sum")([y, inner(y)]))
    random = np.random.default_rng(0)
    at, u = random.normal(size=(3, 5)), random.normal(size=(2, 3, 5))
    lin = jvpreg.linearize(model, at)
    gains = {name: ops.convert_to_numpy(gain) for name, gain in lin.gains(u).items()}
    assert list(gains) == [node.name for node in lin.nodes]

    def through(inner_model, tangents):
        return ops.convert_to_numpy(jvpreg.linearize(inner_model, at).jvp(tangents))

    def norm(*tangents):
        return np.sqrt(sum(np.sum(t**2, axis=(1, 2)) for t in tangents))

    first = through(keras.Model(x, y), u)
    around = through(keras.Model(x, inner(y)), u)
    kernel = ops.convert_to_numpy(model.get_layer("first").kernel)
    np.testing.assert_allclose(gains["first"], norm(u @ kernel) / norm(u), rtol=1e-10)
    np.testing.assert_allclose(gains["first/activation"], norm(first) / norm(u @ kernel), rtol=1e-10)
    np.testing.assert_allclose(gains["inner/a"] * gains["inner/b"], norm(around) / norm(first), rtol=1e-10)
    np.testing.assert_allclose(gains["sum"], norm(first + around) / norm(first, around), rtol=1e-10)
    part = {name: ops.convert_to_numpy(gain) for name, gain in lin.take([2]).gains(u[:, 2:]).items()}
    alone = jvpreg.linearize(model, at[2:]).gains(u[:, 2:])
    for name in part:
        np.testing.assert_allclose(part[name], ops.convert_to_numpy(alone[name]), rtol=1e-10, err_msg=name)


def test_nothing_in_nothing_out():
    model = keras.Sequential([keras.Input((2,)), layers.ReLU(name="dead"), layers.Dense(3, name="last")])
    gains = jvpreg.linearize(model, -np.ones((1, 2))).gains(np.ones((1, 2)))
    assert {name: float(ops.convert_to_numpy(gain)[0]) for name, gain in gains.items()} == {"dead": 0.0, "last": 0.0}


def test_a_tangent_that_does_not_fit():
    model = keras.Sequential([keras.Input((2,)), layers.Dense(3)])
    with pytest.raises(ValueError, match=r"`u`. Expected shape \(1, 2\)"):
        jvpreg.linearize(model, np.ones((1, 2))).gains(np.ones((1, 3)))
