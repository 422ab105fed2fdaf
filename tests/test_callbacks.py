"""`JacobianProbe` and its histogram: what loggers see, and that training goes on as if nobody had looked."""

import csv
import math

import keras
import numpy as np
import pytest
from keras import layers, ops

import jvpreg
from jvpreg.callbacks import JacobianProbe, JacobianWandbHistogram
from jvpreg.regularizers import JacobianNorm

KEYS = [
    "jacobian/frobenius_norm",
    "jacobian/frobenius_norm_sem",
    "jacobian/top_singular_value",
    "jacobian/top_singular_value_sem",
]


def make_model(wrapped=False, activity_regularizer=None):
    keras.utils.set_random_seed(1)
    base = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(8, activation="tanh", activity_regularizer=activity_regularizer),
            layers.BatchNormalization(),
            layers.Dropout(0.3, seed=2),
            layers.Dense(3),
        ]
    )
    model = jvpreg.JacobianModel(base, seed=3) if wrapped else base
    regularizers = {"jacobian_regularizers": [JacobianNorm(0.05)]} if wrapped else {}
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), **regularizers)
    return model


def data(size=24):
    random = np.random.default_rng(0)
    return random.normal(size=(size, 6)).astype("float32"), random.integers(0, 3, size)


def fit(model, *callbacks, **kwargs):
    x, y = data()
    return model.fit(x, y, **{"batch_size": 8, "verbose": 0, "shuffle": False, "callbacks": [*callbacks], **kwargs})


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
    np.testing.assert_allclose(probe.values["frobenius_norm"], norms[-1], rtol=1e-4)


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "JacobianModel"])
def test_training_goes_on_as_if_nobody_looked(wrapped):
    states, histories = [], []
    for callbacks in ([], [JacobianProbe(data(10)[0], every_batches=2, num_probes=2)]):
        model = make_model(wrapped, activity_regularizer="l2")
        keras.utils.set_random_seed(5)
        histories.append(fit(model, *callbacks, epochs=2).history["loss"])
        states.append([ops.convert_to_numpy(v) for v in [*model.variables, *model.optimizer.variables]])
    assert histories[0] == histories[1]
    for without, with_ in zip(*states, strict=True):
        np.testing.assert_array_equal(without, with_)


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="torch runs it each time")
def test_it_is_compiled_once(monkeypatch):
    traces = []

    def linearize(*args, **kwargs):
        traces.append(1)
        return jvpreg.linearize(*args, **kwargs)

    monkeypatch.setattr("jvpreg.callbacks.linearize", linearize)
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
    # A row that is longer than the head has a column None, a shorter one a value None.
    assert all(None not in row and None not in row.values() for row in rows)
    for key in KEYS:
        # The first epoch, and then each second one.
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
    # After the batches 2, 4 and 6, of which the third and the sixth are among the second and third pair.
    assert seen == [False, True, True]


def test_a_logger_before_it_is_warned_of(tmp_path):
    probe = JacobianProbe(data(10)[0], ["frobenius_norm"])
    logger = keras.callbacks.CSVLogger(tmp_path / "log.csv")
    with pytest.warns(UserWarning, match="CSVLogger stands before JacobianProbe .* Swap them"):
        fit(make_model(wrapped=True), logger, probe)


def test_the_prefix_and_one_example():
    probe = JacobianProbe(data(1)[0], ["top_singular_value"], prefix="health")
    history = fit(make_model(), probe).history
    assert set(history) == {"loss", "health/top_singular_value", "health/top_singular_value_sem"}
    assert np.isnan(history["health/top_singular_value_sem"]).all()


def test_named_inputs():
    a, b = keras.Input((2,), name="a"), keras.Input((3,), name="b")
    model = keras.Model({"a": a, "b": b}, layers.Dense(2)(layers.Concatenate()([a, b])))
    model.compile("sgd", "mse")
    x = {"a": np.ones((4, 2), "float32"), "b": np.ones((4, 3), "float32")}
    history = model.fit(x, np.ones((4, 2)), verbose=0, callbacks=[JacobianProbe(x)]).history
    assert history[KEYS[0]][0] > 0


def test_another_model_is_measured_anew():
    probe = JacobianProbe(data(10)[0], ["frobenius_norm"])
    first, second = make_model(), keras.Sequential([keras.Input((6,)), layers.Dense(3, kernel_initializer="zeros")])
    second.compile(keras.optimizers.SGD(0.0), first.loss)
    assert fit(first, probe).history[KEYS[0]][0] > 0
    assert fit(second, probe).history[KEYS[0]][0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metrics": ["norm"]}, "`metrics`. Expected a list of names among ['frobenius_norm', 'top_singular_value']"),
        ({"metrics": "frobenius_norm"}, "`metrics`"),
        ({"metrics": []}, "`metrics`"),
        ({"every_epochs": 0}, "`every_epochs`. Expected an integer, 1 or more. Received: 0"),
        ({"every_batches": 1.5}, "`every_batches`"),
        ({"num_probes": 0}, "`num_probes`"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match="Invalid value for argument") as raised:
        JacobianProbe(data(4)[0], **arguments)
    assert message in str(raised.value)


class NeverBegins(keras.callbacks.Callback):
    def on_train_begin(self, logs=None):
        raise AssertionError("training began")


@pytest.mark.parametrize("x", [np.ones((4, 5), "float32"), np.ones((4, 6, 1, 2), "float32")])
def test_a_batch_that_does_not_fit_is_told_before_training_begins(x):
    with pytest.raises(ValueError, match=r"`JacobianProbe` does not fit the model. .* Expected shape \(B, 6\)"):
        fit(make_model(), JacobianProbe(x), NeverBegins())


def test_too_few_probes_are_told_before_training_begins():
    with pytest.raises(ValueError, match="Expected at least 2: one probe has no standard error"):
        fit(make_model(), JacobianProbe(data(4)[0], num_probes=1), NeverBegins())


def test_a_model_that_cannot_be_linearized_is_told_before_training_begins():
    model = make_model()
    for layer in model.layers:
        if isinstance(layer, layers.Dense):
            layer.quantize("int8")
            break
    model.compile("sgd", model.loss)
    with pytest.raises(NotImplementedError, match="is quantized"):
        fit(model, JacobianProbe(data(4)[0]), NeverBegins())


def test_tensorboard_sees_it(tmp_path):
    pytest.importorskip("tensorflow")
    fit(make_model(), JacobianProbe(data(10)[0]), keras.callbacks.TensorBoard(tmp_path))
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*tfevents*"))
    assert all(f"epoch_{key}".encode() in written for key in KEYS)


def test_the_histogram_needs_a_run():
    pytest.importorskip("wandb")
    probe = JacobianProbe(data(10)[0])
    with pytest.raises(RuntimeError, match=r"call `wandb.init\(\)` before `fit`"):
        fit(make_model(), probe, JacobianWandbHistogram(probe))


def test_wandb_gets_numbers_and_histograms_in_one_row(monkeypatch):
    wandb = pytest.importorskip("wandb")
    rows, row = [], {}

    def log(values, commit=True):
        row.update(values)
        if commit:
            rows.append(dict(row))
            row.clear()

    monkeypatch.setattr(wandb, "run", object())
    monkeypatch.setattr(wandb, "log", log)
    probe = JacobianProbe(data(10)[0], ["frobenius_norm"], every_epochs=2)
    logger = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: wandb.log({**logs, "epoch": epoch}))
    fit(make_model(), probe, JacobianWandbHistogram(probe), logger, epochs=3)
    assert [r["epoch"] for r in rows] == [0, 1, 2]
    # The third epoch is not measured, and the last histogram is not shown again as if it were its own.
    assert ["jacobian/frobenius_norm_histogram" in r for r in rows] == [True, True, False]
    histogram = rows[1]["jacobian/frobenius_norm_histogram"]
    assert sum(histogram.histogram) == 10
    assert histogram.bins[0] <= probe.values["frobenius_norm"].min()
