"""Products come back in the structure in which the inputs were given, whatever it is."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import jvpreg
from tests.compare import assert_close, normal, numpy

pytestmark = pytest.mark.usefixtures("float64")

FIRST, SECOND, V = (normal(3, 2, seed=seed) for seed in range(3))
"""The model returns twice the first input times the square of the second."""


class Product(keras.Model):
    """A model without a graph, of two inputs in a structure that `leaves` takes apart."""

    def __init__(self, leaves):
        super().__init__()
        self.leaves = leaves

    def call(self, x):
        first, second = self.leaves(x)
        return 2.0 * first * second**2


def functional(structure=lambda first, second: [first, second]):
    """A model whose first input has the later name, so that sorting would mix them up."""
    first, second = keras.Input((2,), name="zulu"), keras.Input((2,), name="alpha")
    return keras.Model(structure(first, second), layers.Rescaling(2.0)(layers.Multiply()([first, second**2])))


def by_name(first, second):
    return {"zulu": first, "alpha": second}


def nested(first, second):
    return {"pair": (second, [first])}


STRUCTURES = {
    "a list": (functional, lambda first, second: [first, second]),
    "a tuple": (functional, lambda first, second: (first, second)),
    "a dict by name": (functional, by_name),
    "a dict in another order": (functional, lambda first, second: {"alpha": second, "zulu": first}),
    "a model of a dict": (lambda: functional(by_name), by_name),
    "a model of a dict, given a list": (lambda: functional(by_name), lambda first, second: [second, first]),
    "a model of a nested structure": (lambda: functional(nested), nested),
    "a subclassed model of a dict": (lambda: Product(lambda x: (x["zulu"], x["alpha"])), by_name),
    "a subclassed model of a tuple": (lambda: Product(lambda x: x), lambda first, second: (first, second)),
    "a subclassed model of a nested structure": (lambda: Product(lambda x: (x["pair"][1][0], x["pair"][0])), nested),
}


@pytest.mark.parametrize("kind", STRUCTURES)
def test_products_are_like_the_inputs(kind):
    make, arrange = STRUCTURES[kind]
    model, x = make(), arrange(FIRST, SECOND)
    if not model.built:
        model(x)
    slopes = arrange(2 * SECOND**2, 4 * FIRST * SECOND)
    gradient = keras.tree.map_structure(lambda slope: V * slope, slopes)
    lin = jvpreg.linearize(model, x)
    full = jvpreg.full_jacobian(lin, None, V)
    part, last = lin.take([2]), keras.tree.map_structure(lambda g: g[2:], gradient)
    pairs = [
        (lin.vjp(V), gradient),
        (jvpreg.vjp(model, x, V)[1], gradient),
        (lin.modified_vjp(V, lambda node, cotangents: cotangents), gradient),
        (lin.gradients(V[None], [])[0], keras.tree.map_structure(lambda g: g[None], gradient)),
        (lin.jacobian(), keras.tree.map_structure(lambda slope: slope[:, :, None] * np.eye(2), slopes)),
        (full.input_jacobian, gradient),
        (full.inputs, x),
        (part.vjp(V[2:]), last),
        (lin.pack_inputs(lin.inputs), x),
    ]
    for received, expected in pairs:
        keras.tree.assert_same_structure(received, expected)
        assert_close(received, expected)
    assert_close(full.from_input(), 3 * ops.sum(V * 2 * FIRST * SECOND**2, axis=1))
    assert_close(lin.flatten_inputs(x), lin.inputs)


def test_several_outputs_of_several_inputs():
    """Each output has a structure of slopes; what the model does not take is left out."""
    first, second = keras.Input((2,), name="zulu"), keras.Input((2,), name="alpha")
    model = keras.Model([first, second], {"sum": first + second, "product": first * second})
    slopes = jvpreg.jacobian(model, {"zulu": FIRST, "unused": V, "alpha": SECOND})
    eye = np.broadcast_to(np.eye(2), (3, 2, 2))
    expected = {
        "sum": {"zulu": eye, "alpha": eye},
        "product": {"zulu": SECOND[:, :, None] * eye, "alpha": FIRST[:, :, None] * eye},
    }
    keras.tree.assert_same_structure(slopes, expected)
    for output, row in expected.items():
        assert_close(slopes[output], row)


def test_a_list_of_one_stays_a_list():
    model = keras.Sequential([keras.Input((2,)), layers.Rescaling(3.0)])
    (gradient,) = jvpreg.linearize(model, [FIRST]).vjp(V)
    assert_close(gradient, 3 * V)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The model does not have any trainable weights")
def test_estimators_and_penalties_of_a_model_of_a_dict():
    """They take several inputs as one list, for which a model without a graph has no order of its own."""
    model = Product(lambda x: (x["zulu"], x["alpha"]))
    x = by_name(FIRST, SECOND)
    model(x)
    lin = jvpreg.linearize(model, x)
    squares = (2 * SECOND**2) ** 2 + (4 * FIRST * SECOND) ** 2  # J has a diagonal block for each input
    assert_close(jvpreg.estimators.frobenius_norm(lin, num_probes=9).value, np.sqrt(squares.sum(axis=1)))
    estimate = jvpreg.estimators.top_singular_values(lin, k=2)
    assert_close(estimate.value, np.sqrt(np.sort(squares, axis=1)[:, ::-1]))
    _, right = estimate.vectors
    assert_close(lin.jvp(right), estimate.vectors[0] * numpy(estimate.value).T[:, :, None])
    penalized = jvpreg.JacobianModel(model, seed=0)
    regularizers = [jvpreg.regularizers.JacobianNorm(0.1, num_probes=4, probes="orthogonal")]
    regularizers += [jvpreg.regularizers.SpectralNorm(0.1, num_iterations=10)]
    penalized.compile("sgd", "mse", jacobian_regularizers=regularizers)
    logged = penalized.fit(x, np.zeros((3, 2)), verbose=0).history
    assert logged["frobenius_norm_squared"] == pytest.approx([squares.sum(axis=1).mean()], rel=1e-6)
    assert logged["spectral_norm_squared"] == pytest.approx([squares.max(axis=1).mean()], rel=1e-4)
