"""The benchmark of memory as a table, on the terminal and in Markdown."""

from pathlib import Path
from typing import Any

from rich.console import Console

from experiments import files, tables
from experiments.benchmark import report


def columns(row: dict[str, Any]) -> dict[str, str]:
    """One entry's figures, by the heading of their column."""
    return {
        "": row["label"],
        "mode": row["mode"],
        "error": report.one_digit(row["error"]),
        "peak MB": _megabytes(row["peak_bytes"]) if row["status"] == "ok" else row["status"],
        "held MB": _megabytes(row["held_bytes"]),
        "tensors MB": _megabytes(row["counted_bytes"]),
        "baseline MB": _megabytes(row["baseline_bytes"]),
    }


def headline(aims: list[dict[str, Any]]) -> str:
    """What linearizations hold over what training keeps, in a sentence each."""
    return "\n".join(
        f"- {aim['mode']}, {'training=True' if aim['name'].endswith('training') else 'inference'}: a frozen "
        f"linearization holds {_times(aim['held'])} what plain training keeps"
        f"{'' if aim['counted'] is None else ', by its tensors ' + _times(aim['counted'])}; aim: {aim['aim']} at most"
        f"{'' if aim['met'] is None else ', met' if aim['met'] else ', missed'}."
        for aim in aims
    )


def conditions(summary: dict[str, Any]) -> str:
    """What the figures mean and where they are from."""
    settings = summary["settings"]
    return (
        f"{report.subject(settings)}. Resident memory of a process of its own for each row, on the processor, in "
        "megabytes over its baseline: interpreter, libraries, weights, batch, directions, and what a first run of the "
        "same left behind (compiled code above all). Peak: the largest during the second run. Held: what stays after "
        "it, while its result is kept alive and all else was freed. Tensors: what the tensors that are held sum to, "
        "counted one by one, each buffer once, without weights and batch; TensorFlow's tape does not tell. What "
        "training keeps: between the forward and the backward pass of a step by the weights, in training mode "
        "(TensorFlow: a `GradientTape`; JAX: what `jax.vjp` returns; Torch: the graph). Linearization: eagerly the "
        "object that `jvpreg.linearize(model, x)` returns, with the outputs of all its "
        "nodes; compiled, what a function returns that returns the residuals of its nodes, all that tangent passes "
        "along inputs and weights need. TensorFlow runs without oneDNN, which "
        "would keep what is freed in a pool. On Torch, all but training runs under `no_grad`. Products: "
        "of `f(x)` and `J u`, of one direction or of "
        f"{settings['num_probes']}. Errors are relative, of `f(x)` and `J u` at a few images against float64 without "
        f"jit; above {settings['tolerance']:g} an entry is wrong and gets no bytes. {report.ran_on(summary)}"
    )


def write(summary: dict[str, Any], folder: Path, console: Console) -> None:
    """Write memory.json and memory.md, and print the table."""
    rows = [columns(row) for row in summary["entries"]]
    notes = f"{headline(summary['aims'])}\n\n{conditions(summary)}"
    files.write_json(folder / "memory.json", summary)
    files.write_text(folder / "memory.md", f"{tables.grid_markdown(rows)}\n\n{notes}\n")
    console.print(tables.grid(rows))
    console.print(notes)
    console.print(f"Files: {folder}")


def _megabytes(size: int | None) -> str:
    return "" if size is None else f"{size / 1e6:.1f}"


def _times(ratio: float | None) -> str:
    return "(not measured)" if ratio is None else f"{ratio:.2f} times"
