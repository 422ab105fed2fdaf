"""The `constraints` study: one of four problems, each trained in several settings and seeds."""

from pathlib import Path
from typing import Any

from rich.console import Console

from experiments import timing
from experiments.config import as_plain_dict
from experiments.constraints import derivative, divergence, invariance, monotone, report
from experiments.constraints.config import ConstraintsConfig
from experiments.errors import ExperimentError

PROBLEMS = {
    "monotone": monotone.run,
    "divergence": divergence.run,
    "derivative": derivative.run,
    "invariance": invariance.run,
}


def run(config: ConstraintsConfig) -> dict[str, Any]:
    """Train every setting, and write and print what came out.

    Args:
        config: see `ConstraintsConfig`.

    Returns:
        What the JSON file holds: the settings, the machine, and the figures of each run.

    Raises:
        ExperimentError: where the data cannot be had, or no setting has a constraint.
    """
    if config.rho is None and not any(config.strengths):
        raise ExperimentError("strengths: expected one above 0, or a rho.")
    console = Console(soft_wrap=True, highlight=False)
    summary = {
        "study": "constraints",
        "settings": as_plain_dict(config),
        "machine": timing.machine(),
        "runs": PROBLEMS[config.problem](config),
    }
    report.write(summary, Path(config.folder or f"runs/constraints_{config.problem}"), console)
    return summary
