"""The `distill` study: tables 2 and 3 and figures 2 and 3 of Srinivas & Fleuret (2018)."""

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any

import keras
from rich.console import Console

from experiments import cells, data, models
from experiments.config import ModelConfig, as_plain_dict
from experiments.distill import cell, report
from experiments.distill.config import DistillConfig
from experiments.errors import ExperimentError
from experiments.study import Study
from experiments.train import trained_dataset, trained_model


def measured(config: DistillConfig, console: Console) -> dict[str, Any]:
    """The teacher, a row a method, and one a student, of the cells that are trained now or were before."""
    teacher, dataset = trained_model(config.teacher), trained_dataset(config.teacher)
    check(config, teacher)
    accuracy = teacher_accuracy(teacher, dataset)
    console.print(f"the teacher has {100 * accuracy:.2f}% of the test images right")
    subsets = {n: data.balanced_subset(dataset, n * dataset.num_classes) for n in config.examples_per_class}

    def one(method: str, count: int, seed: int, student: ModelConfig) -> cells.Cell:
        return cells.Cell(
            Path(config.folder) / "cells" / f"{method}, {student.name}, {count} a class, seed {seed}.json",
            settings(config, method, count, seed, student),
            functools.partial(train_cell, config, method, subsets[count], seed, student),
        )

    def tell(place: int, result: dict[str, Any]) -> None:
        accuracy = f"{100 * result['test_accuracy']:.2f}% of the test images"
        console.print(f"{listed[place].path.stem}: {accuracy}, {result['angle']:.1f}°")

    by_method = list(itertools.product(config.examples_per_class, config.methods, config.seeds))
    by_student = list(itertools.product(config.student_sizes, config.seeds))
    last, first = config.methods[-1], config.examples_per_class[0]
    listed = [one(method, count, seed, config.student) for count, method, seed in by_method]
    listed += [one(last, first, seed, dataclasses.replace(config.student, name=name)) for name, seed in by_student]
    results = iter(cells.work_off(listed, tell))
    columns: dict[str, dict[str, list]] = {method: {} for method in config.methods}
    for count, method, _ in by_method:
        columns[method].setdefault(str(count), []).append(next(results))
    sizes: dict[str, list] = {name: [] for name in config.student_sizes}
    for name, _ in by_student:
        sizes[name].append(next(results))
    return {
        "data": dataset.name,
        "teacher": {"model": teacher.name, "test_accuracy": accuracy},
        "rows": [{"method": method, "columns": found} for method, found in columns.items()],
        "students": [{"student": name, "results": found} for name, found in sizes.items()],
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


def teacher_accuracy(teacher: keras.Model, dataset: data.Dataset) -> float:
    """The part of the test images that the teacher gets right."""
    logits = teacher.predict(dataset.test.images(), batch_size=256, verbose=0)
    return float((logits.argmax(axis=1) == dataset.test.labels).mean())


STUDY = Study("distill", measured, report.page, {"methods": report.methods, "students": report.students}, columns=200)
