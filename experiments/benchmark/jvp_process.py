"""One architecture in a process of its own: `python -m experiments.benchmark.jvp_process NAME SETTINGS`.

Its memory and its compiled programs are gone after it.
"""

import dataclasses
import json
import sys
from typing import Any

from experiments.benchmark.config import JvpConfig
from experiments.processes import row


def measured(name: str, config: JvpConfig) -> dict[str, Any]:
    """What could be measured of an architecture within the time limit; `failure` says why the rest was not.

    Args:
        name: of the architecture.
        config: of the study.
    """
    settings = json.dumps(dataclasses.asdict(config))
    return row("experiments.benchmark.jvp_process", [name, settings], config.time_limit, {})


def main(name: str, settings: str) -> None:
    """Print each part of the row as a line of JSON when it is there."""
    from experiments.benchmark import jvp_study
    from experiments.verify import architectures
    from experiments.verify.measure import reason

    config = JvpConfig(**json.loads(settings))
    try:
        for part in jvp_study.parts(architectures.find(name), config):
            print(json.dumps(part), flush=True)
    except Exception as cause:
        print(json.dumps({"failure": reason(cause)}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
