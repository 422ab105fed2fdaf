"""Models in which the first axis is not the batch for a while: examples are apart in the end, or really mixed."""

import keras
import numpy as np
import pytest
from compare import normal, numpy, randomize
from keras import layers, ops

import jvpreg

pytestmark = pytest.mark.usefixtures("float64")


class Call(layers.Layer):
    """A function of `x` and of two layers that it may use."""

    def __init__(self, function):
        super().__init__()
        self.function, self.dense, self.convolution = function, layers.Dense(4, "tanh"), layers.Conv1D(4, 2)

    def build(self, shape):
        self.dense.build((None, 4))
        self.convolution.build((None, 5, 4))

    def call(self, x):
        return self.function(self, x)


def by_steps(layer, x):
    return ops.transpose(layer.dense(ops.transpose(x, (1, 0, 2))), (1, 0, 2))


def by_steps_with_operations(layer, x):
    z = ops.moveaxis(x, 0, 1)
    z = ops.softmax(z * ops.mean(z, axis=-1, keepdims=True) + ops.sum(z, axis=0)) + ops.maximum(z, z[0])
    z = ops.concatenate([z, ops.tanh(ops.flip(z, axis=0))], axis=-1) ** 2.0
    return ops.moveaxis(z, 1, 0)


def merged(layer, x):
    z = layer.dense(ops.reshape(x, (-1, 4)))
    return ops.reshape(z * ops.sigmoid(z), (-1, 5, 4))


def merged_behind_time(layer, x):
    z = ops.reshape(ops.swapaxes(x, 0, 1), (-1, 4))
    return ops.swapaxes(ops.reshape(layer.dense(z), (5, -1, 4)), 0, 1)


def scanned(layer, x):
    """A recurrence written out, over steps that are taken off the front."""
    state, states = ops.zeros_like(x[:, 0]), []
    for step in ops.unstack(ops.transpose(x, (1, 0, 2)), axis=0):
        state = layer.dense(step + state)
        states.append(state)
    return ops.transpose(ops.stack(states, axis=0), (1, 0, 2))


def multiplied(layer, x):
    z = ops.einsum("btd,de->tbe", x, ops.convert_to_tensor(normal(4, 3)))
    return ops.tanh(ops.einsum("tbe,sbe->bts", z, z))


APART = {
    "TimeDistributed": lambda: layers.TimeDistributed(layers.Dense(3, "tanh")),
    "TimeDistributed-convolution": lambda: keras.Sequential(
        [layers.Reshape((5, 2, 2, 1)), layers.TimeDistributed(layers.Conv2D(2, 2, activation="relu"))]
    ),
    "TimeDistributed-nested": lambda: keras.Sequential(
        [layers.Reshape((5, 2, 2)), layers.TimeDistributed(layers.TimeDistributed(layers.Dense(3, "tanh")))]
    ),
    "transposed": lambda: Call(by_steps),
    "transposed-operations": lambda: Call(by_steps_with_operations),
    "merged": lambda: Call(merged),
    "merged-behind-time": lambda: Call(merged_behind_time),
    "scanned": lambda: Call(scanned),
    "multiplied": lambda: Call(multiplied),
}
# Models from which examples can be cut: nothing is frozen in them while the first axis is not the batch.
CUT = ["TimeDistributed", "TimeDistributed-convolution", "TimeDistributed-nested", "scanned"]


def centered(layer, x):
    z = ops.transpose(x, (1, 0, 2))
    return ops.transpose(z - ops.mean(z, axis=1, keepdims=True), (1, 0, 2))


def attended(layer, x):
    return ops.matmul(ops.softmax(ops.einsum("btd,ctd->tbc", x, x)), ops.swapaxes(x, 0, 1))[0]


def convolved(layer, x):
    return ops.transpose(layer.convolution(ops.transpose(x, (1, 0, 2))), (1, 0, 2))


def added_to_another(layer, x):
    return x + ops.transpose(ops.flip(ops.transpose(x, (1, 0, 2)), axis=1), (1, 0, 2))


MIXED = [centered, attended, convolved, added_to_another]


def made(layer):
    keras.utils.set_random_seed(0)
    x = keras.Input((5, 4))
    return randomize(keras.Model(x, layers.Dense(2)(layers.Flatten()(layer(x))))), normal(5, 5, 4)


@pytest.mark.parametrize("name", APART)
def test_examples_that_are_apart_in_the_end(name):
    model, x = made(APART[name]())
    lin = jvpreg.linearize(model, x, fallback="error")
    jacobian = numpy(lin.jacobian())
    assert jacobian.shape == (5, 2, 5, 4)
    alone = np.concatenate([numpy(jvpreg.jacobian(model, x[i : i + 1])) for i in range(3)])
    np.testing.assert_allclose(jacobian[:3], alone, rtol=1e-10, atol=1e-14)
    step, u = 1e-5, normal(5, 5, 4, seed=1)
    differences = (numpy(model(x + step * u)) - numpy(model(x - step * u))) / (2 * step)
    np.testing.assert_allclose(np.einsum("bktd,btd->bk", jacobian, u), differences, rtol=1e-6, atol=1e-7)
    full = jvpreg.full_jacobian(lin, None)
    assert numpy(full.completeness_error()).max() < 1e-12
    # The contributions of the nodes to an example do not depend on the other examples of its batch.
    one = jvpreg.full_jacobian(model, x[3:4])
    assert one.bias_jacobians.keys() == full.bias_jacobians.keys()
    for node, contribution in full.bias_jacobians.items():
        np.testing.assert_allclose(numpy(contribution)[3:4], numpy(one.bias_jacobians[node]), rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("name", APART)
def test_a_part_of_the_batch(name):
    model, x = made(APART[name]())
    lin = jvpreg.linearize(model, x)
    if name not in CUT:
        with pytest.raises(ValueError, match=r"moves the examples of a batch from its first axis cannot be cut"):
            lin.take([3, 1])
        return
    part = lin.take([3, 1])
    np.testing.assert_allclose(numpy(part.jacobian()), numpy(lin.jacobian())[[3, 1]], rtol=1e-12)
    whole, cut = (jvpreg.full_jacobian(each, None, target=np.array([1] * n)) for each, n in ((lin, 5), (part, 2)))
    assert numpy(cut.completeness_error()).max() < 1e-12
    for node, contribution in cut.bias_jacobians.items():
        np.testing.assert_allclose(
            numpy(contribution), numpy(whole.bias_jacobians[node])[[3, 1]], rtol=1e-9, atol=1e-14
        )


@pytest.mark.parametrize("function", MIXED)
def test_examples_that_are_mixed_are_refused(function):
    model, x = made(Call(function))
    lin = jvpreg.linearize(model, x, fallback="error")
    for ask in (lin.jacobian, lambda: lin.take([0])):
        with pytest.raises(ValueError, match=r"couples the examples of a batch"):
            ask()


class Function(layers.Layer):
    """A layer without weights."""

    def __init__(self, function):
        super().__init__()
        self.function, self.built = function, True

    def call(self, x):
        return self.function(x)


def of_the_batch(function):
    """A layer that multiplies `x` by `function(x)`, which depends on the whole batch and has no tangent."""
    return Function(lambda x: x * function(ops.stop_gradient(x)) + ops.tanh(x))


def frozen_gram(x):
    frozen = ops.reshape(ops.stop_gradient(x), (-1, 20))
    return ops.reshape(ops.reshape(x, (-1, 20)) @ (ops.transpose(frozen) @ frozen), (-1, 5, 4))


# Values without a tangent may be common to all examples, or belong to each: only the latter are cut.
WHOLE = {
    "mean": lambda: of_the_batch(lambda x: ops.mean(x, axis=0)),
    "largest": lambda: of_the_batch(lambda x: ops.max(x)),
    "kept": lambda: of_the_batch(lambda x: ops.max(x, axis=0, keepdims=True)),
    "any": lambda: of_the_batch(lambda x: ops.cast(ops.any(x > 0.8, axis=0), x.dtype)),
    "sign": lambda: of_the_batch(lambda x: ops.sum(ops.sign(x), axis=0)),
    "winner": lambda: of_the_batch(lambda x: ops.cast(ops.argmax(x, axis=0), x.dtype)),
    "one": lambda: of_the_batch(lambda x: x[1]),
    "softmax": lambda: of_the_batch(lambda x: ops.softmax(x, axis=0)),
    "own": lambda: of_the_batch(lambda x: ops.max(x, axis=1, keepdims=True)),
    "whitened": lambda: Function(lambda x: (x - ops.mean(ops.stop_gradient(x), 0)) / ops.std(ops.stop_gradient(x), 0)),
    "larger": lambda: Function(lambda x: ops.maximum(x, ops.mean(ops.stop_gradient(x), axis=0))),
    "chosen": lambda: Function(lambda x: ops.where(ops.any(x > 0.8, axis=0), x, ops.square(x))),
    "gram": lambda: Function(frozen_gram),
    "padded": lambda: Function(
        lambda x: ops.pad(x, [(0, 0), (0, 0), (1, 2)], constant_values=ops.max(ops.stop_gradient(x)))
    ),
}
# It cannot be told whether these values belong to examples, so nothing is cut.
UNTOLD = {
    "sorted": lambda: of_the_batch(lambda x: ops.sort(x, axis=0)),
    "repeated": lambda: of_the_batch(lambda x: ops.broadcast_to(ops.mean(x, axis=0), (5, 5, 4))),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_part_of_a_batch_on_whose_whole_it_depends(name):
    x, u = normal(5, 5, 4), normal(3, 5, 4, seed=1)
    lin = jvpreg.linearize(WHOLE[name](), x, fallback="error")
    part = [2, 0, 2]
    expected = numpy(lin.jvp(np.concatenate([u[1:2], u[:1] * 0, u[:1], u[:1] * 0, u[:1] * 0])))[[2, 0]]
    np.testing.assert_allclose(numpy(lin.take(part).jvp(u))[:2], expected, rtol=1e-12)


@pytest.mark.parametrize("name", UNTOLD)
def test_a_part_of_a_batch_that_cannot_be_told(name):
    with pytest.raises(ValueError, match=r"cannot be cut where something is frozen"):
        jvpreg.linearize(UNTOLD[name](), normal(5, 5, 4), fallback="ignore").take([0])


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (ops.linalg.inv, (4, 4)),
        (lambda x: ops.segment_sum(x, ops.convert_to_tensor([0, 0, 1, 3]), num_segments=4), (4, 3)),
        (lambda x: ops.top_k(ops.sum(x, axis=1), 4)[0], (4, 3)),
        (lambda x: ops.cumprod(x, axis=0), (4, 3)),
    ],
    ids=["inv", "segment_sum", "top_k", "cumprod"],
)
def test_an_operation_that_works_along_the_first_axis(function, shape):
    lin = jvpreg.linearize(Function(function), normal(*shape), fallback="ignore")
    with pytest.raises(ValueError, match=r"couples the examples of a batch"):
        lin.jacobian()


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda x: ops.cumprod(x, axis=1), (4, 3)),
        (ops.sinc, (4, 3)),
        (lambda x: ops.nanmean(x, axis=1), (4, 3)),
        (lambda x: ops.slice(x, (0, 1), (4, 2)), (4, 3)),
        (lambda x: ops.slice_update(ops.zeros((4, 3), "float64"), (0, 1), x), (4, 2)),
        (lambda x: ops.fft((x, ops.sin(x)))[1], (4, 3)),
    ],
    ids=["cumprod", "sinc", "nanmean", "slice", "slice_update", "fft"],
)
def test_an_operation_that_works_example_by_example(function, shape):
    """By a rule, or left to autodiff."""
    layer, x, u = Function(function), normal(*shape), normal(*shape, seed=1)
    lin = jvpreg.linearize(layer, x, fallback="ignore")
    np.testing.assert_allclose(numpy(lin.take([2]).jvp(u[2:3])), numpy(lin.jvp(u))[2:3], rtol=1e-10)
    jacobian = numpy(lin.jacobian()).reshape(4, -1, u[0].size)
    np.testing.assert_allclose(
        np.einsum("bkd,bd->bk", jacobian, u.reshape(4, -1)), numpy(lin.jvp(u)).reshape(4, -1), rtol=1e-9
    )


def test_taps_of_a_part_of_the_batch():
    """A part may have more examples than the batch, and the first axis of a node may not be the batch."""
    model, x = made(APART["TimeDistributed"]())
    lin = jvpreg.linearize(model, x)
    indices = [0, 1, 2, 3, 4, 0, 1]
    for name in list(lin.node_outputs())[-3:]:
        part = lin.take(indices)
        tap = normal(*part.shape_at(name), seed=2)
        _, at_nodes = part.gradients(v := normal(7, 2, seed=3), [name])
        product = numpy(part.jvp(taps={name: tap}))
        np.testing.assert_allclose(np.sum(product * v), np.sum(numpy(at_nodes[name]) * tap), rtol=1e-10)


@pytest.mark.slow
def test_penalties_see_each_example():
    """Penalties on contributions within `TimeDistributed`, and on a random part of the batch."""
    model, x = made(Call(by_steps))
    penalty = jvpreg.regularizers.BiasJacobianNorm(1.0, target="predicted")
    lin = jvpreg.linearize(model, x)
    found = penalty.look(lin, None, None)
    full = jvpreg.full_jacobian(lin, None)
    for node, contribution in full.bias_jacobians.items():
        np.testing.assert_allclose(numpy(found[node]), numpy(contribution), rtol=1e-12)
    trained = jvpreg.JacobianModel(made(APART["TimeDistributed"]())[0], seed=0)
    trained.compile("sgd", "mse", jacobian_regularizers=[jvpreg.regularizers.JacobianNorm(0.1)], jacobian_fraction=0.5)
    assert trained.fit(x, np.zeros((5, 2)), verbose=0).history["frobenius_norm_squared"][0] > 0
