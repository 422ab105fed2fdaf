"""What the studies of `J u` share: entries are checked against float64, and those that are right are timed in turn."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from experiments import processes
from experiments.benchmark import competitors, measure, products, study
from experiments.benchmark.competitors import FEW_OUTPUTS, FORWARD, JVPREG, Entry
from experiments.benchmark.config import ProductsConfig
from experiments.benchmark.literal import NotPiecewiseLinearError
from experiments.benchmark.measure import Turns
from experiments.benchmark.products import Use
from experiments.benchmark.reference import float64
from experiments.verify import weights
from experiments.verify.architectures import Architecture
from experiments.verify.measure import made_again

SHORTEST_TURN = 0.02
"""Seconds; a forward pass that takes less is taken several times a turn, and so is every entry beside it."""


@dataclass(frozen=True)
class Subject:
    """A model with random weights, at random inputs.

    Attributes:
        name: of the architecture.
        model: in float32.
        exact: the same in float64.
        x: `(B, …)`.
    """

    name: str
    model: keras.Model
    exact: keras.Model
    x: np.ndarray


@dataclass(frozen=True)
class Task:
    """What is computed of a subject.

    Attributes:
        weights: places, among the model's variables, of those that are pushed along; of none: the input.
        tangents: `(P, …)`, of each weight or of the input.
        use: see `products.Use`.
        use_eagerly: the same without anything that a backend would compile.
    """

    weights: tuple[int, ...]
    tangents: list[np.ndarray]
    use: Use
    use_eagerly: Use

    @property
    def num_probes(self) -> int:
        """P."""
        return len(self.tangents[0])


def subject(architecture: Architecture, config: ProductsConfig) -> Subject:
    """The architecture with the random weights of `verify`, on images of the size that is asked for."""
    shape = architecture.input_shape
    if config.image_size is not None and len(shape) == 3:
        shape = (config.image_size, config.image_size, shape[-1])
    sized = dataclasses.replace(architecture, input_shape=shape)
    random = np.random.default_rng(config.seed)
    keras.utils.set_random_seed(config.seed)
    model = sized.make(shape)
    weights.draw(model, random)
    with float64():
        exact = made_again(sized, model)
    return Subject(sized.name, model, exact, weights.inputs(model, config.batch_size, random))


def by_autodiff(model: keras.Model, subject: Subject, task: Task) -> list[np.ndarray]:
    """What a task should give, in the precision of the subject's `model` or of its `exact` one."""
    return products.by_autodiff(model, [subject.x], task.tangents, task.weights, task.use_eagerly)


def comparison(
    subject: Subject, task: Task, config: ProductsConfig, expected: Sequence[np.ndarray] | None = None
) -> dict[str, Any]:
    """Check the entries and time those that are right.

    Args:
        subject: the model.
        task: what each entry computes.
        config: how it is compiled, and how often it is timed.
        expected: what it should be, if that is known already.

    Returns:
        What the JSON file says: a row an entry, the error that was allowed, the alternative that is best, and the
        speed-up: how many times longer than jvpreg it takes, in the same round, as the three quartiles.
    """
    if expected is None:
        expected = by_autodiff(subject.exact, subject, task)
    chosen = [entry for entry in competitors.entries() if applies(entry, task, expected[0])]
    steps, firsts, errors, failures = first_calls(lambda entry: call(subject, task, entry, config), chosen, expected)
    allowed = config.tolerance
    if not all(found <= allowed for found in errors.values()):
        # Where rounding moves a mask, no product in float32 could be better.
        allowed = max(allowed, 2 * products.worst(by_autodiff(subject.model, subject, task), expected))
    right = {name: step for name, step in steps.items() if errors[name] <= allowed}
    calls_a_turn = turns(right)
    seconds, out_of_memory = measure.rounds(right, config, dict.fromkeys(right, calls_a_turn))
    rows = []
    for entry in (entry for entry in chosen if entry.name in errors or entry.name in failures):
        taken, cause = seconds.get(entry.name), failures.get(entry.name, out_of_memory.get(entry.name))
        units = seconds.get(FORWARD.name)
        timed = Turns(firsts[entry.name], taken).timing(Turns(firsts[FORWARD.name], units)) if taken and units else None
        found = errors.get(entry.name)
        rows.append(
            {
                "name": entry.name,
                "label": entry.label,
                "error": None if found is None else study.finite(found),
                **outcome(entry.name in right or found is None, timed, cause),
            }
        )
    best, faster = speed_up(chosen, seconds)
    return {
        "entries": rows,
        "num_probes": task.num_probes,
        "allowed_error": allowed,
        "calls_a_turn": calls_a_turn,
        "best_alternative": best,
        "speed_up": faster,
    }


def applies(entry: Entry, task: Task, outputs: np.ndarray) -> bool:
    """Whether an entry is for such a task."""
    conditions = {
        "input": not task.weights,
        "once": task.use is products.once,
        "several": task.num_probes > 1,
        "few outputs": outputs.ndim == 2 and outputs.shape[1] <= FEW_OUTPUTS,
    }
    return all(conditions[name] for name in entry.only)


def first_calls(
    make: Callable[[Entry], Callable[[], tuple]], chosen: Sequence[Entry], expected: Sequence[np.ndarray]
) -> tuple[dict[str, measure.Step], dict[str, float], dict[str, float], dict[str, Exception]]:
    """The calls of the entries, the seconds of each's first one, its error, and what was raised instead; by name."""
    steps: dict[str, measure.Step] = {}
    firsts: dict[str, float] = {}
    errors: dict[str, float] = {}
    failures: dict[str, Exception] = {}
    for entry in chosen:
        try:
            start = time.perf_counter()
            step = make(entry)
            received = step()
            firsts[entry.name] = time.perf_counter() - start
            errors[entry.name] = products.worst(received, expected)
            steps[entry.name] = step
        except NotPiecewiseLinearError:
            continue  # no row of its own, as of what is not for such a task
        except Exception as cause:
            failures[entry.name] = cause
    return steps, firsts, errors, failures


def call(subject: Subject, task: Task, entry: Entry, config: ProductsConfig) -> Callable[[], tuple]:
    """`f(x)` and the products of an entry as one call."""
    model = entry.model(subject.model, task.num_probes)
    start = entry.start if task.use is products.once else entry.start_again or entry.start
    return products.call(
        model, start, [subject.x], task.tangents, config.jit_compile, weights=task.weights, use=task.use
    )


def turns(right: dict[str, measure.Step]) -> int:
    """Calls that are one turn of each entry."""
    if FORWARD.name not in right:
        return 1
    return math.ceil(SHORTEST_TURN / max(measure.turn(right[FORWARD.name]), SHORTEST_TURN / 100))


def outcome(right: bool, timed: measure.Timing | None, cause: Exception | None) -> dict[str, Any]:
    """What the JSON file says of an entry's time, and why there is none."""
    if cause is None:
        return measure.outcome(right, timed)
    try:
        return measure.outcome(right, None, processes.out_of_memory(cause))
    except Exception:
        return {**measure.outcome(right, None), "status": "failed", "message": processes.reason(cause)}


def speed_up(chosen: Sequence[Entry], seconds: dict[str, list[float]]) -> tuple[str | None, list[float] | None]:
    """The name of the alternative of the least median, and the quartiles of its times over jvpreg's; or None."""
    able = [entry.name for entry in chosen if entry.alternative and entry.name in seconds]
    if not able or JVPREG not in seconds:
        return None, None
    best = min(able, key=lambda name: float(np.median(seconds[name])))
    ratios = [theirs / ours for theirs, ours in zip(seconds[best], seconds[JVPREG], strict=True)]
    return best, list(measure.quartiles(ratios))
