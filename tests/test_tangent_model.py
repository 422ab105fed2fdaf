"""`TangentModel`: the product of `jvpreg.jvp` as a model, saved, and exported to where there is no autodiff."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import jvpreg
from tests.compare import assert_close, normal, numpy, randomize, without_rounded_attention

BACKEND = keras.backend.backend()


def convolutional():
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(4, 3, padding="same", use_bias=False),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.MaxPooling2D(),
            layers.Conv2D(5, 3, activation="tanh"),
            layers.Dropout(0.5),
            layers.Flatten(),
            layers.Dense(3),
        ]
    )


def recurrent():
    return keras.Sequential(
        [keras.Input((4, 3)), layers.LSTM(5, return_sequences=True), layers.GRU(4), layers.Dense(2)]
    )


def attentive():
    x = keras.Input((4, 6))
    y = layers.LayerNormalization()(x + layers.MultiHeadAttention(2, 3)(x, x))
    return keras.Model(x, layers.Dense(3, activation="relu")(layers.Flatten()(y)))


def globally_pooled():
    return keras.Sequential([keras.Input((6, 6, 2)), layers.Conv2D(3, 3), layers.GlobalMaxPooling2D(), layers.Dense(2)])


def two_inputs(as_dict=False):
    a, b = keras.Input((3,), name="a"), keras.Input((2,), name="b")
    y = layers.Dense(4, activation="tanh")(layers.Concatenate()([a, b]))
    return keras.Model({"a": a, "b": b} if as_dict else [a, b], [layers.Dense(2)(y), layers.Multiply()([y, y])])


@keras.saving.register_keras_serializable(package="test_tangent_model")
class Subclassed(keras.Model):
    """A model without a graph."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.hidden, self.last = layers.Dense(5, activation="tanh"), layers.Dense(2)

    def call(self, x):
        return self.last(self.hidden(x)) + ops.sum(x, axis=-1, keepdims=True)


MODELS = [convolutional, recurrent, attentive]


def words_and_numbers(structure=lambda words, numbers: {"words": words, "numbers": numbers}):
    words, numbers = keras.Input((6,), dtype="int32", name="words"), keras.Input((3,), name="numbers")
    known = layers.GlobalAveragePooling1D()(layers.Embedding(9, 4, mask_zero=True)(words))
    y = layers.Dense(5, activation="tanh")(layers.Concatenate()([known, numbers]))
    return keras.Model(structure(words, numbers), layers.Dense(2)(y))


@keras.saving.register_keras_serializable(package="test_tangent_model")
class SubclassedOfWords(keras.Model):
    """A model without a graph, of a dict with whole numbers in it."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.words, self.hidden, self.last = layers.Embedding(9, 4), layers.Dense(5, "tanh"), layers.Dense(2)

    def call(self, x):
        return self.last(self.hidden(ops.concatenate([ops.mean(self.words(x["words"]), axis=1), x["numbers"]], -1)))


def tangent_and_data(make, batch=6):
    base = randomize(make())
    x, u = (normal(batch, *base.input_shape[1:], seed=seed).astype("float32") for seed in (0, 1))
    return jvpreg.TangentModel(base), x, u


def assert_same_product(received, model, x, u):
    assert_close(received, jvpreg.jvp(model, x, u), tolerance=1e-5)


# ---------------------------------------------------------------- as a Keras model


@pytest.mark.parametrize("make", MODELS)
def test_it_returns_the_outputs_and_the_product(make):
    tangent, x, u = tangent_and_data(make)
    y, product = tangent([x, u])
    assert_same_product([y, product], tangent.base, x, u)
    assert_close(y, tangent.base(x), tolerance=1e-5)


def test_it_runs_in_inference_whatever_training_says():
    tangent, x, u = tangent_and_data(convolutional)
    before = tangent.get_weights()
    assert_same_product(tangent([x, u], training=True), tangent.base, x, u)
    assert_close(tangent.get_weights(), before, tolerance=0)


@pytest.mark.parametrize("make", MODELS)
def test_predict_joins_batches(make):
    tangent, x, u = tangent_and_data(make)
    assert_same_product(tangent.predict([x, u], batch_size=4, verbose=0), tangent.base, x, u)


@pytest.mark.parametrize("as_dict", [False, True])
def test_several_inputs_and_outputs_keep_their_structure(as_dict):
    base = randomize(two_inputs(as_dict))
    x, u = ([normal(5, size, seed=seed).astype("float32") for size in (3, 2)] for seed in (0, 1))
    if as_dict:
        x, u = dict(zip("ab", x, strict=True)), dict(zip("ab", u, strict=True))
    tangent = jvpreg.TangentModel(base)
    for received in (tangent([x, u]), tangent.predict([x, u], batch_size=2, verbose=0)):
        (y, squares), (product, squares_product) = received
        assert_same_product([(y, squares), (product, squares_product)], base, x, u)


def test_it_is_a_layer_of_a_functional_model():
    tangent, x, u = tangent_and_data(convolutional)
    inputs = [keras.Input((8, 8, 3)), keras.Input((8, 8, 3))]
    y, product = tangent(inputs)
    assert y.shape == product.shape == (None, 3)
    model = keras.Model(inputs, layers.Concatenate()([y, product]))
    expected = np.concatenate([numpy(part) for part in jvpreg.jvp(tangent.base, x, u)], axis=1)
    assert_close(model.predict([x, u], batch_size=4, verbose=0), expected, tolerance=1e-5)


def test_symbols_have_the_dtypes_of_tensors_in_mixed_precision():
    base = keras.Sequential([keras.Input((3,)), layers.Dense(2, dtype="mixed_bfloat16")])
    tangent = jvpreg.TangentModel(base)
    symbols = tangent([keras.Input((3,)), keras.Input((3,))])
    tensors = tangent([np.ones((4, 3)), np.ones((4, 3))])
    assert [s.dtype for s in symbols] == [keras.backend.standardize_dtype(t.dtype) for t in tensors]
    assert symbols[1].dtype == "float32"


def test_bytes_have_tangents_in_floats():
    base = keras.Sequential([keras.Input((3,), dtype="uint8"), layers.Rescaling(1 / 255), layers.Dense(2)])
    x, u = np.arange(12, dtype="uint8").reshape(4, 3), normal(4, 3).astype("float32")
    assert_same_product(jvpreg.TangentModel(base).predict([x, u], verbose=0), base, x, u)


def test_of_a_jacobian_model_it_takes_the_plain_one():
    base = recurrent()
    assert jvpreg.TangentModel(jvpreg.JacobianModel(base)).base is base


def test_a_subclassed_model():
    base = Subclassed()
    x, u = (normal(4, 3, seed=seed).astype("float32") for seed in (0, 1))
    base(x)
    tangent = jvpreg.TangentModel(base)
    assert_same_product(tangent.predict([x, u], verbose=0), base, x, u)
    y, product = tangent([keras.Input((3,)), keras.Input((3,))])
    assert y.shape == product.shape == (None, 2)


@pytest.mark.parametrize("make", [*MODELS, two_inputs])
def test_saved_and_loaded_it_is_the_same(make, tmp_path):
    tangent = jvpreg.TangentModel(randomize(make()), name="tangent")
    shapes = [(5, *tensor.shape[1:]) for tensor in tangent.base.inputs]
    x, u = ([normal(*shape, seed=seed).astype("float32") for shape in shapes] for seed in (0, 1))
    if len(shapes) == 1:
        x, u = x[0], u[0]
    tangent.save(tmp_path / "tangent.keras")
    loaded = keras.models.load_model(tmp_path / "tangent.keras")
    assert isinstance(loaded, jvpreg.TangentModel)
    assert loaded.name == "tangent"
    assert_close(loaded([x, u]), tangent([x, u]), tolerance=1e-6)


WORDS, NUMBERS, U = np.array([[1, 2, 8, 0, 0, 0], [3] * 6], "int32"), normal(2, 3, seed=1), normal(2, 3, seed=2)
OF_WORDS = {
    "functional": (words_and_numbers, {"words": WORDS, "numbers": NUMBERS}, {"numbers": U}),
    "of a list": (lambda: words_and_numbers(lambda *inputs: list(inputs)), [WORDS, NUMBERS], [U]),
    "subclassed": (SubclassedOfWords, {"words": WORDS, "numbers": NUMBERS}, {"numbers": U}),
}


@pytest.mark.parametrize("kind", OF_WORDS)
def test_whole_numbers_have_no_tangent(kind, tmp_path):
    """Against the linearization, which is told of them by None; the same after `predict`, saving and loading."""
    make, x, u = OF_WORDS[kind]
    base = make()
    base(x)
    tangent = jvpreg.TangentModel(randomize(base))
    full = {"words": None, "numbers": U} if isinstance(x, dict) else [None, U]
    lin = jvpreg.linearize(base, x)
    expected = lin.outputs, lin.jvp(full)
    assert np.abs(numpy(expected[1])).max() > 1e-2
    assert_close(tangent([x, u]), expected, tolerance=1e-5)
    assert_close(tangent([x, full]), expected, tolerance=1e-5)
    # A tangent that is given for them all the same counts for nothing.
    given = {"words": WORDS, "numbers": U} if isinstance(x, dict) else [WORDS, U]
    assert_close(tangent([x, given]), expected, tolerance=1e-5)
    assert_close(tangent.predict([x, u], batch_size=1, verbose=0), expected, tolerance=1e-5)
    tangent.save(tmp_path / "tangent.keras")
    assert_close(keras.models.load_model(tmp_path / "tangent.keras")([x, u]), expected, tolerance=1e-5)


@pytest.mark.parametrize("make", [convolutional, attentive, two_inputs])
def test_a_second_application_is_a_second_derivative(make, float64, monkeypatch):
    """Against differences of the first product in float64."""
    without_rounded_attention(monkeypatch)
    base = randomize(make())
    first = jvpreg.TangentModel(base)
    second = jvpreg.TangentModel(first)

    def drawn(seed):
        parts = [normal(2, *tensor.shape[1:], seed=seed + i) for i, tensor in enumerate(base.inputs)]
        return parts if len(parts) > 1 else parts[0]

    x, u, dx, du = (drawn(10 * seed) for seed in range(4))
    outputs, products = second([[x, u], [dx, du]])
    assert_close(outputs, first([x, u]))
    step = 1e-5
    ahead, behind = (
        first(keras.tree.map_structure(lambda a, d, s=sign: a + s * step * d, [x, u], [dx, du])) for sign in (1, -1)
    )
    pairs = zip(*(keras.tree.flatten(side) for side in (ahead, behind)), strict=True)
    assert_close(products, [(numpy(a) - numpy(b)) / (2 * step) for a, b in pairs], tolerance=1e-7)


def test_a_second_application_is_saved_and_loaded(tmp_path):
    second = jvpreg.TangentModel(jvpreg.TangentModel(randomize(attentive())))
    vectors = [normal(2, 4, 6, seed=seed).astype("float32") for seed in range(4)]
    second.save(tmp_path / "second.keras")
    loaded = keras.models.load_model(tmp_path / "second.keras")
    assert_close(loaded([vectors[:2], vectors[2:]]), second([vectors[:2], vectors[2:]]), tolerance=1e-6)
    (signature,) = second._input_signature()
    assert [spec.name for spec in keras.tree.flatten(signature)] == ["x_x", "x_u", "u_x", "u_u"]


# ---------------------------------------------------------------- bad input


def test_whole_numbers_alone_are_an_error():
    base = keras.Sequential([keras.Input((6,), dtype="int32"), layers.Embedding(9, 4), layers.Flatten()])
    with pytest.raises(ValueError, match=r"argument `base`. Expected real numbers .* integers have no derivative"):
        jvpreg.TangentModel(base)
    base = SubclassedOfWords()
    base({"words": WORDS, "numbers": NUMBERS})
    x = {"words": WORDS, "numbers": WORDS[:, :3]}
    with pytest.raises(ValueError, match=r"argument `x`. Expected real numbers .* integers have no derivative"):
        jvpreg.TangentModel(base)([x, x])


@pytest.mark.parametrize(
    "make",
    [
        lambda: "model",
        lambda: layers.Dense(2),
        lambda: keras.Sequential([layers.Dense(2)]),
    ],
)
def test_a_base_that_is_no_built_model_is_an_error(make):
    base = make()
    with pytest.raises(ValueError, match=r"argument `base`. Expected a Keras model, built"):
        jvpreg.TangentModel(base)


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: [x], lambda x: [x, x, x], lambda x: {"x": x, "u": x}])
def test_inputs_that_are_no_pair_are_an_error(wrap):
    tangent, x, _ = tangent_and_data(recurrent)
    for data in (x, keras.Input((4, 3))):
        with pytest.raises(ValueError, match=r"argument `inputs`. Expected a pair \[x, u\]"):
            tangent(wrap(data))


@pytest.mark.parametrize("shape", [(6, 4, 2), (5, 4, 3), (6, 4), (2, 6, 4, 3)])
def test_a_tangent_unlike_the_input_is_an_error(shape):
    tangent, x, _ = tangent_and_data(recurrent)
    with pytest.raises(ValueError, match=r"argument `u`. Expected shape \(6, 4, 3\), like x"):
        tangent([x, np.ones(shape)])


def test_an_input_unlike_the_model_is_an_error():
    tangent, x, u = tangent_and_data(recurrent)
    with pytest.raises(ValueError, match=r"argument `x`. Expected shape"):
        tangent([x[..., :2], u[..., :2]])
    with pytest.raises(ValueError, match=r"argument `x`. Expected 1 tensor\(s\)"):
        tangent([[x, x], u])


def test_an_operation_that_would_need_autodiff_is_an_error():
    class Closed(layers.Layer):
        def call(self, x):
            assert not isinstance(x, keras.KerasTensor)
            return 2 * x

    base = keras.Sequential([keras.Input((3,)), Closed(name="closed"), layers.Dense(2)])
    with pytest.raises(NotImplementedError, match="`closed`"):
        jvpreg.TangentModel(base)([np.ones((4, 3)), np.ones((4, 3))])


# ---------------------------------------------------------------- exported


@pytest.mark.slow
@pytest.mark.skipif(BACKEND == "torch", reason="Keras exports a SavedModel from Torch by torch_xla, of an older Torch")
@pytest.mark.parametrize("make", MODELS)
def test_saved_model_has_no_gradients(make, tmp_path):
    # Not every environment for JAX has TensorFlow.
    tf = pytest.importorskip("tensorflow")
    tangent, x, u = tangent_and_data(make)
    tangent.export(tmp_path / "saved", verbose=False)
    served = tf.saved_model.load(tmp_path / "saved")
    assert_same_product([part.numpy() for part in served.serve([x, u])], tangent.base, x, u)

    signature = served.signatures["serving_default"]
    assert sorted(signature.structured_input_signature[1]) == ["u", "x"]
    graph = signature.graph.as_graph_def()
    nodes = [*graph.node, *(node for function in graph.library.function for node in function.node_def)]
    assert len(nodes) > 10
    assert not [node.name for node in nodes if any(word in node.op for word in ("Grad", "Backprop"))]
    assert not [node.name for node in nodes if "gradient" in node.name.lower()]


@pytest.mark.slow
@pytest.mark.skipif(BACKEND != "tensorflow", reason="the converter is TensorFlow's")
@pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter is deprecated:UserWarning")
@pytest.mark.parametrize("make", [*MODELS, globally_pooled])
def test_litert_runs_on_its_own_operations(make, tmp_path):
    import tensorflow as tf

    tangent, x, u = tangent_and_data(make)
    signature = None
    if make is recurrent:
        # LiteRT has no lists of tensors of unknown size, so it cannot run a plain LSTM either: fix the sizes.
        signature = [[keras.InputSpec(shape=x.shape, dtype="float32", name=name) for name in ("x", "u")]]
    path = tmp_path / "tangent.tflite"
    tangent.export(
        path,
        format="litert",
        verbose=False,
        input_signature=signature,
        target_spec={"supported_ops": [tf.lite.OpsSet.TFLITE_BUILTINS]},
    )
    interpreter = tf.lite.Interpreter(str(path))
    received = interpreter.get_signature_runner()(x=x, u=u)
    assert_same_product([received["output_0"], received["output_1"]], tangent.base, x, u)


# On TensorFlow attention is left out: its export is right, but tf2onnx tries all orders of an einsum's indices, which
# takes half a minute.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Warnings of the converters.
@pytest.mark.parametrize("make", MODELS if BACKEND != "tensorflow" else [convolutional, recurrent])
def test_onnx(make, tmp_path):
    import onnxruntime

    tangent, x, u = tangent_and_data(make)
    path = tmp_path / "tangent.onnx"
    tangent.export(path, format="onnx", verbose=False)
    session = onnxruntime.InferenceSession(path)
    assert [node.name for node in session.get_inputs()] == ["x", "u"]
    assert_same_product(session.run(None, {"x": x, "u": u}), tangent.base, x, u)


@pytest.mark.skipif(BACKEND != "torch", reason="Torch's own format")
@pytest.mark.filterwarnings("ignore")  # Warnings of the exporter.
@pytest.mark.parametrize("make", MODELS)
def test_torch_program(make, tmp_path):
    import torch

    tangent, x, u = tangent_and_data(make)
    signature = [[keras.InputSpec(shape=x.shape, dtype="float32", name=name) for name in ("x", "u")]]
    tangent.export(tmp_path / "tangent.pt2", format="torch", verbose=False, input_signature=signature)
    program = torch.export.load(tmp_path / "tangent.pt2").module()
    assert_same_product(program([torch.tensor(x), torch.tensor(u)]), tangent.base, x, u)
