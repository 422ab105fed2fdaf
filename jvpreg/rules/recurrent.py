"""Recurrent layers: the cell is frozen at every step, and tangents are scanned over what was frozen.

The cell may be any that Keras can run: it is linearized by its own rule, or opened up; Keras' own are taken apart. What
a cell freezes in a step is stacked over the steps, so a tangent pass is a scan of linear maps, without autodiff and
without running the cell again. One product alone goes along with the cell, in one scan that keeps nothing.
"""

import functools
from collections.abc import Sequence
from typing import Any

import keras
from keras import layers, ops, tree

from jvpreg.common import keras_private
from jvpreg.rules.cells import SplitCell, WholeCell, cell_of
from jvpreg.rules.contract import Declined, Gate, Pushed, Pushforward
from jvpreg.rules.registry import register_rule
from jvpreg.rules.scanning import next_axes, plus_parts, scan_steps


@register_rule(
    layers.RNN,
    layers.SimpleRNN,
    layers.LSTM,
    layers.GRU,
    layers.ConvLSTM1D,
    layers.ConvLSTM2D,
    layers.ConvLSTM3D,
)
def recurrent(layer, sequences, context, initial_state=None, mask=None):
    _check(layer, context, mask)
    cell = layer.cell
    given = initial_state is not None
    states = initial_state if given else layer.get_initial_state(batch_size=ops.shape(sequences)[0])
    states = list(states) if isinstance(states, (list, tuple)) else [states]
    companions = context.along(sequences, *(tree.flatten(states) if given else []))
    states = tree.map_structure(lambda state: ops.cast(state, cell.compute_dtype), states)
    loop = _Loop(layer, sequences, states, mask, cell_of(layer, context, cell.compute_dtype))
    # Dropout masks of a cell are constants for its rule, so they would not be cut with the examples.
    cells = [cell, *getattr(cell, "cells", [])]
    dropped = context.training and any(getattr(c, "dropout", 0) or getattr(c, "recurrent_dropout", 0) for c in cells)
    num_given = loop.num_states if given else 0

    # Drawn once, and not within the scan.
    with keras_private.dropout_masks(layer, cell, loop.steps[0], states):
        if companions is not None:
            variables, both = loop.push_along(companions, context)
            if both is None:
                y = layer.call(sequences, states if given else None, mask, training=context.training)
                return y, Pushed(None, variables)
            (last, outputs), (last_images, images) = both
            return loop.finish_primal(last, outputs), Pushed(loop.finish(last_images, images, axis=2), variables)
        frozen, y, last, (outputs, *residuals) = loop.freeze()
    pushforward = _pushforward(loop, frozen, residuals, y, num_given, dropped)
    return loop.finish_primal(last, outputs), pushforward


def _check(layer, context, mask) -> None:
    """Raises if the layer has no Jacobian at `x`, or none that the rule can give."""
    if layer.stateful:
        raise NotImplementedError(
            f"`{layer.path}` is stateful: its output depends on earlier batches, which a Jacobian at `x` leaves out. "
            "Set `stateful=False`, and pass the state as an input."
        )
    if mask is not None and layer.unroll and layer.zero_output_for_mask:
        raise Declined("an unrolled loop, whose masked outputs differ from backend to backend")
    if context.batch_statistics != "moving" and any(
        isinstance(part, keras.layers.BatchNormalization) and part.trainable
        for part in keras_private.layers_within(layer.cell)
    ):
        raise NotImplementedError(
            f"The cell of `{layer.path}` has batch normalization, whose statistics would be those of each step. "
            'Linearize with `batch_statistics="moving"`, or set `trainable = False` on it.'
        )


def _pushforward(loop: "_Loop", frozen: Pushforward, residuals: Sequence, y, num_given: int, dropped: bool) -> Gate:
    """The scan of linear maps.

    Args:
        loop: the steps and what they carry on.
        frozen: the pushforward of one step.
        residuals: its residuals, of all steps.
        y: the output of a step.
        num_given: how many of the states are inputs of the layer.
        dropped: whether dropout masks, which are the same in each step, belong to examples of the whole batch.
    """
    scan = functools.partial(_push_steps, loop, frozen, y)
    counting = loop.inputs[1:]  # which steps count
    residuals = [*residuals, *counting, *([loop.sequences] if loop.cell.entering else [])]
    batch_axes = [*next_axes(frozen.batch_axes), *[1] * len(counting), *([0] if loop.cell.entering else [])]

    def stacked(arguments) -> list:
        """The residuals of the steps, without the axis for the probes."""
        return [residual[0] for residual in arguments[: len(frozen.residuals) + len(counting)]]

    def push(tangent, *arguments):
        state_tangents = arguments[:num_given]
        probes, batch, *_ = next(ops.shape(t) for t in (tangent, *state_tangents) if t is not None)
        first = loop.first_tangents(probes, batch, state_tangents)
        entering = None if tangent is None else loop.cell.push_entering(loop.in_order(tangent, 1))
        return loop.finish(*scan(entering, first, stacked(arguments[num_given:])), axis=2)

    def part_of(part, is_entering: bool):
        def push_weight(u, *residuals):
            batch = _batch_of(loop, residuals, batch_axes)
            first = loop.first_tangents(ops.shape(u)[0], batch)
            entering = part(u, loop.in_order(residuals[-1][0], 0)) if is_entering else None
            return loop.finish(*scan(entering, first, stacked(residuals), [] if is_entering else [(part, u)]), axis=2)

        return push_weight

    parts = [(v, part_of(part, True)) for v, part in loop.cell.entering]
    return Gate(
        push,
        *residuals,
        masks=[*frozen.masks, *[None] * (len(residuals) - len(frozen.masks))],
        weights=[*parts, *((v, part_of(part, False)) for v, part in frozen.weights)],
        batch_axes=batch_axes,
        examples="coupled" if dropped else frozen.examples,
        takes_none=True,
    )


def _batch_of(loop: "_Loop", residuals: Sequence, batch_axes: Sequence):
    """For how many examples residuals are."""
    known = [ops.shape(r)[1 + axis] for r, axis in zip(residuals, batch_axes, strict=True) if axis is not None]
    return known[0] if known else ops.shape(loop.sequences)[0]


def _push_steps(
    loop: "_Loop", frozen: Pushforward, y, x_tangents, state_tangents: list, residuals: list, weights=()
) -> tuple[list, Any]:
    """The tangents of the last states and of all outputs (T, P, …), from those of the inputs and first states."""

    def push(carried, now):
        # The residuals of one step get an axis for the probes, as its pushforward expects.
        x, now = now if x_tangents is not None else (None, now)
        now = [ops.expand_dims(residual, 0) for residual in now]
        frozen_now, kept = now[: len(frozen.residuals)], now[len(frozen.residuals) :]
        images = frozen.function(x, *carried[: loop.num_states], *frozen_now)
        image, *following = plus_parts(images, weights, frozen_now)
        image, following = loop.hold(image, following, carried, kept)
        return following, [image]

    inputs = residuals if x_tangents is None else (x_tangents, residuals)
    like = ops.zeros((*ops.shape(state_tangents[0])[:2], *y.shape[1:]), y.dtype)
    last, (outputs,) = scan_steps(push, loop.start(state_tangents, like), inputs, [like])
    return last, outputs


class _Loop:
    """The loop of a recurrent layer over its cell: the inputs of its steps, and the states that they carry.

    Args:
        layer: the layer.
        sequences: its input, (B, T, …).
        states: the first ones, as its cell takes them.
        mask: which steps count, (B, T); or None.
        cell: its cell, as `cell_of` has it.

    Attributes:
        sequences: the layer's input, (B, T, …).
        steps: (T, B, …), in the order in which they are taken.
        inputs: the steps as the cell takes them, and which of them count if that is known.
        flat_states: the first states.
        num_states: how many there are.
    """

    def __init__(self, layer, sequences, states: list, mask, cell: WholeCell | SplitCell):
        self.cell = cell
        self.sequences = sequences
        self.states = states
        self._layer = layer
        self.flat_states = tree.flatten(states)
        self.num_states = len(self.flat_states)
        self._backwards, self._zero_output_for_mask = layer.go_backwards, layer.zero_output_for_mask
        self.steps = self.in_order(sequences, 0)
        self.inputs: tuple = (cell.enter(self.steps),)
        if mask is not None:
            self.inputs += (self.in_order(ops.cast(mask, "bool"), 0),)
        # On JAX, a masked step returns the last cell's first state, and not what was returned before.
        self._returned_state = None
        if keras.backend.backend() == "jax" and not layer.unroll:
            self._returned_state = self.num_states - len(tree.flatten(states[-1])) if tree.is_nested(states[0]) else 0

    def finish(self, last: Sequence, outputs, axis: int):
        """The outputs (T, …) as the layer returns them: all along `axis`, or the last; and the states if it does."""
        y = ops.moveaxis(outputs, 0, axis) if self._layer.return_sequences else outputs[-1]
        return (y, *last[: self.num_states]) if self._layer.return_state else y

    def finish_primal(self, last: Sequence, outputs):
        """What the layer returns."""
        dtype = self._layer.compute_dtype
        return tree.map_structure(lambda y: ops.cast(y, dtype), self.finish(last, outputs, axis=1))

    def in_order(self, tensor, axis: int):
        """(B, T, …) as steps (T, B, …), or (P, B, T, …) as (T, P, B, …): the time is the second axis from `axis`."""
        steps = ops.moveaxis(tensor, axis + 1, 0)
        return ops.flip(steps, axis=0) if self._backwards else steps

    def start(self, states: list, zeros) -> list:
        """What is carried into the first step: the states, and under a mask also what a masked step returns."""
        masked = len(self.inputs) > 1
        return states + ([zeros if self._returned_state is None else states[self._returned_state]] if masked else [])

    def first_tangents(self, probes, batch, given: Sequence = ()) -> list:
        """The tangents of the first states, `(P, B, …)`: those that are given, otherwise zeros."""
        first = [ops.zeros((probes, batch, *state.shape[1:]), state.dtype) for state in self.flat_states]
        for i, tangent in enumerate(given):
            first[i] = first[i] if tangent is None else ops.cast(tangent, first[i].dtype)
        return first

    def hold(self, y, following: list, carried: list, kept: list) -> tuple:
        """What a step returns and carries on. A masked example keeps its states and its last output (or zeros).

        `kept` holds which examples count in the step; without a mask it is empty.
        """
        if not kept:
            return y, following

        def choose(new, old):
            missing = len(new.shape) - len(kept[0].shape)
            return ops.where(ops.reshape(kept[0], (*ops.shape(kept[0]), *[1] * missing)), new, old)

        following = [choose(new, old) for new, old in zip(following, carried[: self.num_states], strict=True)]
        y = choose(y, ops.zeros_like(y) if self._zero_output_for_mask else carried[self.num_states])
        return y, [*following, y if self._returned_state is None else following[self._returned_state]]

    def freeze(self) -> tuple:
        """The cell, frozen at every step of a scan.

        Returns:
            The pushforward of one step; the output of the first step; what is carried at the end; and, with the steps
            as the first axis, the outputs and the residuals of all steps.
        """
        # The first step runs outside the scan. Every step has the maps of its nodes, with residuals of its own.
        (y, _), frozen = self.cell.step(self.inputs[0][0], self.states)

        def step(carried, now):
            x, *kept = now
            (y, following), pushforward = self.cell.step(x, self._as_states(carried))
            y, following = self.hold(y, tree.flatten(following), carried, kept)
            return following, [y, *pushforward.residuals]

        return frozen, y, *scan_steps(step, self._start_at(y), self.inputs, [y, *frozen.residuals])

    def push_along(self, tangents: Sequence, context) -> tuple[list, tuple | None]:
        """Tangents that go along with the cell in one scan, so that nothing of a step has to be kept.

        Args:
            tangents: of the sequences `(P, B, T, …)`, and of given first states `(P, B, …)`; None: zero.
            context: see `Context`; its `weights` move too.

        Returns:
            The variables that can have tangents, and two pairs: the last carry with the outputs of all steps, and the
            tangents of both; None in place of the pairs if nothing moves.
        """
        (y, _), first = self.cell.step(self.inputs[0][0], self.states)  # only shapes and variables matter
        variables = [variable for variable, _ in self.cell.entering] + first.variables
        moving_weights = [context.weights[id(v)] for v in variables if id(v) in context.weights]
        moved = [tangent for tangent in (*tangents, *moving_weights) if tangent is not None]
        if not moved:
            return variables, None
        entering = [] if tangents[0] is None else [self.cell.push_entering(self.in_order(tangents[0], 1))]
        entering += [p(context.weights[id(v)], self.steps) for v, p in self.cell.entering if id(v) in context.weights]
        state_tangents = self.first_tangents(ops.shape(moved[0])[0], ops.shape(self.inputs[0])[1], tangents[1:])
        image = ops.zeros((*ops.shape(state_tangents[0])[:2], *y.shape[1:]), y.dtype)
        carried = self._start_at(y)

        def step(both, now):
            before, moving = list(both[: len(carried)]), list(both[len(carried) :])
            x, *kept = now[1] if entering else now
            (y, following), pushforward = self.cell.step(x, self._as_states(before))
            images = pushforward(now[0] if entering else None, *moving[: self.num_states])
            moved = [(p, context.weights[id(v)]) for v, p in pushforward.weights if id(v) in context.weights]
            image, *arriving = plus_parts(images, moved, pushforward.broadcast_residuals())
            y, following = self.hold(y, tree.flatten(following), before, kept)
            image, arriving = self.hold(image, arriving, moving, [ops.expand_dims(k, 0) for k in kept])
            return [*following, *arriving], [y, image]

        inputs = (functools.reduce(ops.add, entering), self.inputs) if entering else self.inputs
        last, (outputs, images) = scan_steps(step, [*carried, *self.start(state_tangents, image)], inputs, [y, image])
        return variables, ((last[: len(carried)], outputs), (last[len(carried) :], images))

    def _as_states(self, carried: Sequence):
        return tree.pack_sequence_as(self.states, list(carried[: self.num_states]))

    def _start_at(self, y) -> list:
        return self.start(self.flat_states, ops.zeros_like(y))


@register_rule(layers.Bidirectional)
def bidirectional(layer, sequences, context, mask=None):
    """As the layer's own call, but without the kernels that run both directions at once and cannot be opened up."""
    if layer.return_state:
        raise Declined("it returns its states")

    def call(sequences, mask=None):
        forward, backward = (half(sequences, mask=mask) for half in (layer.forward_layer, layer.backward_layer))
        if layer.return_sequences:
            backward = ops.flip(backward, axis=1)
        merge = {"sum": ops.add, "mul": ops.multiply, None: lambda *both: both}
        merge["concat"] = lambda *both: ops.concatenate(both, axis=-1)
        merge["ave"] = lambda *both: ops.add(*both) / 2
        return merge[layer.merge_mode](forward, backward)

    return context.linearize(call, sequences, mask=mask)
