"""The command line: `python -m experiments STUDY --config FILE [--key=value ...]`."""

import ast
import contextlib
import json
import os
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from jsonargparse import ArgumentParser, set_parsing_settings

from experiments.errors import ExperimentError, say, without_traceback
from experiments.studies import BENCHMARKS, STUDIES, Command


class Terminated(KeyboardInterrupt):
    """The process was asked to end, by SIGTERM."""


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
            study, config = parse("python -m experiments benchmark", BENCHMARKS, words[1:])
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


def hint(study: Command | None, words: Sequence[str]) -> str:
    """What the user can do after a study was stopped."""
    command = shlex.join(["python", "-m", "experiments", *words])
    if study is None or study.goes_on is None:
        return f"Start again with `{command}`"
    more = [] if study.goes_on in ("", *words) else [study.goes_on]
    return f"Continue with `{' '.join([command, *more])}`"


def parse(program: str, studies: Mapping[str, Command], words: Sequence[str]) -> tuple[Command, Any]:
    """The study that the words name, and its typed configuration.

    Raises:
        ArgumentError: a key is unknown or a value has the wrong type; the error names the key.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    note = (
        "What a step, a product or a measurement costs: `python -m experiments benchmark STUDY`, where STUDY is one of "
        f"{', '.join(BENCHMARKS)}; `benchmark --help` says what each of them measures."
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
