"""The study as a table and as one page of pictures."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.study import ran_on

LABELS = {
    "loss": "test loss",
    "frobenius_norm": r"$\Vert J\Vert_F$",
    "spectral_norm": r"$\sigma_1$",
    "stable_rank": r"stable rank $\Vert J\Vert_F^2/\sigma_1^2$",
}
HEADINGS = {"loss": "loss", "frobenius_norm": "‖J‖_F", "spectral_norm": "σ₁", "stable_rank": "stable rank"}


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
