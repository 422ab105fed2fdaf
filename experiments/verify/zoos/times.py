"""The time of one product of a model of a zoo, beside the other ways to compute it."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np

from experiments.benchmark import calls, competitors, measure, products, products_study
from experiments.benchmark.competitors import FORWARD, JVPREG, Entry
from experiments.benchmark.config import ProductsConfig
from experiments.benchmark.measure import Turns
from experiments.benchmark.products_study import Task
from experiments.verify.config import VerifyConfig
from experiments.verify.products import stateless
from experiments.verify.zoos.point import ZooPoint, jvp, point

EXAMPLES = 64
"""In each call."""


def figures(
    model: keras.Model, x: Any, at: str | None, config: VerifyConfig, rounds: int = 15, most_calls: int = 10
) -> Iterator[dict[str, Any]]:
    """Seconds of the first call and of a later one by jvpreg, and how many times longer the best other way takes.

    Each way is checked by autodiff before it is timed, and they are timed in turn.

    Args:
        model: in float32.
        x: its inputs.
        at: the path of a layer, by whose output it is differentiated.
        config: of the study.
        rounds: how often each way is timed.
        most_calls: as one turn of a way.
    """
    here = point(model, x, at, xla=config.jit)
    tangents = products.directions([tuple(primal.shape) for primal in here.primals], 1, config.seed)
    task = Task((), tangents, products.once, products.once)
    options = ProductsConfig(jit_compile=config.jit, rounds=rounds)
    vectors = [keras.ops.convert_to_tensor(tangent, model.variable_dtype) for tangent in tangents]
    expected = [keras.ops.convert_to_numpy(part) for part in competitors.forward_mode(here)(vectors)]
    chosen = [
        entry
        for entry in competitors.entries()
        if (entry.alternative or entry.name in (FORWARD.name, JVPREG))
        and products_study.applies(entry, task, expected[0])
    ]
    # What fails is a way that the backend does not have for such a model.
    steps, firsts, errors, failures = products_study.first_calls(
        lambda entry: call(entry, here, tangents, config.jit), chosen, expected
    )
    for name in (FORWARD.name, JVPREG):
        if name in failures:
            raise failures[name]
    right = {name: step for name, step in steps.items() if errors[name] <= options.tolerance}
    calls_a_turn = min(products_study.turns(right), most_calls)
    seconds, _ = measure.rounds(right, options, dict.fromkeys(right, calls_a_turn))
    best, faster = products_study.speed_up(chosen, seconds)
    yield {"trace_seconds": firsts[JVPREG], "trace_forward_seconds": firsts[FORWARD.name]}
    if JVPREG in seconds:
        turns = {name: Turns(firsts[name], seconds[name]) for name in (FORWARD.name, JVPREG)}
        forward_passes = turns[JVPREG].timing(turns[FORWARD.name]).ratio
        yield {"forward_passes": forward_passes, "best": best, "speed_up": faster and faster[1]}


def call(entry: Entry, here: ZooPoint, tangents: list[np.ndarray], jit: bool) -> Callable[[], tuple]:
    """`f(x)` and the products of an entry as one compiled call; as `products.call`, at a point of a zoo."""

    def compute(values, *tensors):
        moved = dataclasses.replace(here, values=values, xs=tensors[: len(here.xs)])
        if entry.start is None:
            return (moved.outputs(*moved.primals),)
        start = jvp if entry.name == JVPREG else entry.start
        return stateless(here.model, lambda: tuple(start(moved)(tensors[len(here.xs) :])))(values)

    return calls.prepared(here.model, compute, jit, [*here.xs, *tangents])
