"""Models that hold a `FixedPoint` layer: penalties, `fit`, diagnostics, saving; and solves that fail."""

import functools
import warnings

import keras
import numpy as np
import pytest
from compare import assert_close, normal, numpy
from keras import layers, ops
from test_fixed_point import TIGHT, linear_cell, normalized_cell, tanh_cell

import jvpreg
from jvpreg.callbacks import FixedPointMonitor, JacobianProbe
from jvpreg.engine.transpose import transpose
from jvpreg.estimators import fixed_point_spectral_radius
from jvpreg.layers import FixedPoint
from jvpreg.regularizers import FixedPointJacobianNorm, JacobianNorm, Seen


def make_model(cell, **arguments):
    inputs = keras.Input((2,))
    hidden = FixedPoint(cell, **arguments, name="equilibrium")(layers.Dense(3, activation="tanh")(inputs))
    return keras.Model(inputs, layers.Dense(2)(hidden))


def jitted(function):
    """Without jit, JAX compiles each loop anew."""
    if keras.backend.backend() != "jax":
        return function
    import jax

    return jax.jit(function)


@pytest.mark.slow
def test_gradients_of_penalties_against_finite_differences(float64):
    """Penalties `‖J u‖²`, `‖Jᵀ v‖²`, `‖∂_z f ε‖²`; gradients by the weights of the cell and of layers before it."""
    model = make_model(tanh_cell(), **TIGHT)
    regularizer = FixedPointJacobianNorm(1.0, num_probes=2)
    x, u, v, epsilon = (ops.convert_to_tensor(normal(*shape)) for shape in ((3, 2), (1, 3, 2), (1, 3, 2), (2, 3, 4)))
    weights = model.trainable_variables

    def penalties(values):
        with keras.StatelessScope(state_mapping=list(zip(weights, values, strict=True))):
            lin = jvpreg.linearize(model, x)
            found = regularizer.look(lin, epsilon, None)
            seen = Seen(None, None, None, None, None, None, None, found)
            return [ops.sum(lin.jvp(u) ** 2), ops.sum(lin.vjp(v) ** 2), ops.sum(regularizer.penalty(seen))]

    values = [ops.stop_gradient(weight.value) + 0 for weight in weights]
    directions = [ops.convert_to_tensor(normal(*weight.shape, seed=i)) for i, weight in enumerate(weights)]
    run = jitted(penalties)
    step = 1e-5
    ahead, behind = (run([w + sign * step * d for w, d in zip(values, directions, strict=True)]) for sign in (1, -1))
    for i in range(3):
        one = [ops.convert_to_tensor(float(i == j), "float64") for j in range(3)]
        gradient = jitted(lambda values, one: transpose(penalties, values, one))(values, one)
        received = sum(np.sum(numpy(g) * numpy(d)) for g, d in zip(gradient, directions, strict=True))
        expected = (numpy(ahead[i]) - numpy(behind[i])) / (2 * step)
        np.testing.assert_allclose(received, expected, rtol=1e-6)


def test_the_penalty_is_the_squared_norm_in_the_mean():
    cell = linear_cell()
    model = keras.Sequential([keras.Input((3,)), FixedPoint(cell)])
    regularizer = FixedPointJacobianNorm(1.0, num_probes=4000)
    lin = jvpreg.linearize(model, np.ones((2, 3), "float32"))
    drawn = regularizer.draw(lin, lin.inputs, seed=0)
    found = regularizer.penalty(Seen(None, None, None, None, None, None, None, regularizer.look(lin, drawn, None)))
    np.testing.assert_allclose(numpy(found), np.sum(cell.get_weights()[1] ** 2), rtol=0.1)


def test_spectral_radius():
    model = keras.Sequential([keras.Input((3,)), FixedPoint(linear_cell(radius=0.7), name="equilibrium")])
    lin = jvpreg.linearize(model, np.ones((2, 3), "float32"))
    np.testing.assert_allclose(numpy(fixed_point_spectral_radius(lin).value), 0.7, rtol=1e-3)
    with pytest.raises(ValueError, match=r"argument `layer`. Expected the path of a FixedPoint layer.*'equilibrium'"):
        fixed_point_spectral_radius(lin, "other")


JIT = {"tensorflow": [False, True], "jax": [True], "torch": [False]}[keras.backend.backend()]


@pytest.mark.slow
@pytest.mark.parametrize("jit", JIT)
def test_fit(jit, tmp_path):
    """Penalties on the Jacobians of the model and of the cell, batch statistics in the cell, validation and a probe.

    The last two are left out where TensorFlow compiles with XLA, which would take a minute for them.
    """
    light = jit and keras.backend.backend() == "tensorflow"
    random = np.random.default_rng(0)
    x, y = random.normal(size=(20, 2)).astype("float32"), random.normal(size=(20, 2)).astype("float32")
    base = make_model(normalized_cell(), tolerance=1e-3, max_iterations=40, unconverged="ignore")
    model = jvpreg.JacobianModel(base)
    model.compile(
        keras.optimizers.SGD(0.02),
        "mse",
        jit_compile=jit,
        jacobian_regularizers=[JacobianNorm(0.01), FixedPointJacobianNorm(0.1)],
        jacobian_fraction=0.5 if jit else 1.0,
    )
    metrics = ["fixed_point_spectral_radius"]
    history = model.fit(
        x,
        y,
        batch_size=8,
        epochs=3,
        verbose=0,
        validation_data=None if light else (x, y),
        callbacks=[FixedPointMonitor(), *([] if light else [JacobianProbe(x[:4], metrics)])],
    ).history
    assert all(np.all(np.isfinite(values)) for values in history.values())
    for prefix in ("",) if light else ("", "val_"):
        assert all(1 < value <= 40 for value in history[f"{prefix}equilibrium/iterations"])
        assert all(0 < value < 1e-3 for value in history[f"{prefix}equilibrium/residual"])
        assert history[f"{prefix}equilibrium/unconverged"] == [0, 0, 0]
    assert history["equilibrium/linear_unconverged"] == [0, 0, 0]
    assert light or 0 < history["jacobian/fixed_point_spectral_radius"][0] < 1
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(loaded.predict(x, verbose=0), model.predict(x, verbose=0), atol=1e-5)
    layer, original = (m.base.get_layer("equilibrium") for m in (loaded, model))
    assert layer.get_config()["max_iterations"] == original.max_iterations == 40
    assert np.all(np.isfinite(loaded.train_on_batch(x, y)))


@pytest.mark.slow
def test_the_penalty_makes_iterations_fewer():
    x, y = normal(8, 2).astype("float32"), np.zeros((8, 2))
    model = jvpreg.JacobianModel(make_model(tanh_cell(), tolerance=1e-5, unconverged="ignore"))
    model.compile(keras.optimizers.SGD(0.1), "mse", jacobian_regularizers=[FixedPointJacobianNorm(1.0, num_probes=8)])
    history = model.fit(x, y, epochs=15, verbose=0, callbacks=[FixedPointMonitor()]).history
    assert history["fixed_point_frobenius_norm_squared"][-1] < 0.5 * history["fixed_point_frobenius_norm_squared"][0]
    assert history["equilibrium/iterations"][-1] < history["equilibrium/iterations"][0]


def test_gradients_of_fit_are_those_of_unrolling():
    """Of the plain model, under the trainer of each backend."""
    random = np.random.default_rng(0)
    x, y = random.normal(size=(6, 3)).astype("float32"), random.normal(size=(6, 4)).astype("float32")
    moved = []
    for implicit in (True, False):
        keras.utils.set_random_seed(2)
        cell, inputs = tanh_cell(), keras.Input((3,))
        z = 0.0 * layers.Dense(4, trainable=False)(inputs)
        for _ in range(30):
            z = cell([inputs, z])
        model = keras.Model(inputs, FixedPoint(cell, tolerance=1e-6)(inputs) if implicit else z)
        model.compile(keras.optimizers.SGD(0.1), "mse")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*cannot warn")
            model.train_on_batch(x, y)
        moved.append(cell.get_weights())
    assert_close(moved[0], moved[1], 1e-5)


@pytest.mark.filterwarnings("ignore:.*cannot warn")
def test_a_cell_may_ask_for_the_size_of_the_batch():
    class Cell(layers.Layer):
        def build(self, shape):
            self.shift = self.add_weight((3,))

        def call(self, x, z):
            return ops.tanh(x + 0.1 * z * ops.broadcast_to(self.shift, (ops.shape(z)[0], 3)))

    model = keras.Sequential([keras.Input((3,)), jvpreg.layers.FixedPoint(Cell())])
    model.compile(loss="mse")
    before = [ops.convert_to_numpy(weight) for weight in model.trainable_weights]
    model.fit(np.ones((4, 3)), np.ones((4, 3)), verbose=0)
    assert any(np.any(ops.convert_to_numpy(w) != b) for w, b in zip(model.trainable_weights, before, strict=True))


@pytest.mark.parametrize("penalized", [False, True])
def test_state_is_moved_once(penalized):
    """Batch statistics and seeds move once in a step, whatever the number of iterations."""
    cell = normalized_cell()
    norm = next(part for part in cell.layers if isinstance(part, layers.BatchNormalization))
    layer = FixedPoint(cell, tolerance=1e-5)
    x = normal(6, 3).astype("float32")
    layer.build((None, 3))
    hidden = next(part for part in cell.layers if isinstance(part, layers.Dense))
    z = layer(x, training=True) if not penalized else jvpreg.linearize(layer, x, training=True).outputs
    seen = np.tanh(numpy(hidden(ops.convert_to_tensor(numpy(z) + x))))
    np.testing.assert_allclose(numpy(norm.moving_mean), 0.01 * seen.mean(0), rtol=1e-3)


# Solves that fail.


class Affine(layers.Layer):
    """`z = a z + x`, with the slope a of each example as the first entry of x."""

    def call(self, x, z):
        return x[:, :1] * z + x[:, 1:]

    def compute_output_shape(self, x_shape, z_shape):
        return z_shape


SLOPES = np.array([[0.5, 1, 2], [3.0, 1, 2], [1.0, 1, 2], [np.nan, 1, 2], [-0.25, 1, 2]])
FINE = [0, 4]


def affine_layer(**arguments):
    return FixedPoint(Affine(), **{"state_shape": (2,), "tolerance": 1e-6, **arguments})


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["picard", "anderson", "broyden"])
def test_an_example_that_fails_does_not_harm_the_others(solver):
    """One example expands (plain iteration goes to infinity), one has no fixed point, and one is NaN from the start."""
    x = SLOPES.astype("float32")
    layer = affine_layer(solver=solver, adjoint_solver=solver, unconverged="ignore", max_iterations=100)
    found = layer.solution(x)
    converged = numpy(found.converged).tolist()
    assert [converged[i] for i in (0, 2, 3, 4)] == [True, False, False, True]
    assert converged[1] == (solver != "picard")
    alone = layer.solution(x[FINE])
    # A tolerance of 1e-6 and slopes up to 0.5 allow this error. Rounding may decide on one iteration more or less.
    np.testing.assert_allclose(numpy(found.value)[FINE], numpy(alone.value), rtol=1e-5)
    assert np.all(np.abs(numpy(found.iterations)[FINE] - numpy(alone.iterations)) <= 1)
    expected = x[FINE, 1:] / (1 - x[FINE, :1])
    np.testing.assert_allclose(numpy(found.value)[FINE], expected, rtol=1e-5)
    assert np.all(np.isfinite(numpy(found.value)))
    lin, v = jvpreg.linearize(layer_on(layer, x), x), np.ones((5, 2), "float32")
    pulled, pushed = numpy(lin.vjp(v)), numpy(lin.jvp(x * [0, 1, 1]))
    np.testing.assert_allclose(pulled[FINE][:, 1:], 1 / (1 - x[FINE, :1]) * v[FINE], rtol=1e-4)
    np.testing.assert_allclose(pushed[FINE], expected, rtol=1e-4)


def test_what_failed_is_said_at_once():
    x = ops.convert_to_tensor(SLOPES.astype("float32"))
    with pytest.warns(UserWarning, match=r"has not converged in 2 of 5 examples"):
        affine_layer()(x)
    with pytest.raises(FloatingPointError, match=r"has not converged in 2 of 5 examples.*at most 1e-06 within 50"):
        affine_layer(unconverged="error")(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        affine_layer(unconverged="ignore")(x)


def test_a_linear_solve_that_fails_is_said_at_once():
    """The fixed point is found, but a single step of plain iteration is not enough for its derivative."""
    layer = affine_layer(solver="anderson", adjoint_solver="picard", max_iterations=8, unconverged="warn")
    x = SLOPES[[0]].astype("float32")
    lin = jvpreg.linearize(layer_on(layer, x), x)

    def pulled():
        lin.vjp(np.ones((1, 2), "float32"))
        jvpreg.fixed_points.derivatives.wait()

    with pytest.warns(UserWarning, match=r"1 linear solve\(s\) for derivatives of .* have not converged"):
        pulled()
    assert layer.take_counts()["linear_unconverged"] == 1


def layer_on(layer, x):
    layer.build(x.shape)
    return layer


@pytest.mark.parametrize("fails", ["solve", "adjoint"])
def test_in_a_compiled_step_an_error_is_nan_and_raised_at_the_epochs_end(fails):
    x = SLOPES[[0, 2 if fails == "solve" else 0]].astype("float32")
    inputs = keras.Input((3,))
    arguments = {"adjoint_solver": "picard", "max_iterations": 8 if fails == "adjoint" else 50}
    layer = affine_layer(unconverged="error", name="equilibrium", **arguments)
    model = keras.Model(inputs, layer(layers.Dense(3, kernel_initializer="identity", name="first")(inputs)))
    model.compile(keras.optimizers.SGD(0.01), "mse", jit_compile="auto" if keras.backend.backend() == "jax" else False)
    # Torch runs eagerly, and raises at once.
    at_once = keras.backend.backend() == "torch"
    match = "has not converged in|linear solve" if at_once else f"{'' if fails == 'solve' else 'linear_'}unconverged"
    with pytest.raises(FloatingPointError, match=match):
        model.fit(x, np.zeros((2, 2)), verbose=0, callbacks=[FixedPointMonitor()])
    if not at_once:
        assert np.all(np.isnan(model.get_layer("first").get_weights()[0]))


def test_the_monitor_warns_with_numbers():
    x = SLOPES[[0, 2, 4, 4]].astype("float32")
    inputs = keras.Input((3,))
    model = keras.Model(
        inputs, affine_layer(name="equilibrium")(layers.Dense(3, kernel_initializer="identity")(inputs))
    )
    model.compile(keras.optimizers.SGD(0.0), "mse")
    with pytest.warns(UserWarning, match=r"'equilibrium/unconverged': 0.25"):
        history = model.fit(x, np.zeros((4, 2)), verbose=0, callbacks=[FixedPointMonitor()]).history
    assert history["equilibrium/unconverged"] == [0.25]
    with pytest.raises(ValueError, match="expects a model with FixedPoint layers"):
        FixedPointMonitor().set_model(keras.Sequential([layers.Dense(2)]))


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="other backends can warn at once")
def test_a_graph_that_cannot_warn_says_so():
    layer = affine_layer()
    model = keras.Sequential([keras.Input((3,)), layer])
    with pytest.warns(UserWarning, match="cannot warn where it does not converge. Pass a `jvpreg.callbacks"):
        model.predict(SLOPES[[0]], verbose=0)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"solver": "newton"}, r'argument `solver`. Expected "anderson", "broyden" or "picard"'),
        ({"solver": "gmres"}, r"argument `solver`"),
        ({"adjoint_solver": "exact"}, r"argument `adjoint_solver`"),
        ({"unconverged": "print"}, r"argument `unconverged`"),
        ({"tolerance": 0.0}, r"argument `tolerance`. Expected a finite number above 0, below 1"),
        ({"max_iterations": 0}, r"argument `max_iterations`. Expected an integer, 1 or more"),
        ({"cell": "tanh"}, r"argument `cell`. Expected a Keras model or layer"),
        ({"cell": keras.Sequential([keras.Input((3,)), layers.Dense(3)])}, r"a model of two inputs, x and z"),
    ],
)
def test_arguments(arguments, match):
    with pytest.raises(ValueError, match=match):
        FixedPoint(**{"cell": Affine(), **arguments})


@pytest.mark.parametrize("axes", [5, None])
def test_a_cell_that_returns_another_shape(axes):
    x, z = keras.Input((3,)), keras.Input((4,))
    cell = keras.Model([x, z], layers.Dense(axes or 4)(x + layers.Dense(3)(z)))
    if axes is None:
        cell = keras.Model([x, z], [cell.output, z])
    layer = FixedPoint(cell)
    with pytest.raises(ValueError, match=r"must return one tensor like z. Expected shape \(None, 4\)"):
        layer.build((None, 3))
    with pytest.raises(ValueError, match=r"The shape of z of .* is not known"):
        FixedPoint(Affine()).build((None, None, 3))


def half_model(policy, **arguments):
    def dense(units):
        return layers.Dense(units, dtype=policy)

    x, z = keras.Input((3,)), keras.Input((4,))
    cell = keras.Model([x, z], ops.tanh(0.3 * dense(4)(z) + dense(4)(x)))
    inputs = keras.Input((3,))
    hidden = FixedPoint(cell, unconverged="error", dtype=policy, **arguments)(inputs)
    return keras.Model(inputs, layers.Dense(2, dtype="float32")(hidden))


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(policy):
    """The cell computes in 16 bits. The Jacobian is that of float32, up to the rounding of 16 bits."""
    model, exact = half_model(policy, tolerance=1e-2), half_model("float32", tolerance=1e-5)
    exact.set_weights(model.get_weights())
    x = normal(4, 3).astype("float32")
    received, expected = (numpy(jitted(functools.partial(jvpreg.jacobian, m))(x)) for m in (model, exact))
    np.testing.assert_allclose(received, expected, atol=0.02 * np.abs(expected).max())


@pytest.mark.slow
def test_a_tangent_model_is_saved(tmp_path):
    model = make_model(tanh_cell(), tolerance=1e-5, unconverged="error")
    x, u = (normal(4, 2, seed=seed).astype("float32") for seed in range(2))
    tangent = jvpreg.TangentModel(model)
    _, expected = tangent.predict([x, u], verbose=0)
    jacobian = numpy(jitted(functools.partial(jvpreg.jacobian, model))(x))
    np.testing.assert_allclose(expected, np.einsum("bij,bj->bi", jacobian, u), atol=1e-4)
    tangent.save(tmp_path / "tangent.keras")
    loaded = keras.saving.load_model(tmp_path / "tangent.keras")
    np.testing.assert_allclose(loaded.predict([x, u], verbose=0)[1], expected, atol=1e-6)
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        tangent.export(tmp_path / "tangent", verbose=False)
        loaded = tf.saved_model.load(tmp_path / "tangent")
        np.testing.assert_allclose(loaded.serve([x, u])[1], expected, atol=1e-6)
