"""Configs go round, by Keras and by hand; a trained model is exported."""

import keras
import numpy as np
import pytest
from keras import layers

import jvpreg
from jvpreg import constraints, distillation, regularizers
from jvpreg.constraints import AugmentedLagrangian, Box, Penalty, between, tangents

DECAY = keras.optimizers.schedules.ExponentialDecay(1.0, 10, 0.5)


@keras.saving.register_keras_serializable(package="test_configs")
def slope(inputs, outputs, products):
    return products[0]


MADE = [
    constraints.Monotone([0], enforcement=AugmentedLagrangian(1.0), at="between", tolerance=0.1),
    constraints.Bounded(None, 1.0, directions=np.eye(2)[None], at=Box(0.0, [1.0, 2.0], 4)),
    constraints.Invariant([tangents.Translation(2.0), tangents.Rotation()], enforcement=Penalty(0.1, DECAY)),
    constraints.Linear(slope, [0, 1], equality=True, name="mine"),
    constraints.KnownDerivative("dy", directions=[1], enforcement=3.0),
    constraints.Lipschitz(2.0, norm="inf", side="input", at="a"),
    constraints.Symmetric(num_pairs=2),
    constraints.DivergenceFree(at="between"),
    Penalty(2.0, DECAY),
    AugmentedLagrangian(2.0, 5),
    Box(0.0, 1.0, 3),
    tangents.Scaling(0.5),
    tangents.Brightness(0.5),
    regularizers.JacobianNorm(0.1, 2, "sphere", "output", name="mine", at="a"),
    regularizers.SpectralNorm(0.1, 2, at="a"),
    regularizers.BiasJacobianNorm(0.1, ["a"], "all", 2, at="b"),
    regularizers.FullJacobianNorm(0.1, 2.0, 3.0, ["a"], "predicted", at="b"),
    regularizers.FixedPointJacobianNorm(0.1, "a", 2),
    regularizers.GradientPenalty(0.1, 2.0, one_sided=True, name="mine"),
    regularizers.GradientPenalty(0.1, at=between),
    distillation.ActivationMatching(0.1, temperature=2.0),
    distillation.AttentionMatching(0.1, [("a", "b")], normalized=True),
    distillation.JacobianMatching(0.1, num_probes=2),
    distillation.BiasJacobianMatching(0.1, [("a", "b")], "predicted"),
]


@pytest.mark.parametrize("made", MADE, ids=lambda made: type(made).__name__)
def test_a_config_goes_round(made):
    serialized = keras.saving.serialize_keras_object(made)
    by_hand = type(made).from_config(made.get_config())
    by_keras = keras.saving.deserialize_keras_object(serialized)
    for again in (by_hand, by_keras):
        assert type(again) is type(made)
        assert keras.saving.serialize_keras_object(again) == serialized


def test_names_in_saved_files_stay():
    """Files of earlier versions hold them."""
    packages = {type(made).__name__: keras.saving.get_registered_name(type(made)).split(">")[0] for made in MADE}
    moved = dict.fromkeys(("Scaling", "Brightness"), "jvpreg.tangents")
    assert packages == {name: moved.get(name, "jvpreg") for name in packages}
    for name in ("Translation", "Rotation"):
        assert keras.saving.get_registered_name(getattr(tangents, name)) == f"jvpreg.tangents>{name}"


def test_a_function_that_is_not_registered_is_named():
    def unregistered(inputs, outputs, products):
        return products[0]

    config = keras.saving.serialize_keras_object(constraints.Linear(unregistered, [0]))
    with pytest.raises(ValueError, match=r"function `unregistered` .*register_keras_serializable"):
        keras.saving.deserialize_keras_object(config)
    known = keras.saving.deserialize_keras_object(config, custom_objects={"unregistered": unregistered})
    assert known.function is unregistered


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(3)

    def call(self, x):
        return self.dense(x)


FORMATS = {"tensorflow": "tf_saved_model", "jax": "onnx", "torch": "torch"}


@pytest.mark.filterwarnings("ignore")  # Warnings of the exporters.
@pytest.mark.parametrize("base", [lambda: keras.Sequential([keras.Input((6,)), layers.Dense(3)]), Subclassed])
def test_a_trained_model_is_exported(base, tmp_path):
    model = jvpreg.JacobianModel(base())
    x = np.random.default_rng(0).normal(size=(8, 6)).astype("float32")
    model.compile("sgd", "mse", jacobian_regularizers=[regularizers.JacobianNorm(0.1)])
    model.fit(x, np.zeros((8, 3)), verbose=0)
    path, form = tmp_path / "exported.pt2", FORMATS[keras.backend.backend()]
    model.export(str(path), format=form, verbose=False)
    expected = model.predict(x, verbose=0)
    if form == "torch":
        import torch

        # Keras traces a batch of one, and the program takes no other.
        program = torch.export.load(path).module()
        received = np.concatenate([program(torch.from_numpy(row[None])).detach().numpy() for row in x])
    elif form == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path))
        (received,) = session.run(None, {session.get_inputs()[0].name: x})
    else:
        import tensorflow as tf

        loaded = tf.saved_model.load(str(path))  # by a name, or its variables are gone
        received = loaded.serve(x).numpy()
    np.testing.assert_allclose(received, expected, rtol=1e-5, atol=1e-6)
