"""The times of several entries, taken in turn, and what counts as running out of memory."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments import processes
from experiments.benchmark.config import TimingConfig

Step = Callable[[], object]
"""Takes one step, and waits for what it computes."""


@dataclass(frozen=True)
class Timing:
    """What a step of an entry takes.

    Attributes:
        first_call_seconds: of the first call, tracing and compilation included.
        seconds: a step, the median over the rounds.
        ratio: to the unit, an entry, in the same round; the median.
        ratio_quartiles: the first and the third.
    """

    first_call_seconds: float
    seconds: float
    ratio: float
    ratio_quartiles: tuple[float, float]


@dataclass(frozen=True)
class Turns:
    """What an entry took.

    Attributes:
        first_call_seconds: of the first call, tracing and compilation included.
        seconds: of a step, in each round.
    """

    first_call_seconds: float
    seconds: list[float]

    def timing(self, unit: "Turns") -> Timing:
        """The medians, in units of what another entry took in the same rounds."""
        lower, median, upper = self.ratio(unit)
        return Timing(self.first_call_seconds, statistics.median(self.seconds), median, (lower, upper))

    def ratio(self, unit: "Turns") -> tuple[float, float, float]:
        """The quartiles, the median between them, of the ratios to another entry in the same rounds."""
        return quartiles([taken / other for taken, other in zip(self.seconds, unit.seconds, strict=True)])


def in_turn(
    makers: Mapping[str, Callable[[], Step]], unit: str, config: TimingConfig, steps: Mapping[str, int] | None = None
) -> dict[str, Timing | MemoryError]:
    """Time entries in turn, in units of one of them.

    Args:
        makers: return the step of each entry, by name.
        unit: the entry whose step is the unit.
        config: the number of rounds.
        steps: how many steps of an entry are one turn; by default 1.

    Returns:
        By name; a MemoryError for an entry that ran out of memory.
    """
    taken = turns(makers, config, steps)
    measured = timed(taken[unit])
    return {name: entry if isinstance(entry, MemoryError) else entry.timing(measured) for name, entry in taken.items()}


def timed(taken: Turns | MemoryError) -> Turns:
    """What an entry took; if it ran out of memory, this error is raised."""
    if isinstance(taken, MemoryError):
        raise taken
    return taken


def in_units(taken: Turns | MemoryError | None, unit: Turns | MemoryError | None) -> Timing | MemoryError | None:
    """What an entry took, in units of another; None where one of the two was not timed."""
    if isinstance(taken, Turns) and isinstance(unit, Turns):
        return taken.timing(unit)
    return taken if isinstance(taken, MemoryError) else None


def turns(
    makers: Mapping[str, Callable[[], Step]], config: TimingConfig, steps: Mapping[str, int] | None = None
) -> dict[str, Turns | MemoryError]:
    """Run entries in turn, so that a busy machine is busy for all of them.

    Args:
        makers: as in `in_turn`, as the others are.
        config: the number of rounds.
        steps: how many steps of an entry are one turn.

    Returns:
        By name; a MemoryError for an entry that ran out of memory, which then takes no further turn.
    """
    made: dict[str, Step] = {}
    failures: dict[str, MemoryError] = {}
    first_calls: dict[str, float] = {}
    for name, make in makers.items():
        try:
            step = make()
            first_calls[name] = turn(step)
            made[name] = step
        except Exception as error:
            failures[name] = processes.out_of_memory(error)
    seconds, failed = rounds(made, config, steps or {})
    return {**failures, **failed, **{name: Turns(first_calls[name], taken) for name, taken in seconds.items()}}


def rounds(
    made: Mapping[str, Step], config: TimingConfig, steps: Mapping[str, int]
) -> tuple[dict[str, list[float]], dict[str, MemoryError]]:
    """Take the rounds: the seconds of a step in each, by name, and what ran out of memory.

    Args:
        made: the steps, which were taken before.
        config: the number of rounds.
        steps: how many steps of an entry are one turn; 1 where nothing is said.
    """
    able = dict(made)
    seconds: dict[str, list[float]] = {name: [] for name in made}
    failures: dict[str, MemoryError] = {}
    for number in range(config.warmup + config.rounds):
        for name in made:
            if name in able:
                try:
                    taken = turn(able[name], steps.get(name, 1)) / steps.get(name, 1)
                except Exception as error:
                    failures[name] = processes.out_of_memory(error)
                    del able[name]
                    continue
                if number >= config.warmup:
                    seconds[name].append(taken)
    return {name: seconds[name] for name in able}, failures


def turn(step: Step, steps: int = 1) -> float:
    """Seconds that so many steps take."""
    start = time.perf_counter()
    for _ in range(steps):
        step()
    return time.perf_counter() - start


def outcome(right: bool, times: Timing | MemoryError | None, *others: object) -> dict[str, Any]:
    """What the JSON file says of an entry's time, and why there is none; what was not measured is null."""
    failure = next((cause for cause in (times, *others) if isinstance(cause, MemoryError)), None)
    measured = dataclasses.asdict(times) if isinstance(times, Timing) else {}
    return {
        "status": "wrong" if not right else "out of memory" if failure else "ok",
        "message": str(failure) if failure else None,
        **{field.name: measured.get(field.name) for field in dataclasses.fields(Timing)},
    }


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """The first quartile, the median and the third quartile of one value or more."""
    lower, median, upper = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
    return lower, median, upper
