"""The pictures of what a `JacobianProbe` measured, epoch by epoch."""

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jvpreg.callbacks.measured import Result
from jvpreg.callbacks.symbols import symbol
from jvpreg.estimators import Estimate, SpectralDensity

STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.92",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 3.5,
    "font.size": 10,
}
DPI = 120
GRID = 160  # points of a density's axis


def history_png(name: str, epochs: Sequence[int], results: Sequence[Result]) -> bytes:
    """Draws the history of a metric.

    Args:
        name: of the metric, as in `JacobianProbe.values`.
        epochs: the epochs that were measured, counted from 0.
        results: what was measured at each of them.

    Returns:
        The bytes of a PNG file.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    metric = name.rpartition("/")[2]
    draw: Callable = _curves
    if isinstance(results[0], SpectralDensity):
        draw = _density
    elif np.iscomplexobj(results[0].value):
        draw = _eigenvalues
    with matplotlib.rc_context(STYLE):
        # Not through pyplot: it would keep every figure, and open a window if there is a screen.
        figure = Figure(figsize=(5.6, 3.8), layout="constrained")
        axes = figure.subplots()
        # Keras' progress bar counts epochs from 1.
        draw(figure, axes, np.asarray(epochs) + 1, results, metric)
        if draw is not _eigenvalues:
            axes.set_xlabel("epoch")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_title(name.replace("_", " "), fontsize=10, loc="left")
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=DPI)
    return file.getvalue()


def mean_density(density: SpectralDensity) -> tuple[np.ndarray, np.ndarray]:
    """The density averaged over the examples, `(GRID,)`, at points that span those of all examples."""
    points, values = (np.asarray(part, "float64") for part in (density.points, density.value))
    finite = np.isfinite(points).all(axis=1) & np.isfinite(values).all(axis=1)
    points, values = points[finite], values[finite]
    grid = np.linspace(0.0, points.max() if finite.any() else 1.0, GRID)
    rows = [np.interp(grid, at, value, right=0.0) for at, value in zip(points, values, strict=True)]
    return grid, np.mean(rows, axis=0) if rows else np.full(GRID, np.nan)


def _curves(figure: Any, axes: Any, epochs: np.ndarray, estimates: Sequence[Estimate], metric: str) -> None:
    """The mean over the examples, with its standard error as bars, and the middle 80 % of the examples as a band."""
    import matplotlib

    values = np.stack([estimate.value for estimate in estimates]).astype("float64")
    numbers = values.reshape(*values.shape[:2], -1)  # (E, B, k)
    count = numbers.shape[2]
    colors = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.85, count))
    with np.errstate(invalid="ignore"):
        means = numbers.mean(axis=1)
        spread = numbers.std(axis=1, ddof=1) if numbers.shape[1] > 1 else np.full_like(means, np.nan)
        sems = spread / np.sqrt(numbers.shape[1])
        low, high = np.quantile(numbers, [0.1, 0.9], axis=1)
    for i, color in enumerate(colors):
        axes.fill_between(epochs, low[:, i], high[:, i], color=color, alpha=0.3 / count**0.5, linewidth=0)
        axes.errorbar(epochs, means[:, i], sems[:, i], color=color, marker="o", capsize=2, elinewidth=1)
    axes.set_ylabel(symbol(metric).tex)
    if count > 1 and (means[np.isfinite(means)] >= 0).all():
        axes.set_ylim(bottom=0)
    if numbers.shape[1] > 1:
        caption = "mean ± standard error over the examples; band: the middle 80 % of them"
        figure.supxlabel(caption, fontsize=7.5, color="0.4")
    if 1 < count <= 10:
        for i, color in enumerate(colors):
            # Of a metric without a symbol only the number.
            label = symbol(f"{metric}_{i + 1}").tex.removeprefix(f"{metric}_")
            axes.plot([], [], color=color, marker="o", label=label)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def _eigenvalues(figure: Any, axes: Any, epochs: np.ndarray, estimates: Sequence[Estimate], metric: str) -> None:
    """The eigenvalues of all examples in the complex plane; later epochs are lighter."""
    import matplotlib
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.ticker import MaxNLocator

    colors = matplotlib.colormaps["viridis"](np.linspace(0.0, 1.0, len(epochs)))
    for estimate, color in zip(estimates, colors, strict=True):
        value = np.ravel(estimate.value)
        # Only one of a conjugate pair may be among the largest.
        both = np.concatenate([value, value.conj()])
        axes.plot(both.real, both.imag, ".", color=color, markersize=4, alpha=0.7)
    circle = np.exp(1j * np.linspace(0, 2 * np.pi, 200))
    axes.plot(circle.real, circle.imag, color="0.7", linewidth=0.8, zorder=0)
    axes.set_aspect("equal", adjustable="datalim")
    axes.set_xlabel(r"$\mathrm{Re}\,\lambda$")
    axes.set_ylabel(r"$\mathrm{Im}\,\lambda$")
    limits = Normalize(epochs[0], max(epochs[-1], epochs[0] + 1))
    figure.colorbar(ScalarMappable(limits, "viridis"), ax=axes, label="epoch", ticks=MaxNLocator(integer=True))


def _density(figure: Any, axes: Any, epochs: np.ndarray, densities: Sequence[SpectralDensity], metric: str) -> None:
    """The density averaged over the examples, as a column of colors for each epoch."""
    from matplotlib.colors import PowerNorm

    means = [mean_density(density) for density in densities]
    grid = np.linspace(0.0, max(at[-1] for at, _ in means), GRID)
    columns = np.stack([np.interp(grid, at, mean, right=0.0) for at, mean in means], axis=1)
    edges = np.concatenate([epochs - 0.5, [epochs[-1] + 0.5]])
    # Most singular values are small: a linear scale would show only their peak.
    image = axes.pcolormesh(edges, grid, columns[:-1], cmap="viridis", norm=PowerNorm(0.4, vmin=0.0), rasterized=True)
    axes.grid(False)
    axes.set_ylabel(r"$\sigma$")
    figure.colorbar(image, ax=axes, label="density")
