"""Tangents that go through a model along with `x`: by the same calls as `x`, where the weights outnumber both."""

import keras
import numpy as np
import pytest
from calls import in_graph
from compare import assert_close, normal, randomize
from keras import layers, ops

import jvpreg
from jvpreg.engine import companions
from jvpreg.engine.companions import run_at_once
from jvpreg.rules import Affine, registry

numpy = ops.convert_to_numpy


@pytest.fixture(autouse=True)
def few_are_many(monkeypatch):
    """Lowers a limit, so that layers that are small enough for a test are packed too."""
    monkeypatch.setattr(companions, "MANY_WEIGHTS", 0)


def mixed():
    """Layers whose weights outnumber a batch of two, and one layer whose weights do not."""
    x = keras.Input((4, 4, 3))
    y = layers.Conv2D(4, 3, padding="same", activation="relu")(x)
    y = layers.Conv2D(64, 3, strides=2, name="many")(y)
    y = layers.MaxPooling2D(1)(layers.BatchNormalization()(y))
    y = layers.SeparableConv2D(300, 1)(y)
    return keras.Model(x, layers.Dense(200, name="last")(layers.Dense(30, activation="tanh")(layers.Flatten()(y))))


def opened():
    """Layers that are opened up into operations."""
    x = keras.Input((4, 6))
    y = layers.MultiHeadAttention(2, 3)(layers.GroupNormalization(2)(x), x)
    y = layers.Concatenate()([layers.EinsumDense("btc,cd->btd", (None, 3), bias_axes="d")(y), x])
    return keras.Model(x, layers.GRU(3)(y))


@keras.saving.register_keras_serializable()
class Unopened(layers.Layer):
    """A layer that cannot be called with symbolic tensors."""

    def build(self, shape):
        self.kernel = self.add_weight((shape[-1],))

    def compute_output_spec(self, x):
        return keras.KerasTensor(x.shape, x.dtype)

    def call(self, x):
        if isinstance(x, keras.KerasTensor):
            raise TypeError("no symbols")
        return ops.tanh(x * self.kernel)


def unopened():
    """A layer that is left to autodiff."""
    return keras.Sequential([keras.Input((3,)), Unopened(), layers.Dense(2)])


def counted(monkeypatch) -> list[int]:
    """How many examples each linear part was run on."""
    sizes = []

    def spy(affine, x, tangent):
        function = affine.linear_part

        def watched(x):
            sizes.append(x.shape[0])
            return function(x)

        affine.linear_part = watched
        return run_at_once(affine, x, tangent)

    monkeypatch.setattr(companions, "run_at_once", spy)
    return sizes


@pytest.mark.parametrize("shape", [(2, 4, 4, 3), (1, 2, 4, 4, 3), (5, 2, 4, 4, 3)])
def test_products_are_those_of_the_linearization(float64, monkeypatch, shape):
    model = randomize(mixed())
    x, u = normal(2, 4, 4, 3), normal(*shape, seed=1)
    lin = jvpreg.linearize(model, x)
    sizes = counted(monkeypatch)
    for run in (in_graph, lambda function, *tensors: function(*tensors)):
        assert_close(run(lambda x, u: jvpreg.jvp(model, x, u), x, u), [lin.outputs, lin.jvp(u)])
    # In eager mode several probes do not go along, since the memory of all of them would be held.
    assert any(size > 2 for size in sizes) == (keras.backend.backend() != "torch" or u.size == x.size)
    assert any(size == 2 for size in sizes) == any(size > 2 for size in sizes)


def test_an_affine_layer_of_ones_own_shares_its_call(float64, monkeypatch):
    class LowRank(layers.Layer):
        def build(self, shape):
            self.left, self.right = self.add_weight((shape[-1], 80)), self.add_weight((80, 100))
            self.shift = self.add_weight((100,))

        def call(self, x):
            return x @ self.left @ self.right + self.shift

    @jvpreg.register_rule(LowRank)
    def low_rank(layer, x, context):
        parts = [(layer.left, lambda u, x: x @ u @ layer.right), (layer.right, lambda u, x: x @ layer.left @ u)]
        return Affine(lambda x: x @ layer.left @ layer.right, x, parts, layer.shift)

    model = randomize(keras.Sequential([keras.Input((30,)), LowRank()]))
    jvpreg.testing.check_rule(model, (30,))
    x, u, moved = normal(2, 30), normal(2, 30, seed=1), [(model.weights[0], normal(30, 80, seed=2))]
    lin = jvpreg.linearize(model, x)
    sizes = counted(monkeypatch)
    assert_close(in_graph(lambda x, u: jvpreg.jvp(model, x, u), x, u), [lin.outputs, lin.jvp(u)])
    assert_close(in_graph(lambda x: jvpreg.weight_jvp(model, x, moved), x), [lin.outputs, lin.jvp(weights=moved)])
    assert sizes == [4, 2]


def test_a_large_batch_goes_alone(monkeypatch):
    sizes = counted(monkeypatch)
    jvpreg.jvp(randomize(mixed()), normal(512, 4, 4, 3), normal(512, 4, 4, 3, seed=1))
    assert set(sizes) == {512}


def test_products_along_weights(float64, monkeypatch):
    """Behind the first of these weights tangents go along with `x`, also through a layer whose own weight is moved."""
    model = randomize(mixed())
    x = normal(2, 4, 4, 3)
    weights = [v for v in model.trainable_variables if v.path.startswith(("many", "last"))]
    pairs = [(v, normal(3, *v.shape, seed=i)) for i, v in enumerate(weights)]
    assert len(pairs) == 4
    lin = jvpreg.linearize(model, x)
    sizes = counted(monkeypatch)
    for run in (in_graph, lambda function, *tensors: function(*tensors)):
        assert_close(run(lambda x: jvpreg.weight_jvp(model, x, pairs), x), [lin.outputs, lin.jvp(weights=pairs)])
    assert any(size == 8 for size in sizes) == (keras.backend.backend() != "torch")


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


def test_where_packing_pays(monkeypatch):
    """It pays if a layer has at least as many weights as `x` and its tangents have numbers, and has many weights."""
    x, tangent = (ops.convert_to_tensor(normal(*shape).astype("float32")) for shape in ((2, 5), (3, 2, 5)))
    numbers = 2 * 5 * 4
    for many, num_weights, together in ((0, numbers, True), (0, numbers - 1, False), (numbers + 1, numbers, False)):
        monkeypatch.setattr(companions, "MANY_WEIGHTS", many)
        weight, bias = keras.Variable(np.ones(num_weights)), keras.Variable(np.ones(5))
        affine = Affine(lambda rows: 2 * rows, x, [(weight, lambda u, x: x)], bias)  # the bias does not count
        y, image = run_at_once(affine, x, tangent)
        np.testing.assert_array_equal(numpy(y), 2 * numpy(x))
        assert (image is not None) == together
        if together:
            np.testing.assert_array_equal(numpy(image), 2 * numpy(tangent))


def test_a_rule_may_run_another_one(float64):
    """The tangent that went along in the inner rule is not mistaken for that of the outer rule's result."""

    class Twice(layers.Dense):
        pass

    @jvpreg.register_rule(Twice)
    def twice(layer, x, context):
        dense = registry.find_rule(layers.Dense(1)).function(layer, x, context=context)
        return 2 * dense.with_bias(dense.linear_part(x), "twice"), jvpreg.rules.linear(
            lambda t: 2 * dense.linear_part(t)
        )

    model = randomize(keras.Sequential([keras.Input((3,)), Twice(40)]))
    x, u = normal(1, 3), normal(1, 3, seed=1)
    assert_close(in_graph(lambda x, u: jvpreg.jvp(model, x, u), x, u)[1], jvpreg.linearize(model, x).jvp(u))


def test_a_rule_may_run_another_one_on_what_is_not_its_input(float64):
    class OfTwice(layers.GRU):
        pass

    rule = registry.find_rule(layers.GRU(1)).function

    @jvpreg.register_rule(OfTwice)
    def of_twice(layer, x, context):
        y, inner = rule(layer, 2 * x, context=context)
        return y, jvpreg.rules.Pushforward(lambda t, *frozen: inner.function(2 * t, *frozen), *inner.residuals)

    model = randomize(keras.Sequential([keras.Input((4, 3)), OfTwice(5)]))
    x, u = normal(2, 4, 3), normal(2, 4, 3, seed=1)
    plain = keras.Sequential([keras.Input((4, 3)), layers.Rescaling(2.0), layers.GRU(5)])
    plain.set_weights(model.get_weights())
    for run in (in_graph, lambda function, *tensors: function(*tensors)):
        assert_close(run(lambda x, u: jvpreg.jvp(model, x, u), x, u)[1], jvpreg.linearize(plain, x).jvp(u))


def test_inputs_that_are_one_tensor_have_a_tangent_each(float64):
    x, h, c = keras.Input((3, 2)), keras.Input((4,)), keras.Input((4,))
    model = randomize(keras.Model([x, h, c], layers.LSTM(4)(x, initial_state=[h, c])))
    points, zero = normal(2, 3, 2), ops.zeros((2, 4))
    us = [normal(2, *shape, seed=i) for i, shape in enumerate([(3, 2), (4,), (4,)])]
    expected = jvpreg.linearize(model, [points, zero, zero]).jvp(us)
    assert_close(jvpreg.jvp(model, [points, zero, zero], us)[1], expected)


@pytest.mark.parametrize("call", ["positional", "keyword"])
def test_how_states_are_given(float64, call):
    sequences, state = keras.Input((4, 3)), keras.Input((5,))
    layer = layers.GRU(5)
    y = layer(sequences, state) if call == "positional" else layer(initial_state=state, sequences=sequences)
    model = randomize(keras.Model([sequences, state], y))
    x, u = [normal(2, 4, 3), normal(2, 5, seed=1)], [normal(2, 4, 3, seed=2), normal(2, 5, seed=3)]
    step = 1e-6
    ahead, behind = (numpy(model([a + d * b for a, b in zip(x, u, strict=True)])) for d in (step, -step))
    for product in (jvpreg.jvp(model, x, u)[1], jvpreg.linearize(model, x).jvp(u)):
        assert_close(product, (ahead - behind) / (2 * step), 1e-7)


def test_a_cell_with_batch_statistics_is_refused():
    class Normalizing(layers.Layer):
        state_size = output_size = 3

        def __init__(self):
            super().__init__()
            self.norm = layers.BatchNormalization()

        def build(self, shape):
            self.norm.build(shape)

        def call(self, x, states):
            y = ops.tanh(self.norm(x) + states[0])
            return y, [y]

    model = randomize(keras.Sequential([keras.Input((4, 3)), layers.RNN(Normalizing())]))
    x = normal(2, 4, 3)
    jvpreg.jvp(model, x, x)
    for statistics in ("frozen", "coupled"):
        with pytest.raises(NotImplementedError, match="statistics would be those of each step"):
            jvpreg.linearize(model, x, batch_statistics=statistics)


def test_weights_that_the_model_does_not_track(float64):
    """The weights of a `keras.Function`, which tracks none."""
    x, inner = normal(2, 3), layers.Dense(4)
    inner.build((None, 3))
    start = keras.Input((3,))
    function = keras.Function(start, inner(start))
    u = normal(3, 4, seed=1)
    expected = jvpreg.linearize(function, x).jvp(weights=[(inner.kernel, u)])
    assert_close(jvpreg.weight_jvp(function, x, [(inner.kernel, u)])[1], expected)


def test_no_tangent_of_a_weight_is_zero(float64):
    model = randomize(mixed())
    (kernel, bias), x = model.trainable_variables[:2], normal(2, 4, 4, 3)
    u = normal(*kernel.shape, seed=1)
    expected = jvpreg.weight_jvp(model, x, [(kernel, u)])
    assert_close(jvpreg.weight_jvp(model, x, {kernel.path: u, bias.path: None}), expected)
    assert_close(jvpreg.linearize(model, x).jvp(weights=[(kernel, u), (bias, None)]), expected[1])


def test_a_recurrent_layer_that_nothing_reaches(float64, monkeypatch):
    """The product is along a weight behind the layer, so no tangent goes through the steps of the layer."""
    model = randomize(keras.Sequential([keras.Input((4, 3)), layers.GRU(5), layers.Dense(2)]))
    x, kernel = normal(2, 4, 3), model.layers[-1].kernel
    u = normal(*kernel.shape, seed=1)
    expected = jvpreg.linearize(model, x).jvp(weights=[(kernel, u)])
    seen = []
    push = companions.Companions.push

    def spy(self, node, image=None):
        push(self, node, image)
        seen.append((self, node))

    monkeypatch.setattr(companions.Companions, "push", spy)
    found = in_graph(lambda: jvpreg.weight_jvp(model, x, [(kernel, u)])[1])
    assert_close(found, expected)
    assert [one.of(node.outputs[0]) is None for one, node in seen] == [True, False]


def test_weights_that_a_cell_borrows(float64):
    shared = layers.Dense(3, use_bias=False)
    shared.build((None, 3))

    class Borrowing(layers.Layer):
        state_size = output_size = 3

        def build(self, shape):
            self.kernel = self.add_weight((3, 3))

        def call(self, x, states):
            y = ops.tanh(ops.matmul(x, self.kernel) + ops.matmul(states[0], borrowed.kernel))
            return y, [y]

    borrowed = shared
    model = randomize(keras.Sequential([keras.Input((4, 3)), layers.RNN(Borrowing())]))
    x, (kernel,) = normal(2, 4, 3), [v for v in model.variables if v is not shared.kernel]
    lin = jvpreg.linearize(model, x)
    pairs = [(kernel, normal(3, 3, seed=1)), (shared.kernel, normal(3, 3, seed=2))]
    expected = [lin.outputs, lin.jvp(weights=pairs)]
    assert_close(in_graph(lambda x: jvpreg.weight_jvp(model, x, pairs), x), expected)


def test_a_cell_that_draws_or_mixes_is_frozen_step_by_step(float64):
    """The activation of the cell is a layer that draws random numbers, or a function that mixes examples."""
    x, u = normal(2, 4, 3), normal(2, 4, 3, seed=1)
    drawing = layers.SimpleRNN(5, use_bias=False, activation=layers.Dropout(0.5, seed=1))
    model = randomize(keras.Sequential([keras.Input((4, 3)), drawing]))
    y, jx = jvpreg.jvp(model, x, x, training=True)
    assert_close(y, jx)  # with its masks frozen the model is homogeneous: f(x) = J x
    mixing = layers.SimpleRNN(5, activation=lambda z: ops.tanh(z - ops.mean(z, axis=0, keepdims=True)))
    model = randomize(keras.Sequential([keras.Input((4, 3)), mixing]))
    step = 1e-6
    moved = (numpy(model(x + step * u)) - numpy(model(x - step * u))) / (2 * step)
    assert_close(jvpreg.jvp(model, x, u)[1], moved, 1e-7)


@pytest.mark.slow
@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="only TensorFlow has unknown shapes")
@pytest.mark.parametrize("kind", ["mixed", "opened", "left to autodiff"])
def test_an_unknown_number_of_probes(float64, caplog, kind):
    """Products along the input and along weights. In one case AutoGraph converts the function and the engine."""
    import tensorflow as tf

    model = randomize({"mixed": mixed, "opened": opened, "left to autodiff": unopened}[kind]())
    x = normal(2, *model.input_shape[1:])
    u = normal(3, *x.shape, seed=1)
    weights = [v for v in model.trainable_variables if v.shape][::3]
    assert weights
    moved = [normal(3, *v.shape, seed=i) for i, v in enumerate(weights)]
    lin = jvpreg.linearize(model, x, fallback="ignore")

    def products(u, *moved):
        pairs = list(zip(weights, moved, strict=True))
        return jvpreg.jvp(model, x, u, fallback="ignore"), jvpreg.weight_jvp(model, x, pairs, fallback="ignore")

    specs = [tf.TensorSpec((None, *tensor.shape[1:]), "float64") for tensor in (u, *moved)]
    products = tf.function(products, input_signature=specs, autograph=kind == "mixed")
    pairs = list(zip(weights, moved, strict=True))
    assert_close(products(u, *moved), [[lin.outputs, lin.jvp(u)], [lin.outputs, lin.jvp(weights=pairs)]])
    assert not [record.getMessage() for record in caplog.records if "AutoGraph" in record.getMessage()]


@pytest.mark.slow
@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="the kernels are TensorFlow's")
@pytest.mark.parametrize("num_probes", [1, 3])
@pytest.mark.parametrize("batch", [None, 2])
def test_gradients_in_a_graph(float64, batch, num_probes):
    """Gradients of penalties on products that go along, by kernels of ReLU and pooling, against a linearization."""
    import tensorflow as tf

    x = keras.Input((6, 3))
    y = layers.MaxPooling1D(3, strides=1, padding="same")(layers.Dense(4, activation="relu")(x))
    y = layers.MaxPooling1D(2, padding="same")(layers.MaxPooling1D(2)(y))  # windows of three kinds
    y = layers.LSTM(4, return_sequences=True)(y)
    model = randomize(keras.Model(x, layers.GRU(3)(layers.Masking()(y))))
    points, u = normal(2, 6, 3), normal(num_probes, 2, 6, 3, seed=1)

    def gradients(points, u, along, **options):
        with tf.GradientTape() as tape:
            product = jvpreg.jvp(model, points, u, **options)[1] if along else jvpreg.linearize(model, points).jvp(u)
            penalty = tf.reduce_sum(product**2)
        return tape.gradient(penalty, [v.value for v in model.trainable_variables])

    specs = tf.TensorSpec((batch, 6, 3), "float64"), tf.TensorSpec((num_probes, batch, 6, 3), "float64")
    graph = tf.function(lambda x, u: gradients(x, u, True, xla=False), input_signature=specs, autograph=False)
    assert_close(graph(points, u), gradients(tf.constant(points), tf.constant(u), False))


def recurrences():
    """Models of recurrent layers, by name. The inputs are a sequence of 3 numbers a step, and a first state."""
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
    """Tangents go along in the same scan, except in bidirectional layers; eagerly, in a graph, and along weights."""
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
        both = [lin.outputs, lin.jvp(weights=weights)]
        assert_close(in_graph(lambda: jvpreg.weight_jvp(model, x, weights)), both)
        assert_close(in_graph(product, *given), expected)


def test_errors():
    model = randomize(mixed())
    x = normal(2, 4, 4, 3)
    with pytest.raises(ValueError, match=r"`u`.*like x"):
        jvpreg.jvp(model, x, normal(2, 4, 4))
    kernel = model.trainable_variables[0]
    for none in ({}, None, [(kernel, None)]):
        with pytest.raises(ValueError, match="Expected a tangent of one weight"):
            jvpreg.weight_jvp(model, x, none)
    with pytest.raises(ValueError, match=r"Expected one tangent for each weight.*more than once"):
        jvpreg.weight_jvp(model, x, [(kernel, kernel), (kernel, kernel)])
    with pytest.raises(ValueError, match="list of pairs"):
        jvpreg.weight_jvp(model, x, model.trainable_variables)
    with pytest.raises(TypeError, match="'none'"):
        jvpreg.jvp(model, x, x, none=1)
    with pytest.raises(ValueError, match=r"`weights`.*'none'"):
        jvpreg.weight_jvp(model, x, {"none": x})
    with pytest.raises(ValueError, match="fallback"):
        jvpreg.jvp(model, x, x, fallback="none")


def test_a_weight_that_no_tangent_can_have():
    """The state of a seed generator is a variable of the model, but it has no tangent."""
    model = keras.Sequential([keras.Input((3,)), layers.Dropout(0.5), layers.Dense(2)])
    (seed,) = (v for v in model.variables if "seed" in v.path)
    with pytest.raises(ValueError, match="seed_generator_state"):
        jvpreg.weight_jvp(model, normal(1, 3), [(seed, np.zeros(2))])
