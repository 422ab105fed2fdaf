"""The time of a training step of each entry, taken in turn, and what counts as running out of memory."""

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

import keras

from experiments.benchmark import entries
from experiments.benchmark.config import StepConfig
from experiments.benchmark.entries import Entry


@dataclass(frozen=True)
class Timing:
    """What a step of an entry takes.

    Attributes:
        first_call_seconds: of the first call, tracing and compilation included.
        seconds: a step, the median over the rounds.
        ratio: to the plain step of the same round, the median.
        ratio_quartiles: the first and the third.
    """

    first_call_seconds: float
    seconds: float
    ratio: float
    ratio_quartiles: tuple[float, float]


def timings(chosen: list[Entry], config: StepConfig) -> dict[str, Timing | MemoryError]:
    """Time the entries in turn, so that a busy machine is busy for all of them.

    Args:
        chosen: the entries, the plain step among them.
        config: the model and the number of rounds.

    Returns:
        By name; a MemoryError for an entry that ran out of memory, which then takes no further turn.
    """
    split = entries.images(config, config.batch_size)
    batch = split.images(), split.labels
    models: dict[str, keras.Model] = {}
    failures: dict[str, MemoryError] = {}
    first_calls: dict[str, float] = {}
    seconds: dict[str, list[float]] = {}
    for entry in chosen:
        try:
            model = entries.training_model(entry, config)
            first_calls[entry.name] = turn(model, batch, steps=1)
            models[entry.name], seconds[entry.name] = model, []
        except Exception as error:
            failures[entry.name] = out_of_memory(error)
    for number in range(config.warmup + config.rounds):
        for entry in chosen:
            if entry.name in models:
                try:
                    taken = turn(models[entry.name], batch, entry.interval) / entry.interval
                except Exception as error:
                    failures[entry.name] = out_of_memory(error)
                    del models[entry.name]
                    continue
                if number >= config.warmup:
                    seconds[entry.name].append(taken)
    return {**failures, **{name: _summary(first_calls[name], seconds, name) for name in models}}


def turn(model: keras.Model, batch: tuple, steps: int) -> float:
    """Seconds that so many training steps take; each returns its loss, and so is waited for."""
    start = time.perf_counter()
    for _ in range(steps):
        model.train_on_batch(*batch)
    return time.perf_counter() - start


def out_of_memory(error: Exception) -> MemoryError:
    """The error as a MemoryError.

    Raises:
        Exception: the error itself, where it is another one.
    """
    message = f"{type(error).__name__}: {error}"
    marks = ("MemoryError", "ResourceExhausted", "RESOURCE_EXHAUSTED", "out of memory")
    if any(mark.lower() in message.lower() for mark in marks):
        return MemoryError(message.splitlines()[0])
    raise error


def _summary(first_call: float, seconds: Mapping[str, list[float]], name: str) -> Timing:
    ratios = [taken / plain for taken, plain in zip(seconds[name], seconds["plain"], strict=True)]
    lower, median, upper = quartiles(ratios)
    return Timing(first_call, statistics.median(seconds[name]), median, (lower, upper))


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """The first quartile, the median and the third quartile of one value or more."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return lower, median, upper
