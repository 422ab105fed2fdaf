"""The process of a host that works: `python -m experiments.host_process FOLDER`. See `experiments.hosts`."""

import contextlib
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any, NoReturn

from experiments import files, hosts
from experiments.__main__ import parse, terminate
from experiments.config import TrainConfig
from experiments.errors import without_traceback
from experiments.run_folder import RunFolder
from experiments.studies import STUDIES


def main(name: str) -> NoReturn:
    """The process that works; it leaves the outcome in the folder `name`."""
    folder = Path(name)
    quiet(folder / hosts.LOG)
    threading.Thread(target=end_with_input, daemon=True).start()
    signal.signal(signal.SIGTERM, terminate)
    _, config = parse("python -m experiments", STUDIES, ["train", f"--config={folder / hosts.CONFIG}"])
    status = 2
    outcome: dict[str, Any] = {}
    try:
        outcome = {"result": worked(config, folder)}
        status = 0
    except Exception as error:
        message = without_traceback(error)
        if message is None and is_loss(error):
            message = hosts.lost(config.hosts)
        if message is None:
            traceback.print_exc()
            message = "this is an error in the code; see above."
        outcome = {"error": message}
    except KeyboardInterrupt:
        pass
    files.write_json(folder / hosts.OUTCOME, outcome)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # JAX would wait for hosts that may be gone


def worked(config: TrainConfig, folder: Path) -> dict[str, Any]:
    """Join the others, train, and part from them."""
    import jax

    from experiments.train import train

    hosts.join(config)
    (folder / hosts.JOINED).touch()
    try:
        result = train(config)
    except Exception as error:
        message = without_traceback(error)
        if message is not None and not hosts.have_begun():
            hosts.begin(RunFolder(Path()), error=message)  # raises it here too
        raise
    result = hosts.end(result)
    jax.distributed.shutdown()
    return result


def is_loss(error: BaseException | None) -> bool:
    """Whether the reason of an error is that another host is gone."""
    while error is not None:
        if any(name in str(error) for name in ("Gloo", "NCCL", "coordination")):
            return True
        error = error.__cause__ or error.__context__
    return False


def quiet(log: Path) -> None:
    """Let Python write to the standard error, and send what libraries write there into a file."""
    visible = os.dup(2)
    with log.open("wb") as file:
        os.dup2(file.fileno(), 2)
    sys.stderr = os.fdopen(visible, "w", buffering=1)


def end_with_input() -> None:
    """End this process when its standard input ends."""
    with contextlib.suppress(OSError):
        while os.read(0, 1):
            pass
    os._exit(2)


if __name__ == "__main__":
    main(*sys.argv[1:])
