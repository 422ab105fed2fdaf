"""The figures: a run's curves, and several runs laid over each other."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from experiments import files

History = Mapping[str, list[float]]
"""Columns of a run's CSV history, one value an epoch."""

NORM, NORM_SEM = "jacobian/frobenius_norm", "jacobian/frobenius_norm_sem"
NORM_LABEL = r"$\Vert J\Vert_F$ of the logits, per pixel unit"
STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.92",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "font.size": 10,
}


def training_curves(history: History, path: Path) -> None:
    """Draw a run's loss, accuracy and Jacobian norm over its epochs into a PNG file.

    Args:
        history: has `loss`, `accuracy`, their `val_` twins, and the norm with its standard error.
        path: the file.
    """
    with matplotlib.rc_context(STYLE):
        figure, (loss, accuracy, norm) = _panels(rows=1, columns=3)
        penalized = "training, with penalty" if "frobenius_norm_squared" in history else "training"
        for key, label in (("loss", penalized), ("val_loss", "test")):
            _curve(loss, history[key], label)
        for key, label in (("accuracy", "training"), ("val_accuracy", "test")):
            _curve(accuracy, _percent(history[key]), label)
        _norm_with_band(norm, history, label="mean ± standard error", color="C2")
        _name_axes(loss, "epoch", "loss")
        _name_axes(accuracy, "epoch", "accuracy (%)")
        _name_axes(norm, "epoch", NORM_LABEL)
        files.save_figure(figure, path)


def comparison(
    histories: Mapping[str, History],
    noise: Mapping[str, Mapping[str, float]],
    pgd: Mapping[str, Mapping[str, float]],
    path: Path,
) -> None:
    """Lay several runs over each other: accuracy and Jacobian over the epochs, accuracy under disturbance.

    Args:
        histories: the columns of each run, by the run's name.
        noise: each run's accuracy by the noise's standard deviation; "0" is the clean one.
        pgd: each run's accuracy by the attack's radius; "0" is the clean one.
        path: the PNG file.
    """
    with matplotlib.rc_context(STYLE):
        figure, (accuracy, norm, noisy, attacked) = _panels(rows=2, columns=2)
        colors = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.85, len(histories)))
        for (name, history), color in zip(histories.items(), colors, strict=True):
            _curve(accuracy, _percent(history["val_accuracy"]), name, color)
            _norm_with_band(norm, history, name, color)
            for axes, accuracies in ((noisy, noise[name]), (attacked, pgd[name])):
                sizes = [float(size) for size in accuracies]
                axes.plot(sizes, _percent(list(accuracies.values())), marker="o", markersize=4, color=color)
        norm.set_yscale("log")
        norm.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        plain_numbers(norm.yaxis)
        _name_axes(accuracy, "epoch", "test accuracy (%)")
        _name_axes(norm, "epoch", NORM_LABEL, legend=False)
        _name_axes(noisy, "noise, standard deviation (white = 1)", "accuracy (%)", legend=False)
        _name_axes(attacked, r"PGD, $L_\infty$ radius (white = 1)", "accuracy (%)", legend=False)
        files.save_figure(figure, path)


def plain_numbers(axis: Axis) -> None:
    """Write the numbers of a logarithmic axis without powers, and only those of its larger ticks."""
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")


def _panels(rows: int, columns: int) -> tuple[Figure, list[Axes]]:
    # Not through pyplot: it would keep every figure, and open a window where there is a screen.
    figure = Figure(figsize=(3.8 * columns, 3.2 * rows), layout="constrained")
    return figure, list(figure.subplots(rows, columns).flat)


def _curve(axes: Axes, values: list[float], label: str, color: object = None) -> None:
    axes.plot(_epochs(values), values, label=label, color=color, marker="o", markersize=3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _norm_with_band(axes: Axes, history: History, label: str, color: object) -> None:
    mean, sem = np.asarray(history[NORM]), np.asarray(history[NORM_SEM])
    epochs = np.asarray(_epochs(history[NORM]))
    measured = np.isfinite(mean)
    mean, sem, epochs = mean[measured], sem[measured], epochs[measured]
    axes.fill_between(epochs, mean - sem, mean + sem, color=color, alpha=0.25, linewidth=0)
    axes.plot(epochs, mean, label=label, color=color, marker="o", markersize=3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _name_axes(axes: Axes, horizontal: str, vertical: str, legend: bool = True) -> None:
    axes.set_xlabel(horizontal)
    axes.set_ylabel(vertical)
    if legend:
        axes.legend()


def _epochs(values: list[float]) -> list[int]:
    return list(range(1, len(values) + 1))


def _percent(values: list[float]) -> list[float]:
    return [100.0 * value for value in values]
