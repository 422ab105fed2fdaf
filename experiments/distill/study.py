"""The `distill` study: tables 2 and 3 and figures 2 and 3 of Srinivas & Fleuret (2018)."""

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any

import keras
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

from experiments import cells, data, models, robustness
from experiments.config import ModelConfig, as_plain_dict
from experiments.distill import cell
from experiments.distill.config import DistillConfig
from experiments.errors import ExperimentError
from experiments.study import Rows, Study, ran_on
from experiments.train import trained_dataset, trained_model

PAPER = {
    "cifar10": {
        "cross-entropy": ("49.29 ± 1.6", "59.93 ± 0.1", "79.36 ± 0.04", "83.87 ± 0.1", "91.95 ± 0.1"),
        "activation": ("55.43 ± 2.1", "65.33 ± 2.2", "85.44 ± 0.1", "88.77 ± 0.3", "92.47 ± 0.1"),
        "i-Jacobian": ("55.73 ± 2", "67.22 ± 3.0", "85.84 ± 0.1", "89.30 ± 0.3", "92.04 ± 0.01"),
        "attention": ("68.11 ± 0.8", "74.44 ± 0.2", "85.88 ± 0.1", "88.61 ± 0.1", "91.20 ± 0.01"),
        "i-Jacobian + attention": ("70.83 ± 1.0", "77.06 ± 0.2", "86.51 ± 0.3", "89.63 ± 0.1", "90.68 ± 0.04"),
        "full-Jacobian": ("58.88 ± 0.2", "69.42 ± 1.4", "86.55 ± 0.1", "89.76 ± 0.1", "91.49 ± 0.05"),
        "full-Jacobian + attention": ("72.75 ± 0.4", "78.71 ± 0.1", "87.31 ± 0.3", "89.87 ± 0.3", "90.68 ± 0.1"),
    },
    "cifar100": {
        "cross-entropy": ("7.45 ± 0.3", "11.83 ± 0.4", "40.88 ± 0.8", "51.19 ± 0.01", "69.95 ± 0.2"),
        "activation": ("23.72 ± 1.3", "37.22 ± 0.2", "59.43 ± 0.02", "63.91 ± 0.2", "66.99 ± 0.2"),
        "i-Jacobian": ("27.27 ± 1.2", "41.47 ± 1", "61.83 ± 0.01", "65.43 ± 0.6", "66.92 ± 0.7"),
        "attention": ("38.18 ± 1.9", "46.39 ± 0.1", "60.27 ± 0.3", "64.28 ± 0.2", "66.53 ± 0.3"),
        "i-Jacobian + attention": ("42.75 ± 1.7", "51.16 ± 0.6", "62.62 ± 0.6", "65.38 ± 0.2", "67.25 ± 0.8"),
        "full-Jacobian": ("35.15 ± 0.5", "48.00 ± 0.4", "62.88 ± 0.1", "65.84 ± 0.1", "66.83 ± 0.1"),
        "full-Jacobian + attention": ("47.11 ± 0.9", "54.59 ± 0.2", "63.20 ± 0.4", "65.49 ± 0.1", "66.65 ± 0.4"),
    },
}
"""Tables 3 and 2 of Srinivas & Fleuret (2018): mean and deviation of two runs, by examples a class."""

PAPER_COLUMNS = {"cifar10": ("50", "100", "500", "1000", "5000"), "cifar100": ("5", "10", "50", "100", "500")}
PAPER_STUDENTS = {"cifar100": {"vgg4": "50.87", "vgg6": "58.08", "vgg11": "62.95"}}
"""Section 7.1.2, with full-Jacobian matching and 50 examples a class."""


def measured(config: DistillConfig, console: Console) -> dict[str, Any]:
    """The teacher, a row a method, and one a student, of the cells that are trained now or were before."""
    teacher, dataset = trained_model(config.teacher), trained_dataset(config.teacher)
    check(config, teacher)
    right = robustness.accuracy(teacher, dataset.test)
    console.print(f"the teacher has {100 * right:.2f}% of the test images right")
    subsets = {n: data.balanced_subset(dataset, n * dataset.num_classes) for n in config.examples_per_class}

    def one(method: str, count: int, seed: int, student: ModelConfig) -> cells.Cell:
        return cells.Cell(
            Path(config.folder) / "cells" / f"{method}, {student.name}, {count} a class, seed {seed}.json",
            settings(config, method, count, seed, student),
            functools.partial(train_cell, config, method, subsets[count], seed, student),
        )

    def told(result: dict[str, Any]) -> str:
        return f"{100 * result['test_accuracy']:.2f}% of the test images, {result['angle']:.1f}°"

    last, first = config.methods[-1], config.examples_per_class[0]
    keyed: list[tuple[Any, cells.Cell]] = [
        ((method, count), one(method, count, seed, config.student))
        for count, method, seed in itertools.product(config.examples_per_class, config.methods, config.seeds)
    ]
    for name, seed in itertools.product(config.student_sizes, config.seeds):
        keyed.append((name, one(last, first, seed, dataclasses.replace(config.student, name=name))))
    found = cells.by_key(keyed, console, told)
    return {
        "data": dataset.name,
        "teacher": {"model": teacher.name, "test_accuracy": right},
        "rows": [
            {"method": method, "columns": {str(count): found[method, count] for count in config.examples_per_class}}
            for method in config.methods
        ],
        "students": [{"student": name, "results": found[name]} for name in config.student_sizes],
    }


def check(config: DistillConfig, teacher: keras.Model) -> None:
    """An error where the teacher or a student has not the stages that are matched."""
    for name in (teacher.name, config.student.name, *config.student_sizes):
        if name not in models.VGG_STAGES:
            raise ExperimentError(f"teacher and student must be VGGs, whose stages are known. Received: {name}.")
        if max(config.stages) > len(models.VGG_STAGES[name]):
            raise ExperimentError(
                f"stages: {name} has {len(models.VGG_STAGES[name])} stages. Received: {config.stages}."
            )


def settings(config: DistillConfig, method: str, count: int, seed: int, student: ModelConfig) -> dict[str, Any]:
    """All that the result of a cell depends on: of the weights, those that its method has."""
    shared = as_plain_dict(config, without=("methods", "examples_per_class", "seeds", "student_sizes", "folder"))
    weights = {name: shared["weights"][name] for name in cell.MATCHED[method]}
    return {
        **shared,
        "student": as_plain_dict(student),
        "weights": weights,
        "method": method,
        "examples_per_class": count,
        "seed": seed,
    }


def train_cell(
    config: DistillConfig, method: str, dataset: data.Dataset, seed: int, student: ModelConfig
) -> dict[str, Any]:
    """Train one cell, on a teacher of its own: the graphs of the cells before it are forgotten."""
    keras.utils.clear_session()
    teacher = trained_model(config.teacher)
    keras.utils.set_random_seed(seed)
    return cell.trained(config, method, teacher, models.build(student, dataset), dataset, seed)


def columns(row: dict[str, Any], data: str) -> dict[str, str]:
    """One method's accuracies, by the heading of their column."""
    paper = dict(zip(PAPER_COLUMNS.get(data, ()), PAPER.get(data, {}).get(row["method"], ()), strict=True))
    result = {"method": row["method"]}
    for count, results in row["columns"].items():
        result[f"{count} a class"] = accuracy(results)
        result[f"paper, {count}"] = paper.get(count, "–")
    return result


def angle_columns(row: dict[str, Any]) -> dict[str, str]:
    """One method's angles, by the heading of their column."""
    angles = {f"angle, {count} a class": angle(results) for count, results in row["columns"].items()}
    return {"method": row["method"], **angles}


def student_columns(row: dict[str, Any], data: str) -> dict[str, str]:
    """One student, by the heading of its column."""
    return {
        "model": row["student"],
        "accuracy": accuracy(row["results"]),
        "paper": PAPER_STUDENTS.get(data, {}).get(row["student"], "–"),
        "angle": angle(row["results"]),
    }


def accuracy(results: list[dict[str, Any]]) -> str:
    """On the test images, in %, with its deviation."""
    return cells.percent([one["test_accuracy"] for one in results])


def angle(results: list[dict[str, Any]]) -> str:
    """In degrees."""
    return f"{np.mean([one['angle'] for one in results]):.1f}"


def caption(summary: dict[str, Any]) -> str:
    """What the figures mean and where they are from."""
    settings, teacher = summary["settings"], summary["teacher"]
    student = settings["student"]
    weights = ", ".join(f"{name} {value:g}" for name, value in settings["weights"].items())
    return (
        f"Test accuracy in %, mean ± deviation over seeds {', '.join(map(str, settings['seeds']))}, by training "
        "examples a class; angle: mean degrees between the input-Jacobians of student and teacher for the label's "
        f"logit, on {settings['probed']} test images. Paper: Srinivas & Fleuret (2018), tables 2 and 3, with networks "
        f"of a width that is not given. {summary['data']}; teacher {teacher['model'].upper()} of {settings['teacher']} "
        f"({100 * teacher['test_accuracy']:.2f}%), student {student['name'].upper()} of width {student['width']}. "
        f"Weights: {weights}; stages {', '.join(map(str, settings['stages']))}. {settings['steps']} steps of "
        f"{settings['batch_size']} {'augmented ' if settings['augment'] else ''}examples, "
        f"{settings['optimizer']['name']} {settings['optimizer']['learning_rate']:g} falling along a cosine. "
        f"{ran_on(summary)}"
    )


def page(summary: dict[str, Any]) -> list[Rows | str]:
    """The tables of the methods and, if there are several, of the students, and what they mean."""
    rows, data = summary["rows"], summary["data"]
    found = [[columns(row, data) for row in rows], [angle_columns(row) for row in rows]]
    if summary["students"]:
        found.append([student_columns(row, data) for row in summary["students"]])
    return [*found, caption(summary)]


def methods(summary: dict[str, Any]) -> Figure:
    """The curves of the methods, at the first number of examples."""
    first = summary["settings"]["examples_per_class"][0]
    found = {row["method"]: row["columns"][str(first)] for row in summary["rows"]}
    return figure(found, f"{first} examples a class")


def students(summary: dict[str, Any]) -> Figure | None:
    """The curves of the students, if there are several."""
    settings = summary["settings"]
    title = f"{settings['methods'][-1]}, {settings['examples_per_class'][0]} examples a class"
    found = {row["student"]: row["results"] for row in summary["students"]}
    return figure(found, title) if found else None


def figure(results: dict[str, list[dict[str, Any]]], title: str) -> Figure:
    """Angle and accuracy over the training steps, the mean over the seeds.

    Args:
        results: by the label of the curve.
        title: of the page.
    """
    page = Figure(figsize=(9.5, 4), layout="constrained")
    angles, accuracies = page.subplots(1, 2)
    for number, (label, several) in enumerate(results.items()):
        color = f"C{number}"
        histories = [one["history"] for one in several]
        if "train_angle" in histories[0]:
            curve(angles, histories, "train_angle", color, linestyle="-")
            curve(angles, histories, "val_angle", color, linestyle="--")
        curve(accuracies, histories, "val_accuracy", color, scale=100, label=label)
    angles.set_ylabel("angle of the input-Jacobians (degrees)\n– training, -- test images")
    accuracies.set_ylabel("test accuracy (%)")
    for axes in (angles, accuracies):
        axes.set_xlabel("training step")
    page.suptitle(title, fontsize=10)
    page.legend(*accuracies.get_legend_handles_labels(), loc="outside right center")
    return page


def curve(axes: Axes, histories: list[dict[str, Any]], key: str, color: str, scale: float = 1, **style: Any) -> None:
    """The mean of a column, and the band of its deviation over the seeds."""
    values = scale * np.array([history[key] for history in histories])
    steps, mean, deviation = histories[0]["step"], values.mean(axis=0), values.std(axis=0)
    axes.plot(steps, mean, color=color, **style)
    axes.fill_between(steps, mean - deviation, mean + deviation, color=color, alpha=0.15, linewidth=0)


STUDY = Study("distill", measured, page, {"methods": methods, "students": students}, columns=200)
