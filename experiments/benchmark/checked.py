"""Studies of training steps of which each is checked by its gradient before it is timed: what they share."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from experiments import files, tables
from experiments.benchmark import measure, report, study
from experiments.benchmark.check import Check
from experiments.benchmark.config import BenchmarkConfig


def measured(
    name: str,
    labels: Mapping[str, str],
    check: Callable[[str], Check],
    step: Callable[[str], measure.Step],
    config: BenchmarkConfig,
) -> list[dict[str, Any]]:
    """Check entries and time those that are right, in units of the one named "plain".

    Args:
        name: of the study.
        labels: of the entries, by name.
        check: checks an entry; not asked of the plain one.
        step: makes the training step of an entry.
        config: the number of rounds, and the tolerance.

    Returns:
        A row an entry.
    """
    study.check_backend(name)
    console = tables.wide_console()
    checks: dict[str, Check] = {}
    for entry in labels:
        if entry != "plain":
            console.print(f"checking {labels[entry]}")
            checks[entry] = check(entry)
    right = [entry for entry in labels if entry not in checks or checks[entry].error <= config.tolerance]
    console.print(f"timing {config.rounds} rounds of {len(right)} entries")
    times = measure.in_turn({entry: functools.partial(step, entry) for entry in right}, "plain", config)
    rows = []
    for entry, label in labels.items():
        found = checks.get(entry)
        rows.append(
            {
                "name": entry,
                "label": label,
                "penalty_error": study.finite(found.penalty_error) if found else None,
                "gradient_error": study.finite(found.gradient_error) if found else None,
                **measure.outcome(entry in right, times.get(entry)),
            }
        )
    return rows


def columns(row: dict[str, Any]) -> dict[str, str]:
    """One entry's figures, by the heading of their column."""
    timed = row["ratio"] is not None
    spread = "-".join(f"{quartile:.2f}" for quartile in row["ratio_quartiles"] or ())
    return {
        "step": row["label"],
        "error": report.one_digit(row["penalty_error"]),
        "of gradient": report.one_digit(row["gradient_error"]),
        "× plain step": f"{row['ratio']:.2f} ({spread})" if timed else row["status"],
        "ms": f"{1000 * row['seconds']:.1f}" if timed else "",
        "first s": f"{row['first_call_seconds']:.1f}" if timed else "",
    }


def write(name: str, summary: dict[str, Any], conditions: str, config: BenchmarkConfig) -> None:
    """Write the JSON and the Markdown file of a study, and print the table."""
    folder = study.folder(name, config)
    rows = [columns(row) for row in summary["entries"]]
    files.write_json(folder / f"{name}.json", summary)
    files.write_text(folder / f"{name}.md", f"{tables.grid_markdown(rows)}\n\n{conditions}\n")
    console = tables.wide_console()
    console.print(tables.grid(rows))
    console.print(conditions)
    console.print(f"Files: {folder}")
