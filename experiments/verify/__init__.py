"""How exact the products are on whole architectures: `python -m experiments verify`."""

from typing import Any

from experiments.verify.config import VerifyConfig

__all__ = ["VerifyConfig", "verify"]


def verify(config: VerifyConfig) -> dict[str, Any]:
    """Verify the architectures; the import waits for valid keys, because Keras takes seconds to load."""
    from experiments.verify.study import run

    return run(config)
