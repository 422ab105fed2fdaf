"""How a model is penalized and watched, for the config of a tracked run."""

from collections.abc import Mapping
from typing import Any

import keras

from jvpreg.callbacks.probe import JacobianProbe


def settings(probe: JacobianProbe, model: keras.Model | None, config: Mapping[str, Any]) -> dict[str, Any]:
    """The entry `jacobian` of a run's config: what it holds already, and beside it that of this model and this probe.

    Args:
        probe: one of those of the run.
        model: a `JacobianModel`, or another; None: not known.
        config: of the run as it is. If its `jacobian` is a number, say, the entry is `jvpreg`.
    """
    known = config.get("jacobian")
    key = "jacobian" if known is None or isinstance(known, Mapping) else "jvpreg"
    entry = {**(config.get(key) or {})}
    if regularizers := getattr(model, "jacobian_regularizers", None):
        entry["regularizers"] = [_penalty(regularizer, "strength") for regularizer in regularizers]
        entry["interval"] = getattr(model, "jacobian_interval", 1)
        entry["fraction"] = getattr(model, "jacobian_fraction", 1.0)
    if losses := getattr(model, "matching_losses", None):
        entry["losses"] = [_penalty(loss, "weight") for loss in losses]
    entry["probes"] = {
        **(entry.get("probes") or {}),
        probe.prefix: {
            "examples": probe.size,
            "metrics": list(probe.metrics),
            "seed": probe.seed,
            "every_epochs": probe.every_epochs,
        },
    }
    return {key: entry}


def _penalty(penalty, weight: str) -> dict[str, Any]:
    return {"name": penalty.name, "class": type(penalty).__name__, weight: float(getattr(penalty, weight))}
