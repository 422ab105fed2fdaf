"""Callbacks that watch the Jacobian of a model while it trains."""

import inspect
import math
import warnings
from collections.abc import Callable, Sequence

import keras
import numpy as np
from keras import ops, tree

from jvpreg import estimators
from jvpreg.graph import standardize_inputs
from jvpreg.linearization import linearize
from jvpreg.registry import unwrap

ESTIMATORS: dict[str, Callable[..., estimators.Estimate]] = {
    "frobenius_norm": estimators.frobenius_norm,
    "top_singular_value": estimators.top_singular_value,
}

# By name: importing wandb to know its classes would make it a dependency.
LOGGERS = {
    "CSVLogger",
    "TensorBoard",
    "WandbMetricsLogger",
    "WandbCallback",
    "RemoteMonitor",
    "SwanLabLogger",
}


class JacobianProbe(keras.callbacks.Callback):
    """Measures the Jacobian on a fixed batch and puts it into `logs`, where every logger after it finds it.

    For each metric `m` it writes `jacobian/m`, the mean over the batch, and `jacobian/m_sem`, the standard error of
    that mean: what the sample of examples and the random probes leave open, together. In an epoch that is not
    measured both are NaN, so that a table has the same columns in each row. The first epoch always is measured.

    The measurement is compiled once, follows the current weights, runs the model as in inference, and leaves its
    training state (weights, moving averages, seeds) as it was. The directions are the same each time, so that two
    epochs differ by the model and not by the draw.

    Args:
        x: the batch, `(B, …)` or a structure of inputs. An exact `‖J‖_F` takes `B × (number of outputs)` tangents in
            memory at once, so 64 to 512 examples are usual.
        metrics: any of `"frobenius_norm"` and `"top_singular_value"`.
        every_epochs: measure at the end of every n-th epoch.
        every_batches: measure also after every n-th batch, into the batch's logs. None: not.
        num_probes: for the norm; with as many as the model has outputs, or more, each example's norm is exact.
        seed: of the directions.
        prefix: of the names in `logs`.

    Attributes:
        values: the last measurement, a dict from metric to an array of one number an example, `(B,)`.

    Raises:
        ValueError: an argument is out of its range, or `x` does not fit the model (before training begins).

    Example:

    >>> import keras, numpy as np, jvpreg
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    >>> model.compile(loss="mse")
    >>> probe = jvpreg.callbacks.JacobianProbe(np.ones((8, 4)), metrics=["frobenius_norm"])
    >>> history = model.fit(np.ones((8, 4)), np.ones((8, 2)), verbose=0, callbacks=[probe])
    >>> sorted(history.history)
    ['jacobian/frobenius_norm', 'jacobian/frobenius_norm_sem', 'loss']
    """

    def __init__(
        self,
        x,
        metrics: Sequence[str] = ("frobenius_norm", "top_singular_value"),
        every_epochs: int = 1,
        every_batches: int | None = None,
        num_probes: int = 16,
        seed: int = 0,
        prefix: str = "jacobian",
    ):
        super().__init__()
        unknown = [name for name in metrics if name not in ESTIMATORS]
        if isinstance(metrics, str) or unknown or not metrics:
            raise ValueError(
                f"Invalid value for argument `metrics`. Expected a list of names among {sorted(ESTIMATORS)}. "
                f"Received: metrics={metrics!r}"
            )
        for name, value in (("every_epochs", every_epochs), ("every_batches", every_batches)):
            if not (isinstance(value, int) and value >= 1) and not (name == "every_batches" and value is None):
                raise ValueError(
                    f"Invalid value for argument `{name}`. Expected an integer, 1 or more. Received: {value!r}"
                )
        if not isinstance(num_probes, int) or num_probes < 1:
            raise ValueError(
                f"Invalid value for argument `num_probes`. Expected an integer, 1 or more. Received: {num_probes!r}"
            )
        self.x = x
        self.metrics = list(metrics)
        self.every_epochs = every_epochs
        self.every_batches = every_batches
        self.num_probes = num_probes
        self.seed = seed
        self.prefix = prefix
        self.values: dict[str, np.ndarray] = {}
        # Keras overlaps batch hooks with the next step for callbacks that say they are safe; one that does nothing is.
        self.async_safe = every_batches is None
        self._measurement: _Measurement | None = None
        self._batches = 0

    def set_model(self, model):
        """Checks the batch against the model, and the order of the callbacks."""
        super().set_model(model)
        base = unwrap(model)
        if self._measurement is None or self._measurement.base is not base:
            measurement = _Measurement(base, self.metrics, self.num_probes, self.seed)
            # What would fail at the end of the first epoch fails here, on one example. On TensorFlow, a model that was
            # given no input shape is built by its first step only.
            if base.built:
                measurement.check(self.x)
            self._measurement = measurement
        _warn_of_loggers_before(self, inspect.currentframe())

    def on_epoch_begin(self, epoch, logs=None):
        """Starts to count batches."""
        self._batches = 0

    def on_epoch_end(self, epoch, logs=None):
        """Puts the measurement, or NaN, into `logs`."""
        due = epoch == 0 or (epoch + 1) % self.every_epochs == 0
        summary = self.measure() if due else dict.fromkeys(self._keys(), math.nan)
        if logs is not None:
            logs.update(summary)

    def on_train_batch_end(self, batch, logs=None):
        """Puts the measurement into the batch's `logs`, when it is due."""
        if self.every_batches is None:
            return
        # Under `steps_per_execution` the hook runs after several batches, and seldom right after an n-th one.
        passed, self._batches = self._batches, batch + 1
        if self._batches // self.every_batches > passed // self.every_batches:
            summary = self.measure()
            if logs is not None:
                logs.update(summary)

    def measure(self) -> dict[str, float]:
        """Measures now.

        Returns:
            A dict from the names in `logs` to numbers. `values` holds what they are the means of.
        """
        assert self.model is not None  # On JAX, reading `model` brings the variables up to date.
        assert self._measurement is not None
        estimates = self._measurement.predict_on_batch(self.x)
        self.values = {name: np.asarray(value) for name, value in estimates.items()}
        summary = {}
        for name in self.metrics:
            values = self.values[name].astype("float64")
            summary[f"{self.prefix}/{name}"] = float(values.mean())
            sem = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
            summary[f"{self.prefix}/{name}_sem"] = float(sem)
        return summary

    def _keys(self) -> list[str]:
        return [f"{self.prefix}/{name}{suffix}" for name in self.metrics for suffix in ("", "_sem")]


class JacobianWandbHistogram(keras.callbacks.Callback):
    """Logs the distribution over examples of what a `JacobianProbe` measured, as W&B histograms, each epoch.

    List it after the probe and before `WandbMetricsLogger`, whose row of the epoch it joins.

    Args:
        probe: the `JacobianProbe` of the same `fit`.

    Raises:
        RuntimeError: no W&B run is active when training begins.
    """

    def __init__(self, probe: JacobianProbe):
        super().__init__()
        import wandb

        self._wandb = wandb
        self.probe = probe

    def on_train_begin(self, logs=None):
        """Checks that a run is active."""
        if self._wandb.run is None:
            raise RuntimeError("`JacobianWandbHistogram` needs an active run: call `wandb.init()` before `fit`.")

    def on_epoch_end(self, epoch, logs=None):
        """Logs a histogram for each metric measured in this epoch."""
        histograms = {}
        for name in self.probe.metrics:
            key = f"{self.probe.prefix}/{name}"
            if math.isfinite((logs or {}).get(key, math.nan)):
                # In float64: NumPy cannot bin float32 values that differ by little.
                histograms[f"{key}_histogram"] = self._wandb.Histogram(self.probe.values[name].astype("float64"))
        if histograms:
            # No step and no commit: WandbMetricsLogger counts steps by its own calls.
            self._wandb.log(histograms, commit=False)


class _Measurement(keras.Model):
    """The estimators as a model, so that Keras compiles them on every backend: `x` to one number an example."""

    def __init__(self, base, metrics, num_probes, seed):
        # Named, because the name Keras would make of a private class's is no valid TensorFlow scope.
        super().__init__(autocast=False, name="measurement")
        self.base = base
        self.arguments = {
            name: {"num_probes": num_probes, "seed": seed} if name == "frobenius_norm" else {"seed": seed}
            for name in metrics
        }
        self.built = True
        self.compile()

    def check(self, x) -> None:
        """Measures one example of the batch `x`, uncompiled, and forgets it.

        Raises:
            NotImplementedError: the model cannot be linearized.
            ValueError: the batch does not fit the model, or the number of probes does not.
        """
        try:
            standardize_inputs(self.base, x)
        except ValueError as error:
            raise ValueError(f"The batch of `JacobianProbe` does not fit the model. {error}") from error
        # Activity losses of the example must not stay behind in the layers.
        with keras.StatelessScope():
            self._estimate(tree.map_structure(lambda leaf: leaf[:1], x))

    def call(self, x):
        if any(isinstance(leaf, keras.KerasTensor) for leaf in tree.flatten(x)):
            batch = tree.flatten(x)[0].shape[0]
            return {name: keras.KerasTensor((batch,)) for name in self.arguments}
        return self._estimate(x)

    def _estimate(self, x) -> dict:
        linearization = linearize(self.base, x, training=False)
        return {
            name: ops.cast(ESTIMATORS[name](linearization, **arguments).value, "float32")
            for name, arguments in self.arguments.items()
        }


def _warn_of_loggers_before(probe: JacobianProbe, frame) -> None:
    """Warns if a logger stands before the probe in the list of callbacks that is just being given its model."""
    # Keras hands a callback its model but not its list, so the list is found in the caller.
    owner = frame.f_back.f_locals.get("self") if frame is not None and frame.f_back is not None else None
    if not isinstance(owner, keras.callbacks.CallbackList) or probe not in owner.callbacks:
        return
    before = owner.callbacks[: owner.callbacks.index(probe)]
    names = [type(callback).__name__ for callback in before if type(callback).__name__ in LOGGERS]
    if names:
        warnings.warn(
            f"{', '.join(names)} stands before JacobianProbe in `callbacks` and will not see what it measures. "
            "Swap them: list JacobianProbe first.",
            stacklevel=2,
        )
