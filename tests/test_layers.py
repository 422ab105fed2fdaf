"""`JacobianPenalty`: the penalties on one block inside any model."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import jvpreg
from jvpreg.estimators.norms import squared_norm
from jvpreg.layers import JacobianPenalty
from jvpreg.regularizers import JacobianNorm, JacobianRegularizer


@keras.saving.register_keras_serializable(package="test_layers")
class AlongOnes(JacobianRegularizer):
    """`‖J 1‖²`: a penalty without chance in it."""

    def directions(self, inputs, labels, seed):
        return ops.expand_dims(ops.ones_like(inputs), 0)

    def penalty(self, seen):
        return squared_norm(seen.jvp)[0]


def _dense():
    return [layers.Dense(4, use_bias=False)]


def make_model(regularizers, block_layers=None):
    keras.utils.set_random_seed(1)
    block = keras.Sequential([keras.Input((5,)), *(block_layers or _dense)()], name="block")
    inputs = keras.Input((6,))
    hidden = layers.Dense(5, activation="tanh")(inputs)
    return keras.Model(inputs, layers.Dense(1)(JacobianPenalty(block, regularizers, seed=2, name="penalty")(hidden)))


def data():
    random = np.random.default_rng(0)
    return random.normal(size=(8, 6)).astype("float32"), random.normal(size=(8, 1)).astype("float32")


def penalty_of(model):
    return np.sum(model.get_layer("penalty").block.get_weights()[0].sum(0) ** 2)


def test_in_fit_and_not_in_evaluation():
    x, y = data()
    model = make_model([AlongOnes(0.3), AlongOnes(0.2)])
    model.compile(keras.optimizers.SGD(0.0), "mse")
    plain = np.mean((model.predict(x, verbose=0) - y) ** 2)
    history = model.fit(x, y, verbose=0, validation_data=(x, y)).history
    np.testing.assert_allclose(history["loss"][0], plain + 0.5 * penalty_of(model), rtol=1e-5)
    np.testing.assert_allclose(history["val_loss"][0], plain, rtol=1e-5)


def test_the_penalty_trains_the_block():
    x, _ = data()
    model = make_model([AlongOnes(1.0)])
    model.compile(keras.optimizers.SGD(0.05), loss=_nothing)
    before = penalty_of(model)
    model.fit(x, np.zeros((8, 1)), epochs=3, verbose=0)
    assert penalty_of(model) < 0.7 * before


def _nothing(y_true, y_pred):
    return 0.0 * ops.sum(y_pred, axis=-1)


def test_batch_statistics_and_activity_losses_count_once():
    def block():
        return [layers.Dense(4, activity_regularizer="l2"), layers.BatchNormalization(), layers.Dropout(0.5, seed=1)]

    x, y = data()
    results = []
    for regularizers in ([], [AlongOnes(0.0)]):
        model = make_model(regularizers, block)
        model.compile(keras.optimizers.SGD(0.0), "mse")
        loss = model.train_on_batch(x, y)
        results.append((loss, model.get_layer("penalty").block.layers[1].get_weights()))
    np.testing.assert_allclose(results[1][0], results[0][0], rtol=1e-5)
    for ours, plain in zip(results[1][1], results[0][1], strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-7)


def test_in_a_custom_training_loop():
    x, y = data()
    model = make_model([AlongOnes(0.3)])
    optimizer = keras.optimizers.SGD(0.05)
    optimizer.build(model.trainable_variables)
    before = penalty_of(model)
    for _ in range(3):
        _train_step(model, optimizer, x, y)
    assert penalty_of(model) < 0.9 * before


def _train_step(model, optimizer, x, y):
    """A step by hand, as the user of each backend writes it."""
    variables = model.trainable_variables
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            loss = ops.mean((model(x, training=True) - y) ** 2) + sum(model.losses)
        optimizer.apply(tape.gradient(loss, variables), variables)
    elif keras.backend.backend() == "torch":
        model.zero_grad()
        loss = ops.mean((model(x, training=True) - ops.convert_to_tensor(y)) ** 2) + sum(model.losses)
        loss.backward()
        optimizer.apply([variable.value.grad for variable in variables], variables)
    else:
        import jax

        def loss_of(trainable, other):
            outputs, other, losses = model.stateless_call(trainable, other, x, training=True, return_losses=True)
            return ops.mean((outputs - y) ** 2) + sum(losses), other

        others = model.non_trainable_variables
        gradients, new = jax.grad(loss_of, has_aux=True)([v.value for v in variables], [v.value for v in others])
        for variable, value in zip(others, new, strict=True):
            variable.assign(value)
        optimizer.apply(gradients, variables)


def test_saved_and_loaded(tmp_path):
    x, y = data()
    model = make_model([AlongOnes(0.3), JacobianNorm(0.1, num_probes=2)])
    model.compile("sgd", "mse")
    model.train_on_batch(x, y)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    layer, original = loaded.get_layer("penalty"), model.get_layer("penalty")
    assert [r.get_config() for r in layer.regularizers] == [r.get_config() for r in original.regularizers]
    assert layer.seed == original.seed == 2
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))
    losses = [m.train_on_batch(x, y) for m in (loaded, model)]
    assert np.all(np.isfinite(losses))


def test_a_linearization_looks_through_it():
    x, _ = data()
    model = make_model([AlongOnes(0.3)])
    plain = keras.Sequential([model.layers[1], model.get_layer("penalty").block, model.layers[3]])
    plain.build((None, 6))
    u = np.random.default_rng(1).normal(size=x.shape).astype("float32")
    (y, ju), (expected_y, expected) = jvpreg.jvp(model, x, u), jvpreg.jvp(plain, x, u)
    np.testing.assert_allclose(ops.convert_to_numpy(ju), ops.convert_to_numpy(expected), rtol=1e-6)
    np.testing.assert_allclose(ops.convert_to_numpy(y), ops.convert_to_numpy(expected_y), rtol=1e-6)


def test_a_single_layer_is_a_block_too():
    layer = JacobianPenalty(layers.Dense(3, kernel_initializer="ones"), [AlongOnes(0.5)])
    layer(np.ones((4, 2), "float32"), training=True)
    (loss,) = layer.losses
    assert ops.convert_to_numpy(loss) == 0.5 * 3 * 2**2
    layer(np.ones((4, 2), "float32"))
    assert not layer.losses


@pytest.mark.parametrize("regularizers", [JacobianNorm(0.1), [JacobianNorm], "l2"])
def test_regularizers_that_are_none(regularizers):
    with pytest.raises(ValueError, match=r"argument `regularizers`. Expected a list of"):
        JacobianPenalty(layers.Dense(3), regularizers)
