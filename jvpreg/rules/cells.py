"""The cell of a recurrent layer: what is done to each step's input, and what is done to the states.

Without XLA, Keras' own cells are split in two. Their map of the input is affine and the same at every step, so it is
computed for all steps at once. What is left of a step is one product with the last output, and few frozen slopes.
(XLA fuses the operations of a whole cell, and reads its products from the cache.)
"""

from collections.abc import Callable, Sequence
from typing import Any

from keras import layers, ops

from jvpreg.rules.contract import Context, Pushforward
from jvpreg.rules.registry import find_rule


class WholeCell:
    """A cell that runs at each step as it is, by its own rule or opened up.

    Attributes:
        entering: a pair for each weight with which `enter` multiplies: the weight, and `part(u, steps)`, the tangent
            `(T, P, B, …)` of what `enter` returns, for a tangent `u` `(P, …)` of the weight.
    """

    entering: Sequence[tuple[Any, Callable]] = ()

    def __init__(self, cell, run: Any):
        self._cell, self._run = cell, run

    def enter(self, steps):
        """The inputs of all steps (T, B, …) as `step` takes them."""
        return steps

    def push_entering(self, tangents):
        """The tangents of what `enter` returns, from those of the inputs, (T, P, B, …)."""
        return tangents

    def step(self, x, states) -> tuple[tuple, Pushforward]:
        """The output and the new states of one step, and the step's pushforward from tangents of x and the states."""
        return self._run(self._cell, x, states)


class SplitCell:
    """One of Keras' own cells, as `WholeCell`, but with the product with the input computed for all steps at once."""

    def __init__(self, cell, dtype):
        self._cell = cell
        self._kernel, self._recurrent_kernel = (ops.cast(w, dtype) for w in (cell.kernel, cell.recurrent_kernel))
        self._bias = None if cell.bias is None else ops.cast(cell.bias, dtype)
        self.entering = [(cell.kernel, self._push_kernel)]

    def enter(self, steps):
        """`x W + b` of all steps."""
        entered = _product(steps, self._kernel)
        if self._bias is None:
            return entered
        # The bias of a GRU has a row for the input and one for the states.
        return entered + (self._bias if len(self._bias.shape) == 1 else self._bias[0])

    def push_entering(self, tangents):
        """`t W` of all steps."""
        return _product(tangents, self._kernel)

    def step(self, x, states) -> tuple[tuple, Pushforward]:
        """The rest of a step, once its input has entered."""
        return _STEPS[type(self._cell)](self._cell, x, *states, self._recurrent_kernel, self._bias)

    def _push_kernel(self, u, steps):
        count, batch, *_ = ops.shape(steps)
        flat = ops.reshape(steps, (-1, steps.shape[-1]))
        entered = ops.matmul(flat, ops.cast(u, steps.dtype))
        split = ops.reshape(entered, (ops.shape(u)[0], count, batch, entered.shape[-1]))
        return ops.moveaxis(split, 0, 1)


def cell_of(layer, context: Context, dtype) -> WholeCell | SplitCell:
    """The cell of a recurrent layer, split where that is faster.

    It is not split if it has dropout, a precision of its own, or an activation without a derivative.
    """
    cell = layer.cell
    dropped = context.training and any(getattr(cell, name, 0) for name in ("dropout", "recurrent_dropout"))
    resets_before = isinstance(cell, layers.GRUCell) and not cell.reset_after  # the product with the last output
    functions = [getattr(cell, name) for name in ("activation", "recurrent_activation") if hasattr(cell, name)]
    smooth = all(_derivative(function) is not None for function in functions)
    mixed = cell.compute_dtype != layer.compute_dtype
    if context.under_xla or mixed or type(cell) not in _STEPS or dropped or resets_before or not smooth:
        return WholeCell(cell, context.linearize_step)
    return SplitCell(cell, dtype)


def _derivative(function) -> Callable | None:
    rule = find_rule(function)
    return None if rule is None else rule.derivative


def _activate(function, x) -> tuple:
    """An activation, and its slope."""
    y = function(x)
    derivative = _derivative(function)
    assert derivative is not None
    return y, derivative(x, y)


def _product(tensor, kernel):
    """The product of a tensor (…, D) with a matrix (D, E), computed as a product of two matrices."""
    flat = ops.matmul(ops.reshape(tensor, (-1, kernel.shape[0])), kernel)
    return ops.reshape(flat, (*ops.shape(tensor)[:-1], kernel.shape[1]))


def _arriving(x, h, kernel):
    """The tangent before the activations, from that of what entered (None for zero) and that of the last output."""
    arrived = _product(h, kernel)
    return arrived if x is None else x + arrived


def _parts(cell, h, push: Callable) -> list:
    """The parts of the recurrent kernel and the bias: `push` takes their tangents on, from before the activations."""

    def along_kernel(u, *residuals):
        return push(ops.matmul(residuals[-1], ops.cast(u, h.dtype)), *residuals)

    def along_bias(u, *residuals):
        return push(ops.expand_dims(ops.cast(u, h.dtype), -2), *residuals)

    return [(cell.recurrent_kernel, along_kernel), (cell.bias, along_bias)]


# In each: x is what entered and h the last output. The last residual is h, for tangents of the recurrent kernel.


def _simple_rnn(cell, x, h, kernel, bias):
    y, slope = _activate(cell.activation, x + ops.matmul(h, kernel))

    def move(z, slope, h):
        return (slope * z,) * 2

    def push(x, h, *residuals):
        return move(_arriving(x, h, kernel), *residuals)

    return (y, [y]), Pushforward(push, slope, h, weights=_parts(cell, h, move), takes_none=True)


def _lstm(cell, x, h, c, kernel, bias):
    z_input, z_forget, z_candidate, z_output = ops.split(x + ops.matmul(h, kernel), 4, axis=-1)
    keep, keep_slope = _activate(cell.recurrent_activation, z_forget)
    write, write_slope = _activate(cell.recurrent_activation, z_input)
    read, read_slope = _activate(cell.recurrent_activation, z_output)
    candidate, candidate_slope = _activate(cell.activation, z_candidate)
    carry = keep * c + write * candidate
    seen, seen_slope = _activate(cell.activation, carry)
    y = read * seen
    slopes = [candidate * write_slope, c * keep_slope, write * candidate_slope, seen * read_slope]

    def move(z, slopes, keep, through, h, c=None):
        by_input, by_forget, by_candidate, by_output = ops.split(slopes * z, 4, axis=-1)
        carry = by_input + by_forget + by_candidate
        carry = carry if c is None else carry + keep * c
        y = by_output + through * carry
        return y, y, carry

    def push(x, h, c, slopes, keep, through, before):
        return move(_arriving(x, h, kernel), slopes, keep, through, before, c)

    residuals = ops.concatenate(slopes, axis=-1), keep, read * seen_slope, h
    return (y, [y, carry]), Pushforward(push, *residuals, weights=_parts(cell, h, move), takes_none=True)


def _gru(cell, x, h, kernel, bias):
    recurrent = ops.matmul(h, kernel) if bias is None else ops.matmul(h, kernel) + bias[1]
    (x_update, x_reset, x_candidate), (h_update, h_reset, h_candidate) = (
        ops.split(z, 3, axis=-1) for z in (x, recurrent)
    )
    keep, keep_slope = _activate(cell.recurrent_activation, x_update + h_update)
    reset, reset_slope = _activate(cell.recurrent_activation, x_reset + h_reset)
    candidate, candidate_slope = _activate(cell.activation, x_candidate + reset * h_candidate)
    y = keep * h + (1 - keep) * candidate
    through = (1 - keep) * candidate_slope
    both = [(h - candidate) * keep_slope, through * h_candidate * reset_slope]
    of_x, of_h = (ops.concatenate([*both, last], axis=-1) for last in (through, through * reset))

    def total(moved):
        by_update, by_reset, by_candidate = ops.split(moved, 3, axis=-1)
        return by_update + by_reset + by_candidate

    def push(x, h, of_x, of_h, keep, _):
        moved = of_h * _product(h, kernel)
        y = keep * h + total(moved if x is None else moved + of_x * x)
        return y, y

    def along_kernel(u, of_x, of_h, keep, h):
        return (total(of_h * ops.matmul(h, ops.cast(u, h.dtype))),) * 2

    def along_bias(u, of_x, of_h, keep, h):
        of_input, of_states = ops.unstack(ops.expand_dims(ops.cast(u, h.dtype), -2), axis=1)
        return (total(of_x * of_input + of_h * of_states),) * 2

    weights = [(cell.recurrent_kernel, along_kernel), (cell.bias, along_bias)]
    return (y, [y]), Pushforward(push, of_x, of_h, keep, h, weights=weights, takes_none=True)


_STEPS: dict[type, Callable] = {layers.SimpleRNNCell: _simple_rnn, layers.LSTMCell: _lstm, layers.GRUCell: _gru}
