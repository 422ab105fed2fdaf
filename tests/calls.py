"""A layer of one function, what is checked of any, and a function in a graph."""

import keras
import numpy as np
from compare import assert_close, normal, numpy
from keras import layers, ops

import jvpreg


class Call(layers.Layer):
    """A layer of one function of its input and its weight (3, 3)."""

    def __init__(self, function, **kwargs):
        super().__init__(**kwargs)
        self.function = function

    def build(self, shape):
        self.w = self.add_weight(shape=(3, 3), initializer="glorot_uniform")

    def call(self, x):
        return self.function(x, self.w)

    def compute_output_shape(self, shape):
        return keras.KerasTensor(shape).shape


def check_call(function, x, weight=True, dtype="float64"):
    """Check outputs and both products against the layer itself and its finite differences."""
    exact, near, step = {"float64": (1e-12, 1e-7, 1e-5), "float32": (1e-6, 2e-3, 1e-2)}[dtype]
    layer = Call(function, dtype=dtype)
    x, u = x.astype(dtype), normal(*x.shape, seed=1).astype(dtype)
    call = layer(ops.convert_to_tensor(x))
    lin = jvpreg.linearize(layer, x)
    assert_close(lin.outputs, call, exact)
    slope = (numpy(layer(x + step * u)) - numpy(layer(x - step * u))) / (2 * step)
    assert_close(lin.jvp(u), slope, near)
    y, ju = jvpreg.jvp(layer, x, u)
    assert_close(y, call, exact)
    assert_close(ju, slope, near)
    v = normal(*slope.shape, seed=2).astype(dtype)
    np.testing.assert_allclose(np.sum(numpy(lin.vjp(v)) * u), np.sum(slope * v), rtol=100 * near, atol=near)
    if weight:
        before, moved = numpy(layer.w), normal(3, 3, seed=3)
        values = []
        for sign in (1, -1):
            layer.w.assign(before + sign * step * moved)
            values.append(numpy(layer(x)))
        layer.w.assign(before)
        slope = (values[0] - values[1]) / (2 * step)
        assert np.abs(slope).max() > 1e-3
        assert_close(lin.jvp(weights=[(layer.w, moved)]), slope, 1e-7)
    return lin


def in_graph(function, *tensors):
    """What a function returns in a TensorFlow graph, or jitted by JAX. On Torch it runs eagerly."""
    if keras.backend.backend() == "torch":
        return function(*tensors)
    if keras.backend.backend() == "jax":
        import jax

        return jax.jit(function)(*tensors)
    import tensorflow as tf

    return tf.function(function, autograph=False)(*map(ops.convert_to_tensor, tensors))
