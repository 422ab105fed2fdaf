"""The slope of a batch normalization is multiplied into the kernel before it: when, and that no product changes."""

import keras
import pytest
from compare import JAX, assert_close, normal, randomize
from keras import layers, ops

import jvpreg
from jvpreg.engine import frozen_graph

CONVOLUTIONS = {
    "causal": (lambda: layers.Conv1D(4, 2, padding="causal"), (6, 2)),
    "grouped": (lambda: layers.Conv2D(4, (2, 1), strides=2, groups=2, use_bias=False), (6, 5, 2)),
    "volumes": (lambda: layers.Conv3D(3, 1), (2, 3, 2, 2)),
    "depthwise": (lambda: layers.DepthwiseConv2D(2, depth_multiplier=2), (5, 4, 2)),
    "separable": (lambda: layers.SeparableConv1D(3, 2, depth_multiplier=2), (12, 2)),
    "transposed": (lambda: layers.Conv2DTranspose(3, 2, strides=2), (3, 4, 2)),
}


@pytest.fixture
def scaled(monkeypatch) -> list[bool]:
    """For each normalization behind a kernel, whether its slope was multiplied into that kernel."""
    put = []
    original = frozen_graph.with_scaled_kernel

    def spy(node, scaling, leading):
        nodes = original(node, scaling, leading)
        put.append(nodes[0] is not node)
        return nodes

    monkeypatch.setattr(frozen_graph, "with_scaled_kernel", spy)
    return put


def normalized(convolution, shape, **options):
    return randomize(
        keras.Sequential(
            [keras.Input(shape), convolution, layers.BatchNormalization(**options), layers.Activation("tanh")]
        )
    )


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_products_and_the_gradients_of_penalties(kind, scaled):
    make, shape = CONVOLUTIONS[kind]
    with jvpreg.testing.float64():
        model = normalized(make(), shape)
    jvpreg.testing.check_rule(model, shape, jit=JAX)
    assert scaled
    assert all(scaled)


def test_statistics_of_the_batch(float64, scaled):
    """Frozen statistics make a slope. Coupled ones depend on the batch, so they make none."""
    model = normalized(layers.Conv1D(3, 1), (6, 2))
    x, u = normal(4, 6, 2), normal(2, 4, 6, 2, seed=1)
    lin = jvpreg.linearize(model, x, training=True)
    first = lin.after("conv1d").jvp(lin.block("conv1d").jvp(u))  # in two parts: no slope can be multiplied in
    assert not scaled
    assert_close(lin.jvp(u), first)
    assert scaled == [True]
    jvpreg.linearize(model, x, training=True, batch_statistics="coupled").jvp(u)
    assert scaled == [True]


def test_only_where_nothing_else_sees_what_is_between_the_two(float64, scaled):
    x = keras.Input((6, 2))
    y = layers.Conv1D(3, 1, name="conv")(x)
    z = layers.BatchNormalization(name="norm")(y)
    points, u, tap = normal(2, 6, 2), normal(2, 6, 2, seed=1), normal(2, 6, 3, seed=2)
    for outputs in ([z, y], layers.Add()([y, z])):
        jvpreg.linearize(randomize(keras.Model(x, outputs)), points).jvp(u)
    lin = jvpreg.linearize(randomize(keras.Model(x, z)), points)
    both = lin.jvp(u, taps={"conv": tap})
    along = lin.jvp(u, weights={"conv/kernel": normal(1, 2, 3)})
    assert not scaled
    zero = lin.jvp(ops.zeros_like(u), taps={"conv": tap})
    assert_close(lin.jvp(u) + zero, both)
    assert scaled == [True]
    assert_close(lin.jvp(u) + lin.jvp(weights={"conv/kernel": normal(1, 2, 3)}), along)


@pytest.mark.parametrize(
    ("shape", "policy", "axis", "pays"),
    [
        ((6, 2), "float32", -1, True),
        ((1, 2), "float32", -1, False),
        ((6, 2), "mixed_bfloat16", -1, False),
        ((3, 4), "float32", 1, False),
    ],
)
def test_only_where_it_pays_and_is_the_same(shape, policy, axis, pays, scaled):
    """It is not done if the kernel outnumbers the tangents, if there are two precisions, or along another axis."""
    convolution = layers.Conv1D(3, 1, dtype=policy)
    model = normalized(convolution, shape, axis=axis, dtype=policy)
    x, u = normal(2, *shape).astype("float32"), normal(2, *shape, seed=1).astype("float32")
    lin = jvpreg.linearize(model, x)
    lin.jvp(u)
    assert scaled == [pays]


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="only TensorFlow has unknown shapes")
def test_a_batch_of_unknown_size(scaled):
    import tensorflow as tf

    model = normalized(layers.Conv1D(3, 1), (None, 2))
    specs = [tf.TensorSpec((None, None, 2), "float32")] * 2
    product = tf.function(lambda x, u: jvpreg.linearize(model, x).jvp(u), specs, autograph=False)
    x, u = normal(3, 4, 2).astype("float32"), normal(3, 4, 2, seed=1).astype("float32")
    received = product(x, u)
    assert scaled == [True]
    assert_close(received, jvpreg.linearize(model, x).jvp(u), 1e-5)
