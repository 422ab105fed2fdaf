"""The `benchmark probe` study: what a measurement of the Jacobian's health costs, in forward passes."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops
from matplotlib.figure import Figure
from rich.console import Console

import jvpreg
from experiments.benchmark import entries, measure, study
from experiments.benchmark.calls import compiled
from experiments.benchmark.config import BenchmarkConfig, ProbeConfig
from experiments.benchmark.probe_entries import CALLBACK, ENTRIES, FEW, MANY, Compute, Entry, norm, nothing, sigma
from experiments.benchmark.reference import Reference, float64
from experiments.benchmark.study import Benchmark
from experiments.errors import ExperimentError
from experiments.study import one_table
from experiments.verify.architectures import unet
from experiments.verify.products import stateless

EXAMPLES = 4  # at which entries are checked
UNET_CHECKED_SIZE = 8  # of the images at which the UNet is: its whole Jacobian has 192 x 640 entries there

AIMS = {"probe": 60.0, "further_jvp": 1.15, "further_vjp": 1.15}
"""Forward passes that a full probe, and a further product, should take at most."""

SHORT: dict[Compute | None, int] = {None: 8, nothing: 8}
"""Calls in a turn, by what is computed: several of nothing but a forward pass, to measure it as well as a long one."""

UNITS = {"classifier": "forward", "unet": "unet_forward"}

COLORS = {"classifier": "C0", "unet": "C2"}
BACKGROUND = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}


@dataclass(frozen=True)
class Subject:
    """A network with its images: those that are timed, and those at which it is checked.

    Attributes:
        model: as it is timed.
        x: `(B, …)`.
        checked_model: the same layers with the same weights, perhaps for smaller images.
        checked_x: a few images for it.
    """

    model: keras.Model
    x: np.ndarray
    checked_model: keras.Model
    checked_x: np.ndarray


def measured(config: ProbeConfig, console: Console) -> dict[str, Any]:
    """A row an entry, the cost of a further product, and what was aimed at."""
    if config.unet_image_size % 4:
        raise ExperimentError(f"unet_image_size: expected a multiple of 4. Received: {config.unet_image_size}.")
    rows: list[dict[str, Any]] = []
    for name, subject in (("classifier", classifier(config)), ("unet", pixelwise(config))):
        chosen = [entry for entry in ENTRIES if entry.network == name]
        console.print(f"checking {len(chosen)} entries of the {name}")
        errors = check(subject, chosen, config)
        console.print(f"timing {config.rounds} rounds of the entries that are right")
        rows += timed_rows(subject, chosen, errors, config)
    further = {kind: further_product(rows, kind) for kind in ("jvp", "vjp")}
    return {"entries": rows, "further_product": further, "aims": aims(rows, further)}


def classifier(config: ProbeConfig) -> Subject:
    """The model of few outputs."""
    model = entries.plain_model(config)
    return Subject(model, images(config, config.batch_size), model, images(config, EXAMPLES))


def pixelwise(config: ProbeConfig) -> Subject:
    """The UNet."""
    keras.utils.set_random_seed(config.seed)
    size = config.unet_image_size
    model = unet((size, size, 3))
    checked = unet((UNET_CHECKED_SIZE, UNET_CHECKED_SIZE, 3))
    checked.set_weights(model.get_weights())
    return Subject(
        model, images(config, config.unet_batch_size, size), checked, images(config, EXAMPLES, UNET_CHECKED_SIZE)
    )


def images(config: BenchmarkConfig, number: int, size: int | None = None) -> np.ndarray:
    """Random images in [0, 1]."""
    size = size or config.image_size
    generator = np.random.default_rng(config.seed)
    return generator.integers(0, 256, size=(number, size, size, 3)).astype("float32") / 255


def check(subject: Subject, chosen: list[Entry], config: ProbeConfig) -> dict[str, tuple[float, float]]:
    """Relative errors of the entries, compiled as they are timed, and what they may be, by float64 without jit.

    Against the whole Jacobian, its SVD, and products with it.
    """
    x = subject.checked_x
    exact = Reference(subject.checked_model, "moving", x).model
    with float64():
        jacobians = ops.convert_to_numpy(jvpreg.jacobian(exact, ops.convert_to_tensor(x, "float64"), fallback="error"))
        outputs = ops.convert_to_numpy(exact(ops.convert_to_tensor(x, "float64")))
    matrices = np.reshape(jacobians, (len(x), outputs[0].size, x[0].size))
    errors = {}
    for entry in chosen:
        tensors = call(subject.checked_model, entry, config, x)()[0]
        # f(x) is the last one, and what a forward pass is checked by.
        found = entry.check(tensors[:-1] or tensors, matrices, outputs)
        errors[entry.name] = max(
            (each.errors(config.tolerance) for each in found), key=lambda error: error[0] - error[1]
        )
    return errors


def is_right(error: tuple[float, float]) -> bool:
    """Whether an entry is to be timed."""
    return error[0] <= error[1]


def timed_rows(
    subject: Subject, chosen: list[Entry], errors: dict[str, tuple[float, float]], config: ProbeConfig
) -> list[dict[str, Any]]:
    """What the JSON file says of the entries of a network. One that was traced again gets no time."""
    counted: dict[str, Counted] = {}

    def make(entry: Entry) -> Counted:
        counted[entry.name] = Counted(subject, entry, config)
        return counted[entry.name]

    right = [entry for entry in chosen if is_right(errors[entry.name])]
    makers = {entry.name: functools.partial(make, entry) for entry in right}
    unit, turns = UNITS[chosen[0].network], {entry.name: SHORT.get(entry.compute, 1) for entry in right}
    # Without its unit nothing can be timed.
    times = measure.in_turn(makers, unit, config, turns) if unit in makers else {}
    rows = []
    for entry in chosen:
        call, (error, allowed) = counted.get(entry.name), errors[entry.name]
        traced = None if is_eager(config) else call
        again = traced is not None and traced.later > 0
        rows.append(
            {
                "name": entry.name,
                "label": entry.label,
                "network": entry.network,
                "num_products": call.num_products if call else None,
                "error": study.finite(error),
                "allowed_error": allowed,
                "traces": traced.first if traced else None,
                "traces_again": traced.later if traced else None,
                **measure.outcome(entry in right, None if again else times.get(entry.name)),
                **({"status": "traced again"} if again else {}),
            }
        )
    return rows


def is_eager(config: ProbeConfig) -> bool:
    """Whether nothing is traced: on JAX without jit."""
    return study.mode(config) == "eager"


class Counted:
    """The call of an entry, as it is timed; it counts how often it is traced.

    Args:
        subject: the network and its images.
        entry: what is computed.
        config: how it is compiled.

    Attributes:
        num_products: with each example; known from the first call on.
        first: how often the first call traced it.
        later: how often all later calls did.
    """

    def __init__(self, subject: Subject, entry: Entry, config: ProbeConfig):
        self.num_products: int | None = None
        self.traced = self.first = self.later = 0
        self.computed = call(subject.model, entry, config, subject.x, self.count)

    def count(self) -> None:
        """What is traced calls it."""
        self.traced += 1

    def __call__(self) -> None:
        """The call."""
        before = self.traced
        _, products = self.computed()
        if self.num_products is None:
            self.first, self.num_products = self.traced - before, int(products)
        else:
            self.later += self.traced - before


def call(
    model: keras.Model, entry: Entry, config: ProbeConfig, x: np.ndarray, traced: Callable[[], None] = lambda: None
) -> Callable[[], tuple[list[np.ndarray], int]]:
    """The tensors of an entry, `f(x)` the last of them, and the number of products, as one compiled call.

    With `f(x)`, because without it the end of the primal pass would be left out.
    """

    if entry.name == CALLBACK:
        return callback(model, x, traced)

    def function(x):
        traced()  # by Python, and so when traced only
        if entry.compute is None:
            return [model(x, training=False)], ops.convert_to_tensor(0)
        lin = jvpreg.linearize(model, x, fallback="error", xla=config.jit_compile)
        tensors, products = entry.compute(lin)
        return [*tensors, lin.outputs], ops.convert_to_tensor(products)

    # A partial, because TensorFlow takes functions of one code for one that is traced again, and warns.
    jitted = compiled(functools.partial(stateless(model, function)), config.jit_compile)
    # As arguments, so that nothing of them is computed when compiling. Copies, because Keras gives those of the model
    # away on JAX, when `JacobianProbe` measures.
    values = [ops.convert_to_tensor(np.array(ops.convert_to_numpy(variable.value))) for variable in model.variables]
    images = ops.convert_to_tensor(x)

    def compute() -> tuple[list[np.ndarray], int]:
        tensors, products = jitted(values, images)
        # JAX returns before it has computed.
        return [ops.convert_to_numpy(tensor) for tensor in tensors], int(ops.convert_to_numpy(products))

    return compute


def callback(
    model: keras.Model, x: np.ndarray, traced: Callable[[], None]
) -> Callable[[], tuple[list[np.ndarray], int]]:
    """The full probe as `fit` has it: compiled by `JacobianProbe`, and with the means that it logs."""
    spent = 0

    def counted_norm(lin):
        traced()
        return kept(norm(lin))

    def kept(estimate):
        nonlocal spent
        spent += estimate.num_matvecs
        return estimate

    probe = jvpreg.callbacks.JacobianProbe(x, {"norm": counted_norm, "sigma": lambda lin: kept(sigma(lin))})
    made = False

    def measured() -> tuple[list[np.ndarray], int]:
        nonlocal made, spent
        if not made:
            probe.set_model(model)  # which tries it on one example
            made, spent = True, 0
        probe.measure()
        return [*(probe.values[name].value for name in ("norm", "sigma")), x], spent

    return measured


def further_product(rows: list[dict[str, Any]], kind: str) -> float | None:
    """Forward passes that one more product takes; None where it was not timed."""
    ratios = {row["name"]: row["ratio"] for row in rows}
    few, many = ratios.get(f"{kind}_{FEW}"), ratios.get(f"{kind}_{MANY}")
    return None if few is None or many is None else (many - few) / (MANY - FEW)


def aims(rows: list[dict[str, Any]], further: dict[str, float | None]) -> list[dict[str, Any]]:
    """What was aimed at, and whether it was met."""
    full = next(row["ratio"] for row in rows if row["name"] == "probe")
    measured = {"probe": full, **{f"further_{kind}": cost for kind, cost in further.items()}}
    return [
        {
            "name": name,
            "aim": most,
            "measured": measured[name],
            "met": None if measured[name] is None else measured[name] <= most,
        }
        for name, most in AIMS.items()
    ]


def columns(row: dict[str, Any]) -> dict[str, str]:
    """One entry's figures, by the heading of their column."""
    products = row["num_products"]
    return {
        "step": row["label"],
        "J v": str(products) if products else "",
        "error": study.one_digit(row["error"]),
        "may be": study.one_digit(row["allowed_error"]),
        "× forward pass": study.ratio(row),
        **study.times(row),
        "traces": "" if row["traces"] is None else f"{row['traces']}+{row['traces_again']}",
    }


def caption(summary: dict[str, Any]) -> str:
    """What the figures mean and where they are from."""
    settings = summary["settings"]
    size = settings["unet_image_size"]
    return (
        f"{study.subject(settings)}; UNet of `verify`, batches of {settings['unet_batch_size']} images of "
        f"{size}x{size}x3, an output for each pixel and class. Inference mode. One compiled call linearizes, computes "
        "`f(x)` and what the row names; a full probe is `frobenius_norm(num_probes=16)` and "
        "`spectral_norm(tolerance=1e-3)`, each of which has a row too, and so has `JacobianProbe` as `fit` calls it "
        "(which TensorFlow runs without XLA); `top_singular_values` has k=5. J v: products with `J` or `Jᵀ` an "
        "example. Where a model has few outputs the estimators materialize its Jacobian: one product with `Jᵀ` for "
        "each. n × jvp (vjp): n products, each of "
        f"which waits for the one before. {costs(summary)} Ratios to the forward pass of the same model, batch and "
        f"round, median and quartiles of {settings['rounds']} rounds. Errors are relative, of the compiled values in "
        "float32 for a few examples (the UNet's of 8x8x3) against the whole Jacobian and its SVD in float64, without "
        f"jit; they may be {settings['tolerance']:g}, and what the estimate itself says, 5 standard errors or the "
        "residual. What is off by more is wrong and is not timed. First s: seconds of the first call, compilation "
        "included. Traces: by the first call + by all later ones; what is traced again is not timed. "
        f"{study.ran_on(summary)}"
    )


def costs(summary: dict[str, Any]) -> str:
    """What a full probe and a further product cost, beside what was aimed at."""
    names = {"probe": "a full probe", "further_jvp": "a further `J u`", "further_vjp": "a further `Jᵀ v`"}
    parts = [
        f"{names[aim['name']]} {aim['measured']:.2f} (at most {aim['aim']:g}: {'met' if aim['met'] else 'missed'})"
        for aim in summary["aims"]
        if aim["measured"] is not None
    ]
    return f"In forward passes: {', '.join(parts)}." if parts else ""


def figure(summary: dict[str, Any]) -> Figure:
    """The ratios as bars with their quartiles."""
    rows = [row for row in summary["entries"] if not row["name"].endswith("forward")]
    drawing = Figure(figsize=(8.0, 0.36 * len(rows) + 1.3), layout="constrained")
    axes = drawing.subplots()
    for place, row in enumerate(rows):
        if row["ratio"] is None:
            axes.text(1.1, place, row["status"], va="center", color="C3")
            continue
        upper, color = row["ratio_quartiles"][1], COLORS[row["network"]]
        axes.barh(place, row["ratio"], xerr=study.spread([row]), height=0.62, color=color, ecolor="0.2", capsize=3)
        products = f"  ({row['num_products']} products)" if (row["num_products"] or 0) > 1 else ""
        axes.text(1.05 * upper, place, f"{row['ratio']:.3g}{products}", va="center", fontsize=9, bbox=BACKGROUND)
    axes.axvline(1.0, color="0.4", linewidth=1, linestyle=":")
    axes.axvline(60.0, color="C3", linewidth=1, linestyle="--")
    axes.text(60.0, -0.75, "aim of a full probe", color="C3", fontsize=8, ha="center", va="bottom")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    largest = max((row["ratio_quartiles"][1] for row in rows if row["ratio"] is not None), default=1.0)
    axes.set_xlim(0.5, 4 * max(largest, 60.0))
    unit = "forward passes of the same batch (median and quartiles, logarithmic)"
    study.name_bars(axes, [row["label"] for row in rows], unit, summary, pad=14)
    return drawing


STUDY = Benchmark(
    "probe", measured, one_table("entries", columns, caption), {"probe": figure}, backends=study.TWO_BACKENDS
)
