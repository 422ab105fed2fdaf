"""The worked examples of Zimmermann's lecture "Under the hood of autodiff" (CTU in Prague).

The slides round every local gradient to a digit or two; each test states the exact value and the slide's.
"""

import keras
import numpy as np
import pytest
from compare import assert_close
from keras import layers, ops

import jvpreg

numpy = ops.convert_to_numpy

# The neuron of the slides: w₁ = −1 on x₁ = 2, and w₂ x₂ = 1, so that q = −1; the label is y = 1.
WEIGHTS, INPUTS, LABEL = np.array([[-1.0, 1.0]]), np.array([[2.0], [1.0]]), 1.0


class NegativeLog(layers.Layer):
    """L = −log p."""

    def call(self, p):
        return -ops.log(p)


class SelectEvenElements(layers.Layer):
    """y = (x₂, x₄, …)."""

    def call(self, x):
        return x[:, 1::2]


@pytest.fixture(autouse=True)
def rules(own_rules):
    @jvpreg.register_rule(NegativeLog)
    def negative_log(layer, p, context):
        return layer.call(p), jvpreg.rules.scale(-1 / p)

    @jvpreg.register_rule(SelectEvenElements)
    def select_even_elements(layer, x, context):
        return layer.call(x), jvpreg.rules.linear(layer.call)


def constant_dense(kernel):
    """y = x @ kernel."""
    kernel = np.asarray(kernel, "float64")
    layer = layers.Dense(kernel.shape[1], use_bias=False)
    layer.build((None, kernel.shape[0]))
    layer.kernel.assign(kernel)
    return layer


def neuron():
    """The loss as a function of the *weights*, whose gradient is wanted: q = w·x, v = y q, p = σ(v), L = −log p."""
    return keras.Sequential(
        [
            keras.Input((2,)),
            constant_dense(INPUTS),
            constant_dense([[LABEL]]),
            layers.Activation("sigmoid"),
            NegativeLog(),
        ]
    )


def test_local_gradients_of_the_neuron(float64):
    lin = jvpreg.linearize(neuron(), WEIGHTS)
    q, v, p, loss = (node.outputs[0].primal for node in lin.nodes)
    assert_close([q, v], [np.array([[-1.0]])] * 2)
    assert round(float(numpy(p)[0, 0]), 2) == 0.27 == round(1 / 3.7, 2)
    assert_close(loss, np.array([[np.log1p(np.e)]]))
    one = ops.ones((1, 1, 1), dtype="float64")
    local = {node.name: float(numpy(node.pushforward(one))[0, 0, 0]) for node in lin.nodes[1:]}
    dv_dq, dp_dv, dl_dp = local.values()
    assert dv_dq == LABEL
    # Exact, and as on the slide.
    assert abs(dl_dp - -(1 + np.e)) < 1e-14
    assert round(dl_dp, 1) == -3.7
    assert abs(dp_dv - np.e / (1 + np.e) ** 2) < 1e-15
    assert round(dp_dv, 1) == 0.2
    assert abs(-3.7 * 0.2 * 1 * 1 * 2 - -1.48) < 1e-12


def test_the_gradient_of_the_neuron_is_minus_1_48(float64):
    """−1.4621 exactly: −(1 − σ(−1)) · x₁; −1.48 is the product of the rounded factors."""
    lin = jvpreg.linearize(neuron(), WEIGHTS)
    gradient = numpy(lin.vjp(np.ones((1, 1))))
    exact = -(1 - 1 / (1 + np.e)) * INPUTS[:, 0]
    assert_close(gradient, exact[None])
    assert round(gradient[0, 0], 4) == -1.4621
    assert abs(gradient[0, 0] - -1.48) < 0.02
    # One column of the Jacobian at a time, forward; w₁ − α ∂L/∂w₁ = 0.48 on the slide, with α = 1.
    assert_close(lin.jvp(np.eye(2)[:, None]), exact[:, None, None])
    assert abs(WEIGHTS[0, 0] - gradient[0, 0] - 0.48) < 0.02


def test_the_logistic_loss_in_one_node(float64):
    """L = −log σ(y z) = log(1 + exp(−y z))."""
    model = keras.Sequential(
        [
            keras.Input((2,)),
            constant_dense(LABEL * INPUTS),
            layers.Activation("log_sigmoid"),
            layers.Rescaling(-1.0),
        ]
    )
    whole, split = jvpreg.linearize(model, WEIGHTS), jvpreg.linearize(neuron(), WEIGHTS)
    assert_close(whole.outputs, split.outputs)
    assert_close(whole.vjp(np.ones((1, 1))), split.vjp(np.ones((1, 1))))


U = np.array([[[1.0, 2.0], [3.0, 4.0]]])


def summed(*body):
    """The sum of what `body` returns for an example of 2 × 2."""
    return keras.Sequential([keras.Input((2, 2)), *body, layers.Flatten(), constant_dense(np.ones((4, 1)))])


def test_the_gradient_of_a_sum_is_ones(float64):
    lin = jvpreg.linearize(summed(), U)
    assert float(numpy(lin.outputs)[0, 0]) == 10.0
    np.testing.assert_array_equal(numpy(lin.vjp(np.ones((1, 1)))), np.ones((1, 2, 2)))


def test_the_gradient_of_the_sum_of_a_sigmoid(float64):
    gradient = numpy(jvpreg.linearize(summed(layers.Activation("sigmoid")), U).vjp(np.ones((1, 1))))[0]
    sigmoid = 1 / (1 + np.exp(-U[0]))
    assert_close(gradient, sigmoid * (1 - sigmoid))
    np.testing.assert_array_equal(np.round(gradient, 4), [[0.1966, 0.1050], [0.0452, 0.0177]])


def test_the_pullback_of_a_product_keeps_the_shape_of_the_weights(float64):
    """y = W x: `vjp_W(v)` is 3 × 4, its rows vᵢ xᵀ; and not 1 × 12."""
    weights, x = keras.Input((3, 4)), keras.Input((4,))
    model = keras.Model([weights, x], layers.Dot(axes=(2, 1))([weights, x]))
    random = np.random.default_rng(0)
    w, x, v = random.normal(size=(1, 3, 4)), random.normal(size=(1, 4)), random.normal(size=(1, 3))
    by_weights, by_x = jvpreg.linearize(model, [w, x]).vjp(v)
    assert_close(by_weights, np.einsum("bi,bj->bij", v, x))
    assert_close(by_x, np.einsum("bi,bij->bj", v, w))


def test_select_even_elements(float64):
    jvpreg.testing.check_rule(SelectEvenElements(), (6,))
    jvpreg.testing.check_rule(SelectEvenElements(), (7,))
    model = keras.Sequential([keras.Input((6,)), SelectEvenElements()])
    lin = jvpreg.linearize(model, np.arange(1.0, 7.0)[None])
    np.testing.assert_array_equal(numpy(lin.outputs), [[2.0, 4.0, 6.0]])
    np.testing.assert_array_equal(numpy(lin.jvp(np.arange(10.0, 70.0, 10.0)[None])), [[20.0, 40.0, 60.0]])
    # The pullback scatters: every odd element gets nothing.
    np.testing.assert_array_equal(numpy(lin.vjp(np.array([[7.0, 8.0, 9.0]]))), [[0.0, 7.0, 0.0, 8.0, 0.0, 9.0]])


def test_a_jacobian_that_is_never_built():
    """g(y) = 2 y, and then tanh, on 10⁶ entries: the Jacobian would have 10¹² of them, 4 terabytes."""
    size = 10**6
    model = keras.Sequential([keras.Input((size,)), layers.Rescaling(2.0), layers.Activation("tanh")])
    x = np.linspace(-2.0, 2.0, size, dtype="float32")[None]
    u = np.random.default_rng(0).normal(size=(1, size)).astype("float32")
    slope = 2.0 / np.cosh(2.0 * x.astype("float64")) ** 2
    lin = jvpreg.linearize(model, x)
    assert_close(lin.jvp(u), slope * u, 1e-5)
    assert_close(lin.vjp(u), slope * u, 1e-5)
    # The sum on top of g, as on the slide: 2 everywhere.
    doubled = jvpreg.linearize(model.layers[0], x)
    np.testing.assert_array_equal(numpy(doubled.vjp(np.ones((1, size), "float32"))), 2.0)
