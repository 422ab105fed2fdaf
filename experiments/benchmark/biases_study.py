"""The `benchmark biases` study: what penalties on bias-Jacobians add to a training step."""

import functools
import json
import math
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops

from experiments import tables
from experiments.benchmark import biases_entries, entries, measure, report, study
from experiments.benchmark.biases_entries import ENTRIES, Entry
from experiments.benchmark.check import DIFFERENCE, EXAMPLES, Check
from experiments.benchmark.config import BiasesConfig
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
    study.check_backend("biases")
    console = study.wide_console()
    checks: dict[str, Check] = {}
    for entry in ENTRIES[1:]:
        console.print(f"checking {entry.label}")
        checks[entry.name] = check(entry, config)
    right = [entry for entry in ENTRIES if entry.name not in checks or checks[entry.name].error <= config.tolerance]
    console.print(f"timing {config.rounds} rounds of {len(right)} entries")
    makers = {entry.name: functools.partial(step, entry, config) for entry in right}
    times = measure.in_turn(makers, "plain", config)
    rows = []
    for entry in ENTRIES:
        checked = checks.get(entry.name)
        rows.append(
            {
                "name": entry.name,
                "label": entry.label,
                "penalty_error": study.finite(checked.penalty_error) if checked else None,
                "gradient_error": study.finite(checked.gradient_error) if checked else None,
                **measure.outcome(entry in right, times.get(entry.name)),
            }
        )
    summary = {"study": "benchmark biases", **study.conditions(config), "entries": rows}
    folder = Path(config.folder or f"runs/benchmark/biases-{keras.backend.backend()}-{study.mode(config)}")
    write(summary, folder, console)
    return summary


def step(entry: Entry, config: BiasesConfig) -> measure.Step:
    """A training step of the entry's model; it returns its loss, and so is waited for."""
    split = entries.images(config, config.batch_size)
    batch = split.images(), split.labels
    model = biases_entries.training_model(entry, config)
    return lambda: model.train_on_batch(*batch)


def check(entry: Entry, config: BiasesConfig) -> Check:
    """One step of an entry, compiled as it is timed, that moves the weights by the penalty's gradient and no more.

    The gradient is checked along itself: there the slope of the penalty is its norm, if it is right.
    """

    def nothing(labels, outputs):
        return 0.0 * ops.sum(outputs, axis=-1)

    model = biases_entries.training_model(
        entry, config, strength=1.0, loss=nothing, optimizer=keras.optimizers.SGD(1.0)
    )
    split = entries.images(config, EXAMPLES)
    weights = [ops.convert_to_numpy(variable) for variable in model.base.trainable_variables]
    penalty = float(model.train_on_batch(split.images(), split.labels, return_dict=True)["penalty"])
    # On JAX, reading `trainable_variables` of the model that was trained brings them up to date.
    moved = [ops.convert_to_numpy(variable) for variable in model.trainable_variables]
    gradient = [np.float64(old) - new for old, new in zip(weights, moved, strict=True)]
    norm = math.sqrt(sum(float(np.sum(part**2)) for part in gradient))
    expected, ahead, behind = (
        exact_penalty(entry, config, [distance / (norm or 1.0) * part for part in gradient])
        for distance in (0.0, DIFFERENCE, -DIFFERENCE)
    )
    slope = (ahead - behind) / (2 * DIFFERENCE)
    return Check(abs(penalty - expected) / expected, abs(norm - slope) / abs(slope) if slope else math.inf)


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


def write(summary: dict[str, Any], folder: Path, console: Any) -> None:
    """Write biases.json and biases.md, and print the table."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [columns(row) for row in summary["entries"]]
    (folder / "biases.json").write_text(json.dumps(summary, indent=2))
    (folder / "biases.md").write_text(f"{tables.grid_markdown(rows)}\n\n{conditions(summary)}\n")
    console.print(tables.grid(rows))
    console.print(conditions(summary))
    console.print(f"Files: {folder}")
