"""Tables on the terminal and in Markdown: of any study's rows, and of a comparison."""

import sys
from typing import Any

from rich.console import Console
from rich.table import Table

LEFT = ("", "along", "derivative", "host", "layer", "map", "method", "model", "run", "since", "state", "step")
"""Headings of the columns that hold words."""

WRONG = {"incomplete", "wrong"}
"""What a cell says of a row that is shown in red."""


def grid(rows: list[dict[str, str]]) -> Table:
    """Rows of cells, by the heading of their column, for a rich console."""
    table = Table()
    for heading in rows[0]:
        table.add_column(heading, no_wrap=True, justify="left" if heading in LEFT else "right")
    for row in rows:
        table.add_row(*row.values(), style="red" if WRONG & set(row.values()) else None)
    return table


def grid_markdown(rows: list[dict[str, str]]) -> str:
    """Rows of cells, by the heading of their column, in Markdown."""
    aligned = ["---" if heading in LEFT else "---:" for heading in rows[0]]
    lines = [list(rows[0]), aligned, *[list(row.values()) for row in rows]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def wide_console(columns: int = 120) -> Console:
    """The terminal; the tables are wider than the 80 columns that a pipe is given."""
    return Console(soft_wrap=True, highlight=False, log_path=False, width=None if sys.stdout.isatty() else columns)


def columns(row: dict[str, Any]) -> dict[str, str]:
    """One run's figures, by the heading of their column."""
    robust = row["robustness"]
    return {
        "run": row["run"],
        "test accuracy": _percent(row["test_accuracy"]),
        "‖J‖_F": f"{row['jacobian/frobenius_norm']:.3g} ± {row['jacobian/frobenius_norm_sem']:.1g}",
        "σ₁": f"{row['jacobian/spectral_norm']:.3g}",
        **{f"noise {size}": _percent(value) for size, value in robust["noise"].items()},
        **{f"FGSM {size}": _percent(value) for size, value in robust["fgsm"].items()},
        **{f"PGD {size}": _percent(value) for size, value in robust["pgd"].items()},
        "ms a step": f"{1000 * row['seconds_per_step']:.3g}",
    }


def terminal(summary: dict[str, Any]) -> Table:
    """The comparison for a rich console, a column a run, which fits where a row a run would not."""
    rows = [columns(row) for row in summary["rows"]]
    table = Table()
    table.add_column()
    for row in rows:
        table.add_column(row.pop("run"), justify="right")
    for heading in rows[0]:
        table.add_row(heading, *[row[heading] for row in rows])
    return table


def markdown(summary: dict[str, Any]) -> str:
    """The comparison as a Markdown table, with the conditions below it."""
    return f"{grid_markdown([columns(row) for row in summary['rows']])}\n\n{conditions(summary)}\n"


def conditions(summary: dict[str, Any]) -> str:
    """What the figures mean and where they are from, in a sentence or two."""
    machine, examples = summary["machine"], summary["rows"][0]["robustness"]["examples"]
    return (
        "Accuracies in %; noise (standard deviation), FGSM and PGD (L∞ radius) in pixel units, white = 1, on "
        f"{examples} test images. Steps of {summary['batch_size']} examples, the medians of steps taken in "
        f"turn on one device, with {machine['cores']} cores of {machine['processor']}, Keras {machine['keras']}, "
        f"{machine['backend']}."
    )


def _percent(part: float) -> str:
    return f"{100 * part:.1f}"
