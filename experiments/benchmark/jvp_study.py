"""The `benchmark jvp` study: what one Jacobian-vector product costs on whole architectures, beside its alternatives."""

import dataclasses
import functools
import json
from collections.abc import Iterator
from typing import Any

from experiments import tables
from experiments.benchmark import jvp_report, products_study, study
from experiments.benchmark.config import JvpConfig
from experiments.benchmark.products import directions, once
from experiments.benchmark.products_study import Task
from experiments.cells import Cell, work_off
from experiments.config import as_plain_dict
from experiments.processes import row
from experiments.verify import architectures
from experiments.verify.architectures import Architecture
from experiments.verify.measure import middle_kernel

NOT_COMPARED = ("folder", "only", "time_limit")
"""Keys on which what is measured of an architecture does not depend."""


def run(config: JvpConfig) -> dict[str, Any]:
    """Measure the architectures, and write and print what came out.

    An architecture's row is kept in a file of its own, and is not measured again where there is one.

    Args:
        config: see `JvpConfig`.

    Returns:
        What `jvp.json` holds: the settings, the machine, and a row an architecture.

    Raises:
        ExperimentError: where the name of an architecture is not known, or the folder is of other settings.
    """
    chosen = chosen_architectures(config)
    console = tables.wide_console(200)
    folder = study.folder("jvp", config)
    settings = {key: value for key, value in as_plain_dict(config).items() if key not in NOT_COMPARED}
    names = [architecture.name for architecture in chosen]
    listed = [
        Cell(folder / "cells" / f"{name}.json", settings, functools.partial(measured, name, config)) for name in names
    ]
    results = work_off(listed, lambda place, result: console.print(f"measured {names[place]}"))
    rows = [{"name": name, **found} for name, found in zip(names, results, strict=True)]
    summary = {"study": "benchmark jvp", **study.conditions(config), "rows": rows}
    jvp_report.write(summary, folder, console)
    return summary


def chosen_architectures(config: JvpConfig) -> list[Architecture]:
    """What `only` names, or those of the paper."""
    if config.only is not None:
        return architectures.named("only", config.only)
    return [architecture for architecture in architectures.ARCHITECTURES if architecture.paper]


def measured(name: str, config: JvpConfig) -> dict[str, Any]:
    """What could be measured of an architecture within the time limit; `failure` says why the rest was not.

    Args:
        name: of the architecture.
        config: of the study.
    """
    settings = json.dumps(dataclasses.asdict(config))
    return row("experiments.benchmark.jvp_process", [name, settings], config.time_limit, {})


def parts(architecture: Architecture, config: JvpConfig) -> Iterator[dict[str, Any]]:
    """Parts of a row as they are measured, so that what is there is kept if the rest takes too long."""
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
