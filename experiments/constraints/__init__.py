"""What constraints on the Jacobian do to a fit: `python -m experiments constraints`."""

from typing import Any

from experiments.constraints.config import ConstraintsConfig

__all__ = ["ConstraintsConfig", "constraints"]


def constraints(config: ConstraintsConfig) -> dict[str, Any]:
    """Train and compare; the import waits for valid keys, because Keras takes seconds to load."""
    from experiments.constraints.study import run

    return run(config)
