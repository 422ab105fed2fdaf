"""Recurrent cells in two parts: which ones are, and that both parts do what the whole cell does."""

import keras
import pytest
from compare import assert_close, normal, randomize
from keras import layers

import jvpreg
from jvpreg.rules import cells, recurrent
from jvpreg.rules.contract import Context

JAX = keras.backend.backend() == "jax"

KINDS = {
    "SimpleRNN": lambda: layers.SimpleRNN(4, return_sequences=True),
    "LSTM": lambda: layers.LSTM(4, return_state=True),
    "LSTM, other functions": lambda: layers.LSTM(4, activation="softsign", recurrent_activation="softplus"),
    "LSTM without bias": lambda: layers.LSTM(4, use_bias=False),
    "GRU": lambda: layers.GRU(4, go_backwards=True),
    "GRU without bias": lambda: layers.GRU(4, use_bias=False, return_sequences=True),
    "GRUCell": lambda: layers.RNN(layers.GRUCell(4)),
}

WHOLE = {
    "an activation without a derivative": lambda: layers.SimpleRNN(4, activation="relu"),
    "one that mixes numbers": lambda: layers.GRU(4, activation="softmax"),
    "dropout": lambda: layers.LSTM(4, recurrent_dropout=0.1),
    "a reset gate before the product": lambda: layers.GRU(4, reset_after=False),
    "a precision of its own": lambda: layers.RNN(layers.LSTMCell(4, dtype="mixed_bfloat16"), dtype="float32"),
    "several cells": lambda: layers.RNN([layers.GRUCell(4), layers.LSTMCell(4)]),
}


def built(make):
    layer = make()
    layer.build((2, 5, 3))
    return layer


@pytest.mark.parametrize("kind", [*KINDS, *WHOLE])
def test_which_cells_are_split(kind):
    layer = built((KINDS | WHOLE)[kind])
    found = cells.cell_of(layer, Context(training=True, xla=False), "float32")
    assert isinstance(found, cells.SplitCell) == (kind in KINDS and not JAX)
    assert isinstance(cells.cell_of(layer, Context(xla=True), "float32"), cells.WholeCell)


@pytest.mark.slow
@pytest.mark.skipif(JAX, reason="no cell is split there")
@pytest.mark.parametrize("kind", KINDS)
def test_the_parts_are_the_whole_cell(float64, monkeypatch, kind):
    """Products along the input and along every weight, of a frozen model and of tangents that go along with `x`."""
    x = keras.Input((5, 3))
    model = randomize(keras.Model(x, built(KINDS[kind])(x)))
    x, u = normal(2, 5, 3), normal(3, 2, 5, 3, seed=1)
    moved = [(v, normal(3, *v.shape, seed=i)) for i, v in enumerate(model.trainable_variables)]

    def found():
        lin = jvpreg.linearize(model, x)
        each = [lin.jvp(weights=[pair]) for pair in moved]
        return [lin.outputs, lin.jvp(u), lin.jvp(u, weights=moved), each, jvpreg.jvp(model, x, u)]

    def along():
        return [jvpreg.weight_jvp(model, x, moved), [jvpreg.weight_jvp(model, x, [pair]) for pair in moved]]

    split = [found(), along()]
    monkeypatch.setattr(
        recurrent, "cell_of", lambda layer, context, dtype: cells.WholeCell(layer.cell, context.linearize)
    )
    assert_close(split, [found(), along()])


@pytest.mark.skipif(JAX, reason="no cell is split there")
def test_what_a_split_cell_freezes():
    """An LSTM freezes seven numbers for each unit and step: three tensors of its width, and one of four times that."""
    model = keras.Sequential([keras.Input((5, 3)), layers.LSTM(4)])
    x = keras.ops.convert_to_tensor(normal(2, 5, 3).astype("float32"))
    (node,) = jvpreg.linearize(model, x).nodes
    *frozen, sequences = node.pushforward.residuals
    assert sorted(tuple(residual.shape) for residual in frozen) == [(5, 2, 4)] * 3 + [(5, 2, 16)]
    assert tuple(sequences.shape) == (2, 5, 3)
