"""Second derivatives: `hvp` and `laplacian` of every layer against differences, and what they cost and refuse."""

import zlib

import cases
import keras
import numpy as np
import pytest
from compare import at_once, normal, numpy, randomize
from keras import layers, ops, tree

import jvpreg

pytestmark = pytest.mark.usefixtures("float64")


def made(case):
    layer = case.make()
    if not isinstance(layer, keras.Model):
        layer = type(layer).from_config({**layer.get_config(), "dtype": "float64"})
    shapes = case.input_shape if isinstance(case.input_shape, list) else [case.input_shape]
    batch = case.arguments.get("batch_size", 3)
    random = np.random.default_rng(zlib.crc32(case.id.encode()))
    x, u, w = ([random.normal(size=(batch, *shape)) for shape in shapes] for _ in range(3))
    one = len(shapes) == 1
    x, u, w = (values[0] if one else values for values in (x, u, w))
    layer(tree.map_structure(ops.convert_to_tensor, x))
    return randomize(layer), x, u, w


def shifted(x, u, step):
    return tree.map_structure(lambda a, b: ops.convert_to_tensor(a + step * b), x, u)


def differences(function, step=2e-5):
    """The derivative of a function of a step at 0, by differences of the sixth order."""
    weights = {1: 3 / 4, 2: -3 / 20, 3: 1 / 60}
    values = {k: tree.flatten(function(k * step)) for k in (-3, -2, -1, 1, 2, 3)}
    count = len(values[1])
    return [
        sum(c * (numpy(values[k][i]) - numpy(values[-k][i])) for k, c in weights.items()) / step for i in range(count)
    ]


def close(received, expected, tolerance):
    for a, b in zip(tree.flatten(received), expected, strict=True):
        np.testing.assert_allclose(numpy(a), b, rtol=tolerance, atol=tolerance * max(np.max(np.abs(b), initial=0), 1))


# On TensorFlow the first row of each rule, and on JAX, which compiles each operation, a row of each kind.
ON_JAX = ("Dense-tanh", "Dense-silu", "Multiply", "LayerNormalization", "Softmax", "LSTM", "Attention", "ops-einsum")


def rows():
    if keras.backend.backend() == "jax":
        return [case for case in cases.LAYERS if case.id in ON_JAX]
    return cases.first_rows() if keras.backend.backend() == "tensorflow" else cases.LAYERS


@pytest.mark.slow
@pytest.mark.parametrize("case", rows(), ids=lambda case: case.id)
@pytest.mark.filterwarnings("ignore:The model is piecewise affine")
def test_every_layer(case):
    cases.skip_if_unavailable(case)
    layer, x, u, w = made(case)
    facts = {k: v for k, v in case.arguments.items() if k in ("training", "batch_statistics")}
    seeds = [(v, numpy(v)) for v in layer.variables if not v.trainable]

    def linearized(at, **options):
        for variable, value in seeds:
            variable.assign(value)
        return jvpreg.linearize(layer, at, fallback="ignore", **facts, **options)

    expected = differences(lambda step: linearized(shifted(x, w, step)).jvp(u))
    lin = linearized(shifted(x, w, 0), order=2)
    if not any(v.has_tangents for v in lin._graph.outputs):
        pytest.skip("nothing moves")
    u, w = (tree.map_structure(lambda a, b: np.stack([a, b]), *pair) for pair in ((u, w), (w, u)))
    products = tree.flatten(lin.hvp(u, w))
    close([product[0] for product in products], expected, 1e-9)
    close([product[1] for product in products], [numpy(product[0]) for product in products], 1e-9)


def network(activation="tanh", size=3):
    """A small smooth network with products, a normalization and attention over the coordinates."""
    x = keras.Input((size,))
    hidden = layers.Dense(4, activation=activation, name="first")(x)
    hidden = layers.Reshape((2, 4))(layers.Dense(8, activation=activation)(hidden))
    hidden = layers.LayerNormalization()(hidden) if activation != "relu" else hidden
    hidden = layers.Attention()([hidden, hidden]) if activation != "relu" else hidden
    return randomize(keras.Model(x, layers.Dense(2)(layers.Flatten()(hidden))))


def jacobians(model, x):
    return numpy(at_once(lambda x: jvpreg.jacobian(model, x))(ops.convert_to_tensor(x)))


@pytest.mark.parametrize("chunk_size", [2, 64])
def test_laplacian_and_hessian(chunk_size):
    model, x = network(), normal(2, 3)
    steps = np.eye(3)[:, None] * 1e-5
    expected = np.stack([(jacobians(model, x + s) - jacobians(model, x - s)) / 2e-5 for s in steps], axis=-1)
    v = normal(4, 2, 3, seed=1)

    def derivatives(x, v):
        lin = jvpreg.linearize(model, x, order=2)
        return lin.hessian(chunk_size), lin.laplacian(chunk_size=chunk_size), lin.laplacian(v, chunk_size)

    hessian, laplacian, along = map(numpy, at_once(derivatives)(ops.convert_to_tensor(x), ops.convert_to_tensor(v)))
    np.testing.assert_allclose(hessian, expected, rtol=1e-7, atol=1e-8)
    np.testing.assert_allclose(laplacian, np.einsum("bkii->bk", hessian), rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(along, np.einsum("bkij,pbi,pbj->bk", hessian, v, v), rtol=1e-11, atol=1e-12)


def test_compiled():
    model, x = network(), ops.convert_to_tensor(normal(2, 3))

    def laplacian(x):
        return jvpreg.linearize(model, x, order=2).laplacian()

    run = jvpreg.testing.compiled(laplacian) if keras.backend.backend() != "torch" else at_once(laplacian)
    with jvpreg.testing.float64():
        expected = np.einsum("bkii->bk", numpy(at_once(lambda x: jvpreg.hessian(model, x))(x)))
    np.testing.assert_allclose(numpy(run(x)), expected, rtol=1e-11, atol=1e-12)


def test_several_inputs():
    first, second = keras.Input((2,), name="a"), keras.Input((1,), name="b")
    model = keras.Model({"a": first, "b": second}, layers.Multiply()([first, second**2]))
    x = {"a": np.array([[1.0, 2.0]]), "b": np.array([[3.0]])}
    lin = jvpreg.linearize(model, x, order=2)
    whole = lin.hessian()
    np.testing.assert_allclose(numpy(whole["a"]["a"]), np.zeros((1, 2, 2, 2)))
    np.testing.assert_allclose(numpy(whole["a"]["b"])[0, :, :, 0], 6 * np.eye(2))
    np.testing.assert_allclose(numpy(whole["b"]["b"])[0, :, 0, 0], [2, 4])
    np.testing.assert_allclose(numpy(lin.laplacian()), [[2, 4]])
    np.testing.assert_allclose(
        numpy(lin.hvp({"a": np.ones((1, 2)), "b": None}, {"a": None, "b": np.ones((1, 1))})), [[6, 6]]
    )


def test_an_integer_beside_what_bends():
    """The counter of a loop is an output of the loop's node, and has no tangent."""
    x = keras.Input((2,))
    start = ops.convert_to_tensor(0)
    _, power = ops.while_loop(lambda i, z: i < 2, lambda i, z: (i + 1, z * z), (start, x))
    lin = jvpreg.linearize(keras.Model(x, power), np.array([[1.0, 2.0]]), order=2)
    np.testing.assert_allclose(numpy(lin.hvp(np.ones((1, 2)), np.ones((1, 2)))), [[12, 48]], rtol=1e-12)  # of x⁴


def test_mixed_precision():
    model = keras.Sequential([keras.Input((2,)), layers.Dense(1, activation="tanh", dtype="mixed_bfloat16")])
    lin = jvpreg.linearize(randomize(model), normal(1, 2), order=2)
    products = lin.hvp(normal(1, 2), normal(1, 2)), lin.laplacian(), lin.hessian()
    assert {keras.backend.standardize_dtype(product.dtype) for product in products} == {"float32"}


def coupled():
    model = keras.Sequential([keras.Input((3,)), layers.BatchNormalization()])
    return jvpreg.linearize(model, normal(2, 3), training=True, batch_statistics="coupled", order=2)


def gradient(model, penalty, variable):
    """The gradient of a penalty by a weight, by the backend's first-order autodiff."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            value = penalty()
        return numpy(tape.gradient(value, variable.value))
    if keras.backend.backend() == "torch":
        import torch

        return numpy(torch.autograd.grad(penalty(), variable.value)[0])
    import jax

    def of_weight(weight):
        with keras.StatelessScope([(variable, weight)]):
            return penalty()

    return numpy(jax.jit(jax.grad(of_weight))(variable.value))


@pytest.mark.parametrize("activation", ["tanh", "silu"])
def test_gradient_of_a_residual_by_weights(activation):
    model, x = network(activation), ops.convert_to_tensor(normal(2, 3))
    kernel = model.get_layer("first").kernel

    def penalty():
        return ops.sum(ops.square(jvpreg.linearize(model, x, order=2).laplacian()))

    received, direction = gradient(model, penalty, kernel), normal(3, 4, seed=3)

    def at(weight):
        with keras.StatelessScope([(kernel, weight)]):
            return penalty()

    start, run = numpy(kernel).copy(), at_once(at)
    values = [float(numpy(run(ops.convert_to_tensor(start + step * direction)))) for step in (1e-5, -1e-5)]
    np.testing.assert_allclose(np.sum(received * direction), (values[0] - values[1]) / 2e-5, rtol=1e-6)


def test_piecewise_affine_is_zero_and_warns():
    lin = jvpreg.linearize(network("relu"), normal(2, 3), order=2)
    with pytest.warns(UserWarning, match="piecewise affine"):
        assert not np.any(numpy(lin.laplacian()))
    assert not np.any(numpy(lin.hvp(normal(2, 3), normal(2, 3))))  # and does not warn again


def test_the_first_order_records_nothing_more():
    plain, twice = (jvpreg.linearize(network(), normal(2, 3), order=order) for order in (1, 2))
    assert all(node.again is None for node in plain.nodes)
    assert any(node.again is not None for node in twice.nodes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda lin: jvpreg.linearize(network(), normal(2, 3)).hvp(normal(2, 3), normal(2, 3)), "argument `order` of"),
        (lambda lin: jvpreg.linearize(network(), normal(2, 3)).laplacian(), "argument `order` of"),
        (
            lambda lin: jvpreg.linearize(network(), normal(2, 3), order=3),
            "argument `order`. Expected an integer from 1",
        ),
        (lambda lin: lin.take([0]).laplacian(), "linearize the part itself"),
        (lambda lin: coupled().laplacian(), "has no Laplacian of each"),
        (lambda lin: coupled().hessian(), "has no Hessian of each"),
        (lambda lin: lin.hvp(normal(2, 4), normal(2, 3)), "argument `u`. Expected shape"),
        (lambda lin: lin.hvp(normal(2, 3), normal(5, 2, 3)), "the same number of probes"),
        (lambda lin: lin.laplacian(normal(2, 3)), "argument `directions`. Expected a leading axis"),
        (lambda lin: lin.laplacian(chunk_size=0), "argument `chunk_size`"),
        (lambda lin: lin.hessian(chunk_size=0), "argument `chunk_size`"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call(jvpreg.linearize(network(), normal(2, 3), order=2))
