"""The `constraints` study: one of four problems, each trained in several settings and seeds."""

from typing import Any

from rich.console import Console

from experiments.constraints import derivative, divergence, invariance, monotone, report
from experiments.constraints.config import ConstraintsConfig
from experiments.errors import ExperimentError
from experiments.study import Study

PROBLEMS = {
    "monotone": monotone.run,
    "divergence": divergence.run,
    "derivative": derivative.run,
    "invariance": invariance.run,
}


def run(config: ConstraintsConfig) -> dict[str, Any]:
    """Train every setting, and write and print what came out, in files that are named after the problem.

    Returns:
        What the JSON file holds: the settings, the machine, and the figures of each run.

    Raises:
        ExperimentError: where the data cannot be had, or no setting has a constraint.
    """
    return study_of(config.problem).run(config)


def study_of(problem: str) -> Study:
    """The study of one problem."""
    return Study(
        "constraints",
        measured,
        report.page,
        {problem: report.figure},
        indent=1,
        stem=problem,
        home=f"runs/constraints_{problem}",
    )


def measured(config: ConstraintsConfig, console: Console) -> dict[str, Any]:
    """The figures of each run."""
    if config.rho is None and not any(config.strengths):
        raise ExperimentError("strengths: expected one above 0, or a rho.")
    return {"runs": PROBLEMS[config.problem](config)}
