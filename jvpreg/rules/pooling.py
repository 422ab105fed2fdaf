"""Pooling: averages are linear; a maximum freezes which entry of each window won."""

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

from keras import layers, ops

from jvpreg.common.keras_private import nn
from jvpreg.rules.contract import Gate, Pushforward
from jvpreg.rules.families import linear
from jvpreg.rules.folding import as_batch, fold, unfold
from jvpreg.rules.registry import register_rule


@register_rule(
    layers.AveragePooling1D,
    layers.AveragePooling2D,
    layers.AveragePooling3D,
    layers.GlobalAveragePooling2D,
    layers.GlobalAveragePooling3D,
)
def average_pooling(layer, x, context):
    return layer.call(x), linear(layer.call, homogeneous=True)


@register_rule(layers.GlobalAveragePooling1D)
def average_of_steps(layer, x, context, mask=None):
    """The mean over the steps that are not masked."""
    if mask is None:
        return average_pooling(layer, x, context)
    steps = 1 if layer.data_format == "channels_last" else 2
    kept = ops.expand_dims(ops.cast(mask, "bool"), 3 - steps)
    count = ops.sum(ops.cast(kept, x.dtype), axis=steps, keepdims=layer.keepdims)

    def push(tangent, kept, count):
        return ops.sum(ops.where(kept, tangent, 0.0), axis=steps + 1, keepdims=layer.keepdims) / count

    return layer.call(x, mask=mask), Pushforward(push, kept, count)


@dataclass(frozen=True)
class _Windows:
    """What the rule reads off a layer, for an operation, which has a number for equal sides and None for usual strides.

    Attributes:
        pool_size: the sides of a window.
        strides: from one window to the next.
        padding: `"valid"` or `"same"`.
        data_format: where the channels are.
        call: the operation.
    """

    pool_size: tuple[int, ...]
    strides: tuple[int, ...]
    padding: str
    data_format: str
    call: Callable


@register_rule(nn.MaxPool)
def max_pool(operation, x, context):
    def sides(given):
        return (given,) * (len(x.shape) - 2) if isinstance(given, int) else tuple(given)

    size = sides(operation.pool_size)
    strides = size if operation.strides is None else sides(operation.strides)
    windows = _Windows(size, strides, operation.padding, operation.data_format, operation.call)
    return max_pooling(windows, x, context)


@register_rule(layers.MaxPooling1D, layers.MaxPooling2D, layers.MaxPooling3D)
def max_pooling(layer, x, context):
    """The running maximum over the entries of each window, in row-major order: a tie goes to the first entry.

    The primal is computed in the same way, not by `ops.max_pool`: the masks come for free, and the gradient is a
    select. Under XLA that is several times faster than the gradient of the backends' own max pooling. A plain
    TensorFlow graph uses TensorFlow's kernels instead: they find the winners again at each push, and are faster.
    """
    if context.prefers_kernels and _tiles_the_input(layer, x):
        return layer.call(x), Pushforward(functools.partial(_push_by_average, layer), x)
    if context.plain_graph and len(x.shape) < 5:  # the kernel is wrong under XLA
        y = layer.call(x)
        if _is_smaller(y, x):
            return y, Pushforward(functools.partial(_push_by_kernel, layer, ops.shape(y)[1:]), x)
    in_phases = context.prefers_kernels
    best, *rest = _window_entries(layer, x, outside=-float("inf"), in_phases=in_phases)
    masks = []
    for entry in rest:
        masks.append(entry > best)
        best = ops.where(masks[-1], entry, best)

    def push(tangent, *masks):
        num_probes = ops.shape(tangent)[0]
        entries = _window_entries(layer, fold(tangent), outside=0.0, in_phases=in_phases)
        if tangent.shape[0] == 1:  # without the probe axis, which XLA would transpose in the gradient
            masks = tuple(map(fold, masks))
        else:
            entries = [unfold(entry, num_probes) for entry in entries]
        chosen, *later = entries
        for wins, entry in zip(masks, later, strict=True):
            chosen = ops.where(wins, entry, chosen)
        return chosen if len(chosen.shape) == len(tangent.shape) else unfold(chosen, 1)

    return best, Gate(push, *masks, transposed=_transposed_tiles(layer, x), homogeneous=True)


def _transposed_tiles(layer, x):
    """The transpose where windows cover each entry once: a single select, of the cotangent or 0."""
    axes = _spatial_axes(layer, x)
    sizes = [x.shape[axis] for axis in axes]
    covered = zip(sizes, layer.pool_size, strict=True)
    single = math.prod(layer.pool_size) == 1
    if single or not _tiles_the_input(layer, x) or any(size is None or size % window for size, window in covered):
        return None

    def transposed(cotangent, *masks):
        # Each mask says where an entry beats all before it: the last of them wins.
        *_, last = masks
        entries, unbeaten = [last], ops.logical_not(last)
        for mask in reversed(masks[:-1]):
            entries.insert(0, ops.logical_and(mask, unbeaten))
            unbeaten = ops.logical_and(unbeaten, ops.logical_not(mask))
        entries.insert(0, unbeaten)
        # The inverse of `_tiles`: the last axis of a window varies fastest.
        for axis, window in reversed(list(zip(axes, layer.pool_size, strict=True))):
            entries = [ops.stack(entries[i : i + window], axis=axis + 2) for i in range(0, len(entries), window)]
            cotangent = ops.expand_dims(cotangent, axis + 2)
        first, shape = axes[0] + 1, ops.shape(cotangent)
        tiled = ops.where(entries[0], cotangent, 0.0)
        return ops.reshape(tiled, (*shape[:first], *sizes, *shape[first + 2 * len(axes) :]))

    return transposed


def _tiles_the_input(layer, x) -> bool:
    """Whether each entry is in at most one window, and each window is full."""
    if layer.strides != layer.pool_size:
        return False
    sizes = [x.shape[axis] for axis in _spatial_axes(layer, x)]
    return layer.padding == "valid" or all(
        size is not None and size % window == 0 for size, window in zip(sizes, layer.pool_size, strict=True)
    )


def _is_smaller(y, x) -> bool:
    """Whether the output is known to have fewer entries than the input.

    If both have the same size, TensorFlow's kernel for the gradient of the gradient overwrites what it reads, and
    returns zeros.
    """
    sizes = zip(y.shape[1:], x.shape[1:], strict=True)
    return any(isinstance(after, int) and isinstance(before, int) and after < before for after, before in sizes)


def _push_by_average(layer, tangent, x):
    """The tangents `(P, B, …)` at the winners of `x` `(1, B, …)`, in TensorFlow, where windows do not overlap.

    The gradient of the sum of all maxima is 1 at the winners and 0 elsewhere. It is multiplied by the tangent, and
    average pooling sums each window.
    """
    import tensorflow as tf

    points = fold(x)
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(points)
        best = layer.call(points)
    entries = tf.fill(tf.shape(best), tf.cast(math.prod(layer.pool_size), best.dtype))  # by which the average divides
    wins = unfold(tf.stop_gradient(tape.gradient(best, points, entries)), 1)

    def average(entries):
        return ops.average_pool(entries, layer.pool_size, layer.strides, layer.padding, layer.data_format)

    return as_batch(average, as_batch(ops.multiply, tangent, wins))


def _push_by_kernel(layer, shape, tangent, x):
    """The tangents `(P, B, …)` at the winners of `x` `(1, B, …)`, by TensorFlow's kernel.

    That is the kernel for the gradient of the gradient; it takes cotangents of the output, `(P·B, *shape)`.
    """
    import tensorflow as tf

    folded = fold(tangent)
    points = fold(x) if tangent.shape[0] == 1 else fold(ops.repeat(x, ops.shape(tangent)[0], axis=0))
    cotangent = tf.zeros((ops.shape(folded)[0], *shape), x.dtype)
    with tf.GradientTape(watch_accessed_variables=False) as outer:
        outer.watch(cotangent)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(points)
            best = layer.call(points)
        pulled = tape.gradient(best, points, cotangent)
    return unfold(outer.gradient(pulled, cotangent, folded), ops.shape(tangent)[0])


def _window_entries(layer, x, outside: float, in_phases: bool) -> list:
    """One tensor of the output's shape for each position in a window; `outside` fills what padding adds.

    Outside XLA a strided slice takes ten times as long as one without strides: `in_phases`, each is cut out of every
    n-th entry, n being the stride.
    """
    axes = _spatial_axes(layer, x)
    sizes = [ops.shape(x)[axis] for axis in axes]
    windows, strides = layer.pool_size, layer.strides
    if layer.padding == "same":
        counts = [-(-size // stride) for size, stride in zip(sizes, strides, strict=True)]
    else:
        counts = [(size - w) // stride + 1 for size, w, stride in zip(sizes, windows, strides, strict=True)]
    in_phases = in_phases and all(isinstance(size, int) for size in sizes)
    for axis, size, window, stride, count in zip(axes, sizes, windows, strides, counts, strict=True):
        whole = (count - 1 + -(-window // stride)) * stride if in_phases else None
        x = _fit(x, axis, size, (count - 1) * stride + window, outside, whole)
    if windows == strides:
        return _tiles(x, axes, counts, windows)
    if in_phases:
        phases = _tiles(x, axes, [x.shape[a] // stride for a, stride in zip(axes, strides, strict=True)], strides)
        found = dict(zip(itertools.product(*map(range, strides)), phases, strict=True))
        return [_within(found, axes, counts, strides, offsets) for offsets in itertools.product(*map(range, windows))]
    return [x[_strided(x, axes, counts, strides, offsets)] for offsets in itertools.product(*map(range, windows))]


def _within(phases, axes, counts, strides, offsets):
    """The entries at one position of the windows, out of those at each remainder of the strides."""
    pairs = list(zip(offsets, strides, strict=True))
    phase = phases[tuple(offset % stride for offset, stride in pairs)]
    index = [slice(None)] * len(phase.shape)
    for axis, count, (offset, stride) in zip(axes, counts, pairs, strict=True):
        index[axis] = slice(offset // stride, offset // stride + count)
    return phase[tuple(index)]


def _spatial_axes(layer, x) -> list[int]:
    first = 2 if layer.data_format == "channels_first" else 1
    return [first + i for i in range(len(x.shape) - 2)]


def _fit(x, axis: int, size, needed, outside: float, whole: int | None = None):
    """Pads or crops `axis` to the length that the windows cover; "same" padding puts the odd entry last.

    If it is to have a `whole` length, which is longer, what is missing is put last too.
    """
    if whole is not None:
        before = max(needed - size, 0) // 2
        widths = [(before, max(whole - size - before, 0)) if a == axis else (0, 0) for a in range(len(x.shape))]
        padded = ops.pad(x, widths, constant_values=outside) if any(map(any, widths)) else x
        return padded[(slice(None),) * axis + (slice(0, whole),)]
    if not (isinstance(size, int) and isinstance(needed, int)):
        missing = ops.maximum(needed - size, 0)
    else:
        missing = max(needed - size, 0)
        if size > needed:
            return x[(slice(None),) * axis + (slice(0, needed),)]
        if missing == 0:
            return x
    widths = [(0, 0)] * len(x.shape)
    widths[axis] = (missing // 2, missing - missing // 2)
    return ops.pad(x, widths, constant_values=outside)[(slice(None),) * axis + (slice(0, needed),)]


def _tiles(x, axes, counts, windows) -> list:
    """The entries of windows that do not overlap, by reshape and unstack.

    The gradient of an unstack is a stack; that of a strided slice pads with zeros. Outside XLA nothing fuses this
    padding with other operations, and it costs more than the rest of the pooling.
    """
    shape = list(ops.shape(x))
    tiled = shape[: axes[0]]
    for count, window in zip(counts, windows, strict=True):
        tiled += [count, window]
    entries = [ops.reshape(x, (*tiled, *shape[axes[-1] + 1 :]))]
    for axis in axes:
        # Each round takes one window axis away, so the next one stands right after the next spatial axis.
        entries = [part for entry in entries for part in ops.unstack(entry, axis=axis + 1)]
    return entries


def _strided(x, axes, counts, strides, offsets) -> tuple:
    index = [slice(None)] * len(x.shape)
    for axis, count, stride, offset in zip(axes, counts, strides, offsets, strict=True):
        index[axis] = slice(offset, offset + (count - 1) * stride + 1, stride)
    return tuple(index)


@register_rule(layers.GlobalMaxPooling1D, layers.GlobalMaxPooling2D, layers.GlobalMaxPooling3D)
def global_max_pooling(layer, x, context):
    """Only the index of the winner is frozen: one integer a channel."""
    axes = _spatial_axes(layer, x)
    positions_last = layer.data_format == "channels_first"

    def flatten(x, leading: int):
        """The spatial axes as one: (…, S, C), or (…, C, S) where channels come first."""
        shape = ops.shape(x)
        batch, rest = shape[:leading], shape[leading:]
        return ops.reshape(x, (*batch, rest[0], -1) if positions_last else (*batch, -1, rest[-1]))

    axis = -1 if positions_last else -2

    def positions(entries):
        order = ops.arange(ops.shape(entries)[axis], dtype="int32")
        return order if positions_last else ops.expand_dims(order, -1)

    # Not by `ops.argmax`: on TensorFlow it uses bitwise operations, which LiteRT does not have.
    entries = flatten(x, 1)
    largest = ops.equal(entries, ops.max(entries, axis=axis, keepdims=True))
    last = ops.shape(entries)[axis] - 1
    winner = ops.min(ops.where(largest, positions(entries), last), axis=axis, keepdims=True)

    def push(tangent, winner):
        entries = flatten(tangent, 2)
        picked = ops.sum(ops.where(ops.equal(positions(entries), winner), entries, 0.0), axis=axis)
        return ops.expand_dims(picked, [a + 1 for a in axes]) if layer.keepdims else picked

    return layer.call(x), Pushforward(push, winner)


@register_rule(
    layers.AdaptiveMaxPooling1D, layers.AdaptiveMaxPooling2D, layers.AdaptiveMaxPooling3D, nn.AdaptiveMaxPool
)
def adaptive_max_pooling(layer, x, context):
    """One axis after the other, since the windows are boxes: along each, the winners of its windows are frozen."""
    sizes = [layer.output_size] if isinstance(layer.output_size, int) else list(layer.output_size)
    stages, winners, best = [], [], x
    for axis, count in zip(_spatial_axes(layer, x), sizes, strict=True):
        size = best.shape[axis]
        windows = [slice(i * size // count, -(-(i + 1) * size // count)) for i in range(count)]
        indices = [ops.argmax(best[_at(axis, window)], axis=axis, keepdims=True) for window in windows]
        best = ops.concatenate([ops.max(best[_at(axis, window)], axis=axis, keepdims=True) for window in windows], axis)
        stages.append((axis, windows))
        winners.append(ops.concatenate(indices, axis))

    def push(tangent, *winners):
        for (axis, windows), winner in zip(stages, winners, strict=True):
            picked = []
            for i, window in enumerate(windows):
                entries = tangent[_at(axis + 1, window)]
                shape = [1] * len(entries.shape)
                shape[axis + 1] = -1
                positions = ops.reshape(ops.arange(entries.shape[axis + 1], dtype=winner.dtype), shape)
                chosen = ops.where(ops.equal(positions, winner[_at(axis + 1, slice(i, i + 1))]), entries, 0.0)
                picked.append(ops.sum(chosen, axis=axis + 1, keepdims=True))
            tangent = ops.concatenate(picked, axis + 1)
        return tangent

    return best, Pushforward(push, *winners)


def _at(axis: int, window: slice) -> tuple:
    return (slice(None),) * axis + (window,)
