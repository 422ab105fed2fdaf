"""One architecture in a process of its own: `python -m experiments.verify.process NAME SETTINGS`.

Its memory is free after it, its time can be limited, and a crash is its own.
"""

import dataclasses
import json
import sys
from typing import Any

from experiments.processes import row
from experiments.verify.config import VerifyConfig


def measured(name: str, config: VerifyConfig) -> dict[str, Any]:
    """What could be measured of an architecture within the time limit; `failure` says why the rest was not.

    Args:
        name: of the architecture.
        config: of the study.
    """
    settings = json.dumps(dataclasses.asdict(config))
    return row("experiments.verify.process", [name, settings], config.time_limit, {"JAX_ENABLE_X64": "1"})


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
