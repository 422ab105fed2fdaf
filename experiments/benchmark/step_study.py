"""The `benchmark step` study: correctness first, then memory, then times in turn."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from experiments import processes
from experiments.benchmark import entries, measure, memory, study
from experiments.benchmark.check import Check, Checker
from experiments.benchmark.config import StepConfig
from experiments.benchmark.entries import Entry
from experiments.benchmark.study import Benchmark, one_digit
from experiments.study import one_table

COLORS = {"none": "0.55", "jvpreg": "C0", "autodiff": "C1"}


def measured(config: StepConfig, console: Console) -> dict[str, Any]:
    """A row an entry."""
    chosen = chosen_entries(config)
    checker = Checker(config)
    checks: dict[str, Check | None] = {}
    for entry in chosen:
        console.print(f"checking {entry.label}")
        checks[entry.name] = checker.check(entry)
    right = [entry for entry in chosen if is_right(checks[entry.name], config)]
    peaks: dict[str, int | MemoryError] = {}
    for entry in right if config.memory else []:
        console.print(f"measuring the memory of {entry.label}")
        peaks[entry.name] = peak_bytes(entry.name, config)
    # What fells a process of its own would fell this one.
    able = [entry for entry in right if not isinstance(peaks.get(entry.name), MemoryError)]
    console.print(f"timing {config.rounds} rounds of {len(able)} entries")
    times = timings(able, config)
    rows = [row(entry, config, checks[entry.name], times.get(entry.name), peaks.get(entry.name)) for entry in chosen]
    return {"entries": rows}


def chosen_entries(config: StepConfig) -> list[Entry]:
    """The plain step and what `only` names."""
    names = [entry.name for entry in entries.ENTRIES]
    wanted = ["plain", *study.chosen_names(config.only, names)]
    return [entry for entry in entries.ENTRIES if entry.name in wanted]


def is_right(check: Check | None, config: StepConfig) -> bool:
    """Whether an entry is to be timed; the plain step has nothing to check."""
    return check is None or study.is_right(check.error, config)


def timings(chosen: Sequence[Entry], config: StepConfig) -> dict[str, measure.Timing | MemoryError]:
    """Time a training step of the entries, in units of the plain step, which is to be among them."""
    makers = {entry.name: functools.partial(training_step, entry, config) for entry in chosen}
    return measure.in_turn(makers, "plain", config, {entry.name: entry.interval for entry in chosen})


def training_step(entry: Entry, config: StepConfig) -> measure.Step:
    """A training step of the entry's model."""
    return entries.batch_step(entries.training_model(entry, config), config)


def peak_bytes(name: str, config: StepConfig) -> int | MemoryError:
    """Peak memory that an entry's first steps add to what a process holds after its imports, compilation included.

    Returns:
        Bytes; a MemoryError where the process ran out of memory or was killed.

    Raises:
        RuntimeError: the process failed in another way.
    """
    found = processes.memory(peak, (name, config))
    return found if isinstance(found, MemoryError) else found["peak"]


def peak(name: str, config: StepConfig) -> Iterator[dict[str, int]]:
    """In a process of its own: what the first steps of an entry add to the peak."""
    entry = next(entry for entry in entries.ENTRIES if entry.name == name)
    before = memory.resident_peak()
    measure.turn(training_step(entry, config), config.memory_steps)
    yield {"peak": memory.resident_peak() - before}


def row(
    entry: Entry,
    config: StepConfig,
    check: Check | None,
    times: measure.Timing | MemoryError | None,
    peak: int | MemoryError | None,
) -> dict[str, Any]:
    """What the JSON file says of an entry; what was not measured is null."""
    return {
        "name": entry.name,
        "label": entry.label,
        "derivative": entry.derivative(config),
        "steps_per_turn": entry.interval,
        "penalty_error": study.finite(check.penalty_error) if check else None,
        "gradient_error": study.finite(check.gradient_error) if check else None,
        **measure.outcome(is_right(check, config), times, peak),
        "peak_memory_bytes": peak if isinstance(peak, int) else None,
    }


def columns(row: dict[str, Any]) -> dict[str, str]:
    """One entry's figures, by the heading of their column."""
    peak = row["peak_memory_bytes"]
    return {
        "step": row["label"],
        "derivative": row["derivative"],
        "error": one_digit(row["penalty_error"]),
        "of gradient": one_digit(row["gradient_error"]),
        "× plain step": study.ratio(row),
        **study.times(row),
        "peak MB": f"{peak / 1e6:.0f}" if peak is not None and row["status"] != "wrong" else "",
    }


def caption(summary: dict[str, Any]) -> str:
    """What the figures mean and where they are from."""
    settings = summary["settings"]
    return (
        f"{study.subject(settings)}, batch normalization in {settings['batch_normalization']} mode. "
        "Ratios to the plain step of the same round, median "
        f"and quartiles of {settings['rounds']} rounds; interval=4 is the mean of four steps. Derivative: batch "
        "statistics moving (of inference), frozen (the batch's, constant to the tangent) or coupled (the batch's, "
        "moved along). Errors are relative, of one step's penalty and of its gradient by the weights, against float64 "
        f"that is not jitted; above {settings['tolerance']:g} a step is wrong and is not timed. First s: seconds of "
        "the first call, compilation included. Peak MB: memory over the plain import, compilation included. "
        f"{study.ran_on(summary)}"
    )


def figure(summary: dict[str, Any]) -> Figure:
    """The ratios as bars with their quartiles."""
    rows = summary["entries"]
    drawing = Figure(figsize=(7.5, 0.42 * len(rows) + 1.3), layout="constrained")
    axes = drawing.subplots()
    for place, row in enumerate(rows):
        if row["ratio"] is None:
            axes.text(0.03, place, _reason(row), va="center", color="C3")
            continue
        axes.barh(
            place, row["ratio"], xerr=study.spread([row]), height=0.62, color=_color(row), ecolor="0.2", capsize=3
        )
        axes.text(row["ratio_quartiles"][1] + 0.04, place, f"{row['ratio']:.2f}", va="center")
    axes.axvline(1.0, color="0.4", linewidth=1, linestyle=":")
    axes.margins(x=0.1)
    axes.set_xlim(left=0)
    unit = "time of a training step, times the plain step (median and quartiles)"
    study.name_bars(axes, [row["label"] for row in rows], unit, summary)
    return drawing


def _color(row: dict[str, Any]) -> str:
    if row["derivative"] == "none":
        return COLORS["none"]
    return COLORS["autodiff" if row["label"] in ("double backpropagation", "forward autodiff") else "jvpreg"]


def _reason(row: dict[str, Any]) -> str:
    if row["status"] != "wrong":
        return row["status"]
    return f"wrong (error {one_digit(row['penalty_error'])}, of the gradient {one_digit(row['gradient_error'])})"


STUDY = Benchmark(
    "step",
    measured,
    one_table("entries", columns, caption),
    {"step": figure},
    variant=lambda config: "" if config.batch_normalization == "training" else f"-{config.batch_normalization}",
)
