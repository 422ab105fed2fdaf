"""The study as a table, beside the paper's."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from experiments import cells, tables

PAPER = {
    "no regularization": {"50": "33.25 ± 0.6", "100": "46.24 ± 0.1", "500": "68.48 ± 0.1"},
    "dropout 0.5": {"50": "35.04 ± 0.6", "100": "47.62 ± 0.7", "500": "70.14 ± 0.06"},
    "bias weight decay 0.1": {"50": "34.17 ± 0.2", "100": "47.29 ± 0.7", "500": "68.75 ± 0.04"},
    "bias-Jacobian 100": {"50": "36.02 ± 0.08", "100": "48.76 ± 0.1", "500": "71.49 ± 0.02"},
}
"""Table 4 of Srinivas & Fleuret (2018): CIFAR-100, mean and deviation of two runs."""


def columns(row: dict[str, Any]) -> dict[str, str]:
    """One method, by the heading of its column."""
    paper = PAPER.get(row["method"], {})
    result = {"method": row["method"]}
    for count, results in row["columns"].items():
        result[f"{count} a class"] = cells.percent([one["test_accuracy"] for one in results])
    for count in row["columns"]:
        result[f"paper, {count}"] = paper.get(count, "–")
    for count, results in row["columns"].items():
        result[f"train, {count}"] = f"{100 * np.mean([one['train_accuracy'] for one in results]):.1f}"
    for count, results in row["columns"].items():
        result[f"‖f^b‖², {count}"] = f"{np.mean([one['bias_jacobian_norm'] for one in results]):.2g}"
    return result


def conditions(summary: dict[str, Any]) -> str:
    """What the figures mean and where they are from."""
    settings, machine = summary["settings"], summary["machine"]
    return (
        f"Test accuracy in %, mean ± deviation over seeds {', '.join(map(str, settings['seeds']))}, by training "
        "examples a class; paper: table 4 of Srinivas & Fleuret (2018), on CIFAR-100 with a VGG "
        "of a size that is not given. train: accuracy in the last epoch, on augmented images and "
        "under dropout. ‖f^b‖²: the mean over "
        f"{settings['probed']} test images of the last convolution's bias-Jacobian, for the label's logit. "
        f"{settings['model']['name'].upper()} of width {settings['model']['width']}, {settings['data']['name']}, "
        f"{settings['steps']} steps of {settings['batch_size']} examples, {settings['optimizer']['name']} "
        f"{settings['optimizer']['learning_rate']:g} falling along a cosine. "
        f"{machine['cores']} cores of {machine['processor']}, Keras {machine['keras']}, {machine['backend']}."
    )


def write(summary: dict[str, Any], folder: Path, console: Console) -> None:
    """Write regularization.json and regularization.md, and print the table."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "regularization.json").write_text(json.dumps(summary, indent=2))
    rows = [columns(row) for row in summary["rows"]]
    (folder / "regularization.md").write_text(f"{tables.grid_markdown(rows)}\n\n{conditions(summary)}\n")
    console.print(tables.grid(rows))
    console.print(conditions(summary))
    console.print(f"Files: {folder}")
