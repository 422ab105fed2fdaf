"""Several hosts that train one model, on JAX: the same command on each, except for `--hosts.index`.

If another host is lost, or none answers, JAX aborts the process at once, from a thread of its own. So a host works
in a second process, and the process that was started waits for it and reports its end in one sentence.

    run(config)                           the process that was started
      python -m experiments.host_process  the process that works
        join, begin, end                  what the hosts do together, each of them in this order
"""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from experiments import files
from experiments.config import HostsConfig, TrainConfig, as_plain_dict
from experiments.errors import ExperimentError
from experiments.processes import ROOT
from experiments.run_folder import RunFolder, differences

CONFIG, JOINED, OUTCOME, LOG = "config.yaml", "joined", "outcome.json", "log"
"""The messages between the two processes of a host, in a temporary folder."""

PATIENCE = 10
"""The seconds that a process has to end by itself after it was asked to."""

_words: dict[str, Any] = {}
"""The state of a process that has joined others: its `config`, and whether training has `begun`."""


def run(config: TrainConfig) -> dict[str, Any]:
    """Train together with the other hosts.

    Returns:
        The figures of the run, which are host 0's.

    Raises:
        ExperimentError: one of the hosts cannot do its part, has stopped, or cannot be reached.
    """
    with tempfile.TemporaryDirectory(prefix="host-") as name:
        folder = Path(name)
        (folder / CONFIG).write_text(yaml.safe_dump(as_plain_dict(config)), encoding="utf-8")
        paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        # It ends when its standard input closes, and so also when this process is killed.
        worker = subprocess.Popen(
            [sys.executable, "-m", "experiments.host_process", name],
            env={**os.environ, "PYTHONPATH": paths},
            stdin=subprocess.PIPE,
        )
        try:
            status = worker.wait()
        except BaseException:
            stop(worker)
            raise
        outcome = files.read_object(folder / OUTCOME) or {}
        if "result" in outcome:
            return outcome["result"]
        if "error" in outcome:
            raise ExperimentError(outcome["error"])
        if status == -signal.SIGABRT:
            raise ExperimentError(lost(config.hosts) if (folder / JOINED).exists() else alone(config.hosts))
        log = (folder / LOG).read_text(errors="replace").strip() if (folder / LOG).exists() else ""
        raise ExperimentError(f"the process that worked on this host ended with status {status}. {log[-500:]}")


def stop(worker: subprocess.Popen) -> None:
    """End a process. It closes what is open, unless it waits for another host."""
    worker.terminate()
    try:
        worker.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        worker.kill()
        worker.wait()


def alone(config: HostsConfig) -> str:
    """The message if not all hosts came together."""
    return (
        f"the {config.count} hosts did not come together within --hosts.timeout={config.timeout} seconds. Host 0 "
        f"listens at --hosts.address={config.address}: start the same command on each host, with an --hosts.index of "
        f"its own, from 0 to {config.count - 1}."
    )


def lost(config: HostsConfig) -> str:
    """The message if another host stopped during training."""
    return (
        f"another host has stopped, or was silent for --hosts.timeout={config.timeout} seconds. Its own message "
        "says why. Then start all hosts again with --resume=auto."
    )


def have_joined() -> bool:
    """Whether this process works together with others."""
    return bool(_words)


def join(config: TrainConfig) -> None:
    """Find the other hosts. JAX must not have started yet.

    Raises:
        ExperimentError: host 0 cannot listen at its address.
    """
    import jax

    hosts = config.hosts
    address = hosts.address or ""
    if hosts.index == 0:
        try:
            socket.create_server(("", int(address.rpartition(":")[2]))).close()
        except OSError as error:
            raise ExperimentError(f"--hosts.address={address}: host 0 cannot listen there ({error}).") from error
    jax.config.update("jax_num_cpu_devices", config.devices)
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM
    # `keras.distribution.initialize` calls only this, without the time limits.
    jax.distributed.initialize(
        address,
        hosts.count,
        hosts.index,
        cluster_detection_method="deactivate",
        initialization_timeout=hosts.timeout,
        heartbeat_timeout_seconds=hosts.timeout,
        shutdown_timeout_seconds=hosts.timeout,
    )
    _words["config"] = as_plain_dict(config)
    exchange(b"joined")  # at once: Gloo connects the hosts at the first exchange, and gives them 30 s for it


def exchange(word: bytes) -> list[bytes]:
    """The words of all hosts, in their order. It waits until every host is here."""
    from jax.experimental import multihost_utils

    sizes = multihost_utils.process_allgather(np.array([len(word)]))[:, 0]
    padded = np.frombuffer(word.ljust(max(sizes), b"\0"), np.uint8)
    return [row.tobytes()[:size] for row, size in zip(multihost_utils.process_allgather(padded), sizes, strict=True)]


def have_begun() -> bool:
    """Whether the hosts have agreed to train."""
    return bool(_words.get("begun"))


def begin(folder: RunFolder, **word: Any) -> dict[str, Any]:
    """Agree to train, once on each host. The other hosts get the state of host 0's run in their folders.

    Args:
        folder: on host 0 the run's folder, on another host an empty one.
        **word: `error`, why this host cannot do its part; on host 0 also the `result` of a run that is finished.

    Returns:
        The word of host 0; an empty one if the process has not joined others.

    Raises:
        ExperimentError: a host cannot do its part, or was given another command.
    """
    if not have_joined():
        return {}
    _words["begun"] = True
    config = _words["config"]
    words = [json.loads(said) for said in exchange(json.dumps({"config": config, **word}).encode())]
    for index, said in enumerate(words):
        if "error" in said:
            raise ExperimentError(f"host {index}: {said['error']}")
        if differing := differences(words[0]["config"], said["config"]):
            raise ExperimentError(f"host {index} was given another command than host 0: {'; '.join(differing)}.")
    if "result" not in words[0]:
        is_first = config["hosts"]["index"] == 0
        state = exchange(packed(folder) if is_first else b"-")[0]
        if not is_first:
            with tarfile.open(fileobj=io.BytesIO(state)) as archive:
                archive.extractall(folder.path, filter="data")
    return words[0]


def packed(folder: RunFolder) -> bytes:
    """The backups of a run and what its probe measured, as an archive."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for path in [*folder.backups.folder.glob("backup-*"), *folder.jacobian.glob("epoch-*.npz")]:
            archive.add(path, str(path.relative_to(folder.path)))
    return content.getvalue()


def end(result: dict[str, Any]) -> dict[str, Any]:
    """Wait for all hosts, and for the result of host 0, which alone has one."""
    if not have_begun():  # the run was finished
        begin(RunFolder(Path()), result=result)
    return json.loads(exchange(json.dumps(result).encode())[0])


def part(config: HostsConfig, size: int) -> slice:
    """The part of a batch of this size that belongs to this host."""
    share = size // config.count
    return slice(config.index * share, (config.index + 1) * share)


def part_of_batches(config: HostsConfig, count: int, batch_size: int) -> np.ndarray:
    """The indices of this host's examples, out of `count` that are taken in batches."""
    batches = [np.arange(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    return np.concatenate([batch[part(config, len(batch))] for batch in batches])
