"""The benchmark of growing sizes as a table, on the terminal and in Markdown, and as a figure."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.benchmark import study
from experiments.study import Rows

LABELS = {"forward": "forward pass", "jvpreg": "f(x) and J u"}
COLORS = {"forward": "0.45", "jvpreg": "C0"}
SIZES = {"batch": "batch size", "width": "channels", "depth": "convolutions", "probes": "probes"}


def columns(axis: str, row: dict[str, Any]) -> dict[str, str]:
    """The figures of one point of an axis, by the heading of their column."""
    cells = {"along": SIZES[axis], "size": str(row["size"]), "error": study.one_digit(row["jvpreg"]["error"])}
    for name, label in LABELS.items():
        found = row[name]
        cells[f"ms: {label}"] = f"{1000 * found['seconds']:.2f}" if found["seconds"] is not None else found["status"]
    over = row["over_forward"]
    cells["× forward pass"] = f"{over:.2f}" if over is not None else ""
    return cells


def exponents(summary: dict[str, Any]) -> list[dict[str, str]]:
    """The fitted exponents of each axis, by the heading of their column."""
    return [
        {"along": SIZES[axis], **{label: _exponent(row["fits"].get(name)) for name, label in LABELS.items()}}
        for axis, row in summary["axes"].items()
    ]


def caption(summary: dict[str, Any]) -> str:
    """What the figures mean and where they are from."""
    settings = summary["settings"]
    size = settings["image_size"]
    return (
        f"A chain of 3x3 convolutions with ReLU on images of {size}x{size}; one size grows, while the others are those "
        f"of the base point: batches of {settings['batch_size']}, {settings['width']} channels, {settings['depth']} "
        f"convolutions, {settings['num_probes']} direction(s). One compiled call computes `f(x)` and `J u` "
        f"(`linearize(...).jvp(u)`). Medians of {settings['rounds']} rounds of all points in turn. An exponent is that "
        "of time = constant × size ** exponent by least squares on the logarithms, with its standard error; "
        "the times that are fitted are "
        "in units of the base point's forward pass in the same round. Along batch, channels and convolutions the whole "
        "time is fitted; along probes, what is over jvpreg's `f(x)` alone, which does not grow with them (of the "
        "forward pass there is nothing to fit). Errors are relative, of `f(x)` and the compiled product in float32 "
        "at a few inputs, far from kinks, against autodiff in float64 that is not jitted; above "
        f"{settings['tolerance']:g} a point is wrong and is not timed. {study.ran_on(summary)}"
    )


def page(summary: dict[str, Any]) -> list[Rows | str]:
    """The table of the points, that of the exponents, and what they mean."""
    rows = [columns(axis, row) for axis, found in summary["axes"].items() for row in found["points"]]
    return [rows, "Exponents:", exponents(summary), caption(summary)]


def figure(summary: dict[str, Any]) -> Figure:
    """A panel an axis, log-log, with points and fitted curves."""
    drawing = Figure(figsize=(8.0, 6.4), layout="constrained")
    for axes, (axis, row) in zip(drawing.subplots(2, 2).flat, summary["axes"].items(), strict=False):
        for name in LABELS:
            timed = [point for point in row["points"] if point[name]["ratio"] is not None]
            sizes, ratios = [p["size"] for p in timed], [p[name]["ratio"] for p in timed]
            axes.errorbar(
                sizes,
                ratios,
                yerr=study.spread([point[name] for point in timed]),
                fmt="o",
                color=COLORS[name],
                capsize=3,
                label=_label(name, row),
            )
            fit = row["fits"].get(name)
            if fit:
                curve = np.geomspace(min(sizes), max(sizes))
                at_zero = row["at_zero"]
                axes.plot(curve, at_zero + fit["constant"] * curve ** fit["exponent"], color=COLORS[name], alpha=0.7)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel(SIZES[axis])
        axes.set_ylabel("time (base forward pass = 1)")
        axes.legend(fontsize=8)
    drawing.suptitle(f"{summary['machine']['backend']}, {summary['mode']}", fontsize=10)
    return drawing


def _label(name: str, row: dict[str, Any]) -> str:
    if name not in row["fits"]:
        return LABELS[name]
    over = " over f(x)" if row["at_zero"] else ""
    return f"{LABELS[name]}: exponent{over} {_exponent(row['fits'][name])}"


def _exponent(fit: dict[str, float] | None) -> str:
    return f"{fit['exponent']:.2f} ± {fit['sem']:.2f}" if fit else ""
