"""Registering rules, and the helpers that rules are made of."""

import keras
import numpy as np
import pytest
from compare import assert_close, normal
from keras import activations, layers, ops

import jvpreg
from jvpreg.rules import registry

numpy = ops.convert_to_numpy


class Halve(layers.Layer):
    def call(self, x):
        return x / 2


class HalveMore(Halve):
    def call(self, x):
        return x / 4


def halve(layer, x, context):
    return x / 2, jvpreg.rules.linear(lambda tangent: tangent / 2)


def test_a_registered_rule_is_used_for_its_exact_class_only():
    assert registry.find_rule(Halve()) is None
    assert jvpreg.register_rule(Halve)(halve) is halve
    assert registry.find_rule(Halve()).function is halve
    assert registry.find_rule(HalveMore()) is None
    assert Halve in registry.registered_operations()
    jvpreg.testing.check_rule(Halve(), (3,))


def test_registering_twice():
    jvpreg.register_rule(Halve)(halve)
    with pytest.raises(ValueError, match=r"`operations`. Expected an operation without a.* Received: Halve.*`halve`"):
        jvpreg.register_rule(Halve)(halve)
    with pytest.raises(ValueError, match=r"Received: Dense, which has the rule `dense`"):
        jvpreg.register_rule(HalveMore, layers.Dense)(halve)
    # If one operation is refused, none is registered.
    assert registry.find_rule(HalveMore()) is None


@pytest.mark.parametrize(
    "returned", [lambda x: x, lambda x: (x,), lambda x: (x, x), lambda x: jvpreg.rules.linear(ops.abs)]
)
def test_a_rule_that_returns_something_else(returned):
    jvpreg.register_rule(Halve)(lambda layer, x, context: returned(x))
    with pytest.raises(
        TypeError, match=r"rule of `halve` \(Halve\).*Expected \(y, Pushforward\).* or an Affine. Received"
    ):
        jvpreg.linearize(keras.Sequential([keras.Input((3,)), Halve(name="halve")]), normal(2, 3))


def test_an_affine_is_of_one_input_and_its_bias_broadcasts():
    class Add(layers.Layer):
        def build(self, shapes):
            self.bias = self.add_weight(shape=(2,))

        def call(self, inputs):
            return inputs[0] + inputs[1]

    @jvpreg.register_rule(Add)
    def add(layer, inputs, context):
        return jvpreg.rules.Affine(lambda a: a, inputs[0])

    @jvpreg.register_rule(Halve)
    def halve(layer, x, context):
        return jvpreg.rules.Affine(lambda a: a / 2, x, bias=keras.Variable(np.ones(2)))

    x = keras.Input((3,))
    with pytest.raises(
        TypeError, match=r"rule of `add` \(Add\) returned an Affine, which is of one.* Received: 2 inputs"
    ):
        jvpreg.linearize(keras.Model(x, Add(name="add")([x, x])), normal(2, 3))
    with pytest.raises(ValueError, match=r"`bias` of `Affine`, of the rule of `halve`. Expected .* to \(2, 3\)"):
        jvpreg.linearize(keras.Model(x, Halve(name="halve")(x)), normal(2, 3))


def test_a_function_has_a_rule_by_itself():
    assert registry.find_rule(activations.tanh) is not None
    assert registry.find_rule(ops.tanh) is None
    assert registry.find_rule(activations.get("silu")) is registry.find_rule(activations.silu)


def test_the_rule_of_an_activation_of_ones_own(float64):
    def cube(x):
        return x**3

    @registry.register_elementwise(cube)
    def slope(x, y):
        return 3 * x**2

    model = keras.Sequential([keras.Input((4,)), layers.Dense(3, activation=cube)])
    jvpreg.testing.check_rule(model, (4,))


def test_a_kernel_of_ones_own_for_one_tangent(float64):
    seen = []

    def logistic(x):
        return ops.sigmoid(x)

    def kernel(tangent, y):
        seen.append(tuple(tangent.shape))
        return tangent * y * (1 - y)

    @registry.register_elementwise(logistic, kernel=lambda: kernel)
    def slope(x, y):
        return y * (1 - y)

    model = keras.Sequential([keras.Input((4,)), layers.Dense(3, activation=logistic)])
    jvpreg.testing.check_rule(model, (4,))
    assert {shape[0] for shape in seen} == {1}


def test_a_wrapper_is_looked_through():
    class Wrapper(layers.Layer):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def call(self, x):
            return self.inner(x)

    registry.register_wrapper(Wrapper, lambda wrapper: wrapper.inner)
    try:
        relu = layers.ReLU()
        assert registry.unwrap(Wrapper(Wrapper(relu))) is relu
        x = normal(2, 3).astype("float32")
        model = keras.Sequential([keras.Input((3,)), Wrapper(relu)])
        np.testing.assert_array_equal(numpy(jvpreg.linearize(model, x).jvp(x)), np.maximum(x, 0))
    finally:
        del registry._WRAPPERS[Wrapper]


def test_linear_sees_all_probes_as_one_batch():
    seen = []

    def double(tangent):
        seen.append(tuple(tangent.shape))
        return 2.0 * tangent

    tangent = normal(2, 3, 4)
    assert_close(jvpreg.rules.linear(double)(ops.convert_to_tensor(tangent)), 2 * tangent)
    assert seen == [(6, 4)]


def test_each_input_sums_what_has_a_tangent():
    push = jvpreg.rules.each_input(lambda t, x: t * x, None, lambda t, x: -t)
    x, tangent = ops.convert_to_tensor(normal(1, 4)), ops.convert_to_tensor(normal(2, 4, seed=1))
    assert_close(push(tangent, None, None, x), numpy(tangent) * numpy(x))
    assert_close(push(None, None, tangent, x), -numpy(tangent))
    assert_close(push(tangent, None, tangent, x), numpy(tangent) * (numpy(x) - 1))


def test_gate_drops_what_is_not_finite():
    """A select, not a product: 0 × inf would be NaN."""
    mask = ops.convert_to_tensor([[True, False]])
    tangent = ops.convert_to_tensor([[[2.0, np.inf]]])
    np.testing.assert_array_equal(numpy(jvpreg.rules.gate(mask)(tangent)), [[[2.0, 0.0]]])


def test_residuals_broadcast_over_probes_and_are_taken():
    slope = normal(4, 3)
    tangents = normal(2, 4, 3, seed=1)
    pushforward = jvpreg.rules.scale(ops.convert_to_tensor(slope))
    assert_close(pushforward(ops.convert_to_tensor(tangents)), tangents * slope)
    part = pushforward.map_residuals(lambda residual, axis: ops.take(residual, [2, 0], axis=axis))
    assert_close(part(ops.convert_to_tensor(tangents[:, [2, 0]])), (tangents * slope)[:, [2, 0]])
    with pytest.raises(
        ValueError, match=r'`examples`. Expected "apart", "coupled" or "moved".* Received: examples=.mixed'
    ):
        jvpreg.rules.Pushforward(lambda tangent: tangent, examples="mixed")
    with pytest.raises(ValueError, match=r"`masks`. Expected a function or None for each of 1 residuals"):
        jvpreg.rules.Gate(lambda tangent, mask: tangent, normal(2, 3) > 0, masks=[])
    with pytest.raises(ValueError, match=r"`masks`. Expected a function or None.*residuals, which are not all boolean"):
        jvpreg.rules.Gate(lambda tangent, slope: tangent * slope, ops.ones((2, 3)))
    with pytest.raises(ValueError, match=r"`batch_axes`. Expected an axis for each of 1 residuals"):
        jvpreg.rules.Pushforward(lambda tangent, slope: tangent, ops.ones((2, 3)), batch_axes=[0, 1])
    with pytest.raises(ValueError, match=r"`frozen`. Expected tensors with 2 axes, as the slope has"):
        jvpreg.rules.scale(ops.ones((2, 3)), ops.ones(2))
    coupled = jvpreg.rules.Pushforward(lambda tangent: tangent, examples="coupled")
    assert coupled.map_residuals(lambda residual, axis: residual).examples == "coupled"
