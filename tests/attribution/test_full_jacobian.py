"""The full-Jacobian against autodiff, against numbers worked out by hand, and against the output it decomposes."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import jvpreg
from tests.compare import normal, numpy, randomize

pytestmark = pytest.mark.usefixtures("float64")


def plain():
    return keras.Sequential([keras.Input((4,)), layers.Dense(5, activation="relu"), layers.Dense(3)])


def without_biases():
    return keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            layers.Conv2D(3, 3, use_bias=False, activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(3, use_bias=False),
        ]
    )


def normalized():
    return keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            layers.Conv2D(3, 3, padding="same"),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.MaxPooling2D(),
            layers.Conv2D(4, 3, activation="gelu"),
            layers.LayerNormalization(),
            layers.GlobalAveragePooling2D(),
            layers.Dense(3),
        ]
    )


def shared_and_frozen():
    x = keras.Input((4,))
    shared = layers.Dense(4, activation="tanh", name="shared")
    y = layers.Add()([shared(x), shared(shared(x))])
    frozen = layers.Dense(5, activation="relu", trainable=False)
    return keras.Model(x, layers.Dense(3)(frozen(y)))


def attentive():
    x = keras.Input((4, 6))
    y = layers.LayerNormalization()(x + layers.MultiHeadAttention(2, 3)(x, x))
    return keras.Model(x, layers.Dense(3)(layers.Flatten()(y)))


def recurrent():
    return keras.Sequential(
        [keras.Input((4, 3)), layers.LSTM(5, return_sequences=True), layers.GRU(4), layers.Dense(3)]
    )


def padded_with_infinity():
    """Padding of −∞ before a max pooling, which never takes it: ResNetV2 in keras-hub pads like this."""
    x = keras.Input((4, 4, 2))
    y = ops.pad(layers.Conv2D(2, 1)(x), [[0, 0], [1, 1], [1, 1], [0, 0]], constant_values=-float("inf"))
    return keras.Model(x, layers.Dense(3)(layers.Flatten()(layers.MaxPooling2D(3, 2)(y))))


def masked_with_infinity():
    x = keras.Input((4, 6))
    logits = ops.where(x[:, :, :4] > 0.5, -float("inf"), layers.Dense(4)(x))
    logits = ops.concatenate([logits, ops.zeros_like(logits[..., :1])], axis=-1)
    probabilities = ops.exp(ops.log_softmax(logits)) + ops.softmax(logits)
    return keras.Model(x, layers.Dense(3)(layers.Flatten()(ops.tanh(probabilities))))


def norms(t):
    return ops.norm(t, axis=1, keepdims=True)


def with_roots():
    """Roots of zeros, and roots and logarithms in a branch that `where` does not take."""
    x = keras.Input((4,))
    y = layers.Dense(5, activation="relu")(x)
    positive = ops.where(y > 0, ops.log(y) / ops.sqrt(y), 0.0)
    return keras.Model(x, layers.Dense(3)(ops.concatenate([positive, layers.Lambda(norms)(0 * y)], axis=1)))


INFINITE = [padded_with_infinity, masked_with_infinity, with_roots]
MODELS = [plain, without_biases, normalized, shared_and_frozen, attentive, recurrent, *INFINITE]


def made(make, batch=3):
    keras.utils.set_random_seed(1)
    model = randomize(make())
    return model, normal(batch, *model.input_shape[1:], seed=2)


@pytest.mark.parametrize("make", MODELS)
def test_the_parts_sum_to_the_output(make):
    model, x = made(make)
    full = jvpreg.full_jacobian(model, x)
    assert numpy(full.completeness_error()).max() < 1e-12
    largest = numpy(full.outputs).max(axis=1)
    np.testing.assert_allclose(largest, numpy(model(x)).max(axis=1), rtol=1e-12)
    np.testing.assert_allclose(numpy(full.target_output), largest, rtol=1e-12)
    np.testing.assert_allclose(numpy(full.from_input() + full.from_biases()), largest, rtol=1e-9, atol=1e-12)
    kinds = sum(full.from_biases(kind) for kind in ("bias", "normalization", "other"))
    np.testing.assert_allclose(numpy(kinds), numpy(full.from_biases()), rtol=1e-12, atol=1e-14)


# `with_roots` is left out: on TensorFlow and on JAX the gradient of its plain loss is NaN already.
@pytest.mark.slow
@pytest.mark.parametrize("make", [padded_with_infinity, masked_with_infinity])
def test_a_penalty_on_the_full_jacobian_is_finite_where_values_are_not(make):
    model, x = made(make)
    trained = jvpreg.JacobianModel(model)
    penalties = [jvpreg.regularizers.FullJacobianNorm(0.1), jvpreg.regularizers.BiasJacobianNorm(0.1, target="all")]
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    trained.compile("sgd", loss, jacobian_regularizers=penalties)
    history = trained.fit(x, np.array([2, 0, 1]), verbose=0).history
    assert history["full_jacobian_norm_squared"][0] > 0
    assert history["bias_jacobian_norm_squared"][0] > 0
    assert all(np.all(np.isfinite(numpy(weight))) for weight in model.weights)


def test_values_that_are_known_to_be_finite_are_not_asked(monkeypatch):
    """`isfinite` is not called for them, so that an intercept costs no more than without the check."""
    model, x = made(normalized)
    monkeypatch.setattr(ops, "isfinite", lambda tensor: pytest.fail("asked"))
    assert jvpreg.linearize(model, x).intercepts


def test_a_wrong_part_is_seen_in_the_completeness_error():
    model, x = made(plain)
    full = jvpreg.full_jacobian(model, x)
    full.bias_jacobians[model.layers[0].name] = 1.01 * full.bias_jacobians[model.layers[0].name]
    assert numpy(full.completeness_error()).min() > 1e-5


def test_example_1_with_numbers():
    # z = (1·2 − 1·1 + 0.5, 0·2 + 2·1 − 3) = (1.5, −1); y = 2·relu(1.5) + 5·relu(−1) + 0.25 = 3.25
    model = keras.Sequential([keras.Input((2,)), layers.Dense(2, activation="relu", name="hidden"), layers.Dense(1)])
    model.set_weights(
        [np.array([[1.0, 0.0], [-1.0, 2.0]]), np.array([0.5, -3.0]), np.array([[2.0], [5.0]]), np.array([0.25])]
    )
    full = jvpreg.full_jacobian(model, np.array([[2.0, 1.0]]), target=np.array([0]))
    np.testing.assert_allclose(numpy(full.outputs), [[3.25]])
    np.testing.assert_allclose(numpy(full.input_jacobian), [[2.0, -2.0]])
    np.testing.assert_allclose(numpy(full.bias_jacobians["hidden"]), [[1.0, 0.0]])
    np.testing.assert_allclose(numpy(full.bias_jacobians["hidden/activation"]), [[0.0, 0.0]])
    np.testing.assert_allclose(numpy(full.bias_jacobians[model.layers[1].name]), [[0.25]])
    np.testing.assert_allclose(numpy(full.from_input()), [2.0])


def test_without_biases_the_input_alone_makes_the_output():
    """Proposition 1: a piecewise linear network without biases is `⟨x, ∇f⟩`."""
    model, x = made(without_biases)
    full = jvpreg.full_jacobian(model, x)
    np.testing.assert_allclose(numpy(full.from_input()), numpy(full.target_output), rtol=1e-12)
    for contribution in full.bias_jacobians.values():
        np.testing.assert_allclose(numpy(contribution), 0.0, atol=1e-14)


def test_bias_jacobians_are_the_biases_times_their_gradients():
    """Proposition 2, and the definition: `∇_b f ⊙ b`, of a convolution summed over the positions that share a bias."""
    model, x = made(normalized)
    full = jvpreg.full_jacobian(model, x, target=np.array([2, 0, 1]))
    convolution, last = model.layers[0], model.layers[-1]
    for layer in (convolution, last):
        bias = layer.bias
        expected = []
        for i, label in enumerate((2, 0, 1)):
            directions = [jvpreg.weight_jvp(model, x[i : i + 1], {bias.path: u})[1] for u in np.eye(bias.shape[0])]
            expected.append([numpy(d)[0, label] for d in directions] * numpy(bias.value))
        received = numpy(full.bias_jacobians[layer.name])
        received = received.sum(axis=tuple(range(1, received.ndim - 1)))
        np.testing.assert_allclose(received, expected, rtol=1e-10, atol=1e-13)


def test_sources():
    model, x = made(normalized)
    full = jvpreg.full_jacobian(model, x)
    kinds = {name.split("/")[0]: kind for name, kind in full.sources.items() if not name.endswith("/activation")}
    expected = ["bias", "normalization", "other", "other", "bias", "normalization", "other", "bias"]
    assert list(kinds.values()) == expected, kinds
    assert full.sources[f"{model.layers[4].name}/activation"] == "other"
    assert np.abs(numpy(full.bias_jacobians[f"{model.layers[4].name}/activation"])).max() > 1e-6  # the GELU's intercept


def test_targets():
    model, x = made(plain)
    outputs = numpy(model(x))
    labels = np.array([0, 2, 1])
    by_index = jvpreg.full_jacobian(model, x, target=labels)
    np.testing.assert_allclose(numpy(by_index.target_output), outputs[np.arange(3), labels], rtol=1e-12)
    by_list = jvpreg.full_jacobian(model, x, target=list(map(int, labels)))
    np.testing.assert_array_equal(numpy(by_list.target_output), numpy(by_index.target_output))
    by_column = jvpreg.full_jacobian(model, x, target=labels[:, None])
    np.testing.assert_array_equal(numpy(by_column.input_jacobian), numpy(by_index.input_jacobian))
    by_cotangent = jvpreg.full_jacobian(jvpreg.linearize(model, x), None, target=np.eye(3)[labels])
    np.testing.assert_allclose(numpy(by_cotangent.input_jacobian), numpy(by_index.input_jacobian), rtol=1e-12)


def test_several_inputs_and_outputs():
    a, b = keras.Input((3,)), keras.Input((2,))
    y = layers.Dense(4, activation="tanh")(layers.Concatenate()([a, b]))
    model = randomize(keras.Model([a, b], [layers.Dense(2)(y), layers.Multiply()([y, y])]))
    x, v = [normal(3, 3, seed=0), normal(3, 2, seed=1)], [normal(3, 2, seed=2), None]
    full = jvpreg.full_jacobian(model, x, target=v)
    np.testing.assert_allclose(numpy(full.target_output), (numpy(model(x)[0]) * v[0]).sum(axis=1), rtol=1e-12)
    assert numpy(full.completeness_error()).max() < 1e-13
    with pytest.raises(ValueError, match=r"`target`. Expected a cotangent like the outputs"):
        jvpreg.full_jacobian(model, x)


def test_gradients_at_some_nodes():
    model, x = made(normalized)
    lin = jvpreg.linearize(model, x)
    v = normal(3, 3, seed=5)
    at_input, at_nodes = lin.gradients(v, [model.layers[4].name])
    np.testing.assert_allclose(numpy(at_input), numpy(lin.vjp(v)), rtol=1e-12)
    (gradient,) = at_nodes.values()
    after = lin.after(model.layers[4].name)
    activation = jvpreg.linearize(layers.Activation("gelu"), lin.nodes[4].outputs[0].primal)
    np.testing.assert_allclose(numpy(gradient), numpy(activation.vjp(after.vjp(v))), rtol=1e-10)
    several = numpy(lin.gradients(np.stack([v, 2 * v]), [model.layers[4].name])[1][model.layers[4].name])
    np.testing.assert_allclose(several, np.stack([numpy(gradient), 2 * numpy(gradient)]), rtol=1e-12)
    part = lin.take([2, 0]).gradients(v[[2, 0]])[1][model.layers[4].name]
    np.testing.assert_allclose(numpy(part), numpy(gradient)[[2, 0]], rtol=1e-12)
    with pytest.raises(ValueError, match=r"`nodes`. Expected names among .* Received: conv9"):
        lin.gradients(v, ["conv9"])


def test_without_the_inputs_what_is_before_costs_nothing():
    model, x = made(plain)
    lin = jvpreg.linearize(model, x)
    lin.nodes[0].pushforward.function = None  # would fail if it were called
    at_inputs, at_nodes = lin.gradients(ops.ones((3, 3)), [f"{model.layers[0].name}/activation"], with_inputs=False)
    assert at_inputs is None
    np.testing.assert_allclose(
        numpy(at_nodes[f"{model.layers[0].name}/activation"]),
        numpy(lin.after(model.layers[0].name).vjp(np.ones((3, 3)))),
    )


def test_nodes_that_are_not_of_examples():
    x = keras.Input((4,))
    model = keras.Model(x, layers.Dense(2)(x - ops.tanh(ops.mean(x, axis=0))))
    with pytest.raises(ValueError, match=r"no gradient of each example at `mean.*depend on several of the 5 examples"):
        jvpreg.full_jacobian(model, normal(5, 4))
