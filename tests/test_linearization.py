"""The linearization of whole models: exact products, what is frozen, what is run, and what is refused."""

import keras
import numpy as np
import pytest
from cases import residual_block, several_inputs_and_outputs
from compare import assert_close, norm, normal, randomize
from keras import layers, ops

import jvpreg

numpy = ops.convert_to_numpy
BACKEND = keras.backend.backend()


def gated():
    """A mask, statistics, a slope and a product, on four features."""
    x = keras.Input((4,))
    y = layers.BatchNormalization()(layers.Dense(5, activation="relu")(x))
    return keras.Model(x, layers.Dense(3)(layers.Multiply()([y, layers.Dense(5, activation="sigmoid")(y)])))


# The arguments of the products, and what they return.


def test_probe_axis(float64):
    model = randomize(gated())
    x, u = normal(2, 4), normal(5, 2, 4, seed=1)
    lin = jvpreg.linearize(model, x)
    assert tuple(lin.jvp(u).shape) == (5, 2, 3)
    assert tuple(lin.jvp(u[:1]).shape) == (1, 2, 3)
    assert tuple(lin.jvp(u[0]).shape) == (2, 3)
    assert_close(lin.jvp(u), np.stack([numpy(lin.jvp(one)) for one in u]))
    v = normal(4, 2, 3, seed=2)
    assert tuple(lin.vjp(v).shape) == (4, 2, 4)
    assert_close(lin.vjp(v), np.stack([numpy(lin.vjp(one)) for one in v]))


def test_jvp_and_vjp_return_the_outputs_too(float64):
    model = randomize(gated())
    x, u, v = normal(2, 4), normal(2, 4, seed=1), normal(2, 3, seed=2)
    lin = jvpreg.linearize(model, x)
    y, ju = jvpreg.jvp(model, x, u)
    assert_close([y, ju], [lin.outputs, lin.jvp(u)])
    y, jtv = jvpreg.vjp(model, x, v)
    assert_close([y, jtv], [lin.outputs, lin.vjp(v)])


def test_none_is_a_zero_tangent(float64):
    model = randomize(several_inputs_and_outputs())
    x, u = [normal(2, 4), normal(2, 3)], normal(6, 2, 3, seed=1)
    lin = jvpreg.linearize(model, x)
    assert_close(lin.jvp([None, u])[0], lin.jvp([np.zeros((6, 2, 4)), u])[0])
    # The second output does not see the second input: a symbolic zero all the way.
    assert norm(lin.jvp([None, u])[1]) == 0
    v = normal(2, 3, seed=2)
    assert_close(lin.vjp([None, v])[0], lin.vjp([np.zeros((2, 2)), v])[0])
    assert norm(lin.vjp([None, v])[1]) == 0


@pytest.mark.parametrize("sequential", [True, False])
def test_bytes_are_linearized_as_the_floats_that_they_stand_for(sequential):
    """A tangent of an image of bytes is not rounded to bytes."""
    body = [layers.Rescaling(1 / 255, offset=-0.5), layers.Conv2D(2, 3), layers.Flatten()]
    x = keras.Input((4, 4, 1), dtype="uint8")
    model = keras.Sequential([x, *body])
    if not sequential:
        y = x
        for layer in body:
            y = layer(y)
        model = keras.Model(x, y)
    images = np.random.default_rng(0).integers(0, 256, size=(2, 4, 4, 1)).astype("uint8")
    u = normal(2, 4, 4, 1).astype("float32")
    lin = jvpreg.linearize(model, images)
    assert_close(lin.outputs, model(images), 1e-6)
    zero = jvpreg.linearize(model, images.astype("float32")).jvp(u)
    assert_close(lin.jvp(u), zero, 1e-6)
    assert norm(lin.jvp(u)) > 1e-4
    assert np.count_nonzero(numpy(lin.vjp(numpy(lin.outputs)))) > 0


def test_a_float_model_takes_integers():
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2)])
    x = np.array([[100, 2, 3]], "int64")
    assert_close(jvpreg.linearize(model, x).outputs, model(x), 1e-6)
    assert_close(jvpreg.linearize(model.layers[0], x).outputs, model(x), 1e-6)


def test_a_missing_last_axis_is_added_as_keras_does(float64):
    model = keras.Sequential([keras.Input((1,)), layers.Dense(2)])
    lin = jvpreg.linearize(model, normal(5))
    assert_close(lin.outputs, model(normal(5, 1)))
    assert tuple(lin.jvp(normal(5, 1)).shape) == (5, 2)


# What runs, and how often.


class Counted(layers.Layer):
    """tanh, with a rule that counts: once for the primal, and its pushforward."""

    def call(self, x):
        return ops.tanh(x)


@pytest.fixture
def counts():
    counts = {"rule": 0, "pushforward": 0}

    @jvpreg.register_rule(Counted)
    def counted(layer, x, context):
        counts["rule"] += 1
        y = ops.tanh(x)

        def push(tangent, slope):
            counts["pushforward"] += 1
            return tangent * slope

        return y, jvpreg.rules.Pushforward(push, 1 - y**2)

    return counts


def test_the_primal_runs_once(counts):
    model = keras.Sequential([keras.Input((3,)), Counted(), layers.Dense(2)])
    lin = jvpreg.linearize(model, normal(4, 3))
    assert counts == {"rule": 1, "pushforward": 0}
    lin.jvp(normal(7, 4, 3))
    assert counts == {"rule": 1, "pushforward": 1}
    lin.vjp(normal(4, 2))
    assert counts == {"rule": 1, "pushforward": 2}
    _ = lin.intercepts, lin.outputs
    lin.take([1]).jvp(normal(1, 3))
    assert counts == {"rule": 1, "pushforward": 4}


def test_a_zero_tangent_costs_nothing(counts):
    first, second = keras.Input((3,)), keras.Input((3,))
    model = keras.Model([first, second], layers.Add()([Counted()(first), second]))
    jvpreg.linearize(model, [normal(2, 3), normal(2, 3)]).jvp([None, normal(2, 3)])
    assert counts == {"rule": 1, "pushforward": 0}


def test_dropout_is_drawn_once_for_the_primal_and_all_tangents():
    model = keras.Sequential([keras.Input((50,)), layers.Dropout(0.5, seed=1), layers.Identity()])
    ones = np.ones((4, 50), "float32")
    lin = jvpreg.linearize(model, ones, training=True)
    kept = numpy(lin.outputs)
    assert 50 < np.count_nonzero(kept) < 150
    np.testing.assert_array_equal(numpy(lin.jvp(np.ones((3, 4, 50), "float32"))), np.stack([kept] * 3))
    np.testing.assert_array_equal(numpy(lin.vjp(ones)), kept)
    again = jvpreg.linearize(model, ones, training=True)
    assert np.any(numpy(again.outputs) != kept)
    np.testing.assert_array_equal(numpy(jvpreg.linearize(model, ones).jvp(ones)), ones)


def batch_normalized():
    model = keras.Sequential([keras.Input((3,)), layers.BatchNormalization(momentum=0.9)])
    return randomize(model)


def test_batch_statistics_move_once():
    model, twin = batch_normalized(), batch_normalized()
    x = normal(6, 3)
    lin = jvpreg.linearize(model, x, training=True)
    lin.jvp(normal(2, 6, 3))
    lin.vjp(normal(6, 3))
    before = numpy(batch_normalized().layers[0].moving_mean)
    twin(x, training=True)
    for ours, theirs in zip(model.non_trainable_variables, twin.non_trainable_variables, strict=True):
        assert_close(ours, theirs, 1e-6)
    assert norm(numpy(model.layers[0].moving_mean) - before) > 1e-2


def _slopes(lin, layer, variance):
    return numpy(layer.gamma) / np.sqrt(variance + layer.epsilon)


def test_batch_statistics_modes_and_their_defaults(float64):
    model, x, u = batch_normalized(), normal(6, 3), normal(6, 3, seed=1)
    layer = model.layers[0]
    gamma = numpy(layer.gamma)
    moving = numpy(layer.moving_variance)
    by_moving = u * gamma / np.sqrt(moving + layer.epsilon)
    by_batch = u * gamma / np.sqrt(x.var(0) + layer.epsilon)
    assert_close(jvpreg.linearize(model, x).jvp(u), by_moving)
    assert_close(jvpreg.linearize(model, x, batch_statistics="moving").jvp(u), by_moving)
    assert_close(jvpreg.linearize(model, x, batch_statistics="frozen").jvp(u), by_batch)
    # Outside training mode the moving averages do not move.
    assert_close(layer.moving_variance, moving)
    assert_close(jvpreg.linearize(model, x, training=True, batch_statistics="moving").jvp(u), by_moving)
    assert_close(layer.moving_variance, moving)
    assert_close(jvpreg.linearize(model, x, training=True).jvp(u), by_batch)
    assert norm(numpy(layer.moving_variance) - moving) > 1e-3


def test_only_coupled_statistics_mix_examples(float64):
    model, x = batch_normalized(), normal(6, 3)
    u = np.zeros((6, 3))
    u[0] = 1.0
    frozen = numpy(jvpreg.linearize(model, x, batch_statistics="frozen").jvp(u))
    coupled = numpy(jvpreg.linearize(model, x, batch_statistics="coupled").jvp(u))
    assert norm(frozen[1:]) == 0
    assert norm(coupled[1:]) > 1e-2
    # The same shift of every example changes nothing in the batch map.
    everywhere = jvpreg.linearize(model, x, batch_statistics="coupled").jvp(np.ones((6, 3)))
    assert norm(everywhere) < 1e-12


def test_a_batch_normalization_that_is_not_trainable_uses_moving_averages(float64):
    model, x, u = batch_normalized(), normal(6, 3), normal(6, 3, seed=1)
    expected = jvpreg.linearize(model, x).jvp(u)
    model.layers[0].trainable = False
    moving = numpy(model.layers[0].moving_mean)
    lin = jvpreg.linearize(model, x, training=True)
    assert_close(lin.jvp(u), expected)
    assert_close(lin.outputs, model(x, training=True))
    assert_close(model.layers[0].moving_mean, moving)


def test_frozen_masks_are_booleans():
    model = keras.Sequential(
        [keras.Input((4, 4, 2)), layers.Conv2D(2, 3, padding="same", activation="relu"), layers.MaxPooling2D(2)]
    )
    model.add(layers.LeakyReLU())
    lin = jvpreg.linearize(model, normal(3, 4, 4, 2))
    # The convolution keeps its input too, for tangents of its kernel; the next layer's backpropagation has it anyway.
    frozen = [node for node in lin.nodes if not isinstance(node.operation, layers.Conv2D)]
    if keras.backend.backend() == "torch":  # Torch's kernels take the outputs of ReLU, which are kept anyway
        kept = [node for node in frozen if not isinstance(node.operation, layers.MaxPooling2D)]
        assert len(kept) == 2
        assert all(node.pushforward.residuals[0] is node.outputs[0].primal for node in kept)
        frozen = [node for node in frozen if node not in kept]
    residuals = [residual for node in frozen for residual in node.pushforward.residuals]
    assert len(residuals) == 3 + 2 * (keras.backend.backend() != "torch")
    assert {keras.backend.standardize_dtype(residual.dtype) for residual in residuals} == {"bool"}


def test_small_tangents_keep_their_digits_where_inputs_are_shifted():
    """A pushforward computed as a difference, `f(u) − f(0)`, would lose them to the offset."""
    for layer in (
        layers.Rescaling(0.5, offset=-1000.0),
        layers.Normalization(mean=[120.0], variance=[4.0]),
        layers.Normalization(mean=[120.0], variance=[0.25], invert=True),
    ):
        layer.build((None, 1))
        product = jvpreg.linearize(layer, np.ones((1, 1), "float32")).jvp(np.full((1, 1), 1e-6, "float32"))
        np.testing.assert_allclose(numpy(product), 0.5e-6, rtol=1e-6)


def test_take(float64):
    model = randomize(gated())
    x, u, v = normal(5, 4), normal(3, 5, 4, seed=1), normal(5, 3, seed=2)
    lin = jvpreg.linearize(model, x, training=True)
    part = lin.take([3, 1])
    assert_close(part.outputs, numpy(lin.outputs)[[3, 1]])
    assert_close(part.inputs, x[[3, 1]])
    assert_close(part.jvp(u[:, [3, 1]]), numpy(lin.jvp(u))[:, [3, 1]])
    assert_close(part.vjp(v[[3, 1]]), numpy(lin.vjp(v))[[3, 1]])
    name = next(iter(lin.intercepts))
    assert_close(part.intercepts[name], numpy(lin.intercepts[name])[[3, 1]])
    with pytest.raises(ValueError, match=r"each example's tangent depends on the whole batch"):
        jvpreg.linearize(batch_normalized(), normal(4, 3), batch_statistics="coupled").take([0])


@pytest.mark.parametrize(
    ("mix", "apart"),
    [
        (lambda x: ops.einsum("bd,cd->bc", x, x), lambda x: ops.einsum("bd,be->bde", x, x)),
        (lambda x: ops.einsum("bd,bd", x, x), lambda x: ops.einsum("...d,de->...e", x, np.ones((4, 2)))),
        (lambda x: ops.matmul(x, ops.transpose(x)), lambda x: ops.matmul(x, np.ones((4, 2)))),
        (lambda x: ops.tensordot(x, x, axes=[[0], [0]]), lambda x: ops.tensordot(x, np.ones((4, 2)), axes=1)),
        (lambda x: ops.dot(x, ops.transpose(x)), lambda x: ops.dot(x, np.ones((4, 2)))),
        (lambda x: ops.matmul(x[:, None], x), lambda x: ops.matmul(x[:, None], x[:, :, None])),
        (lambda x: ops.var(x, axis=0), lambda x: ops.std(x, axis=1)),
        (lambda x: ops.logsumexp(x, axis=(0, 1)), lambda x: ops.logsumexp(x, axis=-1)),
        (lambda x: ops.normalize(x, axis=0), lambda x: ops.normalize(x, axis=-1)),
        (lambda x: ops.softmax(x, axis=0), lambda x: ops.softmax(x, axis=1)),
        (lambda x: ops.log_softmax(x, axis=-2), lambda x: ops.log_softmax(x)),
        (lambda x: ops.glu(x, axis=0), lambda x: ops.glu(x)),
        (lambda x: ops.take(x, ops.argmax(x, axis=1), axis=0), lambda x: ops.take(x, [1, 0], axis=1)),
    ],
)
def test_operations_that_mix_examples_say_so(float64, mix, apart):
    x = keras.Input((4,))
    points = normal(4, 4)
    mixed = jvpreg.linearize(keras.Model(x, mix(x)), points)
    for ask in (lambda: mixed.take([1]), mixed.jacobian):
        with pytest.raises(ValueError, match="couples the examples"):
            ask()
    lin, u = jvpreg.linearize(keras.Model(x, apart(x)), points), normal(4, 4, seed=1)
    assert_close(lin.take([1]).jvp(u[[1]]), numpy(lin.jvp(u))[[1]])


def test_take_and_tangents_of_weights(float64):
    model = randomize(
        keras.Sequential([keras.Input((3, 4)), layers.GroupNormalization(2), layers.LayerNormalization()])
    )
    lin = jvpreg.linearize(model, normal(5, 3, 4))
    moved = [(variable, normal(*variable.shape)) for variable in model.trainable_variables]
    assert_close(lin.take([3, 1]).jvp(weights=moved), numpy(lin.jvp(weights=moved))[[3, 1]])


def test_arrays_among_the_operands(float64):
    x = keras.Input((4,))
    kernel, extra = normal(4, 3), normal(2, 3, seed=1)
    model = keras.Model(x, ops.concatenate([extra, ops.matmul(x, kernel) * np.arange(3.0)], axis=1))
    points, u = normal(2, 4), normal(2, 4, seed=2)
    assert_close(jvpreg.linearize(model, points).jvp(u), np.concatenate([0 * extra, u @ kernel * np.arange(3.0)], 1))


@pytest.mark.parametrize("indices", [0, [0.5], [True, False], [[0]]])
def test_take_of_what_are_no_indices(indices):
    lin = jvpreg.linearize(gated(), normal(2, 4))
    with pytest.raises(ValueError, match=r"argument `indices`\. Expected a vector \(N,\) of integers"):
        lin.take(indices)


def test_examples_that_move_to_another_axis(float64):
    """The Jacobian of each example is known, but the values frozen in between cannot be divided by examples."""
    x = keras.Input((2, 4))
    y = ops.reshape(layers.Dense(3, activation="tanh")(ops.reshape(x, (-1, 4))), (-1, 6))
    model = randomize(keras.Model(x, y))
    lin = jvpreg.linearize(model, normal(3, 2, 4))
    assert tuple(lin.jacobian().shape) == (3, 6, 2, 4)
    with pytest.raises(ValueError, match=r"moves the examples of a batch from its first axis.*Received: `reshape"):
        lin.take([0])
    apart = keras.Model(x, ops.reshape(ops.reshape(x, (-1, 8)), (-1, 4, 2)))
    jvpreg.linearize(apart, normal(3, 2, 4)).take([0])


def test_numbers_of_numpy_among_the_operands(float64):
    class Scaled(layers.Layer):
        def call(self, x):
            scaled = x * np.float32(2) / np.sqrt(np.float32(64)) + np.array(1.0) - x ** np.int64(2) + 2.5**x
            return ops.where(scaled > np.float64(0.5), ops.maximum(scaled, np.float32(0.1)), np.float32(0.5))

    layer = Scaled()
    layer.build((None, 4))
    x, u = normal(3, 4), normal(3, 4, seed=1)
    lin, step = jvpreg.linearize(layer, x), 1e-6
    assert_close(lin.outputs, layer(ops.convert_to_tensor(x)))
    both = [numpy(layer(ops.convert_to_tensor(x + sign * step * u))) for sign in (1, -1)]
    assert_close(lin.jvp(u), (both[0] - both[1]) / (2 * step), 1e-7)


def test_single_numbers_side_by_side(float64):
    x = keras.Input((3,))
    model = keras.Model(x, ops.stack([ops.sum(x), 2.0 * ops.mean(x)]))
    np.testing.assert_allclose(jvpreg.linearize(model, normal(2, 3)).jvp(np.ones((2, 3))), [6.0, 2.0])


def test_an_extremum_of_which_no_entry_is_the_winner(float64):
    x = keras.Input((3,))
    model = keras.Model(x, ops.max(x, axis=-1, initial=0.5))
    lin = jvpreg.linearize(model, np.array([[0.1, 0.2, 0.3], [0.1, 0.9, 0.3]]))
    np.testing.assert_array_equal(lin.jvp(np.ones((2, 3))), [0.0, 1.0])


def test_autodiff_says_of_an_operation_that_it_mixes_examples(float64):
    x = keras.Input((3,))
    for axis, mixes in ((0, True), (1, False)):
        lin = jvpreg.linearize(keras.Model(x, ops.sort(x, axis=axis)), normal(3, 3), fallback="ignore")
        assert lin.couples_examples == mixes


def test_take_with_frozen_statistics_keeps_those_of_the_whole_batch(float64):
    model, x, u = batch_normalized(), normal(6, 3), normal(6, 3, seed=1)
    lin = jvpreg.linearize(model, x, training=True)
    assert_close(lin.take([4]).jvp(u[[4]]), numpy(lin.jvp(u))[[4]])


# Intercepts.


def test_intercepts_are_the_biases(float64):
    x = keras.Input((3,))
    dense, norm_layer = layers.Dense(4, activation="relu", name="dense"), layers.BatchNormalization(name="norm")
    model = randomize(keras.Model(x, norm_layer(dense(x))))
    lin = jvpreg.linearize(model, normal(2, 3))
    assert list(lin.intercepts) == ["dense", "dense/activation", "norm"]
    assert_close(lin.intercepts["dense"], np.stack([numpy(dense.bias)] * 2))
    assert norm(lin.intercepts["dense/activation"]) == 0
    slope = numpy(norm_layer.gamma) / np.sqrt(numpy(norm_layer.moving_variance) + norm_layer.epsilon)
    implicit = numpy(norm_layer.beta) - numpy(norm_layer.moving_mean) * slope
    assert_close(lin.intercepts["norm"], np.stack([implicit] * 2))


def test_bias_jacobians_are_gradients_times_intercepts(float64):
    lin = jvpreg.linearize(randomize(residual_block()), normal(2, 5, 5, 3))
    v = normal(3, *lin.outputs.shape, seed=1)
    at_input, biases = lin.bias_jacobians(v)
    pulled, gradients = lin.gradients(v, list(biases))
    assert_close(at_input, pulled)
    for name, intercept in lin.intercepts.items():
        assert_close(biases[name], gradients[name] * intercept[None])
    last = list(biases)[-1]
    nothing, one = lin.bias_jacobians(v[0], [last], with_inputs=False)
    assert nothing is None
    assert list(one) == [last]
    assert_close(one[last], biases[last][0])


# The pullback node by node.


def split_and_joined():
    """A model with a node of two outputs of different shapes, one that takes an input twice, and one not reached."""
    x = keras.Input((5,))
    hidden = layers.Dense(5, activation="tanh")(x)
    left, right = ops.split(hidden, [2], axis=-1)
    product = layers.Multiply()([right, right])
    return randomize(keras.Model(x, [layers.Dense(3)(product), layers.Concatenate()([hidden, product]), left]))


def unchanged(node, cotangents):
    return cotangents


def test_a_modified_pullback_without_a_change_is_the_pullback(float64):
    lin = jvpreg.linearize(split_and_joined(), normal(4, 5))
    v = [normal(2, *y.shape, seed=i) for i, y in enumerate(lin.outputs)]
    for cotangents in (v, [None, v[1], None], [v[0], None, None]):
        assert_close(lin.modified_vjp(cotangents, unchanged), lin.vjp(cotangents))
    assert_close(lin.take([3, 1]).modified_vjp([c[:, [3, 1]] for c in v], unchanged), numpy(lin.vjp(v))[:, [3, 1]])


def test_a_change_that_is_no_function():
    lin = jvpreg.linearize(split_and_joined(), normal(4, 5))
    with pytest.raises(ValueError, match=r"argument `change`\. Expected a function"):
        lin.modified_vjp([None, None, None], "relu")


def test_a_modified_pullback_changes_what_comes_back_to_a_node(float64):
    lin = jvpreg.linearize(split_and_joined(), normal(4, 5))
    seen, v = [], [normal(*y.shape, seed=i) for i, y in enumerate(lin.outputs)]

    def doubled(node, cotangents):
        seen.append(node.name)
        return [2 * c for c in cotangents] if node is lin.nodes[0] else cotangents

    assert_close(lin.modified_vjp(v, doubled), 2 * lin.vjp(v))
    assert seen == [node.name for node in reversed(lin.nodes)]


def test_contributions_sum_to_the_output(float64):
    """Each intercept by itself, pushed from where it arises: `f(x) = J x + Σ_l J_l c_l`."""
    model = randomize(residual_block())
    lin = jvpreg.linearize(model, normal(2, 5, 5, 3))
    total = lin.jvp(lin.inputs[0])
    for name, intercept in lin.intercepts.items():
        total = total + lin.jvp(taps={name: intercept})
    assert_close(total, lin.outputs)
    assert norm(lin.outputs - lin.jvp(lin.inputs[0])) > 1e-2


# Precision.


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_returns_float32(policy):
    def make(policy):
        return keras.Sequential(
            [
                keras.Input((6,)),
                layers.Dense(8, activation="tanh", dtype=policy),
                layers.BatchNormalization(dtype=policy),
                layers.Dense(3, dtype=policy),
            ]
        )

    mixed, full = randomize(make(policy)), randomize(make("float32"))
    x, u, v = (normal(*shape).astype("float32") for shape in ((4, 6), (2, 4, 6), (4, 3)))
    lin, expected = jvpreg.linearize(mixed, x), jvpreg.linearize(full, x)
    half = policy.removeprefix("mixed_")
    assert keras.backend.standardize_dtype(lin.outputs.dtype) == half
    for product, exact in ((lin.jvp(u), expected.jvp(u)), (lin.vjp(v), expected.vjp(v))):
        assert keras.backend.standardize_dtype(product.dtype) == "float32"
        # A few roundings of 8 (bfloat16) or 11 bits (float16) each.
        assert_close(product, exact, 3e-2 if half == "bfloat16" else 4e-3)


# Losses that layers record.


class Charged(layers.Layer):
    def call(self, x):
        self.add_loss(ops.mean(ops.square(x)))
        return x


def test_activity_losses_are_those_of_keras():
    model = keras.Sequential(
        [
            keras.Input((3,)),
            layers.Dense(4, activation="tanh", activity_regularizer="l2"),
            layers.ActivityRegularization(l1=0.1),
            Charged(),
            layers.Dense(2, kernel_regularizer="l2"),
        ]
    )
    x = normal(5, 3)
    model(x)
    expected = [numpy(loss) for loss in model.losses]
    for _ in range(2):
        # The second time as well: the losses of the last run are cleared, as by a call of the model.
        assert jvpreg.linearize(model, x).fallbacks == {}
        assert_close(model.losses, expected, 1e-6)
    assert len(expected) == 4


def test_losses_within_a_call_are_kept():
    """`linearize` in the middle of another layer's call does not clear what ran before it."""
    shared = layers.Dense(3, activity_regularizer="l2")
    block = keras.Sequential([keras.Input((3,)), shared])

    class Outer(layers.Layer):
        def __init__(self):
            super().__init__()
            self.block = block

        def call(self, x):
            return jvpreg.linearize(self.block, self.block(x)).outputs

    outer = Outer()
    for _ in range(2):
        outer(normal(2, 3))
        assert len(outer.losses) == 2


# Compiled.


def test_linearize_inside_jit():
    traces = []
    model = randomize(gated())
    x, u = normal(2, 4).astype("float32"), normal(3, 2, 4, seed=1).astype("float32")

    def products(x, u):
        traces.append(1)
        lin = jvpreg.linearize(model, x)
        ju = lin.jvp(u)
        return lin.outputs, ju, lin.vjp(ju)

    if BACKEND == "jax":
        import jax

        compiled = jax.jit(products)
    elif BACKEND == "tensorflow":
        import tensorflow as tf

        compiled = tf.function(products, autograph=False)
    else:
        pytest.skip("torch.compile takes half a minute; eager is Torch's usual mode")
    expected = [numpy(t) for t in products(x, u)]
    traces.clear()
    x, u = ops.convert_to_tensor(x), ops.convert_to_tensor(u)
    assert_close(list(compiled(x, u)), expected, 1e-5)
    compiled(2 * x, 3 * u)
    assert len(traces) == 1


@pytest.mark.skipif(BACKEND != "tensorflow", reason="only TensorFlow has unknown shapes")
@pytest.mark.parametrize(
    ("make", "rank"),
    [
        (lambda x: layers.GroupNormalization(2)(x), 4),
        (lambda x: layers.MultiHeadAttention(2, 3)(x, x, use_causal_mask=True), 3),
    ],
)
def test_unknown_sizes_of_all_axes_but_the_channels(float64, make, rank):
    import tensorflow as tf

    x = keras.Input((*[None] * (rank - 2), 4))
    model = randomize(keras.Model(x, make(x)))
    shape = (2, 3, 5, 4)[4 - rank :]
    points, u = normal(*shape), normal(3, *shape, seed=1)
    specs = [tf.TensorSpec(x.shape, "float64"), tf.TensorSpec((None, *x.shape), "float64")]
    product = tf.function(lambda x, u: jvpreg.linearize(model, x).jvp(u), specs, autograph=False)
    assert_close(product(points, u), jvpreg.linearize(model, points).jvp(u))


@pytest.mark.slow
@pytest.mark.skipif(BACKEND != "tensorflow", reason="only TensorFlow has unknown shapes")
@pytest.mark.parametrize("jit", [False, True])
def test_unknown_batch_size(jit):
    import tensorflow as tf

    x = keras.Input((8, 8, 2))
    y = layers.Conv2D(4, 3, padding="same", activation="relu")(x)
    y = layers.SpatialDropout2D(0.2, seed=1)(layers.BatchNormalization()(y))
    y = layers.Add()([layers.MaxPooling2D(2)(y), layers.MaxPooling2D(3, strides=2, padding="same")(y)])
    gates = layers.Dense(4, activation="sigmoid")(layers.GlobalMaxPooling2D()(y))
    y = layers.Multiply()([y, layers.Reshape((1, 1, 4))(gates)])
    y = layers.Average()([y, ops.ones((1, 1, 1, 4))])
    y = layers.AlphaDropout(0.2, seed=2)(layers.Dropout(0.2, seed=3)(y))
    y = layers.Concatenate()([layers.Flatten()(y), layers.GlobalAveragePooling2D()(y)])
    model = randomize(keras.Model(x, layers.Dense(3)(y)))
    signature = [tf.TensorSpec((None, 8, 8, 2)), tf.TensorSpec((None, None, 8, 8, 2))]

    @tf.function(input_signature=signature, jit_compile=jit, autograph=False)
    def products(x, u):
        lin = jvpreg.linearize(model, x)
        ju = lin.jvp(u)
        return lin.outputs, ju, lin.vjp(ju), jvpreg.linearize(model, x, training=True).jvp(u)

    # One shape with XLA, which compiles for each shape anyway.
    for batch, num_probes in ((3, 2),) if jit else ((3, 2), (5, 1)):
        images = normal(batch, 8, 8, 2).astype("float32")
        u = normal(num_probes, batch, 8, 8, 2, seed=1).astype("float32")
        lin = jvpreg.linearize(model, images)
        expected = [lin.outputs, lin.jvp(u), lin.vjp(lin.jvp(u))]
        *received, in_training = products(images, u)
        assert_close(received, expected, 1e-5)
        assert in_training.shape == (num_probes, batch, 3)


# Bad input: one error each, before anything is computed.


@pytest.fixture
def small():
    return jvpreg.linearize(keras.Sequential([keras.Input((3,)), layers.Dense(2)]), normal(4, 3))


@pytest.fixture
def two_inputs():
    return jvpreg.linearize(several_inputs_and_outputs(), [normal(2, 4), normal(2, 3)])


@pytest.mark.parametrize("shape", [(3,), (4, 4), (5, 3), (2, 4, 2), (1, 2, 4, 3), ()])
def test_wrong_shape_of_u(small, shape):
    message = rf"`u`. Expected shape \(4, 3\), like x, or \(P, 4, 3\).* Received: u with shape {str(shape)[:-1]}"
    with pytest.raises(ValueError, match=message.replace("shape (", r"shape \(")):
        small.jvp(np.ones(shape))


@pytest.mark.parametrize("shape", [(2,), (4, 3), (5, 2), (2, 4, 3)])
def test_wrong_shape_of_v(small, shape):
    with pytest.raises(ValueError, match=r"`v`. Expected shape \(4, 2\), like the outputs, or \(P, 4, 2\).* Received"):
        small.vjp(np.ones(shape))


def test_wrong_number_of_tensors(two_inputs, small):
    with pytest.raises(ValueError, match=r"`u`. Expected 2 tensor.*one for each input.* Received: 1"):
        two_inputs.jvp(normal(2, 4))
    with pytest.raises(ValueError, match=r"`u`. Expected 2 tensor.* Received: 3"):
        two_inputs.jvp([normal(2, 4), normal(2, 3), None])
    with pytest.raises(ValueError, match=r"`u`. Expected 1 tensor.* Received: 2"):
        small.jvp([normal(4, 3), normal(4, 3)])
    with pytest.raises(ValueError, match=r"`v`. Expected 2 tensor.*the outputs. Received: 1"):
        two_inputs.vjp([normal(2, 2)])
    with pytest.raises(ValueError, match=r"`u`. Expected at least one tensor. Received: None"):
        two_inputs.jvp([None, None])
    with pytest.raises(ValueError, match=r"`u`. Expected a dict with the keys .*zulu.* add \['zulu'\]"):
        two_inputs.jvp({"alpha": normal(2, 3)})


def test_mismatched_probes(two_inputs):
    for u in ([normal(5, 2, 4), normal(6, 2, 3)], [normal(5, 2, 4), normal(2, 3)]):
        with pytest.raises(ValueError, match=r"`u`. Expected the same number of probes in every tensor. Received"):
            two_inputs.jvp(u)


def test_unknown_batch_statistics():
    with pytest.raises(ValueError, match=r"`batch_statistics`. Expected .moving., .* Received: .*'batch'"):
        jvpreg.linearize(batch_normalized(), normal(2, 3), batch_statistics="batch")


def test_not_a_keras_object():
    for model in (np.tanh, "model", None):
        with pytest.raises(ValueError, match=r"`model`. Expected a Keras model or layer. Received: model="):
            jvpreg.linearize(model, normal(2, 3))


@pytest.mark.parametrize("model", [layers.Dense(2, name="new"), keras.Sequential([layers.Dense(2)], name="new")])
def test_unbuilt_model(model):
    with pytest.raises(ValueError, match=r"`model`. Expected a built model. Received: `new`.* Call it on a batch"):
        jvpreg.linearize(model, normal(2, 3))


def _head(activation):
    x = keras.Input((3,))
    dense = layers.Dense(2, name="head", activation=activation if isinstance(activation, str) else None)
    y = dense(x)
    return keras.Model(x, y if isinstance(activation, str) else activation(y), name="classifier")


@pytest.mark.parametrize("activation", ["softmax", "sigmoid", layers.Softmax(), layers.Activation("softmax")])
def test_a_probability_head_warns_once(activation, recwarn):
    model = _head(activation)
    name = "head/activation" if isinstance(activation, str) else activation.name
    for _ in range(3):
        jvpreg.linearize(model, normal(2, 3))
    messages = [str(warning.message) for warning in recwarn]
    assert len(messages) == 1
    kind = "sigmoid" if activation == "sigmoid" else "softmax"
    assert messages[0].startswith(f"`classifier` ends in a {kind} (`{name}`)")
    assert "from_logits=True" in messages[0]


def test_a_probability_head_among_several_outputs_warns():
    """It warns whichever of the heads runs last."""
    for heads in (["softmax", None], [None, "softmax"]):
        x = keras.Input((3,))
        model = keras.Model(x, [layers.Dense(2, activation=head)(x) for head in heads])
        with pytest.warns(UserWarning, match=r"ends in a softmax"):
            jvpreg.linearize(model, normal(2, 3))


@pytest.mark.parametrize("product", [jvpreg.linearize, jvpreg.jacobian, lambda model, x: jvpreg.jvp(model, x, x)])
def test_a_warning_is_of_the_callers_line(product):
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2, activation="softmax")])
    with pytest.warns(UserWarning, match="ends in a softmax") as caught:
        product(model, np.zeros((1, 3)))
    assert [warning.filename for warning in caught] == [__file__]


def test_no_warning_without_a_probability_head(recwarn):
    jvpreg.linearize(_head("tanh"), normal(2, 3))
    jvpreg.linearize(gated(), normal(2, 4))
    # A layer by itself is not a head.
    jvpreg.linearize(layers.Softmax(), normal(2, 3))
    assert not list(recwarn)


@pytest.mark.parametrize(
    ("push", "received"),
    [
        (lambda t: t[..., :2], r"\(1, 4, 2\)"),
        (lambda t: ops.sum(t, axis=0), r"\(4, 3\)"),
        (lambda t: t[:, :2], r"\(1, 2, 3\)"),
    ],
)
def test_a_rule_that_returns_the_wrong_shape(push, received):
    class Wrong(layers.Layer):
        def call(self, x):
            return x

    @jvpreg.register_rule(Wrong)
    def wrong(layer, x, context):
        return x, jvpreg.rules.Pushforward(push)

    lin = jvpreg.linearize(keras.Sequential([keras.Input((3,)), Wrong(name="wrong")]), normal(4, 3))
    message = rf"rule of `wrong` \(Wrong\).*wrong shape. Expected \(1, 4, 3\), probes first.* Received: {received}"
    with pytest.raises(ValueError, match=message):
        lin.jvp(normal(4, 3))
