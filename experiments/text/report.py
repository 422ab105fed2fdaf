"""The study as a table, as curves over the epochs, and as sentences coloured by what each word contributes."""

from typing import Any

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments import cells
from experiments.study import ran_on

BOX = 1.35
"""Width of a word's box, of which each line has one more for the rest and one for the sum."""


def name(strength: float) -> str:
    """A row's name."""
    return f"penalty {strength:g}" if strength else "no penalty"


def columns(row: dict[str, Any]) -> dict[str, str]:
    """One strength, by the heading of its column."""
    norm, deviation = cells.mean_and_deviation([one["norm"][-1] for one in row["results"]])
    return {
        "model": name(row["strength"]),
        "‖J‖_F": f"{norm:.3g}" + (f" ± {deviation:.2g}" if len(row["results"]) > 1 else ""),
        "train accuracy": cells.percent([one["train_accuracy"][-1] for one in row["results"]]),
        "test accuracy": cells.percent([one["test_accuracy"][-1] for one in row["results"]]),
    }


def caption(summary: dict[str, Any]) -> str:
    """What the figures mean and where they are from."""
    settings = summary["settings"]
    return (
        f"Mean ± deviation over seeds {', '.join(map(str, settings['seeds']))}, each with sentences and weights of its "
        f"own. A transformer of {settings['blocks']} blocks, {settings['heads']} heads and width {settings['width']}, "
        f"trained for {settings['epochs']} epochs on {settings['train_examples']} sentences in batches of "
        f"{settings['batch_size']}, Adam {settings['learning_rate']:g} falling along a cosine. Penalty: strength × the "
        "mean of ‖J‖_F², J being the Jacobian of the logit by what the token embedding returned. ‖J‖_F: the mean over "
        f"{settings['probed']} test sentences. Accuracies in %, the second on {settings['test_examples']} other "
        f"sentences. What the words contribute, and the rest, sum to the logit within {_error(summary):.1g}. "
        f"{ran_on(summary)}"
    )


def _error(summary: dict[str, Any]) -> float:
    """The largest difference between a logit and the sum of its parts."""
    found = [one for row in summary["rows"] for result in row["results"] for one in result["explained"]]
    return max(abs(sum(one["parts"]) + one["rest"] - one["logit"]) for one in found)


def curves(summary: dict[str, Any]) -> Figure:
    """The accuracy on test sentences and the norm over the epochs, a line a seed."""
    page = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, key, factor, label in zip(
        page.subplots(1, 2),
        ("test_accuracy", "norm"),
        (100, 1),
        ("test accuracy (%)", r"$\Vert J\Vert_F$ by the token embedding"),
        strict=True,
    ):
        for number, row in enumerate(summary["rows"]):
            for i, one in enumerate(row["results"]):
                values = factor * np.asarray(one[key])
                label_once = None if i else name(row["strength"])
                axes.plot(range(1, len(values) + 1), values, color=f"C{number}", label=label_once)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
    page.axes[1].set_yscale("log")
    page.axes[0].legend()
    return page


def tokens(summary: dict[str, Any]) -> Figure:
    """Test sentences of the first seed, each word on the colour of what it contributes; a panel a strength."""
    rows = summary["rows"]
    most = max(len(one["words"]) for one in rows[0]["results"][0]["explained"])
    count = len(rows[0]["results"][0]["explained"])
    page = Figure(figsize=(0.62 * BOX * (most + 2), 0.42 * (count + 1) * len(rows)), layout="constrained")
    for row, axes in zip(rows, page.subplots(len(rows), 1, squeeze=False)[:, 0], strict=True):
        explained = row["results"][0]["explained"]
        largest = max(abs(part) for one in explained for part in (*one["parts"], one["rest"]))
        for line, one in enumerate(explained):
            _sentence(axes, -line, one, most, Normalize(-largest, largest))
        axes.set(xlim=(0, BOX * (most + 2)), ylim=(0.5 - count, 0.6))
        axes.set_title(name(row["strength"]), loc="left", fontsize=10)
        axes.axis("off")
    return page


def _sentence(axes: Any, height: float, one: dict[str, Any], most: int, scale: Normalize) -> None:
    from matplotlib import colormaps

    boxes = [*zip(one["words"], one["parts"], strict=True)]
    boxes += [("", None)] * (most - len(boxes)) + [("rest", one["rest"])]
    for place, (word, part) in enumerate(boxes):
        if part is not None:
            axes.text(
                BOX * (place + 0.5),
                height,
                f"{word}\n{part:+.1f}",
                ha="center",
                va="center",
                fontsize=7.5,
                color="white" if abs(scale(part) - 0.5) > 0.35 else "black",
                bbox={"boxstyle": "square,pad=0.25", "linewidth": 0, "facecolor": colormaps["RdBu"](scale(part))},
            )
    right = (one["logit"] > 0) == (one["label"] > 0)
    verdict = f"= {one['logit']:+.1f}\n{'right' if right else 'wrong'}"
    axes.text(BOX * (most + 1.5), height, verdict, ha="center", va="center", fontsize=7.5)
