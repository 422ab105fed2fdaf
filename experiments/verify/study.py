"""The `verify` study: a row an architecture, written as soon as it is there."""

import json
import shlex
from pathlib import Path
from typing import Any

import keras

from experiments import files, tables, timing
from experiments.config import as_plain_dict
from experiments.errors import say
from experiments.verify import architectures, measure, report
from experiments.verify.architectures import Architecture
from experiments.verify.config import VerifyConfig


def run(config: VerifyConfig) -> dict[str, Any]:
    """Verify the architectures, and write and print what came out.

    Args:
        config: see `VerifyConfig`.

    Returns:
        What `verify.json` holds: the settings, the machine, and a row an architecture.

    Raises:
        ExperimentError: where the name of an architecture is not known.
    """
    chosen = chosen_architectures(config)
    console = tables.wide_console(240)
    folder = Path(config.folder or f"runs/verify-{keras.backend.backend()}")
    settings = as_plain_dict(config)
    summary: dict[str, Any] = {
        "study": "verify",
        "command": command(config),
        "settings": settings,
        "machine": timing.machine(),
        "rows": kept_rows(folder) if config.resume else [],
    }
    kept = {row["name"] for row in summary["rows"]}
    for architecture in chosen:
        if architecture.name in kept:
            continue
        console.print(f"verifying {architecture.name}")
        row = {
            "name": architecture.name,
            "input_shape": architecture.input_shape,
            **measure.row(architecture, config),
        }
        summary["rows"].append({**row, "status": report.status(row, settings)})
        write(summary, folder)
    summary["rows"].sort(key=lambda row: [a.name for a in architectures.ARCHITECTURES].index(row["name"]))
    write(summary, folder)
    console.print(tables.grid(report.rows(summary)))
    for paragraph in [report.conditions(summary), *report.notes(summary)]:
        console.print(paragraph)
    console.print(f"Files: {folder}")
    return summary


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


def write(summary: dict[str, Any], folder: Path) -> None:
    """Write verify.json and verify.md."""
    files.write_json(folder / "verify.json", summary)
    files.write_text(folder / "verify.md", report.markdown(summary))


def command(config: VerifyConfig) -> str:
    """The command line of a run."""
    settings, default = as_plain_dict(config), as_plain_dict(VerifyConfig())
    words = [
        shlex.quote(f"--{key}={json.dumps(value)}")
        for key, value in settings.items()
        if value != default[key] and key not in ("folder", "resume")
    ]
    return " ".join([f"KERAS_BACKEND={keras.backend.backend()} python -m experiments verify", *words])
