"""The command line: `python -m experiments STUDY --config FILE [--key=value ...]`."""

import ast
import contextlib
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jsonargparse import ArgumentParser, set_parsing_settings

from experiments.config import CompareConfig, TrainConfig
from experiments.constraints import ConstraintsConfig, constraints
from experiments.distill import DistillConfig, distill
from experiments.errors import ExperimentError, say, without_traceback
from experiments.estimators import EstimatorsConfig, estimators
from experiments.fixed_point import FixedPointConfig, fixed_point
from experiments.health import HealthConfig, health
from experiments.regularization import RegularizationConfig, regularization
from experiments.saliency import SaliencyConfig, saliency
from experiments.sparing import SparingConfig, sparing
from experiments.status import StatusConfig, status
from experiments.verify import VerifyConfig, verify


class Study(NamedTuple):
    """A subcommand of the command line.

    Attributes:
        config: the dataclass that types its keys.
        run: is called with an instance of it.
        goes_on: how to continue it after it was stopped: the words to add to the command, "" for none; None if it can
            only begin again.
    """

    config: type
    run: Callable[[Any], object]
    goes_on: str | None = None


class Terminated(KeyboardInterrupt):
    """The process was asked to end, by SIGTERM."""


def train(config: TrainConfig) -> object:
    """Train one model. The import waits for valid keys, because Keras takes seconds to load."""
    from experiments.train import train

    return train(config)


def compare(config: CompareConfig) -> object:
    """Compare strengths; the import waits as in `train`."""
    from experiments.compare import compare

    return compare(config)


STUDIES = {
    "train": Study(TrainConfig, train, "--resume=auto"),
    "compare": Study(CompareConfig, compare, ""),
    "status": Study(StatusConfig, status),
    "verify": Study(VerifyConfig, verify, "--resume=true"),
    "estimators": Study(EstimatorsConfig, estimators),
    "fixed_point": Study(FixedPointConfig, fixed_point),
    "health": Study(HealthConfig, health),
    "constraints": Study(ConstraintsConfig, constraints),
    "regularization": Study(RegularizationConfig, regularization, ""),
    "distill": Study(DistillConfig, distill, ""),
    "saliency": Study(SaliencyConfig, saliency),
    "sparing": Study(SparingConfig, sparing, ""),
}


def benchmark_studies() -> dict[str, Study]:
    """The studies under `benchmark`, which are loaded only if one is asked for."""
    import experiments.benchmark as benchmark

    return {
        "step": Study(benchmark.StepConfig, benchmark.step),
        "biases": Study(benchmark.BiasesConfig, benchmark.biases),
        "distill": Study(benchmark.DistillConfig, benchmark.distill),
        "weights": Study(benchmark.WeightsConfig, benchmark.weights),
        "probe": Study(benchmark.ProbeConfig, benchmark.probe),
        "jvp": Study(benchmark.JvpConfig, benchmark.jvp, ""),
        "probes": Study(benchmark.ProbesConfig, benchmark.probes),
        "iterate": Study(benchmark.IterateConfig, benchmark.iterate),
        "layers": Study(benchmark.LayersConfig, benchmark.layers),
        "memory": Study(benchmark.MemoryConfig, benchmark.measure_memory),
        "scale": Study(benchmark.ScaleConfig, benchmark.scale),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one study.

    Args:
        arguments: the words after `python -m experiments`; by default those of the process.

    Returns:
        The exit status: 0; 2 after an error that the user can mend; 130 or 143 if the process was asked to end.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    # TensorFlow's start-up messages would hide the progress bar. It reads this when it is first imported.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    before = signal.signal(signal.SIGTERM, terminate)
    study = None
    try:
        if words[:1] == ["benchmark"]:
            study, config = parse("python -m experiments benchmark", benchmark_studies(), words[1:])
        else:
            study, config = parse("python -m experiments", STUDIES, words)
        study.run(config)
    except KeyboardInterrupt as stop:
        say(f"Stopped. {hint(study, words)}")
        return 128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT)
    except Exception as error:
        if (message := without_traceback(error)) is None:
            raise
        say(f"error: {message}")
        return 2
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def as_yaml(word: str) -> str:
    """A word of the command in YAML. A sweep's agent passes values as Python writes them: None becomes null."""
    key, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    if value == "None" or (value[:1] in ("[", "{") and "None" in value):
        with contextlib.suppress(ValueError, SyntaxError):  # a text that is not a Python literal
            return f"{key}{equals}{json.dumps(ast.literal_eval(value))}"
    return word


def configuration(words: Sequence[str]) -> str:
    """The file that `--config` names."""
    joined = "=".join(words).partition("--config=")[2]
    return joined.partition("=")[0]


def terminate(number: int, frame: object) -> None:
    """End as after Ctrl-C: close what is open."""
    raise Terminated


def hint(study: Study | None, words: Sequence[str]) -> str:
    """What the user can do after a study was stopped."""
    command = shlex.join(["python", "-m", "experiments", *words])
    if study is None or study.goes_on is None:
        return f"Start again with `{command}`"
    more = [] if study.goes_on in ("", *words) else [study.goes_on]
    return f"Continue with `{' '.join([command, *more])}`"


def parse(program: str, studies: Mapping[str, Study], words: Sequence[str]) -> tuple[Study, Any]:
    """The study that the words name, and its typed configuration.

    Raises:
        ArgumentError: a key is unknown or a value has the wrong type; the error names the key.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    note = (
        "`python -m experiments benchmark step` measures the cost of a training step, `benchmark biases` that "
        "of one with bias-Jacobian penalties, `benchmark distill` that of a student's with its teacher, `benchmark "
        "weights` that of products along weights, `benchmark probe` that of the Jacobian's norms and singular values, "
        "`benchmark jvp` that of one Jacobian-vector product beside its alternatives, `benchmark probes` that of "
        "several at once, `benchmark iterate` that of several one after the other, `benchmark layers` that of one "
        "layer by layer, `benchmark memory` what a frozen model holds, and `benchmark scale` how costs grow."
    )
    parser = ArgumentParser(prog=program, description=__doc__, epilog=note, exit_on_error=False)
    subcommands = parser.add_subcommands(dest="study", metavar="STUDY")
    for name, study in studies.items():
        subparser = ArgumentParser(description=study.config.__doc__, exit_on_error=False)
        subparser.add_argument("--config", action="config", help="A YAML file that holds the keys below.")
        subparser.add_class_arguments(study.config, as_positional=True)  # keys without a default, as in `status FOLDER`
        subcommands.add_subcommand(name, subparser, help=study.config.__doc__)
    try:
        chosen = parser.instantiate(parser.parse_args([as_yaml(word) for word in words]))
    except UnicodeDecodeError as error:
        raise ExperimentError(f"{configuration(words)} is not text in UTF-8: {error}.") from error
    keys = vars(chosen[chosen.study])
    del keys["config"]
    study = studies[chosen.study]
    return study, study.config(**keys)


if __name__ == "__main__":
    sys.exit(main())
