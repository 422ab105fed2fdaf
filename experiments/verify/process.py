"""One architecture in a process of its own: `python -m experiments.verify.process NAME SETTINGS`.

Its memory is free after it, its time can be limited, and a crash is its own.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from experiments.verify.config import VerifyConfig

ROOT = Path(__file__).parents[2]


def measured(name: str, config: VerifyConfig) -> dict[str, Any]:
    """What could be measured of an architecture within the time limit; `failure` says why the rest was not.

    Args:
        name: of the architecture.
        config: of the study.
    """
    command = [sys.executable, "-m", "experiments.verify.process", name, json.dumps(dataclasses.asdict(config))]
    environment = {**os.environ, "JAX_ENABLE_X64": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    failure = None
    # Files and not pipes, so that what was written is there when the process is stopped.
    with tempfile.TemporaryFile("w+") as parts, tempfile.TemporaryFile("w+") as messages:
        try:
            subprocess.run(
                command,
                cwd=ROOT,
                env=environment,
                stdout=parts,
                stderr=messages,
                timeout=config.time_limit,
                check=True,
            )
        except subprocess.TimeoutExpired:
            failure = f"stopped after {config.time_limit} s"
        except subprocess.CalledProcessError as error:
            messages.seek(0)
            lines = messages.read().strip().splitlines() or ["no message"]
            failure = f"exit status {error.returncode}: {lines[-1]}"[:300]
        parts.seek(0)
        lines = [line for line in parts.read().splitlines() if line.startswith("{") and line.endswith("}")]
    row = {key: value for line in lines for key, value in json.loads(line).items()}
    return {**row, "failure": failure} if failure else row


def main(name: str, settings: str) -> None:
    """Print each part of the row as a line of JSON when it is there."""
    from experiments.verify import architectures, measure

    config = VerifyConfig(**json.loads(settings))
    try:
        for part in measure.figures(architectures.find(name), config):
            print(json.dumps(part), flush=True)
    except Exception as cause:
        print(json.dumps({"failure": measure.reason(cause)}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
