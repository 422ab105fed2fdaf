"""A run from its configuration to its report, and from where it was killed to the same report."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pytest
import yaml

import jvpreg
from experiments.__main__ import main
from experiments.config import (
    DataConfig,
    JacobianConfig,
    ModelConfig,
    ProbeConfig,
    RobustnessConfig,
    TrainConfig,
    WandbConfig,
    as_plain_dict,
)
from experiments.errors import ExperimentError
from experiments.run_folder import RunFolder
from experiments.train import compiled_model, default_folder, train
from tests.callbacks.offline_run import written
from tests.experiments import wandb_records

REPOSITORY = Path(__file__).parents[2]
JACOBIAN_KEYS = {
    "jacobian/frobenius_norm",
    "jacobian/frobenius_norm_sem",
    "jacobian/spectral_norm",
    "jacobian/top_singular_values_1",
    "jacobian/top_singular_values_5",
}


def small(folder, **changes):
    config = TrainConfig(
        data=DataConfig(train_examples=256),
        model=ModelConfig("vgg4", 4),
        jacobian=JacobianConfig(strength=0.01),
        probe=ProbeConfig(examples=8),
        robustness=RobustnessConfig(examples=50, noise=[0.1], epsilons=[0.05], pgd_steps=2),
        wandb=WandbConfig(mode="disabled"),
        epochs=2,
        batch_size=64,
        folder=str(folder),
    )
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A regularized run of two epochs, tracked offline."""
    path = tmp_path_factory.mktemp("runs") / "finished"
    result = train(small(path, wandb=WandbConfig(mode="offline")))
    written(path / "wandb")
    return result, RunFolder(path)


@pytest.mark.every_backend
def test_the_folder_holds_what_it_promises(finished):
    result, folder = finished
    assert yaml.safe_load(folder.config.read_text())["jacobian"]["strength"] == 0.01
    assert folder.curves.read_bytes().startswith(b"\x89PNG")
    pictures = {path.name for path in (folder.path / "jacobian").iterdir()}
    assert pictures == {"frobenius_norm.png", "spectral_norm.png", "top_singular_values.png"}
    assert folder.best_model.exists()
    assert folder.read_result() == result
    assert json.loads(folder.robustness.read_text()) == result["robustness"]
    history = folder.read_history()
    assert history["epoch"] == [0, 1]
    assert history.keys() >= JACOBIAN_KEYS | {"loss", "accuracy", "val_loss", "val_accuracy"}
    assert result["test_accuracy"] == history["val_accuracy"][-1]
    assert result["jacobian/frobenius_norm"] > result["jacobian/frobenius_norm_sem"] > 0


@pytest.mark.every_backend
def test_the_saved_model_is_the_one_that_was_evaluated(finished):
    result, folder = finished
    model = keras.models.load_model(folder.model)
    assert isinstance(model, jvpreg.JacobianModel)
    loss, accuracy = model.evaluate(*digits_test(), verbose=0)[:2]
    assert accuracy == pytest.approx(result["test_accuracy"])
    assert loss == pytest.approx(result["test_loss"], rel=1e-4)


def test_the_offline_wandb_run_has_every_epoch_and_the_jacobian(finished):
    _, folder = finished
    history = folder.read_history()
    rows = [row for row in wandb_records.history(folder.path / "wandb") if "epoch/epoch" in row]
    assert [row["epoch/epoch"] for row in rows] == [0, 1]
    for epoch, row in enumerate(rows):
        assert row["epoch/learning_rate"] < 1e-3
        for key in JACOBIAN_KEYS | {"loss", "val_accuracy"}:
            assert row[f"epoch/{key}"] == pytest.approx(history[key][epoch])
        assert sum(row["jacobian/frobenius_norm_histogram/values"]) == 8
    assert "jacobian/top_singular_values_history/path" in rows[-1]


def test_strength_zero_trains_the_plain_model(tmp_path):
    config = small(tmp_path / "plain", jacobian=JacobianConfig(strength=0.0), epochs=1)
    train(config)
    history = RunFolder(tmp_path / "plain").read_history()
    assert not any("jacobian_norm" in key for key in history)
    assert history.keys() >= JACOBIAN_KEYS  # a plain model's Jacobian is watched all the same


def test_a_folder_that_holds_a_run_is_not_overwritten(finished, capsys):
    _, folder = finished
    before = folder.history.read_text()
    assert main(["train", f"--config={folder.config}"]) == 2
    assert "already holds a run" in (message := capsys.readouterr().err)
    assert "--resume=true" in message
    assert folder.history.read_text() == before


def test_resuming_needs_a_run_of_the_same_configuration(finished, tmp_path):
    _, folder = finished
    with pytest.raises(ExperimentError, match="holds no run to resume"):
        train(small(tmp_path / "nothing", resume=True))
    other = small(folder.path, wandb=WandbConfig(mode="offline"), seed=1, resume=True)
    with pytest.raises(ExperimentError, match="seed was 0 and is now 1"):
        train(other)


@pytest.mark.every_backend
def test_a_killed_run_continues_to_where_it_would_have_come(tmp_path):
    config = small(tmp_path / "killed", epochs=4, wandb=WandbConfig(mode="offline"))
    folder = RunFolder(tmp_path / "killed")
    run_killed_after_its_second_epoch(config, folder)
    done = folder.finished_epochs()
    assert done == 2
    assert not folder.is_finished

    time.sleep(1.1)  # W&B names the parts of an offline run by the second in which they began
    resumed = train(dataclasses.replace(config, resume=True))
    written(folder.path / "wandb")
    rows = wandb_records.history(folder.path / "wandb")[done - config.epochs :]
    assert [row["epoch/epoch"] for row in rows] == list(range(done, config.epochs))
    assert [row["_step"] for row in rows] == list(range(done, config.epochs))
    uninterrupted = train(
        dataclasses.replace(config, folder=str(tmp_path / "uninterrupted"), wandb=WandbConfig("disabled"))
    )
    whole = RunFolder(tmp_path / "uninterrupted")
    history = folder.read_history()
    assert history["epoch"] == list(range(config.epochs))
    for key, values in whole.read_history().items():
        # Rounding moves an example or two over the edge between two classes.
        edge = 2.5 / 256 if "accuracy" in key else 0.0
        np.testing.assert_allclose(history[key], values, rtol=1e-4, atol=edge, err_msg=key)
    assert resumed["test_accuracy"] == pytest.approx(uninterrupted["test_accuracy"], abs=2.5 / 256)
    one, other = (keras.models.load_model(f.model) for f in (folder, whole))
    assert int(one.optimizer.iterations) == int(other.optimizer.iterations) == config.epochs * 4
    for left, right in zip(one.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-3, atol=1e-5)


def test_an_epoch_that_was_logged_but_not_backed_up_is_logged_once(tmp_path):
    config = small(tmp_path, epochs=2)
    folder = RunFolder(tmp_path)
    folder.open(config)
    folder.history.write_text("epoch,loss\n0,2.0\n1,1.5\n2,")  # killed while it wrote the third line
    folder.backup.mkdir()
    (folder.backup / "training_metadata.json").write_text('{"epoch": 1, "batch": 0}')
    folder.open(dataclasses.replace(config, resume=True))
    assert folder.read_history() == {"epoch": [0.0], "loss": [2.0]}


def test_the_default_folder_tells_runs_apart(tmp_path):
    names = {default_folder(small(tmp_path, seed=seed, jacobian=JacobianConfig(strength)))
             for seed in (0, 1) for strength in (0.0, 0.01)}  # fmt: skip
    assert len(names) == 4


def test_the_learning_rate_falls_to_zero_and_decay_spares_biases(tmp_path):
    from experiments.config import OptimizerConfig
    from experiments.data import load
    from experiments.train import optimizer

    chosen = optimizer(OptimizerConfig("sgd", learning_rate=0.1, weight_decay=0.01), steps=10)
    assert float(chosen.learning_rate) == pytest.approx(0.1)
    chosen.iterations.assign(10)
    assert float(chosen.learning_rate) == pytest.approx(0.0, abs=1e-8)
    config = small(tmp_path, optimizer=OptimizerConfig("sgd", 0.1, 0.01))
    model = compiled_model(config, load(config.data), steps=10)
    model.optimizer.build(model.trainable_variables)
    decayed = {variable.name for variable in model.trainable_variables if model.optimizer._use_weight_decay(variable)}
    assert decayed == {"kernel"}


def digits_test():
    from experiments.data import load

    test = load(DataConfig()).test
    return test.images(), test.labels


KILLED = """
import os, signal, sys
from keras.callbacks import BackupAndRestore
from experiments.__main__ import main

back_up = BackupAndRestore.on_epoch_end

def back_up_and_die(self, epoch, logs=None):
    back_up(self, epoch, logs)
    if epoch == 1:
        os.kill(os.getpid(), signal.SIGKILL)

BackupAndRestore.on_epoch_end = back_up_and_die
main(sys.argv[1:])
"""


def run_killed_after_its_second_epoch(config, folder):
    """In a process of its own, as soon as that epoch is backed up, which is the last that is done with it."""
    file = folder.path.parent / "config.yaml"
    file.write_text(yaml.safe_dump(as_plain_dict(config)))
    command = [sys.executable, "-c", KILLED, "train", f"--config={file}"]
    # A W&B service of its own: this process's would go on after the kill, and hold the run.
    environment = {key: value for key, value in os.environ.items() if key != "WANDB_SERVICE"}
    run = subprocess.run(command, cwd=REPOSITORY, env=environment, stdout=subprocess.DEVNULL, timeout=300, check=False)
    assert run.returncode == -signal.SIGKILL
