"""Recurrent layers: the cell is frozen at every step, and tangents are scanned over what was frozen.

The cell may be any that Keras can run: it is linearized by its own rule, or opened up. What it freezes in a step is
stacked over the steps, so a tangent pass is a scan of linear maps, without autodiff and without running the cell again.
"""

import keras
from keras import layers, ops, tree

from jvpreg.registry import Declined, Pushforward, align, register_rule


@register_rule(
    layers.RNN,
    layers.SimpleRNN,
    layers.LSTM,
    layers.GRU,
    layers.ConvLSTM1D,
    layers.ConvLSTM2D,
    layers.ConvLSTM3D,
)
def recurrent(layer, sequences, context, initial_state=None):
    if layer.stateful:
        raise NotImplementedError(
            f"`{layer.path}` is stateful: its output depends on earlier batches, which a Jacobian at `x` leaves out. "
            "Set `stateful=False`, and pass the state as an input."
        )
    cell = layer.cell
    given = initial_state is not None
    states = initial_state if given else layer.get_initial_state(batch_size=ops.shape(sequences)[0])
    states = list(states) if isinstance(states, (list, tuple)) else [states]
    states = tree.map_structure(lambda state: ops.cast(state, cell.compute_dtype), states)
    # A cell's dropout masks are constants of it, and so not cut with the examples.
    cells = [cell, *getattr(cell, "cells", [])]
    masked = context.training and any(getattr(c, "dropout", 0) or getattr(c, "recurrent_dropout", 0) for c in cells)
    num_given = len(tree.flatten(states)) if given else 0
    steps = _time_first(sequences, 0)
    steps = ops.flip(steps, axis=0) if layer.go_backwards else steps

    # Private: a cell keeps its dropout masks, so that they are drawn once and not within the scan.
    layer._maybe_config_dropout_masks(cell, steps[0], states)
    try:
        # The first step, outside the scan: the maps of its nodes are those of every step, with other residuals.
        (y, _), frozen = context.run(cell, steps[0], states)

        def step(carried, x):
            (y, following), pushforward = context.run(cell, x, carried)
            following = tree.pack_sequence_as(carried, tree.flatten(following))
            return following, [y, *pushforward.residuals]

        last, (outputs, *residuals) = _scan(step, states, steps, [y, *frozen.residuals])
    finally:
        layer._maybe_reset_dropout_masks(cell)

    def scan(x_tangents, state_tangents, residuals, part=None, u=None):
        """The tangents of all outputs (T, P, …) and of the last states, from those of the inputs and first states."""

        def push(carried, now):
            # One step's residuals as they are when nothing is stacked, with an axis for the probes.
            x, frozen_now = now if x_tangents is not None else (None, now)
            frozen_now = [ops.expand_dims(residual, 0) for residual in frozen_now]
            images = frozen.function(x, *carried, *frozen_now)
            if part is not None:
                images = [a + align(b, len(a.shape)) for a, b in zip(images, part(u, *frozen_now), strict=True)]
            return list(images[1:]), [images[0]]

        inputs = residuals if x_tangents is None else (x_tangents, residuals)
        like = ops.zeros((*ops.shape(state_tangents[0])[:2], *y.shape[1:]), y.dtype)
        last, (outputs,) = _scan(push, state_tangents, inputs, [like])
        return last, outputs

    def finish(last, outputs):
        """(T, P, B, …) as the layer returns it: (P, B, T, …) or the last step, and the states if it returns them."""
        y = ops.moveaxis(outputs, 0, 2) if layer.return_sequences else outputs[-1]
        return (y, *last) if layer.return_state else y

    flat_states = tree.flatten(states)

    def zeros(probes, batch):
        return [ops.zeros((probes, batch, *state.shape[1:]), state.dtype) for state in flat_states]

    def push(tangent, *arguments):
        state_tangents, residuals = arguments[:num_given], [r[0] for r in arguments[num_given:]]
        moving = [t for t in (tangent, *state_tangents) if t is not None]
        first = zeros(*ops.shape(moving[0])[:2])
        if given:
            first = [z if t is None else ops.cast(t, z.dtype) for z, t in zip(first, state_tangents, strict=True)]
        x_tangents = None
        if tangent is not None:
            x_tangents = _time_first(tangent, 1)
            x_tangents = ops.flip(x_tangents, axis=0) if layer.go_backwards else x_tangents
        return finish(*scan(x_tangents, first, residuals))

    def part_of(part):
        def push_weight(u, *residuals):
            stacked = [residual[0] for residual in residuals]
            batch = ops.shape(stacked[0])[1 + frozen.batch_axes[0]] if stacked else ops.shape(sequences)[0]
            return finish(*scan(None, zeros(u.shape[0], batch), stacked, part, u))

        return push_weight

    output = ops.cast(ops.moveaxis(outputs, 0, 1) if layer.return_sequences else outputs[-1], layer.compute_dtype)
    last = [ops.cast(state, layer.compute_dtype) for state in tree.flatten(last)]
    return (output, *last) if layer.return_state else output, Pushforward(
        push,
        *residuals,
        weights=[(variable, part_of(part)) for variable, part in frozen.weights],
        batch_axes=[axis + 1 for axis in frozen.batch_axes],
        couples_examples=frozen.couples_examples or masked,
        takes_none=True,
    )


@register_rule(layers.Bidirectional)
def bidirectional(layer, sequences, context):
    """As the layer's own call, but for the kernels that run both directions at once, which nothing can open up."""
    if layer.return_state:
        raise Declined("states that are returned")

    def call(sequences):
        forward, backward = layer.forward_layer(sequences), layer.backward_layer(sequences)
        if layer.return_sequences:
            backward = ops.flip(backward, axis=1)
        merge = {"sum": ops.add, "mul": ops.multiply, None: lambda *both: both}
        merge["concat"] = lambda *both: ops.concatenate(both, axis=-1)
        merge["ave"] = lambda *both: ops.add(*both) / 2
        return merge[layer.merge_mode](forward, backward)

    return context.run(call, sequences)


def _scan(step, carried, inputs, like: list):
    """`step(carried, x) -> (carried, outputs)` over the first axis of `inputs`; `like`: outputs of one step."""
    if keras.backend.backend() != "tensorflow":
        return ops.scan(step, carried, inputs)

    import tensorflow as tf

    # On TensorFlow, Keras' scan takes outputs only that are like what is carried, and has no gradient under XLA.
    first = tuple(tree.flatten(carried)), tuple(ops.zeros_like(y) for y in like)

    def both(pair, x):
        following, outputs = step(tree.pack_sequence_as(carried, pair[0]), x)
        return tuple(tree.flatten(following)), tuple(outputs)

    states, outputs = tf.scan(both, inputs, first)
    return tree.pack_sequence_as(carried, [state[-1] for state in states]), outputs


def _time_first(tensor, axis: int):
    """(B, T, …) as (T, B, …), or (P, B, T, …) as (T, P, B, …): the time is the second axis from `axis`."""
    return ops.moveaxis(tensor, axis + 1, 0)
