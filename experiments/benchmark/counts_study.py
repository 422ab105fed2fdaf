"""The `benchmark probes` and `benchmark iterate` studies: cost by the number of products at one point.

Probes are pushed at once; of what is iterated, each product's direction depends on the product before.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from keras import ops

from experiments import tables
from experiments.benchmark import counts_report, jvp_study, products_study, study
from experiments.benchmark.competitors import Push
from experiments.benchmark.config import IterateConfig, ProbesConfig
from experiments.benchmark.directions import following
from experiments.benchmark.products import directions
from experiments.benchmark.products_study import Subject, Task
from experiments.errors import ExperimentError
from experiments.verify import architectures

Comparison = dict[str, Any]


def probes(config: ProbesConfig) -> dict[str, Any]:
    """Measure several products at once, and write and print what came out.

    Args:
        config: see `ProbesConfig`.

    Returns:
        What `probes.json` holds: the settings, the machine, and the forward passes that one more product
        takes, by entry, and a row a number of products.

    Raises:
        ExperimentError: where the name of the architecture is not known, or there is no count.
    """
    return run("probes", config, probe_comparisons)


def iterate(config: IterateConfig) -> dict[str, Any]:
    """Measure products one after the other, and write and print what came out; as `probes`, in `iterate.json`."""
    if len(set(config.counts)) < 2:
        raise ExperimentError(f"counts: expected two different numbers of products or more. Received: {config.counts}.")
    return run("iterate", config, iterate_comparisons)


def run(
    name: str,
    config: Any,
    comparisons: Callable[[Subject, Any], Iterator[Comparison]],
) -> dict[str, Any]:
    """Measure a study: one comparison for each count."""
    (architecture,) = architectures.named("architecture", [config.architecture])
    if not config.counts:
        raise ExperimentError("counts: expected a number or more. Received: none.")
    console = tables.wide_console(200)
    console.print(f"making {architecture.name} and what is right of it, in float64 and without jit")
    subject = products_study.subject(architecture, config)
    rows = []
    for count, comparison in zip(sorted(set(config.counts)), comparisons(subject, config), strict=True):
        console.print(f"measured {count} product(s)")
        rows.append({"count": count, **comparison})
    summary = {
        "study": f"benchmark {name}",
        **study.conditions(config),
        "input_shape": list(subject.x.shape[1:]),
        "further_product": further_products(rows),
        "rows": rows,
    }
    counts_report.write(name, summary, study.folder(name, config), console)
    return summary


def probe_comparisons(subject: Subject, config: ProbesConfig) -> Iterator[Comparison]:
    """So many directions in one call; of the largest number, the first ones are those of the smaller numbers."""
    largest = jvp_study.along_input(subject, max(config.counts), config)
    outputs, products = products_study.exact(subject, largest)
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
    names = {entry["name"]: None for row in rows for entry in row["entries"]}
    slopes = {}
    for name in names:
        timed = [
            (row["count"], entry["ratio"])
            for row in rows
            for entry in row["entries"]
            if entry["name"] == name and entry["ratio"] is not None
        ]
        if len(timed) > 1:
            slope, _ = np.polyfit([count for count, _ in timed], [ratio for _, ratio in timed], 1)
            slopes[name] = float(slope)
    return slopes
