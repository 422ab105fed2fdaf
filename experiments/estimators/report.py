"""What the study found, in Markdown."""

from typing import Any

import numpy as np

from experiments.study import Rows

KINDS = {"singular": "σ", "eigen": "abs(λ)"}


def page(summary: dict[str, Any]) -> list[Rows | str]:
    """The tables, with what they mean and where they are from."""
    settings, machine = summary["settings"], summary["machine"]
    size = settings["image_size"]
    norm = summary["figure4"]["frobenius_norm"]
    last = len(norm["sem"]) - 1
    return [
        "# How fast the estimators converge",
        f"UNet of `verify` with 3 channels out, never trained, standard normal images of {size}x{size}x3: square "
        f"Jacobians of {3 * size**2} dimensions. Exact values from whole Jacobians in float64; products in float32. "
        f"{machine['backend']}, Keras {machine['keras']}, {machine['cores']} cores of {machine['processor']}.",
        "## The largest singular values and eigenvalues",
        "The largest error of the k values, relative to the largest value, the median over inputs. The paper's are "
        "its algorithms 4 (σ) and 2 (λ), by the diagonals of R; the magnitudes of eigenvalues are compared; jvpreg's "
        "steps towards eigenvalues take k + 2 products and not k. Empty: with so many steps the Jacobian is "
        "materialized, which is exact.",
        table(*convergence_rows(summary["figure4"]["convergence"])),
        "## Monte-Carlo estimates of the norm",
        f"At one input ‖J‖_F is {norm['exact']:.4g}. After {last + 1} probes theory expects a standard error of "
        f"{100 * norm['sem'][last] / norm['exact']:.2f} %, and {norm['counted']} trajectories are off by "
        f"{100 * norm['spread'][last] / norm['exact']:.2f} % (root mean square).",
        "## Seconds",
        "A second call, compiled as a graph, linearization included. The paper's are of its own UNet, on its own GPU, "
        "in 2021: these machines and networks differ, and the columns are not to be divided by each other.",
        table(
            ["what", "images", "seconds", "the paper's"],
            [
                [row["what"], str(row["images"]), f"{row['seconds']:.3g}", f"{row['paper_seconds'] or ''}"]
                for row in summary["figure4"]["seconds"]
            ],
        ),
        "## The trace",
        f"Root mean square error over {settings['trace_seeds']} draws, relative to ‖A‖_F; in brackets the "
        "reported standard error in units of the actual spread, which should be 1. The mean error is the largest one "
        "in units of what the draws let it be known to: far above 3 would be a bias. All counts, and matrices of one "
        "size, share their draws, so that they deviate together.",
        *trace_tables(summary["trace"]),
    ]


def convergence_rows(curves: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Heading and rows of the errors by steps."""
    heading = ["steps"]
    for curve in curves:
        name = f"{KINDS[curve['kind']]}, k={curve['k']}"
        heading += [f"{name}: jvpreg", "paper"]
    rows = []
    for step in sorted({step for curve in curves for step in curve["steps"]}):
        row = [str(step)]
        for curve in curves:
            for key, steps in (("ours", curve["ours_steps"]), ("paper", curve["steps"])):
                row.append(f"{np.median(curve[key][steps.index(step)]):.1e}" if step in steps else "")
        rows.append(row)
    return heading, rows


def trace_tables(matrices: dict[str, Any]) -> list[str]:
    """For each matrix its name and a table."""
    parts = []
    for label, found in matrices.items():
        methods = found["methods"]
        counts = zip(*methods.values(), strict=True)
        rows = [
            # Hutch++ and XTrace may spend a little less than they may.
            [str(max(row["matvecs"] for row in of_count)), *[cell(row, found["frobenius_norm"]) for row in of_count]]
            for of_count in counts
        ]
        rows.append(
            ["mean error", *[f"{max(abs(row['bias']) / row['bias_sem'] for row in m):.1f}" for m in methods.values()]]
        )
        parts += [
            f"{label[0].upper()}{label[1:]} (trace {found['trace']:.4g}, ‖A‖_F {found['frobenius_norm']:.4g}):",
            table(["products", *methods], rows),
        ]
    return parts


def cell(row: dict[str, float], norm: float) -> str:
    """An error, and the standard error that was reported."""
    return f"{row['error'] / norm:.1e} ({row['sem_over_spread']:.2f})"


def table(heading: list[str], rows: list[list[str]]) -> str:
    """In Markdown."""
    lines = [heading, ["---", *["---:"] * (len(heading) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
