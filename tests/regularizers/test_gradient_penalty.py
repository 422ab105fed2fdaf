"""`GradientPenalty` against finite differences, and the points between real and generated examples."""

import re

import keras
import numpy as np
import pytest
from keras import layers, ops

import jvpreg
from jvpreg.regularizers import GradientPenalty
from jvpreg.regularizers.points import between_kinds

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(6, 4))
LABELS = np.array([1.0, -1.0, -1.0, 1.0, -1.0, 1.0])[:, None]


def critic():
    base = keras.Sequential([keras.Input((4,)), layers.Dense(5, "tanh"), layers.Dense(1)])
    base.set_weights([np.random.default_rng(i).normal(size=w.shape) for i, w in enumerate(base.weights)])
    return base


def gradients(weights, x):
    """The gradient of the critic, `(B, 4)`, written out."""
    first, bias, last, _ = weights
    return ((1 - np.tanh(x @ first + bias) ** 2) * last[:, 0]) @ first.T


def expected(weights, x, target, one_sided):
    excess = np.linalg.norm(gradients(weights, x), axis=1) - target
    return np.mean(np.maximum(excess, 0) ** 2 if one_sided else excess**2)


def no_loss(labels, outputs):
    return 0.0 * ops.sum(outputs, axis=-1)


def compiled(base, *regularizers, learning_rate=0.0, loss=no_loss):
    model = jvpreg.JacobianModel(base, seed=0)
    model.compile(keras.optimizers.SGD(learning_rate), loss, jacobian_regularizers=list(regularizers))
    return model


# A target of 2.2 lies among the norms: some of them are larger, others smaller.
@pytest.mark.parametrize(("target", "one_sided"), [(2.2, False), (2.2, True), (0.0, False)])
def test_the_penalty_and_its_weight_gradient(target, one_sided, float64):
    base = critic()
    before = base.get_weights()
    norms = np.linalg.norm(gradients(before, X), axis=1)
    assert norms.min() < 2 < 2.4 < norms.max()
    model = compiled(base, GradientPenalty(1.0, target, "data", one_sided), learning_rate=1.0)
    reported = model.train_on_batch(X, LABELS, return_dict=True)["gradient_penalty"]
    np.testing.assert_allclose(reported, expected(before, X, target, one_sided), rtol=1e-6)
    directions = [RANDOM.normal(size=weight.shape) for weight in before]
    moved = sum(np.sum((b - a) * d) for b, a, d in zip(before, base.get_weights(), directions, strict=True))
    values = [
        expected([w + step * d for w, d in zip(before, directions, strict=True)], X, target, one_sided)
        for step in (1e-6, -1e-6)
    ]
    np.testing.assert_allclose(moved, (values[0] - values[1]) / 2e-6, rtol=1e-6)


@pytest.mark.parametrize("one_sided", [False, True])
def test_no_weight_becomes_nan_where_the_gradient_is_zero(one_sided):
    base = critic()
    weights = base.get_weights()
    weights[2] = np.zeros_like(weights[2])
    base.set_weights(weights)
    model = compiled(base, GradientPenalty(1.0, one_sided=one_sided), learning_rate=1.0)
    found = model.train_on_batch(X, LABELS, return_dict=True)
    assert found["gradient_penalty"] == (0.0 if one_sided else 1.0)
    for before, after in zip(weights, base.get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)


def test_the_gradient_by_what_a_layer_returned():
    base = critic()
    model = compiled(base, GradientPenalty(1.0, at=base.layers[0].name))
    found = model.evaluate(X, LABELS, verbose=0, return_dict=True)["gradient_penalty"]
    np.testing.assert_allclose(found, (np.linalg.norm(base.get_weights()[2]) - 1) ** 2, rtol=1e-5)


def test_a_gradient_that_is_not_a_number_is_not_taken_for_zero():
    found = ops.convert_to_numpy(GradientPenalty(1.0).price(np.array([[np.nan, 0.0], [0.0, 0.0], [3.0, 4.0]])))
    np.testing.assert_allclose(found, [np.nan, 1.0, 16.0], rtol=1e-6)


def pairs_of(points, x, larger):
    """For each point its part of the way, and the two examples `(i, j)` of different kinds between which it lies."""
    found = []
    for point in points:
        lying = []
        for i in np.flatnonzero(larger):
            for j in np.flatnonzero(~larger):
                part = (point - x[i]) @ (x[j] - x[i]) / np.sum((x[j] - x[i]) ** 2)
                if np.allclose(point, x[i] + part * (x[j] - x[i]), atol=1e-5):
                    lying.append((part, i, j))
        assert len(lying) == 1, "a point between examples of one kind, or of none"
        found += lying
    return found


@pytest.mark.parametrize("labels", [LABELS, LABELS[:, 0] < 0, np.array([1, 0, 0, 0, 0, 0]), [3, 3, 3, 3, 2, 3]])
def test_points_lie_between_the_kinds_in_whatever_order(labels):
    labels = np.asarray(labels)
    numbers = labels.astype("float64").reshape(-1)
    larger = numbers == numbers.max()
    points = ops.convert_to_numpy(between_kinds(X, keras.random.SeedGenerator(0), labels))
    found = pairs_of(points, X, larger)
    assert len(found) == 3
    parts, one, other = zip(*found, strict=True)
    assert all(0 <= part <= 1 for part in parts)
    assert len({*parts}) == 3
    # No example is used twice, as long as there are others of its kind.
    count = int(larger.sum())
    assert (len(set(one)), len(set(other))) == (min(3, count), min(3, 6 - count))


def test_points_of_several_inputs_belong_together():
    codes = np.arange(6)
    inputs = {"x": X, "code": codes, "again": X.reshape(6, 2, 2)}
    found = between_kinds(inputs, keras.random.SeedGenerator(0), LABELS)
    x, code = (ops.convert_to_numpy(found[key]) for key in ("x", "code"))
    np.testing.assert_array_equal(ops.convert_to_numpy(found["again"]).reshape(3, 4), x)
    # The integers are those of the example with the larger label.
    assert [one for _, one, _ in pairs_of(x, X, LABELS[:, 0] > 0)] == code.tolist()


def test_examples_of_one_kind_are_points_themselves():
    points = ops.convert_to_numpy(between_kinds(X[:3], keras.random.SeedGenerator(0), np.ones(3)))
    np.testing.assert_allclose(points, X[:2], rtol=1e-6)


@pytest.mark.parametrize("fraction", [1.0, 0.6])
def test_a_fit_looks_between_the_kinds_of_shuffled_examples(fraction):
    """The critic rises by 3 between the two kinds alone: at the examples themselves it is level."""
    rise = [layers.Rescaling(3.0, -3.0), layers.ReLU(max_value=6.0), layers.Dense(1, kernel_initializer="ones")]
    model = jvpreg.JacobianModel(keras.Sequential([keras.Input((1,)), *rise]), seed=0)
    regularizers = [GradientPenalty(0.0), GradientPenalty(0.0, at="data", name="level")]
    model.compile("sgd", no_loss, jacobian_regularizers=regularizers, jacobian_fraction=fraction)
    history = model.fit(LABELS + 2.0, LABELS, batch_size=6, epochs=3, verbose=0).history
    np.testing.assert_allclose(history["gradient_penalty"], [4.0] * 3, rtol=1e-6)
    np.testing.assert_allclose(history["level"], [1.0] * 3, rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GradientPenalty(1.0, target=-1.0), "`target`. Expected a finite number, 0 or more"),
        (lambda: GradientPenalty(1.0, at=np.ones(2)), '`at`. Expected "between", "data", a function'),
        (lambda: GradientPenalty(1.0, one_sided=1), "`one_sided`. Expected True or False"),
        (
            lambda: compiled(keras.Sequential([keras.Input((4,)), layers.Dense(2)]), GradientPenalty(1.0)),
            "`gradient_penalty` (GradientPenalty) is a penalty on the gradient of a critic. Expected one output",
        ),
        (
            lambda: compiled(critic(), GradientPenalty(1.0), loss=None).train_on_batch(X),
            "`y`. Expected labels (B,) or (B, 1), which tell real examples from generated ones",
        ),
        (
            lambda: compiled(critic(), GradientPenalty(1.0)).train_on_batch(X, np.ones((6, 2))),
            "`y`. Expected labels (B,) or (B, 1), which tell real examples from generated ones",
        ),
        (
            lambda: jvpreg.layers.JacobianPenalty(critic(), [GradientPenalty(1.0)]),
            "with at='between'. List it in `compile` of a JacobianModel",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
