"""Whether an entry trains on what it claims to: its penalty and its gradient against a reference."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops

from experiments.benchmark import entries
from experiments.benchmark.config import StepConfig
from experiments.benchmark.entries import Entry
from experiments.benchmark.reference import Reference

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


class Checker:
    """Checks the steps of `benchmark step`, in known directions, against references that it keeps.

    Args:
        config: which model; how it is compiled.
    """

    def __init__(self, config: StepConfig):
        self.config = config
        self.batch = entries.images(config, EXAMPLES)
        self.references: dict[str, Reference] = {}

    def check(self, entry: Entry) -> Check | None:
        """The errors; None for the plain step, which has no penalty."""
        side = entry.side
        if side is None:
            return None
        reference = self._reference(entry)
        return check_gradient(
            entries.checked_model(entry, self.config),
            self.batch.images(),
            self.batch.labels,
            lambda moved: reference.penalties(side, entry.num_probes, moved),
            entry.interval,
            entry.fraction,
        )

    def _reference(self, entry: Entry) -> Reference:
        derivative = entry.derivative(self.config)
        assert derivative != "none"
        if derivative not in self.references:
            self.references[derivative] = Reference(entries.base_model(self.config), derivative, self.batch.images())
        return self.references[derivative]
