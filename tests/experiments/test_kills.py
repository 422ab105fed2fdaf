"""Runs that are killed come to the same end, bit for bit: model, best model, history, figures and W&B's rows.

A handful of kills; `--kills=100` makes as many.
"""

import dataclasses
import random
from pathlib import Path

import keras
import pytest
import yaml

from experiments.config import (
    CompareConfig,
    DataConfig,
    JacobianConfig,
    ModelConfig,
    OptimizerConfig,
    ProbeConfig,
    RobustnessConfig,
    TrainConfig,
    WandbConfig,
    as_plain_dict,
)
from experiments.distill.config import DistillConfig
from experiments.regularization.config import RegularizationConfig
from tests.experiments import kills

pytestmark = pytest.mark.every_backend

# Five steps an epoch: with an interval of 2, every other epoch begins with a step without a penalty.
TRAIN = TrainConfig(
    data=DataConfig(train_examples=40),
    model=ModelConfig("linear"),
    optimizer=OptimizerConfig(learning_rate=0.05),
    jacobian=JacobianConfig(0.01),
    probe=ProbeConfig(examples=4, singular_values=2, pictures_every=2),
    robustness=RobustnessConfig(examples=20, noise=[0.1], epsilons=[0.05], pgd_steps=1),
    wandb=WandbConfig(mode="offline"),
    epochs=3,
    batch_size=8,
    resume="auto",
)
SPARED = dataclasses.replace(TRAIN, jacobian=JacobianConfig(0.01, interval=2, fraction=0.5))
VGG = ModelConfig("vgg4", 2)
STUDIES = {
    "train": ("train", TRAIN, ""),
    "interval and fraction": ("train", SPARED, ""),
    "dropout": ("train", dataclasses.replace(SPARED, model=dataclasses.replace(VGG, dropout=0.5)), ""),
    "spectral": ("train", dataclasses.replace(SPARED, model=ModelConfig("mlp", 4)), "spectral"),
    "lagrangian": ("train", SPARED, "lagrangian"),
    "compare": (
        "compare",
        CompareConfig(dataclasses.replace(TRAIN, epochs=1, resume=False), [0.0, 0.01], timed_steps=1),
        "",
    ),
    "regularization": (
        "regularization",
        RegularizationConfig(
            DataConfig(), VGG, examples_per_class=[1], seeds=[0], dropout=[], bias_decay=[], steps=2, probed=4
        ),
        "",
    ),
    "distill": (
        "distill",
        DistillConfig(
            student=VGG,
            methods=["full-Jacobian + attention"],
            examples_per_class=[1],
            seeds=[0],
            stages=[1],
            steps=3,
            batch_size=8,
            evaluations=1,
            probed=4,
        ),
        "",
    ),
}
TEACHER = "dropout"
"""The study whose model is the teacher in `distill`."""


@pytest.fixture(scope="module")
def server():
    server = kills.Server()
    yield server
    server.close()


class Trials:
    """Studies in a folder, run by a server."""

    def __init__(self, server, folder):
        self.server, self.folder, self.number = server, folder, 0
        self.uninterrupted = {}

    def run(self, name, folder, **kill):
        study, config, regularizers = STUDIES[name]
        if study == "distill":
            config = dataclasses.replace(config, teacher=str(self.whole(TEACHER)[0]))
        settings = folder.with_suffix(".yaml")
        settings.write_text(yaml.safe_dump(as_plain_dict(config)))
        words = [study, f"--config={settings}", f"--folder={folder}"]
        return self.server.run(kills.Run(words, str(folder), f"{folder}.txt", regularizers, **kill))

    def whole(self, name):
        """The folder of the uninterrupted run, and how it ended."""
        if name not in self.uninterrupted:
            folder = self.folder / name.replace(" ", "-") / "run"  # W&B shows the name of a run's folder
            folder.parent.mkdir()
            ended = self.run(name, folder)
            assert ended.status == 0, Path(f"{folder}.txt").read_text()
            self.uninterrupted[name] = folder, ended
        return self.uninterrupted[name]

    def killed(self, name, generator):
        """The differences of a run that was killed once or twice, and what it printed."""
        whole, ended = self.whole(name)
        self.number += 1
        folder = self.folder / str(self.number) / "run"
        folder.parent.mkdir()
        deaths = []
        for again in range(generator.choice((1, 1, 2))):
            if (self.number + again) % 2:
                kill = {"operation": generator.randint(1, ended.operations)}
            else:
                kill = {"seconds": generator.uniform(0.0, ended.seconds)}
            deaths.append((kill, self.run(name, folder, **kill)))
        last = self.run(name, folder)
        printed = Path(f"{folder}.txt").read_text()
        found = [] if last.status == 0 else [f"the resumed run ended with status {last.status}"]
        return deaths, found or kills.differences(whole, folder), printed


@pytest.fixture(scope="module")
def trials(server, tmp_path_factory):
    return Trials(server, tmp_path_factory.mktemp("kills"))


@pytest.mark.slow
def test_kills(request):
    """Prints a table of what was tried, and of what differs."""
    count = request.config.getoption("--kills")
    if not count:
        pytest.skip("on JAX with --kills=20")
    trials = request.getfixturevalue("trials")
    generator = random.Random(0)
    table, wrong = {}, []
    names = [*STUDIES] if count > 10 else ["interval and fraction"]
    for number in range(count):
        name = names[number % len(names)]
        deaths, found, printed = trials.killed(name, generator)
        died = sum(ended.status < 0 for _, ended in deaths)
        row = table.setdefault(name, {"tried": 0, "kills": 0, "bit-equal": 0, "told": 0, "lost": 0})
        row["tried"] += 1
        row["kills"] += died
        outcome = "bit-equal" if not found else "told" if "damaged" in printed else "lost"
        row[outcome] += 1
        print(number, name, [kill for kill, _ in deaths], f"{died} killed:", outcome, flush=True)
        if found:
            wrong.append(f"{name}, {[kill for kill, _ in deaths]}: {found}\n{printed[-3000:]}")
    print(f"\n{keras.backend.backend()}")
    for name, row in table.items():
        print(f"{name:25}", *(f"{key} {value:3}" for key, value in row.items()))
    # A resumed run makes fewer changes, and runs differ in speed, so a kill may come too late.
    assert sum(row["kills"] for row in table.values()) >= count / 2
    assert not wrong, "\n\n".join(wrong)
