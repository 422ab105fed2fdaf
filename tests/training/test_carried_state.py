"""State that is carried from step to step takes up finite values only."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import jvpreg
from jvpreg.constraints import AugmentedLagrangian, Monotone, Symmetric
from jvpreg.regularizers import SpectralNorm

X = np.random.default_rng(0).normal(size=(8, 3)).astype("float32")
BAD = X.copy()
BAD[3] = np.nan

CARRYING = {
    "singular vectors": lambda: SpectralNorm(0.1),
    "multipliers": lambda: Monotone([0, 1], enforcement=AugmentedLagrangian(5.0, update_every=2)),
    "one multiplier": lambda: Symmetric(enforcement=AugmentedLagrangian(5.0, update_every=2)),
}


def compiled(regularizer, **arguments):
    keras.utils.set_random_seed(0)
    # The slope of the ReLU hides NaN.
    base = keras.Sequential([keras.Input((3,)), layers.Dense(8, "relu"), layers.Dense(3)])
    model = jvpreg.JacobianModel(base, seed=1)
    # This optimizer skips a step whose gradients are not finite.
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.05), initial_scale=16.0)
    model.compile(optimizer, "mse", jacobian_regularizers=[regularizer], **arguments)
    return model


def carried(model):
    return ops.convert_to_numpy(model.penalty_metrics[0].carried)


@pytest.mark.parametrize("number", [np.nan, np.inf])
@pytest.mark.parametrize("kind", CARRYING)
def test_a_step_that_is_not_finite_leaves_it_as_it_was(kind, number):
    model = compiled(CARRYING[kind]())
    model.train_on_batch(X, X)
    before, weights = carried(model), model.base.get_weights()
    assert np.abs(before).max() > 0
    model.train_on_batch(np.where(np.isnan(BAD), number, BAD), X)
    np.testing.assert_array_equal(carried(model), before)
    for one, other in zip(model.base.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(one, other)
    model.train_on_batch(X, X)
    assert np.isfinite(carried(model)).all()
    assert np.abs(carried(model) - before).max() > 0


@pytest.mark.parametrize("kind", CARRYING)
def test_of_a_jacobian_penalty(kind):
    block = keras.Sequential([keras.Input((3,)), layers.Dense(3, "tanh")])
    layer = jvpreg.layers.JacobianPenalty(block, [CARRYING[kind]()], seed=0)
    layer(X, training=True)
    before = ops.convert_to_numpy(layer._carried[0])
    layer(BAD, training=True)
    np.testing.assert_array_equal(ops.convert_to_numpy(layer._carried[0]), before)
    layer(X, training=True)
    assert np.abs(ops.convert_to_numpy(layer._carried[0]) - before).max() > 0


@pytest.mark.slow
def test_a_file_that_holds_what_is_not_finite(tmp_path):
    model = compiled(CARRYING["singular vectors"]())
    model.train_on_batch(X, X)
    start = carried(model)
    model.penalty_metrics[0].carried.assign(np.where(np.eye(3), np.nan, start))
    model.save_weights(tmp_path / "spoilt.weights.h5")
    other = compiled(CARRYING["singular vectors"]())
    other.train_on_batch(X, X)
    fresh = carried(other)
    other.load_weights(tmp_path / "spoilt.weights.h5")
    np.testing.assert_array_equal(carried(other), fresh)


@pytest.mark.slow
@pytest.mark.parametrize("steps_per_execution", [1] if keras.backend.backend() == "torch" else [1, 2])
def test_steps_without_penalties_leave_it_as_it_was(steps_per_execution):
    """Steps with and without penalties are two functions, or the branches of a conditional."""
    model = compiled(
        CARRYING["multipliers"](), jacobian_interval=2, steps_per_execution=steps_per_execution, run_eagerly=False
    )
    model.fit(X, X, batch_size=2, shuffle=False, verbose=0)
    # Two of four steps had penalties; after two the multipliers grow once.
    np.testing.assert_array_equal(carried(model)[2], np.zeros(6))
    assert carried(model)[0].max() > 0


def test_a_name_with_a_slash_is_saved_as_any_other(tmp_path):
    """In a file of weights a slash would make a folder."""
    regularizers = [
        Monotone([0, 1], enforcement=AugmentedLagrangian(5.0, update_every=1), name="shape/rising"),
        SpectralNorm(0.1, name="shape/steep"),
    ]
    model = jvpreg.JacobianModel(keras.Sequential([keras.Input((3,)), layers.Dense(3, "tanh")]), seed=1)
    model.compile("sgd", "mse", jacobian_regularizers=regularizers)
    model.train_on_batch(X, X)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    carriers = [[metric for metric in one.penalty_metrics if hasattr(metric, "carried")] for one in (model, loaded)]
    assert len(carriers[0]) == len(regularizers)
    for tracker, other in zip(*carriers, strict=True):
        kept = ops.convert_to_numpy(tracker.carried)
        assert np.abs(kept).max() > 0
        np.testing.assert_array_equal(ops.convert_to_numpy(other.carried), kept)


def test_a_name_with_a_slash_in_a_layer():
    block = keras.Sequential([keras.Input((3,)), layers.Dense(3)])
    layer = jvpreg.layers.JacobianPenalty(block, [SpectralNorm(0.1, name="shape/steep")])
    layer(X, training=True)
    assert float(ops.stop_gradient(layer.losses[0])) > 0
