"""The `fixed_point` study: training with and without the penalty, the gradient's error, and memory."""

from typing import Any

import keras
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

import jvpreg
from experiments import data
from experiments.fixed_point import gradients, memory, network
from experiments.fixed_point.config import FixedPointConfig
from experiments.fixed_point.network import LAYER
from experiments.study import Rows, Study, ran_on
from experiments.train import optimizer
from jvpreg.estimators import fixed_point_spectral_radius

MEGABYTE = 1e6
PANELS = {
    f"val_{LAYER}/iterations": "iterations",
    f"val_{LAYER}/residual": "residual",
    "jacobian/radius": r"spectral radius of $\partial_z f$",
    "val_accuracy": "test accuracy",
}


def measured(config: FixedPointConfig, console: Console) -> dict[str, Any]:
    """Rows of `runs`, `gradients` and `memory`."""
    dataset = data.load(config.data)
    runs, models = [], {}
    for strength in config.strengths:
        for seed in config.seeds:
            console.print(f"training: strength {strength:g}, seed {seed}")
            models[strength], history = train(config, dataset, strength, seed)
            runs.append({"strength": strength, "seed": seed, "history": history})
    strongest = models[max(config.strengths)]
    split = dataset.train.take(slice(config.probed))
    console.print("measuring: gradients, memory")
    return {
        "runs": runs,
        "gradients": gradients.errors(strongest, split, config.tolerances),
        "memory": [
            {
                "kind": kind,
                "depth": depth,
                "bytes": memory.peak_bytes(kind, depth, config.width, config.memory_batch_size),
            }
            for kind in memory.KINDS
            for depth in config.depths
        ],
    }


def train(
    config: FixedPointConfig, dataset: data.Dataset, strength: float, seed: int
) -> tuple[keras.Model, dict[str, list[float]]]:
    """The trained model, and the history of its training."""
    keras.utils.set_random_seed(seed)
    arguments = {"tolerance": config.tolerance, "max_iterations": config.max_iterations, "unconverged": "ignore"}
    base = network.build(dataset.image_shape, dataset.num_classes, config.width, **arguments)
    batches = data.training_batches(dataset, config.batch_size, seed, config.data.augment)
    penalties = [jvpreg.regularizers.FixedPointJacobianNorm(strength)] if strength else []
    model = jvpreg.JacobianModel(base)
    model.compile(
        optimizer=optimizer(config.optimizer, config.epochs * len(batches)),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jacobian_regularizers=penalties,
        jacobian_evaluate=False,
    )
    test = dataset.test.take(slice(config.evaluated))
    probe = jvpreg.callbacks.JacobianProbe(
        test.take(slice(config.probed)).images(), {"radius": fixed_point_spectral_radius}
    )
    history = model.fit(
        batches,
        shuffle=False,
        epochs=config.epochs,
        validation_data=(test.images(), test.labels),
        validation_batch_size=config.batch_size,
        verbose=0,
        callbacks=[batches.order_epochs(), jvpreg.callbacks.FixedPointMonitor(), probe],
    ).history
    return base, {key: [float(value) for value in values] for key, values in history.items()}


def name_of(strength: float) -> str:
    """A run's name."""
    return f"strength {strength:g}" if strength else "plain"


def columns(one: dict[str, Any]) -> dict[str, str]:
    """One run after its last epoch, by the heading of its column."""
    last = {key: values[-1] for key, values in one["history"].items()}
    return {
        "run": f"{name_of(one['strength'])}, seed {one['seed']}",
        "test accuracy": f"{100 * last['val_accuracy']:.1f}",
        "iterations": f"{last[f'val_{LAYER}/iterations']:.1f}",
        "residual": f"{last[f'val_{LAYER}/residual']:.1e}",
        "unconverged": f"{100 * last[f'val_{LAYER}/unconverged']:.1f}",
        "spectral radius": f"{last['jacobian/radius']:.3g} ± {last['jacobian/radius_sem']:.1g}",
        "adjoints unconverged": f"{last[f'{LAYER}/linear_unconverged']:.0f}",
    }


def memory_columns(summary: dict[str, Any]) -> list[dict[str, str]]:
    """A row for each way to train, a column for each depth."""
    rows = []
    for kind in dict.fromkeys(row["kind"] for row in summary["memory"]):
        own = {f"{row['depth']}": row for row in summary["memory"] if row["kind"] == kind}
        rows.append({"model": kind} | {depth: f"{row['bytes'] / MEGABYTE:.0f}" for depth, row in own.items()})
    return rows


def caption(summary: dict[str, Any]) -> str:
    """What the figures mean and where they are from."""
    settings = summary["settings"]
    return (
        "Runs: after the last epoch, on "
        f"{settings['evaluated']} test images, the spectral radius on {settings['probed']}; unconverged in % of them, "
        f"at a tolerance of {settings['tolerance']:g} within {settings['max_iterations']} iterations; adjoints "
        "unconverged: solves of the last epoch's training. Memory: peak in MB that two training steps add to the "
        f"imports, by iterations, on batches of {settings['memory_batch_size']}. Width {settings['width']}, "
        f"{settings['data']['train_examples'] or 'all'} training images of {settings['data']['name']}, "
        f"{settings['epochs']} epochs. {ran_on(summary)}"
    )


def page(summary: dict[str, Any]) -> list[Rows | str]:
    """The tables of the runs and of the memory, and what they mean."""
    return [[columns(one) for one in summary["runs"]], memory_columns(summary), caption(summary)]


def figure(summary: dict[str, Any]) -> Figure:
    """Training, the gradient's error and the memory."""
    page = Figure(figsize=(10.5, 6), layout="constrained")
    panels = list(page.subplots(2, 3).flat)
    for axes, (key, label) in zip(panels, PANELS.items(), strict=False):
        for one in summary["runs"]:
            color = f"C{summary['settings']['strengths'].index(one['strength'])}"
            name = name_of(one["strength"]) if one["seed"] == summary["settings"]["seeds"][0] else None
            values = one["history"][key]
            axes.plot(np.arange(1, len(values) + 1), values, color=color, marker="o", markersize=3, label=name)
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
    panels[1].set_yscale("log")
    panels[2].axhline(1, color="0.7", linewidth=1)
    panels[0].legend()
    for solver in dict.fromkeys(row["adjoint_solver"] for row in summary["gradients"]):
        own = [row for row in summary["gradients"] if row["adjoint_solver"] == solver]
        panels[4].loglog(
            [row["tolerance"] for row in own], [row["error"] for row in own], marker="o", markersize=3, label=solver
        )
    panels[4].set_xlabel("tolerance")
    panels[4].set_ylabel("relative error of the gradient")
    panels[4].legend(title="adjoint solver")
    for kind in dict.fromkeys(row["kind"] for row in summary["memory"]):
        own = [row for row in summary["memory"] if row["kind"] == kind]
        sizes = [row["bytes"] / MEGABYTE for row in own]
        panels[5].plot([row["depth"] for row in own], sizes, marker="o", markersize=3, label=kind)
    panels[5].set_ylim(bottom=0)
    panels[5].set_xlabel("iterations")
    panels[5].set_ylabel("peak memory of a step, MB")
    panels[5].legend()
    return page


STUDY = Study("fixed_point", measured, page, {"fixed_point": figure})
