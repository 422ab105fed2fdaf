"""Whether the Jacobian tells a sick training run before the loss does: `python -m experiments health`."""

from typing import Any

from experiments.health.config import HealthConfig

__all__ = ["HealthConfig", "health"]


def health(config: HealthConfig) -> dict[str, Any]:
    """Train the settings and compare; the import waits for valid keys, because Keras takes seconds to load."""
    from experiments.health.study import run

    return run(config)
