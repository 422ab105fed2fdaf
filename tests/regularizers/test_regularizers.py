"""Regularizers: unbiased, serializable, and all in one tangent pass."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import jvpreg
from jvpreg.linearization import Linearization
from jvpreg.regularizers import Constrains, JacobianNorm, JacobianRegularizer, Looks, Scheduled, SpectralNorm
from jvpreg.regularizers.serving import serve

MATRIX = np.random.default_rng(0).normal(size=(5, 3))
NORM = np.sum(MATRIX**2)


def linear_model():
    model = keras.Sequential([keras.Input((5,)), layers.Dense(3)])
    model.set_weights([MATRIX, np.ones(3)])
    return model


def penalty_of(regularizers, batch=4, labels=None, seed=0):
    """The penalties `(R, B)` at random inputs."""
    x = np.random.default_rng(1).normal(size=(batch, 5)).astype("float32")
    lin = jvpreg.linearize(linear_model(), x)
    serving = serve(regularizers, lin, seed, labels=[labels] * len(regularizers))
    return np.stack([ops.convert_to_numpy(outcome.penalty) for outcome in serving.outcomes()])


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("probes", ["gaussian", "rademacher", "sphere", "orthogonal"])
def test_the_norm_is_unbiased(probes, side):
    values = penalty_of([JacobianNorm(1.0, num_probes=2, probes=probes, side=side)], batch=4000)[0]
    error = values.std() / np.sqrt(len(values))
    assert error > 0
    assert abs(values.mean() - NORM) < 4 * error
    assert error < 0.03 * NORM


@pytest.mark.parametrize(("side", "probes"), [("output", 3), ("input", 5)])
def test_as_many_orthogonal_probes_as_dimensions_are_exact(side, probes):
    values = penalty_of([JacobianNorm(1.0, num_probes=probes, probes="orthogonal", side=side)])
    np.testing.assert_allclose(values, NORM, rtol=1e-5)


def test_the_variance_of_a_gaussian_probe_is_the_documented_one():
    values = penalty_of([JacobianNorm(1.0)], batch=20000)[0]
    gram = MATRIX.T @ MATRIX
    np.testing.assert_allclose(values.var(), 2 * np.sum(gram**2), rtol=0.1)


def test_the_variance_on_the_sphere_of_the_outputs_is_the_documented_one():
    values = penalty_of([JacobianNorm(1.0, probes="sphere", side="output")], batch=20000)[0]
    gram = MATRIX.T @ MATRIX
    np.testing.assert_allclose(values.var(), 2 * 3 / 5 * (np.sum(gram**2) - NORM**2 / 3), rtol=0.1)


@pytest.mark.parametrize("strength", [-1.0, float("nan"), float("inf"), "0.1", None])
def test_bad_strength(strength):
    with pytest.raises(ValueError, match=r"argument `strength` of JacobianNorm. Expected a finite number, 0 or more"):
        JacobianNorm(strength)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_probes": 0}, "`num_probes`. Expected an integer, 1 or more. Received: num_probes=0"),
        ({"num_probes": 1.5}, "`num_probes`"),
        ({"side": "both"}, '`side`. Expected "input" or "output". Received: side=\'both\''),
        ({"probes": "uniform"}, '`probes`. Expected "gaussian", "'),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match="Invalid value for argument") as raised:
        JacobianNorm(0.1, **arguments)
    assert message in str(raised.value)


def test_more_orthogonal_probes_than_dimensions():
    with pytest.raises(ValueError, match="Expected at most 3, the dimension of the space"):
        penalty_of([JacobianNorm(1.0, num_probes=4, probes="orthogonal", side="output")])


def test_the_config_goes_round():
    regularizer = JacobianNorm(0.1, num_probes=3, probes="sphere", side="output", name="mine")
    config = keras.saving.serialize_keras_object(regularizer)
    assert keras.saving.deserialize_keras_object(config).get_config() == regularizer.get_config()
    assert config["registered_name"] == "jvpreg>JacobianNorm"


class Both(JacobianRegularizer):
    """`1ᵀ J e_0` two ways: it sees its own products, in both directions."""

    def directions(self, inputs, labels, seed):
        return ops.expand_dims(ops.one_hot(ops.zeros(ops.shape(inputs)[0], "int32"), 5), 0)

    def cotangents(self, outputs, labels, seed):
        return ops.stack([ops.ones_like(outputs), 2 * ops.ones_like(outputs)])

    def penalty(self, seen):
        assert (seen.directions.shape[0], seen.cotangents.shape[0]) == (1, 2)
        # The three terms are the same number.
        return (ops.sum(seen.jvp[0], axis=-1) + seen.vjp[0, :, 0] + seen.vjp[1, :, 0] / 2) / 3


class AlongLabels(JacobianRegularizer):
    """`‖J e_label‖²`."""

    def directions(self, inputs, labels, seed):
        return ops.expand_dims(ops.one_hot(labels, 5), 0)

    def penalty(self, seen):
        return ops.sum(seen.jvp[0] ** 2, axis=-1)


class Logit(JacobianRegularizer):
    """`‖∇ f_label‖²`, by a cotangent."""

    def cotangents(self, outputs, labels, seed):
        return ops.expand_dims(ops.one_hot(labels, 3), 0)

    def penalty(self, seen):
        return ops.sum(seen.vjp[0] ** 2, axis=-1)


def test_regularizers_of_every_kind_share_one_pass_each_way(monkeypatch):
    calls = []
    for name in ("jvp", "vjp"):
        original = getattr(Linearization, name)

        def counted(self, vectors, name=name, original=original):
            calls.append((name, tuple(vectors.shape)))
            return original(self, vectors)

        monkeypatch.setattr(Linearization, name, counted)
    labels = np.array([0, 1, 2, 1])
    regularizers = [
        JacobianNorm(1.0, num_probes=2),
        Both(1.0),
        AlongLabels(1.0),
        Logit(1.0),
        JacobianNorm(1.0, num_probes=3, probes="orthogonal", side="output", name="exact"),
    ]
    values = penalty_of(regularizers, labels=labels)
    assert calls == [("jvp", (4, 4, 5)), ("vjp", (6, 4, 3))]
    np.testing.assert_allclose(values[1], MATRIX[0].sum(), rtol=1e-5)
    np.testing.assert_allclose(values[2], np.sum(MATRIX[labels] ** 2, axis=1), rtol=1e-5)
    np.testing.assert_allclose(values[3], np.sum(MATRIX[:, labels] ** 2, axis=0), rtol=1e-5)
    np.testing.assert_allclose(values[4], NORM, rtol=1e-5)


def test_what_is_seen_forward_and_back_is_the_same_jacobian():
    class Agreement(Both):
        def penalty(self, seen):
            return ops.abs(ops.sum(seen.jvp[0], axis=-1) - seen.vjp[1, :, 0] / 2)

    assert penalty_of([Agreement(1.0)]).max() < 1e-5


class Broken(JacobianRegularizer):
    """Has the faults that a test gives it."""

    def __init__(self, directions=None, cotangents=None, penalty=lambda seen: seen.jvp[0, :, 0]):
        super().__init__(1.0)
        self._returned = {"directions": directions, "cotangents": cotangents, "penalty": penalty}

    def directions(self, inputs, labels, seed):
        return self._returned["directions"]

    def cotangents(self, outputs, labels, seed):
        return self._returned["cotangents"]

    def penalty(self, seen):
        return self._returned["penalty"](seen)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "`broken` (Broken) asks for no product with the Jacobian"),
        ({"directions": np.ones((4, 5))}, "`directions` of `broken` (Broken) returned tensors of the wrong shape"),
        ({"directions": np.ones((1, 4, 3))}, "Expected a leading axis of P probes before (B, 5). Received: (1, 4, 3)"),
        ({"cotangents": np.ones((1, 4, 5))}, "`cotangents` of `broken` (Broken) returned tensors of the wrong shape"),
        ({"directions": np.ones((1, 4, 5)), "penalty": lambda seen: seen.jvp}, "Expected (B,), one number an example"),
        ({"directions": np.ones((1, 4, 5)), "penalty": lambda seen: seen.jvp[:, 0, 0]}, "Received: (1,)"),
    ],
)
@pytest.mark.parametrize("company", [False, True])
def test_a_regularizer_that_returns_the_wrong_thing(arguments, message, company):
    with pytest.raises(ValueError, match="broken") as raised:
        penalty_of([*([JacobianNorm(1.0)] if company else []), Broken(**arguments)])
    assert message in str(raised.value)


def test_a_subclass_without_a_penalty_is_told_so():
    class Silent(JacobianRegularizer):
        def directions(self, inputs, labels, seed):
            return ops.expand_dims(ops.ones_like(inputs), 0)

    with pytest.raises(NotImplementedError, match="Silent must override `penalty"):
        penalty_of([Silent(1.0)])


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        ("draw", "Looks"),
        ("look", "Looks"),
        ("carried_shape", "Carries"),
        ("sums_shape", "Carries"),
        ("sums", "Carries"),
        ("carry", "Carries"),
        ("search", "Searches"),
        ("strength_at", "Scheduled"),
        ("contradicts", "Constrains"),
        ("measure", "Constrains"),
    ],
)
def test_a_method_that_nothing_asks_for_is_refused(method, kind):
    """A method is used only if the regularizer has the base class that announces it."""
    regularizer = type("Norm", (JacobianNorm,), {method: lambda self, *arguments: None})(0.1)
    model = jvpreg.JacobianModel(linear_model())
    with pytest.raises(ValueError, match=rf"`jacobian_regularizers`\. Expected `jvpreg\.regularizers\.{kind}` among"):
        model.compile(loss="mse", jacobian_regularizers=[regularizer])


@pytest.mark.parametrize(
    ("bases", "attributes", "error", "message"),
    [
        ((), {"measures": {"size": "mean"}}, ValueError, r"`jvpreg\.regularizers\.Constrains` among .* `measures`"),
        ((), {"scheduled": True}, ValueError, r"`jvpreg\.regularizers\.Scheduled` among .* `scheduled`"),
        (
            (Constrains,),
            {"measures": {"size": "sum"}},
            ValueError,
            r"`measures\[.size.\]`. Expected .*max.*last",
        ),
        ((Constrains,), {"measures": {"size": "mean"}}, NotImplementedError, "Norm must override `measure"),
        (
            (Constrains,),
            {"measures": {"size": "mean"}, "measure": lambda self, seen: {"length": 0.0}},
            ValueError,
            r"`measure` of `.*` \(Norm\) .* Expected: \['size'\]. Received: \['length'\]",
        ),
    ],
)
def test_what_a_regularizer_says_of_itself_must_fit(bases, attributes, error, message):
    regularizer = type("Norm", (*bases, JacobianNorm), attributes)(0.1)
    model = jvpreg.JacobianModel(linear_model())

    def train():
        model.compile(loss="mse", jacobian_regularizers=[regularizer])
        model.fit(np.ones((2, 5)), np.ones((2, 3)), verbose=0)

    with pytest.raises(error, match=message):
        train()


def test_an_attribute_is_no_method():
    regularizer = JacobianNorm(0.1)
    regularizer.search = "grid"
    jvpreg.JacobianModel(linear_model()).compile(loss="mse", jacobian_regularizers=[regularizer])


@pytest.mark.parametrize("order", [1, -1])
def test_each_of_a_pair_may_say_that_it_contradicts_the_other(order):
    class Alone(Constrains, JacobianNorm):
        def contradicts(self, other):
            return "it wants to be alone"

    model = jvpreg.JacobianModel(linear_model())
    with pytest.raises(ValueError, match="it wants to be alone"):
        model.compile(loss="mse", jacobian_regularizers=[Alone(0.1, name="alone"), JacobianNorm(0.1)][::order])


@pytest.mark.parametrize("bases", [(JacobianNorm, Scheduled), (Scheduled, JacobianNorm)])
def test_a_schedule_counts_in_any_order_of_the_bases(bases):
    rising = type("Rising", bases, {"strength_at": lambda self, step: 10.0})(0.0)
    base = linear_model()
    model = jvpreg.JacobianModel(base)
    model.compile(keras.optimizers.SGD(0.01), "mse", jacobian_regularizers=[rising], jit_compile=False)
    x = np.ones((2, 5))
    model.fit(x, ops.convert_to_numpy(base(x)), verbose=0)  # no loss beside the penalty
    assert np.abs(ops.convert_to_numpy(base.weights[0]) - MATRIX).max() > 1e-3
    with pytest.raises(ValueError, match="and a schedule"):
        jvpreg.layers.JacobianPenalty(layers.Dense(3), [rising])


def test_what_searches_may_also_look():
    class Both(Looks, SpectralNorm):
        def draw(self, linearization, inputs, seed):
            return jvpreg.probes.draw("gaussian", inputs, 1, seed)

        def look(self, linearization, drawn, labels):
            return linearization.jvp(drawn)

        def penalty(self, seen):
            return super().penalty(seen) + 0.0 * ops.sum(seen.found[0], axis=-1)

    model = jvpreg.JacobianModel(linear_model())
    model.compile(loss="mse", jacobian_regularizers=[Both(0.1)], jit_compile=False)
    history = model.fit(np.ones((2, 5)), np.ones((2, 3)), verbose=0).history
    assert 0 < history["spectral_norm_squared"][0] <= NORM
