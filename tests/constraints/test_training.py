"""Constraints in `fit`: what they log, what they carry from step to step, at which points, and what a step costs."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import jvpreg
from jvpreg.constraints import (
    AugmentedLagrangian,
    Bounded,
    Box,
    DivergenceFree,
    KnownDerivative,
    Monotone,
    Penalty,
    between,
)
from jvpreg.regularizers import JacobianNorm
from tests.constraints.fields import numbers

COMPILATIONS = {
    "tensorflow": [{"jit_compile": False}, {"jit_compile": True}],
    "jax": [{"jit_compile": True}],
    "torch": [{"jit_compile": False}],
}[keras.backend.backend()]
# Runs are counted in eager steps. On JAX, whose eager steps are slow, they are counted in a trace.
COUNTED = {"run_eagerly": keras.backend.backend() != "jax"}


def base(outputs=1, inputs=2, activation="tanh"):
    model = keras.Sequential([keras.Input((inputs,)), layers.Dense(8, activation=activation), layers.Dense(outputs)])
    random = np.random.default_rng(3)
    model.set_weights([0.7 * random.normal(size=w.shape) for w in model.get_weights()])
    return model


def compiled(*constraints, outputs=1, optimizer=None, model=None, **arguments):
    model = jvpreg.JacobianModel(model or base(outputs), seed=3)
    optimizer = optimizer or keras.optimizers.SGD(0.0)
    model.compile(optimizer, "mse", jacobian_regularizers=list(constraints), **arguments)
    return model


def data(size=16, outputs=1):
    random = np.random.default_rng(0)
    return random.normal(size=(size, 2)).astype("float32"), random.normal(size=(size, outputs)).astype("float32")


def slopes(model, x):
    """`J e_0`, `(N,)`, of the base model."""
    return numbers(jvpreg.jacobian(model.base, x))[:, 0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("compilation", COMPILATIONS, ids=str)
def test_the_violation_is_a_metric_in_training_and_validation(compilation):
    x, y = data()
    model = compiled(Monotone([0], tolerance=0.05, enforcement=Penalty(2.0)), **compilation)
    other = x[np.argsort(slopes(model, x))[:6]]
    history = model.fit(x, y, batch_size=4, verbose=0, shuffle=False, validation_data=(other, y[:6])).history
    for prefix, points in (("", x), ("val_", other)):
        missing = np.maximum(0, -slopes(model, points))
        assert 0 < np.mean(missing > 0.05) < 1
        found = {
            name: history[f"{prefix}monotone/{name}"][0] for name in ("violation_mean", "violation_max", "violated")
        }
        expected = {
            "violation_mean": missing.mean(),
            "violation_max": missing.max(),
            "violated": np.mean(missing > 0.05),
        }
        assert found == pytest.approx(expected, rel=1e-4)
        assert history[f"{prefix}monotone"][0] == pytest.approx(np.mean(missing**2), rel=1e-4)
        assert history[f"{prefix}loss"][0] == pytest.approx(
            np.mean((model.base.predict(points, verbose=0) - y[: len(points)]) ** 2) + 2 * np.mean(missing**2), rel=1e-4
        )


@pytest.mark.slow
@pytest.mark.parametrize("compilation", COMPILATIONS, ids=str)
def test_multipliers_grow_by_the_mean_violation_of_the_steps_between(compilation):
    x, y = data()
    rising = Monotone([0, 1], enforcement=AugmentedLagrangian(rho=5.0, update_every=2))
    model = compiled(rising, **compilation)
    missing = np.maximum(0, -numbers(jvpreg.jacobian(model.base, x))[:, 0, :]).mean(axis=0)
    assert missing.max() > 0.01
    history = model.fit(x, y, batch_size=16, epochs=5, verbose=0, validation_data=(x, y)).history
    # They are updated after the second and the fourth step.
    np.testing.assert_allclose(numbers(model.penalty_metrics[0].carried)[0], 2 * 5.0 * missing, rtol=1e-4)
    largest = 5.0 * missing.max()
    np.testing.assert_allclose(
        history["monotone/multiplier_max"], [0, 0, largest, largest, 2 * largest], rtol=1e-4, atol=1e-8
    )
    # Evaluation reads them, and leaves them alone.
    np.testing.assert_allclose(
        history["val_monotone/multiplier_max"], [0, largest, largest, 2 * largest, 2 * largest], rtol=1e-4, atol=1e-8
    )


@pytest.mark.slow
def test_multipliers_are_saved_and_restored_and_grow_on(tmp_path):
    x, y = data()

    def make():
        rising = Monotone([0], enforcement=AugmentedLagrangian(rho=5.0, update_every=3), at=Box(-2.0, 2.0, 32))
        return compiled(rising, JacobianNorm(0.01), optimizer=keras.optimizers.Adam(0.01))

    model = make()
    fit = {"batch_size": 8, "shuffle": False, "verbose": 0}
    model.fit(x, y, epochs=4, **fit)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    carried = numbers(model.penalty_metrics[0].carried)
    assert carried[0].max() > 0
    assert carried[2].max() == 2  # Two of the three steps whose mean is the next update.
    np.testing.assert_array_equal(numbers(loaded.penalty_metrics[0].carried), carried)
    assert loaded.get_compile_config() == model.get_compile_config()
    again, theirs = (one.fit(x, y, epochs=2, **fit).history for one in (loaded, model))
    assert again == theirs
    model.save_weights(tmp_path / "model.weights.h5")
    other = make()
    other.optimizer.build(other.trainable_variables)
    other.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(numbers(other.penalty_metrics[0].carried), numbers(model.penalty_metrics[0].carried))


@pytest.mark.slow
def test_an_augmented_lagrangian_holds_what_a_penalty_that_starts_as_it_does_does_not():
    x = np.linspace(-1, 1, 64).reshape(-1, 1).astype("float32")
    y = x**2  # Falls on the left.

    def train(enforcement):
        keras.utils.set_random_seed(2)
        model = compiled(
            Monotone([0], enforcement=enforcement),
            model=base(inputs=1),
            optimizer=keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.02, 600)),
        )
        # One long epoch, since most of the time of a short epoch is not that of its steps.
        model.fit(np.tile(x, (600, 1)), np.tile(y, (600, 1)), batch_size=64, verbose=0, shuffle=False)
        return jvpreg.constraints.verify(model, Monotone([0]), np.linspace(-1, 1, 501).reshape(-1, 1)).max

    held, fixed = train(AugmentedLagrangian(rho=20.0, update_every=5)), train(Penalty(10.0))
    assert held < 1e-2
    assert fixed > 5 * held


def test_a_schedule_multiplies_the_weight():
    x, y = data()
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([1, 2], [1.0, 10.0, 100.0])
    model = compiled(Monotone([0], enforcement=Penalty(0.5, schedule)))
    plain = np.mean((model.base.predict(x, verbose=0) - y) ** 2)
    missing = np.mean(np.maximum(0, -slopes(model, x)) ** 2)
    logs = []
    for _ in range(3):
        model.reset_metrics()
        logs.append(float(model.train_on_batch(x, y, return_dict=True)["loss"]))
    np.testing.assert_allclose(logs, plain + 0.5 * missing * np.array([1, 10, 100]), rtol=1e-4)


def test_points_between_lie_between():
    x = np.random.default_rng(0).normal(size=(50, 3, 2)).astype("float32")
    points = numbers(between(x, keras.random.SeedGenerator(1)))
    before = np.roll(x, 1, axis=0)
    part = (points - x) / (before - x)
    np.testing.assert_allclose(part, np.broadcast_to(part[:, :1, :1], part.shape), rtol=1e-2, atol=1e-3)
    assert part.min() > -1e-3
    assert part.max() < 1 + 1e-3
    assert part.std() > 0.1


def test_a_box_is_filled():
    box = Box([0.0, -1.0], [1.0, 3.0], 2000)
    points = numbers(box(np.zeros((1, 2), "float32"), keras.random.SeedGenerator(0)))
    np.testing.assert_allclose(points.mean(axis=0), [0.5, 1.0], atol=0.1)
    np.testing.assert_allclose(points.min(axis=0), [0.0, -1.0], atol=0.01)
    np.testing.assert_allclose(points.max(axis=0), [1.0, 3.0], atol=0.01)
    assert box == Box([0, -1], [1, 3], 2000) != Box([0, -1], [1, 3], 2001)


@pytest.fixture
def linearizations(monkeypatch):
    """A list of the linearizations: at how many points each was, and whether in training mode."""
    calls = []

    def linearize(model, x, **kwargs):
        calls.append((x.shape[0], kwargs.get("training", False)))
        return jvpreg.linearize(model, x, **kwargs)

    for module in ("training.penalized_model", "regularizers.serving"):
        monkeypatch.setattr(f"jvpreg.{module}.linearize", linearize)
    return calls


def test_constraints_at_the_same_points_share_one_run_of_the_model(linearizations):
    x, y = data(8, outputs=2)
    model = compiled(
        Monotone([0], at=Box(-1.0, 1.0, 5)),
        DivergenceFree(at=Box(-1.0, 1.0, 5)),
        Monotone([1], at="between", name="other"),
        JacobianNorm(0.1),
        outputs=2,
        **COUNTED,
    )
    model.train_on_batch(x, y)
    if keras.backend.backend() == "jax":  # Counted in a trace, and JAX also traces to find the shapes of the model.
        assert set(linearizations) == {(8, True), (5, False), (8, False)}
    else:
        assert linearizations == [(8, True), (5, False), (8, False)]


def test_three_constraints_on_the_data_cost_one_primal_pass_and_the_sum_of_their_tangents(linearizations, monkeypatch):
    products = []
    original = jvpreg.Linearization.jvp

    def jvp(self, u):
        products.append(u.shape[0])
        return original(self, u)

    monkeypatch.setattr(jvpreg.Linearization, "jvp", jvp)
    x, y = data(8, outputs=2)
    constraints = [Monotone([0]), Bounded(-1.0, None, [0, 1]), DivergenceFree()]
    compiled(*constraints, outputs=2, **COUNTED).train_on_batch(x, y)
    assert set(linearizations) == {(8, True)}
    assert set(products) == {1 + 2 + 2}
    if COUNTED["run_eagerly"]:
        assert (len(linearizations), len(products)) == (1, 1)


def test_other_points_leave_batch_statistics_and_the_examples_weights_alone():
    x, y = data(8)

    def model():
        keras.utils.set_random_seed(1)
        return keras.Sequential([keras.Input((2,)), layers.Dense(4), layers.BatchNormalization(), layers.Dense(1)])

    statistics = []
    for constraints in ([], [Monotone([0], at=Box(5.0, 9.0, 16))]):
        one = compiled(*constraints, model=model())
        logs = one.train_on_batch(x, y, sample_weight=np.zeros(8), return_dict=True)
        statistics.append([numbers(w) for w in one.base.layers[1].non_trainable_weights])
    for plain, ours in zip(*statistics, strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-7)
    assert logs["loss"] == pytest.approx(logs["monotone"], rel=1e-5)


@pytest.mark.parametrize("arguments", [{"jacobian_interval": 2}, {"jacobian_fraction": 0.5}])
def test_every_kth_step_and_a_part_of_the_batch(arguments):
    x, y = data(8)
    rising = Monotone([0], enforcement=AugmentedLagrangian(rho=1.0, update_every=1))
    elsewhere = Monotone([1], at="between", name="elsewhere")
    model = compiled(rising, elsewhere, **arguments)
    worst = x[[np.argmin(slopes(model, x))]]
    history = model.fit(np.tile(worst, (8, 1)), y, batch_size=8, epochs=4, verbose=0, shuffle=False).history
    missing = -slopes(model, worst)[0]
    assert missing > 0.05
    computed = 2 if "jacobian_interval" in arguments else 4
    np.testing.assert_allclose(numbers(model.penalty_metrics[0].carried)[0], computed * missing, rtol=1e-4, atol=1e-7)
    means = np.array(history["monotone/violation_mean"])
    assert np.isnan(means).sum() == 4 - computed
    np.testing.assert_allclose(means[np.isfinite(means)], missing, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_targets_are_kept_from_the_loss_and_the_metrics():
    x, y = data(8)
    targets = np.random.default_rng(1).normal(size=(8, 2)).astype("float32")
    model = compiled(KnownDerivative("slope", [0, 1], enforcement=3.0), metrics=["mae"])
    history = model.fit(x, {"value": y, "slope": targets}, batch_size=8, verbose=0, validation_split=0.5).history
    outputs, jacobian = model.base.predict(x[:4], verbose=0), numbers(jvpreg.jacobian(model.base, x[:4]))[:, 0]
    missing = np.sum((jacobian - targets[:4]) ** 2, axis=1).mean()
    assert history["known_derivative"][0] == pytest.approx(missing, rel=1e-4)
    assert history["mae"][0] == pytest.approx(np.abs(outputs - y[:4]).mean(), rel=1e-4)
    assert history["loss"][0] == pytest.approx(np.mean((outputs - y[:4]) ** 2) + 3 * missing, rel=1e-4)
    assert "val_known_derivative/violation_max" in history


@pytest.mark.slow
def test_known_derivatives_are_learned():
    x = np.linspace(-1, 1, 32).reshape(-1, 1).astype("float32")
    keras.utils.set_random_seed(0)
    known = KnownDerivative(lambda inputs: ops.cos(inputs), [0], at="between", enforcement=1.0)
    model = compiled(known, model=base(inputs=1), optimizer=keras.optimizers.Adam(0.02))
    grid = np.linspace(-1, 1, 101).reshape(-1, 1).astype("float32")
    before = jvpreg.constraints.verify(model, known, grid).mean
    many = np.tile(x, (200, 1))
    model.fit(many, np.sin(many), batch_size=32, verbose=0)
    assert jvpreg.constraints.verify(model, known, grid).mean < 0.1 * before


def test_a_layer_can_be_constrained_too():
    block = keras.Sequential([keras.Input((2,)), layers.Dense(1, use_bias=False)], name="block")
    layer = jvpreg.layers.JacobianPenalty(block, [Monotone([0], enforcement=AugmentedLagrangian(2.0, update_every=1))])
    inputs = keras.Input((2,))
    model = keras.Model(inputs, layer(inputs))
    block.set_weights([np.array([[-3.0], [1.0]])])
    model.compile(keras.optimizers.SGD(0.0), "mse")
    x, y = data(4)
    plain = np.mean((x @ [[-3.0], [1.0]] - y) ** 2)
    losses = [float(model.fit(x, y, batch_size=4, verbose=0).history["loss"][0]) for _ in range(2)]
    # The multiplier is 0 in the first step and 2 · 3 in the second.
    np.testing.assert_allclose(losses, [plain + 9.0, plain + 9.0 + 18.0], rtol=1e-4)
