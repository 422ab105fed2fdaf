"""`JacobianModel` in training and evaluation: what it adds to the loss, and what it leaves as it was."""

import itertools

import keras
import numpy as np
import pytest
from keras import layers, ops, tree

import jvpreg
from jvpreg.estimators.norms import squared_norm
from jvpreg.regularizers import JacobianNorm, JacobianRegularizer

TORCH = keras.backend.backend() == "torch"
# Runs are counted in eager steps. On JAX, whose eager steps are slow, they are counted in a trace.
COUNTED = {"run_eagerly": keras.backend.backend() != "jax"}
# On JAX, a step that is not compiled is eager. On Torch, torch.compile takes minutes for its first step.
COMPILATIONS = {
    "tensorflow": [{"jit_compile": False}, {"jit_compile": True}, {"run_eagerly": True}],
    "jax": [{"jit_compile": True}, {"run_eagerly": True}],
    "torch": [{"jit_compile": False}, {"run_eagerly": True}],
}[keras.backend.backend()]


class AlongOnes(JacobianRegularizer):
    """`‖J 1‖²`: a penalty without chance in it."""

    def directions(self, inputs, labels, seed):
        return tree.map_structure(lambda x: ops.expand_dims(ops.ones_like(x), 0), inputs)

    def penalty(self, seen):
        return squared_norm(seen.jvp)[0]


class Counting(layers.Layer):
    """The identity; counts the runs of its rule and of its pushforward."""

    primal_runs = tangent_runs = 0

    def call(self, x):
        return x


@jvpreg.register_rule(Counting)
def counting(layer, x, context):
    layer.primal_runs += 1

    def push(tangent):
        layer.tangent_runs += 1
        return tangent

    return x, jvpreg.rules.linear(push)


@pytest.fixture(autouse=True, scope="module")
def _unregister_counting():
    yield
    jvpreg.rules.registry._RULES.pop(Counting)


@pytest.fixture
def linearizations(monkeypatch):
    """The number of linearizations, one entry each."""
    calls = []

    def linearize(*args, **kwargs):
        calls.append(1)
        return jvpreg.linearize(*args, **kwargs)

    monkeypatch.setattr("jvpreg.training.penalized_model.linearize", linearize)
    return calls


def noisy_base():
    keras.utils.set_random_seed(1)
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(8, activation="relu"),
            layers.BatchNormalization(),
            # Seeded: without a seed, torch draws from a generator that its loader shares.
            layers.Dropout(0.3, seed=1),
            layers.Dense(3),
        ]
    )


def smooth_base():
    keras.utils.set_random_seed(1)
    return keras.Sequential([keras.Input((6,)), layers.Dense(5, activation="tanh"), layers.Dense(3)])


def linear_base():
    keras.utils.set_random_seed(1)
    return keras.Sequential([keras.Input((6,)), layers.Dense(3)])


def data(size=32, seed=0):
    random = np.random.default_rng(seed)
    x = random.normal(size=(size, 6)).astype(keras.config.floatx())
    return x, random.integers(0, 3, size)


def crossentropy():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def standing_still():
    return keras.optimizers.SGD(0.0)


def compiled(base, regularizers=(), optimizer=None, loss=None, **kwargs):
    model = jvpreg.JacobianModel(base, seed=3)
    model.compile(optimizer or standing_still(), loss or crossentropy(), jacobian_regularizers=regularizers, **kwargs)
    return model


def step(model, *args, **kwargs):
    """The logs of one training step, alone."""
    model.reset_metrics()
    return model.train_on_batch(*args, return_dict=True, **kwargs)


def plain_loss(base, x, y, **kwargs):
    """The loss of the plain model, one number an example."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="none")
    return ops.convert_to_numpy(loss(y, base(x, **kwargs)))


def penalty_along_ones(base, x):
    """`‖J 1‖²` of `smooth_base`, one number an example, by numpy."""
    (w1, b1, w2, _) = base.get_weights()
    slope = 1 - np.tanh(x @ w1 + b1) ** 2
    return np.sum(((slope * w1.sum(0)) @ w2) ** 2, axis=1)


# ---------------------------------------------------------------- as the plain model


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [{}, {"jacobian_regularizers": []}])
def test_without_regularizers_it_trains_as_the_plain_model_to_the_bit(arguments):
    x, y = data()
    histories, weights = [], []
    for wrapped in (False, True):
        base = noisy_base()
        model = jvpreg.JacobianModel(base) if wrapped else base
        keras.utils.set_random_seed(5)
        model.compile("adam", crossentropy(), metrics=["accuracy"], **(arguments if wrapped else {}))
        histories.append(model.fit(x, y, batch_size=8, epochs=2, verbose=0).history)
        weights.append(base.get_weights())
    assert histories[0] == histories[1]
    for plain, ours in zip(*weights, strict=True):
        np.testing.assert_array_equal(plain, ours)


def test_a_strength_of_zero_trains_as_the_plain_model():
    # Dropout masks and batch statistics included, to rounding.
    x, y = data()
    weights = []
    for wrapped in (False, True):
        base = noisy_base()
        arguments = {"jacobian_regularizers": [JacobianNorm(0.0)]} if wrapped else {}
        model = jvpreg.JacobianModel(base) if wrapped else base
        keras.utils.set_random_seed(5)
        model.compile("sgd", crossentropy(), **arguments)
        model.fit(x, y, batch_size=8, epochs=2, verbose=0)
        weights.append(base.get_weights())
    for plain, ours in zip(*weights, strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-6)


def test_batch_statistics_are_updated_once():
    x, y = data()
    plain, base = noisy_base(), noisy_base()
    plain.compile(standing_still(), crossentropy())
    plain.train_on_batch(x, y)
    compiled(base, [JacobianNorm(0.1), AlongOnes(0.1)]).train_on_batch(x, y)
    before = noisy_base().layers[1].moving_mean
    for ours, theirs in zip(base.layers[1].weights, plain.layers[1].weights, strict=True):
        np.testing.assert_allclose(ops.convert_to_numpy(ours), ops.convert_to_numpy(theirs), rtol=1e-5, atol=1e-7)
    assert np.abs(base.layers[1].moving_mean - before).max() > 1e-3


def test_the_dropout_mask_is_shared_by_primal_and_tangent():
    class Mismatch(JacobianRegularizer):
        """Zero if `f(x) = J x`, as it is without biases."""

        def directions(self, inputs, labels, seed):
            return ops.expand_dims(inputs, 0)

        def penalty(self, seen):
            return ops.sum((seen.jvp[0] - seen.outputs) ** 2, axis=-1) + ops.max(ops.abs(seen.outputs)) * 1e-3

    base = keras.Sequential([keras.Input((6,)), layers.Dropout(0.5), layers.Dense(3, use_bias=False)])
    x, y = data()
    logs = step(compiled(base, [Mismatch(1.0)]), x, y)
    assert 1e-4 < logs["mismatch"] < 2e-2


def test_the_primal_and_the_tangent_pass_run_once_for_all_regularizers():
    counter = Counting()
    base = keras.Sequential([keras.Input((6,)), layers.Dense(4), counter, layers.Dense(3)])
    regularizers = [AlongOnes(0.1), JacobianNorm(0.1), JacobianNorm(0.1, num_probes=3, name="three")]
    model = compiled(base, regularizers, **COUNTED)
    x, y = data()
    counter.primal_runs = counter.tangent_runs = 0
    model.train_on_batch(x, y)
    assert (counter.primal_runs, counter.tangent_runs) == (1, 1)
    model.test_on_batch(x, y)
    assert (counter.primal_runs, counter.tangent_runs) == (2, 2)


# ---------------------------------------------------------------- what the penalty adds


@pytest.mark.parametrize("compilation", COMPILATIONS, ids=str)
def test_the_loss_is_the_plain_one_and_strength_times_the_mean_penalty(compilation):
    x, y = data()
    base = smooth_base()
    logs = step(compiled(base, [AlongOnes(0.3)], **compilation), x, y)
    penalty = penalty_along_ones(base, x).mean()
    np.testing.assert_allclose(logs["along_ones"], penalty, rtol=1e-5)
    np.testing.assert_allclose(logs["loss"], plain_loss(base, x, y).mean() + 0.3 * penalty, rtol=1e-5)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("side", ["input", "output"])
def test_the_weight_gradient_of_the_loss_is_that_of_finite_differences(side):
    class Along(AlongOnes):
        def cotangents(self, outputs, labels, seed):
            return ops.expand_dims(ops.ones_like(outputs), 0) if side == "output" else None

        def directions(self, inputs, labels, seed):
            return super().directions(inputs, labels, seed) if side == "input" else None

        def penalty(self, seen):
            return squared_norm(seen.jvp if side == "input" else seen.vjp)[0]

    base = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(5, activation="tanh"),
            layers.BatchNormalization(),
            layers.Dense(4, activation="softplus"),
            layers.Dense(3),
        ]
    )
    x, y = data(8)
    model = compiled(base, [Along(0.5)], keras.optimizers.SGD(1.0))
    weights = model.get_weights()
    trainable = [any(w is v for v in model.trainable_weights) for w in model.weights]

    def loss_at(values):
        model.set_weights(values)
        return float(step(model, x, y)["loss"])

    loss_at(weights)
    gradient = [before - after for before, after in zip(weights, model.get_weights(), strict=True)]
    random, size = np.random.default_rng(0), 1e-5
    for _ in range(3):
        v = [random.normal(size=w.shape) * t for w, t in zip(weights, trainable, strict=True)]
        ahead, behind = (
            loss_at([w + sign * size * d if t else w for w, d, t in zip(weights, v, trainable, strict=True)])
            for sign in (1, -1)
        )
        slope = sum(np.sum(g * d) for g, d, t in zip(gradient, v, trainable, strict=True) if t)
        np.testing.assert_allclose((ahead - behind) / (2 * size), slope, rtol=1e-6)


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_sample_weights_weigh_the_penalties(shape):
    x, y = data(4)
    base = smooth_base()
    weights = np.array([0.0, 2.0, 1.0, 0.0], "float32")
    logs = step(compiled(base, [AlongOnes(0.3)]), x, y, sample_weight=weights.reshape(shape))
    penalty = (weights * penalty_along_ones(base, x)).sum() / 4
    loss = (weights * plain_loss(base, x, y)).sum() / 4
    np.testing.assert_allclose(logs["loss"], loss + 0.3 * penalty, rtol=1e-5)
    # An example of weight zero may be anything.
    x[[0, 3]] = 7.0
    again = step(compiled(base, [AlongOnes(0.3)]), x, y, sample_weight=weights.reshape(shape))
    np.testing.assert_allclose(again["loss"], logs["loss"], rtol=1e-5)


def test_class_weights_weigh_the_penalties():
    x, y = data(8)
    base = smooth_base()
    model = compiled(base, [AlongOnes(0.3)])
    loss = model.fit(x, y, batch_size=8, class_weight={0: 0.0, 1: 1.0, 2: 3.0}, verbose=0).history["loss"][0]
    weights = np.array([0.0, 1.0, 3.0])[y]
    expected = (weights * (plain_loss(base, x, y) + 0.3 * penalty_along_ones(base, x))).mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_several_inputs_and_outputs_by_name():
    a, b = keras.Input((2,), name="a"), keras.Input((3,), name="b")
    first, second = layers.Dense(2, name="first"), layers.Dense(1, name="second")
    base = keras.Model({"a": a, "b": b}, {"p": first(layers.Concatenate()([a, b])), "q": second(b)})
    model = jvpreg.JacobianModel(base)
    exact = JacobianNorm(1.0, num_probes=3, probes="orthogonal", side="output", name="exact")
    model.compile(standing_still(), {"p": "mse", "q": "mse"}, jacobian_regularizers=[AlongOnes(0.5), exact])
    x = {"a": np.ones((4, 2), "float32"), "b": np.ones((4, 3), "float32")}
    y = {"p": np.zeros((4, 2), "float32"), "q": np.zeros((4, 1), "float32")}
    logs = step(model, x, y)
    (w1, _), (w2, _) = first.get_weights(), second.get_weights()
    np.testing.assert_allclose(logs["along_ones"], np.sum(w1.sum(0) ** 2) + w2.sum() ** 2, rtol=1e-5)
    np.testing.assert_allclose(logs["exact"], np.sum(w1**2) + np.sum(w2**2), rtol=1e-5)
    total = logs["p_loss"] + logs["q_loss"] + 0.5 * logs["along_ones"] + logs["exact"]
    np.testing.assert_allclose(logs["loss"], total, rtol=1e-5)


class Autoencoder(keras.Model):
    """A variational one, whose `call` adds a loss, and whose encoder adds another one."""

    class Encoder(layers.Layer):
        def __init__(self):
            super().__init__()
            self.mean, self.log_variance = layers.Dense(2), layers.Dense(2)

        def call(self, x):
            mean, log_variance = self.mean(x), self.log_variance(x)
            self.add_loss(0.1 * ops.mean(ops.square(mean) + ops.exp(log_variance) - log_variance))
            return {"mean": mean, "deviation": ops.exp(0.5 * log_variance), "number": 3, "nothing": None}

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = self.Encoder(), layers.Dense(3)

    def call(self, x):
        code = self.encoder(x)
        self.add_loss(ops.mean(ops.abs(code["mean"])))
        return self.decoder(code["mean"] + 0.3 * code["deviation"]) if code["nothing"] is None else x


@pytest.mark.parametrize("kind", ["its weights and activities", "by losses that calls add"])
def test_a_base_that_regularizes_still_does(kind):
    def base():
        keras.utils.set_random_seed(1)
        if kind == "by losses that calls add":
            model = Autoencoder()
            model(np.zeros((1, 6), "float32"))
            return model
        first = layers.Dense(5, activation="relu", kernel_regularizer="l2", activity_regularizer="l1")
        return keras.Sequential([keras.Input((6,)), first, layers.Dense(3)])

    x, y = data(8)
    plain = base()
    plain.compile(standing_still(), crossentropy())
    expected = step(plain, x, y)["loss"]
    logs = step(compiled(base(), [AlongOnes(0.3)]), x, y)
    np.testing.assert_allclose(logs["loss"] - 0.3 * logs["along_ones"], expected, rtol=1e-5)


def test_a_model_that_was_given_no_input_shape():
    x, y = data(10)
    base = keras.Sequential([layers.Dense(4, activation="relu"), layers.Dense(3)])
    model = compiled(base, [AlongOnes(0.1)])
    history = model.fit(x, y, batch_size=4, verbose=0, callbacks=[jvpreg.callbacks.JacobianProbe(x[:3])]).history
    assert history["along_ones"][0] > 0
    assert history["jacobian/frobenius_norm"][0] > 0


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="tf.data is TensorFlow's")
def test_images_of_bytes():
    import tensorflow as tf

    x = np.random.default_rng(0).integers(0, 255, (8, 6)).astype("uint8")
    base = keras.Sequential([keras.Input((6,)), layers.Rescaling(1 / 255), layers.Dense(3, kernel_initializer="ones")])
    dataset = tf.data.Dataset.from_tensor_slices((x, np.zeros(8))).batch(8)
    history = compiled(base, [AlongOnes(0.1)]).fit(dataset, shuffle=False, verbose=0).history
    np.testing.assert_allclose(history["along_ones"], 3 * (6 / 255) ** 2, rtol=1e-4)


# ---------------------------------------------------------------- every k-th step, a part of the batch


@pytest.mark.parametrize("compilation", COMPILATIONS, ids=str)
def test_an_interval_of_k_counts_every_kth_step_k_times(compilation):
    x, y = data(8)
    base = smooth_base()
    model = compiled(base, [AlongOnes(0.3)], jacobian_interval=3, **compilation)
    losses = [step(model, x, y)["loss"] for _ in range(7)]
    plain, penalty = plain_loss(base, x, y).mean(), penalty_along_ones(base, x).mean()
    due = np.array([1, 0, 0, 1, 0, 0, 1])
    np.testing.assert_allclose(losses, plain + due * 3 * 0.3 * penalty, rtol=1e-5)


def test_steps_between_make_no_tangent_pass():
    if keras.backend.backend() == "jax":
        pytest.skip("lax.cond traces both branches and runs one")
    counter = Counting()
    base = keras.Sequential([keras.Input((6,)), counter, layers.Dense(3)])
    model = compiled(base, [AlongOnes(0.3)], jacobian_interval=4, run_eagerly=True)
    x, y = data(8)
    counter.primal_runs = counter.tangent_runs = 0
    for _ in range(8):
        model.train_on_batch(x, y)
    assert (counter.primal_runs, counter.tangent_runs) == (8, 2)


def test_an_epoch_without_a_penalty_reports_nan_and_trains_on():
    x, y = data(8)
    history = compiled(smooth_base(), [AlongOnes(0.3)], jacobian_interval=3).fit(
        x, y, batch_size=4, epochs=4, verbose=0
    )
    # Two steps an epoch, and the penalty at the steps 0, 3 and 6.
    assert np.isnan(history.history["along_ones"]).tolist() == [False, False, True, False]


def test_the_interval_does_not_change_the_evaluation():
    x, y = data(8)
    base = smooth_base()
    model = compiled(base, [AlongOnes(0.3)], jacobian_interval=3, jacobian_fraction=0.5)
    logs = model.evaluate(x, y, batch_size=2, verbose=0, return_dict=True)
    penalty = penalty_along_ones(base, x).mean()
    np.testing.assert_allclose(logs["along_ones"], penalty, rtol=1e-5)
    np.testing.assert_allclose(logs["loss"], plain_loss(base, x, y).mean() + 0.3 * penalty, rtol=1e-5)


@pytest.mark.usefixtures("float64")
def test_the_interval_in_float64():
    x, y = data(8)
    base = smooth_base()
    model = compiled(base, [AlongOnes(0.3)], jacobian_interval=2)
    losses = [step(model, x, y)["loss"] for _ in range(2)]
    np.testing.assert_allclose(losses[0] - losses[1], 0.6 * penalty_along_ones(base, x).mean(), rtol=1e-12)


@pytest.mark.slow
def test_a_fraction_draws_every_part_of_the_batch_equally_often():
    x, y = data(4)
    base = smooth_base()
    model = compiled(base, [AlongOnes(1.0)], jacobian_fraction=0.5)
    penalties = penalty_along_ones(base, x)
    pairs = np.array([penalties[list(pair)].mean() for pair in itertools.combinations(range(4), 2)])
    assert np.diff(np.sort(pairs)).min() > 1e-3 * pairs.mean()
    draws = 200
    drawn = np.array([step(model, x, y)["along_ones"] for _ in range(draws)])
    distances = np.abs(drawn[:, None] - pairs)
    assert distances.min(axis=1).max() < 1e-4 * pairs.mean()
    counts = np.bincount(distances.argmin(axis=1), minlength=6)
    # χ² of 5 degrees of freedom: above 20.5 once in a thousand; the seed is fixed.
    assert np.sum((counts - draws / 6) ** 2 / (draws / 6)) < 20.5


@pytest.mark.parametrize(
    ("fraction", "batch", "size"), [(0.25, 8, 2), (0.3, 10, 3), (0.07, 100, 7), (0.5, 5, 3), (0.01, 8, 1), (1.0, 8, 8)]
)
def test_a_fraction_takes_its_part_of_the_batch(fraction, batch, size):
    class Shares(AlongOnes):
        """The reciprocal of the number of examples seen."""

        def penalty(self, seen):
            return ops.ones_like(seen.outputs[:, 0]) / ops.cast(ops.shape(seen.outputs)[0], "float32")

    x, y = data(batch)
    logs = step(compiled(linear_base(), [Shares(1.0)], jacobian_fraction=fraction), x, y)
    assert round(1 / float(logs["shares"])) == size


def test_a_fraction_takes_the_labels_and_weights_of_its_examples():
    class Labels(AlongOnes):
        def penalty(self, seen):
            return ops.cast(ops.abs(ops.cast(seen.labels, "float32") - seen.inputs[:, 0]), "float32")

    x, y = data(16)
    x[:, 0] = y
    weights = (y > 0).astype("float32")
    logs = step(compiled(linear_base(), [Labels(1.0)], jacobian_fraction=0.25), x, y, sample_weight=weights)
    assert logs["labels"] == 0


@pytest.mark.parametrize(
    "arguments",
    [
        *COMPILATIONS,
        {"optimizer": lambda: keras.optimizers.SGD(0.0, gradient_accumulation_steps=2)},
        pytest.param({"steps_per_execution": 2}, marks=pytest.mark.skipif(TORCH, reason="not supported by torch")),
        pytest.param(
            {"steps_per_execution": 3, "jit_compile": True},
            marks=pytest.mark.skipif(TORCH, reason="not supported by torch"),
        ),
        {"policy": "mixed_bfloat16"},
        {"policy": "mixed_float16"},
    ],
    ids=lambda options: "-".join(options),
)
def test_interval_and_fraction_together_in_fit(arguments):
    arguments = dict(arguments)
    policy = arguments.pop("policy", "float32")
    optimizer = arguments.pop("optimizer", standing_still)()
    keras.config.set_dtype_policy(policy)
    try:
        base = linear_base()
        model = compiled(base, [AlongOnes(0.3)], optimizer, jacobian_interval=2, jacobian_fraction=0.5, **arguments)
    finally:
        keras.config.set_dtype_policy("float32")
    x, y = data(16)
    history = model.fit(x, y, batch_size=4, epochs=1, verbose=0).history
    # The Jacobian of a linear model is the same in each step and for each example, so nothing is left to chance.
    penalty = np.sum(base.get_weights()[0].sum(0) ** 2)
    tolerance = {"float32": 1e-5, "mixed_float16": 4e-3, "mixed_bfloat16": 3e-2}[policy]
    np.testing.assert_allclose(history["along_ones"][0], penalty, rtol=tolerance)
    expected = plain_loss(base, x, y).mean() + 0.3 * penalty
    np.testing.assert_allclose(history["loss"][0], expected, rtol=tolerance)


def test_a_last_batch_that_is_smaller():
    x, y = data(10)
    base = linear_base()
    model = compiled(base, [AlongOnes(0.3)], jacobian_fraction=0.5)
    history = model.fit(x, y, batch_size=4, verbose=0).history
    np.testing.assert_allclose(history["along_ones"][0], np.sum(base.get_weights()[0].sum(0) ** 2), rtol=1e-5)


@pytest.mark.slow
def test_accumulated_gradients_are_those_of_one_large_batch():
    x, y = data(16)
    weights = []
    for accumulated in (1, 2):
        base = smooth_base()
        steps = {"gradient_accumulation_steps": 2} if accumulated == 2 else {}
        model = compiled(base, [AlongOnes(0.3)], keras.optimizers.SGD(0.5, **steps))
        model.fit(x, y, batch_size=16 // accumulated, verbose=0, shuffle=False)
        weights.append(base.get_weights())
    for one, two in zip(*weights, strict=True):
        np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-6)
    assert np.abs(weights[0][0] - smooth_base().get_weights()[0]).max() > 1e-2


def test_small_tangents_do_not_underflow_in_float16():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        base = keras.Sequential(
            [keras.Input((6,)), layers.Dense(3, kernel_initializer=keras.initializers.Constant(1e-5))]
        )
        model = compiled(base, [AlongOnes(1.0)], keras.optimizers.SGD(0.01), loss="mse")
    finally:
        keras.config.set_dtype_policy("float32")
    before = base.get_weights()[0]
    # The output and the plain gradient are zero; the penalty, 1e-8, is below what float16 holds.
    logs = step(model, np.zeros((4, 6), "float32"), np.zeros((4, 3), "float32"))
    np.testing.assert_allclose(logs["along_ones"], np.sum(before.sum(0) ** 2), rtol=1e-2)
    np.testing.assert_allclose(before - base.get_weights()[0], 0.01 * 2 * np.tile(before.sum(0), (6, 1)), rtol=1e-2)


# ---------------------------------------------------------------- evaluation and prediction


def test_evaluation_reports_the_penalty_and_counts_it():
    x, y = data(8)
    base = smooth_base()
    model = compiled(base, [AlongOnes(0.3)])
    logs = model.evaluate(x, y, verbose=0, return_dict=True)
    penalty = penalty_along_ones(base, x).mean()
    np.testing.assert_allclose(logs["along_ones"], penalty, rtol=1e-5)
    np.testing.assert_allclose(logs["loss"], plain_loss(base, x, y).mean() + 0.3 * penalty, rtol=1e-5)


def test_evaluation_can_leave_the_penalty_out(linearizations):
    x, y = data(8)
    base = noisy_base()
    model = compiled(base, [JacobianNorm(0.3)], jacobian_evaluate=False, **COUNTED)
    logs = model.evaluate(x, y, verbose=0, return_dict=True)
    np.testing.assert_allclose(logs["loss"], plain_loss(base, x, y).mean(), rtol=1e-5)
    assert set(logs) == {"loss"}
    assert not linearizations
    history = model.fit(x, y, validation_data=(x, y), verbose=0).history
    assert set(history) == {"loss", "frobenius_norm_squared", "val_loss"}
    assert len(linearizations) == 1


def test_prediction_never_linearizes(linearizations):
    x, y = data(8)
    model = compiled(noisy_base(), [JacobianNorm(0.3)], **COUNTED)
    model.predict(x, verbose=0)
    model.predict_on_batch(x)
    model(x)
    assert not linearizations
    model.train_on_batch(x, y)
    assert linearizations


@pytest.mark.slow
def test_validation_does_not_change_what_is_trained():
    x, y = data()
    weights, histories = [], []
    for validation in (None, data(8, seed=1)):
        base = noisy_base()
        model = compiled(base, [JacobianNorm(0.1)], "adam", jacobian_fraction=0.5)
        keras.utils.set_random_seed(5)
        # Not shuffled: torch's loader takes from torch's generator each time that it is iterated.
        history = model.fit(x, y, batch_size=8, epochs=2, validation_data=validation, verbose=0, shuffle=False)
        histories.append(history.history)
        weights.append(base.get_weights())
    for without, with_ in zip(*weights, strict=True):
        np.testing.assert_array_equal(without, with_)
    assert set(histories[1]) - set(histories[0]) == {"val_loss", "val_frobenius_norm_squared"}
    assert np.all(np.array(histories[1]["val_frobenius_norm_squared"]) > 0)
    assert histories[0]["frobenius_norm_squared"] == histories[1]["frobenius_norm_squared"]


@pytest.mark.slow
def test_the_same_seed_draws_the_same_directions():
    x, y = data()

    def train(seed):
        model = jvpreg.JacobianModel(smooth_base(), seed=seed)
        model.compile("sgd", crossentropy(), jacobian_regularizers=[JacobianNorm(0.1)])
        return model.fit(x, y, batch_size=8, verbose=0, shuffle=False).history["frobenius_norm_squared"][0]

    assert train(1) == train(1) != train(2)


# ---------------------------------------------------------------- compile


@pytest.mark.slow
def test_compiling_again_forgets_the_earlier_penalties():
    x, y = data()
    model = compiled(smooth_base(), [JacobianNorm(0.1, name="first"), AlongOnes(0.1)])
    model.fit(x, y, verbose=0)
    model.compile("sgd", crossentropy(), jacobian_regularizers=[JacobianNorm(0.1, name="second")])
    assert set(model.fit(x, y, verbose=0).history) == {"loss", "second"}
    model.compile("sgd", crossentropy())
    assert set(model.fit(x, y, verbose=0).history) == {"loss"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"jacobian_regularizers": JacobianNorm(0.1)}, "`jacobian_regularizers`. Expected a list of"),
        ({"jacobian_regularizers": ["l2"]}, "`jacobian_regularizers`. Expected a list of"),
        ({"jacobian_regularizers": [JacobianNorm(0.1), JacobianNorm(0.2)]}, "names that differ"),
        ({"jacobian_regularizers": [JacobianNorm(0.1, name="loss")]}, 'name that is not "loss"'),
        ({"jacobian_interval": 0}, "`jacobian_interval`. Expected an integer, 1 or more"),
        ({"jacobian_interval": 1.5}, "`jacobian_interval`"),
        ({"jacobian_fraction": 0.0}, "`jacobian_fraction`. Expected a finite number above 0, at most 1"),
        ({"jacobian_fraction": 1.1}, "`jacobian_fraction`"),
        ({"jacobian_fraction": float("nan")}, "`jacobian_fraction`"),
        ({"jacobian_fraction": "0.5"}, "`jacobian_fraction`"),
    ],
)
def test_bad_arguments_of_compile(arguments, message):
    with pytest.raises(ValueError, match="Invalid value for argument") as raised:
        jvpreg.JacobianModel(smooth_base()).compile("sgd", "mse", **arguments)
    assert message in str(raised.value)


@pytest.mark.parametrize("base", [None, layers.Dense(2)])
def test_a_base_that_is_no_model(base):
    with pytest.raises(ValueError, match=r"argument `base`. Expected a plain Keras model"):
        jvpreg.JacobianModel(base)


def test_a_subclassed_base_is_built_and_opened_up():
    class Custom(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(3)

        def call(self, x):
            return 2 * self.dense(x)

    x, y = data(8)
    model = compiled(Custom(), [AlongOnes(0.1)], standing_still())
    history = model.fit(x, y, batch_size=8, verbose=0).history
    kernel = model.base.dense.get_weights()[0]
    np.testing.assert_allclose(history["along_ones"][0], np.sum((2 * kernel.sum(0)) ** 2), rtol=1e-5)


def test_penalties_in_layers_and_in_compile_do_not_mix():
    block = keras.Sequential([keras.Input((6,)), layers.Dense(4, activation="relu")])
    inner = jvpreg.layers.JacobianPenalty(block, [JacobianNorm(0.1)])
    base = keras.Sequential([keras.Input((6,)), inner, layers.Dense(3)])
    with pytest.raises(ValueError, match="holds JacobianPenalty layers"):
        compiled(base, [JacobianNorm(0.1)])
    x, y = data(8)
    logs = step(compiled(base), x, y)
    assert logs["loss"] > plain_loss(base, x, y).mean()


def test_a_head_of_probabilities_warns_once():
    base = keras.Sequential([keras.Input((6,)), layers.Dense(3, activation="softmax", name="head")])
    x, y = data(8)
    model = compiled(base, [AlongOnes(0.1)], loss=keras.losses.SparseCategoricalCrossentropy())
    with pytest.warns(UserWarning, match="ends in a softmax \\(`head") as caught:
        model.fit(x, y, batch_size=4, epochs=2, validation_data=(x, y), verbose=0)
    assert len([w for w in caught if "softmax" in str(w.message)]) == 1


# ---------------------------------------------------------------- penalties that are not finite


class Exploding(AlongOnes):
    """Infinite where an input is large; it has no gradient, so the weights stay as they are."""

    def penalty(self, seen):
        return ops.exp(seen.inputs[:, 0]) + 0 * seen.jvp[0, :, 0]


@pytest.mark.parametrize("as_list", [False, True])
def test_a_penalty_that_is_not_finite_names_the_regularizer_and_the_step(as_list):
    x, y = data(16)
    model = compiled(smooth_base(), [AlongOnes(0.1), Exploding(0.1)])
    callbacks = keras.callbacks.CallbackList(add_history=True, model=model) if as_list else [keras.callbacks.History()]
    fit = {"batch_size": 4, "epochs": 2, "verbose": 0, "shuffle": False, "callbacks": callbacks}
    model.fit(x, y, **fit)
    bad = x.copy()
    bad[9, 0] = 1000.0
    message = "`exploding` was not finite at training step 11 \\(epoch 1\\).*inputs and labels.*`ignore_class`"
    with pytest.raises(FloatingPointError, match=message):
        model.fit(bad, y, **fit)
    # The next failure is told by its own step, not by the first one's.
    with pytest.raises(FloatingPointError, match="`exploding` was not finite at training step 15 \\(epoch 1\\)"):
        model.fit(bad, y, **fit)


def test_a_validation_that_is_not_finite_does_not_stop_the_training():
    x, y = data(16)
    bad = x.copy()
    bad[9, 0] = 1000.0
    model = compiled(smooth_base(), [Exploding(0.1)])
    history = model.fit(x, y, batch_size=4, epochs=2, verbose=0, validation_data=(bad, y)).history
    assert np.isinf(history["val_exploding"]).all()
    assert np.isfinite(history["exploding"]).all()


def test_an_epoch_that_went_wrong_is_not_saved(tmp_path):
    x, y = data(16)
    x[9, 0] = 1000.0
    checkpoint = keras.callbacks.ModelCheckpoint(tmp_path / "model.keras")
    with pytest.raises(FloatingPointError):
        compiled(smooth_base(), [Exploding(0.1)]).fit(x, y, verbose=0, callbacks=[checkpoint])
    assert not list(tmp_path.iterdir())


def test_penalties_alone_where_not_every_step_has_them():
    x = np.random.default_rng(0).normal(size=(8, 4)).astype("float32")
    model = jvpreg.JacobianModel(keras.Sequential([keras.Input((4,)), layers.Dense(3, use_bias=False)]), seed=0)
    model.compile(
        keras.optimizers.SGD(0.1),
        jacobian_regularizers=[JacobianNorm(0.1, num_probes=3, probes="orthogonal", side="output")],
        jacobian_interval=2,
        jacobian_evaluate=False,
    )
    before = model.get_weights()[-1]
    model.fit(x, batch_size=4, verbose=0)
    # One step of two, whose penalty counts twice: the gradient of 2 · 0.1 ‖W‖² is 0.4 W.
    np.testing.assert_allclose(model.get_weights()[-1], 0.96 * before, rtol=1e-5)
    assert model.evaluate(x, verbose=0) == 0
