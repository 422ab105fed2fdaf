"""`FixedPointMonitor`: how the solves of fixed-point layers went, in the logs of `fit`."""

import math
import warnings

import keras

from jvpreg.common import keras_private
from jvpreg.common.typing import Logs
from jvpreg.layers import FixedPoint


class FixedPointMonitor(keras.callbacks.Callback):
    """Puts into the logs of an epoch how the solves of each `FixedPoint` layer of the model went.

    For a layer `NAME`, and again with the prefix `val_` if there is validation data:

    - `NAME/iterations` and `NAME/residual`: the means over the examples, the residual of what the layer returns;
    - `NAME/unconverged`: the fraction of the examples that did not converge;
    - `NAME/linear_unconverged`: how many linear solves, for derivatives of an example, did not converge.

    If some did not, it warns or raises at the end of the epoch, as the layer's `unconverged` says. List it before
    loggers, and before a `JacobianProbe`, whose own solves would be counted otherwise.

    Raises:
        ValueError: the model has no such layer, or two of the same name.
        FloatingPointError: a solve did not converge, and the layer has `unconverged="error"`.

    Example:

    >>> import keras, numpy as np, jvpreg
    >>> x, z = keras.Input((4,)), keras.Input((4,))
    >>> cell = keras.Model([x, z], keras.ops.tanh(keras.layers.Dense(4)(x) + 0.1 * z))
    >>> layer = jvpreg.layers.FixedPoint(cell, name="equilibrium")
    >>> model = keras.Sequential([keras.Input((4,)), layer])
    >>> model.compile(loss="mse")
    >>> monitor = jvpreg.callbacks.FixedPointMonitor()
    >>> history = model.fit(np.ones((8, 4)), np.ones((8, 4)), verbose=0, callbacks=[monitor])
    >>> sorted(history.history)[:2]
    ['equilibrium/iterations', 'equilibrium/linear_unconverged']
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers: list[FixedPoint] = []
        self._summary: dict[str, float] = {}
        self._fitting = False

    def set_model(self, model: keras.Model) -> None:
        """Finds the layers."""
        super().set_model(model)
        self.layers = [layer for layer in keras_private.layers_within(model) if isinstance(layer, FixedPoint)]
        names = [layer.name for layer in self.layers]
        if not names or len(set(names)) < len(names):
            raise ValueError(
                f"`FixedPointMonitor` expects a model with FixedPoint layers, each with a name of its own. Received: "
                f"`{model.name}`, with {names or 'none'}."
            )
        for layer in self.layers:
            layer.is_watched = True

    def on_train_begin(self, logs: Logs | None = None) -> None:
        """Forgets what was counted before."""
        self._fitting = True
        self._take()

    def on_epoch_begin(self, epoch: int, logs: Logs | None = None) -> None:
        """Forgets the solves of other callbacks between epochs."""
        self._take()
        self._summary = {}

    def on_test_begin(self, logs: Logs | None = None) -> None:
        """Separates the epoch's training from its validation."""
        counted = self._take()
        if self._fitting:
            self._summary |= counted

    def on_test_end(self, logs: Logs | None = None) -> None:
        """Notes how the validation went; in `evaluate`, warns or raises."""
        counted = self._take()
        if self._fitting:
            self._summary |= {f"val_{name}": value for name, value in counted.items()}
        else:
            self._tell(counted)

    def on_epoch_end(self, epoch: int, logs: Logs | None = None) -> None:
        """Puts the numbers into the logs, and warns or raises."""
        if not self._summary:
            self._summary = self._take()
        if logs is not None:
            logs.update(self._summary)
        self._tell(self._summary)

    def on_train_end(self, logs: Logs | None = None) -> None:
        """Lets the layers warn by themselves again."""
        self._fitting = False
        for layer in self.layers:
            layer.is_watched = False

    def _take(self) -> dict[str, float]:
        assert self.model is not None  # On JAX, reading `model` brings the variables up to date.
        found = {}
        for layer in self.layers:
            counts = layer.take_counts()
            examples = counts["examples"] or math.nan
            for name in ("iterations", "residual", "unconverged"):
                found[f"{layer.name}/{name}"] = counts[name] / examples
            found[f"{layer.name}/linear_unconverged"] = counts["linear_unconverged"]
        return found

    def _tell(self, summary: dict[str, float]) -> None:
        for layer in self.layers:
            names = ("unconverged", "linear_unconverged")
            keys = [f"{part}{layer.name}/{name}" for part in ("", "val_") for name in names]
            failed = {key: round(summary[key], 6) for key in keys if summary.get(key, 0.0) > 0}
            if not failed or layer.unconverged == "ignore":
                continue
            told = (
                f"Solves of `{layer.name}` have not reached a residual of {layer.tolerance:.0e} in "
                f"{layer.max_iterations} iterations, so outputs or gradients are wrong: {failed}. Raise "
                "`max_iterations` or `tolerance`, or make the cell more of a contraction "
                "(`jvpreg.regularizers.FixedPointJacobianNorm`)."
            )
            if layer.unconverged == "error":
                raise FloatingPointError(told)
            warnings.warn(told, stacklevel=2)
