"""The base class of callbacks that read a `JacobianProbe`."""

from collections.abc import Mapping
from typing import Any

import keras

from jvpreg.callbacks.figures import history_png
from jvpreg.callbacks.measured import Measured
from jvpreg.callbacks.probe import JacobianProbe
from jvpreg.common import checks
from jvpreg.common.typing import Logs


class ProbeReader(keras.callbacks.Callback):
    """A callback that uses each measurement that its probe makes at the end of an epoch.

    Args:
        probe: the `JacobianProbe` of the same `fit`, listed before.
        every_epochs: draw after every n-th epoch that was measured, and after the last.
    """

    def __init__(self, probe: JacobianProbe, every_epochs: int):
        super().__init__()
        self.probe = checked_probe(probe)
        self.every_epochs = checks.count("every_epochs", every_epochs)

    def on_train_begin(self, logs: Logs | None = None) -> None:
        """Checks that the probe is there."""
        check_probe(self)

    def on_epoch_end(self, epoch: int, logs: Logs | None = None) -> None:
        """Reads the epoch's measurement, if there is one."""
        if self.probe.epoch == epoch:
            last = epoch + 1 == (self.params or {}).get("epochs")
            self.read(epoch, draw=last or len(self.probe.history) % self.every_epochs == 0)

    def read(self, epoch: int, draw: bool) -> None:
        """Uses `self.probe.values`, and draws if a picture is due."""
        raise NotImplementedError


def picture(name: str, history: Mapping[int, Measured]) -> bytes:
    """The history of a metric, out of a `JacobianProbe.history`, as the bytes of a PNG file."""
    return history_png(name, list(history), [measured[name] for measured in history.values()])


def checked_probe(probe: Any) -> JacobianProbe:
    """The probe of a callback that reads one.

    Raises:
        ValueError: it is no probe.
    """
    if not isinstance(probe, JacobianProbe):
        raise checks.invalid("probe", "a `JacobianProbe`", probe)
    return probe


def check_probe(callback: keras.callbacks.Callback) -> None:
    """Raises unless the probe that a callback reads has the same model."""
    if callback.probe.model is not callback.model:
        name = type(callback).__name__
        raise ValueError(
            f"`{name}` reads a `JacobianProbe` that is not in `callbacks`. List it there, before `{name}`."
        )
