"""The study as a table, as curves over the epochs, and as a page of generated digits."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments import cells
from experiments.study import ran_on

SIDE = 8
FIGURES = {"norm": r"$\Vert\nabla f\Vert$ between real and generated", "distance": "Fréchet distance"}


def name(strength: float) -> str:
    """A row's name."""
    return f"penalty {strength:g}" if strength else "no penalty"


def columns(row: dict[str, Any]) -> dict[str, str]:
    """One strength, by the heading of its column."""
    found = {key: cells.mean_and_deviation([one[key][-1] for one in row["results"]]) for key in FIGURES}
    told = {
        key: f"{mean:.3g}" + (f" ± {deviation:.1g}" if len(row["results"]) > 1 else "")
        for key, (mean, deviation) in found.items()
    }
    return {"critic": name(row["strength"]), "‖∇f‖": told["norm"], "Fréchet distance": told["distance"]}


def caption(summary: dict[str, Any]) -> str:
    """What the figures mean and where they are from."""
    settings = summary["settings"]
    return (
        f"Mean ± deviation over seeds {', '.join(map(str, settings['seeds']))} after {settings['epochs']} epochs of "
        f"the training digits of scikit-learn in batches of {settings['batch_size']}, {settings['critic_steps']} steps "
        f"of the critic for each of the generator; both have two hidden layers of {settings['width']} units, Adam "
        f"{settings['learning_rate']:g}. Penalty: strength × the mean of (‖∇f‖ − 1)², at random points between real "
        "and generated digits. ‖∇f‖: the mean of the critic's gradient, per pixel unit, at 1000 such points, with test "
        "digits. Fréchet distance: of the pixels' means and covariances, between test digits and 1000 generated ones, "
        f"per pixel unit; of 1000 training digits it is {summary['training_digits']:.2g}. {ran_on(summary)}"
    )


def curves(summary: dict[str, Any]) -> Figure:
    """The gradient's norm and the distance over the epochs, a line a seed."""
    page = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, (key, label) in zip(page.subplots(1, 2), FIGURES.items(), strict=True):
        for number, row in enumerate(summary["rows"]):
            for i, one in enumerate(row["results"]):
                axes.plot(one["epochs"], one[key], color=f"C{number}", label=None if i else name(row["strength"]))
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
    page.axes[0].set_yscale("log")
    page.axes[1].set_ylim(bottom=0)
    page.axes[0].axhline(1.0, color="0.6", linewidth=1)
    page.axes[0].legend()
    return page


def digits(summary: dict[str, Any]) -> Figure:
    """What each generator made of the same noise in the first seed: a row a strength, a column a snapshot."""
    rows = summary["rows"]
    epochs = rows[0]["results"][0]["epochs"]
    page = Figure(figsize=(1.6 * len(epochs), 1.75 * len(rows)), layout="constrained")
    grid = page.subplots(len(rows), len(epochs), squeeze=False)
    for row, line in zip(rows, grid, strict=True):
        for strings, axes in zip(row["results"][0]["pictures"], line, strict=True):
            axes.imshow(sheet(strings), cmap="gray_r", vmin=0, vmax=15)
            axes.set(xticks=[], yticks=[])
            axes.grid(visible=False)
            axes.spines[:].set_visible(False)
        line[0].set_ylabel(name(row["strength"]))
    for epoch, axes in zip(epochs, grid[0], strict=True):
        axes.set_title(f"epoch {epoch}", fontsize=9)
    return page


def sheet(strings: list[str]) -> np.ndarray:
    """Pictures, each a string of hexadecimal digits, side by side in as good as a square, with a margin between."""
    images = [np.array([int(pixel, 16) for pixel in string]).reshape(SIDE, SIDE) for string in strings]
    across = int(np.ceil(np.sqrt(len(images))))
    images += [np.zeros((SIDE, SIDE), int)] * (-len(images) % across)
    padded = [np.pad(image, 1) for image in images]
    return np.concatenate([np.concatenate(padded[i : i + across], axis=1) for i in range(0, len(padded), across)])
