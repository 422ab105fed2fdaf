"""The `verify` study: a row an architecture, written as soon as it is there."""

import json
import shlex
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


def measured(config: VerifyConfig, console: Console) -> dict[str, Any]:
    """The command, and a row an architecture; the files are written after each of them."""
    chosen, folder = chosen_architectures(config), STUDY.folder(config)
    rows = kept_rows(folder) if config.resume else []
    found = {"command": command(config), "rows": rows}
    summary = {**STUDY.conditions(config), **found}
    kept = {row["name"] for row in rows}
    for architecture in chosen:
        if architecture.name in kept:
            continue
        console.print(f"verifying {architecture.name}")
        row = {
            "name": architecture.name,
            "input_shape": architecture.input_shape,
            **measure.row(architecture, config),
        }
        rows.append({**row, "status": report.status(row, summary["settings"])})
        STUDY.write(summary, folder)
    rows.sort(key=lambda row: [a.name for a in architectures.ARCHITECTURES].index(row["name"]))
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
        shlex.quote(f"--{key}={json.dumps(value)}")
        for key, value in settings.items()
        if value != default[key] and key not in ("folder", "resume")
    ]
    return " ".join([f"KERAS_BACKEND={keras.backend.backend()} python -m experiments verify", *words])


STUDY = Study("verify", measured, report.page, columns=240)
