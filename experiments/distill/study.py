"""The `distill` study: tables 2 and 3 and figures 2 and 3 of Srinivas & Fleuret (2018)."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import keras

from experiments import cells, data, models, tables, timing
from experiments.config import ModelConfig, as_plain_dict
from experiments.distill import cell, report
from experiments.distill.config import DistillConfig
from experiments.errors import ExperimentError
from experiments.train import trained_dataset, trained_model


def run(config: DistillConfig) -> dict[str, Any]:
    """Train the cells that are not trained yet, then write and print the tables and draw the figures.

    Args:
        config: see `DistillConfig`.

    Returns:
        What `distill.json` holds: the settings, the machine, the teacher, a row a method, and one a student.

    Raises:
        ExperimentError: there is no teacher, the data cannot be had or is too small, or the folder holds cells of
            other settings.
    """
    console = tables.wide_console(200)
    teacher, dataset = trained_model(config.teacher), trained_dataset(config.teacher)
    check(config, teacher)
    accuracy = teacher_accuracy(teacher, dataset)
    console.print(f"the teacher has {100 * accuracy:.2f}% of the test images right")
    subsets = {n: data.balanced_subset(dataset, n * dataset.num_classes) for n in config.examples_per_class}

    def trained(method: str, count: int, seed: int, student: ModelConfig) -> dict[str, Any]:
        name = f"{method}, {student.name}, {count} a class, seed {seed}"
        result = cells.finished_or_run(
            Path(config.folder) / "cells" / f"{name}.json",
            settings(config, method, count, seed, student),
            functools.partial(train_cell, config, method, subsets[count], seed, student),
        )
        console.print(f"{name}: {100 * result['test_accuracy']:.2f}% of the test images, {result['angle']:.1f}°")
        return result

    rows: list[dict[str, Any]] = [{"method": method, "columns": {}} for method in config.methods]
    for count in config.examples_per_class:
        for row in rows:
            row["columns"][str(count)] = [trained(row["method"], count, seed, config.student) for seed in config.seeds]
    first = config.examples_per_class[0]
    students = [
        {
            "student": name,
            "results": [
                trained(config.methods[-1], first, seed, dataclasses.replace(config.student, name=name))
                for seed in config.seeds
            ],
        }
        for name in config.student_sizes
    ]
    summary = {
        "study": "distill",
        "settings": as_plain_dict(config),
        "machine": timing.machine(),
        "data": dataset.name,
        "teacher": {"model": teacher.name, "test_accuracy": accuracy},
        "rows": rows,
        "students": students,
    }
    report.write(summary, Path(config.folder), console)
    return summary


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
    shared = as_plain_dict(config)
    for key in ("methods", "examples_per_class", "seeds", "student_sizes", "folder"):
        del shared[key]
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


def teacher_accuracy(teacher: keras.Model, dataset: data.Dataset) -> float:
    """The part of the test images that the teacher gets right."""
    logits = teacher.predict(dataset.test.images(), batch_size=256, verbose=0)
    return float((logits.argmax(axis=1) == dataset.test.labels).mean())
