"""The study as a table, beside the paper's."""

from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from experiments import cells, files, tables

PAPER = {
    "no regularization": {"50": "33.25 ± 0.6", "100": "46.24 ± 0.1", "500": "68.48 ± 0.1"},
    "dropout 0.5": {"50": "35.04 ± 0.6", "100": "47.62 ± 0.7", "500": "70.14 ± 0.06"},
    "bias weight decay 0.1": {"50": "34.17 ± 0.2", "100": "47.29 ± 0.7", "500": "68.75 ± 0.04"},
    "bias-Jacobian 100": {"50": "36.02 ± 0.08", "100": "48.76 ± 0.1", "500": "71.49 ± 0.02"},
}
"""Table 4 of Srinivas & Fleuret (2018): CIFAR-100, mean and deviation of two runs."""


def accuracies(row: dict[str, Any]) -> dict[str, str]:
    """One method's accuracies and the paper's, by the heading of their column."""
    paper = PAPER.get(row["method"], {})
    measured = {
        f"{count} a class": cells.percent([one["test_accuracy"] for one in results])
        for count, results in row["columns"].items()
    }
    return {"method": row["method"], **measured, **{f"paper, {n}": paper.get(n, "–") for n in row["columns"]}}


def explanations(row: dict[str, Any]) -> dict[str, str]:
    """How well one method's models know what they were trained on, and how large their bias-Jacobians are."""
    train, norms = (
        {count: float(np.mean([one[key] for one in results])) for count, results in row["columns"].items()}
        for key in ("train_accuracy", "bias_jacobian_norm_squared")
    )
    return {
        "method": row["method"],
        **{f"train, {count}": f"{100 * value:.1f}" for count, value in train.items()},
        **{f"‖f^b‖², {count}": f"{value:.1g}" for count, value in norms.items()},
    }


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
    """Write regularization.json and regularization.md, and print the tables."""
    files.write_json(folder / "regularization.json", summary)
    both = [[columns(row) for row in summary["rows"]] for columns in (accuracies, explanations)]
    text = "\n\n".join([*map(tables.grid_markdown, both), conditions(summary)])
    files.write_text(folder / "regularization.md", f"{text}\n")
    for rows in both:
        console.print(tables.grid(rows))
    console.print(conditions(summary))
    console.print(f"Files: {folder}")
