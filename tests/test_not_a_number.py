"""If an example is not finite, everything that is said of its Jacobian is NaN, and nothing else is."""

import inspect

import keras
import numpy as np
import pytest
from keras import layers, ops

import jvpreg
from jvpreg import constraints, estimators
from jvpreg.attribution import saliency
from jvpreg.callbacks import JacobianProbe

ESTIMATORS = {name: getattr(estimators, name) for name in estimators.__all__ if name.islower()}
# Options with which no Jacobian is materialized, for estimators that have such options.
ITERATED = {
    "frobenius_norm": {"num_probes": 4},
    "diagonal": {"num_matvecs": 6},
    "row_norms": {"num_probes": 4},
    "schatten_norm": {"num_probes": 2, "num_iterations": 4},
    "top_singular_values": {"num_iterations": 2},
    "spectral_norm": {"num_iterations": 2},
    "top_eigenvalues": {"num_iterations": 2},
    "stable_rank": {"num_probes": 4, "num_iterations": 2},
    "effective_rank": {"num_probes": 2, "num_iterations": 4},
    "trace": {"num_matvecs": 6},
    "log_determinant": {"num_probes": 2, "num_iterations": 4},
    "inverse_frobenius_norm": {"num_probes": 2, "num_iterations": 4},
    "spectral_density": {"num_probes": 2, "num_iterations": 4},
}
ALWAYS_ALIKE = {"condition_number", "fixed_point_spectral_radius", "singular_values"}
X = np.random.default_rng(0).normal(size=(3, 12)).astype("float32")


def network(activation="relu"):
    """The ReLU's slope hides NaN. The Jacobian is far from singular; otherwise rounding would decide some values."""
    keras.utils.set_random_seed(0)
    x = keras.Input((12,))
    return keras.Model(x, 2 * x + layers.Dense(12)(layers.Dense(16, activation)(x)))


def fixed_point():
    keras.utils.set_random_seed(0)
    x, z = keras.Input((12,)), keras.Input((12,))
    cell = keras.Model([x, z], ops.tanh(layers.Dense(12)(x) + 0.2 * layers.Dense(12)(z)))
    return keras.Sequential([keras.Input((12,)), jvpreg.layers.FixedPoint(cell, unconverged="ignore")])


def spoilt(number):
    x = X.copy()
    x[1, 4] = number
    return x


def check(found, expected):
    """Check that example 1 has NaN, and the other examples their values without it."""
    assert np.isnan(found[1]).all(), found[1]
    np.testing.assert_allclose(found[[0, 2]], expected[[0, 2]], rtol=2e-3, atol=1e-4)
    assert np.isfinite(found[[0, 2]]).all()


@pytest.mark.parametrize("exact", [True, False], ids=["materialized", "iterated"])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators(name, exact):
    if not exact and name not in ITERATED:
        assert name in ALWAYS_ALIKE, "an estimator that iterates needs a row in ITERATED"
        pytest.skip("it always materializes, or never")
    arguments = {} if exact else ITERATED[name]
    model = fixed_point() if name.startswith("fixed_point") else network()
    expected = ESTIMATORS[name](jvpreg.linearize(model, X), **arguments)
    for number in (np.nan, np.inf) if exact else (np.nan,):
        found = ESTIMATORS[name](jvpreg.linearize(model, spoilt(number)), **arguments)
        check(ops.convert_to_numpy(found.value), ops.convert_to_numpy(expected.value))
        assert np.isnan(ops.convert_to_numpy(found.sem)[1]).all()
        if getattr(found, "converged", None) is not None:
            assert not ops.convert_to_numpy(found.converged)[1].any()


def test_vectors():
    model = network()
    expected, found = (estimators.top_singular_values(jvpreg.linearize(model, x), k=2) for x in (X, spoilt(np.nan)))
    for one, other in zip(found.vectors, expected.vectors, strict=True):
        one, other = (ops.convert_to_numpy(v).transpose(1, 0, 2) for v in (one, other))
        check(np.abs(one), np.abs(other))


def test_weights_that_are_not():
    """A bias is NaN, and a ReLU's slope of 0 would hide it."""
    model = network()
    kernel, bias, *others = model.get_weights()
    bias[:] = np.nan
    model.set_weights([kernel, bias, *others])
    linearization = jvpreg.linearize(model, X)
    for name in ("frobenius_norm", "spectral_norm", "trace"):
        assert np.isnan(ops.convert_to_numpy(ESTIMATORS[name](linearization).value)).all(), name
    report = constraints.verify(model, constraints.Monotone([0]), X)
    assert not report.holds
    assert report.violated == 1
    assert len(report.worst) == 3
    assert "is violated at 3 of 3 points: mean nan" in repr(report)
    assert not constraints.verify(model, constraints.Monotone([0]), constraints.Segment(X[0], X[1])).holds


def images(number):
    x = np.random.default_rng(0).normal(size=(3, 6, 6, 1)).astype("float32")
    return np.where(np.arange(3)[:, None, None, None] == 1, number, x).astype("float32")


def image_network(use_bias):
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((6, 6, 1)),
            layers.Conv2D(3, 3, activation="relu", use_bias=use_bias, bias_initializer="random_normal"),
            layers.Flatten(),
            layers.Dense(2, use_bias=use_bias),
        ]
    )


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("method", saliency.METHODS)
def test_saliency(method, use_bias):
    model, of = image_network(use_bias), saliency.METHODS[method]
    found, expected = (ops.convert_to_numpy(of(model, images(number), np.zeros(3, int))) for number in (np.nan, 0.5))
    check(found, expected)


def test_full_jacobian():
    model = network()
    found, expected = (jvpreg.full_jacobian(model, x, np.zeros(3, int)) for x in (spoilt(np.nan), X))
    names = list(expected.bias_jacobians)
    for of in (
        lambda full: full.input_jacobian,
        lambda full: full.target_output,
        lambda full: full.completeness_error(),
        *(lambda full, name=name: full.bias_jacobians[name] for name in names),
    ):
        check(ops.convert_to_numpy(of(found)), ops.convert_to_numpy(of(expected)))


@pytest.mark.slow
def test_a_probe():
    model = network()
    model.compile(loss="mse")
    probe = JacobianProbe(
        spoilt(np.nan),
        {
            "norm": "frobenius_norm",
            "sigma": "spectral_norm",
            "own": lambda lin: ops.sum(ops.square(lin.jvp(ops.ones_like(lin.inputs[0]))), axis=-1),
        },
        labels=np.array([0, 1, 0]),
    )
    guard = jvpreg.callbacks.JacobianGuard(probe, monitor="class_0/norm")
    history = model.fit(X, X, verbose=0, callbacks=[probe, guard]).history
    for name in ("norm", "sigma", "own"):
        np.testing.assert_array_equal(np.isnan(probe.values[name].value), [False, True, False])
        assert np.isfinite(history[f"jacobian/class_0/{name}"]).all()
        assert np.isnan(history[f"jacobian/class_1/{name}"]).all()
        assert np.isnan(history[f"jacobian/{name}"]).all()
    assert guard.events == []


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_verify_refuses_it(number):
    rule = constraints.Monotone([0])
    with pytest.raises(ValueError, match=r"argument `x`. Expected finite numbers. .* 1 of 3 examples, the first .* 1"):
        constraints.verify(network(), rule, spoilt(number))
    known = constraints.KnownDerivative("slope", directions=[0])
    with pytest.raises(ValueError, match=r"argument `labels`. Expected finite numbers"):
        constraints.verify(network(), known, X, {"slope": spoilt(number)})
    for domain in (
        lambda: constraints.Segment(spoilt(number)[1], X[0]),
        lambda: constraints.Segment(X[0], spoilt(number)[1]),
        lambda: constraints.Rectangle(spoilt(number)[1], X[0], X[2]),
    ):
        with pytest.raises(ValueError, match="Expected a finite number"):
            domain()


def test_every_estimator_is_marked():
    """The mark makes NaN of an example that is not finite; a new estimator needs it too."""
    assert len(ESTIMATORS) > 10
    assert all(hasattr(estimator, "__wrapped__") for estimator in ESTIMATORS.values())
    assert all("linearization" in inspect.signature(estimator).parameters for estimator in ESTIMATORS.values())


@pytest.mark.slow
@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_penalties_and_violations(number):
    """A ReLU's slope of 0 would hide the example."""
    x = spoilt(number)
    regularizers = [
        jvpreg.regularizers.JacobianNorm(0.1),
        jvpreg.regularizers.SpectralNorm(0.1),
        jvpreg.regularizers.BiasJacobianNorm(0.1, target="all"),
        constraints.Monotone([0], tolerance=1e3),
        constraints.Lipschitz(1e3, at="between"),
    ]
    model = jvpreg.JacobianModel(network(), seed=0)
    model.compile("sgd", "mse", jacobian_regularizers=regularizers)
    logs = model.evaluate(x, X, verbose=0, return_dict=True)
    for name in [r.name for r in regularizers]:
        assert np.isnan(logs[name]), name
    for measure in ("violation_mean", "violation_max"):
        assert np.isnan(logs[f"monotone/{measure}"]), measure
    # One of three examples is not finite; for the other two the constraint holds.
    np.testing.assert_allclose(logs["monotone/violated"], 1 / 3, rtol=1e-6)
    assert model.evaluate(X, X, verbose=0, return_dict=True)["monotone/violated"] == 0
    with pytest.raises(FloatingPointError, match="`frobenius_norm_squared` was not finite at training step 1"):
        model.fit(x, X, verbose=0)


def test_distances_of_a_student():
    distiller = jvpreg.JacobianDistiller(network(), network(), [jvpreg.distillation.JacobianMatching(1.0, "predicted")])
    distiller.compile("sgd", "mse")
    logs = distiller.evaluate(spoilt(np.nan), X, verbose=0, return_dict=True)
    assert np.isnan(logs["jacobian_matching"])
    assert np.isnan(logs["jacobian_matching_angle"])
