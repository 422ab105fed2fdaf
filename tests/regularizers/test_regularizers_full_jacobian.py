"""`BiasJacobianNorm` and `FullJacobianNorm` against the full-Jacobian, finite differences and simulated noise."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import jvpreg
from jvpreg.regularizers import BiasJacobianNorm, FullJacobianNorm
from tests.compare import normal, numpy, randomize

pytestmark = pytest.mark.usefixtures("float64")


def normalized():
    return keras.Sequential(
        [
            keras.Input((4, 4, 2)),
            layers.Conv2D(3, 3, padding="same", name="first"),
            layers.BatchNormalization(name="norm"),
            layers.Activation("tanh", name="tanh"),
            layers.Flatten(),
            layers.Dense(3, name="last"),
        ]
    )


def made(batch=4):
    keras.utils.set_random_seed(1)
    model = randomize(normalized())
    return model, normal(batch, 4, 4, 2, seed=2), np.array([0, 2, 1, 1])[:batch]


def squared(full, names):
    return sum((numpy(full.bias_jacobians[name]) ** 2).reshape(len(full.outputs), -1).sum(axis=1) for name in names)


def over_steps():
    """A model in which examples are on the second axis at one node, and merged with the steps at another."""
    x = keras.Input((5, 3))
    steps = layers.TimeDistributed(layers.Dense(4, name="dense"), name="each")(x)
    return keras.Model(x, layers.Dense(2, name="last")(layers.Flatten()(ops.tanh(steps))))


def test_what_has_no_axis_for_the_examples_is_drawn_as_it_is():
    x = keras.Input((3,))
    model = randomize(keras.Model(x, layers.Dense(2)(x - ops.mean(x, axis=0))))
    lin = jvpreg.linearize(model, normal(4, 3))
    (name,) = [name for name, y in lin.node_outputs().items() if y.shape == (3,)]
    drawn = normal(2, 3)
    np.testing.assert_array_equal(numpy(lin.from_examples(name, lin.by_example(name, drawn, probed=True))), drawn)


@pytest.mark.slow
def test_draws_go_with_the_examples_wherever_they_are():
    model, x = randomize(over_steps()), normal(2, 5, 3)
    lin = jvpreg.linearize(model, x)
    moved = [name for name, y in lin.node_outputs().items() if y.shape[0] != 2]
    assert moved
    for name, y in lin.node_outputs().items():
        drawn = np.stack([normal(*y.shape, seed=seed) for seed in range(3)])
        examples = lin.by_example(name, drawn, probed=True)
        assert examples.shape[:2] == (3, 2)
        np.testing.assert_array_equal(numpy(lin.from_examples(name, examples)), drawn)
    trained = jvpreg.JacobianModel(model)
    trained.compile(loss="mse", jacobian_regularizers=[BiasJacobianNorm(0.1, target="all")], jacobian_fraction=0.5)
    history = trained.fit(normal(4, 5, 3), normal(4, 2), batch_size=4, verbose=0).history
    assert history["bias_jacobian_norm_squared"][0] > 0
    with pytest.raises(ValueError, match=r"`tensor`. Expected one like what `by_example` returns, with a probe axis"):
        lin.from_examples("last", normal(2, 2))


NAMES = {"first": ["first"], "norm": ["norm"], "all": ["first", "norm", "tanh", "flatten", "last"]}


def expected(model, x, labels, regularizer, training=False):
    """The mean penalty, from the full-Jacobian."""
    lin = jvpreg.linearize(model, x, training=training)
    names = regularizer.layers or list(lin.node_outputs())
    if regularizer.target == "all":
        fulls = [jvpreg.full_jacobian(lin, None, target=np.full(len(x), k)) for k in range(3)]
        return sum(squared(full, names) for full in fulls).mean()
    full = jvpreg.full_jacobian(lin, None, target=labels if regularizer.target == "label" else None)
    biases = squared(full, names)
    if isinstance(regularizer, BiasJacobianNorm):
        return biases.mean()
    inputs = (numpy(full.input_jacobian) ** 2).reshape(len(x), -1).sum(axis=1)
    return (regularizer.input_weight * inputs + regularizer.bias_weight * biases).mean()


REGULARIZERS = {
    "a bias": BiasJacobianNorm(1.0, layers=["first"]),
    "a normalization": BiasJacobianNorm(1.0, layers=["norm", "last"]),
    "every layer": BiasJacobianNorm(1.0),
    "predicted": BiasJacobianNorm(1.0, layers=["first"], target="predicted"),
    "full": FullJacobianNorm(1.0, input_weight=0.5, bias_weight=2.0),
}


def compiled(model, regularizer, learning_rate=0.0, **kwargs):
    wrapped = jvpreg.JacobianModel(model, seed=3)
    wrapped.compile(
        loss=lambda labels, outputs: 0.0 * ops.sum(outputs, axis=-1),
        optimizer=keras.optimizers.SGD(learning_rate),
        jacobian_regularizers=[regularizer],
        **kwargs,
    )
    return wrapped


@pytest.mark.slow
@pytest.mark.parametrize("name", REGULARIZERS)
def test_the_penalty_and_its_gradient(name):
    regularizer = REGULARIZERS[name]
    model, x, labels = made()
    before, moving = model.get_weights(), model.layers[1].moving_mean.value + 0
    assert expected(model, x, labels, regularizer) > 1e-3
    reported = compiled(model, regularizer).evaluate(x, labels, verbose=0, return_dict=True)
    np.testing.assert_allclose(reported[regularizer.name], expected(model, x, labels, regularizer), rtol=1e-10)
    # In training mode the penalty is that with the batch's statistics.
    compiled(model, regularizer, learning_rate=1.0).train_on_batch(x, labels)
    assert np.abs(numpy(model.layers[1].moving_mean.value - moving)).max() > 0
    trainable = [i for i, w in enumerate(model.weights) if w.trainable]
    moved = [before[i] - model.get_weights()[i] for i in trainable]
    directions = [normal(*before[i].shape, seed=10 + i) for i in trainable]
    step, values = 1e-6, []
    for sign in (1, -1):
        changed = list(before)
        for i, direction in zip(trainable, directions, strict=True):
            changed[i] = before[i] + sign * step * direction
        model.set_weights(changed)
        values.append(expected(model, x, labels, regularizer, training=True))
    slope = (values[0] - values[1]) / (2 * step)
    received = sum(np.sum(m * d) for m, d in zip(moved, directions, strict=True))
    np.testing.assert_allclose(received, slope, rtol=1e-6)


@pytest.mark.parametrize("path", ["norm", None])
def test_random_directions_see_all_outputs(path):
    regularizer = BiasJacobianNorm(1.0, layers=path and [path], target="all", num_probes=400)
    model, x, labels = made()
    received = compiled(model, regularizer).evaluate(x, labels, verbose=0, return_dict=True)[regularizer.name]
    # Four examples with 400 probes each have a standard error of at most √(2/1600).
    np.testing.assert_allclose(received, expected(model, x, labels, regularizer), rtol=4 * np.sqrt(2 / 1600))


def test_proposition_3_multiplicative_noise_on_biases():
    model, x, _ = made(batch=1)
    lin = jvpreg.linearize(model, x)
    names, sigma, count = ["first", "last"], 0.01, 20_000
    outputs, random = lin.node_outputs(), np.random.default_rng(0)
    cotangent = np.eye(3)[[1]]
    noise = {n: sigma * random.normal(size=(count, *outputs[n].shape)) for n in names}
    # Each position has its own noise. To first order the noise moves the output as a tangent at the nodes does.
    moved = numpy(lin.jvp(taps={n: noise[n] * numpy(lin.intercepts[n]) for n in names}))[:, 0, 1]
    penalty = squared(jvpreg.full_jacobian(lin, None, target=cotangent), names)[0]
    np.testing.assert_allclose(moved.var(), sigma**2 * penalty, rtol=4 * np.sqrt(2 / count))
    # For the last layer this is exact, since the output is linear in its biases: noise on the biases themselves.
    bias = model.layers[-1].bias
    original, y = numpy(bias.value) + 0, 0.3
    losses = []
    for factor in 1 + sigma * random.normal(size=(200, 3)):
        bias.assign(original * factor)
        losses.append((y - numpy(model(x))[0, 1]) ** 2)
    bias.assign(original)
    linear = 2 * np.abs(y - numpy(model(x))[0, 1]) * sigma * abs(original[1]) / np.sqrt(200)
    added = sigma**2 * squared(jvpreg.full_jacobian(lin, None, target=cotangent), ["last"])[0]
    assert abs(np.mean(losses) - (y - numpy(model(x))[0, 1]) ** 2 - added) < 4 * linear


def test_equation_3_low_noise_dropout():
    """`E(f(z ⊙ ξ) − f(z))² = σ² ‖z ⊙ ∇_z f‖²`: noise on an activation, against the gradient at its node."""
    model, x, _ = made(batch=1)
    lin = jvpreg.linearize(model, x)
    rest = keras.Sequential([keras.Input((4, 4, 3)), *model.layers[3:]])
    activation = numpy(lin.node_outputs()["tanh"])
    gradient = numpy(lin.gradients(np.eye(3)[[1]], ["tanh"])[1]["tanh"])
    sigma, count = 0.01, 20_000
    noise = 1 + sigma * np.random.default_rng(0).normal(size=(count, *activation.shape[1:]))
    moved = numpy(rest(activation * noise))[:, 1] - numpy(lin.outputs)[0, 1]
    np.testing.assert_allclose(
        np.mean(moved**2), sigma**2 * np.sum((activation * gradient) ** 2), rtol=4 * np.sqrt(2 / count)
    )


@pytest.mark.parametrize("form", ["column", "one-hot", "floats"])
def test_labels_of_every_form(form):
    model, x, labels = made()
    regularizer = BiasJacobianNorm(1.0, layers=["first"])
    forms = {"column": labels[:, None], "one-hot": np.eye(3)[labels], "floats": labels.astype("float64")}
    received = compiled(model, regularizer).evaluate(x, forms[form], verbose=0, return_dict=True)
    np.testing.assert_allclose(received[regularizer.name], expected(model, x, labels, regularizer), rtol=1e-10)


@pytest.mark.parametrize("target", ["label", "all"])
def test_on_a_part_of_the_batch_and_now_and_then(target):
    model, x, labels = made()
    regularizer = BiasJacobianNorm(0.01, layers=["norm"], target=target)
    wrapped = compiled(model, regularizer, jacobian_fraction=0.5, jacobian_interval=2)
    history = wrapped.fit(x, labels, epochs=4, batch_size=4, verbose=0).history[regularizer.name]
    assert np.isfinite(history[0])
    assert np.isnan(history[1])
    assert history[2] > 0


def test_saved_and_loaded(tmp_path):
    model, x, labels = made()
    wrapped = jvpreg.JacobianModel(model)
    regularizers = [BiasJacobianNorm(0.1, ["norm"], target="predicted"), FullJacobianNorm(0.2, 0.5, 3.0)]
    wrapped.compile("sgd", "sparse_categorical_crossentropy", jacobian_regularizers=regularizers)
    wrapped.train_on_batch(x, labels)
    wrapped.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    configs = [regularizer.get_config() for regularizer in loaded.jacobian_regularizers]
    assert configs == [regularizer.get_config() for regularizer in regularizers]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BiasJacobianNorm(0.1, layers="conv"), "`layers`. Expected a list of paths of layers"),
        (lambda: BiasJacobianNorm(0.1, target="logits"), '`target`. Expected "label"'),
        (lambda: FullJacobianNorm(0.1, target="all"), '`target`. Expected "label"'),
        (lambda: BiasJacobianNorm(0.1, num_probes=0), "`num_probes`. Expected an integer, 1 or more"),
        (lambda: FullJacobianNorm(0.1, bias_weight=-1), "`bias_weight`. Expected a finite number, 0 or more"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_does_not_fit_the_model_or_the_data():
    model, x, labels = made()
    with pytest.raises(ValueError, match=r"`layers`. Expected the path of a layer.* Received: 'conv9'"):
        compiled(model, BiasJacobianNorm(0.1, layers=["conv9"])).train_on_batch(x, labels)
    layer = jvpreg.layers.JacobianPenalty(model, [BiasJacobianNorm(0.1)])
    with pytest.raises(ValueError, match=r'Use target="predicted" where there are none'):
        layer(x, training=True)
