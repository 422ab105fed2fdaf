"""The study as a table, as curves and as a page of maps."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure


def columns(row: dict[str, Any]) -> dict[str, str]:
    """One method, by the heading of its column."""
    areas = {kind: f"{row[kind]['area']:.3f} ± {row[kind]['area_sem']:.3f}" for kind in ("remove", "keep")}
    return {"map": row["method"], "removed (less is better)": areas["remove"], "kept (more is better)": areas["keep"]}


def caption(summary: dict[str, Any]) -> str:
    """What the figures mean and where they are from."""
    machine = summary["machine"]
    return (
        "The probability of the label, averaged over the parts of the pixels that are removed, the most salient "
        "first, or kept, the most salient only; the others have the mean color of the test images. "
        f"{summary['model'].upper()} of {summary['settings']['run']}, on the first {summary['examples']} test images "
        "that it gets right; ± is the standard error over them. "
        f"Keras {machine['keras']}, {machine['backend']}."
    )


def curves(summary: dict[str, Any]) -> Figure:
    """The label's probability over the part of the pixels that is removed, or kept."""
    fractions = 100 * np.asarray(summary["settings"]["fractions"])
    page = Figure(figsize=(9, 4), layout="constrained")
    for axes, kind in zip(page.subplots(1, 2, sharey=True), ("remove", "keep"), strict=True):
        for number, row in enumerate(summary["rows"]):
            mean, sem = (np.asarray(row[kind][part]) for part in ("mean", "sem"))
            random = row["method"].startswith("random")
            color = "0.5" if random else f"C{number}"
            axes.plot(fractions, mean, color=color, linestyle="--" if random else "-", label=row["method"])
            axes.fill_between(fractions, mean - sem, mean + sem, color=color, alpha=0.15, linewidth=0)
        axes.set_xlabel(f"most salient pixels {'removed' if kind == 'remove' else 'kept'} (%)")
    page.axes[0].set_ylabel("probability of the label")
    page.legend(*page.axes[0].get_legend_handles_labels(), loc="outside right center")
    return page
