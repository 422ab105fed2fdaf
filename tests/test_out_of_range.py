"""Values that no call can mean are refused before they become zeros, by the name of their argument."""

import keras
import numpy as np
import pytest
from interface import IMAGES, X, network, of_images
from keras import layers, ops

import jvpreg
from jvpreg import clone, distillation, regularizers
from jvpreg.attribution import saliency
from jvpreg.regularizers.full_jacobian import target_cotangent

NO_CLASSES = [9, -1, np.array([0, 2, 1, 3]), np.array([-1, 0, 1, 0], "int8")]
NO_TARGETS = [True, 1.0, "1", np.ones(4), np.ones(4, bool), [0, 1], np.zeros((4, 3)), np.zeros((2, 4, 2)), {"y": 1}]


def numpy(tensor):
    return ops.convert_to_numpy(tensor)


def test_one_class_for_all_examples():
    one = jvpreg.full_jacobian(network(), X, target=np.int64(1))
    each = jvpreg.full_jacobian(network(), X, target=np.full(4, 1))
    np.testing.assert_allclose(numpy(one.input_jacobian), numpy(each.input_jacobian))
    assert np.abs(numpy(one.input_jacobian)).max() > 0


@pytest.mark.parametrize("method", saliency.METHODS)
def test_one_class_for_all_images_and_none_that_there_is_not(method):
    few = {"num_steps": 1} if method == "integrated gradients" else {"num_samples": 1} if method == "SmoothGrad" else {}
    one, each = (saliency.METHODS[method](of_images(), IMAGES, target, **few) for target in (2, np.full(2, 2)))
    np.testing.assert_allclose(numpy(one), numpy(each), rtol=1e-5, atol=1e-7)
    for target in (3, -1, np.array([0, 3]), ops.convert_to_tensor([0, -1])):
        with pytest.raises(ValueError, match=r"`target`. Expected classes from 0 to 2. Received: (3|-1)"):
            saliency.METHODS[method](of_images(), IMAGES, target, **few)


@pytest.mark.parametrize("target", [*NO_CLASSES, *NO_TARGETS], ids=str)
def test_no_target(target):
    with pytest.raises(ValueError, match="`target`"):
        jvpreg.full_jacobian(network(), X, target=target)


def test_a_label_in_a_step_that_there_is_not_is_nan():
    outputs = ops.ones((3, 2))
    found = numpy(target_cotangent(regularizers.BiasJacobianNorm(0.1), outputs, np.array([1.0, 2.0, -1.0])))
    np.testing.assert_array_equal(found, [[0, 1], [np.nan, np.nan], [np.nan, np.nan]])


def test_labels_of_a_teacher():
    teacher, student = (keras.Sequential([keras.Input((3,)), layers.Dense(3)]) for _ in range(2))
    distiller = jvpreg.JacobianDistiller(teacher, student, [distillation.JacobianMatching(0.1)])
    for y in (np.array([0, 1, 3, 0]), np.array([[0.0], [-1.0], [1.0], [0.0]]), np.array([0.5, 1, 1, 1])):
        with pytest.raises(ValueError, match=r"`y`. Expected classes from 0 to 2"):
            distiller.with_teacher(X, y)


def test_cotangents_of_other_outputs():
    x = keras.Input((3,))
    model = keras.Model(x, {"left": layers.Dense(2)(x), "right": layers.Dense(2)(x)})
    lin = jvpreg.linearize(model, X)
    v = {"right": np.ones((4, 2)), "left": None}
    right = lin.outputs["right"]
    np.testing.assert_allclose(numpy(jvpreg.full_jacobian(lin, None, v).target_output), numpy(right).sum(1), rtol=1e-5)
    for wrong in ({"right": v["right"], "wrong": v["right"]}, {"right": v["right"]}, [v["right"], None], v["right"]):
        with pytest.raises(ValueError, match=r"`v`. Expected a dict with the keys \['left', 'right'\]"):
            lin.vjp(wrong)
        with pytest.raises(ValueError, match=r"`target`. Expected a dict with the keys"):
            jvpreg.full_jacobian(lin, None, wrong)
    with pytest.raises(ValueError, match=r"`v`. Expected (no dict|a tensor)"):
        jvpreg.vjp(network(), X, {"last": np.ones((4, 2))})


class OfTwo(layers.Layer):
    """A layer of two inputs, without a graph that would give them names."""

    def __init__(self):
        super().__init__()
        self.built = True

    def call(self, x):
        return x["b"] * x["a"] if isinstance(x, dict) else x[1] * x[0]


def test_tangents_of_inputs_that_there_are_not():
    a, b = X, X + 1.0
    u, layer = {"b": np.ones_like(X), "a": None}, OfTwo()
    lin = jvpreg.linearize(layer, {"b": b, "a": a})
    for product in (
        lin.jvp(u),
        jvpreg.jvp(layer, {"b": b, "a": a}, u)[1],
        jvpreg.linearize(layer, [a, b]).jvp([None, u["b"]]),
    ):
        np.testing.assert_allclose(numpy(product), a, rtol=1e-6)
    for wrong in ({"a": a, "zzz": b}, {"a": a}, {"a": a, "b": b, "zzz": b}, [a, b], a):
        message = r"`u`. Expected a dict with the keys \['b', 'a'\], like x"
        for call in (lin.jvp, lin.gains, lambda u: jvpreg.jvp(layer, {"b": b, "a": a}, u)):
            with pytest.raises(ValueError, match=message):
                call(wrong)
    with pytest.raises(ValueError, match=r"`u`. Expected 2 tensor\(s\), one for each of x. Received: 1"):
        jvpreg.linearize(layer, [a, b]).jvp([a])


@pytest.mark.parametrize("value", [None, "x", b"x", np.array(["a"]), np.array([None]), np.ones((4, 3)) * 1j, object()])
def test_what_is_no_array_of_numbers(value):
    with pytest.raises(ValueError, match="`x`"):
        jvpreg.linearize(network(), value)
    with pytest.raises(ValueError, match="`u`"):
        jvpreg.linearize(network(), X).jvp(value)


def test_a_batch_of_nothing():
    for call in (jvpreg.linearize, jvpreg.full_jacobian, jvpreg.jacobian):
        with pytest.raises(ValueError, match=r"`x`. Expected a batch \(B, …\) of one example at least"):
            call(network(), X[:0])
    with pytest.raises(ValueError, match="`indices`"):
        jvpreg.linearize(network(), X).take([])


def test_examples_that_there_are_not():
    lin = jvpreg.linearize(network(), X)
    np.testing.assert_allclose(numpy(lin.take([-1]).outputs), numpy(lin.outputs)[-1:])
    for indices in ([4], [-5], np.array([0, 9])):
        with pytest.raises(ValueError, match="`indices`"):
            lin.take(indices)


@pytest.mark.parametrize("count", [-1, 0, 1.5, True, "1"])
def test_counts_of_probes(count):
    h = np.ones((6, 2), "float32")
    for function in (clone.unstack, clone.activation, clone.batch_normalization):
        with pytest.raises(ValueError, match=r"`num_probes`. Expected an integer, 1 or more, or None"):
            function(h, num_probes=count)


@pytest.mark.parametrize("operations", [(), (None,), ("Dense",), (layers.Dense(2),), (int,)])
def test_rules_for_nothing(operations):
    with pytest.raises(ValueError, match="`operations`"):
        jvpreg.register_rule(*operations)
