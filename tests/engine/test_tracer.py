"""The walk over a graph: architectures of many kinds, random graphs, nested inputs and outputs, and refused models."""

import itertools

import keras
import numpy as np
import pytest
from cases import ARCHITECTURES, residual_block, several_inputs_and_outputs, squeeze_and_excite, vgg
from compare import JAX, assert_close, at_once, inner, norm, normal, randomize
from keras import layers, ops, tree

import jvpreg
from jvpreg.common import keras_private
from jvpreg.engine.transpose import transpose

numpy = ops.convert_to_numpy


# Architectures.


@pytest.mark.parametrize("case", ARCHITECTURES, ids=lambda case: case.id)
def test_architecture(float64, case):
    """On JAX whole models are compiled; operation by operation, only single layers are run there."""
    jvpreg.testing.check_rule(case.make(), case.input_shape, jit=JAX, **case.arguments)


@pytest.mark.slow
@pytest.mark.skipif(keras.backend.backend() == "torch", reason="torch.compile takes half a minute a model")
@pytest.mark.skipif(JAX, reason="as all architectures are")
def test_architecture_compiled(float64):
    jvpreg.testing.check_rule(squeeze_and_excite(), (5, 5, 4), jit=True)


def with_frozen_statistics(model, x):
    """`model` as a function whose batch statistics are always those of the batch `x`, whatever its input."""
    statistics = {}

    def run(inputs):
        def operation(layer):
            if not isinstance(layer, layers.BatchNormalization):
                return layer

            def normalize(y, **kwargs):
                axes = list(range(len(y.shape) - 1))
                mean, variance = statistics.setdefault(layer, (ops.mean(y, axes), ops.var(y, axes)))
                return (y - mean) / ops.sqrt(variance + layer.epsilon) * layer.gamma + layer.beta

            return normalize

        return keras_private.run_graph(keras.Function(model.inputs, model.outputs), inputs, operation)

    def reference(*inputs):
        if not statistics:
            run([ops.convert_to_tensor(x)])
        return run(list(inputs))

    return reference


@pytest.mark.parametrize("make", [vgg, residual_block])
def test_training_with_frozen_batch_statistics(float64, make):
    """The reference holds the statistics of the batch that `check_rule` draws from seed 0."""
    model = make()
    x = normal(4, *model.input_shape[1:])
    reference = with_frozen_statistics(model, x)
    jvpreg.testing.check_rule(model, x.shape[1:], batch_size=4, training=True, reference=reference, jit=JAX)


# Random architectures.

SMOOTH_AND_PIECEWISE = ["relu", "relu6", "elu", "selu", "silu", "tanh", "softplus", "mish", "softsign", "hard_silu"]


BLOCKS = (
    *("conv", "strided", "depthwise", "separable", "transposed", "max", "tiled max", "average", "normalize", "prelu"),
    *("residual", "difference", "concatenate", "gated", "larger", "smaller", "mean", "pad and crop", "upsample"),
    "dropout",
)


def drawn_blocks(seed):
    return [str(name) for name in np.random.default_rng(seed).choice(BLOCKS, size=7)]


def random_architecture(seed):
    """Seven random layers or blocks of the rule table on an image, then a head."""
    random = np.random.default_rng(seed)
    x = y = keras.Input((6, 6, 2))

    def activation():
        return str(random.choice(SMOOTH_AND_PIECEWISE))

    def filters():
        return int(random.integers(2, 5))

    def like(y):
        return layers.Conv2D(y.shape[-1], 3, padding="same", activation=activation())(y)

    blocks = {
        "conv": lambda y: layers.Conv2D(filters(), 3, padding="same", activation=activation())(y),
        "strided": lambda y: layers.Conv2D(filters(), 3, strides=2, padding="same", use_bias=False)(y),
        "depthwise": lambda y: layers.DepthwiseConv2D(3, padding="same", activation=activation())(y),
        "separable": lambda y: layers.SeparableConv2D(filters(), 3, padding="same")(y),
        "transposed": lambda y: layers.Conv2DTranspose(filters(), 3, padding="same", activation=activation())(y),
        "max": lambda y: layers.MaxPooling2D(3, strides=2, padding="same")(y),
        "tiled max": lambda y: layers.MaxPooling2D(2, padding="same")(y),
        "average": lambda y: layers.AveragePooling2D(2, padding="same")(y),
        "normalize": lambda y: layers.BatchNormalization()(y),
        "prelu": lambda y: layers.PReLU(shared_axes=[1, 2])(y),
        "residual": lambda y: layers.Add()([y, like(y)]),
        "difference": lambda y: layers.Subtract()([like(y), y]),
        "concatenate": lambda y: layers.Concatenate()([y, layers.Conv2D(2, 1)(y)]),
        "gated": lambda y: layers.Multiply()([y, layers.Dense(y.shape[-1], activation="sigmoid")(y)]),
        "larger": lambda y: layers.Maximum()([y, like(y)]),
        "smaller": lambda y: layers.Minimum()([like(y), y]),
        "mean": lambda y: layers.Average()([y, like(y), like(y)]),
        "pad and crop": lambda y: layers.Cropping2D(((0, 1), (1, 0)))(layers.ZeroPadding2D(1)(y)),
        "upsample": lambda y: layers.AveragePooling2D(2)(layers.UpSampling2D(2)(y)),
        "dropout": lambda y: layers.Dropout(0.3)(y),
    }
    assert tuple(blocks) == BLOCKS
    for name in drawn_blocks(seed):
        y = blocks[name](y)
    heads = [layers.Flatten, layers.GlobalAveragePooling2D, layers.GlobalMaxPooling2D]
    y = heads[random.integers(len(heads))]()(y)
    return randomize(keras.Model(x, layers.Dense(3)(y)), seed)


# Fewer on JAX, which compiles for seconds where the other backends start at once.
SEEDS = range(10 if JAX else 20)


def test_random_architectures_draw_from_the_whole_table():
    assert set(itertools.chain.from_iterable(map(drawn_blocks, SEEDS))) == set(BLOCKS)


@pytest.mark.parametrize("seed", SEEDS)
def test_random_architecture(float64, seed):
    model = random_architecture(seed)
    u, w = normal(2, 6, 6, 2, seed=1), normal(2, 6, 6, 2, seed=2)

    def products(x, u, v):
        lin = jvpreg.linearize(model, x)
        complete = lin.jvp(lin.inputs[0], taps=lin.intercepts)
        pullback = transpose(lambda inputs: [model(inputs[0])], [x], [v])[0]
        return lin.outputs, lin.jvp(u), lin.vjp(v), complete, model(x, training=False), pullback

    x, v = ops.convert_to_tensor(normal(2, 6, 6, 2)), ops.convert_to_tensor(normal(2, 3, seed=3))
    results = at_once(products)(x, ops.convert_to_tensor(np.stack([u, w, 2 * u - 3 * w])), v)
    outputs, (ju, jw, both), jtv, complete, expected, pullback = map(numpy, results)
    assert norm(ju) > 0
    assert_close(outputs, expected)
    assert_close(jtv, pullback)
    assert abs(inner(ju, v) - inner(u, pullback)) <= 1e-10 * norm(ju) * norm(v)
    assert_close(both, 2 * ju - 3 * jw)
    assert_close(complete, expected)


# Structures.


def test_dicts_go_by_name(float64):
    """The names are not in alphabetical order, and the shapes of both inputs are the same."""
    first, second = keras.Input((3,), name="zulu"), keras.Input((3,), name="alpha")
    double = layers.Rescaling(2.0)(first)
    outputs = {"why": layers.Subtract()([double, second]), "ex": layers.Rescaling(1.0)(second)}
    model = keras.Model([first, second], outputs)
    x = {"alpha": normal(2, 3, seed=1), "zulu": normal(2, 3, seed=2)}
    lin = jvpreg.linearize(model, x)
    assert_close(lin.outputs["why"], 2 * x["zulu"] - x["alpha"])
    for u in (x, [x["zulu"], x["alpha"]], (x["zulu"], x["alpha"])):
        products = lin.jvp(u)
        assert sorted(products) == ["ex", "why"]
        assert_close(products["why"], 2 * x["zulu"] - x["alpha"])
        assert_close(products["ex"], x["alpha"])
    assert_close(lin.jvp({"zulu": None, "alpha": x["alpha"]})["why"], -x["alpha"])
    v = normal(2, 3, seed=3)
    assert_close(lin.vjp({"why": v, "ex": np.zeros((2, 3))}), {"zulu": 2 * v, "alpha": -v})
    assert_close(lin.vjp({"why": None, "ex": v})["alpha"], v)


def test_a_model_made_of_a_dict_of_inputs(float64):
    named = {name: keras.Input((3,), name=name) for name in ("zulu", "alpha")}
    model = keras.Model(named, layers.Subtract()([named["zulu"], named["alpha"]]))
    x = {"alpha": normal(2, 3, seed=1), "zulu": normal(2, 3, seed=2)}
    lin = jvpreg.linearize(model, x)
    assert_close(lin.outputs, model(x))
    assert_close(lin.jvp(x), x["zulu"] - x["alpha"])


def test_a_sub_model_called_with_a_dict(float64):
    first, second = keras.Input((3,), name="zulu"), keras.Input((3,), name="alpha")
    sub_model = keras.Model([first, second], layers.Subtract()([first, second]))
    p, q = keras.Input((3,)), keras.Input((3,))
    model = keras.Model([p, q], sub_model({"zulu": p, "alpha": q}))
    x = [normal(2, 3, seed=1), normal(2, 3, seed=2)]
    lin = jvpreg.linearize(model, x)
    assert_close(lin.outputs, model(x))
    assert_close(lin.jvp(x), x[0] - x[1])


@pytest.mark.parametrize("outputs", ["bare", "list of one", "list of two", "dict"])
def test_outputs_have_the_structure_of_the_models(float64, outputs):
    x = keras.Input((3,))
    y, z = layers.Dense(2)(x), layers.Dense(4)(x)
    made = {"bare": y, "list of one": [y], "list of two": [y, z], "dict": {"z": z, "y": y}}[outputs]
    model = keras.Model(x, made)
    lin = jvpreg.linearize(model, normal(2, 3))
    expected = model(normal(2, 3))
    tree.assert_same_structure(lin.outputs, expected)
    tree.assert_same_structure(lin.jvp(normal(2, 3, seed=1)), expected)
    assert_close(lin.outputs, expected)


# Bad input.


def _functional():
    x = keras.Input((3,), name="features")
    return keras.Model(x, layers.Dense(2)(x), name="small")


@pytest.mark.parametrize("shape", [(4, 4), (3,), (1, 4, 3)])
def test_wrong_shape_of_x(shape):
    with pytest.raises(ValueError, match=r"`x`. Expected shape \(B, 3\), as input `features` of `small` has. Received"):
        jvpreg.linearize(_functional(), np.ones(shape))


def test_wrong_shape_of_the_input_of_a_layer():
    layer = layers.Dense(2, name="layer")
    layer.build((None, 3))
    with pytest.raises(ValueError, match=r"`x`.*'layer'.*expected axis -1.* value 3, but received.*\(1, 4\)"):
        jvpreg.linearize(layer, np.ones((1, 4)))


def test_wrong_number_of_inputs():
    model = several_inputs_and_outputs()
    for x, count in ((normal(2, 4), 1), ([normal(2, 4), normal(2, 3), normal(2, 3)], 3)):
        with pytest.raises(ValueError, match=f"`x`. Expected 2 tensor.*one for each input.* Received: {count}"):
            jvpreg.linearize(model, x)
    with pytest.raises(ValueError, match=r"`x`. Expected the same number of examples.* Received"):
        jvpreg.linearize(model, [normal(2, 4), normal(3, 3)])
    with pytest.raises(ValueError, match=r"`x`. Expected a tensor for each input. Received: None"):
        jvpreg.linearize(model, [normal(2, 4), None])
    with pytest.raises(ValueError, match=r"`x`. Expected a dict with the keys .* add \['zulu'\]"):
        jvpreg.linearize(model, {"alpha": normal(2, 3)})


class Subclassed(keras.Model):
    def call(self, x):
        return 2.0 * x


class OverridesCall(keras.Model):
    """A functional model by its constructor, but its `call` does something else than its graph."""

    def call(self, inputs, training=None, mask=None):
        return 2.0 * super().call(inputs, training=training)


def test_a_subclassed_model_is_opened_up(float64):
    model = Subclassed()
    model(normal(2, 3))
    jvpreg.testing.check_rule(model, (3,))
    jvpreg.testing.check_rule(keras.Sequential([keras.Input((3,)), model]), (3,))


def test_a_functional_model_with_a_call_of_its_own_is_opened_up():
    functional = _functional()
    overriding = OverridesCall(functional.inputs, functional.outputs)
    assert isinstance(overriding, keras.Function)
    x, u = normal(2, 3), normal(2, 3, seed=1)
    products = [jvpreg.linearize(model, [x], fallback="error").jvp([u]) for model in (functional, overriding)]
    assert_close(products[1], 2 * numpy(products[0]), 1e-6)


class Backbone(keras.Model):
    """Normalization and dropout, each in a mode of its own or in that of the model."""

    def __init__(self, norm=None, drop=None):
        super().__init__()
        self.modes = {"norm": norm, "drop": drop}
        self.norm, self.drop = layers.BatchNormalization(momentum=0.5), layers.Dropout(0.5, seed=1)
        self.last = layers.Dense(2)

    def call(self, x):
        modes = {name: {} if mode is None else {"training": mode} for name, mode in self.modes.items()}
        return self.norm(self.last(self.drop(x, **modes["drop"])), **modes["norm"])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("modes", [{"norm": False}, {"drop": True}, {"drop": False, "norm": True}, {}])
def test_a_call_may_give_layers_a_mode_of_their_own(float64, modes, training):
    """Outputs and moving averages are those of a plain call of Keras'."""
    x = ops.convert_to_tensor(normal(6, 4))
    ours, theirs = (Backbone(**modes) for _ in range(2))
    for model in (ours, theirs):
        model(x)
        randomize(model)
    outputs = jvpreg.linearize(ours, x, training=training).outputs
    assert_close(outputs, theirs(x, training=training))
    assert_close([w.value for w in ours.weights], [w.value for w in theirs.weights])


@pytest.mark.slow
def test_a_token_at_the_head_of_each_sequence(float64):
    """A weight is repeated for each example; examples are cut out, also from a batch of unknown size."""

    class Headed(layers.Layer):
        def build(self, shape):
            self.token = self.add_weight((1, 1, shape[-1]), initializer="normal")

        def call(self, x):
            token = ops.broadcast_to(self.token, (ops.shape(x)[0], 1, x.shape[-1]))
            return ops.concatenate([token, x], axis=1)

    x = keras.Input((3, 4))
    y = layers.MultiHeadAttention(2, 3)(*[Headed()(x)] * 2)
    model = randomize(keras.Model(x, layers.Dense(2)(y[:, 0])))
    points, u = normal(5, 3, 4), normal(5, 3, 4, seed=1)
    lin = jvpreg.linearize(model, points)
    assert_close(lin.take([3, 1]).jvp(u[[3, 1]]), numpy(lin.jvp(u))[[3, 1]])
    trained = jvpreg.JacobianModel(model)
    norm = jvpreg.regularizers.JacobianNorm(0.1)
    trained.compile(loss="mse", jacobian_regularizers=[norm], jacobian_fraction=0.5, jit_compile=False)
    history = trained.fit(points, normal(5, 2), batch_size=2, verbose=0).history
    assert np.isfinite(history["frobenius_norm_squared"][0])


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_does_not_round_tokens(policy):
    class Tokens(layers.Layer):
        def __init__(self):
            super().__init__(dtype=policy)
            self.table = layers.Embedding(5000, 3, dtype=policy)

        def call(self, tokens):
            return ops.mean(self.table(tokens), axis=1)

    tokens = np.array([[4999, 1], [2051, 2]], "int32")
    layer = Tokens()
    expected = layer(tokens)
    assert_close(ops.cast(jvpreg.linearize(layer, tokens).outputs, "float32"), ops.cast(expected, "float32"), 1e-2)
    x = keras.Input((2,), dtype="int32")
    model = keras.Model(x, layer(x))
    assert_close(ops.cast(jvpreg.linearize(model, tokens).outputs, "float32"), ops.cast(expected, "float32"), 1e-2)


def test_a_subclassed_model_may_have_a_rule():
    @jvpreg.register_rule(Subclassed)
    def subclassed(model, x, context):
        return 2.0 * x, jvpreg.rules.linear(lambda tangent: 2.0 * tangent)

    model = Subclassed()
    x = normal(2, 3).astype("float32")
    model(x)
    np.testing.assert_array_equal(numpy(jvpreg.linearize(model, x).jvp(x)), 2 * x)
    outer = keras.Sequential([keras.Input((3,)), model])
    np.testing.assert_array_equal(numpy(jvpreg.linearize(outer, x).jvp(x)), 2 * x)


class NoRule(layers.Dense):
    """A subclass does not inherit its parent's rule."""

    def call(self, x):
        return ops.sin(super().call(x))


def test_a_layer_without_a_rule_is_opened_up(float64):
    inner_model = keras.Sequential([keras.Input((3,)), NoRule(2, name="waves")], name="block")
    x = keras.Input((3,))
    model = keras.Model(x, ops.sin(inner_model(x)))
    jvpreg.testing.check_rule(model, (3,))
    lin = jvpreg.linearize(model, normal(2, 3), fallback="error")
    names = ["block/waves/matmul", "block/waves/add", "block/waves/sin"]
    assert [node.name for node in lin.nodes][:3] == names
    assert list(jvpreg.linearize(model, normal(2, 3)).intercepts)[:3] == names
    assert {weight.name for weight in lin.weights} == {"kernel", "bias"}


class Opaque(layers.Layer):
    """Its `call` needs values and not symbolic tensors, so only autodiff can linearize it."""

    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones")
        self.calls = self.add_weight(shape=(), initializer="zeros", trainable=False)

    def call(self, x):
        if isinstance(x, keras.KerasTensor):
            raise TypeError("expected a tensor")
        self.calls.assign(self.calls + 1)
        return ops.sin(self.scale * x)

    def compute_output_shape(self, shape):
        return shape


@pytest.mark.filterwarnings("ignore:Some nodes of")
@pytest.mark.parametrize("jit", [False, True])
def test_what_cannot_be_opened_up_is_left_to_autodiff(jit):
    if jit and keras.backend.backend() == "torch":
        pytest.skip("slow, and its warnings are errors here")
    jvpreg.testing.check_rule(Opaque(), (3,), jit=jit)


def test_autodiff_is_announced_once_or_forbidden():
    model = keras.Sequential([keras.Input((3,)), layers.Dense(3), Opaque(name="opaque")])
    x = normal(2, 3)
    with pytest.warns(
        UserWarning, match=r"(?s)Some nodes of `sequential`.*`opaque` \(Opaque\):.*expected a tensor.*rule.*fallback"
    ):
        lin = jvpreg.linearize(model, x)
    # The primal ran once, and tangents leave the layer's state alone.
    lin.jvp(x)
    assert float(model.layers[-1].calls) == 1
    jvpreg.linearize(model, x)  # the second time there is no message
    jvpreg.linearize(keras.models.clone_model(model), x, fallback="ignore")
    with pytest.raises(
        NotImplementedError, match=r"`opaque` \(.*Opaque\) has no pushforward rule \(its `call` does.*register_rule"
    ):
        jvpreg.linearize(model, x, fallback="error")
    with pytest.raises(ValueError, match=r'`fallback`\. Expected "warn", "ignore" or "error"'):
        jvpreg.linearize(model, x, fallback="never")


def test_an_activation_without_a_rule_is_opened_up(float64):
    for activation in (ops.sin, lambda x: ops.tanh(x) ** 2):
        model = keras.Sequential(
            [keras.Input((3,)), layers.Dense(2, activation=activation, name="dense"), layers.Activation(activation)]
        )
        jvpreg.testing.check_rule(model, (3,))
    assert "dense/activation/tanh" in jvpreg.linearize(model, normal(2, 3), fallback="error").intercepts


@pytest.mark.slow
def test_a_quantized_layer():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(2, name="rounded")])
    model.layers[0].quantize("int8")
    with pytest.raises(NotImplementedError, match=r"`rounded` is quantized \(int8\).* before it is quantized"):
        jvpreg.linearize(model, normal(2, 4))


@pytest.mark.slow
def test_a_batch_of_unknown_size_through_a_layer_that_reshapes():
    """In `fit` on TensorFlow the batch size is unknown when group normalization reads the shape."""
    model = keras.Sequential([keras.Input((4, 4)), layers.GroupNormalization(2), layers.Flatten(), layers.Dense(2)])
    model = jvpreg.JacobianModel(model)
    model.compile(loss="mse", jacobian_regularizers=[jvpreg.regularizers.JacobianNorm(0.1)])
    history = model.fit(normal(5, 4, 4), normal(5, 2), batch_size=2, verbose=0).history
    assert np.isfinite(history["frobenius_norm_squared"][0])
