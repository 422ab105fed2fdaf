"""Every rule, in float64, against autodiff and finite differences: see `jvpreg.testing.check_rule`."""

import math

import keras
import numpy as np
import pytest
from cases import LAYERS, Case
from keras import activations, layers, ops

import jvpreg
from jvpreg.registry import _RULES, registered_operations

# Activations with a test of their own below.
TESTED_APART = {activations.threshold, activations.gelu, activations.hard_sigmoid}


def test_every_rule_has_a_row():
    covered = {case.operation for case in LAYERS} | TESTED_APART
    # Other tests, and doctests, register rules of their own.
    ours = [op for op in registered_operations() if _RULES[op].function.__module__.startswith("jvpreg.rules.")]
    missing = [operation for operation in ours if operation not in covered]
    assert len(ours) > 90
    assert LAYERS
    assert not missing


def test_every_keras_activation_has_a_rule():
    named = {keras.activations.get(function.__name__) for function in activations_of_keras()}
    missing = [function.__name__ for function in named if jvpreg.registry.find_rule(function) is None]
    assert len(named) > 25
    assert not missing


def activations_of_keras():
    return [
        function
        for name, function in vars(keras.activations).items()
        if callable(function) and name not in ("get", "serialize", "deserialize")
    ]


def _skip_if_unavailable(case: Case):
    if case.channels_first and keras.backend.backend() == "tensorflow":
        pytest.skip("TensorFlow has no channels-first kernels on CPU")
    if case.float32_on_tensorflow and keras.backend.backend() == "tensorflow":
        pytest.skip("TensorFlow has no float64 kernel: see test_pooling_of_volumes_in_float32")


@pytest.mark.parametrize("case", LAYERS, ids=lambda case: case.id)
def test_rule(case):
    _skip_if_unavailable(case)
    jvpreg.testing.check_rule(case.make(), case.input_shape, **case.arguments)


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="see test_rule_compiled_by_torch")
@pytest.mark.parametrize("case", LAYERS, ids=lambda case: case.id)
def test_rule_compiled(case):
    _skip_if_unavailable(case)
    if case.random and keras.backend.backend() == "tensorflow":
        pytest.skip("under XLA, TensorFlow draws other numbers from the same seed")
    jvpreg.testing.check_rule(case.make(), case.input_shape, jit=True, **case.arguments)


def test_threshold_activation():
    """`threshold` has no default arguments: its rule is called as a rule of one's own would call it."""

    class Threshold(layers.Layer):
        def call(self, x):
            return activations.threshold(x, 0.3, -1.0)

    @jvpreg.register_rule(Threshold)
    def rule(layer, x, context):
        return jvpreg.registry.find_rule(activations.threshold).function(
            activations.threshold, x, 0.3, -1.0, context=context
        )

    jvpreg.testing.check_rule(Threshold(), (20,))


def test_frozen_batch_statistics_are_constant_to_the_tangent_but_not_to_the_weights():
    """The Jacobian is that with constant statistics; the penalty's gradient is checked by differences all the same."""

    def reference(x):
        mean, variance = ops.stop_gradient(MEAN), ops.stop_gradient(VARIANCE)
        return ops.batch_normalization(x, mean, variance, axis=-1, epsilon=layer.epsilon)

    layer = layers.BatchNormalization(center=False, scale=False, dtype="float64")
    x = np.random.default_rng(0).normal(size=(6, 4, 3))
    MEAN = ops.convert_to_tensor(x.mean((0, 1)))
    VARIANCE = ops.convert_to_tensor(x.var((0, 1)))
    jvpreg.testing.check_rule(
        layer, (4, 3), training=True, batch_statistics="frozen", batch_size=6, reference=reference
    )


def test_max_pooling_tie_goes_to_the_first_entry():
    layer = layers.MaxPooling2D(2)
    tangent = ops.reshape(ops.arange(4.0), (1, 2, 2, 1)) + 1
    assert float(jvpreg.linearize(layer, ops.zeros((1, 2, 2, 1))).jvp(tangent)[0, 0, 0, 0]) == 1.0


def test_relu_has_no_slope_at_zero():
    lin = jvpreg.linearize(layers.ReLU(), ops.zeros((1, 3)))
    assert float(ops.max(ops.abs(lin.jvp(ops.ones((1, 3)))))) == 0.0


def _exact_gelu(x):
    return 0.5 * x * (1 + ops.erf(x / math.sqrt(2)))


def _exact_tanh_gelu(x):
    return 0.5 * x * (1 + ops.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _exact_hard_sigmoid(x):
    return ops.clip(x / 6 + 0.5, 0.0, 1.0)


@pytest.mark.parametrize(
    ("function", "arguments", "exact"),
    [
        (activations.gelu, {}, _exact_gelu),
        (activations.gelu, {"approximate": True}, _exact_tanh_gelu),
        (activations.hard_sigmoid, {}, _exact_hard_sigmoid),
    ],
)
def test_activations_whose_constants_a_backend_rounds(function, arguments, exact):
    """Autodiff itself is off by up to 3e-8 where TensorFlow or Torch hold a constant in float32: written out here."""

    class Layer(layers.Layer):
        def call(self, x):
            return function(x, **arguments)

    @jvpreg.register_rule(Layer)
    def rule(layer, x, context):
        return jvpreg.registry.find_rule(function).function(function, x, context=context, **arguments)

    jvpreg.testing.check_rule(Layer(), (20,), reference=exact)


@pytest.mark.parametrize("pooling", ["max", "average"])
def test_pooling_of_volumes_in_float32(pooling):
    """Small integers, so that float32 is exact: against windows written out in NumPy."""
    layer = (layers.MaxPooling3D if pooling == "max" else layers.AveragePooling3D)(2)
    random = np.random.default_rng(0)
    x = random.permutation(4 * 4 * 4 * 4 * 2).reshape(2, 4, 4, 4, 4).astype("float32")
    u = random.integers(-8, 8, size=(3, *x.shape)).astype("float32")

    def windows(volume):
        split = volume.reshape(*volume.shape[:-4], 2, 2, 2, 2, 2, 2, 4)
        order = [*range(split.ndim - 7), *[split.ndim + axis for axis in (-7, -5, -3, -1, -6, -4, -2)]]
        return split.transpose(order).reshape(*split.shape[:-7], 2, 2, 2, 4, 8)

    lin = jvpreg.linearize(layer, x)
    if pooling == "average":
        expected = windows(u).mean(-1)
    else:
        winner = np.broadcast_to(windows(x).argmax(-1)[None, ..., None], (3, 2, 2, 2, 2, 4, 1))
        expected = np.take_along_axis(windows(u), winner, -1)[..., 0]
        np.testing.assert_array_equal(ops.convert_to_numpy(lin.outputs), windows(x).max(-1))
    np.testing.assert_array_equal(ops.convert_to_numpy(lin.jvp(u)), expected)
