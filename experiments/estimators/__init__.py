"""How fast the estimators converge: `python -m experiments estimators`."""

from typing import Any

from experiments.estimators.config import EstimatorsConfig

__all__ = ["EstimatorsConfig", "estimators"]


def estimators(config: EstimatorsConfig) -> dict[str, Any]:
    """Run the study; the import waits for valid keys, because Keras takes seconds to load."""
    from experiments.estimators.study import run

    return run(config)
