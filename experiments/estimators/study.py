"""The `estimators` study: figure 4 of the paper, and the trace."""

from typing import Any

import keras
import numpy as np
from keras import ops
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

import jvpreg
from experiments.errors import ExperimentError
from experiments.estimators import convergence
from experiments.estimators.config import EstimatorsConfig
from experiments.estimators.monte_carlo import KIND, trace_errors, trajectories
from experiments.plots import plain_numbers
from experiments.study import Rows, Study
from experiments.verify.architectures import unet
from jvpreg.estimators import frobenius_norm, top_eigenvalues, top_singular_values

PAPER_STEPS = 10
PAPER_SAMPLES = 100

COLORS = ("black", "C0")
"""Of one value and of a block, as in the paper."""

METHODS = {
    "hutchinson": ("Hutchinson", "0.45", "o"),
    "hutch++": ("Hutch++", "C1", "s"),
    "xtrace": ("XTrace", "C2", "^"),
}
TITLES = {"singular": "largest singular values of $J$", "eigen": "largest eigenvalues of $J$, by magnitude"}
STEPS = {
    "singular": r"steps ($k$ products with $J$ and $k$ with $J^\top$ each)",
    "eigen": "steps ($k$ products with $J$ each; jvpreg $k + 2$)",
}
PAPER = "the paper's algorithm 4 (left), 2 (middle)"
KINDS = {"singular": "σ", "eigen": "abs(λ)"}


def measured(config: EstimatorsConfig, console: Console) -> dict[str, Any]:
    """The data of both figures."""
    check(config)
    model = square_unet(config.image_size, config.seed)
    x = images(config.image_size, config.examples, config.seed)
    lin = jvpreg.linearize(model, x, fallback="error")
    n = x[0].size
    console.log(f"materializing {len(x)} Jacobians of {n}x{n}")
    jacobians = np.asarray(ops.convert_to_numpy(lin.jacobian()), "float64").reshape(len(x), n, n)
    sigma, magnitudes = convergence.exact_values(jacobians)
    curves = []
    block = lin.take(list(range(config.block_examples)))
    for kind, exact in (("singular", sigma), ("eigen", magnitudes)):
        for part, k in ((lin, 1), (block, config.block)):
            console.log(f"seeking {k} {kind} value(s) step by step")
            steps = single_steps(config) if k == 1 else sorted(config.steps)
            known = exact[: len(part.inputs[0])]
            curves.append(convergence.convergence(part, k, steps, known, kind, config.seed))
    console.log("drawing trajectories of the Frobenius norm")
    same = jvpreg.linearize(model, np.repeat(x[:1], config.trajectories, axis=0), fallback="error")
    norm = trajectories(same, jacobians[0], config.num_probes, 32 * config.trajectories, config.seed)
    console.log("timing")
    times = timed(model, config)
    console.log("estimating traces")
    return {
        "figure4": {"convergence": curves, "frobenius_norm": norm, "seconds": times},
        "trace": matrices(jacobians[0], config),
    }


def check(config: EstimatorsConfig) -> None:
    """Raises where the settings do not fit each other."""
    if config.image_size % 4:
        raise ExperimentError(f"image_size: expected a multiple of 4. Received: {config.image_size}.")
    if config.block_examples > config.examples:
        raise ExperimentError("block_examples: expected no more than examples.")
    if config.block + 2 > 3 * config.image_size**2:
        raise ExperimentError("block: expected fewer values than the Jacobian has.")


def single_steps(config: EstimatorsConfig) -> list[int]:
    """The steps for one value."""
    return sorted({*config.steps, *range(5, config.single_steps + 1, 5)})


def timed(model: keras.Model, config: EstimatorsConfig) -> list[dict[str, Any]]:
    """Ten steps for one value and for a block of them, and the probes of the norm, at as many images as it says."""
    number = config.timed_examples
    few = max(1, number // 10)
    x = images(config.image_size, number, config.seed)

    def once(function):
        """Of images, linearized in the same call."""
        return lambda x: function(jvpreg.linearize(model, x, fallback="error"))

    def singular(k):
        return once(lambda lin: top_singular_values(lin, k, convergence.NEVER, PAPER_STEPS, 0).value)

    def eigen(k):
        return once(lambda lin: top_eigenvalues(lin, k, convergence.NEVER, PAPER_STEPS, 0).value)

    def norm():
        return once(lambda lin: frobenius_norm(lin, PAPER_SAMPLES, probes=KIND).value)

    rows = [
        ("top_eigenvalues, k=1, 10 steps", eigen(1), number, 3.12 if number == PAPER_SAMPLES else None),
        (
            f"top_eigenvalues, k={config.block}, 10 steps",
            eigen(config.block),
            few,
            16.0 if (config.block, few) == (50, 10) else None,
        ),
        ("top_singular_values, k=1, 10 steps", singular(1), number, None),
        (f"top_singular_values, k={config.block}, 10 steps", singular(config.block), few, None),
        (f"frobenius_norm, {PAPER_SAMPLES} probes", norm(), 1, 0.013),
    ]
    return [
        {
            "what": what,
            "images": count,
            "seconds": convergence.seconds(function, ops.convert_to_tensor(x[:count])),
            "paper_seconds": paper,
        }
        for what, function, count, paper in rows
    ]


def matrices(jacobian: np.ndarray, config: EstimatorsConfig) -> dict[str, Any]:
    """The errors of the trace of each matrix, by its label."""
    n = config.trace_dimension
    numbers = np.arange(n)
    named = {
        "eigenvalues 1/i²": symmetric(1.0 / (1 + numbers) ** 2, config.seed),
        f"the UNet's Jacobian, n={len(jacobian)}": jacobian,
        "eigenvalues from 1 to 3": symmetric(np.linspace(3.0, 1.0, n), config.seed),
    }
    matvecs = [count for count in sorted(config.trace_matvecs) if count < n]
    return {label: trace_errors(matrix, matvecs, config.trace_seeds, config.seed) for label, matrix in named.items()}


def square_unet(image_size: int, seed: int) -> keras.Model:
    """The UNet of `verify`, never trained, with as many channels out as in."""
    keras.utils.set_random_seed(seed)
    network = unet((image_size, image_size, 3))
    features = network.layers[-1].input
    return keras.Model(network.input, keras.layers.Conv2D(3, 1, name="pixels")(features))


def images(image_size: int, number: int, seed: int) -> np.ndarray:
    """Random inputs `(B, H, W, 3)`, standard normal, as in the paper."""
    shape = (number, image_size, image_size, 3)
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def symmetric(eigenvalues: np.ndarray, seed: int) -> np.ndarray:
    """A symmetric matrix with those eigenvalues, in a random basis."""
    n = len(eigenvalues)
    basis = np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))[0]
    return basis * eigenvalues @ basis.T


def page(summary: dict[str, Any]) -> list[Rows | str]:
    """The tables, with what they mean and where they are from."""
    settings, machine = summary["settings"], summary["machine"]
    size = settings["image_size"]
    norm = summary["figure4"]["frobenius_norm"]
    last = len(norm["sem"]) - 1
    return [
        "# How fast the estimators converge",
        f"UNet of `verify` with 3 channels out, never trained, standard normal images of {size}x{size}x3: square "
        f"Jacobians of {3 * size**2} dimensions. Exact values from whole Jacobians in float64; products in float32. "
        f"{machine['backend']}, Keras {machine['keras']}, {machine['cores']} cores of {machine['processor']}.",
        "## The largest singular values and eigenvalues",
        "The largest error of the k values, relative to the largest value, the median over inputs. The paper's are "
        "its algorithms 4 (σ) and 2 (λ), by the diagonals of R; the magnitudes of eigenvalues are compared; jvpreg's "
        "steps towards eigenvalues take k + 2 products and not k. Empty: with so many steps the Jacobian is "
        "materialized, which is exact.",
        table(*convergence_rows(summary["figure4"]["convergence"])),
        "## Monte-Carlo estimates of the norm",
        f"At one input ‖J‖_F is {norm['exact']:.4g}. After {last + 1} probes theory expects a standard error of "
        f"{100 * norm['sem'][last] / norm['exact']:.2f} %, and {norm['counted']} trajectories are off by "
        f"{100 * norm['spread'][last] / norm['exact']:.2f} % (root mean square).",
        "## Seconds",
        "A second call, compiled as a graph, linearization included. The paper's are of its own UNet, on its own GPU, "
        "in 2021: these machines and networks differ, and the columns are not to be divided by each other.",
        table(
            ["what", "images", "seconds", "the paper's"],
            [
                [row["what"], str(row["images"]), f"{row['seconds']:.3g}", f"{row['paper_seconds'] or ''}"]
                for row in summary["figure4"]["seconds"]
            ],
        ),
        "## The trace",
        f"Root mean square error over {settings['trace_seeds']} draws, relative to ‖A‖_F; in brackets the "
        "reported standard error in units of the actual spread, which should be 1. The mean error is the largest one "
        "in units of what the draws let it be known to: far above 3 would be a bias. All counts, and matrices of one "
        "size, share their draws, so that they deviate together.",
        *trace_tables(summary["trace"]),
    ]


def convergence_rows(curves: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Heading and rows of the errors by steps."""
    heading = ["steps"]
    for curve in curves:
        name = f"{KINDS[curve['kind']]}, k={curve['k']}"
        heading += [f"{name}: jvpreg", "paper"]
    rows = []
    for step in sorted({step for curve in curves for step in curve["steps"]}):
        row = [str(step)]
        for curve in curves:
            for key, steps in (("ours", curve["ours_steps"]), ("paper", curve["steps"])):
                row.append(f"{np.median(curve[key][steps.index(step)]):.1e}" if step in steps else "")
        rows.append(row)
    return heading, rows


def trace_tables(matrices: dict[str, Any]) -> list[str]:
    """For each matrix its name and a table."""
    parts = []
    for label, found in matrices.items():
        methods = found["methods"]
        counts = zip(*methods.values(), strict=True)
        rows = [
            # Hutch++ and XTrace may spend a little less than they may.
            [str(max(row["matvecs"] for row in of_count)), *[cell(row, found["frobenius_norm"]) for row in of_count]]
            for of_count in counts
        ]
        rows.append(
            ["mean error", *[f"{max(abs(row['bias']) / row['bias_sem'] for row in m):.1f}" for m in methods.values()]]
        )
        parts += [
            f"{label[0].upper()}{label[1:]} (trace {found['trace']:.4g}, ‖A‖_F {found['frobenius_norm']:.4g}):",
            table(["products", *methods], rows),
        ]
    return parts


def cell(row: dict[str, float], norm: float) -> str:
    """An error, and the standard error that was reported."""
    return f"{row['error'] / norm:.1e} ({row['sem_over_spread']:.2f})"


def table(heading: list[str], rows: list[list[str]]) -> str:
    """In Markdown."""
    lines = [heading, ["---", *["---:"] * (len(heading) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def figure4(summary: dict[str, Any]) -> Figure:
    """The convergence of the values and the trajectories of the norm."""
    data = summary["figure4"]
    drawing = Figure(figsize=(14.0, 5.0), layout="constrained")
    panels = dict(zip(("singular", "eigen"), drawing.subplots(1, 3)[:2], strict=True))
    last = drawing.axes[2]
    for kind, axes in panels.items():
        for curve, color in zip((c for c in data["convergence"] if c["kind"] == kind), COLORS, strict=True):
            _curve(axes, curve, color)
        axes.set_yscale("log")
        axes.set_xscale("log")
        plain_numbers(axes.xaxis)
        axes.set_xticks([1, 2, 5, 10, 20, 40])
        axes.set_xlim(0.85, 1.15 * max(axes.dataLim.intervalx))
        axes.set_xlabel(STEPS[kind])
        axes.set_ylabel("largest error of the $k$ values / largest value")
        axes.set_title(TITLES[kind], loc="left", fontsize=10)
    _trajectories(last, data["frobenius_norm"])
    handles, labels = panels["singular"].get_legend_handles_labels()
    drawing.legend(handles, labels, loc="outside lower left", ncols=2, fontsize=9, handlelength=4)
    return drawing


def _curve(axes: Axes, curve: dict[str, Any], color: str) -> None:
    """The medians over examples, and the middle half of them."""
    k, number = curve["k"], curve["examples"]
    few = f"$k$ = {k}, {number} inputs"
    for key, steps, style, label in (
        ("ours", curve["ours_steps"], "-", f"jvpreg, {few}"),
        ("paper", curve["steps"], "--", f"{PAPER}, {few}"),
        ("reported", curve["ours_steps"], ":", f"jvpreg's own residual, $k$ = {k}"),
    ):
        if not steps:
            continue
        lower, median, upper = np.quantile(np.asarray(curve[key]), (0.25, 0.5, 0.75), axis=1)
        marker = "" if key == "reported" else "o"
        width = 1.2 if key == "reported" else 1.8
        axes.plot(steps, median, style, color=color, marker=marker, markersize=3, linewidth=width, label=label)
        if key != "reported":
            axes.fill_between(steps, lower, upper, color=color, alpha=0.15, linewidth=0)


def _trajectories(axes: Axes, norm: dict[str, Any]) -> None:
    counts = np.arange(1, len(norm["sem"]) + 1)
    exact, sem = norm["exact"], np.asarray(norm["sem"])
    for number, values in enumerate(norm["trajectories"]):
        axes.plot(counts, values, color="C0", linewidth=0.9, alpha=0.8, label=None if number else "one trajectory each")
    axes.fill_between(
        counts, exact - sem, exact + sem, color="C1", alpha=0.3, linewidth=0, label="exact ± 1 standard error (theory)"
    )
    axes.axhline(exact, color="black", linewidth=1.4, label=r"exact $\Vert J\Vert_F$, of the whole Jacobian")
    axes.set_xlim(1, counts[-1])
    axes.set_xlabel("probes $u$, uniform on the sphere of radius $\\sqrt{D}$")
    axes.set_ylabel(r"root of the mean of $\Vert J u\Vert^2$ so far")
    axes.set_title(r"Monte-Carlo estimate of $\Vert J\Vert_F$ at one input", loc="left", fontsize=10)
    axes.legend(fontsize=8)


def trace(summary: dict[str, Any]) -> Figure:
    """The errors of the trace, and the reported standard errors against the actual spread."""
    matrices = summary["trace"]
    drawing = Figure(figsize=(4.3 * len(matrices), 6.4), layout="constrained")
    grid = drawing.subplots(2, len(matrices), sharex="col", sharey="row", squeeze=False, height_ratios=(3, 2))
    for column, (label, found) in enumerate(matrices.items()):
        error, sem = grid[0, column], grid[1, column]
        for method, rows in found["methods"].items():
            name, color, marker = METHODS[method]
            spent = [row["matvecs"] for row in rows]
            style = {"color": color, "marker": marker, "markersize": 4, "label": name}
            error.plot(spent, [row["error"] / found["frobenius_norm"] for row in rows], **style)
            sem.plot(spent, [row["sem_over_spread"] for row in rows], **style)
        error.set_yscale("log")
        error.tick_params(labelleft=True)
        error.set_title(
            f"{label}\n(trace {found['trace']:.3g}, Frobenius norm {found['frobenius_norm']:.3g})",
            loc="left",
            fontsize=10,
        )
        sem.axhline(1.0, color="black", linewidth=1, linestyle=":")
        sem.set_ylim(0, 1.4)
        sem.set_xlabel("products with the matrix")
    grid[0, 0].set_ylabel(r"root mean square error of the trace / $\Vert A\Vert_F$")
    grid[1, 0].set_ylabel("reported standard error\n/ actual spread")
    grid[0, 0].legend()
    return drawing


STUDY = Study("estimators", measured, page, {"figure4": figure4, "trace": trace}, indent=1)
