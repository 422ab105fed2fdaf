"""Activations that mix the entries of an axis: softmax and its kin."""

from keras import activations, layers, ops

from jvpreg.rules.contract import Gate, Pushforward
from jvpreg.rules.examples import besides
from jvpreg.rules.folding import sum_of_products
from jvpreg.rules.registry import register_rule


def from_end(axis, x):
    """`axis`, or each axis of a tuple, counted from the end, so that the probe axis of a tangent does not shift it."""
    if isinstance(axis, (list, tuple)):
        return tuple(from_end(each, x) for each in axis)
    return axis if axis < 0 else axis - len(x.shape)


@register_rule(activations.softmax)
def softmax(function, x, context, axis=-1):
    y = function(x, axis=axis)
    return y, _softmax_pushforward(y, from_end(axis, x), context)


def _softmax_pushforward(y, axes, context) -> Pushforward:
    def push(tangent, y):
        return y * (tangent - sum_of_products(y, tangent, axes, context))

    def second(u, w, inputs):
        moved = _moved_apart(y, u[0], w[0], axes)
        return y * (moved - ops.sum(y * moved, axis=axes, keepdims=True))

    return Pushforward(push, y, second=second, examples=besides(axes, len(y.shape)))


def _moved_apart(y, u, w, axes):
    """The product of two tangents, each without its mean under the probabilities y."""
    u, w = (t - ops.sum(y * t, axis=axes, keepdims=True) for t in (u, w))
    return u * w


@register_rule(activations.log_softmax)
def log_softmax(function, x, context, axis=-1):
    y = function(x, axis=axis)
    axis = from_end(axis, x)

    def push(tangent, probabilities):
        return tangent - sum_of_products(probabilities, tangent, axis, context)

    def second(u, w, inputs):
        probabilities = ops.exp(y)
        moved = probabilities * _moved_apart(probabilities, u[0], w[0], axis)
        return ops.zeros_like(u[0]) - ops.sum(moved, axis=axis, keepdims=True)

    return y, Pushforward(push, ops.exp(y), second=second, examples=besides([axis], len(x.shape)))


@register_rule(activations.sparsemax)
def sparsemax(function, x, context, axis=-1):
    """The derivative of what Keras computes, `max(x − τ, 0)`.

    Keras takes τ from the sum of all the partial sums of the k supporting entries in descending order, where
    Martins & Astudillo (2016) take the last one; so an entry of rank r enters τ with the weight (k − r) / k, not 1/k.
    """
    axis = from_end(axis, x)
    y = function(x, axis=axis)
    ranks = ops.argsort(ops.argsort(-x, axis=axis), axis=axis)
    descending = ops.flip(ops.sort(x, axis=axis), axis=axis)
    position = ops.cast(ops.argsort(ops.argsort(-descending, axis=axis), axis=axis), x.dtype)
    supporting = descending - (ops.cumsum(descending, axis=axis) - 1) / (position + 1) > 0
    size = ops.sum(ops.cast(supporting, x.dtype), axis=axis, keepdims=True)
    weights = ops.relu(size - ops.cast(ranks, x.dtype)) / size

    def push(tangent, kept, weights, _):
        return ops.where(kept, tangent - ops.sum(weights * tangent, axis=axis, keepdims=True), 0.0)

    # The ranks are frozen beside the mask: the weights follow from them.
    masks = [lambda kept: kept, None, None]
    return y, Gate(push, y > 0, weights, ranks, masks=masks, examples=besides([axis], len(x.shape)))


@register_rule(layers.Softmax)
def softmax_layer(layer, x, context, mask=None):
    # What is masked is 0 in the output, and with it every tangent there.
    y = layer.call(x, mask=mask)
    return y, _softmax_pushforward(y, from_end(layer.axis, x), context)
