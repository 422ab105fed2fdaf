"""A model that cannot be trained is refused before the first step, and no exception in a step ends `fit` silently."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import jvpreg
from jvpreg.constraints import Monotone
from jvpreg.regularizers import BiasJacobianNorm, FullJacobianNorm, JacobianNorm, JacobianRegularizer, SpectralNorm

X, Y = np.ones((8, 6), "float32"), np.zeros((8, 3), "float32")


def dense():
    return keras.Sequential([keras.Input((6,)), layers.Dense(3)])


def two_outputs():
    x = keras.Input((6,))
    return keras.Model(x, [layers.Dense(1, name="p")(x), layers.Dense(1, name="q")(x)])


@pytest.mark.parametrize(
    ("base", "name", "arguments"),
    [
        (dense, "accuracy", {"metrics": ["accuracy"]}),
        (dense, "mae", {"weighted_metrics": ["mae"]}),
        (dense, "top", {"metrics": [keras.metrics.MeanSquaredError(name="top")]}),
        (dense, "loss", {}),
        (dense, "val_loss", {}),
        (two_outputs, "q_loss", {}),
        (two_outputs, "p_mae", {"metrics": [["mae"], []]}),
    ],
)
def test_a_name_that_the_logs_have_already_is_refused(base, name, arguments):
    model = jvpreg.JacobianModel(base())
    with pytest.raises(ValueError, match=f"argument `name` of a Jacobian regularizer or .*name='{name}'"):
        model.compile("sgd", "mse", jacobian_regularizers=[JacobianNorm(0.1, name=name)], **arguments)


@pytest.mark.parametrize("kind", [BiasJacobianNorm, FullJacobianNorm])
@pytest.mark.parametrize("given", [[], "dense", [1], {}, 3])
def test_layers_that_are_none(kind, given):
    with pytest.raises(ValueError, match=r"argument `layers`. Expected a list of paths of layers"):
        kind(0.1, layers=given)


def test_a_step_that_runs_out_of_something_does_not_end_the_fit():
    class Empty(JacobianRegularizer):
        def directions(self, inputs, labels, seed):
            return next(iter([]))

    for call in ("fit", "evaluate"):  # each has its own model: on JAX, Keras cannot use a model after an error
        model = jvpreg.JacobianModel(dense())
        model.compile("sgd", "mse", jacobian_regularizers=[Empty(0.1)])
        with pytest.raises(RuntimeError, match="A step raised StopIteration"):
            getattr(model, call)(X, Y, verbose=0)


# ---------------------------------------------------------------- integers


def of_tokens():
    return keras.Sequential([keras.Input((6,), dtype="int32"), layers.Embedding(50, 4), layers.Flatten()])


def test_integers_alone_have_no_jacobian():
    model = jvpreg.JacobianModel(of_tokens())
    with pytest.raises(ValueError, match=r"takes integers alone.*`at=\"embedding\"`"):
        model.compile("sgd", "mse", jacobian_regularizers=[JacobianNorm(0.1)])
    model.compile("sgd", "mse")


@pytest.mark.parametrize("block", [of_tokens, lambda: layers.Embedding(50, 4)])
def test_a_layer_of_integers_alone(block):
    with pytest.raises(ValueError, match=r"takes integers alone|do not depend on an input of real numbers"):
        jvpreg.layers.JacobianPenalty(block(), [JacobianNorm(0.1)])(ops.ones((2, 6), "int32"), training=True)


def test_what_the_inputs_do_not_say_is_seen_in_the_first_step():
    base = keras.Sequential([layers.Embedding(50, 4), layers.Flatten(), layers.Dense(3)])  # no Input
    model = jvpreg.JacobianModel(base)
    model.compile("sgd", "mse", jacobian_regularizers=[JacobianNorm(0.1)])
    with pytest.raises(
        ValueError, match=r"do not depend on an input of real numbers.*`frobenius_norm_squared` .* would be 0"
    ):
        model.fit(np.ones((8, 6), "int32"), Y, verbose=0)


def test_bytes_are_real_numbers_and_biases_need_none():
    of_bytes = keras.Sequential([keras.Input((6,), dtype="uint8"), layers.Rescaling(0.5), layers.Dense(3)])
    biased = keras.Sequential([of_tokens(), layers.Dense(3, name="last", bias_initializer="ones")])
    for base, penalty in ((of_bytes, JacobianNorm(0.1)), (biased, BiasJacobianNorm(0.1, ["last"], target="all"))):
        model = jvpreg.JacobianModel(base)
        model.compile("sgd", "mse", jacobian_regularizers=[penalty])
        logs = model.evaluate(np.ones((8, 6), "uint8"), Y, verbose=0, return_dict=True)
        assert logs[penalty.name] > 0.01


def test_integers_beside_floats_and_after_an_embedding():
    words, numbers = keras.Input((2,), dtype="int32"), keras.Input((3,))
    embedded = layers.Flatten()(layers.Embedding(5, 2)(words))
    linear = layers.Dense(2)
    base = keras.Model([words, numbers], linear(layers.Concatenate()([embedded, numbers])))
    exact = JacobianNorm(1.0, num_probes=2, probes="orthogonal", side="output")
    model = jvpreg.JacobianModel(base)
    model.compile(keras.optimizers.SGD(0.0), "mse", jacobian_regularizers=[exact])
    logs = model.evaluate([np.ones((4, 2), int), np.ones((4, 3))], np.zeros((4, 2)), verbose=0, return_dict=True)
    kernel = ops.convert_to_numpy(linear.kernel)
    np.testing.assert_allclose(logs["frobenius_norm_squared"], np.sum(kernel[4:] ** 2), rtol=1e-5)


# ---------------------------------------------------------------- compiling again


@pytest.mark.parametrize("by", ["Keras", "a regularizer", "its name"])
def test_a_compile_that_is_refused_leaves_the_penalties_as_they_were(by):
    model = jvpreg.JacobianModel(dense(), seed=0)
    model.compile("sgd", "mse", jacobian_regularizers=[SpectralNorm(0.1)], jacobian_interval=2)
    model.fit(X, Y, verbose=0)
    kept, carried = model.jacobian_regularizers, model.penalty_metrics[0].carried
    refused = {
        "Keras": ("nope", []),
        "a regularizer": ("sgd", [JacobianNorm(0.2), Monotone([7])]),
        "its name": ("sgd", [JacobianNorm(0.2, name="loss")]),
    }
    optimizer, regularizers = refused[by]
    with pytest.raises(ValueError, match=r"nope|argument `features`|argument `name`"):
        model.compile(optimizer, "mse", jacobian_regularizers=regularizers)
    assert model.jacobian_regularizers == kept
    assert model.jacobian_interval == 2
    assert model.penalty_metrics[0].carried is carried
    history = model.fit(X, Y, batch_size=4, verbose=0).history
    assert set(history) == {"loss", "spectral_norm_squared"}
    assert np.isfinite(history["spectral_norm_squared"]).all()
