"""Whole numbers as inputs: they reach the layers as they are, and nothing has a derivative by them."""

import keras
import numpy as np
import pytest
from compare import assert_close, normal, numpy
from keras import layers, ops

import jvpreg

DTYPES = ["int8", "int16", "int32", "int64", "uint16", "bool"]


class Remainder(layers.Layer):
    def call(self, x):
        return ops.cast(ops.mod(ops.cast(x, "int32"), 7), "float32")


def remainders(dtype, shape=(2,)):
    return keras.Sequential([keras.Input(shape, dtype=dtype), Remainder()])


@pytest.mark.parametrize("floatx", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_float_rounds_them(dtype, floatx):
    before = keras.config.floatx()
    keras.config.set_floatx(floatx)
    try:
        model = remainders(dtype)
        # Larger than float16 holds exactly; integers of 32 bits also larger than float32 does.
        largest = {"bool": 1, "int8": 127, "int16": 2**12 + 1, "uint16": 2**12 + 1}.get(dtype, 2**24 + 1)
        x = np.array([[largest, 0], [largest - 1, 1]]).astype(dtype)
        expected = numpy(model(x))
        np.testing.assert_array_equal(numpy(jvpreg.linearize(model, x).outputs), expected)
        np.testing.assert_array_equal(expected, x.astype("int64") % 7)
    finally:
        keras.config.set_floatx(before)


@pytest.mark.parametrize(
    "layer",
    [
        lambda: layers.Dense(2),
        lambda: layers.Rescaling(0.5),
        lambda: layers.Normalization(mean=1.0, variance=4.0),
        lambda: layers.LayerNormalization(),
        lambda: layers.Flatten(),
        lambda: layers.Embedding(50, 2),
    ],
    ids=["dense", "rescaling", "normalization", "layer-normalization", "flatten", "embedding"],
)
def test_layers_compute_with_them_as_in_keras(layer):
    x = np.array([[3, 49], [7, 0]], "int32")
    model = keras.Sequential([keras.Input((2,), dtype="int32"), layer()])
    outputs, expected = jvpreg.linearize(model, x).outputs, model(x)
    assert outputs.dtype == expected.dtype
    assert_close(outputs, expected, 1e-6)


def tokens_and_numbers():
    tokens, numbers = keras.Input((2,), dtype="int32", name="tokens"), keras.Input((3,), name="numbers")
    words = layers.Flatten()(layers.Embedding(5000, 3)(tokens))
    hidden = layers.Concatenate()([words, layers.Dense(4, activation="tanh")(numbers)])
    return keras.Model({"tokens": tokens, "numbers": numbers}, layers.Dense(2)(hidden))


def test_beside_floats_their_tangents_count_for_nothing():
    model = tokens_and_numbers()
    x = {"tokens": np.array([[4999, 1], [2051, 2]]), "numbers": normal(2, 3)}
    lin = jvpreg.linearize(model, x)
    assert_close(lin.outputs, model(x), 1e-6)
    u = normal(2, 3, seed=1)
    alone = lin.jvp({"tokens": None, "numbers": u})
    assert np.abs(numpy(alone)).max() > 1e-3
    assert_close(lin.jvp({"tokens": np.ones((2, 2)), "numbers": u}), alone, 1e-6)
    assert_close(jvpreg.jvp(model, x, {"tokens": np.ones((2, 2)), "numbers": u})[1], alone, 1e-6)
    gradients = lin.vjp(np.ones((2, 2)))
    assert np.abs(numpy(gradients["numbers"])).max() > 1e-3
    assert np.abs(numpy(gradients["tokens"])).max() == 0


ASKED = {
    "jvp": lambda model, x: jvpreg.jvp(model, x, np.ones(x.shape)),
    "lin.jvp": lambda model, x: jvpreg.linearize(model, x).jvp(np.ones(x.shape)),
    "vjp": lambda model, x: jvpreg.vjp(model, x, np.ones((2, 3))),
    "jacobian": jvpreg.jacobian,
    "estimator": lambda model, x: jvpreg.estimators.frobenius_norm(jvpreg.linearize(model, x), num_probes=2),
}


@pytest.mark.parametrize("asked", ASKED)
def test_by_them_alone_there_is_no_derivative(asked):
    embedded = [layers.Embedding(50, 4, name="embedding"), layers.GlobalAveragePooling1D(), layers.Dense(3)]
    model = keras.Sequential([keras.Input((6,), dtype="int32"), *embedded])
    x = np.ones((2, 6), "int32")
    with pytest.raises(ValueError, match=r"argument `[ux]`.*integers have no derivative.*int32.*`at=\"embedding\"`"):
        ASKED[asked](model, x)


def test_what_an_embedding_returns_has_one():
    model = keras.Sequential(
        [keras.Input((6,), dtype="int32"), layers.Embedding(50, 4, name="words"), layers.Flatten()]
    )
    x = np.array([[3, 1, 4, 1, 5, 9]])
    lin = jvpreg.linearize(model, x)
    assert_close(lin.after("words").jvp(np.ones((1, 6, 4))), np.ones((1, 24)), 1e-6)
    (table,) = model.trainable_variables
    moved = lin.jvp(weights=[(table, np.ones((50, 4)))])
    assert_close(moved, np.ones((1, 24)), 1e-6)


class Hears(jvpreg.regularizers.JacobianRegularizer):
    """Records the inputs that its penalty sees."""

    def __init__(self, at):
        super().__init__(1.0)
        self.at, self.heard = at, []

    def directions(self, inputs, labels, seed):
        return [ops.expand_dims(ops.ones_like(x), 0) for x in inputs]

    def penalty(self, seen):
        self.heard = [numpy(x) for x in seen.inputs]
        return seen.jvp[0][:, 0] ** 2


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_points_between_have_the_codes_of_an_example(fraction):
    x = {"tokens": np.array([[4999, 1], [2051, 2], [7, 30], [0, 400]], "int32"), "numbers": normal(4, 3)}
    model, hears = jvpreg.JacobianModel(tokens_and_numbers(), seed=0), Hears(jvpreg.constraints.between)
    arguments = {"jacobian_fraction": fraction, "run_eagerly": True}
    model.compile(keras.optimizers.SGD(0.0), "mse", jacobian_regularizers=[hears], **arguments)
    model.train_on_batch(x, np.zeros((4, 2)))
    names = [tensor.name for tensor in model.base.inputs]
    heard = dict(zip(names, hears.heard, strict=True))
    assert len(heard["tokens"]) == 4 * fraction
    places = [x["tokens"].tolist().index(codes) for codes in heard["tokens"].tolist()]
    moved = heard["numbers"] - x["numbers"][places]
    # Each point lies a part of the way to another example of the batch.
    ways = [np.roll(places, 1), np.roll(places, -1)]
    parts = [moved / (x["numbers"][way] - x["numbers"][places]) for way in ways]
    assert min(np.max(np.ptp(part, axis=1)) for part in parts) < 1e-3
    assert np.all(np.any(moved != 0, axis=1))


def test_points_that_would_be_cut_to_whole_numbers_are_refused():
    model = jvpreg.JacobianModel(tokens_and_numbers())
    as_floats = Hears(lambda inputs, seed: [ops.cast(x, "float32") for x in inputs])
    model.compile("sgd", "mse", jacobian_regularizers=[as_floats])
    x = {"tokens": np.array([[4999, 1]], "int32"), "numbers": normal(1, 3)}
    with pytest.raises(ValueError, match=r"argument `at`. Expected whole numbers \(int32\).*Received: float"):
        model.train_on_batch(x, np.zeros((1, 2)))
