"""What a training step costs: `python -m experiments benchmark step`."""

from typing import Any

from experiments.benchmark.config import StepConfig

__all__ = ["StepConfig", "step"]


def step(config: StepConfig) -> dict[str, Any]:
    """Measure a training step; the import waits for valid keys, because Keras takes seconds to load."""
    from experiments.benchmark.study import run

    return run(config)
