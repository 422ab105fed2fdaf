"""Layers that merge a list of inputs: sums are linear, products follow the product rule, maxima freeze the winner."""

from functools import reduce

from keras import layers, ops

from jvpreg.rules.contract import Gate, Pushforward
from jvpreg.rules.families import linear
from jvpreg.rules.folding import as_batch
from jvpreg.rules.registry import register_rule


@register_rule(layers.Add, layers.Subtract, layers.Average, layers.Concatenate)
def combine(layer, inputs, context):
    summed = isinstance(layer, layers.Add) and len({tuple(x.shape) for x in inputs}) == 1
    spread = (lambda cotangent: (cotangent,) * len(inputs)) if summed else None
    return layer.call(inputs), linear(lambda *tangents: layer.call(list(tangents)), transposed=spread, homogeneous=True)


def _same_rank(inputs):
    """The inputs as Keras broadcasts them: with axes of size 1 after the batch until all ranks agree."""
    rank = max(len(x.shape) for x in inputs)
    return [ops.reshape(x, (ops.shape(x)[0], *[1] * (rank - len(x.shape)), *ops.shape(x)[1:])) for x in inputs]


def _tangents_same_rank(tangents):
    rank = max(len(t.shape) for t in tangents)
    return [ops.reshape(t, (*ops.shape(t)[:2], *[1] * (rank - len(t.shape)), *ops.shape(t)[2:])) for t in tangents]


def _spread_masks(inputs, masks):
    """The masks (B, T), broadcast to the inputs (B, T, …); None for inputs of a lower rank: Keras drops their masks."""
    rank = max(len(x.shape) for x in inputs)
    return [
        None if mask is None or len(x.shape) < rank else ops.broadcast_to(ops.expand_dims(mask, -1), ops.shape(x))
        for x, mask in zip(inputs, masks or [None] * len(inputs), strict=True)
    ]


@register_rule(layers.Multiply)
def multiply(layer, inputs, context, mask=None):
    factors = _same_rank(inputs)
    masks = _spread_masks(inputs, mask)
    # As Keras: a masked step counts as 1, and as 0 if it is masked in all inputs.
    factors = [x if kept is None else ops.where(kept, x, 1) for x, kept in zip(factors, masks, strict=True)]
    # The derivative by one factor is the product of the others: no division, so zeros are harmless.
    others = [reduce(ops.multiply, factors[:i] + factors[i + 1 :]) for i in range(len(factors))]
    others = [y if kept is None else ops.where(kept, y, 0) for y, kept in zip(others, masks, strict=True)]
    y = reduce(ops.multiply, factors)
    if all(kept is not None for kept in masks):
        y = ops.where(reduce(ops.logical_or, masks), y, 0)

    def push(*arguments):
        tangents = _tangents_same_rank(arguments[: len(factors)])
        pairs = zip(tangents, arguments[len(factors) :], strict=True)
        return reduce(ops.add, [as_batch(ops.multiply, tangent, other) for tangent, other in pairs])

    return y, Pushforward(push, *others)


@register_rule(layers.Maximum)
def maximum(layer, inputs, context, mask=None):
    return _select(inputs, mask, ops.greater)


@register_rule(layers.Minimum)
def minimum(layer, inputs, context, mask=None):
    return _select(inputs, mask, ops.less)


def _select(inputs, masks, better):
    """Passes on the best input; a tie goes to the first. What is frozen says where a later input wins."""
    best, *rest = _same_rank(inputs)
    kept_in_best, *kept_in_rest = _spread_masks(inputs, masks)
    winners = []
    for x, kept in zip(rest, kept_in_rest, strict=True):
        wins = better(x, best)
        # An entry that is not masked wins against one that is.
        wins = wins if kept_in_best is None else ops.logical_or(wins, ops.logical_not(kept_in_best))
        wins = wins if kept is None else ops.logical_and(wins, kept)
        kept_in_best = None if kept is None or kept_in_best is None else ops.logical_or(kept_in_best, kept)
        winners.append(wins)
        best = ops.where(wins, x, best)

    def push(*arguments):
        chosen, *later = _tangents_same_rank(arguments[: len(inputs)])
        for wins, tangent in zip(arguments[len(inputs) :], later, strict=True):
            chosen = ops.where(wins, tangent, chosen)
        return chosen

    return best, Gate(push, *winners)


@register_rule(layers.Dot)
def dot(layer, inputs, context):
    ranks = [len(x.shape) for x in inputs]
    axes = [layer.axes] * 2 if isinstance(layer.axes, int) else list(layer.axes)
    axes = [axis % rank for axis, rank in zip(axes, ranks, strict=True)]
    left, right = inputs
    residuals = []
    if layer.normalize:
        left, left_norm = _normalize(left, axes[0])
        right, right_norm = _normalize(right, axes[1])
        residuals = [left_norm, right_norm]

    # Index legend: b batch, k the contracted axis, other letters the free axes of either side; p probes.
    left_index = "b" + "cdefg"[: ranks[0] - 1]
    right_index = "b" + "hijlm"[: ranks[1] - 1]
    left_index = left_index[: axes[0]] + "k" + left_index[axes[0] + 1 :]
    right_index = right_index[: axes[1]] + "k" + right_index[axes[1] + 1 :]
    output = (left_index + right_index[1:]).replace("k", "")

    def push(left_tangent, right_tangent, left, right, *norms):
        if norms:
            left_tangent = _normalized_tangent(left_tangent, left, norms[0], axes[0] - ranks[0])
            right_tangent = _normalized_tangent(right_tangent, right, norms[1], axes[1] - ranks[1])
        by_left = ops.einsum(f"p{left_index},{right_index}->p{output}", left_tangent, right[0])
        by_right = ops.einsum(f"{left_index},p{right_index}->p{output}", left[0], right_tangent)
        total = by_left + by_right
        return ops.expand_dims(total, -1) if output == "b" else total

    return layer.call(inputs), Pushforward(push, left, right, *residuals)


def _normalize(x, axis):
    # The floor is that of `keras.ops.normalize`, which `Dot(normalize=True)` uses.
    norm = ops.sqrt(ops.maximum(ops.sum(ops.square(x), axis=axis, keepdims=True), 1e-12))
    return x / norm, norm


def _normalized_tangent(tangent, direction, norm, axis):
    return (tangent - direction * ops.sum(direction * tangent, axis=axis, keepdims=True)) / norm
