"""`JacobianWandbLogger`: the rows of the `.wandb` file, of whole runs and of resumed ones."""

import functools
import json

import keras
import numpy as np
import pytest

from jvpreg import estimators
from jvpreg.callbacks import JacobianProbe, JacobianWandbLogger
from jvpreg.callbacks.rows import Rows
from tests.callbacks.fitting import NeverBegins, data, fit, make_model
from tests.callbacks.offline_run import written
from tests.experiments import wandb_records
from tests.pictures import size

wandb = pytest.importorskip("wandb")

SPECTRUM = {
    "frobenius_norm": "frobenius_norm",
    "top_singular_values": functools.partial(estimators.top_singular_values, k=2),
    "spectral_density": "spectral_density",
}
STEPS = 3  # in an epoch


class WandbMetricsLogger(keras.callbacks.Callback):
    """Stands in for W&B's callback of this name, which cannot be imported without TensorFlow."""

    def on_epoch_end(self, epoch, logs=None):
        wandb.log({**{f"epoch/{key}": value for key, value in logs.items()}, "epoch/epoch": epoch, "theirs": epoch})


class Look(keras.callbacks.Callback):
    """The loss after each batch."""

    def __init__(self):
        super().__init__()
        self.losses = []

    def on_train_batch_end(self, batch, logs=None):
        self.losses.append(logs["loss"])


def offline(folder, **kwargs):
    folder.mkdir(exist_ok=True)
    return wandb.init(mode="offline", dir=folder, settings=wandb.Settings(silent=True, console="off"), **kwargs)


def rows_of(folder):
    """The rows in the file, without times."""
    written(folder / "wandb")
    rows = wandb_records.history(folder / "wandb")
    return [{key: value for key, value in row.items() if key not in ("_runtime", "_timestamp")} for row in rows]


def records_of(folder, kind):
    return [getattr(r, kind) for r in wandb_records.records(written(folder / "wandb")) if r.HasField(kind)]


def config_of(folder):
    """The config as the run last recorded it."""
    updates = [update for config in records_of(folder, "config") for update in config.update]
    return [json.loads(update.value_json) for update in updates if update.key == "jacobian"][-1]


@pytest.mark.slow
def test_a_row_an_epoch_with_numbers_histograms_and_pictures(tmp_path):
    """Each epoch has a row, measured or not, with everything in `logs`; `fit` itself is not changed."""
    probe = JacobianProbe(data(10)[0], SPECTRUM, every_epochs=2, prefix="val_jacobian", seed=4)
    with offline(tmp_path, config={"jacobian": {"own": 1}}):
        history = fit(make_model(wrapped=True), probe, JacobianWandbLogger(probe), epochs=3).history
    rows = rows_of(tmp_path)
    assert [row["epoch/epoch"] for row in rows] == [0, 1, 2] == [row["_step"] for row in rows]
    assert {"loss", "frobenius_norm_squared", *probe.keys} <= set(history)
    for key, values in history.items():
        np.testing.assert_allclose([float(row[f"epoch/{key}"]) for row in rows], values, rtol=1e-6)
    assert [row["epoch/learning_rate"] for row in rows] == pytest.approx([1e-3] * 3)
    for i, row in enumerate(rows):
        # The third epoch is not measured, and the last histogram is not shown again as if it were its own.
        assert ("val_jacobian/frobenius_norm_histogram/values" in row) == (i < 2)
        assert ("val_jacobian/top_singular_values_history/path" in row) == (i < 2)
    row = rows[1]  # In the file, a dict has one key for each of its entries.
    assert sum(row["val_jacobian/frobenius_norm_histogram/values"]) == 10
    smallest = probe.values["frobenius_norm"].value.min()
    assert row["val_jacobian/frobenius_norm_histogram/bins"][0] == pytest.approx(smallest)
    assert sum(row["val_jacobian/top_singular_values_histogram/values"]) == 20
    density, edges = (row[f"val_jacobian/spectral_density_histogram/{part}"] for part in ("values", "bins"))
    assert np.sum(np.multiply(density, np.diff(edges))) == pytest.approx(1.0, rel=0.1)
    assert "val_jacobian/frobenius_norm_history/path" not in row  # W&B draws that itself.
    for name in ("top_singular_values", "spectral_density"):
        key = f"val_jacobian/{name}_history"
        (file,) = (tmp_path / "wandb").glob(f"offline-run-*/files/{row[f'{key}/path']}")
        assert (row[f"{key}/width"], row[f"{key}/height"]) == size(file.read_bytes())
    charts = {metric.glob_name: metric.step_metric for metric in records_of(tmp_path, "metric") if metric.glob_name}
    assert charts == {"val_jacobian/*": "epoch/epoch", "epoch/*": "epoch/epoch"}
    assert config_of(tmp_path) == {
        "own": 1,
        "regularizers": [{"name": "frobenius_norm_squared", "class": "JacobianNorm", "strength": 0.05}],
        "interval": 1,
        "fraction": 1.0,
        "probes": {"val_jacobian": {"examples": 10, "metrics": list(SPECTRUM), "seed": 4, "every_epochs": 2}},
    }


@pytest.mark.slow
def test_several_loggers_write_one_row(tmp_path):
    """Loggers of two probes, one of which finds nothing finite, and W&B's own callback; batches are logged too."""
    one = JacobianProbe(data(4)[0], ["frobenius_norm"], every_batches=2)
    other = JacobianProbe(data(4)[0] * np.nan, {"norm": "frobenius_norm"}, prefix="other")
    loggers = [JacobianWandbLogger(one, every_batches=2), JacobianWandbLogger(other, every_batches=1)]
    look = Look()
    with offline(tmp_path):
        history = fit(make_model(), one, other, *loggers, WandbMetricsLogger(), look, epochs=2).history
    rows = rows_of(tmp_path)
    assert [row["_step"] for row in rows] == list(range(2 * STEPS + 2))
    epochs = [row for row in rows if "epoch/epoch" in row]
    assert [row["epoch/epoch"] for row in epochs] == [0, 1] == [row["theirs"] for row in epochs]
    assert [row["epoch/loss"] for row in epochs] == history["loss"]
    assert all("jacobian/frobenius_norm_histogram/values" in row for row in epochs)
    assert all(np.isnan(float(row["epoch/other/norm"])) for row in epochs)
    assert not any("other/norm_histogram" in key for row in rows for key in row)
    batches = [row for row in rows if "batch/batch_step" in row]
    assert [row["batch/batch_step"] for row in batches] == [1, 2, 3, 4, 5, 6]
    assert [row["batch/loss"] for row in batches] == look.losses
    assert ["batch/jacobian/frobenius_norm" in row for row in batches] == 2 * [False, True, False]
    charts = {metric.glob_name: metric.step_metric for metric in records_of(tmp_path, "metric") if metric.glob_name}
    assert charts["batch/*"] == "batch/batch_step"
    assert set(config_of(tmp_path)["probes"]) == {"jacobian", "other"}


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [1, 2])
def test_a_resumed_run_is_told_whole(tmp_path, at_once):
    if at_once > 1 and keras.backend.backend() == "torch":
        pytest.skip("torch has no steps_per_execution")
    model = make_model()
    model.compile("adam", model.loss, steps_per_execution=at_once)

    def part(name, first, epochs, every_batches):
        probe = JacobianProbe(data(4)[0], {"sigma": SPECTRUM["top_singular_values"]}, folder=tmp_path / "probe")
        other = JacobianProbe(data(5)[0], ["frobenius_norm"], prefix="other", folder=tmp_path / "other")
        loggers = [
            JacobianWandbLogger(probe, every_batches=every_batches, history=tmp_path / "log.csv"),
            JacobianWandbLogger(other, history=tmp_path / "log.csv"),
        ]
        rate = keras.callbacks.LearningRateScheduler(lambda epoch: 0.1 / (epoch + 1))
        csv = keras.callbacks.CSVLogger(tmp_path / "log.csv", append=True)
        with offline(tmp_path / name):
            fit(model, rate, probe, other, csv, *loggers, initial_epoch=first, epochs=epochs)
        return rows_of(tmp_path / name)

    before = [row for row in part("killed", 0, 2, 2) if "epoch/epoch" in row]
    assert [row["_step"] for row in before] == [1, 3]
    assert all("jacobian/sigma_history/sha256" in row for row in before)
    after = part("resumed", 2, 3, 2)
    assert [(row["_step"], row.get("epoch/epoch"), row.get("batch/batch_step")) for row in after] == [
        (1, 0, None),
        (3, 1, None),
        (4, None, 2 * STEPS + 2),
        (5, 2, None),
    ]
    assert after[:2] == before


def test_a_run_with_nothing_left_to_train_is_told_whole(tmp_path):
    (tmp_path / "log.csv").write_text("epoch,loss,note,val_loss\n0,2.5,NA,nan\n1,1.25,NA,3.0\n2,1.0,N")
    probe = JacobianProbe(data(4)[0], ["frobenius_norm"], folder=tmp_path / "probe")
    fit(make_model(), probe, epochs=2)
    again = JacobianProbe(data(4)[0], ["frobenius_norm"], folder=tmp_path / "probe")
    logger = JacobianWandbLogger(again, history=tmp_path / "log.csv")
    with offline(tmp_path):
        for _ in range(2):  # The second time the run has these rows already.
            with pytest.warns(UserWarning, match=r"finds no row of epochs \[3\] in .*log.csv, so the W&B run lacks"):
                logger.log_history(3)
    rows = rows_of(tmp_path)
    assert [row["_step"] for row in rows] == [row["epoch/epoch"] for row in rows] == [0, 1]
    assert [row["epoch/loss"] for row in rows] == [2.5, 1.25]
    assert [float(row["epoch/val_loss"]) for row in rows] == pytest.approx([np.nan, 3.0], nan_ok=True)
    assert not any("note" in key for row in rows for key in row)
    for epoch, row in enumerate(rows):
        counts, edges = np.histogram(probe.history[epoch]["frobenius_norm"].value.astype("float64"), 64)
        assert row["jacobian/frobenius_norm_histogram/values"] == list(counts)
        np.testing.assert_allclose(row["jacobian/frobenius_norm_histogram/bins"], edges)


class Recorded:
    """A W&B run that the server has resumed at a step."""

    def __init__(self, starting_step):
        self.starting_step = self.step = starting_step
        self.logged = []

    def log(self, row, step=None, commit=None):
        self.step = self.step if step is None else step
        if commit:
            self.logged.append((self.step, row))
            self.step += 1


def test_the_server_is_told_only_what_it_lacks():
    run = Recorded(starting_step=2)
    rows = Rows.of(run)
    for epoch in range(4):
        rows.repeat(epoch, epoch, {"epoch/epoch": epoch})
    rows.log_repeated()
    rows.repeat(3, 3, {"epoch/epoch": 3})
    Rows.of(run).log_repeated()
    assert run.logged == [(2, {"epoch/epoch": 2}), (3, {"epoch/epoch": 3})]


def test_what_does_not_fit_is_told_before_training_begins(tmp_path):
    probe = JacobianProbe(data(4)[0], ["frobenius_norm"])
    with pytest.raises(RuntimeError, match=r"call `wandb.init\(\)` before `fit`"):
        fit(make_model(), probe, JacobianWandbLogger(probe), NeverBegins())
    with pytest.raises(ValueError, match=r"`WandbMetricsLogger` stands before `JacobianWandbLogger`.* Swap them"):
        fit(make_model(), probe, WandbMetricsLogger(), JacobianWandbLogger(probe), NeverBegins())
    with pytest.raises(ValueError, match=r"`every_batches`. Expected an integer, 1 or more, or None"):
        JacobianWandbLogger(probe, every_batches=0)
    with pytest.raises(ValueError, match=r"`history`. Expected a path, or None"):
        JacobianWandbLogger(probe, history=1)
    with pytest.raises(ValueError, match=r"`history`. Expected a path, for `log_history`. Received: history=None"):
        JacobianWandbLogger(probe).log_history(1)
