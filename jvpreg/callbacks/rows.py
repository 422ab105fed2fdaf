"""The rows of a W&B run, and rows from a CSV file that the run may lack."""

import csv
import itertools
import warnings
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from jvpreg.callbacks.hooks import is_due


class Rows:
    """The rows of a W&B run, each of an epoch or of a batch, to which several callbacks of a `fit` may add.

    A row is completed only when W&B is told so. Here that happens when the next row begins. Another logger may
    complete it earlier, by logging into it.

    Args:
        run: the W&B run.
    """

    _of_runs: ClassVar[weakref.WeakKeyDictionary] = weakref.WeakKeyDictionary()

    def __init__(self, run: Any):
        self._run = run
        self._open: tuple[str, int] | None = None
        self._step = 0
        # The keys that the row of each epoch has.
        self._keys: dict[int, set[str]] = {}
        self._repeated: dict[int, tuple[int, dict[str, Any]]] = {}

    @classmethod
    def of(cls, run: Any) -> "Rows":
        """The rows of a run: the same object for every callback."""
        return cls._of_runs.setdefault(run, cls(run))

    def add(self, kind: str, number: int, row: Mapping[str, Any]) -> None:
        """Adds to the row of an `"epoch"`, or of a `"batch"`, with this number."""
        if self._open != (kind, number):
            self.complete()
        self._run.log(dict(row), commit=False)
        self._open, self._step = (kind, number), self._run.step
        if kind == "epoch":
            self._keys.setdefault(number, set()).update(row)

    def repeat(self, epoch: int, step: int, row: Mapping[str, Any]) -> None:
        """Adds to the row of an epoch that an earlier process logged at this W&B step, unless this run has it.

        It is logged by `log_repeated`, once each callback has added to it.
        """
        missing = {key: value for key, value in row.items() if key not in self._keys.get(epoch, ())}
        if missing and step >= self._run.starting_step:  # A server refuses rows that a resumed run has already.
            at, known = self._repeated.get(epoch, (step, {}))
            self._repeated[epoch] = max(at, step), known | missing

    def complete(self) -> None:
        """Completes the open row, if there is one."""
        # Only if W&B's count shows that nobody else completed it: otherwise there would be an empty row.
        if self._open is not None and self._run.step == self._step:
            self._run.log({}, commit=True)
        self._open = None

    def log_repeated(self) -> None:
        """Logs the rows that are to be repeated."""
        for epoch, (step, row) in sorted(self._repeated.items()):
            # W&B refuses past steps. It is told the step first: pictures are named by the step before a row.
            self._run.log({}, step=max(step, self._run.step), commit=False)
            self._run.log(row, commit=True)
            self._keys.setdefault(epoch, set()).update(row)
        self._repeated = {}


def read_epochs(file: Path, before: int) -> dict[int, dict[str, float]]:
    """The rows of earlier epochs, by epoch, from a CSV file as `keras.callbacks.CSVLogger` writes it.

    Damaged lines, and entries that are no numbers, are left out. It warns of epochs that are missing.
    """
    found: dict[int, dict[str, float]] = {}
    problem = ""
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            for row in csv.DictReader(lines):
                epoch = _number(row.pop("epoch", None))
                whole = None not in row and None not in row.values()
                if epoch is not None and whole and epoch < before:
                    numbers = {key: _number(value) for key, value in row.items()}
                    found[int(epoch)] = {key: value for key, value in numbers.items() if value is not None}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        problem = f" ({type(error).__name__}: {error})"
    if missing := [epoch + 1 for epoch in range(before) if epoch not in found]:
        warnings.warn(
            f"`JacobianWandbLogger` finds no row of epochs {missing} in {file}{problem}, so the W&B run lacks them.",
            stacklevel=2,
        )
    return found


def _number(text: str | None) -> float | None:
    try:
        return float(text or "")
    except ValueError:
        return None


def rows_before(epoch: int, steps: int | None, steps_at_once: int, every_batches: int | None) -> int:
    """The number of rows in a run before that of an epoch, if nothing else is logged to it.

    Args:
        epoch: counted from 0.
        steps: in an epoch; None if that is not known.
        steps_at_once: `steps_per_execution` of `compile`.
        every_batches: every n-th batch has a row; None: no batch has one.
    """
    if every_batches is None or steps is None:
        return epoch
    hooks = [*range(0, steps, steps_at_once), steps]
    batches = sum(is_due(*pair, every_batches) for pair in itertools.pairwise(hooks))
    return epoch * (batches + 1) + batches
