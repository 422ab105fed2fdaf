"""The benchmarks of several products as a table, on the terminal and in Markdown, and as a figure."""

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from rich.console import Console

from experiments import files
from experiments.benchmark import jvp_report, report
from experiments.benchmark.competitors import FEW_OUTPUTS
from experiments.plots import STYLE

WHAT = {
    "probes": (
        "products with the Jacobian along the input at one point, all in one call, and `f(x)`",
        "number of directions",
    ),
    "iterate": (
        "products with the Jacobian along the input at one point, each of which waits for the one before, in one call "
        "with `f(x)`, by `keras.ops.fori_loop`",
        "number of products, one after the other",
    ),
}
"""What is counted, in words: in the conditions, and in the figure."""


def table(summary: dict[str, Any]) -> list[dict[str, str]]:
    """A row a count, and one of the cost of a further product."""
    names = jvp_report.labels(summary["rows"])
    rows = [{"products": str(row["count"]), **jvp_report.figures(row, names)} for row in summary["rows"]]
    slopes = summary["further_product"]
    cells = {label: f"{slopes[name]:.2f}" if name in slopes else "–" for name, label in names.items()}
    return [*rows, {"products": "one more", "forward ms": "", **cells, "speed-up": ""}]


def conditions(name: str, summary: dict[str, Any]) -> str:
    """What the figures mean and where they are from."""
    settings = summary["settings"]
    shape = "x".join(map(str, summary["input_shape"]))
    return (
        f"{settings['architecture']} on inputs of {shape}, {jvp_report.subject(settings)}: {WHAT[name][0]}. Ratios to "
        "the model's forward pass of the same round; of jvpreg and of the best alternative that is right, median and "
        f"quartiles of {settings['rounds']} rounds. Speed-up: the best alternative's time over jvpreg's, in the same "
        "round. One more: what a further product takes in forward passes, the slope of a line through the medians by "
        f"least squares. A batch Jacobian is tried up to {FEW_OUTPUTS} outputs. "
        f"{jvp_report.ARITHMETIC + ' ' if name == 'probes' else ''}{jvp_report.checked(settings)} "
        f"{report.ran_on(summary)}"
    )


def notes(summary: dict[str, Any]) -> list[str]:
    """Why figures are missing, a paragraph each."""
    return [
        f"{row['count']}, {entry['label']}: {entry['message'].rstrip('.')}."
        for row in summary["rows"]
        for entry in row["entries"]
        if entry["message"]
    ]


def write(name: str, summary: dict[str, Any], folder: Path, console: Console) -> None:
    """Write the JSON, the Markdown and the PNG file of the study, and print the table."""
    files.write_json(folder / f"{name}.json", summary)
    figure(summary, WHAT[name][1], folder / f"{name}.png")
    jvp_report.tell(name, table(summary), [conditions(name, summary), *notes(summary)], folder, console)


def figure(summary: dict[str, Any], counted: str, path: Path) -> None:
    """Draw the ratios over the counts, with their quartiles, into a PNG file."""
    with matplotlib.rc_context(STYLE):
        drawing = Figure(figsize=(6.5, 4.2), layout="constrained")
        axes = drawing.subplots()
        for name, label in jvp_report.labels(summary["rows"]).items():
            timed = [
                (row["count"], entry["ratio"], *entry["ratio_quartiles"])
                for row in summary["rows"]
                for entry in row["entries"]
                if entry["name"] == name and entry["ratio"] is not None
            ]
            if timed:
                counts, medians, lower, upper = zip(*timed, strict=True)
                (line,) = axes.plot(counts, medians, marker="o", markersize=4, label=label, zorder=3)
                axes.fill_between(counts, lower, upper, color=line.get_color(), alpha=0.2, linewidth=0)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.set_xlabel(counted)
        axes.set_ylabel("forward passes (median and quartiles)")
        axes.set_title(
            f"{summary['settings']['architecture']}, {summary['machine']['backend']}, {summary['mode']}",
            loc="left",
            fontsize=10,
        )
        axes.legend(fontsize=9)
        files.save_figure(drawing, path)
