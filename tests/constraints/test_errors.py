"""A wrong argument is told by its name, before anything is computed."""

import keras
import numpy as np
import pytest
from keras import layers

import jvpreg
from jvpreg import constraints
from jvpreg.constraints import (
    AugmentedLagrangian,
    Bounded,
    Box,
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


def compiled(*regularizers, inputs=3, outputs=1):
    model = jvpreg.JacobianModel(keras.Sequential([keras.Input((inputs,)), layers.Dense(outputs)]))
    model.compile("sgd", "mse", jacobian_regularizers=list(regularizers))
    return model


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        (Monotone([0, 2]), Monotone([1, 2], increasing=False, name="down"), "slope by feature 2 nothing but 0"),
        (Monotone([1]), Bounded(-2.0, -1.0, [1]), "no slope by feature 1"),
        (Bounded(0.0, 1.0, [0]), Bounded(2.0, 3.0, [0], name="other"), "no slope by feature 0"),
        (Monotone([0]), Monotone([0], increasing=False, at="between", name="down"), "by feature 0 nothing but 0"),
        (Monotone([0], at=Box(0, 1, 8)), Bounded(-2.0, -1.0, [0], at=Box(0, 1, 8)), "no slope by feature 0"),
    ],
)
def test_contradictions_name_both_and_the_feature(one, other, message):
    for pair in ((one, other), (other, one)):
        with pytest.raises(ValueError, match="Expected constraints that can hold together") as raised:
            compiled(*pair)
        assert message in str(raised.value)
        assert f"`{one.name}`" in str(raised.value)
        assert f"`{other.name}`" in str(raised.value)


def test_what_can_hold_together_may_be_listed_together():
    compiled(
        Monotone([0]),
        Monotone([1], increasing=False, name="down"),
        Bounded(0.0, 1.0, [0]),
        Bounded(0.0, 0.0, [2], name="flat"),
        Lipschitz(1.0),
        jvpreg.regularizers.JacobianNorm(0.1),
    )


@pytest.mark.parametrize("other", [Box(-1.0, 0.0, 8), Box(0.0, 1.0, 9), "data", "between"])
def test_other_slopes_may_hold_at_other_places(other):
    compiled(Monotone([0], at=Box(0.0, 1.0, 8)), Monotone([0], increasing=False, at=other, name="down"))


@pytest.mark.parametrize(
    ("constraint", "sizes", "message"),
    [
        (Monotone([3]), (3, 1), "`features`. Expected features of inputs (B, D), from 0 to 2. Received: features=[3]"),
        (Bounded(0, 1, [0, 7]), (3, 1), "`directions`. Expected features of inputs (B, D), from 0 to 2"),
        (Invariant(np.ones((1, 4))), (3, 1), "`tangents`. Expected an array (P, …)"),
        (Symmetric(), (3, 2), "`symmetric` (Symmetric) is a constraint on a field. Expected as many outputs"),
        (DivergenceFree(), (3, 1), "Received: 3 inputs and 1 outputs"),
        (DivergenceFree(), (1, 1), "2 or more"),
        (DivergenceFree(at=Box([0.0], 1.0, 8)), (2, 2), "`low`. Expected a number, or an array like one example, (2,)"),
        (Monotone([0], at=Box(0.0, [1.0] * 2, 8)), (3, 1), "`high`. Expected a number, or an array like one example"),
    ],
)
@pytest.mark.parametrize("shape_known", [True, False])
def test_what_does_not_fit_the_model(constraint, sizes, message, shape_known):
    inputs, outputs = sizes
    base = [keras.Input((inputs,))] if shape_known else []
    model = jvpreg.JacobianModel(keras.Sequential([*base, layers.Dense(outputs)]))

    def compile_and_build():
        model.compile("sgd", "mse", jacobian_regularizers=[constraint])
        model.build((None, inputs))

    with pytest.raises(ValueError, match="Expected") as raised:
        compile_and_build() if not shape_known else model.compile(jacobian_regularizers=[constraint])
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Monotone([]), "`features`"),
        (lambda: Monotone([0, 0]), "`features`. Expected each feature once"),
        (lambda: Monotone([-1]), "`features`"),
        (lambda: Monotone(lambda x: x), "`features`. Expected a list of indices"),
        (lambda: Monotone([0.5]), "`features`"),
        (lambda: Monotone(0), "`features`. Expected a list of indices of features, from 0 on. Received: features=0"),
        (lambda: Monotone(range(-1, 1)), "`features`. Expected a list of indices of features, from 0 on. Received"),
        (lambda: Monotone(np.array([], int)), "`features`"),
        (lambda: Bounded(0.0, 1.0, 0), "features, from 0 on, an array of finite floats (P, …), or functions"),
        (
            lambda: Monotone([0], at=3),
            '`at`. Expected "data", "between", a function `(inputs, seed) -> points`, or the',
        ),
        (lambda: Monotone([0], enforcement="strong"), "`enforcement`. Expected a `Penalty`"),
        (lambda: Monotone([0], enforcement=-1.0), "strength of a penalty, a finite number, 0 or more"),
        (lambda: Monotone([0], tolerance=-1.0), "`tolerance`"),
        (lambda: Penalty(1.0, schedule=3), "`schedule`. Expected a function"),
        (lambda: AugmentedLagrangian(0.0), "`rho`. Expected a finite number above 0"),
        (lambda: AugmentedLagrangian(1.0, update_every=0), "`update_every`"),
        (lambda: Bounded(1.0, 0.0, [0]), "`low`. Expected a bound that is not above `high`, which is 0.0"),
        (lambda: Bounded(None, None, [0]), "`low`. Expected a bound if `high` is none, which is None"),
        (lambda: Lipschitz(0.0), "`bound`"),
        (lambda: Lipschitz(1.0, norm=3), "`norm`"),
        (lambda: Lipschitz(1.0, side="both"), "`side`"),
        (lambda: Symmetric(num_pairs=0), "`num_pairs`"),
        (lambda: KnownDerivative(3, [0]), "`targets`. Expected a key of the labels"),
        (
            lambda: KnownDerivative("slope", [0], at="between"),
            "no labels. Received: targets='slope', at='between'",
        ),
        (lambda: Monotone([0], name=""), "`name`. Expected a string that is not empty, or None"),
        (lambda: Linear("g", [0]), "`function`"),
        (lambda: Box(1.0, 0.0, 3), "`low`"),
        (lambda: Box(0.0, 1.0, 0), "`num_points`"),
        (lambda: tangents.Rotation(size=0.0), "`size`"),
        (lambda: tangents.Rotation()(np.ones((2, 8, 8), "float32")), "`images`. Expected floats (B, H, W, C)"),
        (lambda: tangents.Brightness()(np.ones((2, 8, 8, 1), "uint8")), "`images`. Expected floats"),
        (lambda: constraints.Segment([0.0], [0.0]), "`end`. Expected another point than `start`"),
        (
            lambda: constraints.Rectangle([0.0, 0.0], [1.0, 0.0], [0.0, 0.0]),
            "`second`. Expected a side that is not zero",
        ),
        (lambda: Box(0.0, np.inf, 3), "`high`. Expected a finite number"),
        (lambda: Box(np.nan, 1.0, 3), "`low`. Expected a finite number"),
        (lambda: Box([], [], 3), "`low`"),
        (lambda: Box([0.0, 0.0], [1.0] * 3, 3), "`low`. Expected numbers like `high`"),
        (lambda: Monotone([0], increasing="no"), "`increasing`. Expected True or False"),
        (lambda: Bounded(np.nan, 1.0, [0]), "`low`"),
        (lambda: constraints.verify(None, "monotone", None), "`constraint`. Expected one of `jvpreg.constraints`"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match="Invalid value for argument") as raised:
        make()
    assert message in str(raised.value)


def test_points_that_are_not_like_the_inputs():
    model = compiled(Monotone([0], at=lambda inputs, seed: inputs[:, :2]))
    with pytest.raises(
        ValueError, match=r"argument `at`. Expected points like the inputs, \(B, 3\). Received: \(.*, 2\)"
    ):
        model.fit(np.ones((4, 3)), np.ones((4, 1)), verbose=0)


def test_a_function_that_loses_the_examples():
    model = compiled(Linear(lambda x, y, slopes: slopes[0, :2, 0], [0]))
    with pytest.raises(ValueError, match=r"`function` of `linear` \(Linear\) returned the wrong shape"):
        model.train_on_batch(np.ones((4, 3)), np.ones((4, 1)))


@pytest.mark.parametrize("labels", [np.ones((4, 1)), {"value": np.ones((4, 1))}, {"slope": np.ones((4, 1))}])
def test_labels_without_the_targets(labels):
    model = compiled(KnownDerivative("slope", [0]))
    with pytest.raises(ValueError, match=r"argument `y`. Expected a dict with the labels of the loss and \['slope'\]"):
        model.fit(np.ones((4, 3)), labels, verbose=0)


@pytest.mark.parametrize("features", [range(2), np.array([0, 1]), np.array([0, 1], "uint8"), (0, np.int64(1))])
def test_indices_of_every_form(features):
    for constraint in (Monotone(features), Bounded(0.0, 1.0, features)):
        assert set(constraint.intervals()) == {0, 1}
        config = keras.saving.serialize_keras_object(constraint)
        assert keras.saving.deserialize_keras_object(config).intervals() == constraint.intervals()


def test_a_box_is_of_one_input():
    inputs = [keras.Input((2,)), keras.Input((3,))]
    model = jvpreg.JacobianModel(keras.Model(inputs, layers.Dense(1)(layers.Concatenate()(inputs))))
    with pytest.raises(ValueError, match=r"`at`.*each of the 2 inputs.*Received: Box\(low=0.0.*a box of one input"):
        model.compile("sgd", "mse", jacobian_regularizers=[Lipschitz(1.0, at=Box(0.0, 1.0, 8))])


def test_a_violation_is_computed_once():
    class Counts(Monotone):
        count = 0

        def violation(self, seen):
            self.count += 1
            return super().violation(seen)

    counts = Counts([0], enforcement=AugmentedLagrangian(1.0))
    model = compiled(counts)
    model.run_eagerly = True
    model.train_on_batch(np.ones((4, 3)), np.ones((4, 1)))
    assert counts.count == 1


def test_a_layer_has_no_labels():
    block = keras.Sequential([keras.Input((3,)), layers.Dense(1)])
    with pytest.raises(ValueError, match=r"or labels of their own.*the labels \['slope'\]. List it in `compile`"):
        jvpreg.layers.JacobianPenalty(block, [KnownDerivative("slope", [0])])


@pytest.mark.parametrize(
    "arguments",
    [{"at": "between"}, {"enforcement": Penalty(1.0, keras.optimizers.schedules.ExponentialDecay(1, 2, 0.5))}],
)
def test_a_layer_has_neither_points_nor_steps(arguments):
    block = keras.Sequential([keras.Input((3,)), layers.Dense(1)])
    with pytest.raises(ValueError, match=r"Expected regularizers on the data, without .* at='(data|between)'"):
        jvpreg.layers.JacobianPenalty(block, [Monotone([0], **arguments)])
