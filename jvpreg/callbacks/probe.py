"""`JacobianProbe`: any estimator of the Jacobian, on a fixed batch, in the logs of `fit`."""

import functools
import inspect
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import tree

from jvpreg import estimators
from jvpreg.callbacks.history import History
from jvpreg.callbacks.hooks import batches_taken, is_due, listed_before
from jvpreg.callbacks.measured import Measured, as_parts, each_part, from_parts, kept, nothing_like
from jvpreg.callbacks.measurement import Measurement, as_array, as_arrays
from jvpreg.callbacks.summary import summary
from jvpreg.common import checks
from jvpreg.common.typing import ArrayLike, Logs, Seed, Structure
from jvpreg.engine.finite import finite_examples
from jvpreg.engine.starts import check_path, started_at
from jvpreg.linearization import Linearization
from jvpreg.rules.registry import unwrap

ESTIMATORS: dict[str, Callable] = {name: getattr(estimators, name) for name in estimators.__all__ if name.islower()}

OWNER = "`JacobianProbe`"

# By name, so that wandb need not be imported.
READERS = {
    "CSVLogger",
    "JacobianGuard",
    "JacobianPictures",
    "JacobianProgbarLogger",
    "JacobianWandbLogger",
    "RemoteMonitor",
    "SwanLabLogger",
    "TensorBoard",
    "WandbCallback",
    "WandbMetricsLogger",
}


class JacobianProbe(keras.callbacks.Callback):
    """Measures the Jacobian on a fixed batch and puts it into `logs`, where every logger after it finds it.

    The measurement is compiled once, uses the current weights, runs the model in inference mode, and leaves its
    training state (weights, moving averages, seeds) as it was. The directions are the same each time, so that epochs
    differ by the model only, not by the draw.

    The names in `logs` follow, for a metric `m` and the prefix `jacobian`. The first epoch is always measured. In an
    epoch that is not measured each name is NaN, so that a table has the same columns in every row:

    - `jacobian/m`: the mean over the batch, if `m` is one number for each example;
    - `jacobian/m_1`, `jacobian/m_2`, …: the means, if it is several, such as `top_singular_values_1`;
    - `…_sem`: the standard error of each of these means, due to both the sample of examples and the random probes;
    - `…_abs`, `…_real` and `…_imag`: three means in place of one, if the values are complex;
    - `jacobian/eigenvalue_J_1_abs`, … for `"top_eigenvalues"` of a square `J`; `jacobian/eigenvalue_JJT_1`, … if `J` is
      not square: these are the eigenvalues of `J Jᵀ`;
    - `jacobian/m_converged`: the fraction of examples whose values all converged, if the `Estimate` says it of them;
    - `jacobian/after/LAYER/m`: of the outputs with respect to a layer's output, for each of `layers`;
    - `jacobian/block/LAYER/m`: of a layer's or block's output with respect to its own input, for each of `blocks`;
    - `jacobian/class_3/m`: for the examples of class 3 only, before `after/` and `block/`, if there are `labels`.

    A density, or anything else that is not `(B,)` or `(B, k)`, is not in `logs` but in `values`, and in the pictures of
    `JacobianPictures` and `JacobianWandbLogger`. An example with an input or output that is not finite counts as NaN.

    Args:
        x: the batch, `(B, …)` or a structure of inputs, as arrays or tensors of any library. An exact `‖J‖_F` takes
            `B × (number of outputs)` products, so 64 to 512 examples are usual.
        metrics: names of functions in `jvpreg.estimators`; or a dict from a name in `logs` to such a name, or to a
            function of a `Linearization` that returns an `Estimate`, a `SpectralDensity`, or a tensor `(B,)` or
            `(B, k)`.
        at: the path of a layer, as `jvpreg.linearize` takes it: the metrics are of the outputs with respect to what it
            returned. For token ids it is the embedding.
        labels: integers `(B,)`, to measure each class too.
        layers: paths of layers, as `Linearization.after` takes them.
        blocks: paths of layers or of blocks of them, as `Linearization.block` takes them.
        every_epochs: measure at the end of every n-th epoch.
        every_batches: measure also after every n-th batch, into the batch's logs. None: only after epochs.
        seed: of the directions, for metrics given by name.
        prefix: of the names in `logs`. Two probes in one `fit` need two.
        folder: where the measurement of each epoch is kept, as `epoch-00003.npz`. A `fit` that continues an earlier
            one, in another process too, then has its `history`: pictures show all epochs, and a `JacobianGuard` keeps
            its reference. None: nowhere.

    Attributes:
        values: the last measurement, a dict from metric (also `after/LAYER/m` and so on) to an `Estimate` or a
            `SpectralDensity` of arrays. An `Estimate` has `value` and, if the estimator iterates, `converged` (1, 0, or
            NaN for an example that is not finite); the other parts are None, and so is `num_matvecs` of a density.
        epoch: the epoch at whose end it was made; None if the last epoch was not measured.

    Raises:
        ValueError: an argument is out of its range, or `x`, a layer or a metric does not fit the model (before
            training begins).
        OSError: the folder cannot be made (before training begins) or written to.

    Example:

    >>> import functools, keras, numpy as np, jvpreg
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    >>> model.compile(loss="mse")
    >>> probe = jvpreg.callbacks.JacobianProbe(np.ones((8, 4)), ["frobenius_norm"])
    >>> top = functools.partial(jvpreg.estimators.top_singular_values, k=2)
    >>> unseen = jvpreg.callbacks.JacobianProbe(np.zeros((8, 4)), {"sigma": top}, prefix="val_jacobian")
    >>> history = model.fit(np.ones((8, 4)), np.ones((8, 2)), verbose=0, callbacks=[probe, unseen])
    >>> sorted(history.history)[:3]
    ['jacobian/frobenius_norm', 'jacobian/frobenius_norm_sem', 'loss']
    >>> sorted(history.history)[3:]  # doctest: +NORMALIZE_WHITESPACE
    ['val_jacobian/sigma_1', 'val_jacobian/sigma_1_sem', 'val_jacobian/sigma_2', 'val_jacobian/sigma_2_sem',
     'val_jacobian/sigma_converged']
    """

    def __init__(
        self,
        x: Structure,
        metrics: Sequence[str] | Mapping[str, str | Callable] = ("frobenius_norm", "spectral_norm"),
        *,
        at: str | None = None,
        labels: ArrayLike | None = None,
        layers: Sequence[str] = (),
        blocks: Sequence[str] = (),
        every_epochs: int = 1,
        every_batches: int | None = None,
        seed: int = 0,
        prefix: str = "jacobian",
        folder: str | os.PathLike | None = None,
    ):
        super().__init__()
        self.x = as_arrays(x)
        self.size = _batch_size(self.x)
        self.seed = checks.seed("seed", seed)
        self.metrics = _functions(metrics, self.seed)
        self.at = checks.text("at", at, optional=True)
        self.layers = checks.paths("layers", layers)
        self.blocks = checks.paths("blocks", blocks)
        self.every_epochs = checks.count("every_epochs", every_epochs)
        self.every_batches = checks.count("every_batches", every_batches, optional=True)
        self.prefix = checks.text("prefix", prefix)
        self.values: Measured = {}
        self.epoch: int | None = None
        # Keras overlaps batch hooks with the next step if a callback says that this is safe. Doing nothing is safe.
        self.async_safe = every_batches is None
        self._groups: dict[str, Any] = {"": slice(None), **_classes(labels, self.size)}
        self._measurement: Measurement | None = None
        self._blank: Measured = {}
        self._batches = 0
        self._kept = History(checks.path("folder", folder, optional=True))
        self._begins = True

    @property
    def keys(self) -> list[str]:
        """The names in `logs`; empty until `fit` has looked at the model."""
        return list(self._summary(self._blank))

    @property
    def folder(self) -> Path | None:
        """Where the measurements of the epochs are kept."""
        return self._kept.folder

    @property
    def history(self) -> dict[int, Measured]:
        """The `values` at the end of each epoch that was measured; the key is the epoch, counted from 0."""
        return dict(self._kept)

    def logged(self, epoch: int) -> dict[str, float]:
        """What was put into `logs` at the end of an epoch that was measured."""
        return self._summary(self._kept[epoch])

    def restore(self, epoch: int) -> None:
        """Reads the `history` of the epochs before this one, and drops the others with their files.

        A `fit` does this before its first epoch.
        """
        self._kept.restore(epoch)
        if self._blank:
            self._kept.keep_like(self._blank)

    def set_model(self, model: keras.Model) -> None:
        """Checks all arguments against the model, and the order of the callbacks."""
        super().set_model(model)
        base = unwrap(model)
        if self._measurement is None or self._measurement.base is not base:
            self._kept.clear()
            measurement = Measurement(base, self._measure)
            if self.at is not None and base.built:
                check_path(base, self.at, OWNER)
            # Errors show here, on one example, and not only at the end of the first epoch. On TensorFlow, a model
            # without an input shape is built only in its first step.
            if base.built:
                self._blank = self._nothing_like(self._in_order(measurement.first_example(self.x)))
            self._measurement = measurement
        _warn_of_readers(self, listed_before(self, inspect.currentframe()))

    def on_train_begin(self, logs: Logs | None = None) -> None:
        """Makes the folder."""
        self._begins = True
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)

    def on_epoch_begin(self, epoch: int, logs: Logs | None = None) -> None:
        """Reads the history before the first epoch of a `fit`, and starts to count batches."""
        if self._begins:  # Only now is the epoch known: a callback may have restored a backup.
            self.restore(epoch)
            self._begins = False
        self._batches = 0

    def on_epoch_end(self, epoch: int, logs: Logs | None = None) -> None:
        """Puts the measurement, or NaN, into `logs`."""
        due = epoch == 0 or (epoch + 1) % self.every_epochs == 0 or not self._blank
        self.epoch = epoch if due else None
        is_first = not self._blank  # the model was built in this `fit`
        measured = self._measure_now() if due else self._blank
        if due:
            if is_first:
                self._kept.keep_like(measured)
            self._kept.add(epoch, measured)
        if logs is not None:
            logs.update(self._summary(measured))

    def on_train_batch_end(self, batch: int, logs: Logs | None = None) -> None:
        """Puts the measurement into the batch's `logs`, when it is due."""
        if self.every_batches is None:
            return
        passed, self._batches = self._batches, batches_taken(self, batch)
        if is_due(passed, self._batches, self.every_batches):
            summary = self.measure()
            if logs is not None:
                logs.update(summary)

    def measure(self) -> dict[str, float]:
        """Measures now.

        Returns:
            A dict from the names in `logs` to numbers. `values` holds what they are the means of.
        """
        return self._summary(self._measure_now())

    def _measure_now(self) -> Measured:
        assert self.model is not None  # On JAX, reading `model` brings the variables up to date.
        assert self._measurement is not None
        try:
            found = self._in_order(self._measurement.predict_on_batch(self.x))
        except Exception:
            # The linear algebra of some backends raises for a matrix that is not finite; here the result is NaN.
            if not self._blank or self._measurement.is_finite(self.x):
                raise
            found = self._blank
        self._blank = self._blank or self._nothing_like(found)
        self.values = found
        return found

    def _in_order(self, found: Mapping[str, Mapping]) -> Measured:
        """What was measured, by metric, in the order in which they were asked for: JAX returns dicts sorted."""
        places = ["", *(f"after/{path}/" for path in self.layers), *(f"block/{path}/" for path in self.blocks)]
        names = [place + metric for place in places for metric in self.metrics]
        return {name: each_part(np.asarray, from_parts(found[name])) for name in names}

    def _nothing_like(self, measured: Measured) -> Measured:
        return {name: nothing_like(result, self.size) for name, result in measured.items()}

    def _measure(self, linearization: Linearization) -> dict[str, dict]:
        """All metrics of the model and of its parts, each as a dict of its parts `(B, …)`, for Keras to return."""
        finite = finite_examples(linearization)
        found = {}
        for place, part in self._parts(linearization).items():
            for name, function in self.metrics.items():
                try:
                    found[place + name] = as_parts(kept(function(part), finite))
                except ValueError as error:
                    raise ValueError(f"`JacobianProbe` cannot measure `{place}{name}`. {error}") from error
        return found

    def _parts(self, linearization: Linearization) -> dict[str, Linearization]:
        """The models and parts to measure, by the prefix of their names."""
        parts = {"": linearization if self.at is None else started_at(linearization, self.at, OWNER)}
        try:
            parts |= {f"after/{layer}/": linearization.after(layer) for layer in self.layers}
            parts |= {f"block/{layer}/": linearization.block(layer) for layer in self.blocks}
        except ValueError as error:
            raise ValueError(f"`JacobianProbe` cannot measure its `layers` and `blocks`. {error}") from error
        return parts

    def _summary(self, measured: Measured) -> dict[str, float]:
        return summary(measured, self.prefix, self._groups)


def _functions(metrics: Any, seed: Seed) -> dict[str, Callable]:
    """The metrics as a dict from name to function of a linearization."""
    listed = list(metrics) if isinstance(metrics, (list, tuple)) else []
    pairs = list(metrics.items()) if isinstance(metrics, Mapping) else [(name, name) for name in listed]
    fits = [
        isinstance(name, str) and (callable(of) or (isinstance(of, str) and of in ESTIMATORS)) for name, of in pairs
    ]
    if not pairs or not all(fits):
        expected = (
            f"a list of names among {sorted(ESTIMATORS)}, or a dict from names to these or to functions of a "
            "linearization, such as `functools.partial` makes them"
        )
        raise checks.invalid("metrics", expected, metrics)
    named: dict[str, Any] = dict(pairs)
    return {name: of if callable(of) else _seeded(ESTIMATORS[of], seed) for name, of in named.items()}


def _seeded(estimator: Callable, seed: Seed) -> Callable:
    takes_seed = "seed" in inspect.signature(estimator).parameters
    return functools.partial(estimator, seed=seed) if takes_seed else estimator


def _classes(labels: Structure, size: int) -> dict[str, np.ndarray]:
    """The examples of each class, by the prefix of the class's names in `logs`."""
    if labels is None:
        return {}
    labels = as_array("labels", labels)
    if labels.shape not in ((size,), (size, 1)) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"Invalid value for argument `labels`. Expected an integer for each of the {size} examples of `x`. "
            f"Received: labels with shape {labels.shape} and dtype {labels.dtype}."
        )
    labels = labels.reshape(-1)
    return {f"class_{label}/": labels == label for label in np.unique(labels)}


def _batch_size(x: Structure) -> int:
    leaves = [checks.tensor("x", leaf) for leaf in tree.flatten(x)]
    if not leaves or any(len(leaf.shape) == 0 or leaf.shape[0] == 0 for leaf in leaves):
        raise checks.invalid("x", "a batch (B, …) of one example at least", x)
    return int(leaves[0].shape[0])


def _warn_of_readers(probe: JacobianProbe, before: Sequence[keras.callbacks.Callback]) -> None:
    """Warns if one of these callbacks, listed before the probe, reads it."""
    # A guard of another probe is no reader of this one.
    readers = [callback for callback in before if getattr(callback, "probe", probe) is probe]
    names = [type(callback).__name__ for callback in readers if type(callback).__name__ in READERS]
    if names:
        warnings.warn(
            f"{', '.join(names)} stands before JacobianProbe in `callbacks` and will not see what it measures. "
            "Swap them: list JacobianProbe first.",
            stacklevel=2,
        )
