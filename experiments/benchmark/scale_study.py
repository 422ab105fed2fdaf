"""The `benchmark scale` study: how the cost of `f(x)` and `J u` grows, one size at a time."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np
from keras import layers
from matplotlib.figure import Figure
from rich.console import Console
from scipy.stats import linregress

from experiments.benchmark import competitors, kinks, measure, products, study
from experiments.benchmark.config import ScaleConfig
from experiments.benchmark.reference import float64
from experiments.benchmark.study import Benchmark
from experiments.errors import ExperimentError
from experiments.study import Rows

CANDIDATES, EXAMPLES = 16, 2  # of the inputs at which products are checked, and that are
AXES = {"batch": "batch_sizes", "width": "widths", "depth": "depths", "probes": "probes"}
"""The sizes that are varied, and the keys of their values."""

STARTS: dict[str, competitors.Start | None] = {
    "forward": None,
    "primal": competitors.linearize_alone,
    "jvpreg": competitors.linearize,
}

LABELS = {"forward": "forward pass", "jvpreg": "f(x) and J u"}
COLORS = {"forward": "0.45", "jvpreg": "C0"}
SIZES = {"batch": "batch size", "width": "channels", "depth": "convolutions", "probes": "probes"}


@dataclass(frozen=True)
class Point:
    """The sizes of one measurement; of 0 probes, where nothing is pushed."""

    batch: int
    width: int
    depth: int
    probes: int


@dataclass(frozen=True)
class Fit:
    """`time = constant × size ** exponent`, by least squares on logarithms.

    Attributes:
        exponent: the slope.
        sem: its standard error.
        constant: the time at size 1.
    """

    exponent: float
    sem: float
    constant: float


Key = tuple[str, Point]
"""What is timed: the name of a product, and a point."""

Times = dict[Key, measure.Turns | MemoryError]


def measured(config: ScaleConfig, console: Console) -> dict[str, Any]:
    """For each axis its points and fits."""
    for name in AXES.values():
        if len(set(getattr(config, name))) < 3:
            raise ExperimentError(
                f"{name}: expected three different values or more. Received: {getattr(config, name)}."
            )
    keys = all_keys(config)
    console.print(f"checking {len(keys)} calls")
    errors = check(keys, config)
    right = {key: name for name, key in enumerate(keys) if study.is_right(errors[checked_at(key)], config)}
    console.print(f"timing {config.rounds} rounds of {len(right)} calls")
    makers = {str(name): functools.partial(call, key, config) for key, name in right.items()}
    unit = ("forward", replace(base(config), probes=0))
    if unit not in right:
        raise ExperimentError(
            f"tolerance: the forward pass is off by more than {config.tolerance:g}, nothing is timed."
        )
    taken = measure.turns(makers, config)
    times = {key: taken[str(name)] for key, name in right.items()}
    if isinstance(times[unit], MemoryError):
        raise ExperimentError(f"batch_size: the forward pass of the base point runs out of memory: {times[unit]}.")
    return {"axes": {axis: axis_row(axis, times, errors, config) for axis in AXES}}


def base(config: ScaleConfig) -> Point:
    """The point around which sizes vary."""
    return Point(config.batch_size, config.width, config.depth, config.num_probes)


def along(axis: str, config: ScaleConfig) -> list[Point]:
    """The points of an axis, in order of size."""
    return [replace(base(config), **{axis: size}) for size in sorted(set(getattr(config, AXES[axis])))]


def all_keys(config: ScaleConfig) -> list[Key]:
    """What is timed, each once: the forward pass and `f(x)` with `J u` at every point, and `f(x)` by jvpreg."""
    points = [base(config), *(point for axis in AXES for point in along(axis, config))]
    passes: list[Key] = [("forward", replace(point, probes=0)) for point in points]
    alone: list[Key] = [("primal", replace(base(config), probes=0))]
    pushed: list[Key] = [("jvpreg", point) for point in points]
    return list(dict.fromkeys([*passes, *alone, *pushed]))


def checked_at(key: Key) -> Key:
    """Where a call is checked: at a few examples, whatever its batch."""
    return key[0], replace(key[1], batch=EXAMPLES)


def check(keys: Sequence[Key], config: ScaleConfig) -> dict[Key, float]:
    """Relative errors of the calls, compiled as they are timed, by autodiff in float64 without jit."""
    errors = {}
    for name, point in dict.fromkeys(checked_at(key) for key in keys):
        model = chain(point, config)
        candidates = inputs(replace(point, batch=CANDIDATES), config)
        far = np.argsort(kinks.network_margin(model, candidates))[-EXAMPLES:]
        xs = [candidates[far]]
        us = products.directions([xs[0].shape], max(point.probes, 1), config.seed)
        with float64():
            exact = chain(point, config)
            exact.set_weights(model.get_weights())
        received = products.call(model, STARTS[name], xs, us if point.probes else [], config.jit_compile)()
        errors[name, point] = products.worst(received, products.by_autodiff(exact, xs, us))
    return errors


def chain(point: Point, config: ScaleConfig) -> keras.Model:
    """Convolutions of 3x3 with ReLU, one after the other, from as many channels to as many."""
    keras.utils.set_random_seed(config.seed)
    x = y = keras.Input((config.image_size, config.image_size, point.width))
    for _ in range(point.depth):
        y = layers.ReLU()(layers.Conv2D(point.width, 3, padding="same", kernel_initializer="he_normal")(y))
    return keras.Model(x, y)


def inputs(point: Point, config: ScaleConfig) -> np.ndarray:
    """Random images `(B, H, W, width)` in float32."""
    shape = (point.batch, config.image_size, config.image_size, point.width)
    return np.random.default_rng(config.seed).normal(size=shape).astype("float32")


def call(key: Key, config: ScaleConfig) -> measure.Step:
    """The call that is timed."""
    name, point = key
    xs = [inputs(point, config)]
    us = products.directions([xs[0].shape], point.probes, config.seed) if point.probes else []
    return products.call(chain(point, config), STARTS[name], xs, us, config.jit_compile)


def axis_row(axis: str, times: Times, errors: dict[Key, float], config: ScaleConfig) -> dict[str, Any]:
    """What the JSON file says of an axis: its points, and the exponents."""
    rows = []
    for point in along(axis, config):
        keys: dict[str, Key] = {"forward": ("forward", replace(point, probes=0)), "jvpreg": ("jvpreg", point)}
        parts = {name: part(key, times, errors, config) for name, key in keys.items()}
        over = measure.in_units(times.get(keys["jvpreg"]), times.get(keys["forward"]))
        ratio = over.ratio if isinstance(over, measure.Timing) else None
        rows.append({"size": getattr(point, axis), **parts, "over_forward": ratio})
    if axis != "probes":
        return {"points": rows, "at_zero": 0.0, "fits": {name: fitted(rows, name, 0.0) for name in keys}}
    # Without the primal pass, which does not grow with the probes; the forward pass has none.
    alone = part(("primal", replace(base(config), probes=0)), times, errors, config)["ratio"]
    fit = None if alone is None else fitted(rows, "jvpreg", alone)
    return {"points": rows, "at_zero": alone, "fits": {"jvpreg": fit}}


def part(key: Key, times: Times, errors: dict[Key, float], config: ScaleConfig) -> dict[str, Any]:
    """The error, the status and the time of one call; times in units of the forward pass of the base point."""
    error, unit = errors[checked_at(key)], times["forward", replace(base(config), probes=0)]
    timing = measure.in_units(times.get(key), unit)
    return {"error": study.finite(error), **measure.outcome(study.is_right(error, config), timing)}


def fitted(rows: Sequence[dict[str, Any]], name: str, at_zero: float) -> dict[str, float] | None:
    """The fit of an axis' times less what they are at zero; None where fewer than three are left."""
    pairs = [(row["size"], row[name]["ratio"] - at_zero) for row in rows if row[name]["ratio"] is not None]
    pairs = [(size, ratio) for size, ratio in pairs if ratio > 0]
    if len(pairs) < 3:
        return None
    return vars(power_law([size for size, _ in pairs], [ratio for _, ratio in pairs]))


def power_law(sizes: Sequence[float], times: Sequence[float]) -> Fit:
    """The power law through three points or more, by least squares on logarithms."""
    line = linregress(np.log(sizes), np.log(times))
    return Fit(float(line.slope), float(line.stderr), float(np.exp(line.intercept)))


def columns(axis: str, row: dict[str, Any]) -> dict[str, str]:
    """The figures of one point of an axis, by the heading of their column."""
    cells = {"along": SIZES[axis], "size": str(row["size"]), "error": study.one_digit(row["jvpreg"]["error"])}
    for name, label in LABELS.items():
        found = row[name]
        cells[f"ms: {label}"] = f"{1000 * found['seconds']:.2f}" if found["seconds"] is not None else found["status"]
    over = row["over_forward"]
    cells["× forward pass"] = f"{over:.2f}" if over is not None else ""
    return cells


def exponents(summary: dict[str, Any]) -> list[dict[str, str]]:
    """The fitted exponents of each axis, by the heading of their column."""
    return [
        {"along": SIZES[axis], **{label: _exponent(row["fits"].get(name)) for name, label in LABELS.items()}}
        for axis, row in summary["axes"].items()
    ]


def caption(summary: dict[str, Any]) -> str:
    """What the figures mean and where they are from."""
    settings = summary["settings"]
    size = settings["image_size"]
    return (
        f"A chain of 3x3 convolutions with ReLU on images of {size}x{size}; one size grows, while the others are those "
        f"of the base point: batches of {settings['batch_size']}, {settings['width']} channels, {settings['depth']} "
        f"convolutions, {settings['num_probes']} direction(s). One compiled call computes `f(x)` and `J u` "
        f"(`linearize(...).jvp(u)`). Medians of {settings['rounds']} rounds of all points in turn. An exponent is that "
        "of time = constant × size ** exponent by least squares on the logarithms, with its standard error; "
        "the times that are fitted are "
        "in units of the base point's forward pass in the same round. Along batch, channels and convolutions the whole "
        "time is fitted; along probes, what is over jvpreg's `f(x)` alone, which does not grow with them (of the "
        "forward pass there is nothing to fit). Errors are relative, of `f(x)` and the compiled product in float32 "
        "at a few inputs, far from kinks, against autodiff in float64 that is not jitted; above "
        f"{settings['tolerance']:g} a point is wrong and is not timed. {study.ran_on(summary)}"
    )


def page(summary: dict[str, Any]) -> list[Rows | str]:
    """The table of the points, that of the exponents, and what they mean."""
    rows = [columns(axis, row) for axis, found in summary["axes"].items() for row in found["points"]]
    return [rows, "Exponents:", exponents(summary), caption(summary)]


def figure(summary: dict[str, Any]) -> Figure:
    """A panel an axis, log-log, with points and fitted curves."""
    drawing = Figure(figsize=(8.0, 6.4), layout="constrained")
    for axes, (axis, row) in zip(drawing.subplots(2, 2).flat, summary["axes"].items(), strict=False):
        for name in LABELS:
            timed = [point for point in row["points"] if point[name]["ratio"] is not None]
            sizes, ratios = [p["size"] for p in timed], [p[name]["ratio"] for p in timed]
            axes.errorbar(
                sizes,
                ratios,
                yerr=study.spread([point[name] for point in timed]),
                fmt="o",
                color=COLORS[name],
                capsize=3,
                label=_label(name, row),
            )
            fit = row["fits"].get(name)
            if fit:
                curve = np.geomspace(min(sizes), max(sizes))
                at_zero = row["at_zero"]
                axes.plot(curve, at_zero + fit["constant"] * curve ** fit["exponent"], color=COLORS[name], alpha=0.7)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel(SIZES[axis])
        axes.set_ylabel("time (base forward pass = 1)")
        axes.legend(fontsize=8)
    drawing.suptitle(f"{summary['machine']['backend']}, {summary['mode']}", fontsize=10)
    return drawing


def _label(name: str, row: dict[str, Any]) -> str:
    if name not in row["fits"]:
        return LABELS[name]
    over = " over f(x)" if row["at_zero"] else ""
    return f"{LABELS[name]}: exponent{over} {_exponent(row['fits'][name])}"


def _exponent(fit: dict[str, float] | None) -> str:
    return f"{fit['exponent']:.2f} ± {fit['sem']:.2f}" if fit else ""


STUDY = Benchmark("scale", measured, page, {"scale": figure})
