"""The `benchmark probes` and `benchmark iterate` studies: cost by the number of products at one point.

Probes are pushed at once; of what is iterated, each product's direction depends on the product before.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from keras import ops
from matplotlib.figure import Figure
from rich.console import Console

from experiments.benchmark import jvp_study, products_study, study
from experiments.benchmark.competitors import FEW_OUTPUTS, Push
from experiments.benchmark.config import IterateConfig, ProbesConfig
from experiments.benchmark.directions import following
from experiments.benchmark.products import directions
from experiments.benchmark.products_study import Subject, Task
from experiments.benchmark.study import Benchmark
from experiments.errors import ExperimentError
from experiments.verify import architectures

Comparison = dict[str, Any]


def measured(
    comparisons: Callable[[Subject, Any], Iterator[Comparison]], config: Any, console: Console
) -> dict[str, Any]:
    """A row a number of products, and the forward passes that one more product takes, by entry."""
    (architecture,) = architectures.named("architecture", [config.architecture])
    if not config.counts:
        raise ExperimentError("counts: expected a number or more. Received: none.")
    console.print(f"making {architecture.name} and what is right of it, in float64 and without jit")
    subject = products_study.subject(architecture, config)
    rows = []
    for count, comparison in zip(sorted(set(config.counts)), comparisons(subject, config), strict=True):
        console.print(f"measured {count} product(s)")
        rows.append({"count": count, **comparison})
    return {"input_shape": list(subject.x.shape[1:]), "further_product": further_products(rows), "rows": rows}


def measured_one_by_one(config: IterateConfig, console: Console) -> dict[str, Any]:
    """The same of products one after the other, of which one alone would say nothing."""
    if len(set(config.counts)) < 2:
        raise ExperimentError(f"counts: expected two different numbers of products or more. Received: {config.counts}.")
    return measured(iterate_comparisons, config, console)


def probe_comparisons(subject: Subject, config: ProbesConfig) -> Iterator[Comparison]:
    """So many directions in one call; of the largest number, the first ones are those of the smaller numbers."""
    largest = jvp_study.along_input(subject, max(config.counts), config)
    outputs, products = products_study.by_autodiff(subject.exact, subject, largest)
    for count in sorted(set(config.counts)):
        task = Task((), [largest.tangents[0][:count]], largest.use, largest.use_eagerly)
        yield products_study.comparison(subject, task, config, [outputs, products[:count]])


def iterate_comparisons(subject: Subject, config: IterateConfig) -> Iterator[Comparison]:
    """So many products one after the other."""
    tangents = directions([subject.x.shape], 1, config.seed)
    for count in sorted(set(config.counts)):
        use = functools.partial(iterated, count=count)
        task = Task((), tangents, use, functools.partial(use, loop=python_loop))
        yield products_study.comparison(subject, task, config)


def iterated(push: Push, tangents: Sequence, count: int, loop: Callable = ops.fori_loop) -> tuple[Any, Any]:
    """`f(x)` and the last of so many products."""
    outputs, image = push(tangents)

    def step(_, state):
        vector, image = state
        vector = following(vector[0], image[0])[None]
        return vector, push([vector])[1]

    return outputs, loop(1, count, step, (tangents[0], image))[1] if count > 1 else image


def python_loop(lower: int, upper: int, body: Callable, state: Any) -> Any:
    """As `keras.ops.fori_loop`, which is compiled on JAX."""
    for number in range(lower, upper):
        state = body(number, state)
    return state


def further_products(rows: list[Comparison]) -> dict[str, float]:
    """Forward passes that one more product takes, by entry: the slope of the ratios over the counts."""
    slopes = {}
    for name, timed in by_entry(rows).items():
        if len(timed) > 1:
            slope, _ = np.polyfit(list(timed), [entry["ratio"] for entry in timed.values()], 1)
            slopes[name] = float(slope)
    return slopes


def by_entry(rows: list[Comparison]) -> dict[str, dict[int, dict[str, Any]]]:
    """What has a time, by the name of the entry and the number of products."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for row in rows:
        for entry in row["entries"]:
            if entry["ratio"] is not None:
                found.setdefault(entry["name"], {})[row["count"]] = entry
    return found


WHAT = {
    "probes": (
        "products with the Jacobian along the input at one point, all in one call, and `f(x)`",
        "number of directions",
    ),
    "iterate": (
        "products with the Jacobian along the input at one point, each of which waits for the one before, in one call "
        "with `f(x)`, by `keras.ops.fori_loop`",
        "number of products, one after the other",
    ),
}
"""What is counted, in words: in the conditions, and in the figure."""


def table(summary: dict[str, Any]) -> list[dict[str, str]]:
    """A row a count, and one of the cost of a further product."""
    names = jvp_study.labels(summary["rows"])
    rows = [{"products": str(row["count"]), **jvp_study.figures(row, names)} for row in summary["rows"]]
    slopes = summary["further_product"]
    cells = {label: f"{slopes[name]:.2f}" if name in slopes else "–" for name, label in names.items()}
    return [*rows, {"products": "one more", "forward ms": "", **cells, "speed-up": ""}]


def caption(name: str, summary: dict[str, Any]) -> str:
    """What the figures mean and where they are from."""
    settings = summary["settings"]
    shape = "x".join(map(str, summary["input_shape"]))
    return (
        f"{settings['architecture']} on inputs of {shape}, {jvp_study.in_common(settings)}: {WHAT[name][0]}. Ratios to "
        "the model's forward pass of the same round; of jvpreg and of the best alternative that is right, median and "
        f"quartiles of {settings['rounds']} rounds. Speed-up: the best alternative's time over jvpreg's, in the same "
        "round. One more: what a further product takes in forward passes, the slope of a line through the medians by "
        f"least squares. A batch Jacobian is tried up to {FEW_OUTPUTS} outputs. "
        f"{jvp_study.ARITHMETIC + ' ' if name == 'probes' else ''}{jvp_study.how_checked(settings)} "
        f"{study.ran_on(summary)}"
    )


def notes(summary: dict[str, Any]) -> list[str]:
    """Why figures are missing, a paragraph each."""
    return [text for row in summary["rows"] for text in study.messages(row["entries"], row["count"])]


def figure(name: str, summary: dict[str, Any]) -> Figure:
    """The ratios over the counts, with their quartiles."""
    drawing = Figure(figsize=(6.5, 4.2), layout="constrained")
    axes = drawing.subplots()
    found = by_entry(summary["rows"])
    for entry_name, label in jvp_study.labels(summary["rows"]).items():
        if timed := found.get(entry_name):
            medians = [entry["ratio"] for entry in timed.values()]
            lower, upper = zip(*(entry["ratio_quartiles"] for entry in timed.values()), strict=True)
            (line,) = axes.plot(list(timed), medians, marker="o", markersize=4, label=label, zorder=3)
            axes.fill_between(list(timed), lower, upper, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel(WHAT[name][1])
    axes.set_ylabel("forward passes (median and quartiles)")
    study.title(axes, summary, f"{summary['settings']['architecture']}, ")
    axes.legend(fontsize=9)
    return drawing


def benchmark(name: str, measure: Callable[[Any, Console], dict[str, Any]]) -> Benchmark:
    """Of either study."""
    return Benchmark(
        name,
        measure,
        lambda summary: [table(summary), caption(name, summary), *notes(summary)],
        {name: functools.partial(figure, name)},
        columns=200,
    )


PROBES = benchmark("probes", functools.partial(measured, probe_comparisons))
ITERATE = benchmark("iterate", measured_one_by_one)
