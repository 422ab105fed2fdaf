"""Runs of the studies that are killed: a server that has imported everything, and forks a process for each run.

`python -m tests.experiments.kills` reads a `Run` as a line of JSON, and answers with a line of JSON when the process
has ended. Nothing is computed in the server itself, so that each process starts its backend anew, as any command does.
"""

import io
import json
import os
import signal
import subprocess
import sys
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

import h5py
import numpy as np

from tests.callbacks.offline_run import written
from tests.experiments import wandb_records

REPOSITORY = Path(__file__).parents[2]
TIME_LIMIT = 200
"""Seconds that a run may take."""

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir"}
"""Audit events of Python's that change a folder, beside `open`."""


@dataclass(frozen=True)
class Run:
    """A process that runs a study.

    Attributes:
        words: the words of the command.
        folder: the folder of the study.
        output: the file that takes what the process prints.
        regularizers: a key of `REGULARIZERS`, for regularizers that `train` has no keys for.
        operation: the number of the change to its folder before which it is killed.
        seconds: it is killed so many seconds after the first change to its folder.
    """

    words: list[str]
    folder: str
    output: str
    regularizers: str = ""
    operation: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Ended:
    """How a run ended.

    Attributes:
        status: as `os.waitstatus_to_exitcode` has it; that of a kill is negative.
        operations: how many changes to the folder were seen; None if the run was killed.
        seconds: the time from the first change to the end; None if the run was killed.
    """

    status: int
    operations: int | None = None
    seconds: float | None = None

    @property
    def killed(self) -> bool:
        """Whether the run was killed as wanted, and not by the alarm that ends a run that hangs."""
        return self.status in (-signal.SIGKILL, -signal.SIGVTALRM)


class Server:
    """The client's end of the connection to the server."""

    def __init__(self):
        # A W&B service of its own: another process's would go on after a kill, and hold the run.
        environment = {key: value for key, value in os.environ.items() if key != "WANDB_SERVICE"}
        command = [sys.executable, "-m", "tests.experiments.kills"]
        self.process = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, run: Run) -> Ended:
        """Run a study in a process of its own, to its end."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(asdict(run)) + "\n")
        self.process.stdin.flush()
        return Ended(**json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        """End the server."""
        self.process.communicate()


def serve() -> None:
    """Fork a process for each line."""
    import experiments.compare
    import experiments.regularization.study
    import experiments.train  # noqa: F401 -- here, so that it need not be imported by each process

    for line in sys.stdin:
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read)
            os._exit(child(Run(**json.loads(line)), write))
        os.close(write)
        _, status = os.waitpid(pid, 0)
        with os.fdopen(read) as told:
            rest = json.loads(told.read() or "{}")
        print(json.dumps({"status": os.waitstatus_to_exitcode(status), **rest}), flush=True)


def child(run: Run, told: int) -> int:
    """Run the study, watched; returns the exit status."""
    import time

    import experiments.train
    from experiments.__main__ import main

    signal.alarm(TIME_LIMIT)
    output = os.open(run.output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    if run.regularizers:
        experiments.train.regularizers = lambda config: REGULARIZERS[run.regularizers]()
    watch = Watch(run)
    sys.addaudithook(watch)
    status = main(run.words)
    sys.stdout.flush()
    seconds = time.monotonic() - watch.began if watch.began else 0.0
    os.write(told, json.dumps({"operations": watch.operations, "seconds": seconds}).encode())
    return status


class Watch:
    """An audit hook that counts changes to a folder, and kills the process in time."""

    def __init__(self, run: Run):
        self.run, self.operations, self.began = run, 0, 0.0

    def __call__(self, event: str, arguments: tuple) -> None:
        if event == "open":
            path, mode, flags = arguments
            if not (set(mode or "") & set("wax+") or (flags or 0) & WRITES):
                return
        elif event in CHANGES:
            path = arguments[0]
        else:
            return
        if not str(path).startswith(self.run.folder):
            return
        if not self.operations:
            import time

            self.began = time.monotonic()
            if self.run.seconds is not None:
                # The kernel ends the process wherever it is: a Python handler would wait for a step or an HDF5 file.
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.setitimer(signal.ITIMER_REAL, self.run.seconds)
        self.operations += 1
        if self.operations == self.run.operation:
            os.kill(os.getpid(), signal.SIGKILL)


def spectral():
    """A penalty that carries singular vectors from step to step."""
    from jvpreg.regularizers import SpectralNorm

    return [SpectralNorm(0.01, num_iterations=1)]


def lagrangian():
    """A constraint that carries multipliers."""
    from jvpreg.constraints import AugmentedLagrangian, Lipschitz

    return [Lipschitz(0.5, enforcement=AugmentedLagrangian(0.5, update_every=3))]


REGULARIZERS = {"spectral": spectral, "lagrangian": lagrangian}


def differences(one: Path, other: Path) -> list[str]:
    """The files of two folders of a study that are not the same bit for bit; W&B's newest files are compared too."""
    files = {path.relative_to(folder) for folder in (one, other) for path in folder.rglob("*") if path.is_file()}
    found = []
    for file in sorted(files):
        if "wandb" in file.parts or ("checkpoints" in file.parts[:-1] and file.name != "best.keras"):
            continue
        if file.name in ("config.yaml", "lock", "lock.json", "comparison.png"):
            continue
        paths = [folder / file for folder in (one, other)]
        if not all(path.exists() for path in paths):
            found.append(f"{file} is not in both")
        elif not equal(*paths, *(str(folder).encode() for folder in (one, other))):
            found.append(f"{file} differs")
    runs = {path.parent.relative_to(folder) for folder in (one, other) for path in folder.rglob("wandb/offline-run-*")}
    for run in sorted(runs):
        if rows(one / run) != rows(other / run):
            found.append(f"{run} differs")
    return found


def equal(one: Path, other: Path, *folders: bytes) -> bool:
    """Whether two files hold the same, except for times and the names of their folders."""
    if one.suffix == ".keras":
        return arrays(one) == arrays(other)
    if one.name == "comparison.json":
        return without_times(one) == without_times(other)
    if one.name == "comparison.md":
        return True  # the same as the JSON file, with times
    if one.suffix == ".npz":
        with np.load(one) as left, np.load(other) as right:
            return {key: left[key].tobytes() for key in left} == {key: right[key].tobytes() for key in right}
    left, right = (path.read_bytes().replace(folder, b"") for path, folder in zip((one, other), folders, strict=True))
    return left == right


def arrays(path: Path) -> dict[str, bytes]:
    """All arrays of a saved model: weights, and the states of the optimizer, of the penalties and of the seeds."""
    found = {}
    with zipfile.ZipFile(path) as archive, h5py.File(io.BytesIO(archive.read("model.weights.h5"))) as file:

        def keep(name, item):
            if isinstance(item, h5py.Dataset):
                found[name] = np.asarray(item).tobytes()

        file.visititems(keep)
    assert any("optimizer" in name for name in found)
    return found


def without_times(path: Path) -> list[dict]:
    """The rows of a comparison."""
    listed = json.loads(path.read_text())["rows"]
    return [{key: value for key, value in row.items() if key != "seconds_per_step"} for row in listed]


def rows(folder: Path) -> list[dict]:
    """The rows of the newest offline run in a `wandb/` folder, without the times at which they were logged."""
    if not folder.exists():
        return []
    own = []
    for record in wandb_records.records(written(folder)):
        if record.HasField("history"):
            items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            own.append({key: value for key, value in items.items() if key not in ("_timestamp", "_runtime")})
    return own


if __name__ == "__main__":
    serve()
