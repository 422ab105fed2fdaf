"""The `health` study: short runs, each measured as it trains, and the step from which each measure tells it apart."""

import dataclasses
import math
from typing import Any

import keras
import numpy as np
from rich.console import Console

import jvpreg
from experiments import data, devices
from experiments.config import TrainConfig
from experiments.health import report
from experiments.health.config import HealthConfig
from experiments.study import Study, one_table
from experiments.train import compiled_model, training_batches

LOSS = "loss"
JACOBIAN = ("frobenius_norm", "spectral_norm", "stable_rank")
HEALTHY = "healthy"
# A single measurement may stray; so many in a row do not.
IN_A_ROW = 3


def measured(config: HealthConfig, console: Console) -> dict[str, Any]:
    """The measurements of each run, and a row a setting."""
    devices.check_one_device(config.train, "health")
    dataset = data.load(config.train.data)
    runs: dict[str, list[dict[str, Any]]] = {}
    for name, settings in all_settings(config).items():
        seeds = range(config.healthy_runs) if name == HEALTHY else [config.train.seed]
        for seed in seeds:
            console.print(f"training: {name}, seed {seed}")
            chosen = dataclasses.replace(settings, seed=seed)
            runs.setdefault(name, []).append(measured_run(chosen, dataset, config))
    return {"runs": runs, "rows": rows(runs)}


def all_settings(config: HealthConfig) -> dict[str, TrainConfig]:
    """The healthy setting and those that differ from it in one key."""
    train = config.train
    optimizer = dataclasses.replace(train.optimizer, learning_rate=config.large_learning_rate)
    model = dataclasses.replace(train.model, batch_normalization=False)
    jacobian = dataclasses.replace(train.jacobian, strength=config.strong_penalty)
    return {
        HEALTHY: train,
        "learning rate too large": dataclasses.replace(train, optimizer=optimizer),
        "no normalization": dataclasses.replace(train, model=model),
        "penalty too strong": dataclasses.replace(train, jacobian=jacobian),
    }


def measured_run(train: TrainConfig, dataset: data.Dataset, config: HealthConfig) -> dict[str, Any]:
    """Train once.

    Returns:
        `steps`, and for the loss and each measure of the Jacobian `mean` and `sem` over the test images, step by step.
    """
    keras.utils.set_random_seed(train.seed)
    batches = training_batches(train, dataset)
    model = compiled_model(train, dataset, steps=train.epochs * len(batches))
    recorder = Recorder(dataset.test, config)
    model.fit(
        batches,
        shuffle=False,
        epochs=train.epochs,
        verbose=0,
        callbacks=[
            batches.order_epochs(),
            recorder,
        ],
    )
    return recorder.record


class Recorder(keras.callbacks.Callback):
    """Measures the loss and the Jacobian on test images while a model trains.

    Args:
        test: the test images, of which the first are used.
        config: how many of them, and how often.

    Attributes:
        record: what `measured_run` returns.
    """

    def __init__(self, test: data.Split, config: HealthConfig):
        super().__init__()
        self.async_safe = False
        self.every = config.every_batches
        chosen = test.take(slice(config.loss_examples))
        self.images, self.labels = chosen.images(), chosen.labels
        probed = test.take(slice(config.train.probe.examples))
        self.probe = jvpreg.callbacks.JacobianProbe(probed.images(), JACOBIAN)
        measures: dict[str, dict[str, list[float]]] = {name: {"mean": [], "sem": []} for name in (LOSS, *JACOBIAN)}
        self.record: dict[str, Any] = {"steps": [], "measures": measures, "final_accuracy": None}
        self.step = 0

    def set_model(self, model):
        """Gives the probe its model too."""
        super().set_model(model)
        self.probe.set_model(model)

    def on_train_begin(self, logs=None):
        """Measures the model as it was initialized."""
        self.measure()

    def on_train_batch_end(self, batch, logs=None):
        """Measures when it is due."""
        self.step += 1
        if self.step % self.every == 0 or self.step & (self.step - 1) == 0:
            self.measure()

    def on_train_end(self, logs=None):
        """Notes the accuracy that came of it."""
        logits = self.model.predict(self.images, batch_size=256, verbose=0)
        self.record["final_accuracy"] = float(np.mean(logits.argmax(axis=1) == self.labels))

    def measure(self) -> None:
        """Adds a measurement to the record."""
        summary = self.probe.measure()
        logits = self.model.predict(self.images, batch_size=256, verbose=0).astype("float64")
        losses = cross_entropies(logits, self.labels)
        self.record["steps"].append(self.step)
        parts = {LOSS: (losses.mean(), losses.std(ddof=1) / math.sqrt(len(losses)))}
        parts |= {name: (summary[f"jacobian/{name}"], summary[f"jacobian/{name}_sem"]) for name in JACOBIAN}
        for name, (mean, sem) in parts.items():
            self.record["measures"][name]["mean"].append(float(mean))
            self.record["measures"][name]["sem"].append(float(sem))


def cross_entropies(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Of each example, `(N,)`, from logits `(N, classes)`."""
    largest = logits.max(axis=1, keepdims=True)
    normalizer = largest[:, 0] + np.log(np.exp(logits - largest).sum(axis=1))
    return normalizer - logits[np.arange(len(labels)), labels]


def rows(runs: dict[str, list[dict[str, Any]]], measures: tuple[str, ...] = (LOSS, *JACOBIAN)) -> list[dict[str, Any]]:
    """When each measure tells each run apart from the healthy ones; of a healthy run, from the other healthy ones."""
    healthy = runs[HEALTHY]
    result = []
    for name, several in runs.items():
        for number, one in enumerate(several):
            others = [other for i, other in enumerate(healthy) if name != HEALTHY or i != number]
            result.append(
                {
                    "setting": name,
                    "run": number,
                    "final_accuracy": one["final_accuracy"],
                    "told_apart": {measure: told_apart(one, others, measure) for measure in measures},
                }
            )
    return result


def told_apart(one: dict[str, Any], healthy: list[dict[str, Any]], measure: str) -> int | None:
    """The first of so many measured steps in a row that lie outside of what healthy runs do; None if there are none.

    Outside: the logarithm is further from the mean of the healthy runs than twice the furthest of them at any step so
    far, and two standard errors more; or it is not finite.
    """
    if not healthy:
        return None
    curves = np.log([run["measures"][measure]["mean"] for run in healthy])
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = np.asarray(one["measures"][measure]["mean"], dtype="float64")
        curve, relative_sem = np.log(mean), np.asarray(one["measures"][measure]["sem"], dtype="float64") / mean
    center = curves.mean(axis=0)
    widest = np.maximum.accumulate(np.abs(curves - center).max(axis=0))
    outside = ~(np.abs(curve - center) <= 2 * widest + 2 * relative_sem)
    for i in range(len(outside) - IN_A_ROW + 1):
        if outside[i : i + IN_A_ROW].all():
            return int(one["steps"][i])
    return None


STUDY = Study("health", measured, one_table("rows", report.columns, report.caption), {"health": report.figure})
