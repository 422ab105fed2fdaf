"""What the table of the benchmark says, and its figure."""

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from experiments import files
from experiments.plots import STYLE

COLORS = {"none": "0.55", "jvpreg": "C0", "autodiff": "C1"}


def columns(row: dict[str, Any]) -> dict[str, str]:
    """One entry's figures, by the heading of their column."""
    wrong = row["status"] == "wrong"
    timed = row["ratio"] is not None
    spread = "-".join(f"{quartile:.2f}" for quartile in row["ratio_quartiles"] or ())
    peak = row["peak_memory_bytes"]
    return {
        "step": row["label"],
        "derivative": row["derivative"],
        "error": one_digit(row["penalty_error"]),
        "of gradient": one_digit(row["gradient_error"]),
        "× plain step": f"{row['ratio']:.2f} ({spread})" if timed else row["status"],
        "ms": f"{1000 * row['seconds']:.1f}" if timed else "",
        "first s": f"{row['first_call_seconds']:.1f}" if timed else "",
        "peak MB": f"{peak / 1e6:.0f}" if peak is not None and not wrong else "",
    }


def conditions(summary: dict[str, Any]) -> str:
    """What the figures mean and where they are from."""
    settings = summary["settings"]
    return (
        f"{subject(settings)}, batch normalization in {settings['batch_normalization']} mode. "
        "Ratios to the plain step of the same round, median "
        f"and quartiles of {settings['rounds']} rounds; interval=4 is the mean of four steps. Derivative: batch "
        "statistics moving (of inference), frozen (the batch's, constant to the tangent) or coupled (the batch's, "
        "moved along). Errors are relative, of one step's penalty and of its gradient by the weights, against float64 "
        f"that is not jitted; above {settings['tolerance']:g} a step is wrong and is not timed. First s: seconds of "
        "the first call, compilation included. Peak MB: memory over the plain import, compilation included. "
        f"{ran_on(summary)}"
    )


def subject(settings: dict[str, Any]) -> str:
    """What is run, and on what."""
    size = settings["image_size"]
    return (
        f"Model {settings['model']['name']} of width {settings['model']['width']}, batches of "
        f"{settings['batch_size']} images of {size}x{size}x3"
    )


def ran_on(summary: dict[str, Any]) -> str:
    """What it ran on."""
    machine = summary["machine"]
    return (
        f"{machine['backend']} ({summary['mode']}), Keras {machine['keras']}, "
        f"{machine['cores']} cores of {machine['processor']}."
    )


def figure(summary: dict[str, Any], path: Path) -> None:
    """Draw the ratios as bars with their quartiles into a PNG file."""
    rows = summary["entries"]
    with matplotlib.rc_context({**STYLE, "axes.grid.axis": "x"}):
        drawing = Figure(figsize=(7.5, 0.42 * len(rows) + 1.3), layout="constrained")
        axes = drawing.subplots()
        for place, row in enumerate(rows):
            if row["ratio"] is None:
                axes.text(0.03, place, _reason(row), va="center", color="C3")
                continue
            lower, upper = row["ratio_quartiles"]
            spread = [[row["ratio"] - lower], [upper - row["ratio"]]]
            axes.barh(place, row["ratio"], xerr=spread, height=0.62, color=_color(row), ecolor="0.2", capsize=3)
            axes.text(upper + 0.04, place, f"{row['ratio']:.2f}", va="center")
        axes.axvline(1.0, color="0.4", linewidth=1, linestyle=":")
        axes.set_yticks(range(len(rows)), [row["label"] for row in rows])
        axes.invert_yaxis()
        axes.margins(x=0.1)
        axes.set_xlim(left=0)
        axes.grid(False, axis="y")
        axes.set_xlabel("time of a training step, times the plain step (median and quartiles)")
        axes.set_title(f"{summary['machine']['backend']}, {summary['mode']}", loc="left", fontsize=10)
        files.save_figure(drawing, path)


def _color(row: dict[str, Any]) -> str:
    if row["derivative"] == "none":
        return COLORS["none"]
    return COLORS["autodiff" if row["label"] in ("double backpropagation", "forward autodiff") else "jvpreg"]


def _reason(row: dict[str, Any]) -> str:
    if row["status"] != "wrong":
        return row["status"]
    return f"wrong (error {one_digit(row['penalty_error'])}, of the gradient {one_digit(row['gradient_error'])})"


def one_digit(error: float | str | None) -> str:
    """A relative error, to one digit."""
    return f"{error:.0e}" if isinstance(error, float) else error or ""
