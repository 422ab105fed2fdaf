"""Tangents of weights, and the Jacobian as a matrix, an affine map and a SciPy operator."""

import keras
import numpy as np
import pytest
import scipy.sparse.linalg
from cases import ARCHITECTURES, vgg
from compare import assert_close, normal, numpy, randomize
from keras import layers, ops

import jvpreg

pytestmark = pytest.mark.usefixtures("float64")


def two_inputs_and_outputs():
    first, second = keras.Input((2, 2)), keras.Input((3,))
    hidden = layers.Dense(4, activation="tanh")(layers.Concatenate()([layers.Flatten()(first), second]))
    return keras.Model([first, second], [layers.Dense(2)(hidden), layers.Reshape((3, 1))(layers.Dense(3)(hidden))])


def points(model, count=3):
    return [normal(count, *x.shape[1:], seed=i) for i, x in enumerate(model.inputs)]


# ---------------------------------------------------------------- weights


def test_every_weight_of_a_model_at_once():
    """Against finite differences along the same direction, with and without an input tangent."""
    model = randomize(vgg())
    x, u = normal(3, 8, 8, 2), normal(3, 8, 8, 2, seed=1)
    weights = model.trainable_variables
    directions = [normal(*weight.shape, seed=i) for i, weight in enumerate(weights)]
    values = [numpy(weight) for weight in weights]

    def moved(step, along_x):
        for weight, value, direction in zip(weights, values, directions, strict=True):
            weight.assign(value + step * direction)
        return numpy(model(x + step * along_x))

    pairs = list(zip(weights, directions, strict=True))
    lin = jvpreg.linearize(model, x)
    alone, together = lin.jvp(weights=pairs), lin.jvp(u, weights=pairs)
    for received, along_x in ((alone, 0 * u), (together, u)):
        expected = (moved(1e-6, along_x) - moved(-1e-6, along_x)) / 2e-6
        moved(0, along_x)
        assert_close(received, expected, 1e-6)


def test_weights_by_path_by_variable_and_several_probes():
    model = randomize(keras.Sequential([keras.Input((3,)), layers.Dense(4, name="a"), layers.Dense(2, name="b")]))
    x, directions = normal(5, 3), normal(6, 3, 4)
    kernel, bias = model.layers[0].trainable_variables
    lin = jvpreg.linearize(model, x)
    by_variable = lin.jvp(weights=[(kernel, directions)])
    expected = np.einsum("bi,pij,jk->pbk", x, directions, model.layers[1].get_weights()[0])
    assert_close(by_variable, expected)
    assert_close(lin.jvp(weights={kernel.path: directions}), by_variable)
    y, one = jvpreg.weight_jvp(model, x, {kernel.path: directions[0], bias.path: np.zeros(4)})
    assert_close(one, expected[0])
    assert_close(y, model(x))


def test_a_shared_layer_moves_at_each_of_its_uses():
    x = keras.Input((3,))
    shared = layers.Dense(3, use_bias=False)
    model = keras.Model(x, shared(shared(x)))
    kernel, moved, point = numpy(shared.kernel), normal(3, 3), normal(4, 3)
    received = jvpreg.linearize(model, point).jvp(weights=[(shared.kernel, moved)])
    assert_close(received, point @ (moved @ kernel + kernel @ moved))


def test_layers_before_the_first_moved_one_cost_nothing():
    runs = []

    class Counting(layers.Layer):
        def call(self, x):
            return x

    @jvpreg.register_rule(Counting)
    def counting(layer, x, context):
        def push(tangent):
            runs.append(layer.name)
            return tangent

        return x, jvpreg.rules.Pushforward(push)

    model = keras.Sequential(
        [keras.Input((3,)), Counting(name="before"), layers.Dense(3), Counting(name="after"), layers.Dense(2)]
    )
    lin = jvpreg.linearize(model, normal(2, 3))
    lin.jvp(weights=[(model.layers[1].kernel, normal(3, 3))])
    assert runs == ["after"]


def test_low_rank_adaptation_has_tangents_of_its_factors():
    layer = layers.Dense(4)
    layer.build((None, 3))
    layer.enable_lora(2)
    randomize(layer)
    x = normal(5, 3)
    lin = jvpreg.linearize(layer, x)
    left, right = layer.lora_kernel_a, layer.lora_kernel_b
    for variable in (left, right):
        moved = normal(*variable.shape)
        pair = [moved if v is variable else numpy(v) for v in (left, right)]
        # Keras makes the factors in float32, whatever the layer's dtype.
        assert_close(lin.jvp(weights=[(variable, moved)]), x @ pair[0] @ pair[1], 1e-6)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_weights_in_mixed_precision(policy):
    keras.config.set_dtype_policy(policy)
    try:
        model = keras.Sequential([keras.Input((4, 4, 2)), layers.Conv2D(3, 2), layers.Flatten(), layers.Dense(2)])
    finally:
        keras.config.set_dtype_policy("float64")
    x = normal(3, 4, 4, 2)
    pairs = [(weight, normal(*weight.shape, seed=i)) for i, weight in enumerate(model.trainable_variables)]
    exact = keras.models.clone_model(
        model, clone_function=lambda layer: type(layer).from_config({**layer.get_config(), "dtype": "float64"})
    )
    exact.set_weights(model.get_weights())
    matching = [(w, u) for w, (_, u) in zip(exact.trainable_variables, pairs, strict=True)]
    received = jvpreg.linearize(model, x).jvp(weights=pairs)
    assert keras.backend.standardize_dtype(received.dtype) == "float32"
    assert_close(received, jvpreg.linearize(exact, x).jvp(weights=matching), 2e-2)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            {"no/such": np.zeros(2)},
            r"`weights`. Expected weights of the linearized model: \[.*\]. Received: 'no/such'\.",
        ),
        ([(None, np.zeros(2))], r"`weights`. Expected weights of the linearized model"),
        ({}, r"`u`. Expected a tangent, or `weights` or `taps`. Received: neither"),
    ],
)
def test_weights_that_are_not_there(weights, message):
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2)])
    with pytest.raises(ValueError, match=message):
        jvpreg.linearize(model, normal(2, 3)).jvp(weights=weights)


def test_tangents_of_weights_of_the_wrong_shape():
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2, name="head")])
    lin = jvpreg.linearize(model, normal(2, 3))
    kernel, bias = model.trainable_variables
    with pytest.raises(ValueError, match=r"`weights`. Expected shape \(3, 2\), like `.*head/kernel`, or \(P, 3, 2\)"):
        lin.jvp(weights=[(kernel, np.zeros((2, 3)))])
    with pytest.raises(ValueError, match="the same number of probes"):
        lin.jvp(weights=[(kernel, np.zeros((4, 3, 2))), (bias, np.zeros((5, 2)))])


# ---------------------------------------------------------------- matrices


def materialized(lin, model):
    """The Jacobian (B, K, D) by one product for each column of the inputs."""
    sizes = [int(np.prod(x.shape[1:])) for x in model.inputs]
    columns = []
    for i, x in enumerate(lin.inputs):
        for unit in np.eye(sizes[i]):
            u = [np.zeros(z.shape) for z in lin.inputs]
            u[i] = np.broadcast_to(unit.reshape(x.shape[1:]), x.shape)
            image = keras.tree.flatten(lin.jvp(u if len(u) > 1 else u[0]))
            columns.append(np.concatenate([numpy(y).reshape(len(y), -1) for y in image], axis=1))
    return np.stack(columns, axis=-1)


@pytest.mark.parametrize("chunk_size", [1, 4, 64])
def test_jacobian_by_rows_and_by_columns(chunk_size):
    for units in (2, 7):
        model = randomize(
            keras.Sequential([keras.Input((4,)), layers.Dense(5, activation="tanh"), layers.Dense(units)])
        )
        x = normal(3, 4)
        lin = jvpreg.linearize(model, x)
        assert_close(lin.jacobian(chunk_size), materialized(lin, model))
        assert_close(jvpreg.jacobian(model, x, chunk_size), materialized(lin, model))


def test_jacobian_of_several_inputs_and_outputs():
    model = two_inputs_and_outputs()
    lin = jvpreg.linearize(model, points(model))
    blocks = lin.jacobian(chunk_size=2)
    shapes = [[tuple(block.shape) for block in row] for row in blocks]
    assert shapes == [[(3, 2, 2, 2), (3, 2, 3)], [(3, 3, 1, 2, 2), (3, 3, 1, 3)]]
    rows = [
        np.concatenate([numpy(b).reshape(3, k, -1) for b in row], -1) for row, k in zip(blocks, (2, 3), strict=True)
    ]
    assert_close(np.concatenate(rows, axis=1), materialized(lin, model))


def test_affine_map_is_the_model_in_its_region():
    """Proposition 1: near enough to `x`, a network of ReLUs and max pooling is `A x + b`."""
    model = randomize(vgg())
    x = normal(3, 8, 8, 2)
    slope, intercept = jvpreg.linearize(model, x).affine_map()
    near = x + 1e-7 * normal(3, 8, 8, 2, seed=1)
    expected = np.einsum("bkijc,bijc->bk", numpy(slope), near) + numpy(intercept)
    assert_close(model(near), expected, 1e-12)
    assert_close(model(x), np.einsum("bkijc,bijc->bk", numpy(slope), x) + numpy(intercept), 1e-12)


def test_linear_operator_has_the_singular_values_of_its_example():
    model = two_inputs_and_outputs()
    lin = jvpreg.linearize(model, points(model))
    operator = lin.linear_operator(example=-1)
    dense = materialized(lin, model)[2]
    assert operator.shape == dense.shape == (5, 7)
    np.testing.assert_allclose(operator @ np.eye(7), dense, atol=1e-12)
    np.testing.assert_allclose(operator.T @ np.eye(5), dense.T, atol=1e-12)
    np.testing.assert_allclose(operator @ dense[0], dense @ dense[0], atol=1e-12)
    largest = scipy.sparse.linalg.svds(operator, k=2, return_singular_vectors=False, v0=np.ones(5))
    np.testing.assert_allclose(np.sort(largest), np.linalg.svd(dense)[1][1::-1], rtol=1e-10)


def test_matrices_of_what_has_none():
    model = randomize(vgg())
    lin = jvpreg.linearize(model, normal(3, 8, 8, 2), training=True, batch_statistics="coupled")
    with pytest.raises(ValueError, match="couples the examples of a batch has no Jacobian of each"):
        lin.jacobian()
    lin = jvpreg.linearize(model, normal(3, 8, 8, 2))
    with pytest.raises(ValueError, match=r"`chunk_size`\. Expected an integer, 1 or more. Received: chunk_size=0"):
        lin.jacobian(0)
    with pytest.raises(ValueError, match=r"`example`\. Expected an index of a batch of 3. Received: example=3"):
        lin.linear_operator(3)


def test_the_architectures_have_jacobians():
    """Of every architecture in the table, row for row with the pullback."""
    checked = 0
    for case in ARCHITECTURES:
        if case.arguments:
            continue
        model = case.make()
        shapes = [case.input_shape] if isinstance(case.input_shape, tuple) else case.input_shape
        x = [normal(2, *shape) for shape in shapes]
        model(x if len(x) > 1 else x[0])
        lin = jvpreg.linearize(model, x if len(x) > 1 else x[0])
        v = [normal(*y.shape, seed=9) for y in keras.tree.flatten(lin.outputs)]
        pulled = keras.tree.flatten(lin.vjp(keras.tree.pack_sequence_as(lin.outputs, v)))
        blocks = lin.jacobian()
        blocks = [keras.tree.flatten(row) for row in (blocks if len(v) > 1 else [blocks])]
        for j, received in enumerate(pulled):
            rows = [numpy(row[j]).reshape(2, cotangent[0].size, -1) for row, cotangent in zip(blocks, v, strict=True)]
            total = sum(np.einsum("bk,bkd->bd", c.reshape(2, -1), row) for c, row in zip(v, rows, strict=True))
            assert_close(received, total.reshape(received.shape))
        checked += 1
    assert checked > 10


def whole_and_real():
    x = keras.Input((4,))
    return keras.Model(x, [ops.argmax(x, axis=1), layers.Dense(3, activation="tanh")(x)])


def half_and_single():
    x = keras.Input((4,), dtype="float32")
    half, single = layers.Dense(2, dtype="mixed_float16"), layers.Dense(3, activation="tanh", dtype="float32")
    return keras.Model(x, [half(x), single(x)])


SEVERAL_DTYPES = {"whole numbers first": (whole_and_real, 1e-12), "16 bits first": (half_and_single, 1e-6)}


@pytest.mark.parametrize("kind", SEVERAL_DTYPES)
def test_matrices_round_no_output_to_the_dtype_of_another(kind):
    """Against the Jacobian of the second output by hand: the dtype of the first output must not round it."""
    make, tolerance = SEVERAL_DTYPES[kind]
    model = randomize(make())
    x = normal(3, 4).astype(model.inputs[0].dtype)
    weight, bias = model.layers[-1].get_weights()
    y = np.tanh(x @ weight + bias)
    expected = (1 - y**2)[:, :, None] * weight.T
    lin = jvpreg.linearize(model, x)
    first, second = lin.jacobian()
    assert_close(second, expected, tolerance)
    width = int(np.prod(lin.outputs[0].shape[1:]))
    if kind == "whole numbers first":
        assert first.shape == (3, 4)
        assert np.abs(numpy(first)).max() == 0
    else:
        assert_close(first, np.broadcast_to(numpy(model.layers[1].kernel).T, (3, 2, 4)), 1e-3)
    (_, slope), (_, intercept) = lin.affine_map()
    assert_close(slope, expected, tolerance)
    assert_close(intercept, y - np.einsum("bkd,bd->bk", expected, x), 10 * tolerance)
    v, u = normal(3, 3, seed=1), normal(3, 4, seed=2)
    operator = lin.linear_operator(1)
    assert_close(operator.matvec(u[1])[width:], expected[1] @ u[1], tolerance)
    assert_close(operator.rmatvec(np.concatenate([np.zeros(width), v[1]])), v[1] @ expected[1], tolerance)
    assert_close(lin.vjp([None, v]), np.einsum("bk,bkd->bd", v, expected), tolerance)
    assert_close(lin.vjp([np.zeros(lin.outputs[0].shape), v]), np.einsum("bk,bkd->bd", v, expected), tolerance)
    blocks = np.concatenate([numpy(first).reshape(3, width, 4), expected], axis=1)
    exact = np.linalg.norm(blocks, axis=(1, 2))
    assert_close(jvpreg.estimators.frobenius_norm(lin, num_probes=5).value, exact, tolerance)
    full = jvpreg.full_jacobian(lin, None, [np.ones(lin.outputs[0].shape), v])
    assert np.abs(numpy(full.completeness_error())).max() < max(tolerance, 1e-3 * (width > 1))
    drawn = jvpreg.probes.draw("gaussian", lin.outputs, 2, seed=0)
    assert all(np.abs(numpy(part) - np.round(numpy(part))).max() > 0 for part in drawn)
