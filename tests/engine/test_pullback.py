"""The transposes that rules state, against the transpose of the tangent pass by autodiff."""

import keras
import pytest
from compare import assert_close, normal
from keras import layers, ops

import jvpreg
from jvpreg.engine.transpose import transpose

BY_TORCH = {
    "same, stride 2, even": lambda: layers.Conv2D(4, 3, strides=2, padding="same"),
    "same, an even kernel": lambda: layers.Conv2D(4, (2, 4), padding="same"),
    "valid, stride past the end": lambda: layers.Conv2D(4, 3, strides=(2, 3)),
    "dilated": lambda: layers.Conv2D(4, 2, dilation_rate=2, padding="same"),
    "grouped": lambda: layers.Conv2D(4, 3, groups=2, padding="same"),
    "channels first": lambda: layers.Conv2D(4, 3, padding="same", data_format="channels_first"),
    "within each step": lambda: layers.TimeDistributed(layers.Conv1D(4, 3, padding="causal", dilation_rate=2)),
}
EVERYWHERE = {
    "dense": lambda: layers.Dense(3),
    "relu": lambda: layers.ReLU(negative_slope=0.1),
    "gelu": lambda: layers.Activation("gelu"),
    "normalization": lambda: layers.BatchNormalization(),
    "pooling by 2": lambda: layers.MaxPooling2D(2),
    "pooling by 2 and 3": lambda: layers.MaxPooling2D((2, 3)),
    "pooling by 1": lambda: layers.MaxPooling2D(1),
    "pooling, channels first": lambda: layers.MaxPooling2D((3, 2), data_format="channels_first"),
}

KINDS = EVERYWHERE | (BY_TORCH if keras.backend.backend() == "torch" else {})
LEFT_TO_AUTODIFF = ("pooling by 1", "within each step")


def made(layer, join=None):
    x = keras.Input((6, 6, 4))
    y = layer(x)
    return keras.Model(x, join([y, layers.ReLU()(y)]) if join else y)


def by_autodiff(lin, v):
    zeros = [ops.zeros((2, *x.shape), x.dtype) for x in lin.inputs]
    return transpose(lambda tangents: lin._push(tangents, scaled_kernels=False), zeros, [v])[0]


def unchanged(node, cotangents):
    return cotangents


@pytest.mark.parametrize("kind", KINDS)
def test_a_stated_transpose(kind, float64):
    """Of two cotangents for each example, some of them at ties; and of a part of the batch."""
    model = made(KINDS[kind]())
    x = ops.round(ops.convert_to_tensor(normal(2, 6, 6, 4)))
    lin = jvpreg.linearize(model, x)
    assert (lin.nodes[0].pushforward.transposed is None) == (kind in LEFT_TO_AUTODIFF)
    v = ops.convert_to_tensor(normal(2, *lin.outputs.shape, seed=1))
    expected = by_autodiff(lin, v)
    assert_close(lin.modified_vjp(v, unchanged), expected)
    assert_close(lin.vjp(v), expected)
    assert_close(lin.take([1]).vjp(v[:, 1:]), expected[:, 1:])


@pytest.mark.parametrize("join", ["sum", "row", "twice"])
def test_where_paths_meet(join, float64):
    joins = {"sum": layers.Add(), "row": layers.Concatenate(), "twice": lambda both: layers.Add()([both[1], both[1]])}
    lin = jvpreg.linearize(made(layers.Dense(3), joins[join]), normal(2, 6, 6, 4))
    v = ops.convert_to_tensor(normal(2, *lin.outputs.shape, seed=1))
    assert_close(lin.modified_vjp(v, unchanged), by_autodiff(lin, v))
    name = lin.nodes[0].name
    at_input, at_nodes = lin.gradients(v, [name])
    assert_close(at_input, ops.matmul(at_nodes[name], ops.transpose(lin.nodes[0].layer.kernel)))
    assert_close(lin.gradients(v, [name], with_inputs=False)[1][name], at_nodes[name])


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="elsewhere the pass is transposed as a whole")
def test_the_gradient_of_a_penalty_by_the_weights(float64):
    """Against Torch's own gradient of a gradient."""
    import torch

    body = [layers.Conv2D(4, 3, strides=2, padding="same"), layers.BatchNormalization(), layers.Activation("tanh")]
    model = keras.Sequential([keras.Input((6, 6, 2)), *body, layers.MaxPooling2D(3), layers.Flatten(), layers.Dense(3)])
    x, v = (ops.convert_to_tensor(normal(*shape)) for shape in ((2, 6, 6, 2), (2, 3)))
    weights = [variable.value for variable in model.trainable_variables]

    def gradient(pulled):
        return torch.autograd.grad(torch.sum(pulled**2), weights, allow_unused=True, materialize_grads=True)

    point = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(model(point, training=False), point, v, create_graph=True)
    assert_close(gradient(jvpreg.linearize(model, x).vjp(v)), gradient(expected))
