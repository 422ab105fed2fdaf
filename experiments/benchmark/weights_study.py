"""The `benchmark weights` study: what a product along a kernel costs, by the kernel's depth."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from experiments.benchmark import competitors, entries, measure, products, study
from experiments.benchmark.config import WeightsConfig
from experiments.benchmark.reference import Reference
from experiments.benchmark.study import Benchmark
from experiments.study import one_table

EXAMPLES = 4  # at which products are checked

STARTS: dict[str, competitors.Start | None] = {"forward": None, "primal": competitors.linearize_alone}
"""Of the entries without a product."""


@dataclass(frozen=True)
class Entry:
    """One call that is timed: `f(x)`, and but for the first two a product with it.

    Attributes:
        name: in the files; of a kernel, that of its layer.
        label: in the table.
        weights: places of the weights to push along, among the model's variables; of none: the input, if at all.
        expected: the cost in forward passes, if multiplications by kernels were all that costs and every layer
            followed from the one before it.
    """

    name: str
    label: str
    weights: tuple[int, ...]
    expected: float


def measured(config: WeightsConfig, console: Console) -> dict[str, Any]:
    """A row a product."""
    model = entries.plain_model(config)
    chosen = model_entries(model, config)
    console.print(f"checking {len(chosen)} entries")
    errors = check(model, chosen, config)
    right = {entry.name: entry for entry in chosen if study.is_right(errors[entry.name], config)}
    console.print(f"timing {config.rounds} rounds of {len(right)} entries")
    makers = {name: functools.partial(step, model, entry, config) for name, entry in right.items()}
    times = measure.in_turn(makers, "forward", config)
    rows = [
        {
            "name": entry.name,
            "label": entry.label,
            "expected_ratio": entry.expected,
            "error": study.finite(errors[entry.name]),
            **measure.outcome(entry.name in right, times.get(entry.name)),
        }
        for entry in chosen
    ]
    return {"entries": rows}


def model_entries(model: keras.Model, config: WeightsConfig) -> list[Entry]:
    """`f(x)` by the model and by jvpreg, and the products: along the input, each kernel by depth, and all weights."""
    places = {id(variable): place for place, variable in enumerate(model.variables)}
    owners = [layer for layer in model.layers if getattr(layer, "kernel", None) is not None]
    counts = [multiplications(layer) for layer in owners]
    total, probes = sum(counts), config.num_probes
    kernels = [
        Entry(layer.name, f"{layer.name} kernel", (places[id(layer.kernel)],), 1 + probes * sum(counts[depth:]) / total)
        for depth, layer in enumerate(owners)
    ]
    # Along all weights each layer multiplies twice, by its tangent and by its kernel, but the first one only once.
    everything = 1 + probes * (2 - counts[0] / total)
    return [
        Entry("forward", "forward pass", (), 1.0),
        # What freezing the layers costs by itself: of the residuals, no more is computed than what is used.
        Entry("primal", "linearize alone", (), 1.0),
        Entry("input", "input", (), 1.0 + probes),
        *kernels,
        Entry("all", "all weights", tuple(places[id(weight)] for weight in model.trainable_variables), everything),
    ]


def multiplications(layer: keras.Layer) -> int:
    """Of a dense layer or a convolution, for one example."""
    return math.prod(layer.kernel.shape) * math.prod(layer.output.shape[1:-1])


def check(model: keras.Model, chosen: Sequence[Entry], config: WeightsConfig) -> dict[str, float]:
    """Relative errors of what the entries compute, compiled as they are timed, by autodiff in float64 without jit."""
    x = entries.images(config, EXAMPLES).images()
    exact = Reference(model, "moving", x).model
    errors = {}
    for entry in chosen:
        vectors = directions(model, entry, x, config)
        expected = products.by_autodiff(exact, [x], vectors, entry.weights)
        errors[entry.name] = products.worst(call(model, entry, config, x, vectors)(), expected)
    return errors


def directions(model: keras.Model, entry: Entry, x: np.ndarray, config: WeightsConfig) -> list[np.ndarray]:
    """Random directions `(P, …)` of each weight of an entry; of none, of the input."""
    shapes = [tuple(model.variables[place].shape) for place in entry.weights]
    return products.directions(shapes or [x.shape], config.num_probes, config.seed)


def step(model: keras.Model, entry: Entry, config: WeightsConfig) -> measure.Step:
    """The call that is timed."""
    x = entries.images(config, config.batch_size).images()
    return call(model, entry, config, x, directions(model, entry, x, config))


def call(
    model: keras.Model, entry: Entry, config: WeightsConfig, x: np.ndarray, vectors: Sequence[np.ndarray]
) -> Callable[[], tuple]:
    """`f(x)` and the product, in one compiled call."""
    start = STARTS.get(entry.name, competitors.linearize)
    return products.call(model, start, [x], vectors, config.jit_compile, weights=entry.weights)


def columns(row: dict[str, Any]) -> dict[str, str]:
    """One entry's figures, by the heading of their column."""
    pushed = row["ratio"] is not None and row["name"] not in STARTS
    return {
        "along": row["label"],
        "error": study.one_digit(row["error"]),
        "× forward pass": study.ratio(row),
        "of it tangent": f"{row['ratio'] - 1:.2f}" if pushed else "",
        "by multiplications": f"{row['expected_ratio']:.2f}",
        **study.times(row),
    }


def caption(summary: dict[str, Any]) -> str:
    """What the figures mean and where they are from."""
    settings = summary["settings"]
    return (
        f"{study.subject(settings)}, inference mode, {settings['num_probes']} direction(s) of each. One compiled call "
        "computes `f(x)` and the product (`linearize(...).jvp(weights=...)`); the forward pass is that of the plain "
        f"model. Ratios to the forward pass of the same round, median and quartiles of {settings['rounds']} rounds; of "
        "it tangent: what is over 1, which is the tangent pass, and what freezing the layers costs beside it "
        "(linearize alone: its `f(x)`, without a product). By multiplications: the ratio if multiplications by kernels "
        "were all that costs, those of a tangent pass being the ones from its layer on. Errors are relative, of the "
        "compiled product in float32 against autodiff in "
        f"float64 that is not jitted; above {settings['tolerance']:g} a product is wrong and is not timed. First s: "
        f"seconds of the first call, compilation included. {study.ran_on(summary)}"
    )


def figure(summary: dict[str, Any]) -> Figure:
    """The cost along each kernel over its depth, beside those along the input and all weights."""
    whole = ("forward", "primal", "input", "all")
    kernels = [row for row in summary["entries"] if row["name"] not in whole]
    timed = [(depth, row) for depth, row in enumerate(kernels) if row["ratio"] is not None]
    drawing = Figure(figsize=(8.0, 3.6), layout="constrained")
    axes = drawing.subplots()
    axes.errorbar(
        [depth for depth, _ in timed],
        [row["ratio"] for _, row in timed],
        yerr=study.spread([row for _, row in timed]),
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
    study.title(axes, summary)
    drawing.legend(loc="outside right upper", fontsize=9)
    return drawing


STUDY = Benchmark(
    "weights", measured, one_table("entries", columns, caption), {"weights": figure}, backends=study.TWO_BACKENDS
)
