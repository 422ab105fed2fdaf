"""`JacobianPictures`: what a probe measured, drawn epoch by epoch, as PNG files and for TensorBoard."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jvpreg.callbacks.files import write_whole
from jvpreg.callbacks.probe import JacobianProbe
from jvpreg.callbacks.reader import ProbeReader, picture
from jvpreg.common import checks
from jvpreg.common.typing import Logs


class JacobianPictures(ProbeReader):
    """Draws the history of each metric of a `JacobianProbe`, again after each measurement.

    A metric is drawn as curves: the mean over the examples, its standard error as bars, and the middle 80 % of the
    examples as a band. Eigenvalues are drawn in the complex plane, and a `SpectralDensity` as a map of colors over the
    epochs. This needs matplotlib, and for `log_dir` tensorboard (but not TensorFlow). A picture takes 0.1 to 0.2
    seconds.

    Args:
        probe: the `JacobianProbe` of the same `fit`, listed before.
        folder: for PNG files: `top_singular_values.png`, `after-LAYER-frobenius_norm.png`, one for each key of
            `probe.values`. None: no files.
        log_dir: of TensorBoard. The run `jacobian` in it gets the pictures of each epoch, named `jacobian/m` with the
            probe's prefix, and everything in `logs` under the same names. Keras' `TensorBoard` callback, which needs
            TensorFlow, may be listed too: it has runs of its own. None: nothing for TensorBoard.
        every_epochs: draw after every n-th epoch that was measured, and after the last.

    Raises:
        ValueError: neither folder is given, or the probe is not listed (before training begins).
        ImportError: matplotlib, or for `log_dir` tensorboard, is not installed.

    Example:

    >>> import keras, numpy as np, jvpreg, pathlib, tempfile
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    >>> model.compile(loss="mse")
    >>> probe = jvpreg.callbacks.JacobianProbe(np.ones((8, 4)), ["singular_values"])
    >>> pictures = jvpreg.callbacks.JacobianPictures(probe, folder=tempfile.mkdtemp())
    >>> history = model.fit(np.ones((8, 4)), np.ones((8, 2)), verbose=0, callbacks=[probe, pictures])
    >>> [path.name for path in pathlib.Path(pictures.folder).iterdir()]
    ['singular_values.png']
    """

    def __init__(
        self,
        probe: JacobianProbe,
        folder: str | os.PathLike | None = None,
        log_dir: str | os.PathLike | None = None,
        every_epochs: int = 1,
    ):
        super().__init__(probe, every_epochs)
        self.folder = checks.path("folder", folder, optional=True)
        self.log_dir = checks.path("log_dir", log_dir, optional=True)
        checks.packages("JacobianPictures", "pictures", "matplotlib", *["tensorboard"] * (log_dir is not None))
        if folder is None and log_dir is None:
            raise ValueError("Invalid value for argument `folder`. Expected a path, or `log_dir`. Received: neither.")
        self._events: _Events | None = None
        self._undrawn = False
        self._begins = True

    def on_train_begin(self, logs: Logs | None = None) -> None:
        """Makes the folder, and opens TensorBoard's file."""
        super().on_train_begin(logs)
        self._undrawn = False
        self._begins = True
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        if self.log_dir is not None:
            self._events = _Events(self.log_dir / "jacobian")

    def on_epoch_begin(self, epoch: int, logs: Logs | None = None) -> None:
        """Tells TensorBoard with which epoch a `fit` begins: it drops what an earlier one wrote from there on."""
        if self._events is not None and self._begins:
            self._events.begin(epoch)
        self._begins = False

    def on_epoch_end(self, epoch: int, logs: Logs | None = None) -> None:
        """Writes the numbers, and draws the epoch's measurement, if there is one."""
        if self._events is not None:
            self._events.add_scalars(logs or {}, epoch)
        super().on_epoch_end(epoch, logs)

    def on_train_end(self, logs: Logs | None = None) -> None:
        """Draws what was measured since the last picture, and closes TensorBoard's file."""
        if self._undrawn:
            self._draw()
        if self._events is not None:
            self._events.close()
            self._events = None

    def read(self, epoch: int, draw: bool) -> None:
        """Draws everything, if a picture is due."""
        self._undrawn = True
        if draw:
            self._draw()

    def _draw(self) -> None:
        self._undrawn = False
        history = self.probe.history
        for name in self.probe.values:
            png = picture(name, history)
            if self.folder is not None:
                write_whole(self.folder / f"{name.replace('/', '-')}.png", png)
            if self._events is not None:
                self._events.add_image(f"{self.probe.prefix}/{name}", png, max(history))


class _Events:
    """An event file of TensorBoard, written by TensorBoard's own package, which does not need TensorFlow."""

    def __init__(self, folder: Path):
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer: Any = EventFileWriter(str(folder))

    def begin(self, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog

        self._write(step, session_log=SessionLog(status=SessionLog.START))

    def add_scalars(self, scalars: Mapping[str, float], step: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=tag, simple_value=float(value)) for tag, value in scalars.items()]
        self._write(step, summary=Summary(value=values))

    def add_image(self, tag: str, png: bytes, step: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        # In a PNG file, bytes 16 to 24 are width and height.
        width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))
        image = Summary.Image(encoded_image_string=png, width=width, height=height, colorspace=3)
        self._write(step, summary=Summary(value=[Summary.Value(tag=tag, image=image)]))

    def _write(self, step: int, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._writer.add_event(Event(wall_time=time.time(), step=step, **content))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
