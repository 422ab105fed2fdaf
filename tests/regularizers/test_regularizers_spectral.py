"""`SpectralNorm` against the SVD of explicit Jacobians."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import jvpreg
from jvpreg.common.keras_private import clear_losses
from jvpreg.regularizers import SpectralNorm

pytestmark = pytest.mark.usefixtures("float64")


def data(count=6):
    random = np.random.default_rng(0)
    return random.normal(size=(count, 5)), random.integers(0, 3, size=count)


def base(outputs=3):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((5,)), layers.Dense(8, activation="tanh"), layers.Dense(outputs)])
    # Singular values that lie apart, so that the iteration is fast.
    model.layers[1].kernel.assign(model.layers[1].kernel * np.geomspace(16, 0.5, outputs))
    return model


def compiled(model, regularizer, learning_rate=0.0, **kwargs):
    model.compile(
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        optimizer=keras.optimizers.SGD(learning_rate),
        jacobian_regularizers=[regularizer],
        **kwargs,
    )
    return model


def squared_norms(model, x):
    jacobians = ops.convert_to_numpy(jvpreg.jacobian(model, x))
    return np.linalg.svd(jacobians, compute_uv=False)[:, 0] ** 2


def one_of_each_class(model):
    """One example for each class, whose output is the largest."""
    x = np.random.default_rng(1).normal(size=(200, 5))
    largest = ops.convert_to_numpy(model(x)).argmax(axis=1)
    return x[[np.flatnonzero(largest == c)[0] for c in range(3)]]


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [{}, {"jacobian_interval": 2}], ids=str)
def test_one_iteration_a_step_arrives_at_the_largest_singular_value(arguments):
    model = jvpreg.JacobianModel(base())
    x = one_of_each_class(model)
    compiled(model, SpectralNorm(0.1), **arguments)
    history = model.fit(x, np.arange(3), epochs=40, batch_size=3, verbose=0).history["spectral_norm_squared"]
    expected = squared_norms(model.base, x).mean()
    assert np.nanmax(history) <= expected * (1 + 1e-9)
    assert history[0] < 0.99 * expected
    np.testing.assert_allclose(history[-1 if not arguments else -2], expected, rtol=1e-4)


@pytest.mark.slow
def test_more_iterations_a_step_arrive_in_fewer():
    model = jvpreg.JacobianModel(base())
    x, y = data()
    results = [
        compiled(model, SpectralNorm(0.1, num_iterations=n)).evaluate(x, y, verbose=0, return_dict=True)
        for n in (1, 2, 20)
    ]
    estimates = [result["spectral_norm_squared"] for result in results]
    assert estimates[0] < estimates[1] < estimates[2]
    np.testing.assert_allclose(estimates[2], squared_norms(model.base, x).mean(), rtol=1e-9)


@pytest.mark.slow
def test_the_gradient_is_that_of_the_squared_norm():
    model = jvpreg.JacobianModel(base())
    x, y = data()
    before = model.base.get_weights()
    model.compile(
        loss=lambda labels, outputs: 0.0 * ops.sum(outputs, axis=-1),
        optimizer=keras.optimizers.SGD(1.0),
        jacobian_regularizers=[SpectralNorm(1.0, num_iterations=20)],
    )
    model.train_on_batch(x, y)
    moved = [a - b for a, b in zip(before, model.base.get_weights(), strict=True)]
    random = np.random.default_rng(2)
    for index in (0, 1, 2):
        direction, step = random.normal(size=before[index].shape), 1e-6
        values = []
        for sign in (1, -1):
            changed = list(before)
            changed[index] = before[index] + sign * step * direction
            model.base.set_weights(changed)
            values.append(squared_norms(model.base, x).mean())
        expected = (values[0] - values[1]) / (2 * step)
        np.testing.assert_allclose(np.sum(moved[index] * direction), expected, rtol=1e-5, atol=1e-9)


@pytest.mark.slow
def test_what_is_carried_outlives_epochs_evaluation_and_a_file(tmp_path):
    x, y = data()
    model = compiled(jvpreg.JacobianModel(base()), SpectralNorm(0.1))
    fresh = model.evaluate(x, y, verbose=0, return_dict=True)["spectral_norm_squared"]
    assert model.evaluate(x, y, verbose=0, return_dict=True)["spectral_norm_squared"] == fresh
    model.fit(x, y, epochs=30, verbose=0)
    after = model.evaluate(x, y, verbose=0, return_dict=True)["spectral_norm_squared"]
    assert after > 1.001 * fresh
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(
        loaded.evaluate(x, y, verbose=0, return_dict=True)["spectral_norm_squared"], after, rtol=1e-12
    )
    model.save_weights(tmp_path / "model.weights.h5")
    plain = jvpreg.JacobianModel(base())
    plain.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(plain.base.get_weights()[0], model.base.get_weights()[0])


@pytest.mark.slow
@pytest.mark.parametrize("build", ["functional", "subclassed", "several outputs"])
def test_models_of_every_kind(build):
    class Subclassed(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(3)

        def build(self, input_shape):
            self.dense.build(input_shape)

        def call(self, x):
            return self.dense(x)

    x, y = data()
    if build == "subclassed":
        model = Subclassed()
        loss = "sparse_categorical_crossentropy"
    elif build == "functional":
        model, loss = base(), "sparse_categorical_crossentropy"
    else:
        inputs = keras.Input((5,))
        model = keras.Model(inputs, [layers.Dense(3)(inputs), layers.Dense(2)(inputs)])
        y, loss = [y, y % 2], ["sparse_categorical_crossentropy"] * 2
    model = jvpreg.JacobianModel(model)
    model.compile(loss=loss, jacobian_regularizers=[SpectralNorm(0.1)], jacobian_fraction=0.5)
    history = model.fit(x, y, epochs=2, batch_size=4, verbose=0).history["spectral_norm_squared"]
    assert np.all(np.isfinite(history))
    assert history[-1] > 0


@pytest.mark.slow
def test_within_a_block():
    block = keras.Sequential([keras.Input((5,)), layers.Dense(4, activation="tanh")])
    layer = jvpreg.layers.JacobianPenalty(block, [SpectralNorm(1.0), jvpreg.regularizers.JacobianNorm(0.0)])
    x, _ = data()
    losses = []
    for _ in range(60):
        layer(x, training=True)
        losses.append(float(ops.convert_to_numpy(ops.stop_gradient(layer.losses[0]))))
        clear_losses(layer)
    expected = squared_norms(block, x).mean()
    assert losses[0] < losses[-1] <= expected * (1 + 1e-9)
    assert losses[-1] > 0.9 * expected


def test_an_unknown_shape_is_told_before_the_first_step():
    class Unbuilt(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(3)

        def call(self, x):
            return self.dense(x)

    x, y = data()
    inner = Unbuilt()
    inner(x)
    inner.get_build_config = lambda: None
    model = jvpreg.JacobianModel(inner)
    compiled(model, SpectralNorm(0.1))
    with pytest.raises(ValueError, match="carries a variable from step to step, whose shape was not known"):
        model.fit(x, y, verbose=0)


def test_arguments():
    with pytest.raises(ValueError, match=r"`num_iterations`. Expected an integer, 1 or more. Received: .*=0"):
        SpectralNorm(0.1, num_iterations=0)
    assert SpectralNorm.from_config(SpectralNorm(0.1, 2).get_config()).num_iterations == 2
