"""What the benchmarks share: when an entry is right, what a file says of the machine, and cells of the tables."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras

from experiments.benchmark.config import TimingConfig
from experiments.errors import ExperimentError
from experiments.study import Study, Summary


@dataclass(frozen=True)
class Benchmark(Study):
    """A study of costs, whose files say how calls were compiled.

    Attributes:
        backends: on which it runs.
        variant: ends the name of the folder, if the configuration names none.
    """

    backends: tuple[str, ...] = ("tensorflow", "jax", "torch")
    variant: Callable[[Any], str] = lambda config: ""

    def run(self, config: Any) -> Summary:
        """As `Study.run`; an ExperimentError also on a backend that the benchmark does not know."""
        if keras.backend.backend() not in self.backends:
            message = f"benchmark {self.name} runs on TensorFlow and JAX: set KERAS_BACKEND to one of the two."
            raise ExperimentError(message)
        return super().run(config)

    def conditions(self, config: Any) -> Summary:
        """What the summary says beside the figures: also how calls were compiled, and the memory."""
        found = super().conditions(config)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return {
            "study": f"benchmark {self.name}",
            "mode": mode(config),
            "settings": found["settings"],
            "machine": {**found["machine"], "memory_gigabytes": round(memory / 1e9, 1)},
        }

    def folder(self, config: Any) -> Path:
        """The folder that is named, or one after the benchmark, the backend and the mode."""
        words = f"{self.name}-{keras.backend.backend()}-{mode(config)}{self.variant(config)}"
        return Path(config.folder or f"runs/benchmark/{words}")


TWO_BACKENDS = ("tensorflow", "jax")
"""Of benchmarks with entries that are written by hand for each."""


def mode(config: TimingConfig) -> str:
    """How steps are compiled, in a word."""
    compiled, other = {"tensorflow": ("xla", "graph"), "jax": ("jit", "eager"), "torch": ("compile", "eager")}[
        keras.backend.backend()
    ]
    return compiled if config.jit_compile else other


def chosen_names(only: Sequence[str] | None, names: Sequence[str]) -> list[str]:
    """The names that the key `only` lists, by default all.

    Raises:
        ExperimentError: there is no such name.
    """
    for name in only or []:
        if name not in names:
            raise ExperimentError(f"only: there is no entry {name!r}. Expected names among {', '.join(names)}.")
    return list(names if only is None else only)


def is_right(error: float, config: TimingConfig) -> bool:
    """Whether what has this error is to be timed; not if the error is not a number."""
    return error <= config.tolerance


def finite(error: float) -> float | str:
    """The error as JSON has it, which has no infinity."""
    return error if math.isfinite(error) else "infinite"


def subject(settings: dict[str, Any]) -> str:
    """What is run, and on what."""
    size = settings["image_size"]
    return (
        f"Model {settings['model']['name']} of width {settings['model']['width']}, batches of "
        f"{settings['batch_size']} images of {size}x{size}x3"
    )


def ran_on(summary: Summary) -> str:
    """What it ran on."""
    machine = summary["machine"]
    return (
        f"{machine['backend']} ({summary['mode']}), Keras {machine['keras']}, "
        f"{machine['cores']} cores of {machine['processor']}."
    )


def title(axes: Any, summary: Summary, before: str = "", **style: Any) -> None:
    """Write what it ran on above a picture."""
    axes.set_title(f"{before}{summary['machine']['backend']}, {summary['mode']}", loc="left", fontsize=10, **style)


def name_bars(axes: Any, names: Sequence[str], unit: str, summary: Summary, **style: Any) -> None:
    """Write the names of horizontal bars beside them, the first one at the top, and what they say below and above."""
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set_xlabel(unit)
    title(axes, summary, **style)


def spread(rows: Sequence[dict[str, Any]]) -> list[list[float]]:
    """Distances of the ratios from their first and third quartiles, as matplotlib takes error bars."""
    return [[abs(row["ratio"] - row["ratio_quartiles"][side]) for row in rows] for side in (0, 1)]


def one_digit(error: float | str | None) -> str:
    """A relative error, to one digit."""
    return f"{error:.0e}" if isinstance(error, float) else error or ""


def with_quartiles(median: float, quartiles: Sequence[float]) -> str:
    """A median with the first and the third quartile."""
    return f"{median:.2f} ({'-'.join(f'{quartile:.2f}' for quartile in quartiles)})"


def messages(entries: Sequence[dict[str, Any]], of: str) -> list[str]:
    """Why entries have no figures, a paragraph each, which begins with what they are of."""
    return [f"{of}, {entry['label']}: {entry['message'].rstrip('.')}." for entry in entries if entry["message"]]


def ratio(row: dict[str, Any]) -> str:
    """How many units an entry takes; or why that is not known."""
    return row["status"] if row["ratio"] is None else with_quartiles(row["ratio"], row["ratio_quartiles"])


def times(row: dict[str, Any]) -> dict[str, str]:
    """Milliseconds of an entry and seconds of its first call, by the heading of their column."""
    timed = row["ratio"] is not None
    return {
        "ms": f"{1000 * row['seconds']:.1f}" if timed else "",
        "first s": f"{row['first_call_seconds']:.1f}" if timed else "",
    }
