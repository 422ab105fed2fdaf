"""The `benchmark layers` study: each layer with its product, in units of the plain layer.

Reference: Balestriero & Baraniuk (2021), "Fast Jacobian-Vector Product for Deep Networks", figure 3.
"""

import functools
import warnings
from typing import Any

import keras
import numpy as np
from keras import ops
from matplotlib.figure import Figure
from rich.console import Console

from experiments.benchmark import competitors, measure, products, study
from experiments.benchmark.config import LayersConfig
from experiments.benchmark.layers_cases import CASES, HEADS, Case
from experiments.benchmark.reference import float64
from experiments.benchmark.study import Benchmark
from experiments.errors import ExperimentError
from experiments.plots import plain_numbers
from experiments.processes import reason
from experiments.study import Rows
from experiments.verify import weights

EXAMPLES = 4  # at which products are checked
CALLS = 5  # in a turn

ALTERNATIVES = ("forward_mode", "double_vjp")
PRODUCTS = ("plain", "jvpreg", *ALTERNATIVES)

LABELS = {"jvpreg": "jvpreg", "forward_mode": "forward mode", "double_vjp": "double VJP"}
COLORS = {"jvpreg": "C0", "forward_mode": "C1", "double_vjp": "C3"}


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
    return products.worst(received, products.by_autodiff(exact, xs, us))


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


def columns(row: dict[str, Any]) -> dict[str, str]:
    """One layer's figures, by the heading of their column."""
    plain, own, best = row["products"]["plain"], row["products"]["jvpreg"], row["best_alternative"]
    cells = {"layer": row["name"], "error": study.one_digit(own["error"])}
    cells["× layer"] = _status(own) if own["ratio"] is None else study.ratio(own)
    for name in ("forward_mode", "double_vjp"):
        part = row["products"][name]
        cells[LABELS[name]] = _status(part) if part["ratio"] is None else f"{part['ratio']:.2f}"
    cells["best ÷ jvpreg"] = study.with_quartiles(best["over_jvpreg"], best["over_jvpreg_quartiles"]) if best else ""
    cells["layer ms"] = _milliseconds(plain)
    cells["jvpreg ms"] = _milliseconds(own)
    cells["first s"] = f"{own['first_call_seconds']:.1f}" if own["seconds"] is not None else ""
    return cells


def caption(summary: dict[str, Any]) -> str:
    """What the figures mean and where they are from."""
    settings = summary["settings"]
    size = settings["image_size"]
    return (
        f"Models of one layer, batches of {settings['batch_size']}: images of {size}x{size}x{settings['channels']}, or "
        f"sequences of {settings['sequence_length']} steps of {settings['units']} (Dense, LayerNormalization, Softmax, "
        "recurrent layers and attention); inference mode, but for dropout. One compiled call computes `f(x)` and the "
        f"product with {settings['num_probes']} direction(s), by jvpreg (× layer) or by autodiff; the unit is a call "
        f"of the plain layer in the same round, median and quartiles of {settings['rounds']} rounds. Forward mode: "
        f"{_forward_mode(summary)}. Double VJP: reverse mode twice, its primal pass run once. Best ÷ jvpreg: the "
        "faster of those two that is right, in units of jvpreg in the same round; below 1, the backend's own is the "
        "faster. Errors are relative, of `f(x)` and of the compiled product in float32 against autodiff in float64 "
        f"that is not jitted; above {settings['tolerance']:g} a product is wrong and is not timed. First s: seconds "
        f"of jvpreg's first call, compilation included. {study.ran_on(summary)}"
    )


def page(summary: dict[str, Any]) -> list[Rows | str]:
    """The table, what it means, and why figures are missing."""
    rows = summary["layers"]
    failures = [f"{row['name']}, {text}" for row in rows for text in failures_of(row)]
    return [[columns(row) for row in rows], caption(summary), *failures]


def failures_of(row: dict[str, Any]) -> list[str]:
    """Why products of a layer have no time, where a message says so."""
    found = row["products"].items()
    return [f"{LABELS.get(name, name)}: {part['message']}" for name, part in found if part["message"]]


def figure(summary: dict[str, Any]) -> Figure:
    """The ratios as horizontal bars from 1, the plain layer, with their quartiles."""
    rows, height = summary["layers"], 0.8 / len(LABELS)
    drawing = Figure(figsize=(8.0, 0.42 * len(rows) + 1.5), layout="constrained")
    axes = drawing.subplots()
    axes.set_xscale("log")
    for offset, (name, label) in enumerate(LABELS.items()):
        places = [place + (offset - 1) * height for place in range(len(rows))]
        parts = [row["products"][name] for row in rows]
        timed = [(place, part) for place, part in zip(places, parts, strict=True) if part["ratio"] is not None]
        ratios = [part["ratio"] for _, part in timed]
        axes.barh(
            [place for place, _ in timed],
            [ratio - 1 for ratio in ratios],
            left=1.0,
            xerr=study.spread([part for _, part in timed]),
            height=height,
            color=COLORS[name],
            ecolor="0.2",
            label=label,
        )
        for place, part in zip(places, parts, strict=True):
            if part["ratio"] is None:
                axes.text(1.02, place, f"{label}: {_status(part)}", va="center", color=COLORS[name], fontsize=7)
    axes.axvline(1.0, color="0.4", linewidth=1)
    plain_numbers(axes.xaxis)
    unit = "time of f(x) and J u, times the plain layer (median and quartiles)"
    study.name_bars(axes, [row["name"] for row in rows], unit, summary)
    drawing.legend(loc="outside lower center", ncols=len(LABELS), fontsize=9)
    return drawing


def _status(part: dict[str, Any]) -> str:
    if part["status"] == "wrong":
        return f"wrong ({study.one_digit(part['error'])})"
    return part["status"] if part["status"] != "ok" else ""


def _milliseconds(part: dict[str, Any]) -> str:
    return f"{1000 * part['seconds']:.2f}" if part["seconds"] is not None else ""


def _forward_mode(summary: dict[str, Any]) -> str:
    backend = summary["machine"]["backend"].split()[0]
    return {
        "tensorflow": "`tf.autodiff.ForwardAccumulator`, a pass for each direction",
        "jax": "`jax.jvp`, under `jax.vmap` where there are several directions",
        "torch": "`torch.func.jvp`, under `torch.func.vmap` where there are several directions; both alternatives with "
        "the attention kernel that they can differentiate",
    }[backend]


STUDY = Benchmark("layers", measured, page, {"layers": figure})
