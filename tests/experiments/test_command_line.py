"""Keys are typed, and a mistake in one is told by its name, in one line."""

import errno
import functools
import pkgutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from experiments.__main__ import main, parse
from experiments.config import TrainConfig
from experiments.studies import BENCHMARKS, STUDIES, Command

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["train", "--epohcs=3"], "epohcs"),
        (["train", "--epochs=many"], "epochs"),
        (["train", "--epochs=0"], "epochs"),
        (["train", "--data.nmae=digits"], "data.nmae"),
        (["train", "--data.name=mnist"], "data.name"),
        (["train", "--jacobian.strength=-1"], "jacobian.strength"),
        (["train", "--jacobian.strength=inf"], "jacobian.strength"),
        (["train", "--jacobian.strength=nan"], "jacobian.strength"),
        (["train", "--jacobian.fraction=0"], "jacobian.fraction"),
        (["distill", "--weights.attention=inf"], "weights.attention"),
        (["status"], "folder"),
        (["status", "nowhere"], "nowhere"),
        (["train", "--robustness.noise=[a]"], "robustness.noise"),
        (["compare", "--train.model.width=wide"], "train.model.width"),
        (["compare", "--strengths=[0,-1]"], "strengths"),
        (["nonsense"], "nonsense"),
        (["train", "--config=missing.yaml"], "missing.yaml"),
    ],
)
def test_a_wrong_word_is_one_line_that_names_it(words, key, capsys):
    assert main(words) == 2
    message = capsys.readouterr().err
    assert key in message
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("epohcs: 3", "epohcs"),
        ("data: {nmae: digits}", "nmae"),
        ("seed: x", "seed"),
        ("jacobian: {strength: .inf}", "jacobian.strength"),
        ("guard: {explosion: .nan}", "guard.explosion"),
        ('folder: "R\xe4nder"', "wrong.yaml is not text in UTF-8"),
    ],
)
def test_a_wrong_key_in_a_file_is_named(text, key, tmp_path, capsys):
    file = tmp_path / "wrong.yaml"
    file.write_text(text, encoding="latin-1")
    assert main(["train", f"--config={file}"]) == 2
    message = capsys.readouterr().err
    assert key in message
    assert message.count("\n") == 1


def fails_with(monkeypatch, error):
    def run(self, config):
        raise error

    monkeypatch.setattr(Command, "run", run)


def chained(first, then):
    try:
        raise then from first
    except type(then) as error:
        return error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "runs/x/model.keras"), ["disk is full", "--resume=true"]),
        (OSError("Unable to synchronously write data (errno = 28, 'No space left on device')"), ["disk is full"]),
        (RuntimeError("No space left on device; while writing"), ["disk is full"]),
        (chained(OSError(errno.EDQUOT, "Disk quota exceeded"), ValueError("a file of 3 bytes")), ["disk is full"]),
        (OSError(errno.EROFS, "Read-only file system", "runs/x"), ["runs/x: Read-only file system", "--folder=PATH"]),
        (PermissionError(errno.EACCES, "Permission denied", "runs/x"), ["runs/x: Permission denied", "--folder=PATH"]),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "runs/x"), ["runs/x: Not a directory"]),
        (FloatingPointError("`frobenius_norm_squared` is not finite at step 3"), ["step 3"]),
    ],
)
def test_what_a_user_can_mend_is_one_line(error, words, monkeypatch, capsys):
    fails_with(monkeypatch, error)
    assert main(["train"]) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words)
    assert message.count("\n") == 1


def test_an_error_of_the_code_has_its_traceback(monkeypatch):
    fails_with(monkeypatch, KeyError("a bug"))
    with pytest.raises(KeyError):
        main(["train"])


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["train", "--seed=3"], "Continue with `python -m experiments train --seed=3 --resume=auto`"),
        (["train", "--folder=a b"], "Continue with `python -m experiments train '--folder=a b' --resume=auto`"),
        (["train", "--resume=auto"], "Continue with `python -m experiments train --resume=auto`"),
        (["estimators"], "Start again with `python -m experiments estimators`"),
    ],
)
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_study_that_is_asked_to_end_says_how_to_go_on(number, status, words, hint, request, monkeypatch, capsys):
    before = signal.getsignal(signal.SIGTERM)
    # A shell makes a job in the background ignore SIGINT.
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, interrupt))
    run = lambda self, config: signal.raise_signal(number)  # noqa: E731
    monkeypatch.setattr(Command, "run", run)
    assert main(words) == status
    assert capsys.readouterr().err == f"Stopped. {hint}\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_command_line_overrides_the_file():
    file = CONFIGS / "digits.yaml"
    _, config = parse("experiments", STUDIES, ["train", f"--config={file}", "--jacobian.strength=0.5"])
    assert isinstance(config, TrainConfig)
    assert config.jacobian.strength == 0.5
    assert config.model.width == yaml.safe_load(file.read_text())["model"]["width"]


@pytest.mark.slow
def test_every_configuration_in_the_repository_is_valid():
    files = sorted(CONFIGS.glob("*.yaml"))
    assert len(files) >= 6
    seen = set()
    for file in files:
        prefix, _, rest = file.stem.partition("_")
        # The file of any other study has the name of the study.
        own = file.stem if file.stem in STUDIES else prefix
        known, study = (BENCHMARKS, rest) if prefix == "benchmark" else (STUDIES, own)
        if study not in known:
            study = "compare" if "strengths" in yaml.safe_load(file.read_text()) else "train"
        _, config = parse("experiments", known, [study, f"--config={file}"])
        assert isinstance(config, known[study].config)
        seen.add(study)
    assert {"train", "compare", "health", "estimators", "step", "constraints", "distill", "fixed_point"} <= seen


def words_of_an_agent(sweep: dict, values: dict, tmp_path: Path) -> list[str]:
    """The command that W&B's agent runs for a sweep with these values of its parameters, made by W&B's own code."""
    forms = create_sweep_command_args({"args": {key: {"value": value} for key, value in values.items()}})
    # The rest is as in `wandb.wandb_agent`.
    forms |= {"env": ["/usr/bin/env"], "program": [sweep["program"]], "args_json_file": [str(tmp_path / "args.json")]}
    (tmp_path / "args.json").write_text(forms["args_json"][0])
    words = []
    for word in create_sweep_command(list(sweep["command"])):
        words += forms[word[2:-1]] if word.startswith("${") else [word]
    return words


def value_of(config, key: str):
    return functools.reduce(getattr, key.split("."), config)


@pytest.mark.parametrize("form", ["args", "args_no_equals", "args_json_file"])
def test_values_arrive_as_an_agent_passes_them(form, tmp_path):
    values = {
        "jacobian.strength": 1e-05,
        "jacobian.interval": 2,
        "jacobian.side": "output",
        "jit_compile": False,
        "resume": True,
        "data.train_examples": None,
        "robustness.noise": [0.05, 1e-05],
        "layout": {".*kernel": [None, "model"]},
        "folder": "runs/None",
    }
    before = ["--config"] if form == "args_json_file" else ["--data.train_examples=5", "--folder=a"]
    sweep = {"program": "experiments", "command": ["${env}", "python", "-m", "${program}", "train", *before]}
    sweep["command"].append("${" + form + "}")
    words = words_of_an_agent(sweep, values, tmp_path)
    assert words[:4] == ["/usr/bin/env", "python", "-m", "experiments"]
    _, config = parse("experiments", STUDIES, words[4:])
    assert {key: value_of(config, key) for key in values} == values


def test_a_sweep_over_none_has_no_folder_of_that_name():
    _, config = parse("experiments", STUDIES, ["train", "--folder=None"])
    assert config.folder is None


def test_the_sweep_passes_keys_that_exist(tmp_path):
    sweep = yaml.safe_load((CONFIGS / "sweeps" / "strength.yaml").read_text())
    values = {key: choice["values"][-1] for key, choice in sweep["parameters"].items()}
    words = words_of_an_agent(sweep, values, tmp_path)[4:]
    words = [word.replace("--config=", f"--config={CONFIGS.parent}/") for word in words]
    _, config = parse("experiments", STUDIES, words)
    assert {key: value_of(config, key) for key in values} == values


@pytest.mark.parametrize("command", [*STUDIES.values(), *BENCHMARKS.values()], ids=lambda command: command.target)
def test_what_the_list_names_can_be_run(command):
    assert callable(pkgutil.resolve_name(command.target))


def test_keys_are_checked_before_keras_is_loaded():
    code = "import sys, experiments.__main__; sys.exit('keras' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=CONFIGS.parent, check=False).returncode == 0
