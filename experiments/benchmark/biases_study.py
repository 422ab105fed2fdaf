"""The `benchmark biases` study: what penalties on bias-Jacobians add to a training step."""

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops

from experiments import tables
from experiments.benchmark import biases_entries, entries, measure, report, study
from experiments.benchmark.biases_entries import ENTRIES, Entry
from experiments.benchmark.check import EXAMPLES, Check, check_gradient, penalty_alone
from experiments.benchmark.config import BenchmarkConfig, BiasesConfig
from experiments.benchmark.reference import Reference, float64


def run(config: BiasesConfig) -> dict[str, Any]:
    """Measure the entries, and write and print what came out.

    Args:
        config: see `BiasesConfig`.

    Returns:
        What `biases.json` holds: the settings, the machine, and a row an entry.

    Raises:
        ExperimentError: where the backend is not known.
    """
    labels = {entry.name: entry.label for entry in ENTRIES}
    named = {entry.name: entry for entry in ENTRIES}
    console = study.wide_console()
    rows = measured(
        "biases", labels, lambda name: check(named[name], config), lambda name: step(named[name], config), config
    )
    summary = {"study": "benchmark biases", **study.conditions(config), "entries": rows}
    write("biases", summary, conditions(summary), config, console)
    return summary


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
    console = study.wide_console()
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
        checked = checks.get(entry)
        rows.append(
            {
                "name": entry,
                "label": label,
                "penalty_error": study.finite(checked.penalty_error) if checked else None,
                "gradient_error": study.finite(checked.gradient_error) if checked else None,
                **measure.outcome(entry in right, times.get(entry)),
            }
        )
    return rows


def step(entry: Entry, config: BiasesConfig) -> measure.Step:
    """A training step of the entry's model; it returns its loss, and so is waited for."""
    split = entries.images(config, config.batch_size)
    batch = split.images(), split.labels
    model = biases_entries.training_model(entry, config)
    return lambda: model.train_on_batch(*batch)


def check(entry: Entry, config: BiasesConfig) -> Check:
    """Whether an entry, compiled as it is timed, trains on the penalty that it claims to."""
    model = biases_entries.training_model(entry, config, strength=1.0, **penalty_alone())
    split = entries.images(config, EXAMPLES)
    return check_gradient(model, split.images(), split.labels, functools.partial(exact_penalty, entry, config))


def exact_penalty(entry: Entry, config: BiasesConfig, moved: list[np.ndarray]) -> float:
    """The penalty in float64, by one reverse pass that is not jitted, at the weights moved by so much."""
    split = entries.images(config, EXAMPLES)
    exact = Reference(biases_entries.plain_model(config), "moving", split.images())
    with float64():
        for variable, weight, change in zip(exact.model.trainable_variables, exact.weights, moved, strict=True):
            variable.assign(weight + change)
        names = biases_entries.convolutions(exact.model, entry)
        outputs, gradients = biases_entries.differentiable(exact.model.layers[1:], exact.x, names)
        at_input, at_layers = gradients(ops.one_hot(split.labels, outputs.shape[1], dtype="float64"))
        biases = {layer.name: layer.bias for layer in exact.model.layers if layer.name in names}
        total = sum(biases_entries.squares(at_layers[name] * ops.convert_to_tensor(b)) for name, b in biases.items())
        if entry.with_input:
            total = total + biases_entries.squares(at_input)
        return float(ops.mean(total))


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


def conditions(summary: dict[str, Any]) -> str:
    """What the figures mean and where they are from."""
    settings = summary["settings"]
    return (
        f"{report.subject(settings)}, biases and no normalization; the label's logit. Ratios to the plain step of the "
        f"same round, median and quartiles of {settings['rounds']} rounds. Errors are relative, of one step's penalty "
        "and of its gradient by the weights, against one reverse pass in float64 that is not jitted; above "
        f"{settings['tolerance']:g} a step is wrong and is not timed. First s: seconds of the first call, compilation "
        f"included. {report.ran_on(summary)}"
    )


def write(name: str, summary: dict[str, Any], conditions: str, config: BenchmarkConfig, console: Any) -> None:
    """Write the JSON and the Markdown file of a study, and print the table."""
    folder = Path(config.folder or f"runs/benchmark/{name}-{keras.backend.backend()}-{study.mode(config)}")
    folder.mkdir(parents=True, exist_ok=True)
    rows = [columns(row) for row in summary["entries"]]
    (folder / f"{name}.json").write_text(json.dumps(summary, indent=2))
    (folder / f"{name}.md").write_text(f"{tables.grid_markdown(rows)}\n\n{conditions}\n")
    console.print(tables.grid(rows))
    console.print(conditions)
    console.print(f"Files: {folder}")
