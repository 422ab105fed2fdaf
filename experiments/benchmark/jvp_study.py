"""The `benchmark jvp` study: what one Jacobian-vector product costs on whole architectures, beside its alternatives."""

import functools
from collections.abc import Iterator
from typing import Any

from rich.console import Console

from experiments import processes
from experiments.benchmark import jvp_report, products_study
from experiments.benchmark.config import JvpConfig
from experiments.benchmark.products import directions, once
from experiments.benchmark.products_study import Task
from experiments.benchmark.study import Benchmark
from experiments.cells import Cell, work_off
from experiments.config import as_plain_dict
from experiments.verify import architectures
from experiments.verify.architectures import Architecture
from experiments.verify.measure import middle_kernel

NOT_COMPARED = ("folder", "only", "time_limit")
"""Keys on which what is measured of an architecture does not depend."""


def measured(config: JvpConfig, console: Console) -> dict[str, Any]:
    """A row an architecture, and the means of the speed-ups.

    A row is kept in a file of its own, and an architecture is not measured again where there is one.
    """
    chosen = chosen_architectures(config)
    names = [architecture.name for architecture in chosen]
    cells_folder = STUDY.folder(config) / "cells"
    settings = as_plain_dict(config, without=NOT_COMPARED)
    listed = [
        Cell(cells_folder / f"{architecture.name}.json", settings, functools.partial(row, architecture, config))
        for architecture in chosen
    ]
    results = work_off(listed, lambda place, result: console.print(f"measured {names[place]}"))
    rows = [{"name": name, **found} for name, found in zip(names, results, strict=True)]
    return {"rows": rows, "geometric_means": jvp_report.means(rows, config.along)}


def chosen_architectures(config: JvpConfig) -> list[Architecture]:
    """What `only` names, or those of the paper."""
    if config.only is not None:
        return architectures.named("only", config.only)
    return [architecture for architecture in architectures.ARCHITECTURES if architecture.paper]


def row(architecture: Architecture, config: JvpConfig) -> dict[str, Any]:
    """What could be measured of an architecture within the time limit; `failure` says why the rest was not."""
    return processes.row(parts, (architecture, config), config.time_limit)


def parts(architecture: Architecture, config: JvpConfig) -> Iterator[dict[str, Any]]:
    """In a process of its own: parts of a row, so that what is there is kept if the rest takes too long."""
    subject = products_study.subject(architecture, config)
    yield {
        "input_shape": list(subject.x.shape[1:]),
        "output_shape": list(subject.model.output_shape[1:]),
        "parameters": subject.model.count_params(),
    }
    for along in dict.fromkeys(config.along):
        task = along_input(subject, config.num_probes, config) if along == "input" else along_weight(subject, config)
        yield {along: products_study.comparison(subject, task, config)}


def along_input(subject: products_study.Subject, num_probes: int, config: products_study.ProductsConfig) -> Task:
    """Products along the input."""
    return Task((), directions([subject.x.shape], num_probes, config.seed), once, once)


def along_weight(subject: products_study.Subject, config: JvpConfig) -> Task:
    """Products along the kernel in the middle of the model."""
    kernel = middle_kernel(subject.model.trainable_variables)
    place = next(place for place, variable in enumerate(subject.model.variables) if variable is kernel)
    return Task((place,), directions([tuple(kernel.shape)], config.num_probes, config.seed), once, once)


STUDY = Benchmark("jvp", measured, jvp_report.page, {"jvp": jvp_report.figure}, columns=200)
