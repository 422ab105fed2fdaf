"""Layers whose `call` has keyword tensors, whole or complex numbers, or operations on weights alone."""

import keras
import numpy as np
import pytest
from calls import Call, check_call
from compare import assert_close, normal, numpy, without_rounded_attention
from keras import layers, ops

import jvpreg
from jvpreg.common.keras_private import recorded_calls
from jvpreg.engine.transpose import transpose

pytestmark = pytest.mark.filterwarnings("ignore:Some nodes of")


def complex_product(x, w):
    z = ops.cast(x, "complex64") * (1 + 2j)
    return ops.real(z * ops.conj(z) * 1j - 0.5j * z) + ops.imag(ops.exp(z))


COMPLEX = {
    "python numbers": complex_product,
    "a number before it": lambda x, w: ops.imag(1j * ops.cast(x, "complex64") + 2j),
    "absolute value": lambda x, w: ops.absolute(ops.cast(x, "complex64") + 1j * ops.cast(x * x, "complex64")),
    "back to a real number": lambda x, w: x * ops.real(ops.cast(x, "complex64") / (1 + 1j)),
}


@pytest.mark.parametrize("kind", COMPLEX)
def test_complex_numbers(kind):
    # In complex64: beside complex128, a Python number is complex64 for Keras and complex128 for a TensorFlow tensor.
    check_call(COMPLEX[kind], 0.5 * normal(2, 3), weight=False, dtype="float32")


def test_pairs_as_complex_numbers():
    layer = Call(lambda x, w: ops.view_as_real(ops.view_as_complex(ops.reshape(x, (-1, 3, 2))) * (1 + 2j)))
    x, u = normal(2, 6).astype("float32"), normal(2, 6, seed=1).astype("float32")
    expected = layer(ops.convert_to_tensor(u))  # The layer is linear, so its product is the layer of u.
    lin = jvpreg.linearize(layer, x)
    assert_close(lin.jvp(u), expected, 1e-5)
    assert_close(lin.outputs, layer(x), 1e-5)


# Operations with a result that has no tangent: predicates, indices, counts.
WITHOUT_TANGENT = {
    "equality": lambda x, w: ops.where(ops.floor(x) == 0, x, x * x) * ops.cast(ops.floor(x) == ops.floor(x), x.dtype),
    "isnan": lambda x, w: ops.where(ops.isnan(x), 0.0, x * x),
    "isinf": lambda x, w: ops.where(ops.isinf(x), x, x * x),
    "logical_xor": lambda x, w: ops.where(ops.logical_xor(x > 0.5, x < -0.5), x, x * x),
    "top_k": lambda x, w: ops.top_k(x, 2)[0],
    "rows of a weight by top_k": lambda x, w: ops.take(w, ops.top_k(x, 2)[1], axis=0) * ops.top_k(x, 2)[0][..., None],
    "a column by argsort": lambda x, w: ops.take_along_axis(x, ops.argsort(x, axis=1), axis=1) ** 2,
    "count_nonzero": lambda x, w: x * ops.cast(ops.count_nonzero(x > 0), "float64"),
    "floor_divide": lambda x, w: x * (x // 0.3),
    "searchsorted": lambda x, w: x * ops.cast(ops.searchsorted(ops.sort(w[0]), x[0]), "float64"),
    "a slice by a shape": lambda x, w: x[:, : ops.shape(x)[1] - 1] ** 2,
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", WITHOUT_TANGENT)
def test_what_is_no_real_number_has_no_tangent(kind):
    check_call(WITHOUT_TANGENT[kind], normal(2, 3), weight=False)


# Tensors as arguments that an operation keeps as attributes, and not as inputs. Backends differ in which they take.
TENSORS_AS_CONSTANTS = {
    "clip": lambda x, w: ops.clip(x, ops.mean(x, axis=1, keepdims=True), 1.0),
    "clip by a weight": lambda x, w: ops.clip(ops.matmul(x, w), w[0, 0], w[0, 0] + 1.0),
    "roll": lambda x, w: ops.roll(x, ops.cast(ops.argmax(x[0]), "int32"), axis=1) ** 2,
    "squareplus": lambda x, w: ops.squareplus(ops.matmul(x, w), w[0, 0] ** 2),
    "threshold of relu": lambda x, w: keras.activations.relu(ops.matmul(x, w), threshold=w[0, 0] ** 2),
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", TENSORS_AS_CONSTANTS)
def test_a_tensor_in_place_of_a_constant_is_left_to_autodiff(kind):
    lin = check_call(TENSORS_AS_CONSTANTS[kind], normal(2, 3), weight=kind in ("clip by a weight", "squareplus"))
    operation = "re_lu" if "relu" in kind else kind.split()[0]
    told = f"Call: its `call` gives `{operation}` a tensor in place of a constant"
    assert list(lin.fallbacks.values()) == [told]


SLICED = {
    "the first rows": lambda x, w: ops.matmul(x, w)[:2],
    "all of it": lambda x, w: ops.sin(ops.matmul(x, w)[...]),
    "a row of rows": lambda x, w: ops.matmul(x, w)[None] * 2.0,
    "up to another's size": lambda x, w: ops.matmul(x, w)[:, : ops.shape(w)[1] - 1],
    "its number of axes": lambda x, w: ops.matmul(x, w)[tuple([slice(0, 2)] * (ops.ndim(x) or 1))] * 2.0,
    "a constant times it": lambda x, w: (1 - ops.convert_to_tensor(np.eye(2, 3))) * ops.matmul(x, w),
    "an einsum in capitals": lambda x, w: ops.einsum("BD,DK->BK", x, w),
    "a block": lambda x, w: ops.slice(1.0 * w, (1, 0), (1, 3)) * x,
    "a block at an index": lambda x, w: ops.slice(1.0 * w, (ops.argmax(x[0]), 0), (1, ops.shape(x)[1])) * x,
}


def with_cache(x, w):
    """Attention step by step, with the keys of the steps before in a cache, as text is generated."""
    cache, outputs = ops.zeros((2, 3, 3), "float64"), []
    for i in range(3):
        cache = ops.slice_update(cache, (0, i, 0), ops.matmul(x[:, i : i + 1], w))
        scores = ops.softmax(ops.matmul(x[:, i : i + 1], ops.transpose(cache, (0, 2, 1))))
        outputs.append(ops.matmul(scores, cache))
    return ops.concatenate(outputs, axis=1)


@pytest.mark.usefixtures("float64")
def test_attention_with_a_cache():
    assert not check_call(with_cache, normal(2, 3, 3)).fallbacks


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", SLICED)
def test_what_keras_knows_of_tensors_only(kind):
    assert not check_call(SLICED[kind], normal(2, 3)).fallbacks


def rows(x):
    """A row for each example, made in the call."""
    return ops.reshape(ops.arange(ops.shape(x)[0] * 3, dtype="float64"), (ops.shape(x)[0], 3)) / 4


def attended_rows(x, w):
    query, key = ops.matmul(x, w)[:, None, None], rows(x)[:, :, None, None]
    return ops.dot_product_attention(query, key * ops.ones((3,), "float64"), ops.sin(key) * ops.ones((3,), "float64"))


ROWS = {
    "none": lambda x, w: ops.sin(ops.matmul(x, w)),
    "multiply": lambda x, w: ops.matmul(rows(x) * x, w),
    "of a weight": lambda x, w: ops.matmul(rows(x), w) * x,
    "matmul": lambda x, w: ops.matmul(ops.matmul(x, w)[:, None], rows(x)[:, :, None]),
    "einsum": lambda x, w: ops.einsum("bi,bi->b", ops.matmul(x, w), rows(x)),
    "columns": lambda x, w: ops.einsum("bi,ji->bj", ops.matmul(x, w), rows(x)),  # of the shape of such rows
    "indices": lambda x, w: ops.take_along_axis(ops.matmul(x, w), ops.cast(rows(x), "int32"), axis=1),
    "in a loop": lambda x, w: ops.fori_loop(0, 17, lambda i, z: ops.sin(z * rows(x)), ops.matmul(x, w)),
    "attention": attended_rows,
    "a vector within a map": lambda x, w: ops.vectorized_map(lambda row: ops.tanh(row) * w[0], ops.matmul(x, w)),
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", ROWS)
def test_rows_that_a_call_makes_are_cut_with_the_examples(kind, monkeypatch):
    without_rounded_attention(monkeypatch)
    lin, u = check_call(ROWS[kind], normal(3, 3)), normal(3, 3, seed=1)
    assert not lin.fallbacks
    moved = [(lin.weights[0], normal(3, 3, seed=2))]
    whole, of_weight = numpy(lin.jvp(u)), numpy(lin.jvp(weights=moved))
    twice = lin.take([2, 0, 1]).take([1, 0, 0])
    for part, kept in [(lin.take([1]), [1]), (lin.take([2, 0, 1]), [2, 0, 1]), (twice, [0, 2, 2])]:
        assert_close(part.jvp(u[kept]), whole[kept], 1e-12)
        assert_close(part.jvp(weights=moved), of_weight[kept], 1e-12)


PADDED = {
    "a mean": lambda x, w: ops.pad(x * x, [[0, 0], [1, 2]], constant_values=ops.mean(x)),
    "an infinite one": lambda x, w: ops.max(ops.pad(x, [[0, 0], [1, 2]], constant_values=ops.min(x) - INF), axis=1),
    "a fixed one": lambda x, w: ops.pad(x, [[0, 0], [1, 0]], constant_values=ops.convert_to_tensor(2.0, x.dtype)) ** 2,
    "of a weight": lambda x, w: ops.pad(ops.matmul(x, w), [[0, 0], [1, 2]], constant_values=ops.sum(w * w)),
}
INF = float("inf")


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", PADDED)
def test_padding_by_a_tensor(kind):
    if kind == "of a weight" and keras.backend.backend() == "torch":
        pytest.skip("Keras itself takes none there")
    lin = check_call(PADDED[kind], normal(2, 3), weight=kind == "of a weight")
    assert not lin.fallbacks


# Operations with a rule for some arguments only, and the reason why there is none for these.
DECLINED = {
    "normalize": (lambda x: ops.normalize(x, order=3, axis=-1), "a norm of another order than 2"),
    "absolute": (lambda x: ops.abs(ops.cast(x, "complex64")), "its input is complex"),
}


@pytest.mark.parametrize("kind", DECLINED)
def test_the_reason_of_a_rule_that_declines_is_told(kind):
    function, reason = DECLINED[kind]
    x = normal(2, 3).astype("float32")
    layer = Call(lambda x, w: function(x), name="layer")
    layer(x)
    lin = jvpreg.linearize(layer, x)
    assert lin.fallbacks == {kind: f"{kind.capitalize()}: {reason}"}
    with pytest.raises(NotImplementedError, match=rf"`{kind}` \({kind.capitalize()}\) has .* rule \({reason}\)"):
        jvpreg.linearize(layer, x, fallback="error")


@ops.custom_gradient
def squared(x):
    def grad(*arguments, upstream=None):
        return 2 * x * (arguments[-1] if upstream is None else upstream)

    return x * x, grad


def moved(images):
    transform = np.array([[1.0, 0.1, 0.2, 0.1, 0.9, 0.2, 0.0, 0.0]] * 2, "float32")
    return ops.image.affine_transform(images, ops.convert_to_tensor(transform))


def attended(x):
    if isinstance(x, keras.KerasTensor):
        raise NotImplementedError("it takes no symbols")
    return ops.dot_product_attention(x, x, x)


# The second one has a rule. On Torch, the first one is opened up like any other function.
WITHOUT_FORWARD_MODE = {
    "a gradient of one's own": (squared, (2, 3)),
    "an affine transform": (moved, (2, 4, 4, 1)),
    "attention": (attended, (2, 3, 1, 4)),
}


@pytest.mark.parametrize("kind", WITHOUT_FORWARD_MODE)
def test_where_a_backend_has_no_forward_mode(kind):
    """Both products are still right, against finite differences."""
    function, shape = WITHOUT_FORWARD_MODE[kind]
    x, u = normal(*shape).astype("float32"), normal(*shape, seed=1).astype("float32")
    layer = Call(lambda x, w: function(x))
    layer(x)
    lin = jvpreg.linearize(layer, x, fallback="ignore")
    by_autodiff = function is attended or (function is squared and keras.backend.backend() != "torch")
    assert bool(lin.fallbacks) == by_autodiff
    slope = (numpy(layer(x + 1e-2 * u)) - numpy(layer(x - 1e-2 * u))) / 2e-2
    assert_close(lin.jvp(u), slope, 1e-3)
    v = normal(*slope.shape, seed=2)
    if function is moved and keras.backend.backend() == "tensorflow":
        pytest.skip("its gradient of an affine transform is no transpose, but what the inverse one makes")
    np.testing.assert_allclose(np.sum(numpy(lin.vjp(v)) * u), np.sum(slope * v), rtol=1e-3)


def test_a_penalty_without_forward_mode():
    """‖d (s x)² / dx · u‖² is 4 s⁴ x² u², whose slope along s is 16 s³ x² u²: the square has a gradient of its own."""
    model = keras.Sequential([keras.Input((3,)), Scaled(), Call(lambda x, w: squared(x))])
    x, u = normal(2, 3).astype("float32"), normal(2, 3, seed=1).astype("float32")
    model(x)
    (scale, *_) = model.trainable_variables
    scale.assign(1.5)

    def penalty(inputs):
        with keras.StatelessScope(state_mapping=[(scale, inputs[0])]):
            return [ops.sum(ops.square(jvpreg.linearize(model, x, fallback="ignore").jvp(u)))]

    (slope,) = transpose(penalty, [ops.convert_to_tensor(scale) + 0], [ops.ones(())])
    np.testing.assert_allclose(numpy(slope), 16 * 1.5**3 * np.sum((x * u) ** 2), rtol=1e-5)


class Scaled(layers.Layer):
    def build(self, shape):
        self.scale = self.add_weight(shape=(), initializer="ones")

    def call(self, x):
        return self.scale * x


# Functions in which Keras fills in arguments, or computes, before the operation: a trace sees only the operation.
FILLED_IN = {
    "conv_transpose": lambda x, w: ops.conv_transpose(x[:, :, None], w[:, :2, None], strides=2),
    "conv_transpose, same": lambda x, w: ops.conv_transpose(x[:, :, None], w[:, :2, None], strides=2, padding="same"),
    "conv": lambda x, w: ops.conv(x[:, :, None], w[:2, None, :2]),
    "softmax over two axes": lambda x, w: ops.softmax(x[:, :, None] * w, axis=(1, 2)),
    "log_softmax over two axes": lambda x, w: ops.log_softmax(x[:, :, None] * w, axis=(1, 2)),
    "norm": lambda x, w: ops.norm(ops.matmul(x, w), axis=-1, keepdims=True) * x,
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", FILLED_IN)
def test_arguments_that_keras_fills_in(kind):
    check_call(FILLED_IN[kind], normal(2, 3))


class Keywords(layers.Layer):
    """Its keyword tensors are not in alphabetical order, and one of them is in a dict."""

    def call(self, scale=None, base=None, others=None):
        return ops.tanh(scale) * 2.0 + base * others["z"] - ops.sin(others["a"])


class Calling(layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = Keywords(dtype=self.dtype_policy)

    def call(self, x):
        return self.inner(scale=x, base=ops.square(x), others={"z": x + 1.0, "a": 3.0 * x})


@pytest.mark.usefixtures("float64")
def test_keyword_tensors_keep_their_names():
    x, u = normal(2, 3), normal(2, 3, seed=1)
    layer = Calling(dtype="float64")
    lin = jvpreg.linearize(keras.Sequential([keras.Input((3,)), layer]), x)
    assert_close(lin.outputs, 2 * np.tanh(x) + x**2 * (x + 1) - np.sin(3 * x), 1e-12)
    assert_close(lin.jvp(u), u * (2 / np.cosh(x) ** 2 + 3 * x**2 + 2 * x - 3 * np.cos(3 * x)), 1e-12)


class Attending(layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.attention = layers.MultiHeadAttention(2, 4)

    def call(self, x):
        mask = ops.tile(ops.expand_dims(x[:, :, 0] > -1.0, 1), (1, 5, 1))
        return self.attention(query=x, value=ops.flip(x, axis=1), key=x * x, attention_mask=mask)


@pytest.mark.usefixtures("float64")
def test_attention_by_keywords():
    """The outputs are those of Keras, also with the scale, which TensorFlow rounds to 32 bits.

    On JAX Keras takes the softmax in 32 bits. The rule does not, so there the rule is the more exact one.
    """
    x, u = normal(2, 5, 8), normal(2, 5, 8, seed=1)
    model = keras.Sequential([keras.Input((5, 8)), Attending()])
    lin = jvpreg.linearize(model, x, fallback="error")
    on_jax = keras.backend.backend() == "jax"
    assert_close(lin.outputs, model(x), 1e-7 if on_jax else 1e-13)
    step = 1e-2 if on_jax else 1e-5
    slope = (numpy(model(x + step * u)) - numpy(model(x - step * u))) / (2 * step)
    assert_close(lin.jvp(u), slope, 1e-3 if on_jax else 1e-7)


class Latents(layers.Layer):
    def build(self, shape):
        self.w = self.add_weight(shape=(1, 3))

    def call(self, x):
        return ops.repeat(self.w, ops.shape(x)[0], axis=0)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "after", [layers.Dense(5, name="on_latents"), layers.LayerNormalization()], ids=["bias", "norm"]
)
def test_a_node_that_sees_weights_alone_has_no_intercept(after):
    x = keras.Input((4,))
    hidden = layers.Dense(5)(after(Latents()(x))) * layers.Dense(5)(x)
    model = keras.Model(x, layers.Dense(2)(ops.tanh(hidden)))
    full = jvpreg.full_jacobian(model, normal(3, 4))
    assert np.abs(numpy(full.completeness_error())).max() < 1e-12
    assert after.name not in full.bias_jacobians


@pytest.mark.parametrize("size", [(5, 3), (3, 4)])
def test_a_number_for_each_example_is_no_bias_of_as_many_channels(size):
    """TensorFlow's kernel for biases would take it for one of rows or channels: `keras.ops.add` asks for sizes only."""
    check_call(lambda x, w: x * x + x[:, :1, :1], normal(3, *size), weight=False)


class Noisy(layers.Layer):
    """Draws random numbers, in a way that can be traced or in one that cannot."""

    def __init__(self, traced):
        super().__init__()
        self.traced, self.seed, self.dense = traced, keras.random.SeedGenerator(1), layers.Dense(3)

    def build(self, shape):
        self.dense.build(shape)

    def call(self, x):
        noise = keras.random.normal((4, 3), dtype=x.dtype, seed=self.seed)
        if not self.traced:
            assert not isinstance(x, keras.KerasTensor)
        return self.dense(x * noise)


@pytest.mark.parametrize("traced", [True, False])
def test_a_call_that_draws_random_numbers_draws_them_once(traced):
    layer, other, x = Noisy(traced), Noisy(traced), normal(4, 3)
    called = layer(x)
    other.build((None, 3))
    other.dense.set_weights(layer.dense.get_weights())
    assert_close(jvpreg.linearize(other, x).outputs, called)
    np.testing.assert_array_equal(numpy(other.seed.state), numpy(layer.seed.state))


@pytest.mark.parametrize("traced", [True, False])
def test_what_a_layer_was_opened_with_is_not_kept(traced):
    layer, x = Noisy(traced), normal(4, 3)
    layer(x)
    known = [len(calls) for calls in recorded_calls(layer.dense)]
    for _ in range(3):
        jvpreg.linearize(layer, x)
    assert [len(calls) for calls in recorded_calls(layer.dense)] == known


class Sublayer(layers.Layer):
    """It returns None, a number and a constant beside a tensor, and states the shape of one with other arguments."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense, self.positions = layers.EinsumDense("btd,dh->bth", (None, 3)), layers.Embedding(4, 3)

    def compute_output_spec(self, x):
        return keras.KerasTensor(x.shape, x.dtype)

    def call(self, x, cache=None):
        y = self.dense(x)
        # The layer's inferred shape would have no number of steps here, and positions are no argument.
        y = ops.reshape(ops.tanh(y), (-1, y.shape[1] * 3)) + ops.reshape(self.positions(ops.arange(4)), (1, -1))
        return {"y": y, "cache": cache, "number": 2}, ops.ones((1,))


class WithSublayer(layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = Sublayer()

    def call(self, x):
        returned, _ = self.inner(x, cache=None)
        assert returned["cache"] is None
        return (returned["y"] * returned["number"], None)


class Doubled(layers.Dense):
    """It inherits what `Dense` says of its output, and returns two. It draws numbers, and adds a loss."""

    def __init__(self, units, **kwargs):
        super().__init__(units, **kwargs)
        self.seed = keras.random.SeedGenerator(1)

    def call(self, x):
        y = super().call(x) * keras.random.normal((3,), dtype="float64", seed=self.seed)
        self.add_loss(ops.sum(y))
        return y, ops.tanh(y)


class Angles(layers.Layer):
    """It needs its input for its shape alone, and cannot say what it returns."""

    def compute_output_shape(self, input_shape):
        return input_shape[1][1]

    def call(self, x):
        return ops.arange(x.shape[1], dtype=x.dtype)


class Unsaid(layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.doubled, self.angles = Doubled(3), Angles()

    def call(self, x):
        first, second = self.doubled(x)
        return first * second * self.angles(x)


class OneOrTwo(layers.Layer):
    """It returns one tensor or two, as it is called."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(3)

    def call(self, x, two=False):
        y = self.dense(x)
        return (y, ops.tanh(y)) if two else y


class Twice(layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = OneOrTwo()

    def call(self, x):
        first, second = self.inner(x, two=True)
        return first * self.inner(second)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", [Unsaid, Twice])
def test_layers_that_do_not_say_what_they_return(kind):
    """Such a layer is asked by a call, in which it draws no numbers that count."""
    x, u = normal(2, 3), normal(2, 3, seed=1)
    layer = kind()
    layer(x)
    states = [(variable, numpy(variable) + 0) for variable in layer.variables]

    def after(function, x):
        for variable, value in states:
            variable.assign(value)
        returned = function(x)
        return returned, [numpy(one) + 0 for one in (*layer.variables, *layer.losses)]

    called, expected = after(layer, x)
    lin, found = after(lambda x: jvpreg.linearize(layer, x, fallback="error"), x)
    assert_close(lin.outputs, called, 1e-12)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)
    slope = (numpy(after(layer, x + 1e-5 * u)[0]) - numpy(after(layer, x - 1e-5 * u)[0])) / 2e-5
    assert_close(lin.jvp(u), slope, 1e-7)


@pytest.mark.usefixtures("float64")
def test_what_a_layer_in_a_layer_returns_beside_tensors():
    x, u = normal(2, 4, 3), normal(2, 4, 3, seed=1)
    layer = WithSublayer()
    called, nothing = layer(x)
    lin = jvpreg.linearize(layer, x, fallback="error")
    assert nothing is None
    assert_close(lin.outputs, called, 1e-12)
    slope = (numpy(layer(x + 1e-5 * u)[0]) - numpy(layer(x - 1e-5 * u)[0])) / 2e-5
    assert_close(lin.jvp(u), slope, 1e-7)
    moved = normal(4, 3, seed=2)
    # A layer that takes constants alone has tangents of its weights too.
    (embeddings,) = layer.inner.positions.weights
    expected = np.broadcast_to(2 * moved.reshape(1, -1), (2, 12))
    assert_close(lin.jvp(weights=[(embeddings, moved)]), expected, 1e-10)
    assert len(lin.weights) == 2
