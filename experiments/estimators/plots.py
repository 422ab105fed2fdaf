"""The two figures."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
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
        counts,
        exact - sem,
        exact + sem,
        color="C1",
        alpha=0.3,
        linewidth=0,
        label="exact ± 1 standard error (theory)",
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
