"""The `benchmark step` study: correctness first, then memory, then times in turn."""

from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from experiments.benchmark import checked, entries, measure, memory, study
from experiments.benchmark.checked import EXAMPLES, Check, check_gradient
from experiments.benchmark.config import StepConfig
from experiments.benchmark.entries import Entry
from experiments.benchmark.reference import Reference
from experiments.benchmark.study import Benchmark, one_digit
from experiments.study import one_table

COLORS = {"none": "0.55", "jvpreg": "C0", "autodiff": "C1"}


def measured(config: StepConfig, console: Console) -> dict[str, Any]:
    """A row an entry."""
    chosen = {entry.name: entry for entry in chosen_entries(config)}
    rows = checked.measured(
        {name: entry.label for name, entry in chosen.items()},
        lambda name: check(chosen[name], config),
        lambda name: training_step(chosen[name], config),
        config,
        console,
        {name: entry.interval for name, entry in chosen.items()},
        (lambda name: peak_bytes(name, config)) if config.memory else None,
    )
    for row, entry in zip(rows, chosen.values(), strict=True):
        row.update(derivative=entry.derivative(config), steps_per_turn=entry.interval)
    return {"entries": rows}


def chosen_entries(config: StepConfig) -> list[Entry]:
    """The plain step and what `only` names."""
    names = [entry.name for entry in entries.ENTRIES]
    wanted = ["plain", *study.chosen_names(config.only, names)]
    return [entry for entry in entries.ENTRIES if entry.name in wanted]


def check(entry: Entry, config: StepConfig) -> Check:
    """The errors of an entry, in known directions."""
    side, derivative, batch = entry.side, entry.derivative(config), entries.images(config, EXAMPLES)
    assert side is not None
    assert derivative != "none"
    reference = Reference(entries.base_model(config), derivative, batch.images())
    return check_gradient(
        entries.checked_model(entry, config),
        batch.images(),
        batch.labels,
        lambda moved: reference.penalties(side, entry.num_probes, moved),
        entry.interval,
        entry.fraction,
    )


def training_step(entry: Entry, config: StepConfig) -> measure.Step:
    """A training step of the entry's model."""
    return entries.batch_step(entries.training_model(entry, config), config)


def peak_bytes(name: str, config: StepConfig) -> int | MemoryError:
    """Peak memory that an entry's first steps add to that of a process of their own; see `memory.added_peak`."""
    return memory.added_peak(name, take_steps, name, config)


def take_steps(name: str, config: StepConfig) -> None:
    """In a process of its own: the first steps of an entry."""
    entry = next(entry for entry in entries.ENTRIES if entry.name == name)
    measure.turn(training_step(entry, config), config.memory_steps)


def columns(row: dict[str, Any]) -> dict[str, str]:
    """One entry's figures, by the heading of their column."""
    peak = row["peak_memory_bytes"]
    return {
        "step": row["label"],
        "derivative": row["derivative"],
        **checked.columns(row),
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
