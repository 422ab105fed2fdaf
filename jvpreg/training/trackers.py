"""The metrics of penalties and of what regularizers measure beside them, and the watch over both."""

import math
from typing import Any

import keras
from keras import ops

from jvpreg.common.typing import Logs, Tensor


class MeasureTracker(keras.metrics.Metric):
    """A number for each step, combined over the steps in which it was computed.

    Args:
        name: of the metric.
        kind: `"mean"` over the examples, `"max"` over the steps, or `"last"`, the last step's. For `"max"` and `"last"`
            numbers must not be negative. Under tf.distribute each replica is given the numbers of the whole batch.
    """

    def __init__(self, name: str, kind: str):
        super().__init__(name=name)
        self.kind = kind
        aggregation = "sum" if kind == "mean" else "mean"
        self.value = self.add_variable(shape=(), initializer="zeros", aggregation=aggregation, name="value")
        self.count = self.add_variable(shape=(), initializer="zeros", name="count")

    def update_state(self, value: Tensor, active: Tensor, batch: Tensor) -> None:
        """Adds a step's `value` over `batch` examples if `active` is 1; does nothing if it is 0."""
        value, active = ops.cast(value, self.dtype), ops.cast(active, self.dtype)
        before = ops.convert_to_tensor(self.value)
        weight = active * ops.cast(batch, self.dtype)
        if self.kind == "mean":
            new = before + weight * value
        else:
            # Not every backend's maximum of a number and NaN is NaN.
            largest = ops.where(ops.isnan(before + value), math.nan, ops.maximum(before, value))
            new = ops.where(active > 0, largest if self.kind == "max" else value, before)
        self.value.assign(new)
        self.count.assign(self.count + weight)

    def result(self) -> Tensor:
        """The number; NaN if no step computed it."""
        value, count = ops.convert_to_tensor(self.value), ops.convert_to_tensor(self.count)
        if self.kind == "mean":
            value = value / ops.where(count > 0, count, 1.0)
        return ops.where(count > 0, value, math.nan)


class PenaltyTracker(keras.metrics.Mean):
    """The mean of a penalty over the examples of the steps in which it was computed, and its first failure.

    Attributes:
        carried: the variable that the regularizer carries from step to step, which outlives every reset; or None.
    """

    def __init__(self, name: str):
        super().__init__(name=name)
        self.carried: Any = None
        # Of the first replica: Keras would sum over the replicas, and all of them have the same step.
        self.failed_at = self.add_variable(
            shape=(), initializer="zeros", dtype="int32", aggregation="only_first_replica", name="failed_at"
        )

    def carry(self, arguments: dict[str, Any]) -> None:
        """Makes the variable `carried`."""
        # Not by `add_variable`: its variables differ between replicas until they are read for the logs.
        self.carried = keras.Variable(**arguments)

    def reset_state(self) -> None:
        """As Keras', but keeps what is carried."""
        for variable in self.variables:
            if variable is not self.carried:
                variable.assign(ops.zeros(variable.shape, dtype=variable.dtype))

    def update_state(self, mean: Tensor, active: Tensor, batch: Tensor, step: Tensor) -> None:
        """Adds a step's `mean` over `batch` examples if `active` is 1; does nothing if it is 0.

        `step` is the number of the training step, from 1, so that 0 says that nothing failed; None in evaluation.
        """
        weight = ops.cast(active, "float32") * ops.cast(batch, "float32")
        # A mean that was not computed is 0, so that a weight of 0 is harmless.
        super().update_state(mean, sample_weight=weight)
        if step is not None:
            failed_at = ops.convert_to_tensor(self.failed_at)
            first = ops.logical_and(ops.equal(failed_at, 0), ops.logical_not(ops.isfinite(mean)))
            self.failed_at.assign(ops.where(first, ops.cast(step, "int32"), failed_at))

    def result(self) -> Tensor:
        """The mean; NaN, not 0, if no step computed the penalty (an epoch shorter than the interval)."""
        return ops.where(ops.equal(self.count, 0), math.nan, super().result())


class StopAtNonFinitePenalty(keras.callbacks.Callback):
    """Raises at the end of an epoch in which a penalty was not finite, so that no step has to wait for its number."""

    def __init__(self, trackers: list[PenaltyTracker]):
        super().__init__()
        self.trackers = trackers

    def on_train_begin(self, logs: Logs | None = None) -> None:
        """Forgets earlier failures."""
        for tracker in self.trackers:
            tracker.failed_at.assign(0)

    def on_epoch_end(self, epoch: int, logs: Logs | None = None) -> None:
        """Raises, if a penalty of the epoch was not finite."""
        for tracker in self.trackers:
            if not math.isfinite((logs or {}).get(tracker.name, 0.0)):
                assert self.model is not None  # On JAX, reading `model` brings the variables up to date.
                if float(ops.convert_to_numpy(tracker.count)) == 0:
                    continue
                step = int(ops.convert_to_numpy(tracker.failed_at))
                raise FloatingPointError(
                    f"The penalty `{tracker.name}` was not finite at training step {step} (epoch {epoch + 1}). "
                    "Look for inputs and labels of that step that are not finite, or no class (-1, which a loss with "
                    "`ignore_class` leaves out, has no output); otherwise lower its strength or the learning rate, or "
                    "clip gradients (`clipnorm` of the optimizer). The weights have since been updated with it, so "
                    "start from an earlier checkpoint."
                )
