"""What a `JacobianProbe` measured at the ends of epochs: in memory, and, for a run that is resumed, in files."""

import io
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from jvpreg.callbacks.files import write_whole
from jvpreg.callbacks.measured import Measured, as_parts, each_part, from_parts

FILE = re.compile(r"epoch-(\d+)\.npz")


class History(Mapping[int, Measured]):
    """The measurement of each epoch, counted from 0, in order.

    Args:
        folder: where each measurement is also kept as a file, `epoch-00003.npz`; None: nowhere.
    """

    def __init__(self, folder: Path | None):
        self.folder = folder
        self._epochs: dict[int, Measured] = {}

    def __getitem__(self, epoch: int) -> Measured:
        return self._epochs[epoch]

    def __iter__(self) -> Iterator[int]:
        return iter(self._epochs)

    def __len__(self) -> int:
        return len(self._epochs)

    def add(self, epoch: int, measured: Measured) -> None:
        """Adds the measurement of an epoch, after all others."""
        self._epochs[epoch] = measured
        if self.folder is not None:
            # The part comes first in the key: NumPy refuses an entry called `file`, and a metric may have this name.
            parts = {name: as_parts(result) for name, result in measured.items()}
            entries = {f"{part}:{name}": array for name, of in parts.items() for part, array in of.items()}
            content = io.BytesIO()
            np.savez(content, **entries)
            write_whole(self.folder / f"epoch-{epoch:05}.npz", content.getvalue())

    def clear(self) -> None:
        """Forgets everything. Files stay."""
        self._epochs.clear()

    def restore(self, epoch: int) -> None:
        """Drops this epoch and later ones, files too, and reads the files of earlier epochs that are not known."""
        files = {} if self.folder is None else self._files()
        for at, file in files.items():
            if at >= epoch:
                file.unlink(missing_ok=True)
        read = {at: _read(file) for at, file in files.items() if at < epoch and at not in self._epochs}
        known = {at: measured for at, measured in self._epochs.items() if at < epoch}
        known |= {at: measured for at, measured in read.items() if measured is not None}
        self._epochs = {at: known[at] for at in sorted(known)}

    def keep_like(self, other: Measured) -> None:
        """Drops from memory what another probe wrote: other metrics, or another number of examples. It warns of it."""
        unlike = [epoch for epoch, measured in self._epochs.items() if _shapes(measured) != _shapes(other)]
        if unlike:
            warnings.warn(
                f"`JacobianProbe` leaves out epochs {[epoch + 1 for epoch in unlike]} of {self.folder}: they were "
                "measured with other metrics or on another number of examples. Give each probe a folder of its own.",
                stacklevel=2,
            )
        for epoch in unlike:
            del self._epochs[epoch]

    def _files(self) -> dict[int, Path]:
        assert self.folder is not None
        found = [(FILE.fullmatch(path.name), path) for path in self.folder.glob("epoch-*.npz")]
        return {int(match[1]): path for match, path in sorted(found, key=lambda pair: pair[1].name) if match}


def _read(file: Path) -> Measured | None:
    """The content of a file; None, with a warning, if it is damaged."""
    parts: dict[str, dict[str, np.ndarray]] = {}
    try:
        # From memory: NumPy would leave the file open if the archive is damaged.
        with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as entries:
            for key in entries.files:
                part, _, name = key.partition(":")
                parts.setdefault(name, {})[part] = entries[key]
        return {name: from_parts(of) for name, of in parts.items()}
    # A damaged archive may raise anything.
    except Exception as error:
        warnings.warn(
            f"`JacobianProbe` leaves out {file}, which is damaged ({type(error).__name__}: {error}). Pictures and "
            "reports of the run will lack this epoch.",
            stacklevel=2,
        )
        return None


def _shapes(measured: Measured) -> dict:
    return {name: each_part(np.shape, result) for name, result in measured.items()}
