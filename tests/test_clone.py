"""The clone on concatenated batches `[x, u_1 … u_P, 0]`, against the engine and the layers of Keras."""

import keras
import numpy as np
import pytest
from compare import assert_close, normal, numpy, randomize
from keras import layers, ops

import jvpreg
from jvpreg import clone

PROBES = pytest.mark.parametrize("num_probes", [None, 3])


def direction(num_probes, *shape):
    return normal(*shape, seed=1) if num_probes is None else normal(num_probes, *shape, seed=1)


def network(model, h, training, num_probes):
    """The model of the tests below, written by hand on the weights of `model`."""
    convolution, normalization, other_convolution, head = (layer for layer in model.layers if layer.weights)
    h = ops.conv(h, convolution.kernel, padding="same") + convolution.bias
    h = clone.batch_normalization(
        h,
        mean=None if training else normalization.moving_mean,
        variance=None if training else normalization.moving_variance,
        offset=normalization.beta,
        scale=normalization.gamma,
        epsilon=normalization.epsilon,
        num_probes=num_probes,
    )
    h = clone.activation(h, num_probes=num_probes)
    h = clone.max_pool(h, 2, num_probes=num_probes)
    h = ops.conv(h, other_convolution.kernel) + other_convolution.bias
    h = clone.activation(h, negative_slope=0.25, num_probes=num_probes)
    h = clone.max_pool(h, (2, 3), strides=1, padding="same", num_probes=num_probes)
    h = clone.dropout(h, 0.4 if training else 0.0, seed=7, num_probes=num_probes)
    h = ops.reshape(h, (ops.shape(h)[0], -1))
    return ops.matmul(h, head.kernel) + head.bias


@pytest.fixture
def model(float64):
    return randomize(
        keras.Sequential(
            [
                keras.Input((9, 8, 2)),
                layers.Conv2D(4, 3, padding="same"),
                layers.BatchNormalization(),
                layers.ReLU(),
                layers.MaxPooling2D(),
                layers.Conv2D(3, 2),
                layers.LeakyReLU(negative_slope=0.25),
                layers.MaxPooling2D((2, 3), strides=1, padding="same"),
                layers.Dropout(0.4, seed=7),
                layers.Flatten(),
                layers.Dense(5),
            ]
        )
    )


@pytest.mark.parametrize("training", [False, True])
@PROBES
def test_a_network_written_by_hand(model, training, num_probes):
    x, u = normal(3, 9, 8, 2), direction(num_probes, 3, 9, 8, 2)
    received = clone.unstack(network(model, clone.stack(x, u), training, num_probes), num_probes)
    assert_close(received, jvpreg.jvp(model, x, u, training=training))


def test_several_probes_are_one_by_one(model):
    x, u = normal(3, 9, 8, 2), direction(2, 3, 9, 8, 2)
    _, both = clone.unstack(network(model, clone.stack(x, u), True, 2), 2)
    for product, one in zip(both, u, strict=True):
        assert_close(product, clone.unstack(network(model, clone.stack(x, one), True, None))[1])


NONLINEARITIES = {
    "ReLU": (lambda h, **k: clone.activation(h, **k), layers.ReLU),
    "LeakyReLU": (lambda h, **k: clone.activation(h, 0.25, **k), lambda: layers.LeakyReLU(negative_slope=0.25)),
    "abs": (lambda h, **k: clone.activation(h, -1.0, **k), lambda: layers.Activation(ops.abs)),
    "max_pool": (lambda h, **k: clone.max_pool(h, 2, **k), layers.MaxPooling2D),
    "max_pool-strides": (
        lambda h, **k: clone.max_pool(h, (3, 2), strides=(1, 2), **k),
        lambda: layers.MaxPooling2D((3, 2), strides=(1, 2)),
    ),
    "max_pool-gaps": (lambda h, **k: clone.max_pool(h, 1, strides=2, **k), lambda: layers.MaxPooling2D(1, strides=2)),
    "max_pool-same": (
        lambda h, **k: clone.max_pool(h, 3, strides=2, padding="same", **k),
        lambda: layers.MaxPooling2D(3, strides=2, padding="same"),
    ),
    "dropout": (lambda h, **k: clone.dropout(h, 0.3, seed=5, **k), lambda: layers.Dropout(0.3, seed=5)),
    "batch_normalization": (
        lambda h, **k: clone.batch_normalization(h, epsilon=1e-2, **k),
        lambda: layers.BatchNormalization(epsilon=1e-2),
    ),
    "batch_normalization-axis": (
        lambda h, **k: clone.batch_normalization(h, axis=1, **k),
        lambda: layers.BatchNormalization(axis=1),
    ),
}


@pytest.mark.parametrize("name", NONLINEARITIES)
@PROBES
def test_each_nonlinearity(float64, name, num_probes):
    function, make = NONLINEARITIES[name]
    model = keras.Sequential([keras.Input((6, 5, 2)), make()])
    x, u = normal(4, 6, 5, 2), direction(num_probes, 4, 6, 5, 2)
    received = clone.unstack(function(clone.stack(x, u), num_probes=num_probes), num_probes)
    assert_close(received, jvpreg.jvp(model, x, u, training=True))


@pytest.mark.parametrize("rank", [1, 3])
def test_max_pool_of_other_ranks_and_layouts(float64, rank):
    shape = (2, *(5, 4, 6)[:rank], 3)
    x, u = normal(*shape), normal(2, *shape, seed=1)
    lasts = clone.unstack(clone.max_pool(clone.stack(x, u), 2, padding="same", num_probes=2), 2)
    x, u = np.moveaxis(x, -1, 1), np.moveaxis(u, -1, 2)
    h = clone.max_pool(clone.stack(x, u), 2, padding="same", data_format="channels_first", num_probes=2)
    firsts = clone.unstack(h, 2)
    assert_close([np.moveaxis(numpy(firsts[0]), 1, -1), np.moveaxis(numpy(firsts[1]), 2, -1)], lasts)
    layer = {1: layers.MaxPooling1D, 3: layers.MaxPooling3D}[rank](padding="same")
    x, u = np.moveaxis(x, 1, -1), np.moveaxis(u, 2, -1)
    assert_close(lasts, jvpreg.jvp(keras.Sequential([keras.Input(shape[1:]), layer]), x, u))


def test_kinks_and_ties():
    """`ReLU'(0) = 0`; a tie goes to the first entry: as in the engine."""
    x, u = np.zeros((1, 2, 1), "float32"), np.array([[[1.0], [2.0]]], "float32")
    h = clone.stack(x, u)
    np.testing.assert_array_equal(numpy(clone.unstack(clone.activation(h))[1]), np.zeros((1, 2, 1)))
    np.testing.assert_array_equal(numpy(clone.unstack(clone.max_pool(h, 2))[1]), [[[1.0]]])


def test_no_dropout():
    h = clone.stack(normal(2, 3), normal(2, 3))
    assert clone.dropout(h, 0.0) is h


def test_stack():
    x, u = np.array([[1, 2]], "uint8"), np.array([[0.5, -0.5]])
    h = clone.stack(x, u)
    np.testing.assert_array_equal(numpy(h), [[1, 2], [0.5, -0.5], [0, 0]])
    assert keras.backend.standardize_dtype(h.dtype) == "float32"


@pytest.mark.parametrize("shape", [(3,), (1, 3), (2, 4), (2, 1, 3), (1, 2, 2, 3)])
def test_a_direction_that_does_not_fit(shape):
    with pytest.raises(ValueError, match=r"`u`. Expected shape \(2, 3\), like x, or \(P, 2, 3\).* Received: u with"):
        clone.stack(np.zeros((2, 3)), np.zeros(shape))


FUNCTIONS = [
    clone.unstack,
    clone.activation,
    lambda h, **k: clone.max_pool(h, 1, **k),
    lambda h, **k: clone.dropout(h, 0.5, **k),
    clone.batch_normalization,
]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_batch_that_does_not_divide(function):
    h = np.zeros((8, 2, 3), "float32")
    function(h, num_probes=2)
    with pytest.raises(ValueError, match=r"`h`. Expected a batch of 3·B examples.*Received: h with shape \(8, 2, 3\)"):
        function(h)
    with pytest.raises(ValueError, match=r"a batch of 5·B examples, as `clone.stack` makes it for num_probes=3"):
        function(h, num_probes=3)


def test_half_the_statistics():
    with pytest.raises(ValueError, match=r"`mean`. Expected it together with `variance`"):
        clone.batch_normalization(np.zeros((3, 2)), mean=np.zeros(2))
