"""Penalties come in every k-th step, also after weights were restored."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import jvpreg
from jvpreg.regularizers import JacobianRegularizer

X, Y = np.ones((4, 3), "float32"), np.ones((4, 2), "float32")
TENSORFLOW = keras.backend.backend() == "tensorflow"
# On JAX and Torch a step that is not compiled is eager, and then the model's own count decides.
PLAIN = {"jit_compile": False} if TENSORFLOW else {}


class AlongOnes(JacobianRegularizer):
    def directions(self, inputs, labels, seed):
        return ops.expand_dims(ops.ones_like(inputs), 0)

    def penalty(self, seen):
        return ops.sum(seen.jvp[0] ** 2, axis=-1)


def make(interval=2, **arguments):
    model = jvpreg.JacobianModel(keras.Sequential([keras.Input((3,)), layers.Dense(2)]))
    compiled(model, interval, **arguments)
    return model


def compiled(model, interval, **arguments):
    model.compile("sgd", "mse", jacobian_regularizers=[AlongOnes(0.1)], jacobian_interval=interval, **arguments)


def turns(model, epochs, **arguments):
    """Which steps of a fit had a penalty; an epoch is one step."""
    reported = model.fit(X, Y, epochs=epochs, verbose=0, **arguments).history["along_ones"]
    return [not np.isnan(value) for value in reported]


def restored_backup(tmp_path, **arguments):
    def backup():
        return {"callbacks": [keras.callbacks.BackupAndRestore(tmp_path, delete_checkpoint=False)]}

    turns(make(**arguments), 1, **backup())
    return turns(make(**arguments), 4, **backup())


def loaded_weights(tmp_path, **arguments):
    model = make(**arguments)
    turns(model, 1)
    model.save_weights(tmp_path / "one.weights.h5")
    turns(model, 1)
    model.load_weights(tmp_path / "one.weights.h5")
    return turns(model, 6, initial_epoch=3)


def weights_set_by_a_callback(tmp_path, **arguments):
    model = make(**arguments)
    turns(model, 1)
    after_one = model.get_weights()
    turns(model, 1)
    # A callback reads `self.model`, so that JAX' variables hold values.
    restore = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: epoch or model.set_weights(after_one))
    return turns(model, 3, callbacks=[restore])


def a_state_tree(tmp_path, **arguments):
    model = make(**arguments)
    turns(model, 1)
    tree = model.get_state_tree(value_format="numpy_array")
    turns(model, 1)
    model.set_state_tree(tree)
    return turns(model, 3)


def another_interval(tmp_path, **arguments):
    model = make(interval=3, **arguments)
    turns(model, 1)
    compiled(model, 2, **arguments)
    return turns(model, 3)


def steps_by_hand(tmp_path, **arguments):
    model = make(**arguments)
    turns(model, 1)
    model.train_on_batch(X, Y)
    model.train_on_batch(X, Y)
    return turns(model, 3)


RESTORATIONS = [
    *[(restore, PLAIN) for restore in (restored_backup, loaded_weights, weights_set_by_a_callback, a_state_tree)],
    *[(restore, PLAIN) for restore in (another_interval, steps_by_hand)],
    *([(restored_backup, {"jit_compile": True})] if TENSORFLOW else []),
]


@pytest.mark.parametrize(("restore", "compilation"), RESTORATIONS)
def test_the_interval_goes_by_the_steps_that_the_weights_have_taken(restore, compilation, tmp_path):
    # The restored weights have taken one step, or three: an odd number.
    assert restore(tmp_path, **compilation) == [False, True, False]


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="Torch takes one step at a time")
def test_several_steps_at_once(tmp_path):
    model = make(interval=4, steps_per_execution=2)
    data = {"x": np.tile(X, (2, 1)), "y": np.tile(Y, (2, 1)), "batch_size": 4, "verbose": 0}
    model.fit(**data)
    model.save_weights(tmp_path / "two.weights.h5")
    model.fit(**data)
    model.load_weights(tmp_path / "two.weights.h5")
    reported = model.fit(**data, epochs=3).history["along_ones"]
    assert np.isnan(reported).tolist() == [True, False, True]


def test_a_step_is_counted_on_the_host_alone(monkeypatch):
    """The number of steps is read from the device before the first step of an epoch, and in no other."""
    if keras.backend.backend() == "torch":
        pytest.skip("eager steps read it in a conditional")
    read, taken = [], jvpreg.JacobianModel.steps_before
    monkeypatch.setattr(jvpreg.JacobianModel, "steps_before", lambda *args: read.append(1) or taken(*args))
    make().fit(np.tile(X, (5, 1)), np.tile(Y, (5, 1)), batch_size=4, epochs=2, verbose=0)
    assert len(read) == 2


class OwnStep(jvpreg.JacobianModel):
    """Has a training step of its own."""

    def train_step(self, *args):
        return super().train_step(*args)


def test_a_training_step_of_ones_own_has_the_penalties_of_its_turn():
    model = OwnStep(keras.Sequential([keras.Input((3,)), layers.Dense(2)]))
    compiled(model, 2)
    assert turns(model, 3) == [True, False, True]
    assert model.current_step is None
