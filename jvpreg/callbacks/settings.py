"""How a model is penalized and watched, for the config of a tracked run."""

from collections.abc import Mapping
from typing import Any

import keras

from jvpreg.callbacks.probe import JacobianProbe


def settings(probe: JacobianProbe, model: keras.Model | None, config: Mapping[str, Any]) -> dict[str, Any]:
    """The entry `jacobian` of a run's config, with what it holds already, and the settings of this model and probe.

    Args:
        probe: one of the run's probes.
        model: a `JacobianModel`, or another model; None if it is not known.
        config: the run's config so far. If its `jacobian` is something else (a number), the entry is called `jvpreg`.
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


def _penalty(penalty: Any, weight: str) -> dict[str, Any]:
    return {"name": penalty.name, "class": type(penalty).__name__, weight: float(getattr(penalty, weight))}
