"""Does a penalty that is computed less often do the same: `python -m experiments sparing`."""

from typing import Any

from experiments.sparing.config import SparingConfig

__all__ = ["SparingConfig", "sparing"]


def sparing(config: SparingConfig) -> dict[str, Any]:
    """Train the cells; the import waits for valid keys, because Keras takes seconds to load."""
    from experiments.sparing.study import run

    return run(config)
