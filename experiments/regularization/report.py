"""The study as a table, beside the paper's."""

from typing import Any

import numpy as np

from experiments import cells
from experiments.study import Rows, ran_on

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


def caption(summary: dict[str, Any]) -> str:
    """What the figures mean and where they are from."""
    settings = summary["settings"]
    return (
        f"Test accuracy in %, mean ± deviation over seeds {', '.join(map(str, settings['seeds']))}, by training "
        "examples a class; paper: table 4 of Srinivas & Fleuret (2018), on CIFAR-100 with a VGG "
        "of a size that is not given. train: accuracy in the last epoch, on augmented images and "
        "under dropout. ‖f^b‖²: the mean over "
        f"{settings['probed']} test images of the last convolution's bias-Jacobian, for the label's logit. "
        f"{settings['model']['name'].upper()} of width {settings['model']['width']}, {settings['data']['name']}, "
        f"{settings['steps']} steps of {settings['batch_size']} examples, {settings['optimizer']['name']} "
        f"{settings['optimizer']['learning_rate']:g} falling along a cosine. "
        f"{ran_on(summary)}"
    )


def page(summary: dict[str, Any]) -> list[Rows | str]:
    """The tables, and what they mean."""
    return [*([columns(row) for row in summary["rows"]] for columns in (accuracies, explanations)), caption(summary)]
