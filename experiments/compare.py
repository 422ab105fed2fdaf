"""The `compare` study: the same training at several strengths of the penalty, side by side."""

import dataclasses
import functools
import itertools
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import keras
from rich.console import Console

from experiments import data, devices, files, locks, plots, tables
from experiments.benchmark import measure
from experiments.benchmark.config import TimingConfig
from experiments.cells import work_off
from experiments.config import CompareConfig, TrainConfig
from experiments.run_folder import RunFolder
from experiments.study import machine
from experiments.train import train, training_batches


def compare(config: CompareConfig) -> dict[str, Any]:
    """Train the strengths that are not trained yet, then write and print the comparison.

    Args:
        config: the shared configuration and the strengths.

    Returns:
        The content of `comparison.json`: one row for each run, and the machine on which the times were taken.

    Raises:
        ExperimentError: the folder holds runs of another configuration, or a key does not fit.
    """
    devices.check_one_host(config.train, "compare")
    parent = Path(config.folder or f"runs/compare_{config.train.data.name}_{config.train.model.name}")
    configs = {run_name(strength): run_config(config, strength, parent) for strength in config.strengths}
    runs = [Run(run) for run in configs.values()]
    results = dict(zip(configs, work_off(runs, lambda place, result: None), strict=True))
    folders = {name: run.folder for name, run in zip(configs, runs, strict=True)}
    seconds = step_seconds(config, folders)
    rows = [{"run": name, **result, "seconds_per_step": seconds[name]} for name, result in results.items()]
    summary = {"rows": rows, "batch_size": config.train.batch_size, "machine": machine()}
    write(summary, folders, parent)
    return summary


def run_name(strength: float) -> str:
    """The name of a run in its folder's name, in the table and in the figure."""
    return f"strength {strength:g}" if strength else "plain"


def run_config(config: CompareConfig, strength: float, parent: Path) -> TrainConfig:
    """The configuration of one run; if its folder holds an interrupted run, it is continued."""
    folder = parent / run_name(strength).replace(" ", "-")
    return dataclasses.replace(
        config.train,
        jacobian=dataclasses.replace(config.train.jacobian, strength=strength),
        folder=str(folder),
        resume="auto",
    )


class Run(NamedTuple):
    """One run of the comparison."""

    config: TrainConfig

    @property
    def folder(self) -> RunFolder:
        """Its folder."""
        return RunFolder(Path(self.config.folder or ""))

    def result(self) -> dict[str, Any]:
        """The figures of the run. The run is trained if it is not finished.

        Raises:
            ExperimentError: the folder holds a run of another configuration, or another process works in it.
        """
        if not self.folder.is_finished and not locks.is_held(self.folder.lock):
            Console().rule(self.folder.path.name)
        return train(self.config)


def step_seconds(config: CompareConfig, folders: dict[str, RunFolder]) -> dict[str, float]:
    """The seconds of a training step of each run, by the run's name.

    They are measured after training and in turn, since the time of an epoch also depends on the machine's other work;
    and on one device, even if several trained.
    """
    batches = training_batches(config.train, data.load(config.train.data))
    # The last one may be smaller, and would be compiled anew.
    full = [batches[i] for i in range(min(config.timed_steps, max(1, len(batches) - 1)))]
    makers = {name: functools.partial(training_step, folder, full) for name, folder in folders.items()}
    # Steps with a penalty and steps without one differ.
    turns = dict.fromkeys(makers, config.train.jacobian.interval)
    taken = measure.turns(makers, TimingConfig(rounds=config.timed_steps, warmup=0), turns)
    return {name: statistics.median(measure.timed(found).seconds) for name, found in taken.items()}


def training_step(folder: RunFolder, batches: list) -> measure.Step:
    """A step of a trained model, on one batch after the other."""
    model, chosen = keras.models.load_model(folder.model), itertools.cycle(batches)
    return lambda: model.train_on_batch(*next(chosen))


def write(summary: dict[str, Any], folders: dict[str, RunFolder], parent: Path) -> None:
    """Write comparison.json, comparison.md and comparison.png, and print the table."""
    files.write_json(parent / "comparison.json", summary)
    files.write_text(parent / "comparison.md", tables.markdown(summary))
    robust = {row["run"]: row["robustness"] for row in summary["rows"]}
    plots.comparison(
        {name: folder.read_history() for name, folder in folders.items()},
        noise={name: {"0": report["clean"], **report["noise"]} for name, report in robust.items()},
        pgd={name: {"0": report["clean"], **report["pgd"]} for name, report in robust.items()},
        path=parent / "comparison.png",
    )
    console = Console(soft_wrap=True, highlight=False)
    console.print(tables.terminal(summary))
    console.print(tables.conditions(summary))
    console.print(f"Figure: {parent / 'comparison.png'}")
    console.print(f"Table: {parent / 'comparison.md'}")
