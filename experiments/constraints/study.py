"""The `constraints` study: one of four problems, each trained in several settings and seeds."""

import math
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from experiments.constraints import derivative, divergence, invariance, monotone
from experiments.constraints.config import ConstraintsConfig
from experiments.constraints.fitting import AUGMENTED, FREE
from experiments.errors import ExperimentError
from experiments.study import Rows, Study, ran_on

PROBLEMS = {
    "monotone": monotone.run,
    "divergence": divergence.run,
    "derivative": derivative.run,
    "invariance": invariance.run,
}

HEADINGS = {
    "error": "error",
    "clean": "clean",
    "rotated": "rotated",
    "shifted": "shifted",
    "both": "both",
    "violation_mean": "mean violation",
    "violation_max": "max violation",
    "violated": "% of points",
    "at_points_mean": "at the points",
    "largest_fall": "largest fall",
    "steps": "steps",
    "seconds": "s",
}
DIGITS = {"seconds": "{:.0f}", "steps": "{:.0f}", "clean": "{:.1f}", "rotated": "{:.1f}", "shifted": "{:.1f}"}
# What a logarithmic axis shows of zero.
LEAST = 1e-6
COLORS = ("C0", "C1", "C2", "C4", "C5", "C8")
MEANING = {
    "monotone": (
        "Error: root mean square on test patients. Violation: how far a slope is on the wrong side of zero at test "
        "patients (the mean and the maximum over them, each the mean over the seeds), in standard deviations of the "
        "outcome by one of the feature; % of points with more than 0.001. Largest fall: the furthest that a prediction "
        "goes the wrong way while one feature of a test patient sweeps the training patients' range, in the same "
        "standard deviations."
    ),
    "divergence": (
        "Error: root mean square on a grid of the square, of a field whose speed is 1 at most, learned from 200 noisy "
        "places. Violation: the absolute divergence on that grid, none of which is drawn in training (the mean and the "
        "maximum over it, each the mean over the seeds); % of points with more than 0.001."
    ),
    "derivative": (
        "Error: root mean square on a grid. Violation: the mean over the grid of the larger error of the two "
        "derivatives; at the points: the same at the known points."
    ),
    "invariance": (
        "Accuracies in % on test images as they are, rotated, shifted, and both, by amounts drawn at random. "
        "Violation: the mean over test images of the largest move of a logit by a rotation of a degree or a shift of "
        "a pixel, to first order. Augmentation, and the run without a constraint, get as many more steps "
        "as theirs are cheaper; what it takes to move images is not counted."
    ),
}


def run(config: ConstraintsConfig) -> dict[str, Any]:
    """Train every setting, and write and print what came out, in files that are named after the problem.

    Returns:
        What the JSON file holds: the settings, the machine, and the figures of each run.

    Raises:
        ExperimentError: where the data cannot be had, or no setting has a constraint.
    """
    return study_of(config.problem).run(config)


def study_of(problem: str) -> Study:
    """The study of one problem."""
    return Study(
        "constraints",
        measured,
        page,
        {problem: figure},
        indent=1,
        stem=problem,
        home=f"runs/constraints_{problem}",
    )


def measured(config: ConstraintsConfig, console: Console) -> dict[str, Any]:
    """The figures of each run."""
    if config.rho is None and not any(config.strengths):
        raise ExperimentError("strengths: expected one above 0, or a rho.")
    return {"runs": PROBLEMS[config.problem](config)}


DIGITS |= {"both": "{:.1f}"}


def page(summary: dict[str, Any]) -> list[Rows | str]:
    """The table, and what it means."""
    return [[columns(name, figures, summary) for name, figures in summary["runs"].items()], caption(summary)]


def columns(name: str, figures: dict[str, Any], summary: dict[str, Any]) -> dict[str, str]:
    """One setting, by the heading of its column."""
    present = [key for key in HEADINGS if any(key in run for run in summary["runs"].values())]
    return {"run": name, **{HEADINGS[key]: cell(key, figures.get(key)) for key in present}}


def cell(key: str, value: dict[str, float | None] | None) -> str:
    """A mean with its standard error."""
    if value is None:
        return ""
    factor = 100 if key == "violated" else 1
    mean, sem = factor * (value["mean"] or 0.0), value["sem"]
    text = DIGITS.get(key, "{:.3g}").format(mean)
    return f"{text} ± {factor * sem:.1g}" if sem and key not in ("seconds", "steps") else text


def caption(summary: dict[str, Any]) -> str:
    """What the figures mean and where they are from."""
    settings = summary["settings"]
    network = f"two hidden layers of {settings['width']} units with tanh"
    if settings["problem"] == "invariance":
        data = settings["data"]
        network = (
            f"{settings['model']['name'].upper()} of width {settings['model']['width']}, "
            f"{data['train_examples'] or 'all'} training images of {data['name']}, "
            f"up to {settings['angle']:g} degrees and {settings['shift']:g} pixels"
        )
    multipliers = (
        "" if settings["rho"] is None else f"; rho {settings['rho']:g}, updated every {settings['update_every']}"
    )
    return (
        f"{MEANING[settings['problem']]} {network[0].upper()}{network[1:]}; {settings['steps']} steps of "
        f"{settings['batch_size']} examples, Adam from {settings['learning_rate']:g}{multipliers}. Means and standard "
        f"errors of {settings['seeds']} seeds. Seconds of training, while other work shared the machine. "
        f"{ran_on(summary)}"
    )


def figure(summary: dict[str, Any]) -> Figure:
    """The picture of the problem."""
    return {"derivative": _by_points, "invariance": _accuracies}.get(summary["settings"]["problem"], _trade)(summary)


def _trade(summary: dict[str, Any]) -> Figure:
    """The violation over the steps, and the error against the violation at the end."""
    page = Figure(figsize=(9.5, 3.8), layout="constrained")
    over_steps, trade = page.subplots(1, 2)
    for number, (name, figures) in enumerate(summary["runs"].items()):
        color = "0.3" if name == FREE else "C3" if name == AUGMENTED else COLORS[number % len(COLORS)]
        for i, curve in enumerate(figures["curves"]):
            label = name if i == 0 else None
            over_steps.plot(curve["steps"], np.maximum(curve["violation"], LEAST), color=color, label=label, alpha=0.9)
        if "violation_max" in figures:
            at = [max(figures["violation_max"]["mean"], LEAST)], [figures["error"]["mean"]]
            trade.errorbar(*at, yerr=figures["error"]["sem"], color=color, marker="o", label=name, linestyle="none")
        else:
            trade.axhline(figures["error"]["mean"], color=color, linestyle=":", label=name)
    for axes in (over_steps, trade):
        line = axes.axhline if axes is over_steps else axes.axvline
        line(1e-3, color="0.6", linewidth=1)
    over_steps.set_yscale("log")
    over_steps.set_xlabel("training step")
    over_steps.set_ylabel("max violation at held-out points")
    trade.set_xscale("log")
    trade.set_xlabel(f"max violation at held-out points (0 is drawn at {LEAST:g})")
    trade.set_ylabel("held-out error")
    trade.legend(fontsize=8)
    return page


def _by_points(summary: dict[str, Any]) -> Figure:
    """The error by the number of known points."""
    page = Figure(figsize=(9.5, 3.8), layout="constrained")
    panels = dict(zip(("error", "violation_mean"), page.subplots(1, 2), strict=True))
    numbers = summary["settings"]["examples"]
    names = list(dict.fromkeys(name.rpartition(", ")[0] for name in summary["runs"]))
    for place, name in enumerate(names):
        for key, axes in panels.items():
            of = [summary["runs"][f"{name}, {number} points"][key] for number in numbers]
            mean, sem = np.array([v["mean"] for v in of]), np.array([v["sem"] or math.nan for v in of])
            axes.errorbar(numbers, mean, yerr=sem, label=name, marker="o", color="0.3" if name == FREE else f"C{place}")
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xlabel("known points")
    panels["error"].set_ylabel("held-out error")
    panels["violation_mean"].set_ylabel("held-out error of the derivatives")
    panels["error"].legend(fontsize=8)
    return page


def _accuracies(summary: dict[str, Any]) -> Figure:
    """The accuracies as bars."""
    page = Figure(figsize=(9.5, 3.8), layout="constrained")
    axes = page.subplots()
    kinds = ["clean", "rotated", "shifted", "both"]
    runs = summary["runs"]
    for number, (name, figures) in enumerate(runs.items()):
        places = np.arange(len(kinds)) + (number - (len(runs) - 1) / 2) * 0.8 / len(runs)
        mean, sem = ([figures[kind][part] or 0.0 for kind in kinds] for part in ("mean", "sem"))
        axes.bar(places, mean, 0.8 / len(runs), yerr=sem, label=name, ecolor="0.2", capsize=2)
    lowest = min(figures[kind]["mean"] for figures in runs.values() for kind in kinds)
    axes.set_ylim(bottom=max(0.0, lowest - 10))
    axes.set_xticks(range(len(kinds)), kinds)
    axes.set_ylabel("test accuracy (%)")
    page.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=8)
    return page
