"""A part of a study in a process of its own: its memory is free after it, its time is limited, a crash is its own."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def row(module: str, arguments: Sequence[str], time_limit: int, environment: Mapping[str, str]) -> dict[str, Any]:
    """What `python -m MODULE ARGUMENTS` could measure within the time limit; `failure` says why the rest is missing.

    Args:
        module: prints parts of a row, each a line of JSON when it is there.
        arguments: its words.
        time_limit: seconds.
        environment: variables beside those of this process.
    """
    command = [sys.executable, "-m", module, *arguments]
    failure = None
    # Files and not pipes, so that what was written is there when the process is stopped.
    with tempfile.TemporaryFile("w+") as parts, tempfile.TemporaryFile("w+") as messages:
        try:
            subprocess.run(
                command,
                cwd=ROOT,
                env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **environment},
                stdout=parts,
                stderr=messages,
                timeout=time_limit,
                check=True,
            )
        except subprocess.TimeoutExpired:
            failure = f"stopped after {time_limit} s"
        except subprocess.CalledProcessError as error:
            messages.seek(0)
            lines = messages.read().strip().splitlines() or ["no message"]
            failure = f"exit status {error.returncode}: {lines[-1]}"[:300]
        parts.seek(0)
        lines = [line for line in parts.read().splitlines() if line.startswith("{") and line.endswith("}")]
    found = {key: value for line in lines for key, value in json.loads(line).items()}
    return {**found, "failure": failure} if failure else found
