"""The metrics of what regularizers measure beside their penalties."""

import math

import keras
from keras import ops


class MeasureTracker(keras.metrics.Metric):
    """A number a step, put together over the steps in which it was computed.

    Args:
        name: of the metric.
        kind: `"mean"` over the examples, `"max"` or `"last"` over the steps; the latter two are of numbers that are
            not negative. Under tf.distribute, the replicas' are averaged.
    """

    def __init__(self, name: str, kind: str):
        super().__init__(name=name)
        self.kind = kind
        aggregation = "sum" if kind == "mean" else "mean"
        self.value = self.add_variable(shape=(), initializer="zeros", aggregation=aggregation, name="value")
        self.count = self.add_variable(shape=(), initializer="zeros", name="count")

    def update_state(self, value, active, batch):
        """Adds a step's `value` over `batch` examples if `active` is 1, and not if it is 0."""
        value, active = ops.cast(value, self.dtype), ops.cast(active, self.dtype)
        before = ops.convert_to_tensor(self.value)
        weight = active * ops.cast(batch, self.dtype)
        if self.kind == "mean":
            new = before + weight * value
        else:
            new = ops.where(active > 0, ops.maximum(before, value) if self.kind == "max" else value, before)
        self.value.assign(new)
        self.count.assign(self.count + weight)

    def result(self):
        """The number; NaN when it was computed in no step."""
        value, count = ops.convert_to_tensor(self.value), ops.convert_to_tensor(self.count)
        if self.kind == "mean":
            value = value / ops.where(count > 0, count, 1.0)
        return ops.where(count > 0, value, math.nan)
