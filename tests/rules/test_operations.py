"""Every operation of `keras.ops` has a rule, is written out in others, or is in a table with a reason."""

import keras
import numpy as np
import operation_rows
import pytest
from cases import LAYERS
from compare import assert_close, normal, numpy
from keras import ops, tree

import jvpreg
from jvpreg.common import keras_private
from jvpreg.engine.opening import CONTROL_FLOW
from jvpreg.rules.families import each_input
from jvpreg.rules.ops.written_out import WRITTEN_OUT
from jvpreg.rules.registry import registered_operations

WITHOUT_A_RULE = {
    "CTCDecode": "a search, whose outputs are labels and their scores",
    "CTCLoss": "a recursion over labels: left to autodiff",
    "Histogram": "counts, whose bins are the data's own",
    "JVP": "a derivative itself",
    "LuFactor": "TensorFlow has no gradient of what would be frozen: left to autodiff",
    "Nanmedian": "a search among the numbers: left to autodiff",
    "Nanpercentile": "a search among the numbers: left to autodiff",
    "Nanquantile": "a search among the numbers: left to autodiff",
    "SSIM": "a comparison of pictures: left to autodiff",
    "SegmentReduction": "abstract",
    "Unique": "how many numbers there are depends on the data",
}


def operations_of_keras():
    modules = ("core", "image", "linalg", "math_ops", "nn", "numpy_ops")
    found = {value for module in modules for value in vars(getattr(keras_private, module)).values()}
    found = {value for value in found if isinstance(value, type)} - {keras.Operation}
    return [value for value in found if value.__module__.startswith("keras.src.ops.")]


def test_every_operation_has_a_rule_or_a_reason():
    known = {*registered_operations(), *WRITTEN_OUT, *CONTROL_FLOW}
    found = operations_of_keras()
    assert len(found) > 320
    left = {operation.__name__ for operation in found if operation not in known}
    assert left == set(WITHOUT_A_RULE)


def test_every_operation_that_is_written_out_has_a_row():
    covered = {case.operation for case in LAYERS}
    missing = [kind.__name__ for kind in WRITTEN_OUT if kind not in covered]
    assert len(WRITTEN_OUT) > 30
    assert not set(missing) - operation_rows.APART


def test_operations_on_whole_numbers_return_what_keras_does(monkeypatch):
    """Keras' own call runs in place of what is written out. On Torch all operations: there no rule fails on them."""
    torch, symbol = keras.backend.backend() == "torch", keras.Input
    monkeypatch.setattr(keras, "Input", lambda shape, **_: symbol(shape, dtype="int32"))
    ran = set()
    for case in LAYERS:
        if not case.id.startswith("ops-") or (not torch and case.operation not in WRITTEN_OUT):
            continue
        if keras.backend.backend() == "jax" and case.id.endswith("-of-probabilities"):
            continue  # With 64 bits enabled, Keras' own is float64 of probabilities in float32.
        shapes = case.input_shape if isinstance(case.input_shape, list) else [case.input_shape]
        x = [np.random.default_rng(0).integers(1, 5, size=(3, *shape)).astype("int32") for shape in shapes]
        try:
            model = case.make()
            expected = model(x)
        except Exception:  # Keras itself does not take whole numbers.
            continue
        outputs = jvpreg.linearize(model, x).outputs
        for y, known in zip(tree.flatten(outputs), tree.flatten(expected), strict=True):
            assert y.dtype == known.dtype, case.id
            np.testing.assert_allclose(numpy(y), numpy(known), rtol=1e-5, atol=1e-6, err_msg=case.id)
        ran.add(case.operation)
    assert len(ran) > (120 if torch else 15)


def whole_numbers(*shape, seed=0):
    return np.random.default_rng(seed).integers(-4, 5, size=shape).astype("float32")


@pytest.mark.parametrize("probes", [1, 3])
def test_sums_and_products_over_segments(probes):
    """Against NumPy, in whole numbers: on Torch Keras itself computes them in float32. Index -1 is left out."""
    x, u = whole_numbers(4, 2), whole_numbers(probes, 4, 2, seed=1)
    x[0, 0] = x[2, 0] = x[1, 1] = 0
    ids = np.array([0, 1, 0, -1], "int32")
    symbol = keras.Input(batch_shape=(4, 2))
    model = keras.Model(symbol, [reduce(symbol, ids, 3) for reduce in (ops.segment_sum, ops.segment_prod)])
    lin = jvpreg.linearize(model, x, fallback="error")
    sums, products = map(numpy, lin.jvp(u))
    expected = np.stack([u[:, 0] + u[:, 2], u[:, 1], 0 * u[:, 1]], axis=1)
    np.testing.assert_array_equal(sums, expected)
    expected[:, 0] = u[:, 0] * x[2] + x[0] * u[:, 2]
    np.testing.assert_array_equal(products, expected)
    assert lin.couples_examples


TRANSFORM = np.array([[1.0, 0.1, 0.2, 0.1, 0.9, 0.2, 0.0, 0.0]] * 2, "float32")
CORNERS = np.array([[[0, 0], [0, 5], [5, 0], [5, 5]]] * 2, "float32")
MOVED = np.array([[[0, 1], [0, 5], [4, 0], [5, 4]]] * 2, "float32")
TRANSFORMED = {
    "affine": lambda x: ops.image.affine_transform(x, ops.convert_to_tensor(TRANSFORM), fill_value=2.0),
    "perspective": lambda x: ops.image.perspective_transform(x, CORNERS, MOVED),
    "scaled": lambda x: ops.image.scale_and_translate(
        x, (2, 4, 4, 1), ops.convert_to_tensor([0.5, 0.5]), ops.convert_to_tensor([0.1, 0.2]), (1, 2), "linear"
    ),
}


@pytest.mark.parametrize("kind", TRANSFORMED)
def test_transformed_images(kind):
    """Linear in the image, apart from what fills it: the product is the difference of two outputs."""
    x, u = whole_numbers(2, 6, 6, 1), whole_numbers(2, 6, 6, 1, seed=1)
    symbol = keras.Input(batch_shape=x.shape)
    model = keras.Model(symbol, TRANSFORMED[kind](symbol))
    lin = jvpreg.linearize(model, x, fallback="error")
    call = TRANSFORMED[kind]
    expected = numpy(call(ops.convert_to_tensor(x + u))) - numpy(call(ops.convert_to_tensor(x)))
    assert np.abs(expected).max() > 1
    assert_close(numpy(lin.outputs), numpy(call(ops.convert_to_tensor(x))), 1e-5)
    assert_close(numpy(lin.jvp(u)), expected, 1e-5)
    assert_close(numpy(lin.jvp(np.stack([u, 2 * u]))), np.stack([expected, 2 * expected]), 1e-5)
    assert not lin.couples_examples


def test_a_transform_that_depends_on_the_input():
    """By autodiff of the transform; TensorFlow, which has no derivative by it, says so."""
    image, shift = keras.Input((5, 5, 1)), keras.Input((8,))
    model = keras.Model([image, shift], ops.image.affine_transform(image, shift))
    x, transform = normal(2, 5, 5, 1).astype("float32"), TRANSFORM + 0.013
    u = normal(2, 8, seed=1).astype("float32")
    lin = jvpreg.linearize(model, [x, transform], fallback="error")
    if keras.backend.backend() == "tensorflow":
        with pytest.raises(NotImplementedError, match="which TensorFlow does not have"):
            lin.jvp([None, u])
        return
    ahead, behind = (
        numpy(ops.image.affine_transform(ops.convert_to_tensor(x), ops.convert_to_tensor(transform + 1e-3 * s * u)))
        for s in (1, -1)
    )
    assert_close(numpy(lin.jvp([None, u])), (ahead - behind) / 2e-3, 5e-3)


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="there Keras draws another field whatever the seed is")
def test_an_elastic_transform_is_linear_for_a_seed():
    x, u = whole_numbers(1, 6, 6, 1), whole_numbers(1, 6, 6, 1, seed=1)
    symbol = keras.Input(batch_shape=x.shape)
    model = keras.Model(symbol, ops.image.elastic_transform(symbol, 2.0, 1.0, seed=3))
    expected = ops.image.elastic_transform(ops.convert_to_tensor(u), 2.0, 1.0, seed=3)
    assert_close(numpy(jvpreg.linearize(model, x, fallback="error").jvp(u)), numpy(expected), 1e-5)


def test_a_field_that_is_drawn_anew_cannot_be_frozen():
    symbol = keras.Input(batch_shape=(1, 6, 6, 1))
    model = keras.Model(symbol, ops.image.elastic_transform(symbol, 2.0, 1.0))
    with pytest.raises(NotImplementedError, match="draws another field at each call"):
        jvpreg.linearize(model, whole_numbers(1, 6, 6, 1))


def test_the_angle_of_a_complex_number():
    """In float32, in which Keras returns it."""
    radius, angle = keras.Input((3,)), keras.Input((3,))
    model = keras.Model([radius, angle], ops.angle(ops.polar(radius, angle)))
    x, u, v = (normal(2, 3, seed=seed).astype("float32") for seed in range(3))
    lin = jvpreg.linearize(model, [np.exp(x), 0.5 * x], fallback="error")
    assert_close(numpy(lin.jvp([u, v])), v, 1e-5)


def test_bits_have_no_derivative(float64):
    x, u = normal(2, 3), normal(2, 3, seed=1)
    symbol = keras.Input((3,))
    model = keras.Model(symbol, ops.view(symbol, "float64") + ops.cast(ops.view(symbol, "int64") * 0, "float64"))
    np.testing.assert_array_equal(numpy(jvpreg.linearize(model, x, fallback="error").jvp(u)), u)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("sizes", [(-1, 2), (3, -1), (-1,), (2, 3)])
def test_a_reshape_by_the_batch_can_be_cut(sizes):
    """A call that reads the batch off its input, and leaves another size open, as attention over patches does."""
    symbol = keras.Input(batch_shape=(4, 6))
    layer = keras.Model(symbol, ops.sin(ops.reshape(symbol, (4, *sizes))))
    x, u = normal(4, 6), normal(2, 4, 6, seed=1)
    lin = jvpreg.linearize(layer, x, fallback="error")
    np.testing.assert_allclose(numpy(lin.take([2, 1]).jvp(u[:, [2, 1]])), numpy(lin.jvp(u))[:, [2, 1]])
    np.testing.assert_allclose(numpy(lin.jvp(u)).reshape(u.shape), u * np.cos(x))


@pytest.mark.slow
@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="elsewhere the size of a batch is known")
def test_a_reshape_to_sizes_that_are_not_known():
    import tensorflow as tf

    class Patches(keras.layers.Layer):
        def call(self, x):
            return ops.reshape(x, (ops.shape(x)[0], -1, 2))

    layer, x, u = Patches(), normal(3, 4, 6).astype("float32"), normal(3, 4, 6, seed=1).astype("float32")
    layer(x)
    for shape in [(None, 4, 6), (None, None, 6)]:
        run = tf.function(lambda x: jvpreg.linearize(layer, x).jvp(u), input_signature=[tf.TensorSpec(shape)])
        np.testing.assert_array_equal(run(x), u.reshape(3, 12, 2))


@pytest.mark.slow
@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="elsewhere the size of a batch is known")
def test_a_size_of_the_batch_that_is_not_known():
    """A token for each example, and a table of positions cut to the sequence, in a graph of TensorFlow."""
    import tensorflow as tf

    class Positions(keras.layers.Layer):
        def build(self, shape):
            self.table = self.add_weight(shape=(5, 3))

        def call(self, x):
            batch, steps, width = ops.shape(x)
            token = ops.repeat(self.table[None, :1], batch, axis=0)
            return ops.concatenate([token, x + ops.slice(self.table, (0, 0), (steps, width))], axis=1)

    layer, x = Positions(), normal(2, 4, 3).astype("float32")
    layer(x)
    u = normal(5, 3, seed=1).astype("float32")

    def product(x):
        lin = jvpreg.linearize(layer, x, fallback="error")
        return lin.jvp(weights=[(layer.table, u)])

    run = tf.function(product, input_signature=[tf.TensorSpec((None, 4, 3))])
    expected = np.concatenate([u[None, :1], u[None, :4]], axis=1)
    np.testing.assert_array_equal(numpy(run(x)), np.repeat(expected, 2, axis=0))


@pytest.mark.usefixtures("float64")
def test_sums_of_tangents_of_two_precisions():
    """As where a number of NumPy makes float64 of float32; complex128 stays so, which `ops.add` would round."""
    wide = each_input(lambda t: t, lambda t: ops.cast(t, "float64"))(
        *map(ops.convert_to_tensor, [np.ones(2, "f4")] * 2)
    )
    assert numpy(wide).tolist() == [2, 2]
    number = ops.cast(ops.convert_to_tensor(np.array([1 / 3])), "complex128")
    assert numpy(each_input(lambda t: t, lambda t: t)(number, number)).tolist() == [2 * (1 / 3)]
