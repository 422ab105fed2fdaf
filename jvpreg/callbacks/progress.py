"""`JacobianProgbarLogger`: Keras' progress bar, and what a probe measured in lines beneath it."""

import math
import re
import sys
from collections.abc import Mapping

import keras

from jvpreg.callbacks.probe import JacobianProbe
from jvpreg.callbacks.reader import check_probe, checked_probe
from jvpreg.callbacks.symbols import symbol
from jvpreg.common.typing import Logs

WIDTH = 100  # columns
INDENT = 4


class JacobianProgbarLogger(keras.callbacks.ProgbarLogger):
    """Keras' progress bar without the numbers of a `JacobianProbe`, which has short lines beneath each epoch instead.

    There is one line for the model and one for each layer, block and class, with means, standard errors, and the
    percentage that did not converge if there is any. Histories and loggers still have everything. Keras adds its own
    bar only if none is listed.

    Args:
        probe: the `JacobianProbe` of the same `fit`, listed before.

    Raises:
        ValueError: `probe` is no probe, or is not listed (before training begins).

    Example:

    >>> import keras, numpy as np, jvpreg
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, kernel_initializer="ones")])
    >>> model.compile(keras.optimizers.SGD(0.0), loss="mse")
    >>> probe = jvpreg.callbacks.JacobianProbe(np.ones((8, 4)), ["frobenius_norm", "spectral_norm"])
    >>> bar = jvpreg.callbacks.JacobianProgbarLogger(probe)
    >>> history = model.fit(np.ones((8, 4)), np.ones((8, 2)), verbose=2, callbacks=[probe, bar])  # doctest: +ELLIPSIS
    1/1 - ... - loss: 9.0000
        ‖J‖ 2.83  σ₁ 2.83
    """

    def __init__(self, probe: JacobianProbe):
        super().__init__()
        self.probe = checked_probe(probe)
        # Keras, too, runs its bar at the same time as the next step.
        self.async_safe = True

    def on_train_begin(self, logs: Logs | None = None) -> None:
        """Checks that the probe is there."""
        super().on_train_begin(logs)
        check_probe(self)

    def on_train_batch_end(self, batch: int, logs: Logs | None = None) -> None:
        """Moves the bar."""
        super().on_train_batch_end(batch, self._others(logs))

    def on_epoch_end(self, epoch: int, logs: Logs | None = None) -> None:
        """Ends the bar, and prints the lines."""
        super().on_epoch_end(epoch, self._others(logs))
        if self.verbose and self.probe.epoch == epoch:
            for line in lines(self.probe.logged(epoch), self.probe.prefix):
                _print(line)

    def _others(self, logs: Mapping | None) -> dict:
        return {key: value for key, value in (logs or {}).items() if not key.startswith(f"{self.probe.prefix}/")}


def lines(logged: Mapping[str, float], prefix: str) -> list[str]:
    """What a probe put into `logs`, in lines of at most `WIDTH` columns: one or more for each place.

    Args:
        logged: a dict from names to numbers, as `JacobianProbe.logged` has it.
        prefix: of the names.
    """
    places: dict[str, dict[str, str]] = {}
    for key, value in logged.items():
        if f"{key}_sem" not in logged:  # a standard error, or the fraction that converged
            continue
        place, _, name = key.removeprefix(f"{prefix}/").rpartition("/")
        text = symbol(name).text
        entry = f"{text} {_number(value, logged[f'{key}_sem'])}"
        # The spectral norm is the first of the top singular values: it is shown once.
        places.setdefault(place, {}).setdefault(text, entry + _unconverged(key, logged))
    return [line for place, entries in places.items() for line in _wrapped(place, list(entries.values()))]


def _wrapped(place: str, entries: list[str]) -> list[str]:
    """The entries of a place, as many in each line as fit."""
    found = [" " * INDENT + (f"{place}: " if place else "") + entries[0]]
    for entry in entries[1:]:
        if len(found[-1]) + 2 + len(entry) <= WIDTH:
            found[-1] += f"  {entry}"
        else:
            found.append(" " * 2 * INDENT + entry)
    return found


def _number(value: float, sem: float) -> str:
    """A value and its standard error, to two digits of the error; if there is no error, to three digits."""
    if not math.isfinite(value) or not math.isfinite(sem) or sem <= 1e-6 * abs(value):
        return f"{value:.3g}"
    decimals = 1 - math.floor(math.log10(sem))
    if abs(value) >= 1e6 or decimals > 6:
        return f"{value:.3g}±{sem:.1g}"
    return f"{value:.{max(decimals, 0)}f}±{sem:.{max(decimals, 0)}f}"


def _unconverged(key: str, logged: Mapping[str, float]) -> str:
    """The percentage that did not converge, after the last of the values that it belongs to."""
    ends = "_converged"
    for about in (name for name in logged if name.endswith(ends) and f"{name}_sem" not in logged):
        stem = about.removesuffix(ends)
        # Several values, or the parts of a complex one, share one number.
        values = [name for name in logged if re.fullmatch(re.escape(stem) + r"(_\d+)?(_abs|_real|_imag)?", name)]
        if values and values[-1] == key and logged[about] < 1:
            return f" ({100 * (1 - logged[about]):.2g} % unconverged)"
    return ""


def _print(line: str) -> None:
    """Prints where Keras' bar is printed, with question marks for letters that the terminal does not have."""
    if not keras.config.is_interactive_logging_enabled():
        return
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(line.encode(encoding, "replace").decode(encoding), flush=True)
