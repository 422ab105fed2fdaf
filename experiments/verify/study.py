"""The `verify` study: a row an architecture, or a model of a zoo, written as soon as it is there."""

import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
from rich.console import Console

from experiments import files
from experiments.config import as_plain_dict
from experiments.errors import say
from experiments.study import Study
from experiments.verify import architectures, measure, report
from experiments.verify.architectures import Architecture
from experiments.verify.config import VerifyConfig
from experiments.verify.zoos import measure as zoo_measure
from experiments.verify.zoos import member
from experiments.verify.zoos import report as zoo_report


def run(config: VerifyConfig) -> dict[str, Any]:
    """The study of the architectures, or of a zoo."""
    return (STUDY if config.zoo == "applications" else ZOO_STUDIES[config.zoo]).run(config)


def measured(config: VerifyConfig, console: Console) -> dict[str, Any]:
    """The command, and a row an architecture."""

    def row(architecture: Architecture) -> dict[str, Any]:
        found = {"input_shape": architecture.input_shape, **measure.row(architecture, config)}
        return {**found, "status": report.status(found, as_plain_dict(config))}

    order = [architecture.name for architecture in architectures.ARCHITECTURES]
    return rows_of(STUDY, chosen_architectures(config), order, row, config, console)


def measured_zoo(config: VerifyConfig, console: Console) -> dict[str, Any]:
    """The command, and a row a model of a zoo."""

    def row(model: Any) -> dict[str, Any]:
        found = {"at": model.at, **zoo_measure.row(model, config)}
        return {**found, "status": zoo_report.status(found, as_plain_dict(config))}

    order = [model.name for model in member.members(config.zoo)]
    return rows_of(ZOO_STUDIES[config.zoo], member.named(config.zoo, config.only), order, row, config, console)


def rows_of(
    study: Study, chosen: Sequence[Any], order: list[str], row: Callable, config: VerifyConfig, console: Console
) -> dict[str, Any]:
    """The command, and a row for each of what is chosen; the files are written after each of them.

    Args:
        study: whose files they are.
        chosen: what is verified, each with a `name`.
        order: of the names in the table.
        row: from one of the chosen to its row.
        config: of the study.
        console: on which it is told how far it is.
    """
    folder = study.folder(config)
    rows = kept_rows(folder) if config.resume else []
    found = {"command": command(config), "rows": rows}
    summary = {**study.conditions(config), **found}
    kept = {row["name"] for row in rows}
    for one in chosen:
        if one.name not in kept:
            console.print(f"verifying {one.name}")
            rows.append({"name": one.name, **row(one)})
            study.write(summary, folder)
    rows.sort(key=lambda row: order.index(row["name"]))
    return found


def chosen_architectures(config: VerifyConfig) -> list[Architecture]:
    """What `only` names."""
    return list(architectures.ARCHITECTURES) if config.only is None else architectures.named("only", config.only)


def kept_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of an interrupted run that are ok."""
    file = folder / "verify.json"
    kept = (files.read_object(file) or {}).get("rows")
    if kept is None and file.exists():
        say(f"{file} is damaged: all architectures are measured again.")
    return [row for row in kept or [] if row["status"] == "ok"]


def command(config: VerifyConfig) -> str:
    """The command line of a run."""
    settings, default = as_plain_dict(config), as_plain_dict(VerifyConfig())
    words = [
        shlex.quote(f"--{key}={value if isinstance(value, str) else json.dumps(value)}")
        for key, value in settings.items()
        if value != default[key] and key not in ("folder", "resume")
    ]
    return " ".join([f"KERAS_BACKEND={keras.backend.backend()} python -m experiments verify", *words])


STUDY = Study("verify", measured, report.page, columns=240)
ZOO_STUDIES = {
    zoo: Study(f"verify-{zoo}", measured_zoo, zoo_report.page(zoo), columns=200, stem="verify")
    for zoo in zoo_report.TITLES
}
