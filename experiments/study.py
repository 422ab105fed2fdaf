"""What every study does: measure, write what came out as JSON, Markdown and pictures, and print the tables."""

import importlib
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras
import matplotlib
from matplotlib.figure import Figure
from rich.console import Console

from experiments import files, tables
from experiments.config import as_plain_dict
from experiments.plots import STYLE

Summary = dict[str, Any]
"""What a study's JSON file holds."""

Rows = list[dict[str, str]]
"""A table: cells by the heading of their column."""


@dataclass(frozen=True)
class Study:
    """A study: how it measures, and what is said of what came out.

    Attributes:
        name: in the summary, and of its files.
        measure: from the configuration, and a console on which it tells how far it is, to what the summary holds
            beside the settings and the machine. It raises an ExperimentError where keys do not fit each other.
        page: from the summary to the tables and paragraphs that are written and printed.
        figures: from the summary to a picture, or to None if there is nothing to draw; by the name of the file.
        columns: width of the tables, where the output is no terminal.
        indent: of the JSON file.
        stem: name of the JSON and the Markdown file, if it is not that of the study.
        home: the folder, if the configuration names none.
    """

    name: str
    measure: Callable[[Any, Console], dict[str, Any]]
    page: Callable[[Summary], list[Rows | str]]
    figures: Mapping[str, Callable[[Summary], Figure | None]] = field(default_factory=dict)
    columns: int = 120
    indent: int = 2
    stem: str | None = None
    home: str | None = None

    def run(self, config: Any) -> Summary:
        """Measure, and write and print what came out.

        Returns:
            The summary, which the JSON file holds.

        Raises:
            ExperimentError: where keys do not fit each other, or the data cannot be had.
        """
        console = tables.wide_console(self.columns)
        found = self.measure(config, console)
        summary = {**self.conditions(config), **found}
        self.write(summary, self.folder(config))
        self.tell(summary, self.folder(config), console)
        return summary

    def conditions(self, config: Any) -> Summary:
        """What the summary says beside the figures."""
        return {"study": self.name, "settings": as_plain_dict(config), "machine": machine()}

    def folder(self, config: Any) -> Path:
        """The folder that the configuration names, or one after the study and the backend."""
        return Path(config.folder or self.home or f"runs/{self.name}-{keras.backend.backend()}")

    def write(self, summary: Summary, folder: Path) -> None:
        """Write the JSON file, the Markdown file and the pictures."""
        stem = self.stem or self.name
        files.write_json(folder / f"{stem}.json", summary, self.indent)
        parts = [part if isinstance(part, str) else tables.grid_markdown(part) for part in self.page(summary)]
        files.write_text(folder / f"{stem}.md", "\n\n".join(parts) + "\n")
        for name, draw in self.figures.items():
            with matplotlib.rc_context(STYLE):
                drawing = draw(summary)
                if drawing is not None:
                    files.save_figure(drawing, folder / f"{name}.png")

    def tell(self, summary: Summary, folder: Path, console: Console) -> None:
        """Print the page, and where the files are."""
        for part in self.page(summary):
            # Not as markup: what is in brackets would be taken for a style.
            console.print(part if isinstance(part, str) else tables.grid(part), markup=False)
        console.print(f"Files: {folder}")


def one_table(
    key: str, columns: Callable[[dict[str, Any]], dict[str, str]], caption: Callable[[Summary], str]
) -> Callable[[Summary], list[Rows | str]]:
    """A page of one table and what it means: of the rows that the summary has under `key`."""
    return lambda summary: [[columns(row) for row in summary[key]], caption(summary)]


def machine() -> dict[str, str | int]:
    """What a time was measured on: processor, cores that this process may use, and versions."""
    backend = keras.backend.backend()
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "keras": keras.__version__,
        "backend": f"{backend} {importlib.import_module(backend).__version__}",
    }


def _processor() -> str:
    description = Path("/proc/cpuinfo")
    if description.exists():
        for line in description.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def ran_on(summary: Summary) -> str:
    """What a study ran on."""
    machine = summary["machine"]
    return f"{machine['cores']} cores of {machine['processor']}, Keras {machine['keras']}, {machine['backend']}."
