"""The `benchmark layers` study: each layer with its product, in units of the plain layer.

Reference: Balestriero & Baraniuk (2021), "Fast Jacobian-Vector Product for Deep Networks", figure 3.
"""

import functools
import warnings
from typing import Any

import keras
import numpy as np
from keras import ops
from rich.console import Console

from experiments.benchmark import competitors, layers_report, measure, products, study
from experiments.benchmark.config import LayersConfig
from experiments.benchmark.layers_cases import CASES, HEADS, Case
from experiments.benchmark.reference import float64
from experiments.benchmark.study import Benchmark
from experiments.errors import ExperimentError
from experiments.processes import reason
from experiments.verify import weights

EXAMPLES = 4  # at which products are checked
CALLS = 5  # in a turn

ALTERNATIVES = ("forward_mode", "double_vjp")
PRODUCTS = ("plain", "jvpreg", *ALTERNATIVES)


def measured(config: LayersConfig, console: Console) -> dict[str, Any]:
    """A row a layer."""
    names = study.chosen_names(config.only, [case.name for case in CASES])
    if config.units % HEADS:
        raise ExperimentError(f"units: expected a multiple of {HEADS}. Received: {config.units}.")
    rows = []
    for case in CASES:
        if case.name in names:
            console.print(f"checking and timing {case.name}")
            rows.append(row(case, config))
    return {"layers": rows}


def row(case: Case, config: LayersConfig) -> dict[str, Any]:
    """What the JSON file says of a layer: each product with its error and its time, and the best alternative."""
    with warnings.catch_warnings():
        # Here it is the softmax that is measured.
        warnings.filterwarnings("ignore", message=".*ends in a softmax")
        model = case.model(config)
        weights.draw(model, np.random.default_rng(config.seed))
        exact = exact_model(case, model, config)
        checks = {name: check(case, model, exact, name, config) for name in PRODUCTS}
        right = [name for name, found in checks.items() if isinstance(found, float) and study.is_right(found, config)]
        makers = {name: functools.partial(call, case, model, name, config, config.batch_size) for name in right}
        taken = measure.turns(makers, config, dict.fromkeys(makers, CALLS))
    return {
        "name": case.name,
        "input_shape": [config.batch_size, *case.input_shape(config)],
        "num_inputs": case.num_inputs,
        "products": {name: outcome(name, checks[name], taken, config) for name in PRODUCTS},
        "best_alternative": best_alternative(taken),
    }


def exact_model(case: Case, model: keras.Model, config: LayersConfig) -> keras.Model:
    """The same layer with the same weights, in float64."""
    with float64():
        made = case.model(config)
        made.set_weights(model.get_weights())
    return made


def check(case: Case, model: keras.Model, exact: keras.Model, name: str, config: LayersConfig) -> float | str:
    """The relative error of a product, compiled as it is timed, by float64 without jit; or why there is none."""
    xs, us = inputs(case, config, EXAMPLES)
    try:
        received = call(case, model, name, config, EXAMPLES)()
    except Exception as cause:
        return reason(cause)
    if case.expected is not None:
        return products.worst(received, case.expected(ops.convert_to_numpy(received[0]), xs, us))
    return products.worst(received, products.exact(exact, xs, us))


def call(case: Case, model: keras.Model, name: str, config: LayersConfig, batch_size: int) -> Any:
    """A product as one compiled call, which waits."""
    xs, us = inputs(case, config, batch_size)
    training = case.expected is not None
    return products.call(model, starts(config)[name], xs, us, config.jit_compile, training=training)


def starts(config: LayersConfig) -> dict[str, competitors.Start | None]:
    """How each product is computed; forward mode at once for several directions, where the backend can as a rule."""
    known = {entry.name: entry.start for entry in competitors.entries()}
    at_once = config.num_probes > 1 and keras.backend.backend() != "tensorflow"
    return {
        "plain": None,
        "jvpreg": known[competitors.JVPREG],
        "forward_mode": known["vectorized" if at_once else "forward_mode"],
        "double_vjp": known["double_vjp"],
    }


def inputs(case: Case, config: LayersConfig, batch_size: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Random inputs `(B, …)` and directions `(P, B, …)` of each, in float32."""
    random = np.random.default_rng(config.seed)
    shape = (batch_size, *case.input_shape(config))
    xs = [random.normal(size=shape).astype("float32") for _ in range(case.num_inputs)]
    return xs, products.directions([shape] * case.num_inputs, config.num_probes, config.seed)


def outcome(
    name: str, found: float | str, taken: dict[str, measure.Turns | MemoryError], config: LayersConfig
) -> dict[str, Any]:
    """What the JSON file says of one product: its error, its status, and its time in units of the plain layer."""
    right = isinstance(found, float) and study.is_right(found, config)
    made = measure.outcome(right, measure.in_units(taken.get(name), taken.get("plain")))
    if isinstance(found, str):
        return {"error": None, **made, "status": "failed", "message": found}
    return {"error": study.finite(found), **made}


def best_alternative(taken: dict[str, measure.Turns | MemoryError]) -> dict[str, Any] | None:
    """The fastest right alternative, in units of jvpreg in the same rounds; None where one of the two has no time."""
    own = taken.get("jvpreg")
    if not isinstance(own, measure.Turns):
        return None
    ratios = {name: times.ratio(own) for name in ALTERNATIVES if isinstance(times := taken.get(name), measure.Turns)}
    if not ratios:
        return None
    name = min(ratios, key=lambda name: ratios[name][1])
    lower, median, upper = ratios[name]
    return {"name": name, "over_jvpreg": median, "over_jvpreg_quartiles": (lower, upper)}


STUDY = Benchmark("layers", measured, layers_report.page, {"layers": layers_report.figure})
