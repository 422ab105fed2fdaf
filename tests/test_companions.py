"""Tangents that go through a model along with `x`: by the same calls as `x`, where the weights outnumber both."""

import keras
import numpy as np
import pytest
from compare import assert_close, normal, randomize
from keras import layers, ops

import jvpreg
from jvpreg import companions
from jvpreg.companions import FEW, Packing
from jvpreg.frozen import Value


@pytest.fixture(autouse=True)
def few_are_many(monkeypatch):
    """Layers small enough for a test are packed too."""
    monkeypatch.setattr(companions, "MANY", 0)


def mixed():
    """Layers whose weights outnumber a batch of two, and one of which they do not."""
    x = keras.Input((4, 4, 3))
    y = layers.Conv2D(8, 3, padding="same", activation="relu")(x)
    y = layers.Conv2D(64, 3, strides=2, name="many")(y)
    y = layers.MaxPooling2D(1)(layers.BatchNormalization()(y))
    y = layers.SeparableConv2D(300, 1)(y)
    return keras.Model(x, layers.Dense(200, name="last")(layers.Dense(30, activation="tanh")(layers.Flatten()(y))))


def counted(monkeypatch) -> list[int]:
    """How many examples each linear part was run on."""
    sizes = []
    run = Packing.__call__

    def spy(self, function, x, num_weights):
        def watched(x):
            sizes.append(x.shape[0])
            return function(x)

        return run(self, watched, x, num_weights)

    monkeypatch.setattr(Packing, "__call__", spy)
    return sizes


@pytest.mark.parametrize("shape", [(2, 4, 4, 3), (1, 2, 4, 4, 3), (5, 2, 4, 4, 3)])
def test_products_are_those_of_the_linearization(float64, monkeypatch, shape):
    model = randomize(mixed())
    x, u = normal(2, 4, 4, 3), normal(*shape, seed=1)
    sizes = counted(monkeypatch)
    y, ju = jvpreg.jvp(model, x, u)
    assert any(size > 2 for size in sizes)
    assert any(size == 2 for size in sizes)
    lin = jvpreg.linearize(model, x)
    assert_close([y, ju], [lin.outputs, lin.jvp(u)])


def test_a_large_batch_goes_alone(monkeypatch):
    sizes = counted(monkeypatch)
    jvpreg.jvp(randomize(mixed()), normal(512, 4, 4, 3), normal(512, 4, 4, 3, seed=1))
    assert set(sizes) == {512}


def test_products_along_weights(float64, monkeypatch):
    """Behind the first of them tangents go along, and a weight of a layer that packs them counts too."""
    model = randomize(mixed())
    x = normal(2, 4, 4, 3)
    weights = [v for v in model.trainable_variables if v.path.startswith(("many", "last"))]
    pairs = [(v, normal(3, *v.shape, seed=i)) for i, v in enumerate(weights)]
    assert len(pairs) == 4
    sizes = counted(monkeypatch)
    y, moved = jvpreg.weight_jvp(model, x, pairs)
    assert any(size == 8 for size in sizes)
    lin = jvpreg.linearize(model, x)
    assert_close([y, moved], [lin.outputs, lin.jvp(weights=pairs)])


@pytest.mark.parametrize("batch_statistics", ["frozen", "coupled"])
def test_in_training(float64, batch_statistics):
    model = randomize(mixed())
    x, u = normal(2, 4, 4, 3), normal(2, 4, 4, 3, seed=1)
    received = jvpreg.jvp(model, x, u, training=True, batch_statistics=batch_statistics)
    lin = jvpreg.linearize(model, x, training=True, batch_statistics=batch_statistics)
    assert_close(received, [lin.outputs, lin.jvp(u)])


def test_mixed_precision():
    x, u = normal(2, 4, 4, 3), normal(2, 4, 4, 3, seed=1)
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = randomize(mixed())
    finally:
        keras.config.set_dtype_policy("float32")
    y, ju = jvpreg.jvp(model, x, u)
    lin = jvpreg.linearize(model, x)
    assert keras.backend.standardize_dtype(ju.dtype) == "float32"
    assert_close(ops.cast(y, "float32"), ops.cast(lin.outputs, "float32"), 2e-2)
    assert_close(ju, lin.jvp(u), 2e-2)


def test_what_no_tangent_reaches_is_zero(float64):
    x, z = keras.Input((3,)), keras.Input((3,))
    model = randomize(keras.Model([x, z], [layers.Dense(40)(x), layers.Dense(50)(z)]))
    (_, second), (_, zero) = jvpreg.jvp(model, [normal(1, 3), normal(1, 3)], [normal(1, 3), None])
    assert tuple(second.shape) == tuple(zero.shape) == (1, 50)
    assert np.count_nonzero(ops.convert_to_numpy(zero)) == 0


def test_where_packing_pays():
    """From the size at which weights are `FEW` times as many as the numbers in `x` and its tangents."""
    x, tangent = normal(2, 5).astype("float32"), normal(3, 2, 5, seed=1).astype("float32")
    numbers = FEW * x.size * 4
    for num_weights, together in ((numbers, True), (numbers - 1, False)):
        packing = Packing(Value(x, 0), tangent)
        np.testing.assert_array_equal(packing(lambda rows: 2 * rows, x, num_weights), 2 * x)
        assert (packing.image is not None) == together
        if together:
            np.testing.assert_array_equal(packing.image, 2 * tangent)


def test_few_weights_go_alone(monkeypatch):
    monkeypatch.setattr(companions, "MANY", 1000)
    x, tangent = np.ones((1, 2)), np.ones((1, 1, 2))
    for num_weights, together in ((1000, True), (999, False)):
        packing = Packing(Value(x, 0), tangent)
        packing(lambda rows: rows, x, num_weights)
        assert (packing.image is not None) == together


def recurrences():
    """Sequences of 3 numbers, with a first state, to what each kind of layer can return; by name."""
    x, state = keras.Input((5, 3)), keras.Input((4,))
    masked = layers.Masking(0.0)(x)
    lstm = layers.LSTM(4, return_sequences=True, return_state=True)
    stacked = layers.RNN(layers.StackedRNNCells([layers.GRUCell(4), layers.SimpleRNNCell(3)]))
    return {
        "sequences and states": keras.Model([x, state], lstm(x, initial_state=[state, state])),
        "masked": keras.Model([x, state], layers.GRU(4, return_sequences=True)(masked, initial_state=state)),
        "masked, zeros": keras.Model(
            [x, state],
            layers.Add()([layers.GRU(4, zero_output_for_mask=True, return_sequences=False)(masked), state]),
        ),
        "backwards": keras.Model([x, state], layers.SimpleRNN(4, go_backwards=True)(x, initial_state=state)),
        "stacked": keras.Model([x, state], [stacked(x), layers.Dense(2)(state)]),
        "both ways": keras.Model([x, state], [layers.Bidirectional(layers.LSTM(4))(x), layers.Dense(2)(state)]),
    }


@pytest.mark.parametrize(
    "name", ["sequences and states", "masked", "masked, zeros", "backwards", "stacked", "both ways"]
)
@pytest.mark.parametrize("without", [None, "sequences", "state"])
def test_recurrent_layers(float64, name, without):
    """Their tangents go along in the same scan, eagerly and in a graph, along weights too."""
    model = randomize(recurrences()[name])
    sequences = normal(2, 5, 3)
    sequences[1, 3:] = 0  # masked steps
    x = [sequences, normal(2, 4, seed=1)]
    u = [normal(3, 2, 5, 3, seed=2), normal(3, 2, 4, seed=3)]
    u = [None if without == "sequences" else u[0], None if without == "state" else u[1]]
    lin = jvpreg.linearize(model, x)
    expected = [lin.outputs, lin.jvp(u)]
    assert_close(jvpreg.jvp(model, x, u), expected)
    given = [ops.convert_to_tensor(t) for t in u if t is not None]

    def product(*tangents):
        found = iter(tangents)
        return jvpreg.jvp(model, x, [None if t is None else next(found) for t in u])

    if without is None:
        weights = [(v, normal(*v.shape, seed=i)) for i, v in enumerate(model.trainable_variables)]
        assert_close(jvpreg.weight_jvp(model, x, weights), [lin.outputs, lin.jvp(weights=weights)])
        if keras.backend.backend() == "tensorflow":
            import tensorflow as tf

            assert_close(tf.function(product)(*given), expected)


def test_errors():
    model = randomize(mixed())
    x = normal(2, 4, 4, 3)
    with pytest.raises(ValueError, match=r"`u`.*like x"):
        jvpreg.jvp(model, x, normal(2, 4, 4))
    with pytest.raises(ValueError, match=r"`weights`.*one at least"):
        jvpreg.weight_jvp(model, x, {})
    with pytest.raises(ValueError, match=r"`weights`.*'none'"):
        jvpreg.weight_jvp(model, x, {"none": x})
    with pytest.raises(ValueError, match="fallback"):
        jvpreg.jvp(model, x, x, fallback="none")


def test_a_weight_that_no_tangent_can_have():
    """A seed is one of a model's variables."""
    model = keras.Sequential([keras.Input((3,)), layers.Dropout(0.5), layers.Dense(2)])
    (seed,) = (v for v in model.variables if "seed" in v.path)
    with pytest.raises(ValueError, match="seed_generator_state"):
        jvpreg.weight_jvp(model, normal(1, 3), [(seed, np.zeros(2))])
