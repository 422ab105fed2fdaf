"""The `benchmark jvp` study: what one Jacobian-vector product costs on whole architectures, beside its alternatives."""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from experiments import processes
from experiments.benchmark import competitors, products_study, study
from experiments.benchmark.competitors import FEW_OUTPUTS, FORWARD, JVPREG
from experiments.benchmark.config import JvpConfig
from experiments.benchmark.products import directions, once
from experiments.benchmark.products_study import Task
from experiments.benchmark.study import Benchmark
from experiments.cells import Cell, work_off
from experiments.config import as_plain_dict
from experiments.study import Rows
from experiments.verify import architectures
from experiments.verify.architectures import Architecture
from experiments.verify.measure import middle_kernel

NOT_COMPARED = ("folder", "only", "time_limit")
"""Keys on which what is measured of an architecture does not depend."""

COLORS = {"input": "C0", "weight": "C1"}
ARITHMETIC = (
    "(1+P)·B examples: the model's forward pass on so large a batch, which is the arithmetic of `f(x)` and P products."
)


def measured(config: JvpConfig, console: Console) -> dict[str, Any]:
    """A row an architecture, and the means of the speed-ups.

    A row is kept in a file of its own, and an architecture is not measured again where there is one.
    """
    chosen = chosen_architectures(config)
    names = [architecture.name for architecture in chosen]
    cells_folder = STUDY.folder(config) / "cells"
    settings = as_plain_dict(config, without=NOT_COMPARED)
    listed = [
        Cell(cells_folder / f"{architecture.name}.json", settings, functools.partial(row, architecture, config))
        for architecture in chosen
    ]
    results = work_off(listed, lambda place, result: console.print(f"measured {names[place]}"))
    rows = [{"name": name, **found} for name, found in zip(names, results, strict=True)]
    return {"rows": rows, "geometric_means": means(rows, config.along)}


def chosen_architectures(config: JvpConfig) -> list[Architecture]:
    """What `only` names, or those of the paper."""
    if config.only is not None:
        return architectures.named("only", config.only)
    return [architecture for architecture in architectures.ARCHITECTURES if architecture.paper]


def row(architecture: Architecture, config: JvpConfig) -> dict[str, Any]:
    """What could be measured of an architecture within the time limit; `failure` says why the rest was not."""
    return processes.row(parts, (architecture, config), config.time_limit)


def parts(architecture: Architecture, config: JvpConfig) -> Iterator[dict[str, Any]]:
    """In a process of its own: parts of a row, so that what is there is kept if the rest takes too long."""
    subject = products_study.subject(architecture, config)
    yield {
        "input_shape": list(subject.x.shape[1:]),
        "output_shape": list(subject.model.output_shape[1:]),
        "parameters": subject.model.count_params(),
    }
    for along in dict.fromkeys(config.along):
        task = along_input(subject, config.num_probes, config) if along == "input" else along_weight(subject, config)
        yield {along: products_study.comparison(subject, task, config)}


def along_input(subject: products_study.Subject, num_probes: int, config: products_study.ProductsConfig) -> Task:
    """Products along the input."""
    return Task((), directions([subject.x.shape], num_probes, config.seed), once, once)


def along_weight(subject: products_study.Subject, config: JvpConfig) -> Task:
    """Products along the kernel in the middle of the model."""
    kernel = middle_kernel(subject.model.trainable_variables)
    place = next(place for place, variable in enumerate(subject.model.variables) if variable is kernel)
    return Task((place,), directions([tuple(kernel.shape)], config.num_probes, config.seed), once, once)


def table(summary: dict[str, Any]) -> list[dict[str, str]]:
    """A row an architecture and what is pushed along, and one for each mean."""
    measured = [
        (row, along, row[along]) for along in summary["settings"]["along"] for row in summary["rows"] if along in row
    ]
    names = labels([found for _, _, found in measured])
    rows = [{"model": row["name"], "along": along, **figures(found, names)} for row, along, found in measured]
    empty = dict.fromkeys(["forward ms", *names.values()], "")
    for along, mean in means(summary["rows"], summary["settings"]["along"]).items():
        rows.append({"model": "geometric mean", "along": along, **empty, "speed-up": f"{mean:.2f}"})
    for row in summary["rows"]:
        if "failure" in row:
            rows.append({"model": row["name"], "along": "", **empty, "speed-up": "incomplete"})
    return rows


def labels(comparisons: list[dict[str, Any]]) -> dict[str, str]:
    """Of the entries that are there, by name, in the order of the competitors; without the forward pass."""
    there = {entry["name"] for found in comparisons for entry in found["entries"]} - {FORWARD.name}
    return {entry.name: entry.label for entry in competitors.entries() if entry.name in there}


def figures(found: dict[str, Any], names: dict[str, str]) -> dict[str, str]:
    """What is said of a comparison in any table: the forward pass, the entries of these names, and the speed-up."""
    entries = {entry["name"]: entry for entry in found["entries"]}
    spread = (JVPREG, found["best_alternative"])
    return {
        "forward ms": milliseconds(entries[FORWARD.name]),
        **{label: cell(entries.get(name), name in spread) for name, label in names.items()},
        "speed-up": speed_up(found),
    }


def speed_up(found: dict[str, Any]) -> str:
    """How much faster jvpreg is than what is right beside it; or that nothing is."""
    if found["speed_up"] is not None:
        lower, median, upper = found["speed_up"]
        return study.with_quartiles(median, [lower, upper])
    right = {entry["name"] for entry in found["entries"] if entry["status"] == "ok"}
    return "no other is right" if JVPREG in right else "–"


def milliseconds(entry: dict[str, Any]) -> str:
    """Of a call."""
    return entry["status"] if entry["seconds"] is None else f"{1000 * entry['seconds']:.3g}"


def cell(entry: dict[str, Any] | None, spread: bool = False) -> str:
    """The ratio of an entry to the forward pass; or why it has none."""
    if entry is None:
        return "–"
    if entry["ratio"] is not None:
        return study.with_quartiles(entry["ratio"], entry["ratio_quartiles"]) if spread else f"{entry['ratio']:.2f}"
    return f"wrong: {study.one_digit(entry['error'])}" if entry["status"] == "wrong" else entry["status"]


def means(rows: list[dict[str, Any]], alongs: Sequence[str]) -> dict[str, float]:
    """The geometric means of the speed-ups, by what is pushed along."""
    found = {}
    for along in alongs:
        medians = [row[along]["speed_up"][1] for row in rows if row.get(along, {}).get("speed_up")]
        if medians:
            found[along] = math.exp(math.fsum(map(math.log, medians)) / len(medians))
    return found


def caption(summary: dict[str, Any]) -> str:
    """What the figures mean and where they are from."""
    settings = summary["settings"]
    size = settings["image_size"]
    sizes = f"images of {size}x{size}" if size else "the smallest images that each takes"
    return (
        f"{settings['num_probes']} product(s) with the Jacobian along the input, or along the kernel in the middle of "
        f"the model, and `f(x)`, in one call; {in_common(settings)}, {sizes}. Ratios to the model's forward pass of "
        "the same round; of jvpreg and of the best alternative that is right, median and quartiles of "
        f"{settings['rounds']} rounds. Speed-up: the best alternative's time over jvpreg's, in the same round; "
        "jvpreg.clone, the literal form of the paper, is no alternative, and is there where all of a model is affine, "
        f"ReLU or max pooling, along the input. A batch Jacobian is tried up to {FEW_OUTPUTS} outputs. "
        f"{ARITHMETIC} {how_checked(settings)} {study.ran_on(summary)}"
    )


def in_common(settings: dict[str, Any]) -> str:
    """What the models have in common."""
    return f"batches of {settings['batch_size']}, 10 classes, inference mode, logits, the random weights of `verify`"


def how_checked(settings: dict[str, Any]) -> str:
    """How entries are checked."""
    return (
        "The errors of `f(x)` and of the products, as they are timed in float32, are relative and against forward "
        f"autodiff in float64 that is not jitted; above {settings['tolerance']:g}, and above twice the error of "
        "autodiff in float32 that is not jitted either, an entry is wrong and is not timed. `keras.ops.jvp` is the "
        "backend's forward mode, and its first alternative here."
    )


def notes(summary: dict[str, Any]) -> list[str]:
    """Why figures are missing, a paragraph each."""
    said = []
    for row in summary["rows"]:
        if "failure" in row:
            said.append(f"{row['name']}: {row['failure'].rstrip('.')}.")
        for along in summary["settings"]["along"]:
            said += study.messages(row.get(along, {}).get("entries", []), f"{row['name']}, {along}")
    return said


def page(summary: dict[str, Any]) -> list[Rows | str]:
    """The table, what it means, and why figures are missing."""
    return [table(summary), caption(summary), *notes(summary)]


def figure(summary: dict[str, Any]) -> Figure:
    """The speed-ups as bars with their quartiles, by architecture."""
    names = [row["name"] for row in summary["rows"]]
    alongs = summary["settings"]["along"]
    height = 0.8 / len(alongs)
    drawing = Figure(figsize=(7.5, 0.25 * len(names) * (1 + len(alongs)) + 1.5), layout="constrained")
    axes = drawing.subplots()
    for number, along in enumerate(alongs):
        for place, row in enumerate(summary["rows"]):
            quartiles = row.get(along, {}).get("speed_up")
            if quartiles is None:
                continue
            lower, median, upper = quartiles
            at = place + (number - (len(alongs) - 1) / 2) * height
            spread = [[median - lower], [upper - median]]
            axes.barh(at, median, xerr=spread, height=0.9 * height, color=COLORS[along], ecolor="0.2", capsize=2)
    for along in alongs:
        axes.barh([0], [0], color=COLORS[along], label=f"along the {along}")
    axes.axvline(1.0, color="0.2", linewidth=1, linestyle="--")
    axes.set_xlim(left=0)
    unit = "time of the best right alternative over jvpreg's (median and quartiles)"
    study.name_bars(axes, names, unit, summary)
    drawing.legend(loc="outside right upper", fontsize=9)
    return drawing


STUDY = Benchmark("jvp", measured, page, {"jvp": figure}, columns=200)
