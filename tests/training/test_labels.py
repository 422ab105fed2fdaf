"""Labels that are a regularizer's own are seen by no other one, and by no matching loss."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import jvpreg
from jvpreg.constraints import KnownDerivative
from jvpreg.distillation import JacobianMatching
from jvpreg.regularizers import BiasJacobianNorm, FullJacobianNorm

# Tracing a graph takes longer than these few steps take eagerly. On JAX eager steps take longer.
EAGER = {"run_eagerly": keras.backend.backend() != "jax"}
X = np.random.default_rng(0).normal(size=(4, 3)).astype("float32")
CLASSES = np.array([0, 1, 1, 0])
SLOPES = np.ones((4, 2), "float32")
OWN = {"class": CLASSES, "slope": SLOPES}
REGULARIZERS = [BiasJacobianNorm, FullJacobianNorm]


def network(seed=0):
    keras.utils.set_random_seed(seed)
    return keras.Sequential([keras.Input((3,)), layers.Dense(4, "tanh", bias_initializer="normal"), layers.Dense(2)])


def compiled(model, regularizers, **arguments):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.0), loss, jacobian_regularizers=regularizers, **EAGER, **arguments)
    return model


def step(model, x, y):
    model.reset_metrics()
    return model.train_on_batch(x, y, return_dict=True)


def known():
    return KnownDerivative("slope", [0], enforcement=0.5)


@pytest.mark.parametrize("arguments", [{}, {"jacobian_fraction": 0.5}])
@pytest.mark.parametrize("make", REGULARIZERS)
def test_a_regularizer_of_the_label_s_output(make, arguments):
    alone = compiled(jvpreg.JacobianModel(network(), seed=1), [make(0.1)], **arguments)
    beside = compiled(jvpreg.JacobianModel(network(), seed=1), [known(), make(0.1)], **arguments)
    expected, found = step(alone, X, CLASSES), step(beside, X, OWN)
    name = make(0.1).name
    np.testing.assert_allclose(found[name], expected[name], rtol=1e-5)
    np.testing.assert_allclose(found["loss"], expected["loss"] + 0.5 * found["known_derivative"], rtol=1e-5)


@pytest.mark.parametrize("cached", [False, True])
def test_a_matching_loss_of_the_label_s_output(cached):
    alone, beside = (jvpreg.JacobianDistiller(network(0), network(1), [JacobianMatching(0.1)]) for _ in range(2))
    expected = step(compiled(alone, []), X, CLASSES)
    compiled(beside, [known(), BiasJacobianNorm(0.0)])
    found = step(beside, beside.with_teacher(X, OWN) if cached else X, OWN)
    np.testing.assert_allclose(found["jacobian_matching"], expected["jacobian_matching"], rtol=1e-5)
    np.testing.assert_allclose(found["loss"], expected["loss"] + 0.5 * found["known_derivative"], rtol=1e-5)


@pytest.mark.parametrize("loss", [None, "mse"])
def test_what_has_labels_of_its_own_sees_the_whole_dict(loss):
    class Keeps(jvpreg.regularizers.JacobianRegularizer):
        def directions(self, inputs, labels, seed):
            seen.append(labels)
            return ops.expand_dims(ops.ones_like(inputs), 0)

        def penalty(self, seen):
            return 0.0 * seen.jvp[0][:, 0]

    seen = []
    model = jvpreg.JacobianModel(network())
    own, other = Keeps(1.0, "own"), Keeps(1.0, "other")
    own.label_keys = ("slope",)
    model.compile("sgd", loss, jacobian_regularizers=[own, other], **EAGER)
    model.evaluate(X, OWN if loss is None else {"value": SLOPES, "slope": SLOPES}, verbose=0)
    assert [isinstance(labels, dict) for labels in seen] == [True, False]


def single(seed=0):
    keras.utils.set_random_seed(seed)
    return keras.Sequential([keras.Input((3,)), layers.Dense(4, "tanh", bias_initializer="normal"), layers.Dense(1)])


@pytest.mark.parametrize("labels", [CLASSES, CLASSES[:, None], 0.5 + CLASSES], ids=["row", "column", "numbers"])
def test_one_output_is_the_one_whatever_the_label_is(labels):
    full = [jvpreg.full_jacobian(single(seed), X, target=0) for seed in (0, 1)]
    jacobians = [ops.convert_to_numpy(f.input_jacobian) for f in full]
    biases = sum(np.sum(ops.convert_to_numpy(b) ** 2) for b in full[1].bias_jacobians.values()) / len(X)
    inputs = np.sum(jacobians[1] ** 2) / len(X)
    distiller = jvpreg.JacobianDistiller(single(0), single(1), [JacobianMatching(0.1)])
    regularizers = [make(0.1) for make in REGULARIZERS]
    distiller.compile(keras.optimizers.SGD(0.0), "mse", jacobian_regularizers=regularizers, **EAGER)
    for x in (X, distiller.with_teacher(X, labels)):
        found = step(distiller, x, labels)
        expected = np.sum((jacobians[0] - jacobians[1]) ** 2) / len(X)
        np.testing.assert_allclose(found["jacobian_matching"], expected, rtol=1e-4)
        np.testing.assert_allclose(found["bias_jacobian_norm_squared"], biases, rtol=1e-4)
        np.testing.assert_allclose(found["full_jacobian_norm_squared"], inputs + biases, rtol=1e-4)
