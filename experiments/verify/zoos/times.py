"""The time of one product of a model of a zoo, beside the other ways to compute it."""

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np

from experiments.benchmark import calls, competitors, measure, products, products_study
from experiments.benchmark.competitors import FORWARD, JVPREG, Entry
from experiments.benchmark.config import ProductsConfig
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
    expected = [_numpy(part) for part in competitors.forward_mode(here)([_tensor(t, model) for t in tangents])]
    firsts: dict[str, float] = {}
    right: dict[str, measure.Step] = {}
    for entry in competitors.entries():
        if not (entry.alternative or entry.name in (FORWARD.name, JVPREG)):
            continue
        if not products_study.applies(entry, task, expected[0]):
            continue
        try:
            start = time.perf_counter()
            step = call(entry, here, tangents, config.jit)
            received = step()
            firsts[entry.name] = time.perf_counter() - start
        except Exception:
            if entry.name == JVPREG:
                raise
            continue  # a way that the backend does not have for such a model
        if products.worst(received, expected) <= options.tolerance:
            right[entry.name] = step
    calls_a_turn = min(products_study.turns(right), most_calls)
    seconds, _ = measure.rounds(right, options, dict.fromkeys(right, calls_a_turn))
    best, faster = products_study.speed_up(competitors.entries(), seconds)
    yield {"trace_seconds": firsts[JVPREG], "trace_forward_seconds": firsts[FORWARD.name]}
    if JVPREG in seconds:
        units = [ours / forward for ours, forward in zip(seconds[JVPREG], seconds[FORWARD.name], strict=True)]
        yield {"forward_passes": statistics.median(units), "best": best, "speed_up": faster and faster[1]}


def call(entry: Entry, here: ZooPoint, tangents: list[np.ndarray], jit: bool) -> Callable[[], tuple]:
    """`f(x)` and the products of an entry as one compiled call; as `products.call`, at a point of a zoo."""

    def compute(values, xs, *given):
        moved = ZooPoint(**{**vars(here), "values": values, "xs": tuple(xs)})
        if entry.start is None:
            return (stateless(here.model, lambda: moved.outputs())(values),)
        start = jvp if entry.name == JVPREG else entry.start
        return stateless(here.model, lambda: tuple(start(moved)(given)))(values)

    jitted = calls.compiled(functools.partial(compute), jit)
    held, given = calls.values(here.model), [_tensor(tangent, here.model) for tangent in tangents]

    def run() -> tuple:
        results = jitted(held, list(here.xs), *given)
        calls.wait(results)
        return results

    return run


def _tensor(array: np.ndarray, model: keras.Model) -> Any:
    return keras.ops.convert_to_tensor(array, model.variable_dtype)


def _numpy(tensor: Any) -> np.ndarray:
    return keras.ops.convert_to_numpy(keras.ops.stop_gradient(tensor))
