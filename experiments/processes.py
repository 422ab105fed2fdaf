"""A part of a study in a process of its own: its memory is free after it, its time is limited, a crash is its own."""

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TIME_LIMIT = 3600
"""Seconds that a process may take which measures its memory."""


def row(
    function: Callable[..., Iterable[dict[str, Any]]],
    arguments: tuple,
    time_limit: int,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """What a function could measure within the time limit; `failure` says why the rest is missing.

    Args:
        function: of a module; it yields parts of the row as they are measured.
        arguments: that can be pickled.
        time_limit: seconds.
        environment: variables beside those of this process.
    """
    failure = None
    # Files and not pipes, so that what was written is there when the process is stopped.
    with tempfile.TemporaryFile() as call, tempfile.TemporaryFile("w+") as parts, tempfile.TemporaryFile("w+") as said:
        pickle.dump((function, arguments), call)
        call.seek(0)
        try:
            subprocess.run(
                [sys.executable, "-m", "experiments.processes"],
                cwd=ROOT,
                env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **(environment or {})},
                stdin=call,
                stdout=parts,
                stderr=said,
                timeout=time_limit,
                check=True,
            )
        except subprocess.TimeoutExpired:
            failure = f"stopped after {time_limit} s"
        except subprocess.CalledProcessError as error:
            said.seek(0)
            lines = said.read().strip().splitlines() or ["no message"]
            failure = f"exit status {error.returncode}: {lines[-1]}"[:300]
        parts.seek(0)
        lines = [line for line in parts.read().splitlines() if line.startswith("{") and line.endswith("}")]
    found = {key: value for line in lines for key, value in json.loads(line).items()}
    return {**found, "failure": failure} if failure else found


def memory(
    function: Callable[..., Iterable[dict[str, Any]]], arguments: tuple, environment: Mapping[str, str] | None = None
) -> dict[str, Any] | MemoryError:
    """As `row`, of a function that measures its memory, and whose first argument is the name of what it runs.

    Returns:
        The row; a MemoryError where the process ran out of memory or was killed.

    Raises:
        RuntimeError: the process failed in another way.
    """
    found = row(function, arguments, TIME_LIMIT, environment)
    if "failure" not in found:
        return found
    if found["failure"].startswith(f"exit status {-signal.SIGKILL}:"):
        return MemoryError("the process was killed, as a system does that runs out of memory")
    message = f"The process that measures the memory of {arguments[0]!r} failed: {found['failure']}"
    return out_of_memory(RuntimeError(message))


def out_of_memory(error: Exception) -> MemoryError:
    """The error as a MemoryError.

    Raises:
        Exception: the error itself, where it is another one.
    """
    message = f"{type(error).__name__}: {error}"
    marks = ("MemoryError", "ResourceExhausted", "RESOURCE_EXHAUSTED", "out of memory")
    if any(mark.lower() in message.lower() for mark in marks):
        return MemoryError(message.splitlines()[0])
    raise error


def reason(cause: BaseException) -> str:
    """An exception in a line: without the traceback that TensorFlow puts before it, and Keras' list of arguments."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(cause)).partition("Arguments received by")[0]
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no message"]
    inner = [place for place, line in enumerate(lines) if re.match(r"[\w.]*(Error|Exception): ", line)]
    lines = lines[inner[-1] :] if inner else [f"{type(cause).__name__}: {lines[0]}", *lines[1:]]
    return " ".join(lines[:2])[:300]


def print_parts(function: Callable[..., Iterable[dict[str, Any]]], arguments: tuple) -> None:
    """In the process: print each part of the row as a line of JSON when it is there, or why there are no more."""
    try:
        for part in function(*arguments):
            print(json.dumps(part), flush=True)
    except Exception as cause:
        print(json.dumps({"failure": reason(cause)}), flush=True)


if __name__ == "__main__":
    print_parts(*pickle.load(sys.stdin.buffer))
