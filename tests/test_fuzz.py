"""Random functional graphs, a seed each: products against autodiff, adjointness, completeness.

`pytest tests/test_fuzz.py --fuzz 2000` checks more of them.
"""

import keras
import numpy as np
import pytest
from compare import assert_close, inner, norm, randomize
from keras import layers, ops, tree

import jvpreg
from jvpreg.engine.transpose import transpose

BATCH = 2
# GELU and leaky ReLU are left out: TensorFlow and Torch hold their constants in float32, so autodiff is off by 1e-8.


def pytest_generate_tests(metafunc):
    if "seed" in metafunc.fixturenames:
        metafunc.parametrize("seed", range(metafunc.config.getoption("--fuzz")))


class Graph:
    """A graph that grows by random operations on the tensors that it has."""

    def __init__(self, seed: int):
        self.random = np.random.default_rng(seed)
        shapes = [(int(self.random.integers(4, 8)), int(self.random.integers(4, 8)), 2)] * int(
            self.random.integers(1, 3)
        )
        self.inputs = [keras.Input(shape) for shape in shapes]
        self.tensors = list(self.inputs)
        self.layers: list[tuple] = []
        for _ in range(int(self.random.integers(3, 9))):
            self.tensors.append(self.grow())
        heads = [self.head() for _ in range(int(self.random.integers(1, 3)))]
        inputs = self.inputs if len(self.inputs) > 1 else self.inputs[0]
        self.model = randomize(keras.Model(inputs, heads if len(heads) > 1 else heads[0]), seed)

    def choose(self, options):
        return options[int(self.random.integers(len(options)))]

    def grow(self):
        x = self.choose(self.tensors[-3:])
        kind = self.choose([self.convolve, self.activate, self.pool, self.move, self.merge, self.share, self.operate])
        return kind(x)

    def apply(self, layer, x):
        self.layers.append((tuple(x.shape), layer))
        return layer(x)

    def convolve(self, x):
        padding = self.choose(["same", "valid"]) if min(x.shape[1:3]) >= 3 else "same"
        size = (int(self.random.integers(1, 4)), int(self.random.integers(1, 4)))
        strides = int(self.random.integers(1, 3))
        dilation = int(self.random.integers(1, 3)) if strides == 1 and padding == "same" else 1
        channels = x.shape[-1]
        options = {"padding": padding, "use_bias": bool(self.random.integers(2))}
        activation = self.choose([None, "relu", "tanh", "silu", "elu"])
        layer = self.choose(
            [
                lambda: layers.Conv2D(
                    2 * channels, size, strides, dilation_rate=dilation, activation=activation, **options
                ),
                lambda: layers.Conv2D(channels, size, strides, groups=channels, activation=activation, **options),
                lambda: layers.DepthwiseConv2D(
                    size[0], strides, dilation_rate=dilation, activation=activation, **options
                ),
                lambda: layers.SeparableConv2D(3, size[1], strides, activation=activation, **options),
                lambda: layers.Conv2DTranspose(2, size, 1, activation=activation, **options),
            ]
        )()
        return self.apply(layer, x)

    def activate(self, x):
        layer = self.choose(
            [
                layers.ReLU,
                layers.PReLU,
                layers.BatchNormalization,
                layers.LayerNormalization,
                lambda: layers.GroupNormalization(1),
                lambda: layers.Activation("mish"),
                lambda: layers.Activation("softplus"),
                lambda: layers.Dense(3, activation="elu"),
            ]
        )()
        return self.apply(layer, x)

    def pool(self, x):
        size = int(self.random.integers(1, 4))
        strides = int(self.random.integers(1, 4))
        padding = "same" if min(x.shape[1:3]) < size else self.choose(["same", "valid"])
        kind = self.choose([layers.MaxPooling2D, layers.AveragePooling2D])
        return self.apply(kind(size, strides, padding=padding), x)

    def move(self, x):
        choices = [
            lambda: layers.ZeroPadding2D(((1, 0), (0, 2))),
            lambda: layers.UpSampling2D((1, 2)),
            lambda: layers.Permute((2, 1, 3)),
            lambda: layers.Dropout(0.3),
        ]
        if min(x.shape[1:3]) > 2:
            choices.append(lambda: layers.Cropping2D(((1, 0), (0, 1))))
        return self.apply(self.choose(choices)(), x)

    def merge(self, x):
        same = [y for y in self.tensors if tuple(y.shape) == tuple(x.shape)]
        y = self.choose(same)
        kind = self.choose([layers.Add, layers.Multiply, layers.Maximum, layers.Average, layers.Subtract])
        return self.choose([lambda: kind()([x, y]), lambda: layers.Concatenate()([y, x, y])])()

    def share(self, x):
        fitting = [layer for shape, layer in self.layers if shape == tuple(x.shape)]
        return self.choose(fitting)(x) if fitting else self.activate(x)

    def operate(self, x):
        return self.choose(
            [
                lambda: 2.0 * x - 1.0,
                lambda: ops.tanh(x) * x,
                lambda: x / (1.0 + ops.square(x)),
                lambda: ops.maximum(x, 0.1 * x),
                lambda: x - ops.mean(x, axis=(1, 2), keepdims=True),
                lambda: ops.softmax(x) + ops.flip(x, axis=2),
            ]
        )()

    def head(self):
        x = self.choose(self.tensors[-2:])
        x = self.choose([layers.GlobalAveragePooling2D, layers.GlobalMaxPooling2D, layers.Flatten])()(x)
        return layers.Dense(int(self.random.integers(1, 4)))(x)


@pytest.mark.usefixtures("float64")
def test_graph(seed):
    graph = Graph(seed)
    model = graph.model
    x, u = ([graph.random.normal(size=(BATCH, *y.shape[1:])) for y in graph.inputs] for _ in range(2))
    pack = (lambda leaves: leaves) if len(x) > 1 else (lambda leaves: leaves[0])
    lin = jvpreg.linearize(model, pack(x), fallback="error")
    outputs = tree.flatten(lin.outputs)
    assert_close(outputs, tree.flatten(model(pack(x))))
    v = [graph.random.normal(size=y.shape) for y in outputs]
    cotangents = [ops.convert_to_tensor(c) for c in v]
    pulled = tree.flatten(lin.vjp(tree.pack_sequence_as(lin.outputs, cotangents)))

    def call(inputs):
        return tree.flatten(model(pack(list(inputs))))

    expected = transpose(call, [ops.convert_to_tensor(a) for a in x], cotangents)
    scale = max(norm(expected), 1e-6)
    assert norm([a - b for a, b in zip(pulled, expected, strict=True)]) < 1e-10 * scale
    pushed = tree.flatten(lin.jvp(pack(u)))
    assert abs(inner(pushed, v) - inner(u, pulled)) < 1e-10 * max(norm(pushed) * norm(v), 1e-6)
    assert_close(tree.flatten(lin.jvp(pack(lin.inputs), taps=lin.intercepts)), outputs)


@pytest.mark.usefixtures("float64")
@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="the kernels are those of TensorFlow's graphs")
def test_one_product_in_a_plain_graph(seed):
    """By TensorFlow's own kernels and along with `x`, the product is the one that masks and slopes give afterwards."""
    import tensorflow as tf

    graph = Graph(seed)
    x, u = ([graph.random.normal(size=(BATCH, *y.shape[1:])) for y in graph.inputs] for _ in range(2))
    if len(x) == 1:
        x, u = x[0], u[0]
    lin = jvpreg.linearize(graph.model, x)
    product = tf.function(lambda: jvpreg.jvp(graph.model, x, u, xla=False), autograph=False)
    received, expected = tree.flatten(product()), tree.flatten([lin.outputs, lin.jvp(u)])
    assert norm([a - b for a, b in zip(received, expected, strict=True)]) < 1e-10 * norm(expected)


@pytest.mark.slow
def test_the_graphs_are_many_and_varied():
    kinds = {type(layer).__name__ for seed in range(40) for _, layer in Graph(seed).layers}
    assert len(kinds) > 15
