"""Does a small bias-Jacobian generalize better: `python -m experiments regularization`."""

from typing import Any

from experiments.regularization.config import RegularizationConfig

__all__ = ["RegularizationConfig", "regularization"]


def regularization(config: RegularizationConfig) -> dict[str, Any]:
    """Train the cells; the import waits for valid keys, because Keras takes seconds to load."""
    from experiments.regularization.study import run

    return run(config)
