"""Paths of layers: attributes in subclassed models, names in the others, the same for two models of one class."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import jvpreg
from jvpreg.callbacks import JacobianProbe

X = np.random.default_rng(0).normal(size=(3, 4)).astype("float32")


class Block(layers.Layer):
    def __init__(self, named=False):
        super().__init__()
        self.conv = layers.Dense(4, activation="tanh", name="stem" if named else None)

    def build(self, shape):
        self.conv.build(shape)

    def compute_output_shape(self, shape):
        # In `fit` on JAX, Keras cannot find it by itself: the weights are not in their variables then.
        return shape

    def call(self, x):
        return x + self.conv(x)


class Net(keras.Model):
    """One attribute of each kind: a layer within a layer, a list, a dict, a Sequential, one that is used twice."""

    def __init__(self):
        super().__init__()
        self.encoder = Block()
        self.named = Block(named=True)
        self.blocks = [Block(), layers.Dense(4, name="middle")]
        self.parts = {"left": layers.Dense(4), "deep": [layers.Dense(4)]}
        self.shared = self.encoder.conv
        self.twice = Block()
        self.head = keras.Sequential([layers.Dense(4), layers.Dense(2, name="logits")])

    def call(self, x):
        x = self.blocks[1](self.blocks[0](self.named(self.encoder(x))))
        x = self.parts["left"](x) + self.parts["deep"][0](x)
        return self.head(self.twice(self.twice(self.shared(x))))


PATHS = [
    *["encoder", "encoder.conv", "named", "named.stem", "blocks.0", "blocks.0.conv", "middle"],
    *["parts.left", "parts.deep.0", "twice", "twice.conv", "head", "head.layers.0", "head.logits"],
]
NODES = [
    *["encoder.conv", "encoder.conv/activation", "encoder/add", "named.stem", "named.stem/activation", "named/add"],
    *["blocks.0.conv", "blocks.0.conv/activation", "blocks.0/add", "middle", "parts.left", "parts.deep.0", "add"],
    *["encoder.conv:1", "encoder.conv:1/activation", "twice.conv", "twice.conv/activation", "twice/add"],
    *["twice:1.conv", "twice:1.conv/activation", "twice:1/add", "head.layers.0", "head.logits"],
]


@pytest.fixture
def net():
    return built(Net())


def built(net):
    net(X)
    return net


def test_layers_go_by_their_attributes(net):
    paths = jvpreg.layer_paths(net)
    assert sorted(paths) == sorted(PATHS)
    assert paths["blocks.0.conv"] is net.blocks[0].conv
    assert paths["head.layers.0"] is net.head.layers[0]
    assert sorted(node.name for node in jvpreg.linearize(net, X).nodes) == sorted(NODES)


def test_a_layer_stands_before_those_in_it(net):
    order = list(jvpreg.layer_paths(net))
    assert order.index("encoder") < order.index("encoder.conv") < order.index("named") < order.index("head")


def test_two_models_of_one_class_have_the_same_paths(net):
    other = built(Net())
    assert other.name != net.name
    assert list(jvpreg.layer_paths(other)) == list(jvpreg.layer_paths(net))
    assert [n.name for n in jvpreg.linearize(other, X).nodes] == [n.name for n in jvpreg.linearize(net, X).nodes]
    assert list(jvpreg.full_jacobian(other, X, target=0).bias_jacobians) == list(
        jvpreg.full_jacobian(net, X, target=0).bias_jacobians
    )


@pytest.mark.parametrize(
    ("path", "nodes"),
    [
        ("twice", ["twice.conv", "twice.conv/activation", "twice/add"]),
        ("named.stem", ["named.stem", "named.stem/activation"]),
        ("named.conv", ["named.stem", "named.stem/activation"]),  # by attributes, though the user has named it
        ("blocks.1", ["middle"]),
        ("parts.deep.0", ["parts.deep.0"]),
        ("twice:1.conv", ["twice:1.conv", "twice:1.conv/activation"]),
        ("head.layers.1", ["head.logits"]),
        ("head", ["head.layers.0", "head.logits"]),
    ],
)
def test_a_block_is_found_by_its_path(net, path, nodes):
    assert list(jvpreg.linearize(net, X).node_outputs([path])) == nodes


def test_the_jacobian_of_a_block_is_that_of_its_layer(net):
    part = jvpreg.linearize(net, X).block("named")
    expected = jvpreg.jacobian(net.named, ops.convert_to_numpy(part.inputs[0]))
    np.testing.assert_allclose(ops.convert_to_numpy(part.jacobian()), ops.convert_to_numpy(expected), rtol=1e-5)


@pytest.mark.parametrize(
    "model",
    [
        lambda: keras.Sequential([keras.Input((4,)), layers.Dense(4), Block(), layers.Dense(2, name="last")]),
        lambda: _functional(),
    ],
)
def test_other_models_keep_the_names_of_their_summary(model):
    model = model()
    block = next(layer for layer in model.layers if isinstance(layer, Block))
    known = jvpreg.layer_paths(model)
    assert {layer.name for layer in model.layers} - {"x"} <= set(known)
    nodes = [node.name for node in jvpreg.linearize(model, X).nodes]
    assert f"{block.name}.conv" in known
    assert f"{block.name}.conv" in nodes
    assert f"{block.name}/add" in nodes
    assert {name.split(":")[0] for name in nodes if name.startswith("inner/")} == (
        {"inner/first", "inner/second"} if "inner" in known else set()
    )


def _functional():
    inner = keras.Sequential(
        [keras.Input((4,)), layers.Dense(4, name="first"), layers.Dense(4, name="second")], name="inner"
    )
    x = keras.Input((4,), name="x")
    return keras.Model(x, layers.Dense(2)(Block()(inner(inner(x)))))


def test_a_jacobian_model_is_looked_through(net):
    assert list(jvpreg.layer_paths(jvpreg.JacobianModel(net))) == list(jvpreg.layer_paths(net))


@pytest.mark.slow
def test_penalties_and_probes_take_paths(net):
    model = jvpreg.JacobianModel(net)
    penalty = jvpreg.regularizers.BiasJacobianNorm(0.1, layers=["blocks.0", "named.conv"])
    model.compile("sgd", "mse", jacobian_regularizers=[penalty])
    probe = JacobianProbe(X, ["frobenius_norm"], layers=["encoder.conv"], blocks=["blocks.0"])
    history = model.fit(X, np.zeros((3, 2)), verbose=0, callbacks=[probe]).history
    assert history["jacobian/after/encoder.conv/frobenius_norm"][0] > 0
    assert history["jacobian/block/blocks.0/frobenius_norm"][0] > 0
    lin = jvpreg.linearize(net, X)
    assert list(lin.gains(X))[:2] == ["encoder.conv", "encoder.conv/activation"]


def test_a_wrong_path_is_told_with_the_nearest(net):
    lin = jvpreg.linearize(net, X)
    with pytest.raises(
        ValueError, match=r"argument `layer`.*'encoder.conv'.*and 11 more.*Did you mean 'blocks.0.conv'"
    ):
        lin.block("blocks.0.cnv")
    with pytest.raises(ValueError, match=r"argument `layers`.*Did you mean 'middle'"):
        lin.node_outputs(["midle"])


def test_what_is_no_model_has_no_paths():
    with pytest.raises(ValueError, match=r"argument `model`.*Expected a Keras model or layer"):
        jvpreg.layer_paths("net")
