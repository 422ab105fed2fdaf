"""Which of a teacher's derivatives help a student with few examples: `python -m experiments distill`."""

from typing import Any

from experiments.distill.config import DistillConfig

__all__ = ["DistillConfig", "distill"]


def distill(config: DistillConfig) -> dict[str, Any]:
    """Train the cells; the import waits for valid keys, because Keras takes seconds to load."""
    from experiments.distill.study import run

    return run(config)
