"""Draws docs/data/terminal.png and docs/data/wandb.png: `KERAS_BACKEND=torch python docs/tracking_pictures.py`.

It trains a small network on scikit-learn's digits in a terminal of 100 columns, with W&B offline, and draws the last
epochs in that terminal, and charts of the rows in the file that W&B wrote.
"""

import fcntl
import os
import pty
import re
import struct
import sys
import tempfile
import termios
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))
COLUMNS, EPOCHS, SHOWN = 100, 12, 3


def train() -> None:
    """Train in the current folder."""
    import keras
    import wandb
    from keras import layers
    from sklearn.datasets import load_digits

    import jvpreg

    digits = load_digits()
    images, labels = (digits.images[..., None] / 16).astype("float32"), digits.target
    keras.utils.set_random_seed(0)
    network = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(16, 3, padding="same", activation="relu", name="conv1"),
            layers.Conv2D(16, 3, padding="same", activation="relu", name="conv2"),
            layers.MaxPool2D(),
            layers.Conv2D(32, 3, padding="same", activation="relu", name="conv3"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(10),
        ]
    )
    model = jvpreg.JacobianModel(network)
    model.compile(
        optimizer=keras.optimizers.Adam(3e-3),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jacobian_regularizers=[jvpreg.regularizers.JacobianNorm(0.001)],
    )
    metrics = ["frobenius_norm", "spectral_norm", "stable_rank"]
    probe = jvpreg.callbacks.JacobianProbe(images[1500:1564], metrics, layers=["conv2"], blocks=["conv3"])
    with wandb.init(dir=".", mode="offline", settings=wandb.Settings(silent=True, console="off")):
        model.fit(
            images[:1400],
            labels[:1400],
            validation_data=(images[1400:], labels[1400:]),
            epochs=EPOCHS,
            batch_size=64,
            callbacks=[
                probe,
                jvpreg.callbacks.JacobianWandbLogger(probe),
                jvpreg.callbacks.JacobianProgbarLogger(probe),
            ],
        )


def in_a_terminal(folder: str) -> str:
    """What the training prints, in a terminal of its own."""
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(folder)
        os.execv(sys.executable, [sys.executable, __file__, "train"])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, COLUMNS, 0, 0))
    printed = b""
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # Linux ends so when the process is gone.
            part = b""
        if not part:
            break
        printed += part
    _, status = os.waitpid(process, 0)
    if status:
        raise SystemExit(printed.decode())
    return printed.decode()


def draw_terminal(printed: str, path: Path) -> None:
    """The last epochs, as they stand in the terminal."""
    from matplotlib import font_manager
    from PIL import Image, ImageDraw, ImageFont

    # A bar is written over itself, behind backspaces and a return.
    lines = [line.replace("\b", "").split("\r")[-1] for line in printed.replace("\r\n", "\n").split("\n")]
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).rstrip() for line in lines]
    first = lines.index(f"Epoch {EPOCHS - SHOWN + 1}/{EPOCHS}")
    shown = [line[i : i + COLUMNS] for line in lines[first:] if line for i in range(0, len(line), COLUMNS)]
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans Mono"), 15)
    width, height = int(font.getlength("M") * COLUMNS) + 24, 20
    image = Image.new("RGB", (width, height * len(shown) + 20), "#1e1e1e")
    for i, line in enumerate(shown):
        color = "#8ec07c" if line.startswith("    ") else "#e8e8e8"
        ImageDraw.Draw(image).text((12, 10 + i * height), line, font=font, fill=color)
    image.save(path)


def draw_charts(folder: Path, path: Path) -> None:
    """Charts of the rows that W&B keeps in a folder."""
    from matplotlib.figure import Figure

    from tests.callbacks.offline_run import written
    from tests.experiments import wandb_records

    written(folder)
    rows = wandb_records.history(folder)
    figure = Figure(figsize=(11, 5.6), layout="constrained")
    axes = figure.subplots(2, 3).ravel()
    charts = {
        "loss": ["loss", "val_loss"],
        "accuracy": ["accuracy", "val_accuracy"],
        "norms, with standard errors": ["jacobian/frobenius_norm", "jacobian/spectral_norm"],
        "stable rank": ["jacobian/stable_rank"],
        "one layer": ["jacobian/block/conv3/frobenius_norm"],
    }
    epochs = [row["epoch/epoch"] for row in rows]
    for ax, (title, keys) in zip(axes, charts.items(), strict=False):
        for key in (f"epoch/{key}" for key in keys):
            errors = [row.get(f"{key}_sem", 0.0) for row in rows]
            ax.errorbar(epochs, [row[key] for row in rows], errors, marker="o", markersize=3, capsize=2, label=key)
        ax.set_xlabel("epoch/epoch")
        ax.legend(fontsize=6.5)
        ax.set_title(title, fontsize=9, loc="left")
    key = "jacobian/frobenius_norm_histogram"
    axes[-1].stairs(rows[-1][f"{key}/values"], rows[-1][f"{key}/bins"], fill=True)
    axes[-1].set_title(f"{key}, last epoch", fontsize=9, loc="left")
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    if sys.argv[1:] == ["train"]:
        train()
    else:
        with tempfile.TemporaryDirectory() as folder:
            draw_terminal(in_a_terminal(folder), DOCS / "data" / "terminal.png")
            draw_charts(Path(folder) / "wandb", DOCS / "data" / "wandb.png")
