"""`at`: derivatives by what a layer returned, against finite differences of the layers after it, called by hand."""

import keras
import numpy as np
import pytest
from compare import at_once, normal, numpy, randomize
from keras import layers, ops

import jvpreg

TOKENS = np.array([[3, 1, 4, 0, 0], [5, 9, 2, 6, 0]])


def masked_tokens():
    """The steps of the tokens 0 are padding, which the mask leaves out."""
    embedding, recurrent = layers.Embedding(10, 3, mask_zero=True, name="embedding"), layers.GRU(4, name="gru")
    model = keras.Sequential([keras.Input((5,), dtype="int32"), embedding, recurrent, layers.Dense(2)])
    return model, TOKENS, lambda h: model.layers[-1](recurrent(h, mask=ops.convert_to_tensor(TOKENS != 0)))


def around():
    """What bypasses the layer is constant. The layer's activation belongs to what it returns."""
    x = keras.Input((3,))
    before, beside = layers.Dense(4, activation="tanh", name="before"), layers.Dense(4, name="beside")
    last = layers.Dense(2, activation="sigmoid", name="last")
    hidden = before(x)
    model = keras.Model(x, ops.sin(last(hidden * beside(x))))
    given = normal(2, 3)
    return model, given, lambda h: ops.sin(last(ops.multiply(h, beside(given))))


def nested():
    """A model within the model."""
    inner = [layers.Dense(4, activation="tanh", name="first"), layers.Dense(3, name="second")]
    encoder = keras.Sequential(inner, name="encoder")
    model = keras.Sequential([keras.Input((3,)), encoder, layers.Dense(2, activation="tanh")])
    return model, normal(2, 3), lambda h: model.layers[-1](h)


class Block(layers.Layer):
    """A layer without a rule."""

    def __init__(self):
        super().__init__()
        self.inner = layers.Dense(4)

    def call(self, x):
        return ops.tanh(self.inner(x))


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.blocks = [Block(), Block()]
        self.head = layers.Dense(2, activation="tanh", name="classifier")

    def call(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def penalized():
    """A layer of ours runs as the block in it."""
    first, last = layers.Dense(4, activation="tanh", name="first"), layers.Dense(2, name="last")
    block = keras.Sequential([keras.Input((3,)), first], name="block")
    model = keras.Sequential([keras.Input((3,)), jvpreg.layers.JacobianPenalty(block, []), last])
    return model, normal(2, 3), last


def opened():
    model = Subclassed()
    x = normal(2, 3)
    model(x)
    return model, x, lambda h: model.head(model.blocks[1](h))


# A model, its input, what is after the layer; and the layer's path.
CASES = {
    "masked": (masked_tokens, "embedding"),
    "around": (around, "before"),
    "nested": (nested, "encoder"),
    "within": (nested, "encoder/second"),
    "opened": (opened, "blocks.0"),
    "penalized": (penalized, "block/first"),
}


def made(name):
    keras.utils.set_random_seed(0)
    make, at = CASES[name]
    model, x, after = make()
    return randomize(model), x, after, at


def differences(function, h, u):
    step = 1e-5
    return (numpy(function(h + step * u)) - numpy(function(h - step * u))) / (2 * step)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", CASES)
def test_derivatives_are_by_what_the_layer_returned(name):
    model, x, after, at = made(name)
    lin = jvpreg.linearize(model, x, at=at)
    h = numpy(lin.inputs[0])
    np.testing.assert_allclose(numpy(lin.outputs), numpy(model(x)), rtol=1e-12)
    np.testing.assert_allclose(numpy(after(h)), numpy(model(x)), rtol=1e-12)
    u, v = normal(*h.shape, seed=1), normal(*lin.outputs.shape, seed=2)
    expected = differences(after, h, u)
    assert np.abs(expected).max() > 1e-3
    outputs, pushed = at_once(lambda u: jvpreg.jvp(model, x, u, at=at))(u)
    np.testing.assert_allclose(numpy(pushed), expected, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(numpy(outputs), numpy(model(x)), rtol=1e-12)
    pulled = numpy(at_once(lambda v: jvpreg.vjp(model, x, v, at=at)[1])(v))
    assert pulled.shape == h.shape
    np.testing.assert_allclose(np.sum(pulled * u), np.sum(expected * v), rtol=1e-6)


def twice():
    x = keras.Input((3,))
    shared = layers.Dense(3, name="shared")
    return keras.Model(x, shared(shared(x)))


def several_outputs():
    x = keras.Input((4, 3))
    sequence, state = layers.GRU(2, return_sequences=True, return_state=True, name="gru")(x)
    return keras.Model(x, layers.Flatten()(sequence) * ops.sum(state))


def on_another_axis():
    x = keras.Input((4, 3))
    turned = layers.Dense(2, name="turned")(ops.transpose(x, (1, 0, 2)))
    return keras.Model(x, ops.sum(turned, axis=(0, 2), keepdims=True)[0])


def merged():
    x = keras.Input((4, 3))
    return keras.Model(x, ops.reshape(layers.Dense(2, name="merged")(ops.reshape(x, (-1, 3))), (-1, 8)))


def unused():
    x = keras.Input((3,))
    return keras.Model(x, layers.Dense(2)(x) + ops.stop_gradient(layers.Dense(2, name="unused")(x)))


def codes():
    x = keras.Input((3,))
    edges = layers.Discretization([0.0], name="codes")(x)
    return keras.Model(x, layers.Dense(2)(x) + layers.Flatten()(layers.Embedding(2, 2)(edges))[:, :2])


# A model, the path that is asked for, and the error.
REFUSED = {
    "no layer": (
        twice,
        "share",
        r"path of a layer, as `jvpreg.layer_paths` has it: \['shared'\].*'share'. Did you mean",
    ),
    "no path": (twice, 3, r"a string that is not empty.*at=3"),
    "a block": (lambda: nested()[0], "encoder/", r"path of a layer.*'encoder/'"),
    "no whole path": (lambda: nested()[0], "second", r"path of a layer.*'second'. Did you mean 'encoder/second'"),
    "twice": (
        twice,
        "shared",
        r"a layer that runs once. Received: at='shared', which runs 2 times.*`at=\"shared:0\"` or `at=\"shared:1\"`",
    ),
    "several outputs": (several_outputs, "gru", r"with one output. Received: at='gru', which has 2"),
    "another axis": (
        on_another_axis,
        "turned",
        r"has the examples on its first axis. Received: at='turned'",
    ),
    "merged": (merged, "merged", r"has the examples on its first axis. Received: at='merged'"),
    "unused": (unused, "unused", r"the model's outputs depend. Received: at='unused'"),
    "integers": (codes, "codes", r"that returns real numbers. Received: at='codes', which returns"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_layer_is_refused_where_its_jacobian_is_zero_or_open(name):
    make, at, expected = REFUSED[name]
    model = make()
    x = np.ones((4, *model.input_shape[1:]))
    with pytest.raises(ValueError, match=rf"argument `at`.*{expected}"):
        jvpreg.linearize(model, x, at=at)


def test_an_error_for_token_ids_names_the_first_layers_of_real_numbers():
    words, kinds = keras.Input((5,), dtype="int32"), keras.Input((5,), dtype="int32")
    word, kind = layers.Embedding(9, 3, name="words")(words), layers.Embedding(2, 3, name="kinds")(kinds)
    model = keras.Model([words, kinds], layers.Dense(2, name="last")(layers.Flatten()(word + kind)))
    x = [np.ones((2, 5), "int32")] * 2
    with pytest.raises(ValueError, match='`at="words"` or `at="kinds"`'):
        jvpreg.jacobian(model, x)
    assert tuple(jvpreg.jacobian(model, x, at="kinds").shape) == (2, 2, 5, 3)


def test_each_run_of_a_layer_has_a_derivative_of_its_own():
    model = twice()
    x, kernel = normal(2, 3), model.get_layer("shared").get_weights()[0]
    for path, matrix in (("shared:0", kernel.T), ("shared:1", np.eye(3))):
        np.testing.assert_allclose(numpy(jvpreg.jacobian(model, x, at=path)), np.stack([matrix] * 2), rtol=1e-6)
    with pytest.raises(ValueError, match=r"argument `at`.*a layer that runs. Received: at='shared:2', which does not"):
        jvpreg.jacobian(model, x, at="shared:2")


def test_an_error_for_token_ids_names_the_run_of_an_embedding_that_is_used_twice():
    """As where the embedding's weights make the logits."""
    tokens, embedding = keras.Input((5,), dtype="int32"), layers.Embedding(9, 3, name="words")
    model = keras.Model(tokens, layers.Flatten()(embedding(ops.cast(ops.sum(embedding(tokens), axis=-1), "int32"))))
    with pytest.raises(ValueError, match=r'`at="words:1"`'):
        jvpreg.jacobian(model, np.ones((2, 5), "int32"))
