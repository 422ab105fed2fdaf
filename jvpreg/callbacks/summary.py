"""The numbers that a `JacobianProbe` puts into `logs`."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jvpreg.callbacks.measured import Measured, Result
from jvpreg.estimators import Estimate, SpectralDensity


def summary(measured: Measured, prefix: str, groups: Mapping[str, Any]) -> dict[str, float]:
    """Means over examples, with their standard errors, by the names that `JacobianProbe` describes.

    Args:
        measured: the result of each metric.
        prefix: of the names.
        groups: which examples belong to a group, as an index, by what precedes the group's names.
    """
    found = {}
    for name, result in measured.items():
        place, slash, metric = name.rpartition("/")
        if metric == "top_eigenvalues":
            metric = "eigenvalue_J" if np.iscomplexobj(result.value) else "eigenvalue_JJT"
        stem = place + slash + metric
        columns = _columns(stem, result)
        for group, members in groups.items():
            for column, numbers in columns.items():
                key = f"{prefix}/{group}{column}"
                found[key], found[f"{key}_sem"] = _mean_and_sem(numbers[members])
        if isinstance(result, Estimate) and result.converged is not None:
            converged = result.converged.reshape(len(result.converged), -1)
            found[f"{prefix}/{stem}_converged"] = float(converged.min(axis=1).mean())
    return found


def _columns(stem: str, result: Result) -> dict[str, np.ndarray]:
    """The columns `(B,)` of a metric that go into `logs`."""
    value = result.value
    if isinstance(result, SpectralDensity) or value.ndim > 2:
        return {}
    columns = {stem: value} if value.ndim == 1 else {f"{stem}_{i + 1}": value[:, i] for i in range(value.shape[1])}
    if np.iscomplexobj(value):
        aspects: dict[str, Callable] = {"abs": np.abs, "real": np.real, "imag": np.imag}
        columns = {f"{name}_{key}": of(part) for name, part in columns.items() for key, of in aspects.items()}
    return columns


def _mean_and_sem(numbers: np.ndarray) -> tuple[float, float]:
    numbers = numbers.astype("float64")
    with np.errstate(invalid="ignore"):  # inf − inf
        sem = numbers.std(ddof=1) / math.sqrt(len(numbers)) if len(numbers) > 1 else math.nan
        return float(numbers.mean()), float(sem)
