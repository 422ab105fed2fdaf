"""The `benchmark weights` study: what a product along a kernel costs, by the kernel's depth."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from experiments import tables
from experiments.benchmark import competitors, entries, measure, products, study, weights_report
from experiments.benchmark.config import WeightsConfig
from experiments.benchmark.reference import Reference

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


def run(config: WeightsConfig) -> dict[str, Any]:
    """Measure the products, and write and print what came out.

    Args:
        config: see `WeightsConfig`.

    Returns:
        What `weights.json` holds: the settings, the machine, and a row a product.

    Raises:
        ExperimentError: where the backend is not known.
    """
    study.check_backend("weights")
    console = tables.wide_console()
    model = entries.plain_model(config)
    chosen = model_entries(model, config)
    console.print(f"checking {len(chosen)} entries")
    errors = check(model, chosen, config)
    right = [entry for entry in chosen if is_right(errors[entry.name], config)]
    console.print(f"timing {config.rounds} rounds of {len(right)} entries")
    makers = {entry.name: functools.partial(step, model, entry, config) for entry in right}
    times = measure.in_turn(makers, "forward", config)
    summary = {
        "study": "benchmark weights",
        **study.conditions(config),
        "entries": [
            {
                "name": entry.name,
                "label": entry.label,
                "expected_ratio": entry.expected,
                "error": study.finite(errors[entry.name]),
                **measure.outcome(is_right(errors[entry.name], config), times.get(entry.name)),
            }
            for entry in chosen
        ],
    }
    weights_report.write(summary, study.folder("weights", config), console)
    return summary


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
        expected = products.exact(exact, [x], vectors, entry.weights)
        errors[entry.name] = products.worst(call(model, entry, config, x, vectors)(), expected)
    return errors


def is_right(relative_error: float, config: WeightsConfig) -> bool:
    """Whether an entry is to be timed; not if its error is not a number."""
    return relative_error <= config.tolerance


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
