"""`FixedPoint`: its derivatives in both modes against closed forms, unrolled autodiff and finite differences."""

import keras
import numpy as np
import pytest
from compare import assert_close, inner, normal, numpy
from keras import layers, ops

import jvpreg
from jvpreg.engine.transpose import transpose
from jvpreg.fixed_points.solvers import find_fixed_point
from jvpreg.layers import FixedPoint

TIGHT = {"tolerance": 1e-12, "max_iterations": 200}


def linear_cell(size=4, radius=0.7, seed=0):
    """`z = A z + B x`, with the spectral radius of A."""
    x, z = keras.Input((3,)), keras.Input((size,))
    matrix = normal(size, size, seed=seed)
    matrix *= radius / np.abs(np.linalg.eigvals(matrix)).max()
    inward, onward = layers.Dense(size, use_bias=False), layers.Dense(size, use_bias=False)
    cell = keras.Model([x, z], inward(x) + onward(z))
    inward.set_weights([normal(3, size, seed=seed + 1)])
    onward.set_weights([matrix.T])
    return cell


def tanh_cell(size=4, seed=0):
    x, z = keras.Input((3,)), keras.Input((size,))
    cell = keras.Model([x, z], layers.Dense(size, activation="tanh")(layers.Concatenate()([x, 0.5 * z])))
    cell.layers[-1].set_weights([0.6 * normal(3 + size, size, seed=seed), normal(size, seed=seed + 1)])
    return cell


@pytest.mark.parametrize("adjoint_solver", ["gmres", "anderson", "broyden", "picard"])
@pytest.mark.parametrize("solver", ["anderson", "broyden", "picard"])
def test_linear_cell_has_a_closed_form(float64, solver, adjoint_solver):
    cell = linear_cell()
    layer = FixedPoint(cell, solver=solver, adjoint_solver=adjoint_solver, **TIGHT)
    inward, onward = (weight.T for weight in cell.get_weights())
    slope = np.linalg.solve(np.eye(4) - onward, inward)
    x, u, v = normal(5, 3), normal(2, 5, 3, seed=1), normal(2, 5, 4, seed=2)
    assert_close(layer(x), x @ slope.T)
    lin = jvpreg.linearize(layer, x)
    assert_close(lin.jvp(u), u @ slope.T)
    assert_close(lin.vjp(v), v @ slope)
    assert_close(lin.jacobian(), np.broadcast_to(slope, (5, 4, 3)))


def unrolled(cell, steps=80):
    """The fixed point by so many plain iterations, for the backend's autodiff."""

    def run(x):
        z = ops.zeros((x.shape[0], *cell.output_shape[1:]), x.dtype)
        for _ in range(steps):
            z = cell([x, z])
        return z

    return run


@pytest.mark.slow
def test_products_and_weight_gradients_against_unrolled_autodiff(float64):
    cell = tanh_cell()
    layer = FixedPoint(cell, **TIGHT)
    x, u, v = (ops.convert_to_tensor(normal(5, size, seed=seed)) for seed, size in enumerate((3, 3, 4)))
    assert_close(layer(x), unrolled(cell)(x))
    kernel = cell.layers[-1].kernel

    def pulled(function):
        """The gradients of `vᵀ z` by x and by the kernel."""

        def run(points):
            with keras.StatelessScope(state_mapping=[(w, points[1] if w is kernel else w.value) for w in cell.weights]):
                return [function(points[0])]

        return transpose(run, [x, ops.stop_gradient(kernel.value) + 0], [v])

    expected = pulled(unrolled(cell))
    assert_close(pulled(layer), expected, 1e-9)
    lin = jvpreg.linearize(layer, x)
    assert_close(lin.vjp(v), expected[0], 1e-9)
    step = 1e-5
    ahead, behind = (unrolled(cell)(x + sign * step * u) for sign in (1, -1))
    assert_close(lin.jvp(u), (ahead - behind) / (2 * step), 1e-6)
    np.testing.assert_allclose(inner(lin.jvp(u), v), inner(u, lin.vjp(v)), rtol=1e-11)


class Mixed(layers.Layer):
    """A cell of two arguments, with dropout."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(3)
        self.dropout = layers.Dropout(0.5, seed=1)

    def build(self, x_shape, z_shape):
        self.dense.build(z_shape)

    def call(self, x, z, training=None):
        return x + ops.tanh(0.3 * self.dense(self.dropout(z, training=training)))


def normalized_cell():
    # The factor 0.1 makes the cell contract clearly, whatever the batch statistics are.
    x, z = keras.Input((3,)), keras.Input((3,))
    return keras.Model([x, z], x + 0.1 * layers.BatchNormalization()(ops.tanh(layers.Dense(3)(z + x))))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        (tanh_cell, {}),
        (Mixed, {"training": True}),
        (normalized_cell, {"training": True, "batch_statistics": "coupled", "batch_size": 4}),
    ],
    ids=["tanh", "dropout", "batch-statistics"],
)
def test_rule(make, arguments):
    """All that `check_rule` checks: products, weights, adjointness, a part of the batch, gradients of `‖J u‖²`."""
    if keras.backend.backend() == "jax":
        pytest.skip("without jit, JAX compiles each of a hundred solves anew: minutes")
    with jvpreg.testing.float64():
        inputs = keras.Input((3,))
        model = keras.Model(inputs, FixedPoint(make(), **TIGHT)(inputs))
    jvpreg.testing.check_rule(model, (3,), **arguments)


def test_second_derivatives(float64):
    """Of `vᵀ z` by x, twice, through the layer's own call: no tape stops at the fixed point."""
    cell = tanh_cell()
    layer = FixedPoint(cell, **TIGHT)
    x, v, u = (ops.convert_to_tensor(normal(2, size, seed=seed)) for seed, size in enumerate((3, 4, 3)))

    def slope(inputs):
        return transpose(lambda points: [layer(points[0])], inputs, [v])

    if keras.backend.backend() == "torch":  # `transpose` detaches its inputs on Torch, so it cannot be taken twice.
        import torch

        x = x.requires_grad_()
        (first,) = torch.autograd.grad(torch.sum(layer(x) * v), x, create_graph=True)
        (second,) = torch.autograd.grad(torch.sum(first * u), x)
    else:
        (second,) = transpose(slope, [x], [u])
    step = 1e-5
    ahead, behind = (slope([ops.stop_gradient(x) + sign * step * u])[0] for sign in (1, -1))
    assert_close(ops.stop_gradient(second), (ahead - behind) / (2 * step), 1e-6)


@pytest.mark.parametrize("solver", ["anderson", "broyden", "picard"])
def test_the_iterate_that_follows_is_returned(solver):
    """In the mean over the examples it is more exact than the one that reached the tolerance: with acceleration by far.

    An example whose iterates grow keeps its best one.
    """
    x = ops.convert_to_tensor(normal(64, 3).astype("float32"))
    for seed in range(3):
        cell = tanh_cell(seed=seed)
        layer = FixedPoint(cell, solver=solver, tolerance=1e-3)
        exact, reached, returned = (numpy(z) for z in (unrolled(cell)(x), layer.solution(x).value, layer(x)))
        errors = [np.sqrt(np.mean((z - exact) ** 2)) for z in (reached, returned)]
        assert errors[1] < errors[0] / (1.5 if solver == "picard" else 4)
    x, z = keras.Input((2,)), keras.Input((2,))
    layer = FixedPoint(keras.Model([x, z], x - 3 * z), "picard", max_iterations=5, unconverged="ignore")
    np.testing.assert_array_equal(numpy(layer(np.ones((1, 2)))), 0)  # others are 1, -2, 7 and -20; 61 would follow
    assert layer.take_counts() == pytest.approx(
        {"examples": 1, "iterations": 5, "residual": 1, "unconverged": 1, "linear_unconverged": 0}
    )


@pytest.mark.slow
def test_expansive_linear_systems(float64):
    """A window of GMRES has fewer dimensions, so it restarts. The residual of plain iteration does not shrink."""
    matrix, rhs = normal(2, 26, 26), normal(2, 26, seed=1)
    matrix *= 1.2 / np.abs(np.linalg.eigvals(matrix)).max(axis=1)[:, None, None]
    a, b = ops.convert_to_tensor(matrix), ops.convert_to_tensor(rhs)

    def find(solver):
        return find_fixed_point(lambda w: ops.squeeze(a @ ops.expand_dims(w, -1), -1) + b, b, solver, 1e-9, 300)

    found = find("gmres")
    expected = np.linalg.solve(np.eye(26) - matrix, rhs[..., None])[..., 0]
    assert_close(found.value, expected, 1e-6)
    assert numpy(found.converged).all()
    assert not numpy(find("picard").converged).any()


def test_a_layer_by_its_attribute():
    class Network(keras.Model):
        def __init__(self):
            super().__init__()
            self.solved = FixedPoint(linear_cell(), name="equilibrium")

        def call(self, x):
            return self.solved(x)

    network, x = Network(), normal(2, 3)
    network(x)
    lin = jvpreg.linearize(network, x)
    values = [
        numpy(jvpreg.estimators.fixed_point_spectral_radius(lin, layer).value)
        for layer in (None, "equilibrium", "solved")
    ]
    np.testing.assert_array_equal(values[1:], values[:1] * 2)
    with pytest.raises(ValueError, match=r"`layer`. Expected .* one of \['equilibrium'\]"):
        jvpreg.estimators.fixed_point_spectral_radius(lin, "other")
