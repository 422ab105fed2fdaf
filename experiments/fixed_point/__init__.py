"""A small convolutional fixed-point network, with and without the Jacobian penalty.

`python -m experiments fixed_point --config configs/fixed_point.yaml`.
"""

from typing import Any

from experiments.fixed_point.config import FixedPointConfig

__all__ = ["FixedPointConfig", "fixed_point"]


def fixed_point(config: FixedPointConfig) -> dict[str, Any]:
    """Train, and measure gradients and memory; the import waits for valid keys, because Keras takes seconds to load."""
    from experiments.fixed_point.study import run

    return run(config)
