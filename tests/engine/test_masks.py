"""Masks: the engine follows them through a graph as Keras does, frozen, and its products are exact under them."""

import keras
import numpy as np
import pytest
from compare import (
    JAX,
    assert_close,
    at_once,
    attention_written_out,
    inner,
    norm,
    normal,
    numpy,
    randomize,
    without_rounded_attention,
)
from keras import layers, ops, tree

import jvpreg
from jvpreg.common.keras_private import get_mask, set_mask
from jvpreg.engine.transpose import transpose

# From this seed, the masks of each pattern differ between the examples.
BATCH, STEPS, SEED = 4, (5, 3), 2


class MaskBy(layers.Layer):
    """Puts the first input under a mask. The mask is made of the second input and differs from example to example.

    The masked steps keep their values, so that a layer that does not heed the mask gives itself away.
    """

    def __init__(self, pattern="holes", **kwargs):
        super().__init__(**kwargs)
        self.pattern = pattern

    def call(self, inputs):
        return 1.0 * inputs[0]

    def compute_mask(self, inputs, mask=None):
        above = inputs[1] > 0
        if self.pattern == "holes":  # The first step is never masked.
            return ops.logical_or(above, ops.arange(above.shape[1]) == 0)
        if self.pattern == "left":
            return ops.cumsum(ops.cast(above, "int32"), axis=1) > 0
        if self.pattern == "right":
            return ops.cumsum(ops.cast(above, "int32"), axis=1) < 2
        return ops.logical_and(above, above[:, :1])  # "rows": some examples are masked as a whole.


PATTERNS = ["holes", "left", "right", "rows"]


def masked_model(*head, pattern="holes"):
    x, key = keras.Input(STEPS), keras.Input(STEPS[:1])
    y = MaskBy(pattern)([x, key])
    for layer in head:
        y = layer(y)
    return keras.Model([x, key], y)


def drawn_inputs(model):
    return [ops.convert_to_tensor(normal(BATCH, *x.shape[1:], seed=SEED + i)) for i, x in enumerate(model.inputs)]


def check(model, **arguments):
    """Check all products, also those along weights, and the gradient of the penalty."""
    jvpreg.testing.check_rule(model, [x.shape[1:] for x in model.inputs], batch_size=BATCH, jit=JAX, **arguments)
    check_products(model)


def check_products(model, x=None, tolerance=1e-10):
    """Check outputs, their masks, both products, completeness and a part of two examples against the model itself.

    Directions are 0 where `x` is 0, since a step away from 0 would change the mask of `Masking`.
    """
    model = randomize(model)
    x = drawn_inputs(model) if x is None else x
    u = [ops.convert_to_tensor(normal(*a.shape, seed=10 + i) * (numpy(a) != 0)) for i, a in enumerate(x)]

    def reference(inputs):
        return tree.flatten(model(inputs if len(inputs) > 1 else inputs[0]))

    expected = reference(x)
    v = [ops.convert_to_tensor(normal(*y.shape, seed=20 + i)) for i, y in enumerate(expected)]

    def products(x, u, v):
        lin = jvpreg.linearize(model, x, fallback="error")
        assert not lin.couples_examples
        outputs = tree.flatten(lin.outputs)
        products = (
            lin.vjp(tree.pack_sequence_as(lin.outputs, v)),
            lin.jvp(u),
            lin.jvp(lin.inputs, taps=lin.intercepts),
            lin.take([2, 1]).jvp([ops.take(a, [2, 1], axis=0) for a in u]),
        )
        return outputs, [get_mask(y) for y in outputs], *map(tree.flatten, products)

    received, masks, pulled, pushed, complete, alone = at_once(products)(x, u, v)
    assert_close(received, expected, tolerance)
    assert_same_masks(masks, [get_mask(y) for y in expected])
    assert_close(pulled, transpose(reference, x, v), tolerance)
    assert norm(pushed) > 0
    ahead, behind = (reference([a + step * b for a, b in zip(x, u, strict=True)]) for step in (1e-6, -1e-6))
    assert_close(pushed, [(numpy(a) - numpy(b)) / 2e-6 for a, b in zip(ahead, behind, strict=True)], 1e-7)
    assert abs(inner(pushed, v) - inner(u, pulled)) <= tolerance * norm(pushed) * norm(v)
    assert_close(complete, expected, tolerance)
    assert_close(alone, [y[1:3][::-1] for y in map(numpy, pushed)], tolerance)


def assert_same_masks(received, expected):
    assert [mask is None for mask in received] == [mask is None for mask in expected]
    for mask, like in zip(received, expected, strict=True):
        if mask is not None:
            np.testing.assert_array_equal(numpy(mask), numpy(like))


def test_the_patterns_are_those_that_their_names_say():
    _, key = drawn_inputs(masked_model())
    holes, left, right, rows = (numpy(MaskBy(name).compute_mask([None, key])) for name in PATTERNS)
    assert all(len({tuple(row) for row in mask}) > 2 for mask in (holes, left, right))
    assert np.any(np.diff(holes.astype(int)) > 0)
    assert np.all(np.diff(left.astype(int)) >= 0)
    assert np.all(np.diff(right.astype(int)) <= 0)
    assert 0 < np.sum(~rows.any(1)) < BATCH


# Recurrent layers.


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["rows"] if JAX else PATTERNS)
def test_lstm(float64, pattern):
    check(masked_model(layers.LSTM(2), layers.Dense(2), pattern=pattern))


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="torch.compile takes half a minute a model")
def test_lstm_compiled(float64):
    model = randomize(masked_model(layers.LSTM(2), pattern="left"))
    x = drawn_inputs(model)
    u = [ops.convert_to_tensor(normal(3, *a.shape, seed=4)) for a in x]

    def products(x, u):
        lin = jvpreg.linearize(model, x)
        return lin.outputs, lin.jvp(u)

    assert_close(jvpreg.testing.compiled(products)(x, u), products(x, u))


RECURRENT = {
    "GRU": lambda: layers.GRU(2, return_sequences=True),
    "SimpleRNN-back": lambda: layers.SimpleRNN(2, return_sequences=True, go_backwards=True),
    "LSTM-zero": lambda: layers.LSTM(2, return_sequences=True, zero_output_for_mask=True),
    "LSTM-zero-back": lambda: layers.LSTM(2, zero_output_for_mask=True, go_backwards=True),
    "LSTM-states": lambda: layers.LSTM(2, return_state=True, return_sequences=True),
    "LSTM-unrolled": lambda: layers.LSTM(2, unroll=True),
    "cells": lambda: layers.RNN([layers.GRUCell(3), layers.LSTMCell(2)], return_sequences=True),
    "Bidirectional": lambda: layers.Bidirectional(layers.LSTM(2, return_sequences=True)),
    "Bidirectional-last": lambda: layers.Bidirectional(layers.GRU(2), merge_mode="mul"),
    "Bidirectional-both": lambda: layers.Bidirectional(layers.SimpleRNN(2, return_sequences=True), merge_mode=None),
}


@pytest.mark.parametrize("kind", ["LSTM-zero", "cells", "Bidirectional"] if JAX else RECURRENT)
def test_recurrent_layer(float64, kind):
    check_products(masked_model(RECURRENT[kind](), pattern="left"))
    if not JAX:
        check_products(masked_model(RECURRENT[kind]()))


@pytest.mark.skipif(JAX, reason="Keras' own loop does not broadcast the mask")
def test_recurrent_convolution(float64):
    x, key = keras.Input((3, 4, 1)), keras.Input((3,))
    check_products(keras.Model([x, key], layers.ConvLSTM1D(2, 2, return_sequences=True)(MaskBy()([x, key]))))


@pytest.mark.parametrize("explicit", [True, False])
def test_a_first_state_beside_a_mask(float64, explicit):
    """Keras reads a mask off a single tensor only, so beside a state the mask must be given as an argument."""
    x, key, state = keras.Input(STEPS), keras.Input(STEPS[:1]), keras.Input((2,))
    mask = {"mask": key > 0} if explicit else {}
    y = layers.GRU(2, return_sequences=True)(MaskBy("left")([x, key]), initial_state=state, **mask)
    check_products(keras.Model([x, key, state], y))


def test_masking_and_a_stack_of_layers(float64):
    model = keras.Sequential(
        [
            keras.Input(STEPS),
            layers.Masking(),
            layers.GRU(2, return_sequences=True),
            layers.TimeDistributed(layers.Dense(2)),
            layers.Bidirectional(layers.LSTM(2)),
        ]
    )
    x = normal(BATCH, *STEPS)
    x[0, 3:] = x[1, :2] = x[2] = x[3, 2] = 0
    check_products(model, [ops.convert_to_tensor(x)])
    lin = jvpreg.linearize(model, x)
    u = normal(*x.shape, seed=1)
    assert_close(lin.jvp(u), lin.jvp(u * (x != 0)))


def attend(y):
    return layers.GlobalAveragePooling1D()(layers.MultiHeadAttention(2, 2)(y, y))


@pytest.mark.parametrize("apply", [lambda y: layers.LSTM(2)(y), lambda y: layers.GlobalAveragePooling1D()(y), attend])
def test_embedding_with_a_mask(float64, apply, monkeypatch):
    """Tokens have no tangents, but the table of the embedding has."""
    without_rounded_attention(monkeypatch)
    words = keras.Input((4,))
    y = apply(layers.Embedding(6, 3, mask_zero=True)(words))
    model = randomize(keras.Model(words, layers.Dense(2)(y)))
    x = np.array([[1, 5, 0, 0], [0, 2, 2, 4], [3, 0, 1, 0]])
    lin = jvpreg.linearize(model, x, fallback="error")
    assert_close(lin.outputs, model(ops.convert_to_tensor(x)), 1e-7)
    variables = model.trainable_variables
    moved = [normal(*v.shape, seed=i) for i, v in enumerate(variables)]
    products = numpy(lin.jvp(weights=list(zip(variables, moved, strict=True))))

    def shifted(step):
        values = [
            (v, ops.convert_to_tensor(v) + step * ops.convert_to_tensor(d))
            for v, d in zip(variables, moved, strict=True)
        ]
        with keras.StatelessScope(state_mapping=values):
            return numpy(jvpreg.linearize(model, x).outputs)

    assert_close(products, (shifted(1e-6) - shifted(-1e-6)) / 2e-6, 1e-7)
    table = np.zeros(variables[0].shape)
    table[0] = 1.0  # The row of the token that is masked.
    assert norm(lin.jvp(weights=[(variables[0], table)])) == 0
    assert_close(
        lin.take([1]).jvp(weights=[(variables[1], moved[1])]), lin.jvp(weights=[(variables[1], moved[1])])[1:2]
    )


# Other layers.


def test_masks_through_layers_of_every_kind(float64):
    check_products(
        masked_model(
            layers.Dense(4, activation="tanh"),
            layers.LayerNormalization(),
            layers.Dropout(0.3),
            layers.BatchNormalization(),
            layers.Activation("softplus"),
            layers.PReLU(),
            layers.Identity(),
        )
    )


@pytest.mark.filterwarnings("ignore:Layer .* does not support masking")
@pytest.mark.parametrize("make", [lambda: layers.Conv1D(3, 1), lambda: layers.ZeroPadding1D(1)])
def test_a_layer_that_does_not_support_masks_drops_them(float64, make):
    check_products(masked_model(make()))
    check_products(masked_model(make(), layers.GlobalAveragePooling1D()))


def test_an_operation_drops_the_mask(float64):
    x, key = keras.Input(STEPS), keras.Input(STEPS[:1])
    check_products(keras.Model([x, key], layers.GlobalAveragePooling1D()(ops.sin(MaskBy()([x, key])))))


@pytest.mark.parametrize("channels_first", [False, True])
def test_average_of_steps(float64, channels_first):
    x, key = keras.Input((3, 5) if channels_first else STEPS), keras.Input((5,))
    layout = {"data_format": "channels_first", "keepdims": True} if channels_first else {}
    check(keras.Model([x, key], layers.GlobalAveragePooling1D(**layout)(x, mask=key > -1)))


@pytest.mark.parametrize("axis", [-1, (1, 2)])
def test_softmax(float64, axis):
    x, key = keras.Input((2, 3)), keras.Input((2, 3))
    check(keras.Model([x, key], layers.Rescaling(2.0)(layers.Softmax(axis)(x, mask=key > 0))))


MERGING = {
    "Add": layers.Add,
    "Average": layers.Average,
    "Multiply": layers.Multiply,
    "Maximum": layers.Maximum,
    "Minimum": layers.Minimum,
    "Concatenate": layers.Concatenate,
    "Concatenate-steps": lambda: layers.Concatenate(axis=1),
}


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("kind", MERGING)
def test_merging_layer(float64, kind, both):
    x, key, y, other_key = (keras.Input(shape) for shape in (STEPS, STEPS[:1]) * 2)
    first, second = MaskBy("left")([x, key]), MaskBy("right")([y, other_key])
    second = second if both else layers.Rescaling(2.0)(y)
    outputs = [MERGING[kind]()([first, second]), MERGING[kind]()([second, first, second])]
    check_products(keras.Model([x, key, y, other_key] if both else [x, key, y], outputs))


def test_merging_layer_of_inputs_of_different_ranks(float64):
    x, key, y = keras.Input(STEPS), keras.Input(STEPS[:1]), keras.Input((3,))
    masked = MaskBy("left")([x, key])
    outputs = [make()([masked, layers.Dense(3)(y)]) for make in (layers.Multiply, layers.Maximum)]
    check_products(keras.Model([x, key, y], outputs))


ATTENTION = {
    "MultiHeadAttention": lambda x, y: layers.MultiHeadAttention(2, 2)(x, y),
    "MultiHeadAttention-causal": lambda x, y: layers.MultiHeadAttention(2, 2)(x, y, use_causal_mask=True),
    "MultiHeadAttention-scores": lambda x, y: layers.MultiHeadAttention(2, 2)(x, y, return_attention_scores=True)[0],
    "GroupQueryAttention": lambda x, y: layers.GroupQueryAttention(2, 4, 2)(x, y),
    "Attention": lambda x, y: layers.Attention()([x, y]),
    "Attention-causal": lambda x, y: layers.Attention(use_scale=True)([x, y], use_causal_mask=True),
    "AdditiveAttention": lambda x, y: layers.AdditiveAttention()([x, y]),
}


# The projections within the layer drop the masks, and Keras warns of it; their outputs need no mask.
@pytest.mark.filterwarnings("ignore:.*Layer .* does not support masking")
@pytest.mark.parametrize("kind", ["MultiHeadAttention-causal", "Attention"] if JAX else ATTENTION)
def test_attention(float64, monkeypatch, kind):
    inputs = [keras.Input(shape) for shape in (STEPS, STEPS[:1]) * 2]
    y = ATTENTION[kind](MaskBy("right")(inputs[:2]), MaskBy("holes")(inputs[2:]))
    model = randomize(keras.Model(inputs, y))
    x = drawn_inputs(model)
    # These layers subtract 1e9 from masked logits, which rounds off the last digits.
    rounded = kind.startswith(("Attention", "AdditiveAttention"))
    assert_close(jvpreg.linearize(model, x).outputs, model(x), 1e-7 if rounded else 1e-13)
    if keras.backend.backend() != "tensorflow":  # JAX rounds; on Torch a row that is all masked has a tangent.
        monkeypatch.setattr("keras.src.backend.nn.dot_product_attention", attention_written_out)
    check_products(model, tolerance=1e-7 if rounded else 1e-10)


@pytest.mark.skipif(JAX, reason="compiles for long")
def test_batch_normalization_of_what_counts(float64):
    model = masked_model(layers.BatchNormalization(), layers.Dense(2))
    shapes = [x.shape[1:] for x in model.inputs]
    jvpreg.testing.check_rule(model, shapes, batch_size=BATCH, training=True, batch_statistics="coupled")


def test_frozen_batch_statistics_are_those_of_what_counts(float64):
    model = randomize(masked_model(layers.BatchNormalization()))
    x, key = drawn_inputs(model)
    twin = keras.models.clone_model(model)
    twin.set_weights(model.get_weights())
    lin = jvpreg.linearize(model, [x, key], training=True)
    assert_close(lin.outputs, twin([x, key], training=True))
    for ours, keras_own in zip(model.variables, twin.variables, strict=True):
        assert_close(ours, keras_own)
    counted = numpy(x)[numpy(MaskBy().compute_mask([x, key]))]
    layer, u = model.layers[-1], normal(*x.shape, seed=3)
    slope = numpy(layer.gamma) / np.sqrt(counted.var(0) + layer.epsilon)
    assert_close(lin.jvp([u, None]), slope * u, 1e-6)


# Ways of a mask through a graph.


def test_a_given_mask_wins(float64):
    x, key = keras.Input(STEPS), keras.Input(STEPS[:1])
    y = layers.GlobalAveragePooling1D()(MaskBy("left")([x, key]), mask=key < 0.5)
    check_products(keras.Model([x, key], y))


@pytest.mark.filterwarnings("ignore:Layer .* does not support masking")
def test_a_mask_goes_into_a_model_and_out_of_it(float64):
    inner_model = keras.Sequential([keras.Input(STEPS), layers.Dense(2), layers.GRU(2, return_sequences=True)])
    y = masked_model(inner_model)
    check_products(keras.Model(y.inputs, [*y.outputs, layers.GlobalAveragePooling1D()(y.outputs[0])]))


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.mask_by = MaskBy("left")
        self.recurrent = layers.GRU(2, return_sequences=True)
        self.pool = layers.GlobalAveragePooling1D()

    def call(self, inputs):
        y = self.recurrent(self.mask_by(inputs))
        return [y, self.pool(y)]


def test_masks_within_a_subclassed_model(float64):
    model = Subclassed()
    inputs = [keras.Input(STEPS), keras.Input(STEPS[:1])]
    check_products(keras.Model(inputs, model(inputs)))


class Sharpened(layers.Layer):
    """Takes the mask in its own call, and passes it on."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True

    def call(self, x, mask=None):
        return x if mask is None else x * ops.cast(mask, x.dtype)[..., None]


def test_a_layer_of_ones_own_is_opened_up_with_its_mask(float64):
    check_products(masked_model(Sharpened(), layers.SimpleRNN(2, return_sequences=True)))


def test_a_rule_that_does_not_take_the_mask():
    @jvpreg.register_rule(Sharpened)
    def rule(layer, x, context):
        return x, jvpreg.rules.linear(lambda tangent: tangent)

    model = masked_model(Sharpened(name="sharpened"))
    with pytest.raises(NotImplementedError, match=r"`sharpened` is called with a mask, which its rule does not take"):
        jvpreg.linearize(model, drawn_inputs(model))


@pytest.mark.filterwarnings("ignore:Layer .* does not support masking")
def test_a_rule_that_runs_another_layer(float64):
    class Wrapped(layers.Wrapper):
        def call(self, x):
            return self.layer(x)

        def compute_output_shape(self, shape):
            return self.layer.compute_output_shape(shape)

    @jvpreg.register_rule(Wrapped)
    def rule(layer, x, context):
        return context.linearize(layer.layer, x)

    check_products(masked_model(Wrapped(layers.SimpleRNN(2))))


def test_a_layer_that_is_left_to_autodiff(float64):
    class Opaque(layers.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.inner, self.supports_masking = layers.SimpleRNN(2), True

        def build(self, shape):
            self.inner.build(shape)

        def compute_output_shape(self, shape):
            return (shape[0], 2)

        def call(self, x):
            if isinstance(x, keras.KerasTensor):
                raise TypeError("expected a tensor")
            return self.inner(x)

    class TakesMask(Opaque):
        def compute_mask(self, inputs, mask=None):
            return None

        def call(self, x, mask=None):
            if isinstance(x, keras.KerasTensor):
                raise TypeError("expected a tensor")
            return self.inner(x, mask=mask)

    model = masked_model(Opaque(name="opaque"))
    with pytest.raises(NotImplementedError, match=r"`opaque` is left to autodiff.*would not see the mask"):
        jvpreg.linearize(model, drawn_inputs(model), fallback="ignore")
    model = masked_model(TakesMask())
    x, v = drawn_inputs(model), normal(BATCH, 2)
    lin = jvpreg.linearize(model, x, fallback="ignore")
    assert_close(lin.outputs, model(x))
    assert_close(lin.vjp(v), transpose(lambda inputs: [model(inputs)], x, [ops.convert_to_tensor(v)]))


# Masks that come with the inputs, and masks of the outputs.


@pytest.mark.filterwarnings("ignore:Layer .* does not support masking")
def test_a_mask_that_an_input_carries(float64):
    model = randomize(keras.Sequential([keras.Input(STEPS), layers.LSTM(2)]))
    x, key = drawn_inputs(masked_model())
    mask = MaskBy("left").compute_mask([x, key])
    unmasked = jvpreg.linearize(model, x).outputs
    set_mask(x, mask)
    lin = jvpreg.linearize(model, x)
    assert_close(lin.outputs, model(x))
    assert norm(lin.outputs - unmasked) > 0.1
    assert norm(numpy(lin.jvp(normal(*x.shape) * ~numpy(mask)[..., None]))) == 0


@pytest.mark.filterwarnings("ignore:Layer .* does not support masking")
def test_a_penalty_on_a_masked_block():
    x, key = keras.Input(STEPS), keras.Input(STEPS[:1])
    block = layers.SimpleRNN(2)
    y = jvpreg.layers.JacobianPenalty(block, [jvpreg.regularizers.JacobianNorm(0.1)])(MaskBy("left")([x, key]))
    model = keras.Model([x, key], y)
    inputs = [ops.cast(a, "float32") for a in drawn_inputs(model)]
    assert_close(model(inputs, training=True), model(inputs, training=False), 1e-6)


# Training.


@pytest.mark.slow
def test_a_masked_model_trains_and_its_loss_weighs_by_the_mask():
    base = masked_model(layers.Dense(3, activation="tanh"), layers.GRU(2, return_sequences=True), pattern="right")
    plain = keras.models.clone_model(base)
    plain.set_weights(base.get_weights())
    x, y = [numpy(a).astype("float32") for a in drawn_inputs(base)], normal(BATCH, 5, 2).astype("float32")
    model = jvpreg.JacobianModel(base)
    model.compile(optimizer=keras.optimizers.SGD(0.1), loss="mse")
    plain.compile(optimizer=keras.optimizers.SGD(0.1), loss="mse")
    losses = [m.fit(x, y, epochs=3, batch_size=2, shuffle=False, verbose=0).history["loss"] for m in (model, plain)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    model.compile(optimizer="sgd", loss="mse", jacobian_regularizers=[jvpreg.regularizers.JacobianNorm(0.1)])
    assert np.all(np.isfinite(model.fit(x, y, epochs=1, batch_size=2, verbose=0).history["loss"]))
