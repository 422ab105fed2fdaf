"""Which saliency map finds the pixels that a model goes by: `python -m experiments saliency`."""

from typing import Any

from experiments.saliency.config import SaliencyConfig

__all__ = ["SaliencyConfig", "saliency"]


def saliency(config: SaliencyConfig) -> dict[str, Any]:
    """Compare the maps; the import waits for valid keys, because Keras takes seconds to load."""
    from experiments.saliency.study import run

    return run(config)
