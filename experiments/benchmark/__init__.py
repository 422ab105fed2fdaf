"""What a training step costs, and a product along weights: `python -m experiments benchmark step`, `… weights`."""

from typing import Any

from experiments.benchmark.config import StepConfig, WeightsConfig

__all__ = ["StepConfig", "WeightsConfig", "step", "weights"]


def step(config: StepConfig) -> dict[str, Any]:
    """Measure a training step; the import waits for valid keys, because Keras takes seconds to load."""
    from experiments.benchmark.study import run

    return run(config)


def weights(config: WeightsConfig) -> dict[str, Any]:
    """Measure products along weights; the import waits as in `step`."""
    from experiments.benchmark.weights_study import run

    return run(config)
