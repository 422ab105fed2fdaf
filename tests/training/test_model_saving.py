"""Save and load: a loaded model goes on as the original would."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import jvpreg
from jvpreg.regularizers import JacobianNorm, JacobianRegularizer


@keras.saving.register_keras_serializable(package="test_model_saving")
class Weighted(JacobianRegularizer):
    """A user's regularizer with an argument of its own."""

    def __init__(self, strength, power=1, name=None):
        super().__init__(strength, name)
        self.power = power

    def directions(self, inputs, labels, seed):
        return ops.expand_dims(ops.ones_like(inputs), 0)

    def penalty(self, seen):
        return ops.sum(seen.jvp[0] ** (2 * self.power), axis=-1)

    def get_config(self):
        return {**super().get_config(), "power": self.power}


def make_model(regularizers=None, **kwargs):
    keras.utils.set_random_seed(1)
    base = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(8, activation="relu"),
            layers.BatchNormalization(),
            # Seeded: without a seed, torch draws from its own generator.
            layers.Dropout(0.3, seed=1),
            layers.Dense(3),
        ]
    )
    model = jvpreg.JacobianModel(base, seed=3)
    if regularizers is None:
        regularizers = [JacobianNorm(0.02, num_probes=2, probes="sphere", side="output"), Weighted(0.01, power=2)]
    model.compile(
        keras.optimizers.Adam(0.01),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jacobian_regularizers=regularizers,
        **kwargs,
    )
    return model


def data():
    random = np.random.default_rng(0)
    return random.normal(size=(24, 6)).astype("float32"), random.integers(0, 3, 24)


def assert_same_weights(one, two):
    for a, b in zip(one.get_weights(), two.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_a_loaded_model_trains_on_as_the_original_would(tmp_path):
    x, y = data()
    model = make_model(jacobian_interval=2, jacobian_fraction=0.5, jacobian_evaluate=False)
    fit = {"batch_size": 8, "shuffle": False, "verbose": 0}
    model.fit(x, y, **fit)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.get_compile_config() == model.get_compile_config()
    assert (loaded.jacobian_interval, loaded.jacobian_fraction, loaded.jacobian_evaluate) == (2, 0.5, False)
    assert [type(r) for r in loaded.jacobian_regularizers] == [JacobianNorm, Weighted]
    assert loaded.jacobian_regularizers[0].get_config() == model.jacobian_regularizers[0].get_config()
    assert loaded.jacobian_regularizers[1].power == 2
    assert_same_weights(loaded, model)
    # Three steps an epoch and an interval of 2: the loaded model must also know whose turn it is.
    again, theirs = (one.fit(x, y, epochs=2, **fit).history for one in (loaded, model))
    assert again == theirs
    assert_same_weights(loaded, model)


@pytest.mark.slow
def test_the_base_alone_is_a_plain_model(tmp_path):
    x, y = data()
    model = make_model()
    model.fit(x, y, verbose=0)
    model.base.save(tmp_path / "base.keras")
    loaded = keras.models.load_model(tmp_path / "base.keras")
    assert type(loaded) is keras.Sequential
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))


@pytest.mark.slow
def test_weights_alone(tmp_path):
    x, y = data()
    model = make_model()
    other = jvpreg.JacobianModel.from_config(model.get_config())
    model.fit(x, y, verbose=0)
    model.save_weights(tmp_path / "model.weights.h5")
    other.load_weights(tmp_path / "model.weights.h5")
    assert_same_weights(other, model)


@pytest.mark.slow
def test_a_clone_has_the_penalties_and_weights_of_its_own():
    x, y = data()
    model = make_model(jacobian_interval=3)
    clone = keras.models.clone_model(model)
    assert clone.get_compile_config() == model.get_compile_config()
    before = model.get_weights()
    clone.fit(x, y, verbose=0)
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_config_makes_the_model_again():
    model = make_model()
    again = jvpreg.JacobianModel.from_config(model.get_config())
    assert again.get_config() == model.get_config()
    assert again.base is not model.base


@pytest.mark.slow
def test_loading_without_compiling(tmp_path):
    model = make_model()
    model.train_on_batch(*data())
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras", compile=False)
    assert not loaded.compiled
    assert_same_weights(loaded, model)


def test_a_regularizer_that_is_not_registered_is_named(tmp_path):
    class Unregistered(Weighted):
        pass

    model = make_model([Unregistered(0.1)])
    model.train_on_batch(*data())
    model.save(tmp_path / "model.keras")
    with pytest.raises(TypeError, match=r"Could not locate class 'Unregistered'.*register_keras_serializable"):
        keras.models.load_model(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras", custom_objects={"Unregistered": Unregistered})
    assert type(loaded.jacobian_regularizers[0]) is Unregistered


def test_a_layer_draws_on_after_loading(tmp_path):
    block = keras.Sequential([keras.Input((6,)), layers.Dense(3, activation="tanh")])
    model = keras.Sequential([keras.Input((6,)), jvpreg.layers.JacobianPenalty(block, [JacobianNorm(0.1)], seed=3)])
    x, _ = data()

    def penalty(one):
        one(x, training=True)
        return float(ops.stop_gradient(one.losses[0]))

    first = penalty(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    expected = penalty(model)
    assert abs(expected - first) > 1e-3 * first
    np.testing.assert_allclose(penalty(loaded), expected, rtol=1e-6)


@pytest.mark.parametrize("dropout", [("saved",), ("loaded",)])
def test_weights_of_a_base_with_other_dropout(dropout, tmp_path):
    def make(with_dropout):
        noise = [layers.Dropout(0.3, seed=1)] if with_dropout else []
        return jvpreg.JacobianModel(keras.Sequential([keras.Input((6,)), layers.Dense(4), *noise, layers.Dense(3)]))

    saved, loaded = make("saved" in dropout), make("loaded" in dropout)
    saved.save_weights(tmp_path / "model.weights.h5")
    loaded.load_weights(tmp_path / "model.weights.h5")
    assert_same_weights(saved, loaded)
    for one, other in zip(saved.seed_states()[:2], loaded.seed_states()[:2], strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(one), ops.convert_to_numpy(other))
