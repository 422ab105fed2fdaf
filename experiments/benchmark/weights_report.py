"""The benchmark of products along weights as a table, on the terminal and in Markdown, and as a figure."""

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from rich.console import Console

from experiments import files, tables
from experiments.benchmark import report
from experiments.plots import STYLE


def columns(row: dict[str, Any]) -> dict[str, str]:
    """One entry's figures, by the heading of their column."""
    timed = row["ratio"] is not None
    spread = "-".join(f"{quartile:.2f}" for quartile in row["ratio_quartiles"] or ())
    return {
        "along": row["label"],
        "error": report.one_digit(row["error"]),
        "× forward pass": f"{row['ratio']:.2f} ({spread})" if timed else row["status"],
        "of it tangent": f"{row['ratio'] - 1:.2f}" if timed and row["name"] not in ("forward", "primal") else "",
        "by multiplications": f"{row['expected_ratio']:.2f}",
        "ms": f"{1000 * row['seconds']:.1f}" if timed else "",
        "first s": f"{row['first_call_seconds']:.1f}" if timed else "",
    }


def conditions(summary: dict[str, Any]) -> str:
    """What the figures mean and where they are from."""
    settings = summary["settings"]
    return (
        f"{report.subject(settings)}, inference mode, {settings['num_probes']} direction(s) of each. One compiled call "
        "computes `f(x)` and the product (`linearize(...).jvp(weights=...)`); the forward pass is that of the plain "
        f"model. Ratios to the forward pass of the same round, median and quartiles of {settings['rounds']} rounds; of "
        "it tangent: what is over 1, which is the tangent pass, and what freezing the layers costs beside it "
        "(linearize alone: its `f(x)`, without a product). By multiplications: the ratio if multiplications by kernels "
        "were all that costs, those of a tangent pass being the ones from its layer on. Errors are relative, of the "
        "compiled product in float32 against autodiff in "
        f"float64 that is not jitted; above {settings['tolerance']:g} a product is wrong and is not timed. First s: "
        f"seconds of the first call, compilation included. {report.ran_on(summary)}"
    )


def write(summary: dict[str, Any], folder: Path, console: Console) -> None:
    """Write weights.json, weights.md and weights.png, and print the table."""
    rows = [columns(row) for row in summary["entries"]]
    files.write_json(folder / "weights.json", summary)
    files.write_text(folder / "weights.md", f"{tables.grid_markdown(rows)}\n\n{conditions(summary)}\n")
    figure(summary, folder / "weights.png")
    console.print(tables.grid(rows))
    console.print(conditions(summary))
    console.print(f"Files: {folder}")


def figure(summary: dict[str, Any], path: Path) -> None:
    """Draw the cost along each kernel over its depth, beside those along the input and all weights, into a PNG file."""
    whole = ("forward", "primal", "input", "all")
    kernels = [row for row in summary["entries"] if row["name"] not in whole]
    timed = [(depth, row) for depth, row in enumerate(kernels) if row["ratio"] is not None]
    with matplotlib.rc_context(STYLE):
        drawing = Figure(figsize=(8.0, 3.6), layout="constrained")
        axes = drawing.subplots()
        spread = [[abs(row["ratio"] - row["ratio_quartiles"][side]) for _, row in timed] for side in (0, 1)]
        axes.errorbar(
            [depth for depth, _ in timed],
            [row["ratio"] for _, row in timed],
            yerr=spread,
            marker="o",
            capsize=3,
            label="one kernel",
        )
        axes.plot([row["expected_ratio"] for row in kernels], color="C0", linestyle=":", label="by multiplications")
        for row, color in zip(
            (row for row in summary["entries"] if row["name"] in whole), ("0.4", "0.7", "C1", "C2"), strict=True
        ):
            if row["ratio"] is not None:
                axes.axhline(row["ratio"], color=color, linestyle="--", linewidth=1, label=row["label"])
        axes.set_xticks(range(len(kernels)), [row["name"] for row in kernels])
        axes.set_ylim(bottom=0)
        axes.set_xlabel("the kernel that is pushed along, by its depth")
        axes.set_ylabel("forward passes (median and quartiles)")
        axes.set_title(f"{summary['machine']['backend']}, {summary['mode']}", loc="left", fontsize=10)
        drawing.legend(loc="outside right upper", fontsize=9)
        files.save_figure(drawing, path)
