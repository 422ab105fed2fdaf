"""The `health` study: short runs, each measured as it trains, and the step from which each measure tells it apart."""

import dataclasses
import math
from typing import Any

import keras
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from scipy.special import log_softmax

import jvpreg
from experiments import data, devices, robustness
from experiments.config import TrainConfig
from experiments.health.config import HealthConfig
from experiments.study import Study, one_table, ran_on
from experiments.train import compiled_model, training_batches

LOSS = "loss"
JACOBIAN = ("frobenius_norm", "spectral_norm", "stable_rank")
HEALTHY = "healthy"
# A single measurement may stray; so many in a row do not.
IN_A_ROW = 3

LABELS = {
    "loss": "test loss",
    "frobenius_norm": r"$\Vert J\Vert_F$",
    "spectral_norm": r"$\sigma_1$",
    "stable_rank": r"stable rank $\Vert J\Vert_F^2/\sigma_1^2$",
}
HEADINGS = {"loss": "loss", "frobenius_norm": "‖J‖_F", "spectral_norm": "σ₁", "stable_rank": "stable rank"}


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
    model.fit(batches, shuffle=False, epochs=train.epochs, verbose=0, callbacks=[batches.order_epochs(), recorder])
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
        self.measured = test.take(slice(config.loss_examples))
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
        self.record["final_accuracy"] = robustness.accuracy(self.model, self.measured)

    def measure(self) -> None:
        """Adds a measurement to the record."""
        summary = self.probe.measure()
        logits = self.model.predict(self.measured.images(), batch_size=256, verbose=0).astype("float64")
        losses = cross_entropies(logits, self.measured.labels)
        self.record["steps"].append(self.step)
        parts = {LOSS: (losses.mean(), losses.std(ddof=1) / math.sqrt(len(losses)))}
        parts |= {name: (summary[f"jacobian/{name}"], summary[f"jacobian/{name}_sem"]) for name in JACOBIAN}
        for name, (mean, sem) in parts.items():
            self.record["measures"][name]["mean"].append(float(mean))
            self.record["measures"][name]["sem"].append(float(sem))


def cross_entropies(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Of each example, `(N,)`, from logits `(N, classes)`."""
    return -log_softmax(logits, axis=1)[np.arange(len(labels)), labels]


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


def columns(row: dict[str, Any]) -> dict[str, str]:
    """One run, by the heading of its column."""
    told = {HEADINGS[name]: "–" if step is None else str(step) for name, step in row["told_apart"].items()}
    return {"run": f"{row['setting']} {row['run']}" if row["setting"] == "healthy" else row["setting"], **told} | {
        "final accuracy": f"{100 * row['final_accuracy']:.1f}"
    }


def caption(summary: dict[str, Any]) -> str:
    """What the figures mean and where they are from."""
    settings = summary["settings"]
    train = settings["train"]
    return (
        "The step from which on each measure tells a run from the healthy ones (a healthy run: from the other healthy "
        "ones, so that a number there is a false alarm); – : not within the run. Told apart: three measurements in a "
        "row lie further from the mean of the healthy runs, in the logarithm, than twice the furthest healthy run so "
        f"far, and two standard errors more. {train['model']['name'].upper()} of width {train['model']['width']}, "
        f"{train['data']['train_examples'] or 'all'} training images of {train['data']['name']}, {train['epochs']} "
        f"epochs of batches of {train['batch_size']}; the loss on {settings['loss_examples']} test images, the "
        f"Jacobian of the logits on {train['probe']['examples']}, both in inference mode; accuracy in % on the former. "
        f"{ran_on(summary)}"
    )


def figure(summary: dict[str, Any]) -> Figure:
    """Every measure of every run over the steps, with error bars."""
    page = Figure(figsize=(9.5, 7), layout="constrained")
    told = {row["setting"]: row["told_apart"] for row in summary["rows"] if row["setting"] != "healthy"}
    panels = page.subplots(2, 2, sharex=True).flat
    for axes, (measure, label) in zip(panels, LABELS.items(), strict=True):
        for number, (setting, runs) in enumerate(summary["runs"].items()):
            color = "0.45" if setting == "healthy" else f"C{number - 1}"
            for i, run in enumerate(runs):
                # The first measurement is of no step: on a logarithmic axis it stands left of the first.
                steps = np.maximum(run["steps"], 0.7)
                mean, sem = (np.asarray(run["measures"][measure][part]) for part in ("mean", "sem"))
                name = setting if i == 0 else None
                axes.plot(steps, mean, color=color, label=name, linewidth=1 if setting == "healthy" else 1.8)
                axes.fill_between(steps, mean - sem, mean + sem, color=color, alpha=0.2, linewidth=0)
            step = told.get(setting, {}).get(measure)
            if step is not None:
                at = runs[0]["steps"].index(step)
                axes.plot(
                    [max(step, 0.7)],
                    [runs[0]["measures"][measure]["mean"][at]],
                    color=color,
                    marker="v",
                    markersize=9,
                    markeredgecolor="white",
                    linestyle="none",
                    zorder=5,
                )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_ylabel(label)
    for axes in page.axes[2:]:
        axes.set_xlabel("training step (▾: told from the healthy runs, from here on)")
    page.legend(*page.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return page


STUDY = Study("health", measured, one_table("rows", columns, caption), {"health": figure})
