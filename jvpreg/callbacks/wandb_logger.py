"""`JacobianWandbLogger`: epochs and batches in Weights & Biases, with the distributions and spectra of a probe."""

import inspect
import io
import os
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from jvpreg.callbacks.figures import mean_density
from jvpreg.callbacks.hooks import batches_taken, is_due, listed_before
from jvpreg.callbacks.measured import Result
from jvpreg.callbacks.probe import JacobianProbe
from jvpreg.callbacks.reader import ProbeReader, picture
from jvpreg.callbacks.rows import Rows, read_epochs, rows_before
from jvpreg.callbacks.settings import settings
from jvpreg.common import checks
from jvpreg.common.typing import Logs
from jvpreg.estimators import SpectralDensity


class JacobianWandbLogger(ProbeReader):
    """Logs every epoch and the measurements of a `JacobianProbe`: a histogram of each metric, and pictures of spectra.

    The row of an epoch has everything in `logs` (the loss, metrics, the means of the probe) and the learning rate,
    under the keys that W&B's `WandbMetricsLogger` uses, such as `epoch/loss` and `epoch/jacobian/m`. It also has:

    - `jacobian/m_histogram`: of a metric's values over the examples (of their magnitudes if they are complex); of a
      density, the density of all examples together;
    - `jacobian/m_history`: the picture of the epochs so far, as `JacobianPictures` draws it, if the metric is a density
      or several numbers for each example.

    Their charts are drawn against the epoch. With `every_batches` there are also rows of batches, under `batch/…`,
    drawn against `batch/batch_step`, the number of steps that the optimizer has taken. The entry `jacobian` of the
    run's config gets the regularizers with their strengths, the interval and the fraction of a `JacobianModel`, and the
    metrics and the number of examples of the probe.

    List it after the probe. It needs no other logger, and no TensorFlow. Another `JacobianWandbLogger` (of another
    probe) or a `WandbMetricsLogger` that is listed after it writes into the same rows. It needs wandb, and for the
    pictures matplotlib.

    Resumed runs: an offline run has one file for each process. With `history`, the process that continues logs the rows
    of the earlier epochs again into its own file, as they were, so that `wandb sync` of the last file uploads the whole
    run. For histograms and pictures the probe needs a `folder`. If W&B's server has resumed the run, only what the
    server lacks is logged again.

    Args:
        probe: the `JacobianProbe` of the same `fit`, listed before.
        every_epochs: draw after every n-th epoch that was measured, and after the last. A picture takes 0.1 to 0.2
            seconds.
        every_batches: log a row also after every n-th batch of an epoch. None: only epochs.
        history: the run's CSV file with a row for each epoch, as `keras.callbacks.CSVLogger` writes it, or None.

    Raises:
        RuntimeError: no W&B run is active when training begins.
        ValueError: an argument is out of its range; or (before training begins) the probe is not listed, or a
            `WandbMetricsLogger` is listed before.
        ImportError: wandb or matplotlib is not installed.

    Example:

    >>> import keras, numpy as np, jvpreg, wandb
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    >>> model.compile(loss="mse")
    >>> probe = jvpreg.callbacks.JacobianProbe(np.ones((8, 4)), ["singular_values"])
    >>> logger = jvpreg.callbacks.JacobianWandbLogger(probe)
    >>> with wandb.init(mode="disabled"):
    ...     history = model.fit(np.ones((8, 4)), np.ones((8, 2)), verbose=0, callbacks=[probe, logger])
    """

    def __init__(
        self,
        probe: JacobianProbe,
        every_epochs: int = 1,
        every_batches: int | None = None,
        history: str | os.PathLike | None = None,
    ):
        super().__init__(probe, every_epochs)
        checks.packages("JacobianWandbLogger", "wandb", "wandb", "matplotlib")
        import wandb

        self._wandb = wandb
        self.every_batches = checks.count("every_batches", every_batches, optional=True)
        self.history = checks.path("history", history, optional=True)
        # As in the probe: Keras need not wait for a hook that does nothing.
        self.async_safe = every_batches is None
        self._rows: Rows | None = None
        self._begins = True
        self._steps = self._passed = 0

    def set_model(self, model: keras.Model) -> None:
        """Checks that no earlier logger completes its rows."""
        super().set_model(model)
        before = listed_before(self, inspect.currentframe())
        if any(type(callback).__name__ == "WandbMetricsLogger" for callback in before):
            raise ValueError(
                "`WandbMetricsLogger` stands before `JacobianWandbLogger` in `callbacks`, so that each epoch would "
                "have two rows. Swap them, or leave it out: `JacobianWandbLogger` logs the same."
            )

    def on_train_begin(self, logs: Logs | None = None) -> None:
        """Checks that a run is active, sets the axes of its charts, and writes into its config."""
        super().on_train_begin(logs)
        self._begins = True
        self._rows = Rows.of(self._run())
        self._tell(self._run())

    def on_epoch_begin(self, epoch: int, logs: Logs | None = None) -> None:
        """Completes the row of the last epoch; before the first one of a `fit`, logs what the run lacks."""
        assert self._rows is not None
        self._rows.complete()
        self._passed = 0
        if self._begins:
            self._begins = False
            self._steps = self._steps_taken()
            self._repeat(self._rows, epoch, (self.params or {}).get("epochs"))

    def on_train_batch_begin(self, batch: int, logs: Logs | None = None) -> None:
        """Completes the row of the last batch."""
        assert self._rows is not None
        self._rows.complete()
        self._rows.log_repeated()  # Only now has each logger had its `on_epoch_begin`.

    def on_train_batch_end(self, batch: int, logs: Logs | None = None) -> None:
        """Begins the row of the batch if it is due. It stays open for loggers that are listed later."""
        if self.every_batches is None:
            return
        assert self._rows is not None
        passed, self._passed = self._passed, batches_taken(self, batch)
        self._steps += self._passed - passed
        if is_due(passed, self._passed, self.every_batches):
            row = {**(logs or {}), "batch_step": self._steps, **self._learning_rate()}
            self._rows.add("batch", self._steps, {f"batch/{key}": value for key, value in row.items()})

    def on_epoch_end(self, epoch: int, logs: Logs | None = None) -> None:
        """Begins the row of the epoch. It stays open for loggers that are listed later."""
        assert self._rows is not None
        if not self._run().disabled:
            numbers = {**(logs or {}), **self._learning_rate()}
            self._rows.add("epoch", epoch, self._row(epoch, numbers, (self.params or {}).get("epochs")))

    def on_train_end(self, logs: Logs | None = None) -> None:
        """Completes the row of the last epoch."""
        assert self._rows is not None
        self._rows.complete()

    def log_history(self, before: int) -> None:
        """Logs the rows of the epochs before this one again, if the active W&B run does not have them.

        A `fit` does this before its first epoch; call it for a run that has no epoch left to train.

        Args:
            before: an epoch, counted from 0.

        Raises:
            RuntimeError: no W&B run is active.
            ValueError: the logger has no `history`.
        """
        if self.history is None:
            raise checks.invalid("history", "a path, for `log_history`", None)
        before = checks.count("before", before, least=0)
        run = self._run()
        self.probe.restore(before)
        self._tell(run)
        rows = Rows.of(run)
        self._repeat(rows, before, before)
        rows.log_repeated()

    def _run(self) -> Any:
        if self._wandb.run is None:
            raise RuntimeError("`JacobianWandbLogger` needs an active run: call `wandb.init()` before `fit`.")
        return self._wandb.run

    def _tell(self, run: Any) -> None:
        for step, names in (
            ("epoch/epoch", ["epoch", self.probe.prefix]),
            ("batch/batch_step", ["batch"] * (self.every_batches is not None)),
        ):
            for name in names:
                run.define_metric(step)
                run.define_metric(f"{name}/*", step_metric=step)
        run.config.update(settings(self.probe, self.model, run.config), allow_val_change=True)

    def _repeat(self, rows: Rows, before: int, epochs: int | None) -> None:
        """Logs the epochs before this one again; the run has `epochs` in all."""
        if self.history is None or before == 0 or self._run().disabled:
            return
        for epoch, numbers in sorted(read_epochs(self.history, before).items()):
            rows.repeat(epoch, self._step_of(epoch, before), self._row(epoch, numbers, epochs))

    def _step_of(self, epoch: int, before: int) -> int:
        """W&B's step for an epoch's row, in a run to which nothing else is logged."""
        steps = (self.params or {}).get("steps") or self._steps // before or None
        at_once = getattr(self.model, "steps_per_execution", 1) or 1
        return rows_before(epoch, steps, at_once, self.every_batches)

    def _steps_taken(self) -> int:
        """The number of training steps, as the optimizer counts them."""
        optimizer = getattr(self.model, "optimizer", None)
        if optimizer is None:
            return 0
        at_once = getattr(optimizer, "gradient_accumulation_steps", None) or 1
        return int(ops.convert_to_numpy(optimizer.iterations)) * at_once

    def _learning_rate(self) -> dict[str, float]:
        optimizer = getattr(self.model, "optimizer", None)
        return {} if optimizer is None else {"learning_rate": float(ops.convert_to_numpy(optimizer.learning_rate))}

    def _row(self, epoch: int, numbers: Mapping[str, float], epochs: int | None) -> dict[str, Any]:
        """The row of an epoch: its numbers, histograms of what the probe measured, and pictures if they are due."""
        row: dict[str, Any] = {f"epoch/{key}": value for key, value in {**numbers, "epoch": epoch}.items()}
        history = {at: measured for at, measured in self.probe.history.items() if at <= epoch}
        draw = epoch + 1 == epochs or len(history) % self.every_epochs == 0
        for name, result in history.get(epoch, {}).items():
            key = f"{self.probe.prefix}/{name}"
            if (histogram := self._histogram(result)) is not None:
                row[f"{key}_histogram"] = histogram
            if draw and (isinstance(result, SpectralDensity) or result.value.ndim == 2):
                row[f"{key}_history"] = self._image(picture(name, history))
        return row

    def _histogram(self, result: Result) -> Any:
        if isinstance(result, SpectralDensity):
            points, density = mean_density(result)
            if not np.isfinite(density).all():
                return None
            width = points[1] - points[0]
            edges = np.append(points, points[-1] + width) - width / 2
            return self._wandb.Histogram(np_histogram=(density, edges))
        # In float64: NumPy cannot bin float32 values that are nearly equal.
        numbers = np.abs(result.value) if np.iscomplexobj(result.value) else result.value
        numbers = numbers[np.isfinite(numbers)].astype("float64")
        return self._wandb.Histogram(numbers) if numbers.size else None

    def _image(self, png: bytes) -> Any:
        from PIL import Image

        return self._wandb.Image(Image.open(io.BytesIO(png)))
