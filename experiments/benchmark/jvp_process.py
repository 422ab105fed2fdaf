"""One architecture in a process of its own: `python -m experiments.benchmark.jvp_process NAME SETTINGS`.

Its memory and its compiled programs are gone after it.
"""

import json
import sys

from experiments.benchmark import jvp_study
from experiments.benchmark.config import JvpConfig
from experiments.verify import architectures
from experiments.verify.measure import reason


def main(name: str, settings: str) -> None:
    """Print each part of the row as a line of JSON when it is there."""
    config = JvpConfig(**json.loads(settings))
    try:
        for part in jvp_study.parts(architectures.find(name), config):
            print(json.dumps(part), flush=True)
    except Exception as cause:
        print(json.dumps({"failure": reason(cause)}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
