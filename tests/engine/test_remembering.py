"""A layer's call is remembered: what it did before, it must do again, otherwise it is traced anew."""

import copy
import gc
import pickle
import weakref

import keras
import numpy as np
import pytest
from compare import assert_close, normal, numpy
from keras import layers, ops

import jvpreg
from jvpreg.engine import opening
from jvpreg.engine.remembering import traces_of

pytestmark = pytest.mark.filterwarnings("ignore:Some nodes of")

OUTSIDE = {"factor": 2.0}

FLOAT32 = 1e-6  # JAX and Torch multiply matrices in it, whatever the dtype of a layer.


class Inner(layers.Layer):
    """A layer within, which returns as many columns as its attribute says."""

    columns = 2

    def call(self, x):
        return x[:, : self.columns] ** 2


class Reader(layers.Layer):
    """A layer with all that a function `(layer, x)` may read."""

    def __init__(self, function):
        super().__init__(dtype="float64")
        self.function, self.rate, self.flag, self.sizes = function, 2.0, True, [1.0, 2.0]
        self.inner, self.wide = Inner(dtype="float64"), Inner(dtype="float64")
        self.wide.columns = 3
        self.dense, self.other = (layers.Dense(3, dtype="float64") for _ in range(2))
        self.seed, self.table = keras.random.SeedGenerator(3), None

    def build(self, shape):
        self.w = self.add_weight(shape=(3,), initializer="random_normal")
        self.dense.build(shape)
        self.other.build(shape)
        self.table = ops.convert_to_tensor(normal(3), self.w.dtype)

    def call(self, x):
        return self.function(self, x)


def taken(layer, x):
    y = layer.inner(x)
    return ops.sum(y, axis=1, keepdims=True) * float(y.shape[1])


def replaced_call(layer):
    layer.call = lambda x: layer.w * x**3


def replaced_function(layer):
    layer.function = lambda layer, x: layer.w * x + 1


def with_loss(layer, x):
    layer.add_loss(layer.rate * ops.sum(x))
    return x * x


# What a call reads, and what changes it.
CHANGES = {
    "a number": (lambda layer, x: layer.rate * x * x, lambda layer: setattr(layer, "rate", 5.0)),
    "a flag": (lambda layer, x: layer.w * x if layer.flag else x * x, lambda layer: setattr(layer, "flag", False)),
    "a list": (
        lambda layer, x: sum(s * x**i for i, s in enumerate(layer.sizes)),
        lambda layer: layer.sizes.append(3.0),
    ),
    "a global": (lambda layer, x: OUTSIDE["factor"] * x * x, lambda layer: OUTSIDE.update(factor=-1.0)),
    "a tensor": (lambda layer, x: layer.table * x * x, lambda layer: setattr(layer, "table", layer.table * 2)),
    "a weight's value": (lambda layer, x: layer.w * x * x, lambda layer: layer.w.assign(layer.w * 3)),
    "a weight itself": (
        lambda layer, x: layer.w * x * x,
        lambda layer: vars(layer).update(w=keras.Variable(ops.ones(3), dtype=layer.w.dtype)),
    ),
    "a tensor of weights": (lambda layer, x: x * ops.softmax(layer.w.value), lambda layer: layer.w.assign(layer.w * 3)),
    "the call": (lambda layer, x: x * x, replaced_call),
    "the function": (lambda layer, x: x * x, replaced_function),
    "another layer": (taken, lambda layer: setattr(layer, "inner", layer.wide)),
    "a layer's attribute": (taken, lambda layer: setattr(layer.inner, "columns", 3)),
    "a layer's call": (taken, lambda layer: setattr(layer.inner, "call", lambda x: x**3)),
    "trainable": (
        lambda layer, x: layer.dense(x) * float(layer.trainable),
        lambda layer: setattr(layer, "trainable", 0),
    ),
    "a loss": (with_loss, lambda layer: setattr(layer, "rate", 7.0)),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_what_a_call_reads_may_change(kind, monkeypatch):
    monkeypatch.setitem(OUTSIDE, "factor", 2.0)
    function, change = CHANGES[kind]
    layer, x, u = Reader(function), normal(2, 3), normal(2, 3, seed=1)
    layer(x)
    for _ in range(2):
        before = numpy(jvpreg.jvp(layer, x, u)[1])
    change(layer)
    fresh, losses = layer(x), [numpy(loss) for loss in layer.losses]
    step = 1e-6
    expected = (numpy(layer(x + step * u)) - numpy(layer(x - step * u))) / (2 * step)
    layer(x)
    outputs, product = jvpreg.jvp(layer, x, u)
    assert_close(outputs, fresh)
    np.testing.assert_allclose(numpy(product), expected, rtol=1e-6, atol=1e-8)
    assert [numpy(loss) for loss in layer.losses] == losses
    assert kind == "a loss" or before.shape != expected.shape or not np.allclose(before, expected)


def counted(monkeypatch) -> list:
    """A list with an entry for each trace from now on."""
    traced, found = opening._traced, []
    monkeypatch.setattr(opening, "_traced", lambda *args: found.append(0) or traced(*args))
    return found


def attend(layer, x):
    positions = ops.arange(x.shape[1])
    return layer.w * x + layer.other(ops.cast(positions, x.dtype)[None]) + layer.dense(x)


@pytest.mark.parametrize("function", [CHANGES["a number"][0], taken, attend, with_loss])
def test_the_same_call_is_traced_once(function, monkeypatch):
    layer, x, u = Reader(function), normal(2, 3), normal(2, 3, seed=1)
    layer(x)
    expected, found = jvpreg.jvp(layer, x, u), counted(monkeypatch)
    for y, product in [jvpreg.jvp(layer, x, u) for _ in range(2)]:
        np.testing.assert_array_equal(numpy(y), numpy(expected[0]))
        np.testing.assert_array_equal(numpy(product), numpy(expected[1]))
    assert not found
    jvpreg.jvp(layer, x[:1], u[:1])
    assert found  # Another shape is another trace, ...
    found.clear()
    jvpreg.jvp(layer, x, u)
    assert not found  # ... and does not displace the first.


def noisy(layer, x):
    noise = ops.cast(keras.random.normal((3,), seed=layer.seed), x.dtype)
    return layer.dense(x) + layer.other(noise[None])


@pytest.mark.parametrize("steps", [1, 3])
def test_draws_are_new_ones_in_each_call(steps):
    layer, x = Reader(noisy), normal(2, 3)
    called = [layer(x) for _ in range(steps)]
    layer.seed.state.assign(keras.random.SeedGenerator(3).state)
    for expected in called:
        assert_close(jvpreg.linearize(layer, x).outputs, expected, FLOAT32)


def test_a_graph_has_no_tensor_of_another():
    layer, x, u = Reader(attend), normal(2, 3), normal(2, 3, seed=1)
    layer(x)
    expected = jvpreg.jvp(layer, x, u)[1]
    compiled = {
        "tensorflow": lambda f: __import__("tensorflow").function(f, autograph=False),
        "jax": lambda f: __import__("jax").jit(f),
        "torch": lambda f: f,
    }[keras.backend.backend()]
    for _ in range(2):  # Two graphs, and eager calls before and after each.
        product = compiled(lambda x, u: jvpreg.jvp(layer, x, u)[1])
        assert_close(product(ops.convert_to_tensor(x), ops.convert_to_tensor(u)), expected, FLOAT32)
        assert_close(jvpreg.jvp(layer, x, u)[1], expected, FLOAT32)


def test_what_is_remembered_is_freed_with_the_layer_and_is_no_part_of_copies():
    layer, x = Reader(attend), normal(2, 3)
    layer(x)
    traces = traces_of(layer)
    jvpreg.linearize(layer, x)
    assert traces.by_key
    assert not copy.deepcopy(traces).by_key
    assert not pickle.loads(pickle.dumps(traces)).by_key
    for size in range(1, 20):
        jvpreg.linearize(layer, normal(size, 3))
    assert len(traces.by_key) <= 8
    gone = weakref.ref(layer)
    del layer
    gc.collect()
    assert gone() is None
