"""`JacobianProbe`: what it writes into the logs, and that training goes on as if nobody had looked."""

import csv
import functools
import math

import keras
import numpy as np
import pytest
from keras import layers, ops

import jvpreg
from jvpreg import estimators
from jvpreg.callbacks import JacobianProbe
from tests.callbacks.fitting import NeverBegins, data, fit, make_model

KEYS = [
    "jacobian/frobenius_norm",
    "jacobian/frobenius_norm_sem",
    "jacobian/spectral_norm",
    "jacobian/spectral_norm_sem",
    "jacobian/spectral_norm_converged",
]


class Truth(keras.callbacks.Callback):
    """The singular values of the probe batch's Jacobians by numpy, at the end of each epoch."""

    def __init__(self, x):
        super().__init__()
        self.x, self.singular_values = x, []

    def on_epoch_end(self, epoch, logs=None):
        base = getattr(self.model, "base", self.model)
        directions = np.broadcast_to(np.eye(6, dtype="float32")[:, None], (6, len(self.x), 6)).copy()
        jacobians = ops.convert_to_numpy(jvpreg.jvp(base, self.x, directions)[1]).transpose(1, 2, 0)
        self.singular_values.append(np.linalg.svd(jacobians, compute_uv=False))


@pytest.mark.slow
@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "JacobianModel"])
def test_it_follows_the_weights(wrapped):
    x = data(10)[0]
    truth = Truth(x)
    probe = JacobianProbe(x)
    history = fit(make_model(wrapped), probe, truth, epochs=2).history
    singular = np.stack(truth.singular_values)
    norms = np.linalg.norm(singular, axis=2)
    np.testing.assert_allclose(history[KEYS[0]], norms.mean(1), rtol=1e-4)
    np.testing.assert_allclose(history[KEYS[1]], norms.std(1, ddof=1) / math.sqrt(10), rtol=1e-3)
    np.testing.assert_allclose(history[KEYS[2]], singular[:, :, 0].mean(1), rtol=1e-4)
    np.testing.assert_allclose(history[KEYS[3]], singular[:, :, 0].std(1, ddof=1) / math.sqrt(10), rtol=1e-3)
    assert len(set(history[KEYS[0]])) == 2
    np.testing.assert_allclose(probe.values["frobenius_norm"].value, norms[-1], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "JacobianModel"])
def test_training_goes_on_as_if_nobody_looked(wrapped):
    states, histories = [], []
    for callbacks in ([], [JacobianProbe(data(10)[0], every_batches=2)]):
        model = make_model(wrapped, activity_regularizer="l2")
        keras.utils.set_random_seed(5)
        histories.append(fit(model, *callbacks, epochs=2).history["loss"])
        states.append([ops.convert_to_numpy(v) for v in [*model.variables, *model.optimizer.variables]])
    assert histories[0] == histories[1]
    for without, with_ in zip(*states, strict=True):
        np.testing.assert_array_equal(without, with_)


@pytest.mark.slow
@pytest.mark.skipif(keras.backend.backend() == "torch", reason="torch runs it each time")
def test_it_is_compiled_once(monkeypatch):
    traces = []

    def linearize(*args, **kwargs):
        traces.append(1)
        return jvpreg.linearize(*args, **kwargs)

    monkeypatch.setattr("jvpreg.callbacks.measurement.linearize", linearize)
    counts = []
    probe = JacobianProbe(data(10)[0], ["frobenius_norm"], every_batches=1)
    count = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: counts.append(len(traces)))
    model = make_model()
    fit(model, probe, count, epochs=3)
    fit(model, probe, count, epochs=1)
    assert 0 < counts[0] <= 3
    assert set(counts) == {counts[0]}


def test_csv_has_the_same_columns_in_each_row_and_nan_where_nothing_was_measured(tmp_path):
    probe = JacobianProbe(data(10)[0], every_epochs=2)
    fit(make_model(), probe, keras.callbacks.CSVLogger(tmp_path / "log.csv"), epochs=4)
    with open(tmp_path / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    # `DictReader` gives a row that is longer than the head a key None, and a shorter one a value None.
    assert all(None not in row and None not in row.values() for row in rows)
    for key in KEYS:
        # The first epoch is measured, and then every second one.
        assert [math.isnan(float(row[key])) for row in rows] == [False, False, True, False]


def test_the_progress_bar_sees_it(capfd):
    fit(make_model(), JacobianProbe(data(10)[0], ["frobenius_norm"]), verbose=2)
    assert "jacobian/frobenius_norm: " in capfd.readouterr().out


def test_batches_are_measured_too():
    seen = []

    class Look(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append(logs.get("jacobian/frobenius_norm"))

    fit(make_model(), JacobianProbe(data(10)[0], ["frobenius_norm"], every_batches=2), Look(), epochs=2, batch_size=4)
    assert [value is not None for value in seen] == 2 * [False, True, False, True, False, True]
    assert len({value for value in seen if value is not None}) == 6


@pytest.mark.slow
@pytest.mark.skipif(keras.backend.backend() == "torch", reason="torch has no steps_per_execution")
def test_batches_are_measured_when_several_run_at_once():
    seen = []

    class Look(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append("jacobian/frobenius_norm" in logs)

    model = make_model()
    model.compile("adam", model.loss, steps_per_execution=2)
    probe = JacobianProbe(data(10)[0], ["frobenius_norm"], every_batches=3)
    fit(model, probe, Look(), batch_size=4)
    # Batches run in pairs. Batches 3 and 6 are to be measured; they are in the second and in the third pair.
    assert seen == [False, True, True]


@pytest.mark.slow
def test_a_logger_before_it_is_warned_of(tmp_path):
    probe = JacobianProbe(data(10)[0], ["frobenius_norm"])
    logger = keras.callbacks.CSVLogger(tmp_path / "log.csv")
    with pytest.warns(UserWarning, match="CSVLogger stands before JacobianProbe .* Swap them"):
        fit(make_model(wrapped=True), logger, probe)


@pytest.mark.slow
def test_the_prefix_and_one_example():
    probe = JacobianProbe(data(1)[0], ["spectral_norm"], prefix="health")
    history = fit(make_model(), probe).history
    assert set(history) == {"loss", *(key.replace("jacobian", "health") for key in KEYS[2:])}
    assert np.isnan(history["health/spectral_norm_sem"]).all()


def test_named_inputs():
    a, b = keras.Input((2,), name="a"), keras.Input((3,), name="b")
    model = keras.Model({"a": a, "b": b}, layers.Dense(2)(layers.Concatenate()([a, b])))
    model.compile("sgd", "mse")
    x = {"a": np.ones((4, 2), "float32"), "b": np.ones((4, 3), "float32")}
    history = model.fit(x, np.ones((4, 2)), verbose=0, callbacks=[JacobianProbe(x)]).history
    assert history[KEYS[0]][0] > 0


@pytest.mark.slow
def test_another_model_is_measured_anew():
    probe = JacobianProbe(data(10)[0], ["frobenius_norm"])
    first, second = make_model(), keras.Sequential([keras.Input((6,)), layers.Dense(3, kernel_initializer="zeros")])
    second.compile(keras.optimizers.SGD(0.0), first.loss)
    assert fit(first, probe).history[KEYS[0]][0] > 0
    assert fit(second, probe).history[KEYS[0]][0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metrics": ["norm"]}, "`metrics`. Expected a list of names among ['condition_number', 'diagonal', "),
        ({"metrics": "frobenius_norm"}, "`metrics`"),
        ({"metrics": []}, "`metrics`"),
        ({"metrics": {"sigma": "norm"}}, "`metrics`"),
        ({"every_epochs": 0}, "`every_epochs`. Expected an integer, 1 or more. Received: every_epochs=0"),
        ({"every_batches": 1.5}, "`every_batches`"),
        ({"layers": "first"}, "`layers`. Expected a list of paths of layers. Received: layers='first'"),
        (
            {"labels": [0, 1, 2]},
            "`labels`. Expected an integer for each of the 4 examples of `x`. Received: labels with",
        ),
        ({"labels": np.zeros(4)}, "`labels`"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match="Invalid value for argument") as raised:
        JacobianProbe(data(4)[0], **arguments)
    assert message in str(raised.value)


@pytest.mark.parametrize("x", [np.ones((4, 5), "float32"), np.ones((4, 6, 1, 2), "float32")])
def test_a_batch_that_does_not_fit_is_told_before_training_begins(x):
    with pytest.raises(ValueError, match=r"`JacobianProbe` does not fit the model. .* Expected shape \(B, 6\)"):
        fit(make_model(), JacobianProbe(x), NeverBegins())


def no_axis(linearization):
    return ops.sum(linearization.outputs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"metrics": {"norm": functools.partial(estimators.frobenius_norm, num_probes=1)}},
            "cannot measure `norm`. .* Expected at least 2: one probe has no standard error",
        ),
        ({"metrics": ["trace"]}, "cannot measure `trace`. .* square Jacobian only.* 3 outputs and 6 inputs"),
        ({"layers": ["second"]}, "its `layers` and `blocks`. .* \\['first', 'first/activation'"),
        ({"layers": ["first"], "metrics": ["trace"], "blocks": []}, "cannot measure `trace`"),
        ({"metrics": {"sum": no_axis}}, "cannot measure `sum`. Expected a number, or several, for each of 1 "),
        ({"at": "second"}, "argument `at` of `JacobianProbe`. Expected the path of a layer.*'first'.* 'second'"),
    ],
)
def test_what_does_not_fit_the_model_is_told_before_training_begins(arguments, message):
    with pytest.raises(ValueError, match=message):
        fit(make_model(), JacobianProbe(data(4)[0], **arguments), NeverBegins())


def test_a_model_that_cannot_be_linearized_is_told_before_training_begins():
    model = make_model()
    for layer in model.layers:
        if isinstance(layer, layers.Dense):
            layer.quantize("int8")
            break
    model.compile("sgd", model.loss)
    with pytest.raises(NotImplementedError, match="is quantized"):
        fit(model, JacobianProbe(data(4)[0]), NeverBegins())


def jacobians(model, x):
    lin = jvpreg.linearize(model, x)
    return [ops.convert_to_numpy(part.jacobian()) for part in (lin, lin.after("first"), lin.block("first"))]


@pytest.mark.slow
def test_any_estimator_any_function_any_part_any_class():
    x, labels = data(10)
    model = make_model()
    metrics = {
        "sigma": functools.partial(estimators.top_singular_values, k=2),
        "top_eigenvalues": "top_eigenvalues",
        "corner": lambda linearization: linearization.jacobian()[:, 0, 0],
        "spectral_density": functools.partial(estimators.spectral_density, num_points=8),
    }
    probe = JacobianProbe(x, metrics, labels=labels, layers=["first"], blocks=["first"])
    logs = {key: values[0] for key, values in fit(model, probe).history.items()}
    whole, after, block = jacobians(model, x)
    for place, matrices in (("", whole), ("after/first/", after), ("block/first/", block)):
        sigma = np.linalg.svd(matrices, compute_uv=False)
        for i in (0, 1):
            column, key = sigma[:, i], f"jacobian/{place}sigma_{i + 1}"
            assert logs[key] == pytest.approx(column.mean(), rel=1e-3)
            assert logs[f"{key}_sem"] == pytest.approx(column.std(ddof=1) / math.sqrt(10), rel=1e-2, abs=1e-6)
        assert logs[f"jacobian/{place}sigma_converged"] == 1
        assert logs[f"jacobian/{place}eigenvalue_JJT_1"] == pytest.approx((sigma[:, 0] ** 2).mean(), rel=1e-3)
        for label in range(3):
            mine = matrices[labels == label]
            key = f"jacobian/class_{label}/{place}corner"
            assert logs[key] == pytest.approx(mine[:, 0, 0].mean(), rel=1e-3)
            assert logs[f"{key}_sem"] == pytest.approx(mine[:, 0, 0].std(ddof=1) / math.sqrt(len(mine)), rel=1e-3)
        # A density is no number for the logs: only the pictures show it.
        assert not any("spectral_density" in key for key in logs)
        assert probe.values[f"{place}spectral_density"].points.shape == (10, 8)
        assert probe.values[f"{place}sigma"].value.shape == (10, 2)
    assert set(logs) == {"loss", *probe.keys}


def test_of_token_ids_it_measures_by_what_the_embedding_returned():
    keras.utils.set_random_seed(0)
    behind = [layers.Flatten(), layers.Dense(3, activation="tanh", name="first"), layers.Dense(2)]
    model = keras.Sequential([keras.Input((4,), dtype="int32"), layers.Embedding(9, 2, name="words"), *behind])
    model.compile("sgd", "mse")
    x = np.random.default_rng(0).integers(0, 9, size=(6, 4))
    probe = JacobianProbe(x, ["spectral_norm"], at="words", labels=np.arange(6) % 2, layers=["first"])
    logs = {k: v[0] for k, v in model.fit(x, np.ones((6, 2)), verbose=0, callbacks=[probe]).history.items()}
    embedded = keras.Sequential([keras.Input((4, 2)), *behind])
    by_words = jvpreg.jacobian(embedded, model.layers[0](x))
    sigma = np.linalg.svd(ops.convert_to_numpy(by_words).reshape(6, 2, 8), compute_uv=False)[:, 0]
    assert logs["jacobian/spectral_norm"] == pytest.approx(sigma.mean(), rel=1e-3)
    assert logs["jacobian/class_1/spectral_norm"] == pytest.approx(sigma[1::2].mean(), rel=1e-3)
    last = np.linalg.svd(behind[-1].get_weights()[0], compute_uv=False)[0]
    assert logs["jacobian/after/first/spectral_norm"] == pytest.approx(last, rel=1e-3)
    with pytest.raises(ValueError, match=r"cannot measure `spectral_norm`.*integers.*`at=\"words\"`"):
        model.fit(x, np.ones((6, 2)), verbose=0, callbacks=[JacobianProbe(x, ["spectral_norm"])])


def test_of_a_square_jacobian_the_log_says_so():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((6,)), layers.Dense(6), layers.Dense(3, kernel_initializer="ones")])
    model.compile(keras.optimizers.SGD(0.0), make_model().loss)
    x = data(2)[0]
    probe = JacobianProbe(
        x,
        {
            "top_eigenvalues": lambda lin: estimators.top_eigenvalues(lin.block(model.layers[0].name), k=2),
            "mine": lambda lin: estimators.top_eigenvalues(lin.block(model.layers[0].name)),
        },
    )
    logs = {key: values[0] for key, values in fit(model, probe).history.items()}
    eigenvalues = np.linalg.eigvals(model.layers[0].get_weights()[0].T)
    first = max(eigenvalues, key=lambda value: (round(abs(value), 4), value.imag))
    for stem in ("eigenvalue_J_1", "mine_1"):
        assert logs[f"jacobian/{stem}_abs"] == pytest.approx(abs(first), rel=1e-3)
        assert logs[f"jacobian/{stem}_real"] == pytest.approx(first.real, rel=1e-3)
        assert logs[f"jacobian/{stem}_imag"] == pytest.approx(first.imag, rel=1e-3, abs=1e-5)
    assert {"jacobian/eigenvalue_J_2_abs", "jacobian/eigenvalue_J_converged", "jacobian/mine_converged"} <= set(logs)


@pytest.mark.slow
def test_the_result_says_whether_it_was_iterated():
    """It says so however the function is written, and for an estimator of the user's own too."""

    def own(lin):
        return estimators.Estimate(ops.norm(lin.jacobian(), axis=(1, 2)))

    metrics = {
        "named": "frobenius_norm",
        "partial": functools.partial(functools.partial(estimators.frobenius_norm), num_probes=8),
        "within": lambda lin: estimators.frobenius_norm(lin),
        "own": own,
        "iterated": lambda lin: own(lin)._replace(converged=lin.inputs[0][:, 0] > 0),
        "iterated_within": lambda lin: estimators.spectral_norm(lin),
    }
    x = data(4)[0]
    model = make_model()
    probe = JacobianProbe(x, metrics)
    logs = {key: values[0] for key, values in fit(model, probe).history.items()}
    converged = {key: value for key, value in logs.items() if key.endswith("_converged")}
    positive = x[:, 0] > 0
    assert converged == {"jacobian/iterated_converged": positive.mean(), "jacobian/iterated_within_converged": 1.0}
    assert probe.values["iterated"].converged.tolist() == positive.tolist() != [True] * 4
    expected = np.linalg.norm(jacobians(model, x)[0], axis=(1, 2))
    for name in ("named", "partial", "within", "own", "iterated"):
        np.testing.assert_allclose(probe.values[name].value, expected, rtol=1e-4)


@pytest.mark.slow
def test_every_estimator_by_name():
    """All of them of a square Jacobian, for which all of them are defined but that of a layer of its own."""
    model = keras.Sequential([keras.Input((6,)), layers.Dense(6, activation="tanh"), layers.Dense(6)])
    model.compile("sgd", make_model().loss)
    names = [name for name in estimators.__all__ if name.islower() and not name.startswith("fixed_point")]
    probe = JacobianProbe(data(4)[0], names, seed=3)
    logs = fit(model, probe).history
    assert set(probe.values) == set(names)
    assert len(names) > 10
    assert all(np.isfinite(logs[key]).all() for key in probe.keys)


def test_training_and_validation_batches():
    x, y = data()
    probes = JacobianProbe(x[:8], ["frobenius_norm"]), JacobianProbe(x[16:], ["frobenius_norm"], prefix="val_jacobian")
    model = make_model()
    logs = fit(model, *probes, validation_data=(x[16:], y[16:])).history
    seen, unseen = (np.linalg.norm(jacobians(model, part)[0], axis=(1, 2)).mean() for part in (x[:8], x[16:]))
    assert logs["jacobian/frobenius_norm"][0] == pytest.approx(seen, rel=1e-3)
    assert logs["val_jacobian/frobenius_norm"][0] == pytest.approx(unseen, rel=1e-3)
    assert seen != pytest.approx(unseen, rel=1e-3)


def test_the_keys_are_known_where_the_first_epoch_is_not_measured(tmp_path):
    """A run that is resumed may begin with such an epoch."""
    probe = JacobianProbe(data(10)[0], every_epochs=2)
    logger = keras.callbacks.CSVLogger(tmp_path / "log.csv")
    fit(make_model(), probe, logger, initial_epoch=2, epochs=4)
    with open(tmp_path / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert [[math.isnan(float(row[key])) for key in KEYS] for row in rows] == [[True] * 5, [False] * 5]


@pytest.mark.parametrize("every_example", [True, False])
def test_what_is_not_finite_is_nan_and_no_error(every_example):
    """This also holds if ReLU hides it from the Jacobian, and if the backend's linear algebra raises."""
    x = data(10)[0]
    model = keras.Sequential([keras.Input((6,)), layers.Dense(40, activation="relu"), layers.Dense(40)])
    model.compile(keras.optimizers.SGD(0.0), make_model().loss)
    if every_example:
        kernel, *others = model.get_weights()

        class Break(keras.callbacks.Callback):
            def on_epoch_begin(self, epoch, logs=None):
                model.set_weights([kernel * (math.nan if epoch else 1), *others])

        breaks = [Break()]
    else:
        x[3] = math.nan
        breaks = []
    metrics = {
        "norm": "frobenius_norm",
        "sigma": "singular_values",
        "determinant": functools.partial(estimators.log_determinant, num_probes=2, num_iterations=3),
    }
    probe = JacobianProbe(x, metrics if every_example else {"norm": "frobenius_norm"})
    logs = fit(model, *breaks, probe, epochs=2).history
    for key in probe.keys:
        assert math.isnan(logs[key][1]), key
        assert math.isnan(logs[key][0]) != every_example, key
    assert np.isnan(probe.values["norm"].value).tolist() == [every_example or i == 3 for i in range(10)]


class Foreign:
    """A tensor of another library."""

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return self.array if dtype is None else self.array.astype(dtype)


@pytest.mark.parametrize("wrap", [Foreign, np.ndarray.tolist, ops.convert_to_tensor], ids=["other", "list", "own"])
def test_a_batch_of_any_library(wrap):
    x = np.random.default_rng(0).normal(size=(4, 3)).astype("float32")
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2)])
    model.compile(loss="mse")
    probe = JacobianProbe(wrap(x), ["frobenius_norm"], labels=wrap(np.array([0, 1, 1, 0])))
    model.fit(x, np.zeros((4, 2)), verbose=0, callbacks=[probe])
    norm = np.linalg.norm(model.get_weights()[0])
    np.testing.assert_allclose(probe.values["frobenius_norm"].value, np.full(4, norm), rtol=1e-5)


@pytest.mark.parametrize(
    "given",
    [
        lambda: (row for row in np.ones((4, 3))),
        lambda: iter(np.ones((4, 3))),
        lambda: object(),
        lambda: None,
        lambda: "x",
        lambda: np.array(["a", "b"]),
        lambda: np.float32(1.0),
        lambda: [[1.0, 2.0], [3.0]],
        lambda: {"a": np.ones((4, 3)), "b": None},
    ],
)
def test_what_is_no_batch_is_refused_at_once(given):
    with pytest.raises(ValueError, match=r"Invalid value for argument `x`. Expected arrays or tensors of numbers"):
        JacobianProbe(given())
