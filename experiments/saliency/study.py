"""The `saliency` study: a page of maps, and curves of the most salient pixels removed or kept."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops
from matplotlib.figure import Figure
from rich.console import Console
from scipy.integrate import trapezoid
from scipy.special import softmax
from scipy.stats import rankdata

import jvpreg
from experiments import data, files
from experiments.errors import ExperimentError
from experiments.saliency.config import SaliencyConfig
from experiments.study import Study, one_table
from experiments.train import trained_dataset, trained_model

RANDOM = "random pixels"
METHODS = {**jvpreg.attribution.saliency.METHODS, RANDOM: None}


def measured(config: SaliencyConfig, console: Console) -> dict[str, Any]:
    """The curves of each method; and the maps, which are drawn at once."""
    model, test = trained_model(config.run), trained_dataset(config.run).test
    images, labels = recognized(model, test, max(config.examples, config.shown))
    maps = {}
    for name in METHODS:
        console.print(f"mapping {name}")
        maps[name] = salient(model, images, labels, name, config)
    mean = test.images().mean(axis=(0, 1, 2))
    rows = [row(model, images[: config.examples], labels, name, maps[name], mean, config) for name in METHODS]
    shown = {name: salient[: config.shown] for name, salient in maps.items() if name != RANDOM}
    page = jvpreg.attribution.saliency.figure(images[: config.shown], shown)
    files.save_figure(page, Path(config.folder) / "maps.png")
    return {"model": model.name, "examples": len(images[: config.examples]), "rows": rows}


def recognized(model: keras.Model, test: data.Split, number: int) -> tuple[np.ndarray, np.ndarray]:
    """The first test images that the model gets right, `(N, H, W, C)`, and their labels `(N,)`.

    Raises:
        ExperimentError: there are none.
    """
    images = test.images()
    right = np.flatnonzero(model.predict(images, batch_size=256, verbose=0).argmax(axis=1) == test.labels)
    if not len(right):
        raise ExperimentError("run: the model gets none of its test images right.")
    return images[right[:number]], test.labels[right[:number]]


def salient(
    model: keras.Model, images: np.ndarray, labels: np.ndarray, name: str, config: SaliencyConfig
) -> np.ndarray:
    """The absolute map of each image by one method, `(N, H, W)`."""
    method: Callable | None = METHODS[name]
    if method is None:
        return np.random.default_rng(config.seed).random(images.shape[:3])
    parts = []
    for start in range(0, len(images), config.batch_size):
        chosen = slice(start, start + config.batch_size)
        parts.append(np.abs(ops.convert_to_numpy(ops.stop_gradient(method(model, images[chosen], labels[chosen])))))
    return np.concatenate(parts)


def row(
    model: keras.Model,
    images: np.ndarray,
    labels: np.ndarray,
    name: str,
    maps: np.ndarray,
    color: np.ndarray,
    config: SaliencyConfig,
) -> dict[str, Any]:
    """A method's curves: the label's mean probability over the fractions, and the area below, with their errors."""
    result: dict[str, Any] = {"method": name}
    for kind in ("remove", "keep"):
        probabilities = np.array(
            [
                label_probabilities(model, disturbed(images, maps[: len(images)], fraction, kind, color), labels)
                for fraction in config.fractions
            ]
        )
        areas = trapezoid(probabilities, config.fractions, axis=0)
        root = np.sqrt(len(images))
        result[kind] = {
            "mean": probabilities.mean(axis=1).tolist(),
            "sem": (probabilities.std(axis=1, ddof=1) / root).tolist(),
            "area": float(areas.mean()),
            "area_sem": float(areas.std(ddof=1) / root),
        }
    return result


def disturbed(images: np.ndarray, maps: np.ndarray, fraction: float, kind: str, color: np.ndarray) -> np.ndarray:
    """The images with the most salient fraction of pixels in one color, or, for "keep", all others.

    Args:
        images: `(N, H, W, C)`.
        maps: `(N, H, W)`.
        fraction: of the pixels.
        kind: "remove" or "keep".
        color: `(C,)`.
    """
    count = round(fraction * maps[0].size)
    rank = rankdata(-maps.reshape(len(maps), -1), method="ordinal", axis=1)
    most = (rank <= count).reshape(maps.shape)
    return np.where((most if kind == "remove" else ~most)[..., None], color, images).astype("float32")


def label_probabilities(model: keras.Model, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The softmax of each image's label, `(N,)`."""
    logits = model.predict(images, batch_size=256, verbose=0).astype("float64")
    return softmax(logits, axis=1)[np.arange(len(images)), labels[: len(images)]]


def columns(row: dict[str, Any]) -> dict[str, str]:
    """One method, by the heading of its column."""
    areas = {kind: f"{row[kind]['area']:.3f} ± {row[kind]['area_sem']:.3f}" for kind in ("remove", "keep")}
    return {"map": row["method"], "removed (less is better)": areas["remove"], "kept (more is better)": areas["keep"]}


def caption(summary: dict[str, Any]) -> str:
    """What the figures mean and where they are from."""
    machine = summary["machine"]
    return (
        "The probability of the label, averaged over the parts of the pixels that are removed, the most salient "
        "first, or kept, the most salient only; the others have the mean color of the test images. "
        f"{summary['model'].upper()} of {summary['settings']['run']}, on the first {summary['examples']} test images "
        "that it gets right; ± is the standard error over them. "
        f"Keras {machine['keras']}, {machine['backend']}."
    )


def curves(summary: dict[str, Any]) -> Figure:
    """The label's probability over the part of the pixels that is removed, or kept."""
    fractions = 100 * np.asarray(summary["settings"]["fractions"])
    page = Figure(figsize=(9, 4), layout="constrained")
    for axes, kind in zip(page.subplots(1, 2, sharey=True), ("remove", "keep"), strict=True):
        for number, row in enumerate(summary["rows"]):
            mean, sem = (np.asarray(row[kind][part]) for part in ("mean", "sem"))
            random = row["method"].startswith("random")
            color = "0.5" if random else f"C{number}"
            axes.plot(fractions, mean, color=color, linestyle="--" if random else "-", label=row["method"])
            axes.fill_between(fractions, mean - sem, mean + sem, color=color, alpha=0.15, linewidth=0)
        axes.set_xlabel(f"most salient pixels {'removed' if kind == 'remove' else 'kept'} (%)")
    page.axes[0].set_ylabel("probability of the label")
    page.legend(*page.axes[0].get_legend_handles_labels(), loc="outside right center")
    return page


STUDY = Study("saliency", measured, one_table("rows", columns, caption), {"curves": curves})
