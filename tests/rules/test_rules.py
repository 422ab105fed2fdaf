"""Every rule, in float64, against autodiff and finite differences: see `jvpreg.testing.check_rule`."""

import inspect
import math

import keras
import numpy as np
import operation_rows
import pytest
from cases import LAYERS, MEANINGLESS, first_rows, skip_if_unavailable
from compare import assert_close, attention_written_out, normal, numpy
from keras import activations, layers, ops

import jvpreg
from jvpreg.rules.registry import _RULES, registered_operations

# Activations with a test of their own below.
TESTED_APART = {
    activations.threshold,
    activations.gelu,
    activations.hard_sigmoid,
    layers.ContrastLimitedAdaptiveHistogramEqualization,
    layers.Embedding,
    layers.GroupQueryAttention,
    layers.MultiHeadAttention,
    layers.ReversibleEmbedding,
    layers.Resizing,
}
OPERATIONS_TESTED_APART = {
    "Gelu",
    "HardSigmoid",
    "Heaviside",
    "DotProductAttention",
    "Resize",
    "Eig",
    "SegmentMax",
    "SegmentMin",
    "SeparableConv",
} | operation_rows.APART
CONTROL_FLOW = {"Scan", "Map", "WhileLoop", "Switch"}  # see engine/test_control_flow.py


def test_every_rule_has_a_row():
    covered = {case.operation for case in LAYERS} | TESTED_APART
    # Other tests register rules of their own, and so does the doctest of the registry.
    ours = [op for op in registered_operations() if _RULES[op].function.__module__.startswith("jvpreg.rules.")]
    ours = [op for op in ours if op.__module__ != "jvpreg.rules.registry"]
    # Without a tangent there is nothing to check: see test_operations_without_a_tangent.
    ours = [op for op in ours if _RULES[op].function is not jvpreg.rules.ops.without_tangent.constant]
    missing = [op for op in ours if op not in covered and op.__name__ not in OPERATIONS_TESTED_APART | CONTROL_FLOW]
    assert len(ours) > 200
    assert LAYERS
    assert not missing


def test_every_keras_activation_has_a_rule():
    named = {keras.activations.get(function.__name__) for function in activations_of_keras()}
    missing = [function.__name__ for function in named if jvpreg.rules.registry.find_rule(function) is None]
    assert len(named) > 25
    assert not missing


def activations_of_keras():
    return [
        function
        for name, function in vars(keras.activations).items()
        if callable(function) and name not in ("get", "serialize", "deserialize")
    ]


def test_every_layer_of_keras_is_covered_or_meaningless():
    classes = {value for value in vars(layers).values() if inspect.isclass(value) and issubclass(value, layers.Layer)}
    covered = {case.operation for case in LAYERS} | TESTED_APART
    assert len(classes) > 130
    assert not [layer.__name__ for layer in classes if layer not in covered and layer not in MEANINGLESS]
    assert not [layer.__name__ for layer in covered if layer in MEANINGLESS]


@pytest.mark.slow
@pytest.mark.skipif(keras.backend.backend() == "jax", reason="a minute of compilation: rules cast alike on all")
def test_rules_compute_in_the_precision_of_their_layers():
    """A rule's output is the layer's own in mixed precision, in value but for rounding, and in dtype."""
    checked = 0
    for case in first_rows():
        layer = case.make()
        if not layer.__module__.startswith("keras.src.layers") or case.channels_first:
            continue  # a model, or a layer of the tests
        if isinstance(layer, layers.STFTSpectrogram):
            continue  # TensorFlow has none in 16 bits
        layer = type(layer).from_config({**layer.get_config(), "dtype": "mixed_bfloat16"})
        shapes = [case.input_shape] if isinstance(case.input_shape, tuple) else case.input_shape
        inputs = [ops.convert_to_tensor(normal(3, *shape), "float32") for shape in shapes]
        inputs = inputs if len(inputs) > 1 else inputs[0]
        keywords = {"training": False} if "training" in inspect.signature(layer.call).parameters else {}
        expected = keras.tree.flatten(layer(inputs, **keywords))
        received = keras.tree.flatten(jvpreg.linearize(layer, inputs).outputs)
        assert [y.dtype for y in received] == [y.dtype for y in expected], case.id
        for a, b in zip(received, expected, strict=True):
            assert_close(ops.cast(a, "float32"), ops.cast(b, "float32"), 2e-2)
        checked += 1
    assert checked > 60


@pytest.mark.slow
@pytest.mark.skipif(keras.backend.backend() == "jax", reason="a minute of compilation: rules are found alike on all")
def test_no_row_is_left_to_autodiff(float64):
    """No case needs autodiff, and tangents reach every trainable weight."""
    for case in LAYERS:
        layer = case.make()
        if case.float32_on_tensorflow or case.channels_first:
            continue
        shapes = [case.input_shape] if isinstance(case.input_shape, tuple) else case.input_shape
        if not isinstance(layer, keras.Model):
            layer = type(layer).from_config({**layer.get_config(), "dtype": "float64"})
        inputs = [ops.convert_to_tensor(normal(3, *shape)) for shape in shapes]
        if not layer.built:
            layer(inputs if len(inputs) > 1 else inputs[0])
        lin = jvpreg.linearize(layer, inputs if len(inputs) > 1 else inputs[0], fallback="error")
        known = {id(variable) for variable in lin.weights}
        missing = [variable.path for variable in layer.trainable_variables if id(variable) not in known]
        assert not missing, f"{case.id}: no tangent reaches {missing}"


@pytest.mark.parametrize("case", LAYERS, ids=lambda case: case.id)
def test_rule(case):
    """On JAX only the first row of each rule is run op by op, since JAX compiles every operation by itself."""
    skip_if_unavailable(case)
    jit = keras.backend.backend() == "jax" and case.compiled and case not in first_rows()
    jvpreg.testing.check_rule(case.make(), case.input_shape, jit=jit, **case.arguments)


def test_threshold_activation():
    """`threshold` has no default arguments: its rule is called as a rule of one's own would call it."""

    class Threshold(layers.Layer):
        def call(self, x):
            return activations.threshold(x, 0.3, -1.0)

    @jvpreg.register_rule(Threshold)
    def rule(layer, x, context):
        return jvpreg.rules.registry.find_rule(activations.threshold).function(
            activations.threshold, x, 0.3, -1.0, context=context
        )

    jvpreg.testing.check_rule(Threshold(), (20,))


def test_frozen_batch_statistics_are_constant_to_the_tangent_but_not_to_the_weights():
    """The Jacobian is that of constant statistics; the gradient of the penalty is that of finite differences."""

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


def _attention_written_out(layer, query, value, causal=False):
    """Attention with a softmax in float64; Keras' own is in float32."""
    q, k, v = layer._query_dense(query), layer._key_dense(value), layer._value_dense(value)
    k, v = (ops.repeat(heads, q.shape[2] // heads.shape[2], axis=2) for heads in (k, v))
    logits = ops.einsum("btnh,bsnh->bnts", q, k) / math.sqrt(q.shape[-1])
    if causal:
        logits = logits + ops.convert_to_tensor(np.where(np.tri(q.shape[1], k.shape[1]) > 0, 0.0, -1e30))
    return layer._output_dense(ops.einsum("bnts,bsnh->btnh", ops.softmax(logits), v))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        (lambda: layers.MultiHeadAttention(2, 3), {}),
        (lambda: layers.MultiHeadAttention(2, 3), {"use_causal_mask": True}),
        (lambda: layers.MultiHeadAttention(2, 3, dropout=0.3), {}),
        (lambda: layers.GroupQueryAttention(3, 4, 2), {}),
    ],
    ids=["MultiHeadAttention", "MultiHeadAttention-causal", "MultiHeadAttention-dropout", "GroupQueryAttention"],
)
def test_attention(float64, make, arguments):
    layer = make()
    query, value = keras.Input((4, 5)), keras.Input((4, 5))
    model = keras.Model([query, value], layer(query, value, **arguments))

    def reference(query, value):
        return _attention_written_out(layer, query, value, causal=bool(arguments))

    jvpreg.testing.check_rule(model, [(4, 5), (4, 5)], reference=reference, tolerance=1e-7)


def test_attention_with_a_mask_is_exact_in_its_products(float64, monkeypatch):
    """Products against differences of the outputs, which Keras' softmax in float32 would round on JAX."""
    monkeypatch.setattr("keras.src.backend.nn.dot_product_attention", attention_written_out)
    layer = layers.MultiHeadAttention(2, 3)
    x, mask = keras.Input((4, 5)), keras.Input((4, 4), dtype="bool")
    model = keras.Model([x, mask], layer(x, x, attention_mask=mask))
    points, u = normal(3, 4, 5), normal(3, 4, 5, seed=1)
    kept = np.random.default_rng(0).random((3, 4, 4)) < 0.7
    kept[:, :, 0] = True

    def outputs(x):
        return numpy(jvpreg.linearize(model, [x, kept]).outputs)

    step = 1e-6
    slope = (outputs(points + step * u) - outputs(points - step * u)) / (2 * step)
    product = numpy(jvpreg.linearize(model, [points, kept]).jvp([u, None]))
    np.testing.assert_allclose(product, slope, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(outputs(points), numpy(model([points, kept])), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_of_float64_rounds_where_keras_does(scale):
    """On JAX the softmax, on TensorFlow the scale, and on Torch all of it, since no fixture keeps float64 there."""
    heads = keras.Input((3, 2, 7), dtype="float64")
    model = keras.Model(heads, ops.dot_product_attention(heads, ops.sin(heads), heads, scale=scale))
    x = normal(2, 3, 2, 7)
    outputs, expected = jvpreg.linearize(model, x).outputs, model(x)
    assert outputs.dtype == expected.dtype
    assert_close(outputs, expected, 1e-13)


@pytest.mark.parametrize("make", [lambda: layers.Embedding(7, 3), lambda: layers.ReversibleEmbedding(7, 3)])
def test_embedding_has_tangents_of_its_table_only(float64, make):
    layer = make()
    words = np.array([[1, 5, 1], [0, 6, 2]])
    layer(words)
    lin = jvpreg.linearize(layer, words, fallback="error")
    np.testing.assert_array_equal(numpy(lin.outputs), numpy(layer(words)))
    table = layer.trainable_variables[0]
    moved = normal(2, *table.shape)
    np.testing.assert_array_equal(numpy(lin.jvp(weights=[(table, moved)])), moved[:, words])
    with pytest.raises(ValueError, match="integers have no derivative"):
        lin.jvp(np.ones(words.shape))


def test_operations_without_a_tangent(float64):
    x = keras.Input((4,))
    one_hot = ops.one_hot(ops.argmax(x, axis=-1), 4, dtype="float64")
    y = ops.stop_gradient(x) * x + one_hot * x + ops.floor(x) + ops.cast(ops.round(x) > 0, "float64")
    model = keras.Model(x, y)
    point, u = normal(3, 4), normal(3, 4, seed=1)
    expected = (point + (point == point.max(-1, keepdims=True))) * u
    np.testing.assert_allclose(numpy(jvpreg.linearize(model, point).jvp(u)), expected, rtol=1e-12)


@pytest.mark.parametrize("interpolation", ["bilinear", "nearest"])
def test_resizing_in_float32(interpolation):
    """Resizing is linear, so its product is the layer of the tangent. TensorFlow has it in float32 only."""
    layer = layers.Resizing(3, 5, interpolation=interpolation)
    x, u = (normal(2, 6, 7, 3, seed=seed).astype("float32") for seed in (0, 1))
    layer(x)
    lin = jvpreg.linearize(layer, x, fallback="error")
    for received, expected in ((lin.outputs, layer(x)), (lin.jvp(u), layer(u))):
        np.testing.assert_allclose(numpy(received), numpy(expected), rtol=1e-5, atol=1e-6)


def test_max_pooling_tie_goes_to_the_first_entry():
    layer = layers.MaxPooling2D(2)
    tangent = ops.reshape(ops.arange(4.0), (1, 2, 2, 1)) + 1
    assert float(jvpreg.linearize(layer, ops.zeros((1, 2, 2, 1))).jvp(tangent)[0, 0, 0, 0]) == 1.0


def test_relu_has_no_slope_at_zero():
    lin = jvpreg.linearize(layers.ReLU(), ops.zeros((1, 3)))
    assert float(ops.max(ops.abs(lin.jvp(ops.ones((1, 3)))))) == 0.0


def _exact_gelu(x):
    # TensorFlow rounds the root to float32, and its rule takes the same root.
    root = float(np.float32(math.sqrt(1 / 2))) if keras.backend.backend() == "tensorflow" else math.sqrt(1 / 2)
    return 0.5 * x * (1 + ops.erf(x * root))


def _exact_tanh_gelu(x):
    cubic = float(np.float32(0.044715)) if keras.backend.backend() == "tensorflow" else 0.044715
    return 0.5 * x * (1 + ops.tanh(math.sqrt(2 / math.pi) * (x + cubic * x**3)))


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
    """Against formulas: TensorFlow and Torch hold some constants in float32, so autodiff is off by up to 3e-8."""

    class Layer(layers.Layer):
        def call(self, x):
            return function(x, **arguments)

    @jvpreg.register_rule(Layer)
    def rule(layer, x, context):
        return jvpreg.rules.registry.find_rule(function).function(function, x, context=context, **arguments)

    jvpreg.testing.check_rule(Layer(), (20,), reference=exact)


@pytest.mark.parametrize("pooling", ["max", "average"])
def test_pooling_of_volumes_in_float32(pooling):
    """Against windows written out in NumPy, on small integers, for which float32 is exact."""
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
