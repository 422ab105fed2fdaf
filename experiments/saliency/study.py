"""The `saliency` study: a page of maps, and curves of the most salient pixels removed or kept."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops
from rich.console import Console
from scipy import integrate

import jvpreg
from experiments import data, files
from experiments.errors import ExperimentError
from experiments.saliency import report
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
        areas = integrate.trapezoid(probabilities, config.fractions, axis=0)
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
    order = np.argsort(-maps.reshape(len(maps), -1), axis=1, kind="stable")
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.arange(order.shape[1])[None], axis=1)
    most = (rank < count).reshape(maps.shape)
    return np.where((most if kind == "remove" else ~most)[..., None], color, images).astype("float32")


def label_probabilities(model: keras.Model, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The softmax of each image's label, `(N,)`."""
    logits = model.predict(images, batch_size=256, verbose=0).astype("float64")
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (exponentials / exponentials.sum(axis=1, keepdims=True))[np.arange(len(images)), labels[: len(images)]]


STUDY = Study("saliency", measured, one_table("rows", report.columns, report.caption), {"curves": report.curves})
