"""Loops and branches in a `call`: frozen, with products and gradients of weights through their bodies."""

import keras
import numpy as np
import pytest
from calls import Call, check_call, in_graph
from compare import assert_close, normal, numpy
from keras import ops

import jvpreg
from jvpreg.engine.transpose import transpose

# Each closes over the input, the weight, or both; `map` and `scan` go along the first axis.
CONTROL_FLOW = {
    "fori_loop": lambda x, w: ops.fori_loop(0, 3, lambda i, z: ops.tanh(ops.matmul(z, w) + x), ops.zeros_like(x)),
    "while_loop": lambda x, w: ops.while_loop(
        lambda i, z: i < 3,
        lambda i, z: (i + 1, ops.tanh(ops.matmul(z, w) + x)),
        (0, ops.zeros_like(x)),
        maximum_iterations=5,
    )[1],
    "cond": lambda x, w: ops.cond(ops.sum(x * x) > 0, lambda: ops.sin(ops.matmul(x, w)), lambda: 2.0 * x),
    "switch": lambda x, w: ops.switch(1, [lambda z: 2.0 * z, lambda z: ops.matmul(z * x, w)], x),
    "map": lambda x, w: ops.map(lambda row: ops.matmul(row, w) * ops.sum(x[0]), x),
    "vectorized_map": lambda x, w: ops.vectorized_map(lambda row: ops.tanh(ops.matmul(row, w)) * x[0, 0], x),
    "associative_scan": lambda x, w: ops.associative_scan(lambda a, b: a * b * w[0, 0], x, axis=1),
    "scan": lambda x, w: ops.scan(
        lambda z, row: (ops.tanh(ops.matmul(z, w) + row[:, None] + x), z * row[:, None]), x, ops.moveaxis(x, 1, 0)
    )[0],
    "a long fori_loop": lambda x, w: ops.fori_loop(
        3, 20, lambda i, z: ops.tanh(ops.matmul(z, w) + x * ops.cast(i, x.dtype) / 20), ops.zeros_like(x)
    ),
    "a long scan": lambda x, w: ops.scan(
        lambda z, row: (ops.tanh(ops.matmul(z, w) + row + x), ops.matmul(z, w) * row),
        x,
        ops.stack([x * i / 17 for i in range(17)]),
        reverse=True,
    )[1],
    "a while_loop by what it carries": lambda x, w: ops.while_loop(
        lambda z: ops.sum(z * z) > 1e-2, lambda z: (ops.sin(ops.matmul(z, 0.5 * w)) + 0.1 * z,), (x,)
    )[0],
    "the other branch": lambda x, w: ops.cond(ops.sum(x * x) < 0, lambda: x / 0.0, lambda: ops.matmul(x, w)),
    "a known branch": lambda x, w: ops.cond(True, lambda: ops.matmul(x, w), lambda: x / 0.0),
    "a switch by what it sees": lambda x, w: ops.switch(
        ops.cast(ops.argmax(x[0]), "int32"),
        [ops.sin, lambda z: ops.sin(z) * w[0, 0], lambda z: z * ops.matmul(x, w)],
        x,
    ),
    "a loop in a branch in a loop": lambda x, w: ops.fori_loop(
        0,
        18,
        lambda i, z: ops.cond(
            i % 2 == 0, lambda: ops.fori_loop(0, 2, lambda j, y: ops.sin(ops.matmul(y, w) + x), z), lambda: z * x
        ),
        x,
    ),
    "a loop from constants": lambda x, w: ops.fori_loop(
        0, 2, lambda i, z: ops.tanh(ops.matmul(z, w) + x), ops.zeros((2, 3), dtype="float64")
    ),
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", CONTROL_FLOW)
def test_control_flow(kind):
    if kind == "associative_scan" and keras.backend.backend() == "torch":
        pytest.skip("Keras computes it in 32 bits there, too few for finite differences")
    assert check_call(CONTROL_FLOW[kind], normal(2, 3)).fallbacks == {}


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
def test_control_flow_in_training():
    """The penalty's step in the compiled function, against the same layer written out."""

    def loop(x, w):
        return ops.fori_loop(0, 17, lambda i, z: ops.tanh(ops.matmul(z, w) + x), ops.zeros_like(x))

    def written_out(x, w):
        z = ops.zeros_like(x)
        for _ in range(17):
            z = ops.tanh(ops.matmul(z, w) + x)
        return z

    x, found = normal(4, 3), []
    for function in (loop, written_out):
        keras.utils.set_random_seed(0)
        model = jvpreg.JacobianModel(keras.Sequential([keras.Input((3,)), Call(function)]), seed=0)
        model.compile(keras.optimizers.SGD(0.1), "mse", jacobian_regularizers=[jvpreg.regularizers.JacobianNorm(0.1)])
        history = model.fit(x, x, batch_size=4, epochs=2, verbose=0).history
        found.append((history["frobenius_norm_squared"], model.base.get_weights()))
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-8)
    assert_close(found[0][1], found[1][1], 1e-8)


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "kind", ["a long scan", "while_loop", "the other branch", "a loop in a branch in a loop", "map", "vectorized_map"]
)
def test_the_gradient_of_a_penalty_in_a_graph(kind):
    """Against finite differences. In a graph, how often and where a loop or branch goes is known only when it runs."""
    layer, x, u, moved = Call(CONTROL_FLOW[kind]), normal(2, 3), normal(2, 3, seed=1), normal(3, 3, seed=3)
    layer(x)

    def penalty(w, x):
        with keras.StatelessScope(state_mapping=[(layer.w, w)]):
            return ops.sum(ops.square(jvpreg.linearize(layer, x, fallback="error").jvp(u)))

    def gradient(w, x):
        return transpose(lambda weights: [penalty(weights[0], x)], [w], [ops.ones((), w.dtype)])[0]

    w, step = numpy(layer.w), 1e-5
    values = [numpy(penalty(ops.convert_to_tensor(w + sign * step * moved), x)) for sign in (1, -1)]
    slope = (values[0] - values[1]) / (2 * step)
    assert abs(slope) > 1e-4
    tensors = [ops.convert_to_tensor(w), ops.convert_to_tensor(x)]
    found = [in_graph(gradient, *tensors)]
    if keras.backend.backend() == "tensorflow":
        found.append(jvpreg.testing.compiled(gradient)(*tensors))  # by XLA
    for one in found:
        np.testing.assert_allclose(np.sum(numpy(one) * moved), slope, rtol=1e-6)


CUT = {
    **{name: CONTROL_FLOW[name] for name in ("a long fori_loop", "while_loop")},
    "a long scan of rows": lambda x, w: ops.scan(
        lambda z, row: (ops.tanh(ops.matmul(z, w) + row), z * row), ops.zeros_like(x), ops.stack([x] * 17)
    )[1][5],
    "map": lambda x, w: ops.map(lambda row: ops.tanh(ops.matmul(row, w)), x),
    "cond": CONTROL_FLOW["cond"],
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", CUT)
def test_a_part_of_the_batch(kind):
    layer, x, u = Call(CUT[kind]), normal(4, 3), normal(4, 3, seed=1)
    layer(x)
    lin, moved = jvpreg.linearize(layer, x, fallback="error"), normal(3, 3, seed=2)
    part = lin.take([2, 1])
    assert_close(part.jvp(u[[2, 1]]), numpy(lin.jvp(u))[[2, 1]], 1e-10)
    assert_close(part.jvp(weights=[(layer.w, moved)]), numpy(lin.jvp(weights=[(layer.w, moved)]))[[2, 1]], 1e-10)
