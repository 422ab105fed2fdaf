"""The losses of `keras.ops`, which models add to their own within a `call`."""

import keras
from keras import ops

from jvpreg.common.keras_private import nn
from jvpreg.rules.contract import Pushforward
from jvpreg.rules.examples import MIXED, kept
from jvpreg.rules.families import each_input
from jvpreg.rules.registry import register_rule
from jvpreg.rules.softmax import from_end


def _clipped(probabilities):
    """Probabilities as Keras clips them, and where they are not clipped."""
    epsilon = keras.config.epsilon()
    inside = ops.logical_and(probabilities > epsilon, probabilities < 1 - epsilon)
    return ops.clip(probabilities, epsilon, 1 - epsilon), inside


@register_rule(nn.BinaryCrossentropy)
def binary_crossentropy(operation, target, output, context):
    y = operation.call(target, output)
    target = ops.cast(target, output.dtype)
    if operation.from_logits:
        by_target, by_output = -output, ops.sigmoid(output) - target
    else:
        clipped, inside = _clipped(output)
        by_target = ops.log(1 - clipped) - ops.log(clipped)
        by_output = ops.where(inside, (clipped - target) / (clipped * (1 - clipped)), 0.0)
    push = each_input(lambda t, by_target, _: t * by_target, lambda t, _, by_output: t * by_output)
    return y, Pushforward(push, by_target, by_output, takes_none=True, examples=kept)


@register_rule(nn.CategoricalCrossentropy, nn.SparseCategoricalCrossentropy)
def categorical_crossentropy(operation, target, output, context):
    """`−Σ target · log p`. A class as the target stands for 1 at its place."""
    y = operation.call(target, output)
    axis, rank = from_end(operation.axis, output), len(output.shape)
    with_classes = isinstance(operation, nn.SparseCategoricalCrossentropy)
    if with_classes:
        classes = ops.squeeze(target, axis) if len(target.shape) == rank else target
        target = ops.one_hot(classes, output.shape[axis], axis=axis, dtype=output.dtype)
    if operation.from_logits:
        logarithms = ops.log_softmax(output, axis=axis)
        slope = ops.exp(logarithms) * ops.sum(target, axis=axis, keepdims=True) - target
    else:
        total = ops.sum(output, axis=axis, keepdims=True)
        clipped, inside = _clipped(output / total)
        logarithms = ops.log(clipped)
        # d log p = dx / x − Σ dx / Σ x, where p is not clipped.
        counted = ops.where(inside, target, 0.0)
        slope = (ops.sum(counted, axis=axis, keepdims=True) - counted / clipped) / total

    def by_target(tangent, logarithms, slope):
        return -ops.sum(logarithms * tangent, axis=axis)

    def by_output(tangent, logarithms, slope):
        return ops.sum(slope * tangent, axis=axis)

    def after(*places):
        place = places[1] if with_classes else kept(*places)
        if place is None or place.axis < 0 or place.axis == axis + rank:
            return MIXED
        return place._replace(axis=place.axis - (place.axis > axis + rank))

    push = each_input(None if with_classes else by_target, by_output)
    return y, Pushforward(push, logarithms, slope, takes_none=True, examples=after)
