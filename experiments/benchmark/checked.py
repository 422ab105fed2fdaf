"""Benchmarks of training steps of which each is checked by its gradient before it is timed: what they share."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import keras
from rich.console import Console

from experiments.benchmark import entries, measure, study
from experiments.benchmark.check import Check
from experiments.benchmark.study import Benchmark, one_digit
from experiments.study import one_table


def benchmark(
    name: str,
    labels: Mapping[str, str],
    check: Callable[[str, Any], Check],
    model: Callable[[str, Any], keras.Model],
    caption: Callable[[dict[str, Any]], str],
) -> Benchmark:
    """A benchmark of entries in units of the one named "plain", which is not checked.

    Args:
        name: of the benchmark.
        labels: of the entries, by name.
        check: from an entry's name and the configuration, whether it is right.
        model: from the same, the compiled model whose training step is timed.
        caption: what the figures mean.
    """

    def measured(config: Any, console: Console) -> dict[str, Any]:
        checks: dict[str, Check] = {}
        for entry in labels:
            if entry != "plain":
                console.print(f"checking {labels[entry]}")
                checks[entry] = check(entry, config)
        right = [entry for entry in labels if entry not in checks or study.is_right(checks[entry].error, config)]
        console.print(f"timing {config.rounds} rounds of {len(right)} entries")

        def step(entry: str) -> measure.Step:
            return entries.batch_step(model(entry, config), config)

        times = measure.in_turn({entry: functools.partial(step, entry) for entry in right}, "plain", config)
        rows = [row(entry, labels[entry], checks.get(entry), entry in right, times.get(entry)) for entry in labels]
        return {"entries": rows}

    return Benchmark(name, measured, one_table("entries", columns, caption), backends=study.TWO_BACKENDS)


def row(
    name: str, label: str, check: Check | None, right: bool, times: measure.Timing | MemoryError | None
) -> dict[str, Any]:
    """What the JSON file says of an entry; what was not measured is null."""
    return {
        "name": name,
        "label": label,
        "penalty_error": study.finite(check.penalty_error) if check else None,
        "gradient_error": study.finite(check.gradient_error) if check else None,
        **measure.outcome(right, times),
    }


def columns(row: dict[str, Any]) -> dict[str, str]:
    """One entry's figures, by the heading of their column."""
    return {
        "step": row["label"],
        "error": one_digit(row["penalty_error"]),
        "of gradient": one_digit(row["gradient_error"]),
        "× plain step": study.ratio(row),
        **study.times(row),
    }
