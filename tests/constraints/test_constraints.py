"""Each constraint, on known Jacobians: it costs exactly nothing where it holds, and something where it does not."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import jvpreg
from jvpreg.constraints import (
    AugmentedLagrangian,
    Bounded,
    DivergenceFree,
    Invariant,
    KnownDerivative,
    Linear,
    Lipschitz,
    Monotone,
    Penalty,
    Symmetric,
    tangents,
)
from tests.constraints.fields import linear, numbers, outcome, points, violations


def known_slopes(inputs):
    return ops.broadcast_to(ops.convert_to_tensor([[1.0, 3.0]], dtype=inputs.dtype), (ops.shape(inputs)[0], 2))


def sum_of_slopes(inputs, outputs, products):
    return 2.0 - ops.sum(products[0], axis=-1)


# Each row: the constraint, a Jacobian for which it holds, one for which it does not, and the violation of the latter.
ROWS = {
    "monotone": (lambda **a: Monotone([0], **a), [[2.0, -1.0]], [[-0.5, 1.0]], [0.5]),
    "monotone-zero-slope": (lambda **a: Monotone([1], **a), [[2.0, 0.0]], [[2.0, -3.0]], [3.0]),
    "monotone-decreasing": (lambda **a: Monotone([0, 1], increasing=False, **a), [[-1, -2]], [[1, -2]], [1, 0]),
    "monotone-outputs": (lambda **a: Monotone([0], **a), [[1, -1], [2, -1]], [[1, -1], [-2, -1]], [0, 2]),
    "bounded": (lambda **a: Bounded(-1.0, 2.0, [0, 1], **a), [[-1.0, 2.0]], [[-1.5, 4.0]], [0.5, 2.0]),
    "bounded-above": (lambda **a: Bounded(None, 0.0, np.array([[1.0, 1.0]]), **a), [[-2, 1]], [[2, 1]], [3]),
    "bounded-below": (lambda **a: Bounded(1.0, None, [1], **a), [[-5, 1]], [[9, 0.25]], [0.75]),
    "lipschitz-2": (lambda **a: Lipschitz(5.0, **a), [[3, 0], [0, 4]], [[6, 0], [0, 8]], [3]),
    "lipschitz-2-row": (lambda **a: Lipschitz(5.0, **a), [[3, 4]], [[6, 8]], [5]),
    "lipschitz-2-input": (lambda **a: Lipschitz(5.0, side="input", **a), [[3, 4]], [[6, 8]], [5]),
    "lipschitz-1": (lambda **a: Lipschitz(3.0, norm=1, **a), [[1, 2], [-2, 1]], [[1, 2], [-2, -4]], [3]),
    "lipschitz-1-input": (
        lambda **a: Lipschitz(3.0, norm=1, side="input", **a),
        [[1, 2], [-2, 1]],
        [[1, 2], [0, 4]],
        [3],
    ),
    "lipschitz-inf": (lambda **a: Lipschitz(3.0, norm="inf", **a), [[1, 2], [-2, 1]], [[1, 2], [-2, -4]], [3]),
    "lipschitz-inf-input": (lambda **a: Lipschitz(3.0, norm="inf", side="input", **a), [[1, 2]], [[-2, -4]], [3]),
    "invariant": (lambda **a: Invariant(np.array([[1.0, 1.0]]), **a), [[2, -2]], [[2, -1]], [1]),
    "invariant-field": (lambda **a: Invariant(lambda x: ops.ones_like(x), **a), [[2, -2]], [[1, -3]], [2]),
    "known-function": (lambda **a: KnownDerivative(known_slopes, [0, 1], **a), [[1, 3]], [[1, 2.5]], [0, 0.5]),
    "symmetric": (Symmetric, [[1, 2], [2, 5]], [[1, 2], [1.5, 5]], [0.5]),
    "divergence": (DivergenceFree, [[3, 1], [7, -3]], [[3, 1], [7, -1]], [2]),
    "linear": (lambda **a: Linear(sum_of_slopes, [0], **a), [[1.0, 9], [1.0, 9]], [[0, 9], [1, 9]], [1]),
    "linear-equality": (
        lambda **a: Linear(sum_of_slopes, [0], equality=True, **a),
        [[1, 9], [1, 9]],
        [[2, 9], [1, 9]],
        [1],
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_zero_where_it_holds_and_what_is_missing_where_it_does_not(name):
    make, holds, violated, expected = ROWS[name]
    x = points()
    enforcements = [Penalty(1.0), AugmentedLagrangian(rho=2.0)]
    for enforcement in enforcements:
        constraint = make(enforcement=enforcement)
        carried = None
        if isinstance(enforcement, AugmentedLagrangian):
            carried = ops.ones((3, constraint.components(ops.ones((1, len(violated))))))
        assert numbers(outcome(constraint, linear(holds), x, carried=carried).penalty).max() < 1e-10
        found = numbers(outcome(constraint, linear(violated), x, carried=carried).penalty)
        missing = np.array(expected, "float64")
        price = np.sum(missing**2) if carried is None else np.sum(missing + missing**2)
        np.testing.assert_allclose(found, price, rtol=1e-4)
    np.testing.assert_allclose(violations(make(), linear(holds), x), 0.0, atol=1e-5)
    np.testing.assert_allclose(violations(make(), linear(violated), x), np.tile(expected, (5, 1)), rtol=1e-4, atol=1e-5)


def test_every_constraint_has_a_row():
    made = {type(make()) for make, *_ in ROWS.values()}
    public = [getattr(jvpreg.constraints, name) for name in jvpreg.constraints.__all__]
    kinds = {c for c in public if isinstance(c, type) and issubclass(c, jvpreg.constraints.Constraint)}
    assert made == kinds - {jvpreg.constraints.Constraint}


def test_random_pairs_see_an_asymmetry_and_nothing_else():
    x = points(400)
    assert violations(Symmetric(num_pairs=3), linear([[1, 2], [2, 5]]), x).max() < 1e-4
    found = violations(Symmetric(num_pairs=3), linear([[1, 2], [1, 5]]), x)
    assert found.shape == (400, 3)
    # ‖J − Jᵀ‖_F² = 2. The standard error is that of the mean over 400 points with 3 pairs each.
    assert abs(np.mean(found**2) - 2) < 4 * np.std(found**2) / np.sqrt(1200)


def test_targets_come_with_the_labels():
    model = linear([[1.0, 3.0]])
    x = points(4)
    constraint = KnownDerivative("slope", directions=[0, 1])
    slopes = np.array([[1, 3], [1, 3], [0, 3], [1, 5.0]])
    np.testing.assert_allclose(
        violations(constraint, model, x, {"slope": slopes}), [[0, 0], [0, 0], [1, 0], [0, 2]], atol=1e-5
    )
    with pytest.raises(ValueError, match=r"targets that do not fit. Expected \(B, …\) with 2 numbers an example"):
        violations(constraint, model, x, {"slope": slopes[:, :1]})
    with pytest.raises(ValueError, match=r"Expected a dict with the key 'slope'. Received: \['slpoe'\]"):
        violations(constraint, model, x, {"slpoe": slopes})


def test_several_fields_are_several_directions():
    images = np.random.default_rng(0).uniform(size=(3, 6, 6, 1)).astype("float32")
    model = keras.Sequential([keras.Input((6, 6, 1)), layers.GlobalAveragePooling2D()])
    constraint = Invariant([tangents.Translation(), tangents.Brightness()])
    assert constraint.components(ops.ones((1, 4))) == 12
    found = violations(constraint, model, images)
    assert found.shape == (3, 3)
    np.testing.assert_allclose(found[:, 2], 1.0, rtol=1e-5)


CONFIGURED = [
    Monotone([0], increasing=False, enforcement=AugmentedLagrangian(3.0, update_every=7), at="between", name="one"),
    Bounded(None, 1.0, np.array([[1.0, 0.0]]), tolerance=0.1),
    Lipschitz(2.0, norm="inf", side="input", at=jvpreg.constraints.Box(-1.0, [1.0, 2.0], 32)),
    Invariant([tangents.Translation(2.0), tangents.Rotation()]),
    KnownDerivative("slope", [0, 1]),
    Symmetric(2, enforcement=Penalty(0.5, keras.optimizers.schedules.ExponentialDecay(1.0, 10, 0.5))),
    DivergenceFree(enforcement=0.25),
]


@pytest.mark.parametrize("constraint", CONFIGURED, ids=lambda c: c.name)
def test_the_config_goes_round(constraint):
    config = keras.saving.serialize_keras_object(constraint)
    again = keras.saving.deserialize_keras_object(config)
    assert type(again) is type(constraint)
    assert keras.saving.serialize_keras_object(again) == config
    assert (again.name, again.tolerance, again.at) == (constraint.name, constraint.tolerance, constraint.at)


def smooth_field():
    model = keras.Sequential([keras.Input((2,)), layers.Dense(5, activation="tanh"), layers.Dense(2)])
    random = np.random.default_rng(1)
    model.set_weights(
        [scale * random.normal(size=w.shape) for scale, w in zip((1, 1, 2, 1), model.get_weights(), strict=True)]
    )
    return model


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("multipliers", [False, True])
@pytest.mark.parametrize("name", [name for name in ROWS if name != "known-function"])
def test_the_gradient_by_the_weights_is_that_of_finite_differences(name, multipliers):
    # The loss is the penalty alone, so SGD moves the weights by its gradient.
    enforcement = AugmentedLagrangian(rho=0.7) if multipliers else Penalty(0.7)
    constraint = ROWS[name][0](enforcement=enforcement)
    if "lipschitz" in name:
        constraint.bound = 0.5
    model = jvpreg.JacobianModel(smooth_field())
    model.compile(keras.optimizers.SGD(1.0), _nothing, jacobian_regularizers=[constraint], run_eagerly=False)
    if multipliers:
        model.penalty_metrics[0].carried.assign(0.2 + np.zeros(model.penalty_metrics[0].carried.shape))
    state = [np.array(numbers(v)) for v in model.penalty_metrics[0].variables]
    x, y = points(6), np.zeros((6, 2))
    weights = model.get_weights()

    def loss_at(values):
        model.set_weights(values)
        model.reset_metrics()
        for variable, value in zip(model.penalty_metrics[0].variables, state, strict=True):
            variable.assign(value)
        return float(model.train_on_batch(x, y, return_dict=True)["loss"])

    assert loss_at(weights) > 1e-3
    trainable = [any(w is v for v in model.trainable_weights) for w in model.weights]
    gradient = [before - after for before, after in zip(weights, model.get_weights(), strict=True)]
    random, size = np.random.default_rng(0), 1e-6
    v = [random.normal(size=w.shape) * t for w, t in zip(weights, trainable, strict=True)]
    ahead, behind = (
        loss_at([w + sign * size * d if t else w for w, d, t in zip(weights, v, trainable, strict=True)])
        for sign in (1, -1)
    )
    slope = sum(np.sum(g * d) for g, d, t in zip(gradient, v, trainable, strict=True) if t)
    np.testing.assert_allclose((ahead - behind) / (2 * size), slope, rtol=1e-5, atol=1e-8)


def _nothing(labels, outputs):
    return 0.0 * ops.sum(outputs, axis=-1)
