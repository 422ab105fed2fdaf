"""Benchmarks of training steps, of which each is checked by its gradient before it is timed: what they share."""

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops
from rich.console import Console

from experiments.benchmark import entries, measure, study
from experiments.benchmark.config import BenchmarkConfig
from experiments.benchmark.study import Benchmark, one_digit
from experiments.study import one_table

EXAMPLES = 4
# In float64 and small, so that hardly any ReLU changes sides on the way.
DIFFERENCE = 1e-8


@dataclass(frozen=True)
class Check:
    """Relative errors of one step's penalty, and of its gradient by the weights."""

    penalty_error: float
    gradient_error: float

    @property
    def error(self) -> float:
        """The worse of the two; infinite where one is not a number."""
        worst = max(self.penalty_error, self.gradient_error)
        return math.inf if math.isnan(self.penalty_error + self.gradient_error) else worst


def check_gradient(
    model: keras.Model,
    x: np.ndarray,
    labels: np.ndarray,
    exact: Callable[[list[np.ndarray]], Any],
    interval: int = 1,
    fraction: float = 1.0,
) -> Check:
    """Take steps of a model that was compiled with `entries.penalty_alone` until one has a penalty, and compare.

    The gradient is checked along itself: there the slope of the penalty is its norm, if it is right. The examples that
    a fraction of the batch held are taken to be those whose mean comes closest.

    Args:
        model: whose `base` is trained.
        x: its inputs.
        labels: the labels.
        exact: the penalty in float64, or that of each example, at the weights moved by so much.
        interval: steps from one penalty to the next.
        fraction: the part of a batch that the penalty sees.
    """
    weights = [ops.convert_to_numpy(variable) for variable in model.base.trainable_variables]
    for _ in range(interval):
        logs = model.train_on_batch(x, labels, return_dict=True)
        # On JAX, reading `trainable_variables` of the model that was trained brings them up to date.
        moved = [ops.convert_to_numpy(variable) for variable in model.trainable_variables]
        gradient = [(np.float64(old) - new) / interval for old, new in zip(weights, moved, strict=True)]
        if any(np.any(part) for part in gradient):
            break
    # The compiled loss is zero, and what a step has of penalty counts as often as the interval is long.
    penalty = float(logs["loss"]) / interval
    norm = math.sqrt(sum(float(np.sum(part**2)) for part in gradient))
    here, ahead, behind = (
        np.atleast_1d(exact([distance / (norm or 1.0) * part for part in gradient]))
        for distance in (0.0, DIFFERENCE, -DIFFERENCE)
    )
    parts = itertools.combinations(range(len(here)), math.ceil(fraction * len(here)))
    part = list(min(parts, key=lambda part: abs(np.mean(here[list(part)]) - penalty)))
    expected = float(np.mean(here[part]))
    slope = float(np.mean(ahead[part]) - np.mean(behind[part])) / (2 * DIFFERENCE)
    return Check(
        penalty_error=abs(penalty - expected) / expected,
        gradient_error=abs(norm - slope) / abs(slope) if slope else math.inf,
    )


def measured(
    labels: Mapping[str, str],
    check: Callable[[str], Check],
    step: Callable[[str], measure.Step],
    config: BenchmarkConfig,
    console: Console,
    steps: Mapping[str, int] | None = None,
    peak: Callable[[str], int | MemoryError] | None = None,
) -> list[dict[str, Any]]:
    """Check entries, and measure those that are right in units of the one named "plain", which has nothing to check.

    Args:
        labels: of the entries, by name.
        check: from the name of an entry, whether it is right.
        step: from the same, the step that is timed.
        config: the number of rounds, and the error that is allowed.
        console: tells how far it is.
        steps: how many steps of an entry are one turn; by default 1.
        peak: from a name, what its steps add to the memory of a process of their own; by default not measured.

    Returns:
        What the JSON file says of each entry; what was not measured is null.
    """
    checks: dict[str, Check] = {}
    for name, label in labels.items():
        if name != "plain":
            console.print(f"checking {label}")
            checks[name] = check(name)
    right = [name for name in labels if name not in checks or study.is_right(checks[name].error, config)]
    peaks: dict[str, int | MemoryError] = {}
    if peak is not None:
        for name in right:
            console.print(f"measuring the memory of {labels[name]}")
            peaks[name] = peak(name)
    # What fells a process of its own would fell this one.
    able = [name for name in right if not isinstance(peaks.get(name), MemoryError)]
    console.print(f"timing {config.rounds} rounds of {len(able)} entries")
    times = measure.in_turn({name: functools.partial(step, name) for name in able}, "plain", config, steps)
    return [
        {
            "name": name,
            "label": label,
            "penalty_error": study.finite(checks[name].penalty_error) if name in checks else None,
            "gradient_error": study.finite(checks[name].gradient_error) if name in checks else None,
            **measure.outcome(name in right, times.get(name), peaks.get(name)),
            "peak_memory_bytes": peaks[name] if isinstance(peaks.get(name), int) else None,
        }
        for name, label in labels.items()
    ]


def columns(row: dict[str, Any]) -> dict[str, str]:
    """One entry's figures, by the heading of their column."""
    return {
        "step": row["label"],
        "error": one_digit(row["penalty_error"]),
        "of gradient": one_digit(row["gradient_error"]),
        "× plain step": study.ratio(row),
        **study.times(row),
    }


def benchmark(
    name: str,
    labels: Mapping[str, str],
    check: Callable[[str, Any], Check],
    model: Callable[[str, Any], keras.Model],
    caption: Callable[[dict[str, Any]], str],
) -> Benchmark:
    """A benchmark of the training steps of compiled models.

    Args:
        name: of the benchmark.
        labels: of the entries, by name.
        check: from an entry's name and the configuration, whether it is right.
        model: from the same, the model whose training step is timed.
        caption: what the figures mean.
    """

    def measure_steps(config: Any, console: Console) -> dict[str, Any]:
        def step(entry: str) -> measure.Step:
            return entries.batch_step(model(entry, config), config)

        return {"entries": measured(labels, lambda entry: check(entry, config), step, config, console)}

    return Benchmark(name, measure_steps, one_table("entries", columns, caption), backends=study.TWO_BACKENDS)
