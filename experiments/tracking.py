"""Weights & Biases: online if there is a login and a network, otherwise offline; or off."""

import os
import re
import secrets
from typing import Any, Literal

import wandb

from experiments import files, network
from experiments.config import TrainConfig, WandbConfig, as_plain_dict
from experiments.errors import ExperimentError, say
from experiments.run_folder import RunFolder

RUN_ID = re.compile(r"[a-z0-9]{8}")


Mode = Literal["online", "offline", "disabled"] | None
"""Of a W&B run; if None, W&B reads it from the environment."""


def start(config: TrainConfig, folder: RunFolder, mode: Mode) -> Any:
    """Begin the W&B run of a training run, or continue it.

    Args:
        config: becomes the W&B configuration.
        folder: W&B's files go into its `wandb/`; the run's identity is kept there for a resumed run.
        mode: the result of `mode`.

    Returns:
        The W&B run, which knows its mode; a disabled one discards what is logged.

    Raises:
        ExperimentError: W&B must be online by the configuration, and cannot be reached.
    """
    try:
        return wandb.init(
            project=config.wandb.project,
            name=folder.path.name,
            dir=folder.path,
            config=as_plain_dict(config),
            id=run_id(folder),
            resume="allow",
            mode=mode,
            settings=wandb.Settings(silent=True, console="off"),
        )
    except wandb.Error as error:
        raise ExperimentError(f"Weights & Biases: {error} Or keep the run here with --wandb.mode=offline.") from error


def run_id(folder: RunFolder) -> str:
    """The identity of the W&B run, kept before the run begins, so that no process begins another one."""
    path = folder.wandb_run_id
    known = path.read_text(encoding="utf-8", errors="replace").strip() if path.exists() else ""
    if RUN_ID.fullmatch(known):
        return known
    # W&B's own folders end in this identity.
    earlier = sorted(path.parent.glob("*run-*-*"))
    chosen = earlier[-1].name.rpartition("-")[2] if earlier else secrets.token_hex(4)
    files.write_text(path, chosen)
    return chosen


def whereabouts(run: Any) -> str:
    """One line that says where to find a W&B run."""
    if run.disabled:
        return "off"
    if run.offline:
        written = os.path.dirname(run.dir)
        return f"offline, in {written}; upload with `wandb sync {written}`"
    return f"{run.url}, with files in {os.path.dirname(run.dir)}"


def mode(config: WandbConfig) -> Mode:
    """The mode of a run, from the configuration, the login and the network.

    Raises:
        ExperimentError: W&B must be online by the configuration, and cannot be reached.
    """
    from_environment = os.environ.get("WANDB_MODE", "auto")
    if config.mode in ("offline", "disabled"):
        return config.mode
    if config.mode == "auto" and from_environment not in ("auto", "online"):
        return None  # W&B reads it itself
    # Checked before W&B tries: without a network its login takes 18 s, a run 93 s, and the process does not end.
    address = wandb.setup().settings.base_url
    failure = network.failure(address)
    if "online" in (config.mode, from_environment):
        if failure:
            raise ExperimentError(
                f"W&B is asked to be online, but {address} cannot be reached ({failure}). Connect to the network, or "
                "choose --wandb.mode=offline and upload the run later with `wandb sync`."
            )
        return "online"
    if failure:
        say(f"Weights & Biases: {address} cannot be reached ({failure}); the run is kept offline.")
        return "offline"
    return "online" if wandb.login(prompt=False) else "offline"
