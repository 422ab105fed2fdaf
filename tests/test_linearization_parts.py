"""`after` and `block`: parts of a frozen model, against matrices and against autodiff of the same part."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import jvpreg

pytestmark = pytest.mark.usefixtures("float64")


def residual_model():
    x = keras.Input((5,))
    y = layers.Dense(4, activation="tanh", name="first")(x)
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(6, activation="relu"), layers.Dense(4)], name="inner")
    y = layers.Add(name="sum")([y, inner(y)])
    return keras.Model(x, layers.Dense(3, name="last")(y))


def linearized(batch=3):
    keras.utils.set_random_seed(0)
    model = residual_model()
    x = np.random.default_rng(0).normal(size=(batch, 5))
    return model, x, jvpreg.linearize(model, x)


def matrices(lin):
    return ops.convert_to_numpy(lin.jacobian())


def test_the_whole_is_the_product_of_its_parts():
    _, _, lin = linearized()
    whole = matrices(lin.after("first")) @ matrices(lin.block("first"))
    np.testing.assert_allclose(whole, matrices(lin), rtol=1e-12)
    through_last = matrices(lin.block("last")) @ matrices(lin.block("inner"))
    around = matrices(lin.block("last"))
    np.testing.assert_allclose(through_last + around, matrices(lin.after("first")), rtol=1e-12)


def test_a_layer_ends_after_its_activation():
    model, x, lin = linearized()
    first = model.get_layer("first")
    part = lin.block("first")
    np.testing.assert_allclose(ops.convert_to_numpy(part.outputs), ops.convert_to_numpy(first(x)), rtol=1e-12)
    alone = jvpreg.linearize(keras.Sequential([keras.Input((5,)), first]), x)
    np.testing.assert_allclose(matrices(part), matrices(alone), rtol=1e-12)


def test_what_goes_around_a_layer_is_constant():
    _, _, lin = linearized()
    np.testing.assert_allclose(matrices(lin.after("inner")), matrices(lin.block("last")), rtol=1e-12)


def test_a_part_pulls_back_and_is_complete():
    _, _, lin = linearized()
    part = lin.after("first")
    u, v = np.random.default_rng(1).normal(size=(3, 4)), np.random.default_rng(2).normal(size=(3, 3))
    forward, backward = ops.convert_to_numpy(part.jvp(u)), ops.convert_to_numpy(part.vjp(v))
    np.testing.assert_allclose(np.sum(forward * v), np.sum(u * backward), rtol=1e-12)
    slope, intercept = part.affine_map()
    at_x = np.einsum("bkd,bd->bk", ops.convert_to_numpy(slope), ops.convert_to_numpy(part.inputs[0]))
    np.testing.assert_allclose(at_x + ops.convert_to_numpy(intercept), ops.convert_to_numpy(lin.outputs), rtol=1e-12)


def test_of_some_examples():
    _, _, lin = linearized()
    for part in (lin.after("first"), lin.block("inner")):
        np.testing.assert_allclose(matrices(part.take([2, 0])), matrices(part)[[2, 0]], rtol=1e-12)
    with pytest.raises(ValueError, match="call `after` or `block` first, then `take`"):
        lin.take([1]).after("first")


def test_names_that_do_not_fit():
    _, _, lin = linearized()
    with pytest.raises(ValueError, match=r"`layer`. Expected the path of a layer, or the beginning.*: \['first'"):
        lin.after("second")
    with pytest.raises(ValueError, match=r"Expected a layer or block with one input. Received: 'sum', which has 2"):
        lin.block("sum")
