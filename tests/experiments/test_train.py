"""A run from its configuration to its report, and how the damaged folder of a run is mended."""

import dataclasses
import errno
import json
import math
import os
import re
import socket
import zipfile

import keras
import pytest
import yaml

import jvpreg
from experiments import tracking
from experiments.__main__ import main
from experiments.backup import write_history
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
from experiments.data import load
from experiments.epoch_end import EpochEnd
from experiments.errors import ExperimentError
from experiments.run_folder import RunFolder
from experiments.status import StatusConfig, status
from experiments.train import MONITOR, compiled_model, default_folder, restore, train, trained_dataset, trained_model
from tests.callbacks.offline_run import written
from tests.experiments import wandb_records

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
        model=ModelConfig("mlp", 4),
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


@pytest.mark.slow
@pytest.mark.every_backend
def test_the_folder_holds_what_it_promises(finished):
    result, folder = finished
    assert yaml.safe_load(folder.config.read_text())["jacobian"]["strength"] == 0.01
    assert folder.curves.read_bytes().startswith(b"\x89PNG")
    pictures = {path.name for path in (folder.path / "jacobian").glob("*.png")}
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


@pytest.mark.slow
def test_strength_zero_trains_the_plain_model(tmp_path, capsys):
    config = small(tmp_path / "plain", jacobian=JacobianConfig(strength=0.0), epochs=1)
    train(config)
    history = RunFolder(tmp_path / "plain").read_history()
    assert not any("frobenius_norm_squared" in key for key in history)
    assert history.keys() >= JACOBIAN_KEYS  # a plain model's Jacobian is watched all the same
    shown = capsys.readouterr().out
    assert "    ‖J‖ " in shown
    assert "jacobian/" not in shown.replace("/jacobian/", "")  # except in one short line


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


def backed_up(tmp_path, **changes):
    """A folder with the backups of two finished epochs, and the model as it was."""
    config = small(tmp_path / "run", epochs=3, **changes)
    folder = RunFolder(tmp_path / "run")
    with folder.held():
        progress = folder.check(config)
        folder.open(progress)
    model = compiled_model(config, load(config.data), steps=12)
    model.optimizer.build(model.trainable_variables)
    for epoch, accuracy in enumerate((0.5, 0.4)):
        model.optimizer.iterations.assign(4 * (epoch + 1))
        progress.rows.append({"epoch": epoch, "loss": 2.0 - epoch, "val_accuracy": accuracy, "jacobian/m": math.nan})
        progress.best = 0.5
        folder.backups.save(model, progress)
    write_history(progress.rows, folder.history)
    return folder, dataclasses.replace(config, resume=True)


def restored(folder, config):
    """How far a resumed run has come, and the optimizer's step."""
    with folder.held():
        progress = folder.check(config)
        folder.open(progress)
    model = compiled_model(config, load(config.data), steps=12)
    folder.backups.restore(model)
    return progress, int(model.optimizer.iterations)


def test_a_run_goes_on_from_its_newest_backup(tmp_path):
    folder, config = backed_up(tmp_path)
    before = folder.history.read_text()
    progress, step = restored(folder, config)
    assert (progress.epochs, step, progress.best) == (2, 8, 0.5)
    assert folder.history.read_text() == before
    assert folder.read_history()["loss"] == [2.0, 1.0]
    assert math.isnan(folder.read_history()["jacobian/m"][0])


TORN = {
    "half the weights": lambda path: cut(path / "state.keras"),
    "half the progress": lambda path: cut(path / "progress.json"),
    "a flipped bit": lambda path: flip(path / "state.keras"),
    "no weights": lambda path: (path / "state.keras").unlink(),
    "another file": lambda path: (path / "progress.json").write_text("{}"),
}


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", TORN)
def test_a_damaged_backup_is_told_and_the_one_before_it_used(damage, tmp_path, capsys):
    folder, config = backed_up(tmp_path)
    TORN[damage](folder.backups.folder / "backup-00002")
    progress, step = restored(folder, config)
    assert (progress.epochs, step) == (1, 4)
    assert folder.read_history()["epoch"] == [0]  # the second epoch will be trained again
    assert "backup-00002 is damaged" in capsys.readouterr().err


def test_without_a_whole_backup_a_run_begins_anew(tmp_path, capsys):
    folder, config = backed_up(tmp_path)
    for number in (1, 2):
        cut(folder.backups.folder / f"backup-0000{number}" / "progress.json")
    progress, step = restored(folder, config)
    assert (progress.epochs, step, progress.best) == (0, 0, None)
    assert not folder.history.exists()
    assert capsys.readouterr().err.count("is damaged") == 2


def test_what_a_run_is_at_is_told(tmp_path):
    folder, _ = backed_up(tmp_path)
    for place in (folder.path, tmp_path):  # a run's folder, and one of several runs
        (row,) = status(StatusConfig(str(place)))
        assert (row["run"], row["state"], row["epochs"], row["process"]) == (
            "run",
            "stopped",
            "2 of 3",
            str(os.getpid()),
        )
    with folder.held():
        assert status(StatusConfig(str(tmp_path)))[0]["state"] == "running"
    cut(folder.config)
    assert status(StatusConfig(str(tmp_path)))[0]["epochs"] == "2"


def test_a_run_that_a_guard_ended_is_not_trained_further(tmp_path, monkeypatch):
    folder, config = backed_up(tmp_path)
    progress, _ = restored(folder, config)
    model = compiled_model(config, load(config.data), steps=12)
    model.stop_training = True
    model.optimizer.build(model.trainable_variables)
    logs = {"loss": 0.5, "val_accuracy": 0.6}
    end = EpochEnd(folder.backups, progress, folder.history, folder.best_model, MONITOR)
    end.set_model(model)
    end.on_epoch_end(2, logs)
    progress, _ = restored(folder, config)
    assert progress.stopped
    assert (progress.epochs, progress.best) == (3, 0.6)
    assert keras.models.load_model(folder.best_model)


def test_a_teacher_whose_folder_is_damaged_is_told(tmp_path):
    folder, _ = backed_up(tmp_path)
    with pytest.raises(ExperimentError, match="no trained model"):
        trained_model(str(folder.path))
    folder.model.write_bytes(b"PK half an archive")
    with pytest.raises(ExperimentError, match="no whole model"):
        trained_model(str(folder.path))
    cut(folder.config)
    folder.config.write_text(folder.config.read_text()[:10])
    with pytest.raises(ExperimentError, match="does not say on what data the model was trained"):
        trained_dataset(str(folder.path))


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_backup_and_is_told(tmp_path, monkeypatch, capsys):
    folder, config = backed_up(tmp_path)
    write = zipfile.ZipFile.writestr

    def full(self, *args, **kwargs):
        if "backup-00003" in str(self.filename):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, *args, **kwargs)

    monkeypatch.setattr(zipfile.ZipFile, "writestr", full)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(as_plain_dict(config)))
    assert main(["train", f"--config={file}"]) == 2
    assert capsys.readouterr().err.endswith("`train` with --resume=true.\n")
    assert sorted(path.name for path in folder.backups.folder.glob("*backup*")) == ["backup-00001", "backup-00002"]
    assert restored(folder, config)[0].epochs == 2


def test_only_the_last_two_backups_are_kept(tmp_path):
    folder, config = backed_up(tmp_path)
    progress, _ = restored(folder, config)
    model = compiled_model(config, load(config.data), steps=12)
    progress.rows.append({"epoch": 2})
    folder.backups.save(model, progress)
    assert sorted(path.name for path in folder.backups.folder.iterdir()) == ["backup-00002", "backup-00003"]


@pytest.mark.parametrize("content", [None, "", "epoch,loss\n0,2.0\n1,", "epoch,loss\n0,2\n1,1\n2,0.5\n2,0.4\n"])
def test_the_history_is_what_the_backup_says(content, tmp_path):
    folder, config = backed_up(tmp_path)
    before = folder.history.read_text()
    folder.history.unlink() if content is None else folder.history.write_text(content)
    restored(folder, config)
    assert folder.history.read_text() == before


@pytest.mark.parametrize("content", [None, "", "data:\n  name: dig", b"\xff\xfe", "epochs: 3\n"])
def test_a_damaged_configuration_is_mended(content, tmp_path):
    folder, config = backed_up(tmp_path)
    before = folder.config.read_text()
    if content is None:
        folder.config.unlink()
    else:
        folder.config.write_bytes(content if isinstance(content, bytes) else content.encode())
    progress, _ = restored(folder, config)
    assert progress.epochs == 2
    assert folder.config.read_text() == before
    with pytest.raises(ExperimentError, match="seed was 0 and is now 1"):
        restored(folder, dataclasses.replace(config, seed=1))


def test_a_best_model_that_is_lost_is_saved_again_or_told(tmp_path, capsys):
    folder, config = backed_up(tmp_path)
    model = compiled_model(config, load(config.data), steps=12)
    progress, _ = restored(folder, config)
    restore(model, folder, progress)  # the first epoch was the best one, and the weights are the second's
    assert progress.best is None
    assert "best.keras is damaged or missing" in capsys.readouterr().err
    progress.best = progress.rows[-1]["val_accuracy"]
    folder.best_model.write_bytes(b"PK half an archive")
    restore(model, folder, progress)
    assert progress.best == 0.4
    assert int(keras.models.load_model(folder.best_model).optimizer.iterations) == 8


@pytest.mark.parametrize("damaged", ["result.json", "model.keras"])
def test_a_damaged_report_is_made_again(damaged, finished, monkeypatch):
    result, folder = finished
    before = (folder.path / damaged).read_bytes()
    cut(folder.path / damaged)
    assert not folder.is_finished
    config = small(folder.path, wandb=WandbConfig(mode="offline"), resume=True)
    monkeypatch.setattr("experiments.tracking.mode", lambda config: "disabled")
    assert train(config) == result
    if damaged == "result.json":
        assert (folder.path / damaged).read_bytes() == before
    monkeypatch.setattr("experiments.train.train_on", lambda *arguments: pytest.fail("trained again"))
    assert train(config) == result


def test_a_second_process_is_told_which_one_works_in_the_folder(tmp_path, capsys):
    folder = RunFolder(tmp_path)
    with folder.held():
        assert main(["train", f"--folder={tmp_path}"]) == 2
    message = capsys.readouterr().err
    holder = f"process {os.getpid()} on {socket.gethostname()}"
    assert re.fullmatch(rf"error: {tmp_path} is in use by {holder} since 20\S+\. .*--folder=PATH\.\n", message)
    assert not folder.holds_run


@pytest.mark.parametrize("words", ["--data.train_examples=3", "--wandb.mode=online"])
def test_a_run_that_cannot_start_leaves_none_behind(words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("experiments.network.failure", lambda address: "no route to host")
    assert main(["train", f"--folder={tmp_path}", words]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not RunFolder(tmp_path).holds_run


def test_a_folder_that_is_a_file(tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("mine")
    for place in (file, file / "below"):
        assert main(["train", f"--folder={place}"]) == 2
        message = capsys.readouterr().err
        assert str(file) in message
        assert message.count("\n") == 1
    assert file.read_text() == "mine"


@pytest.mark.parametrize("known", ["", "half an id of", "\x00"])
def test_a_damaged_identity_is_mended_from_wandb_s_folders(known, tmp_path):
    folder = RunFolder(tmp_path)
    first = tracking.run_id(folder)
    assert tracking.run_id(folder) == first
    (tmp_path / "wandb" / f"offline-run-20300101_000000-{first}").mkdir()
    folder.wandb_run_id.write_text(known)
    assert tracking.run_id(folder) == first


def test_without_a_network_a_run_is_kept_offline_and_told(monkeypatch, capsys):
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setattr("experiments.network.failure", lambda address: "no route to host")
    monkeypatch.setattr("wandb.login", lambda **kwargs: pytest.fail("it takes 18 s, and does not end"))
    assert tracking.mode(WandbConfig()) == "offline"
    assert "cannot be reached (no route to host); the run is kept offline" in capsys.readouterr().err
    with pytest.raises(ExperimentError, match=r"cannot be reached.*--wandb\.mode=offline"):
        tracking.mode(WandbConfig(mode="online"))
    for mode in ("offline", "disabled"):
        assert tracking.mode(WandbConfig(mode=mode)) == mode


def test_the_default_folder_tells_runs_apart(tmp_path):
    names = {default_folder(small(tmp_path, seed=seed, jacobian=JacobianConfig(strength)))
             for seed in (0, 1) for strength in (0.0, 0.01)}  # fmt: skip
    assert len(names) == 4


def test_the_learning_rate_falls_to_zero_and_decay_spares_biases(tmp_path):
    from experiments.config import OptimizerConfig
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

    test = load(DataConfig()).test
    return test.images(), test.labels
