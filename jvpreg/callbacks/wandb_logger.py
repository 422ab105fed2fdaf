"""`JacobianWandbLogger`: a row for every epoch in Weights & Biases, with the distributions and spectra of a probe."""

import io

import numpy as np
from keras import ops

from jvpreg.callbacks.figures import mean_density
from jvpreg.callbacks.probe import JacobianProbe
from jvpreg.callbacks.reader import ProbeReader, picture
from jvpreg.estimators import SpectralDensity


class JacobianWandbLogger(ProbeReader):
    """Logs every epoch, and what a `JacobianProbe` measured: a histogram of each metric, and pictures of spectra.

    The row of an epoch has everything in `logs` (the loss, metrics, the means of the probe) under the keys that
    `WandbMetricsLogger` has, such as `epoch/loss` and `epoch/jacobian/m`, and beside it:

    - `jacobian/m_histogram`: of a metric's values over the examples (of the magnitudes, if they are complex), or the
      density, of the examples together, if it is one;
    - `jacobian/m_history`: the picture of the epochs so far, as `JacobianPictures` draws it, of a metric that is
      several numbers an example or a density.

    All of these are charted against the epoch. List it after the probe. Nothing else is needed; a `WandbMetricsLogger`
    that is listed after it writes into the same row. It needs wandb, and for the pictures matplotlib.

    Args:
        probe: the `JacobianProbe` of the same `fit`, listed before.
        every_epochs: draw after every n-th epoch that was measured, and after the last. A picture takes a tenth of a
            second or two.

    Raises:
        RuntimeError: no W&B run is active when training begins.
        ValueError: the probe is not there (before training begins).

    Example:

    >>> import keras, numpy as np, jvpreg, wandb
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    >>> model.compile(loss="mse")
    >>> probe = jvpreg.callbacks.JacobianProbe(np.ones((8, 4)), ["singular_values"])
    >>> logger = jvpreg.callbacks.JacobianWandbLogger(probe)
    >>> with wandb.init(mode="disabled"):
    ...     history = model.fit(np.ones((8, 4)), np.ones((8, 2)), verbose=0, callbacks=[probe, logger])
    """

    def __init__(self, probe: JacobianProbe, every_epochs: int = 1):
        super().__init__(probe, every_epochs)
        import wandb

        self._wandb = wandb
        self._pending: int | None = None

    def on_train_begin(self, logs=None):
        """Checks that a run is active, and tells it to use epochs."""
        super().on_train_begin(logs)
        if self._wandb.run is None:
            raise RuntimeError("`JacobianWandbLogger` needs an active run: call `wandb.init()` before `fit`.")
        self._pending = None
        self._wandb.define_metric("epoch/epoch")
        self._wandb.define_metric("epoch/*", step_metric="epoch/epoch")
        self._wandb.define_metric(f"{self.probe.prefix}/*", step_metric="epoch/epoch")

    def on_epoch_begin(self, epoch, logs=None):
        """Completes the row of the last epoch, if nothing else did."""
        self._complete()

    def on_epoch_end(self, epoch, logs=None):
        """Begins the row of the epoch: it stays open for a logger that is listed later."""
        run = self._wandb.run
        assert run is not None
        optimizer = getattr(self.model, "optimizer", None)
        row = {f"epoch/{key}": value for key, value in {**(logs or {}), "epoch": epoch}.items()}
        if optimizer is not None:
            row["epoch/learning_rate"] = float(ops.convert_to_numpy(optimizer.learning_rate))
        run.log(row, commit=False)
        self._pending = run.step
        super().on_epoch_end(epoch, logs)

    def on_train_end(self, logs=None):
        """Completes the row of the last epoch, if nothing else did."""
        self._complete()

    def _complete(self) -> None:
        run = self._wandb.run
        # W&B counts the rows that are complete.
        if run is not None and self._pending is not None and run.step == self._pending:
            run.log({}, commit=True)
        self._pending = None

    def read(self, epoch: int, draw: bool) -> None:
        """Adds histograms, and pictures if it is time to, to the row of the epoch."""
        assert self._wandb.run is not None
        if self._wandb.run.disabled:
            return
        row = {}
        for name, value in self.probe.values.items():
            key = f"{self.probe.prefix}/{name}"
            if (histogram := self._histogram(value)) is not None:
                row[f"{key}_histogram"] = histogram
            if draw and (isinstance(value, SpectralDensity) or value.ndim == 2):
                row[f"{key}_history"] = self._image(picture(name, self.probe.history))
        self._wandb.log(row, commit=False)

    def _histogram(self, value):
        if isinstance(value, SpectralDensity):
            points, density = mean_density(value)
            if not np.isfinite(density).all():
                return None
            width = points[1] - points[0]
            edges = np.append(points, points[-1] + width) - width / 2
            return self._wandb.Histogram(np_histogram=(density, edges))
        # In float64: NumPy cannot bin float32 values that differ by little.
        numbers = np.abs(value) if np.iscomplexobj(value) else value
        numbers = numbers[np.isfinite(numbers)].astype("float64")
        return self._wandb.Histogram(numbers) if numbers.size else None

    def _image(self, png: bytes):
        from PIL import Image

        return self._wandb.Image(Image.open(io.BytesIO(png)))
