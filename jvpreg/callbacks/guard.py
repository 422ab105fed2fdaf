"""`JacobianGuard`: notices when a Jacobian explodes, collapses or is not finite, and says in which layer it began."""

import math
import warnings
from collections import deque
from collections.abc import Iterable
from typing import Literal, NamedTuple

import keras
import numpy as np
from keras import ops

from jvpreg import probes
from jvpreg.callbacks.measurement import Measurement
from jvpreg.callbacks.probe import JacobianProbe
from jvpreg.callbacks.reader import check_probe, checked_probe
from jvpreg.common import checks
from jvpreg.common.dtypes import has_tangents
from jvpreg.common.typing import Logs, Structure, Tensor
from jvpreg.engine.node import Node
from jvpreg.linearization import Linearization
from jvpreg.rules.registry import unwrap

NUM_PROBES = 4
FINITE = {"weights": "its weights are not finite", "output": "its output is not finite"}
HAPPENED = {"non-finite": "is not finite", "explosion": "exploded", "collapse": "collapsed"}


class GuardEvent(NamedTuple):
    """What a `JacobianGuard` noticed.

    Attributes:
        kind: `"non-finite"`, `"explosion"` or `"collapse"`.
        epoch: counted from 0.
        batch: counted from 0; None at the end of an epoch.
        value: of the metric.
        reference: the median of the last healthy values; NaN if there were none.
        layer: the name of the node in which it began; None if it cannot be told.
        reason: what is wrong in that node.
    """

    kind: str
    epoch: int
    batch: int | None
    value: float
    reference: float
    layer: str | None
    reason: str


class JacobianGuard(keras.callbacks.Callback):
    """Warns, or stops training, when a `JacobianProbe` measures a value that is not finite, explodes or collapses.

    It compares each measurement with the median of the last healthy ones. Each time that a value leaves the healthy
    range, it says in which layer that began. For a value that is not finite, this is the first layer whose weights,
    output or tangent is not finite. One step after a loss of NaN the weights of all layers are NaN, so only a probe
    with `every_batches=1` can show the origin. For an explosion or a collapse, it is the layer whose gain (by how much
    it stretches random tangents) has changed most since the healthy measurements.

    List it after its probe. Each measurement costs a linearization and four products on the probe's batch. If the
    probe has a `folder`, a `fit` that resumes an earlier one keeps its reference.

    Args:
        probe: the `JacobianProbe` of the same `fit`.
        monitor: which metric to guard; it must be positive: a name in `logs`, without the probe's prefix.
        explosion: a value above this many times the reference is an explosion.
        collapse: a value below this fraction of the reference is a collapse.
        window: the reference is the median of this many healthy values.
        action: `"warn"` only warns; `"stop"` also ends training at the end of the batch or epoch.

    Attributes:
        events: what was noticed in this `fit`, a list of `GuardEvent`.

    Raises:
        ValueError: an argument is out of its range, or the probe does not measure the metric (before training
            begins).

    Example:

    >>> import keras, numpy as np, jvpreg
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    >>> model.compile(loss="mse")
    >>> probe = jvpreg.callbacks.JacobianProbe(np.ones((8, 4)))
    >>> guard = jvpreg.callbacks.JacobianGuard(probe, explosion=5.0)
    >>> history = model.fit(np.ones((8, 4)), np.ones((8, 2)), verbose=0, callbacks=[probe, guard])
    >>> guard.events
    []
    """

    def __init__(
        self,
        probe: JacobianProbe,
        monitor: str = "frobenius_norm",
        explosion: float = 10.0,
        collapse: float = 0.1,
        window: int = 5,
        action: Literal["stop", "warn"] = "stop",
    ):
        super().__init__()
        self.probe = checked_probe(probe)
        self.monitor = checks.text("monitor", monitor)
        self.explosion = checks.number("explosion", explosion, above=1, finite=False)
        self.collapse = checks.number("collapse", collapse, least=0, below=1)
        self.window = checks.count("window", window)
        self.action = checks.choice("action", action, ("stop", "warn"))
        self.events: list[GuardEvent] = []
        self.async_safe = probe.async_safe
        self._key = f"{probe.prefix}/{monitor}"
        self._layers: _Layers | None = None

    def on_train_begin(self, logs: Logs | None = None) -> None:
        """Checks that the probe measures the metric, and forgets earlier events."""
        check_probe(self)
        if self.probe.keys and self._key not in self.probe.keys:
            names = [key.removeprefix(f"{self.probe.prefix}/") for key in self.probe.keys]
            raise checks.invalid("monitor", f"a metric that the probe measures: {names}", self.monitor)
        if self._layers is None or self._layers.base is not unwrap(self.model):
            self._layers = _Layers(unwrap(self.model))
        self.events = []
        self._healthy: deque[float] = deque(maxlen=self.window)
        self._gains: deque[np.ndarray] = deque(maxlen=self.window)
        self._state: str | None = None
        self._epoch: int | None = None

    def on_epoch_begin(self, epoch: int, logs: Logs | None = None) -> None:
        """Remembers the epoch; before the first epoch of a `fit`, judges those that were measured earlier."""
        if self._epoch is None:
            self._look_back()
        self._epoch = epoch

    def on_train_batch_end(self, batch: int, logs: Logs | None = None) -> None:
        """Looks at the batch's measurement, if there is one."""
        if logs and self._key in logs:
            self._look(logs[self._key], batch)

    def on_epoch_end(self, epoch: int, logs: Logs | None = None) -> None:
        """Looks at the epoch's measurement, if there is one."""
        if self.probe.epoch == epoch and logs and self._key in logs:
            self._look(logs[self._key], None)

    def _look_back(self) -> None:
        """Judges the epochs that an earlier `fit` measured, as that one did, but without warnings.

        The gains of the layers are today's: the models of those epochs no longer exist.
        """
        for epoch in self.probe.history:
            self._judge(self.probe.logged(epoch)[self._key])
        if self._healthy and self._state is None:
            self._note_gains()

    def _look(self, value: float, batch: int | None) -> None:
        before = self._state
        reference = self._judge(value)
        if self._state is None:
            self._note_gains()
        elif self._state != before:
            assert self._epoch is not None
            usual = np.median(self._gains, axis=0) if self._gains else None
            layer, reason = self._measured_layers().origin(self._state, usual)
            self._report(GuardEvent(self._state, self._epoch, batch, value, reference, layer, reason))

    def _note_gains(self) -> None:
        gains = self._measured_layers().gains
        if np.isfinite(gains).all():  # Otherwise the median would be NaN for `window` measurements.
            self._gains.append(gains)

    def _measured_layers(self) -> "_State":
        assert self.model is not None  # On JAX, reading `model` brings the variables up to date.
        assert self._layers is not None
        return self._layers.measure(self.probe.x)

    def _judge(self, value: float) -> float:
        """Notes in which state a value is, and returns the reference that it was compared with."""
        reference = float(np.median(self._healthy)) if self._healthy else math.nan
        self._state = self._kind(value, reference)
        if self._state is None:
            self._healthy.append(value)
        return reference

    def _kind(self, value: float, reference: float) -> str | None:
        if not math.isfinite(value):
            return "non-finite"
        if value > self.explosion * reference:
            return "explosion"
        return "collapse" if value < self.collapse * reference else None

    def _report(self, event: GuardEvent) -> None:
        self.events.append(event)
        # Counted from 1, as in Keras' progress bar.
        when = f"Epoch {event.epoch + 1}" + ("" if event.batch is None else f", batch {event.batch + 1}")
        against = "" if math.isnan(event.reference) else f" against {event.reference:.3g} before"
        where = f"It began in `{event.layer}`: {event.reason}." if event.layer else "No layer stands out."
        stop = self.action == "stop"
        if stop:
            self.model.stop_training = True
        warnings.warn(
            f"{when}: `{self._key}` {HAPPENED[event.kind]}: {event.value:.3g}{against}. {where}"
            + (" Training stops." if stop else ""),
            stacklevel=2,
        )


class _State(NamedTuple):
    """For each node, in the order in which they ran: whether its weights and output are finite, and its gain."""

    names: list[str]
    weights: np.ndarray
    output: np.ndarray
    gains: np.ndarray

    def origin(self, kind: str, usual: np.ndarray | None) -> tuple[str | None, str]:
        """The node in which it began, and what is wrong there."""
        healthy = self.weights & self.output & np.isfinite(self.gains)
        if not healthy.all():  # Also for an explosion or a collapse: a nonlinearity may turn NaN into 0.
            first = int(np.argmin(healthy))
            reasons = [reason for part, reason in FINITE.items() if not getattr(self, part)[first]]
            return self.names[first], (reasons or ["the tangent that leaves it is not finite"])[0]
        if kind == "non-finite" or usual is None or not self.gains.any():
            return None, ""
        tiny = np.finfo("float32").tiny
        changes = np.log(np.maximum(self.gains, tiny)) - np.log(np.maximum(usual, tiny))
        most = int(np.argmax(changes) if kind == "explosion" else np.argmin(changes))
        reason = f"it stretched random tangents by {usual[most]:.2g} before, now by {self.gains[most]:.2g}"
        return self.names[most], reason


class _Layers:
    """The state of each node of a model, measured by a function that is compiled once."""

    def __init__(self, base: keras.Model):
        self.base = base
        self.names: list[str] = []
        self._measurement = Measurement(base, self._state)

    def measure(self, x: Structure) -> _State:
        found = self._measurement.predict_on_batch(x)
        # All examples have the same value.
        weights, output, gains = (np.asarray(found[key])[0] for key in ("weights", "output", "gains"))
        return _State(self.names, weights, output, gains)

    def _state(self, linearization: Linearization) -> dict:
        nodes = [node for node in linearization.nodes if any(value.batched for value in node.outputs)]
        self.names = [node.name for node in nodes]
        u = probes.draw("gaussian", linearization.inputs, NUM_PROBES, seed=0)
        gains = linearization.gains(linearization.pack_inputs(u))
        zero = ops.zeros((NUM_PROBES,))
        found = {
            "weights": [_all_finite(_weights(node)) for node in nodes],
            "output": [_all_finite(value.primal for value in node.outputs) for node in nodes],
            "gains": [ops.mean(ops.cast(gains.get(node.name, zero), "float32")) for node in nodes],
        }
        # Keras may cut a batch and join the results of its parts: one row for each example.
        batch = ops.shape(linearization.inputs[0])[0]
        return {key: ops.broadcast_to(ops.stack(row), (batch, len(nodes))) for key, row in found.items()}


def _weights(node: Node) -> list:
    """The weights of a node: those of its layer, and those that an operation of an opened layer takes as inputs."""
    return [*getattr(node.operation, "weights", []), *(value.primal for value in node.inputs if not value.batched)]


def _all_finite(tensors: Iterable[Tensor]) -> Tensor:
    finite = [ops.all(ops.isfinite(ops.convert_to_tensor(t))) for t in tensors if has_tangents(t)]
    return ops.all(ops.stack(finite)) if finite else ops.convert_to_tensor(True)
