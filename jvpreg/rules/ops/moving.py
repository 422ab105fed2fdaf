"""Operations that move entries about, sum them, or leave some out: linear in one input."""

import cmath

import numpy as np
from keras import ops, tree

from jvpreg.common.eager import cast as convert
from jvpreg.common.keras_private import core, image, nn, numpy_ops
from jvpreg.rules.contract import Declined, Pushforward
from jvpreg.rules.examples import FIRST, along, broadcast, has_batch, indexed, joined, kept, looked_up, reshaped
from jvpreg.rules.families import each_input
from jvpreg.rules.folding import align, each_probe, folded
from jvpreg.rules.registry import register_rule


def is_number(operand) -> bool:
    return isinstance(operand, (int, float, complex))


def is_finite_number(operand) -> bool:
    return is_number(operand) and cmath.isfinite(operand)


@register_rule(
    numpy_ops.Array,
    numpy_ops.Cumsum,
    numpy_ops.Diag,
    numpy_ops.Diagflat,
    numpy_ops.Diagonal,
    numpy_ops.Diff,
    numpy_ops.ExpandDims,
    numpy_ops.Flip,
    numpy_ops.Fliplr,
    numpy_ops.Flipud,
    numpy_ops.Mean,
    numpy_ops.Moveaxis,
    numpy_ops.Ravel,
    numpy_ops.Roll,
    numpy_ops.Rot90,
    numpy_ops.Squeeze,
    numpy_ops.Sum,
    numpy_ops.Swapaxes,
    numpy_ops.Tile,
    numpy_ops.Trace,
    numpy_ops.Transpose,
    numpy_ops.Trapezoid,
    numpy_ops.Tril,
    numpy_ops.Triu,
    numpy_ops.Copy,
    nn.AveragePool,
    nn.AdaptiveAveragePool,
    nn.DepthToSpace,
    nn.Fold,
    nn.SpaceToDepth,
    nn.Unfold,
    image.CropImages,
    image.ExtractPatches,
    image.GaussianBlur,
    image.PadImages,
    image.RGBToGrayscale,
    image.Resize,
    image.SobelEdges,
)
def linear(operation, x, context):
    # The probes of a batch of images are more images.
    push = (folded if has_batch(operation, len(x.shape)) else each_probe)(operation.call)
    return operation.call(x), Pushforward(push, examples=along(operation, x.shape))


@register_rule(numpy_ops.Repeat)
def repeat(operation, x, context):
    # If a call reads a batch size that is not known, the operation holds None for it.
    repeats = context.batch if operation.repeats is None else operation.repeats
    push = each_probe(lambda row: ops.repeat(row, repeats, operation.axis))
    return ops.repeat(x, repeats, operation.axis), Pushforward(push, examples=along(operation, x.shape))


@register_rule(numpy_ops.Reshape)
def reshape(operation, x, context):
    shape = list(operation.newshape)
    # If a call reads the batch size off its input, the shape must not fix it: tangents may be of a part of the batch.
    reads_batch = bool(shape) and shape[0] == x.shape[0]
    if reads_batch and -1 not in shape:
        shape[0] = -1

    def reshaped_as(tensor):
        # Not by the operation itself: on TensorFlow it holds None for sizes that are not known.
        first = ops.shape(tensor)[:1] if reads_batch and -1 in shape[1:] else shape[:1]
        return ops.reshape(tensor, [*first, *shape[1:]])

    def after(place):
        # Of the examples, first as before, it does not matter which other size is left open.
        same = reads_batch and place == FIRST
        return place if same else reshaped(x.shape, shape)(place)

    return reshaped_as(x), Pushforward(each_probe(reshaped_as), examples=after)


@register_rule(numpy_ops.BroadcastTo)
def broadcast_to(operation, x, context):
    # If a call reads a batch size that is not known (to put a token before each sequence), the shape has None for it.
    after = broadcast(len(x.shape), len(operation.shape))
    rank, shape = len(operation.shape), tuple(context.batch if size is None else size for size in operation.shape)

    def push(tangent):
        tangent = align(tangent, rank + 1)
        kept = len(x.shape) == rank > 0 and shape[0] == x.shape[0]
        return ops.broadcast_to(tangent, (*ops.shape(tangent)[: 2 if kept else 1], *shape[1 if kept else 0 :]))

    return ops.broadcast_to(x, shape), Pushforward(push, examples=lambda place: after(place, None))


@register_rule(core.Cast, core.ConvertToTensor)
def cast(operation, x, context):
    return operation.call(x), Pushforward(operation.call, examples=kept)


@register_rule(numpy_ops.Pad)
def pad(operation, x, context, constant_values=None):
    if ops.is_tensor(constant_values):
        return _pad_with_a_tensor(operation, x, constant_values)
    push = each_probe(operation.call)
    finite = constant_values is None or is_finite_number(constant_values)
    return operation.call(x, constant_values), Pushforward(push, examples=along(operation, x.shape), finite=finite)


def _pad_with_a_tensor(operation, x, value):
    """Padding with a constant that may have a tangent. On Torch the operation itself takes only a number."""
    if len(value.shape):
        raise Declined("several constants")

    def outside(x):
        return ops.cast(operation.call(ops.zeros_like(x), 1), "bool")

    def by_input(tangent, x):
        return each_probe(operation.call)(tangent)

    def by_value(tangent, x):
        return ops.where(outside(x[0]), align(convert(tangent, x.dtype), len(x.shape)), 0.0)

    y = ops.where(outside(x), convert(value, x.dtype), operation.call(x))
    push = each_input(by_input, by_value)
    return y, Pushforward(push, x, takes_none=True, examples=along(operation, x.shape))


@register_rule(numpy_ops.GetItem)
def get_item(operation, x, key, context):
    # A key may hold tensors, which are inputs too.
    held = [leaf for leaf in tree.flatten(key) if ops.is_tensor(leaf)]

    def push(tangent, *others):
        frozen = (index[0] for index in others[len(held) :])
        now = tree.map_structure(lambda leaf: next(frozen) if ops.is_tensor(leaf) else leaf, key)
        return each_probe(lambda row: operation.call(row, now))(tangent)

    return operation.call(x, key), Pushforward(push, *held, examples=indexed(key, len(x.shape)))


@register_rule(numpy_ops.Split)
def split(operation, x, context):
    axis = operation.axis % len(x.shape) - len(x.shape)  # so that a probe axis does not shift it

    def push(tangent):
        return tuple(ops.split(tangent, operation.indices_or_sections, axis=axis))

    return tuple(operation.call(x)), Pushforward(push, examples=along(operation, x.shape))


@register_rule(core.Unstack)
def unstack(operation, x, context):
    axis = operation.axis % len(x.shape) - len(x.shape)

    def push(tangent):
        return tuple(ops.unstack(tangent, operation.num, axis=axis))

    return tuple(operation.call(x)), Pushforward(push, examples=along(operation, x.shape))


@register_rule(numpy_ops.Take, numpy_ops.TakeAlongAxis)
def take(operation, x, indices, context):
    after = looked_up(operation, x, len(indices.shape) if ops.is_tensor(indices) else np.ndim(indices))
    if not ops.is_tensor(indices):
        fixed = each_probe(lambda row: operation.call(row, indices))
        return operation.call(x, indices), Pushforward(fixed, examples=after)
    push = each_input(lambda t, indices: each_probe(lambda row: operation.call(row, indices[0]))(t), None)
    return operation.call(x, indices), Pushforward(push, indices, takes_none=True, examples=after)


@register_rule(numpy_ops.Concatenate, numpy_ops.Stack, numpy_ops.Hstack, numpy_ops.Vstack)
def join(operation, tensors, context):
    push = each_probe(lambda *rows: operation.call(list(rows)))
    with_axis = isinstance(operation, (numpy_ops.Concatenate, numpy_ops.Stack)) and operation.axis is not None
    if with_axis:
        rank = len(tensors[0].shape) + isinstance(operation, numpy_ops.Stack)
        axis = operation.axis % rank - rank
        put = ops.stack if isinstance(operation, numpy_ops.Stack) else ops.concatenate

        def push(*tangents):
            # An input without a tangent (a token for each example) gets zeros for as many examples as the others.
            given = next(t for t in tangents if t is not None)
            leading = ops.shape(given)[: 1 if axis == -rank else 2]
            pairs = zip(tangents, tensors, strict=True)
            return put([_zeros_like(x, leading) if t is None else t for t, x in pairs], axis=axis)

    after = joined(operation, tensors[0])
    return operation.call(tensors), Pushforward(push, examples=after, takes_none=with_axis)


def _zeros_like(x, leading: tuple):
    """The zero tangent of x; `leading` are its first axes, the probes before those of x."""
    return ops.zeros((*leading, *ops.shape(x)[len(leading) - 1 :]), x.dtype)
