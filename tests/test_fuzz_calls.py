"""Random programs within a `call`, as users write them: products against what the layer computes, in float64.

The programs have keyword tensors and dicts, whole numbers among the inputs, layers within layers, control flow that
closes over values, axes that move and come back, several outputs, and weights of the layer's own. Hypothesis makes a
program that fails as short as it can, and prints it: add it to `NAMED` then.
`pytest tests/test_fuzz_calls.py --fuzz-calls 500` checks more of them.
"""

import keras
import numpy as np
import pytest
from compare import inner, norm, normal, numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from keras import layers, ops, tree

import jvpreg

pytestmark = [pytest.mark.filterwarnings("ignore:Some nodes of"), pytest.mark.usefixtures("float64")]
BATCH, SIZE = 2, 4


class Keywords(layers.Layer):
    """Its tensors come by keywords that are not in alphabetical order; two of them are in a dict."""

    def call(self, scale=None, base=None, others=None):
        return ops.tanh(scale) * 2.0 + base * others["z"] - ops.sin(others["a"])


class Program(layers.Layer):
    """Runs steps on the values that there are so far, all of them `(B, SIZE)`; the last two are its outputs.

    Each step is the name of an operation and the places of its operands, counted modulo the number of values; a step
    that is itself a list of steps is a layer within the layer.
    """

    def __init__(self, steps, heads=1, **kwargs):
        super().__init__(**kwargs)
        self.steps, self.heads = steps, heads
        self.inner = [self._layer_of(step) for step in steps]

    def _layer_of(self, step):
        if isinstance(step, list):
            return Program(step, dtype=self.dtype_policy)
        made = {
            "dense": lambda: layers.Dense(SIZE, activation="tanh", dtype=self.dtype_policy),
            "normalize": lambda: layers.LayerNormalization(dtype=self.dtype_policy),
            "keywords": lambda: Keywords(dtype=self.dtype_policy),
            "embed": lambda: layers.Embedding(7, SIZE, dtype=self.dtype_policy),
            "distribute": lambda: layers.TimeDistributed(layers.Dense(2, dtype=self.dtype_policy)),
        }
        return made[step[0]]() if step[0] in made else None

    def build(self, shape):
        self.w = self.add_weight(shape=(SIZE, SIZE), initializer="glorot_uniform")

    def call(self, inputs):
        values = [inputs["b"], inputs["a"]]
        for step, layer in zip(self.steps, self.inner, strict=True):
            if isinstance(step, list):
                values.append(layer({"ids": inputs["ids"], "a": values[-1], "b": values[0]}))
            else:
                x, y = (values[place % len(values)] for place in step[1:])
                values.append(self._run(step[0], layer, x, y, inputs["ids"]))
        return {"q": values[-1], "p": values[-2]} if self.heads == 2 else values[-1]

    def _run(self, name, layer, x, y, ids):
        w, first = self.w, self.w[0]
        run = {
            "dense": lambda: layer(x),
            "normalize": lambda: layer(x + 2.0 * y),
            "keywords": lambda: layer(scale=x, base=y, others={"z": y + 1.0, "a": x}),
            "embed": lambda: ops.mean(layer(ids), axis=1) * x,
            "distribute": lambda: ops.reshape(layer(ops.stack([x, y], axis=2)), (-1, 2 * SIZE))[:, :SIZE],
            "multiply": lambda: ops.matmul(x, w) * y,
            "largest": lambda: ops.maximum(x, 0.3 * y),
            "where": lambda: ops.where(ops.logical_or(ops.isnan(x), x > y), ops.sin(x), y * y),
            "rows by top_k": lambda: ops.sum(ops.take(w, ops.top_k(x, 2)[1], axis=0), axis=1) + ops.softmax(y),
            "tokens": lambda: ops.take(w, ops.cast(ids[:, 0], "int32") % SIZE, axis=0) * x,
            "deviation": lambda: x / (1.0 + ops.std(y, axis=-1, keepdims=True)) ** 2,
            "transpose": lambda: ops.transpose(ops.tanh(ops.transpose(x))) + y,
            "cond": lambda: ops.cond(ops.sum(x) > 0, lambda: ops.sin(y) * x, lambda: 2.0 * x),
            "fori_loop": lambda: ops.fori_loop(0, 2, lambda i, z: ops.tanh(ops.matmul(z, w) + y), x),
            "map": lambda: ops.map(lambda row: row * ops.sum(first), x) + y,
            "switch": lambda: ops.switch(1, [lambda z: z, lambda z: ops.matmul(z, w) * 0.5], x) + y,
            "vectorized_map": lambda: ops.vectorized_map(lambda row: ops.tanh(row) * first, x) * y,
        }
        return run[name]()


NAMES = [
    *("dense", "normalize", "keywords", "embed", "distribute", "multiply", "largest", "where", "tokens", "deviation"),
    *("transpose", "cond", "fori_loop", "map", "switch", "vectorized_map", "rows by top_k"),
]
STEP = st.tuples(st.sampled_from(NAMES), st.integers(0, 3), st.integers(0, 3))
PROGRAM = st.lists(st.one_of(STEP, STEP, STEP, st.lists(STEP, min_size=1, max_size=2)), min_size=1, max_size=4)


def check(steps, heads):
    keras.utils.set_random_seed(0)
    inputs = {
        "a": keras.Input((SIZE,), name="a"),
        "ids": keras.Input((3,), dtype="int32", name="ids"),
        "b": keras.Input((SIZE,), name="b"),
    }
    model = keras.Model(inputs, Program(steps, heads, dtype="float64")(inputs))
    for i, variable in enumerate(model.trainable_variables):
        variable.assign(0.7 * normal(*variable.shape, seed=10 + i))
    x = {"a": normal(BATCH, SIZE), "b": normal(BATCH, SIZE, seed=1), "ids": np.array([[6, 0, 2], [3, 3, 5]])}
    u = {"a": normal(BATCH, SIZE, seed=2), "b": normal(BATCH, SIZE, seed=3), "ids": None}
    lin = jvpreg.linearize(model, x)
    flat = [numpy(y) for y in tree.flatten(lin.outputs)]
    difference = [a - numpy(b) for a, b in zip(flat, tree.flatten(model(x)), strict=True)]
    assert norm(difference) <= 1e-12 * (1 + norm(flat))

    def slope(values_at):
        step = 1e-6
        pairs = zip(tree.flatten(values_at(step)), tree.flatten(values_at(-step)), strict=True)
        return [(numpy(a) - numpy(b)) / (2 * step) for a, b in pairs]

    def same(received, expected):
        difference = [numpy(a) - b for a, b in zip(tree.flatten(received), expected, strict=True)]
        assert norm(difference) <= 1e-7 * (1 + norm(expected))

    moved = slope(lambda step: model({key: x[key] + step * u[key] if u[key] is not None else x[key] for key in x}))
    same(lin.jvp(u), moved)
    same(jvpreg.jvp(model, x, u)[1], moved)
    v = [normal(*y.shape, seed=4 + i) for i, y in enumerate(flat)]
    pulled = lin.vjp(tree.pack_sequence_as(lin.outputs, v))
    back = sum(np.sum(numpy(pulled[key]) * u[key]) for key in ("a", "b"))
    assert abs(inner(moved, v) - back) <= 1e-6 * (1 + norm(moved) * norm(v))
    before = model.get_weights()
    directions = [normal(*variable.shape, seed=30 + i) for i, variable in enumerate(model.trainable_variables)]

    def with_weights(step):
        for variable, value, direction in zip(model.trainable_variables, before, directions, strict=True):
            variable.assign(value + step * direction)
        return model(x)

    expected = slope(with_weights)
    model.set_weights(before)
    # If no output depends on a variable, the linearization does not list it; moving it must then make no difference.
    pairs = zip(model.trainable_variables, directions, strict=True)
    used = [(variable, moved) for variable, moved in pairs if any(variable is known for known in lin.weights)]
    same(lin.jvp(weights=used) if used else [0 * y for y in flat], expected)


# Programs that failed once.
NAMED = {
    "a loop beside tokens": [("fori_loop", 0, 1), ("tokens", 2, 0)],
    "tokens of a weight within a branch": [("cond", 0, 1), ("tokens", 2, 0), ("fori_loop", 3, 2)],
    "keywords within a layer": [[("keywords", 0, 1)], ("largest", 2, 1)],
    "rows of a weight by top_k": [("rows by top_k", 0, 1)],
    "a branch that closes over a layer's output": [("dense", 0, 0), ("cond", 2, 1)],
}


@pytest.mark.parametrize("name", NAMED)
def test_named(name):
    check(NAMED[name], heads=2)


@pytest.mark.slow
def test_programs(request):
    @settings(
        max_examples=request.config.getoption("--fuzz-calls"),
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(PROGRAM, st.integers(1, 2))
    def run(steps, heads):
        check(steps, heads)

    run()
