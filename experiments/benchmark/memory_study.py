"""The `benchmark memory` study: what a frozen model holds, and what products need, beside plain training."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from experiments import processes
from experiments.benchmark import calls, competitors, entries, kinks, memory, memory_entries, products, study
from experiments.benchmark.config import MemoryConfig
from experiments.benchmark.memory_entries import ENTRIES, Entry
from experiments.benchmark.reference import Reference
from experiments.benchmark.study import Benchmark
from experiments.errors import ExperimentError

CANDIDATES, EXAMPLES = 64, 4  # of the images at which products are checked, and that are
AIM = 1.2  # times what plain training keeps: what a frozen linearization should hold at most

Mode = Literal["eager", "compiled"]

ENVIRONMENT = {
    # What is measured is the process' resident memory, which a GPU's is no part of.
    "CUDA_VISIBLE_DEVICES": "-1",
    "JAX_PLATFORMS": "cpu",
    # The C library gives blocks from this size on back to the system when they are freed. By itself it moves the size.
    "MALLOC_MMAP_THRESHOLD_": "65536",
    # With oneDNN, TensorFlow keeps what is freed in a pool of its own, where resident memory cannot tell it.
    "TF_ENABLE_ONEDNN_OPTS": "0",
}


def measured(config: MemoryConfig, console: Console) -> dict[str, Any]:
    """A row an entry and mode, and what was aimed at."""
    if not Path("/proc/self/clear_refs").exists():
        raise ExperimentError("benchmark memory reads and resets a process' peak in /proc, which only Linux has.")
    modes: list[Mode] = ["eager"] if study.mode(config) == "eager" else ["eager", "compiled"]
    errors = check(modes, config)
    rows = []
    for mode in modes:
        for entry in ENTRIES:
            console.print(f"measuring {entry.label}, {mode}")
            error = errors[mode, entry.several] if entry.frozen else None
            rows.append(row(entry, mode, error, config))
    return {"entries": rows, "aims": aims(rows)}


def check(modes: Sequence[Mode], config: MemoryConfig) -> dict[tuple[Mode, bool], float]:
    """Relative errors of products of one direction and of several, by mode, against float64 without jit."""
    model = entries.plain_model(config)
    xs = [kinks.far_from_kinks(entries.images(config, CANDIDATES), [model], EXAMPLES).images()]
    us = products.directions([xs[0].shape], config.num_probes, config.seed)
    y, expected = products.by_autodiff(Reference(model, "moving", xs[0]).model, xs, us)
    errors = {}
    for mode in modes:
        jit = jit_of(mode, config)
        for several in (False, True):
            count = config.num_probes if several else 1
            received = products.call(model, competitors.linearize, xs, [u[:count] for u in us], jit)()
            errors[mode, several] = products.worst(received, [y, expected[:count]])
    return errors


def jit_of(mode: Mode, config: MemoryConfig) -> bool | None:
    """See `calls.compiled`."""
    return None if mode == "eager" else config.jit_compile


def sizes_of(name: str, mode: Mode, config: MemoryConfig) -> dict[str, int | None] | MemoryError:
    """What an entry adds to the memory of a process that has run it once before.

    Args:
        name: of the entry.
        mode: whether what is run is compiled, as the configuration says, or eager.
        config: of the study.

    Returns:
        Bytes: the `baseline` (interpreter, libraries, weights, batch and compiled code), the `peak` over it, what is
        `held` over it by what is kept alive, and what its tensors sum to, `counted`; a MemoryError where the process
        ran out of memory or was killed.
    """
    return processes.memory(sizes, (name, mode, config), ENVIRONMENT)


def sizes(name: str, mode: Mode, config: MemoryConfig) -> Iterator[dict[str, int | None]]:
    """In a process of its own: run an entry twice, and say what the second run added."""
    entry = next(entry for entry in ENTRIES if entry.name == name)
    made = memory_entries.subject(config, config.num_probes if entry.several else 1, jit_of(mode, config))
    # Compiles, and lets the libraries take what they never give back.
    calls.wait(entry.make(made))
    memory.settle()
    baseline = memory.resident()
    memory.forget_peak()
    held = entry.make(made)
    calls.wait(held)
    peak = memory.resident_peak()
    memory.settle()
    yield {
        "baseline": baseline,
        "peak": peak - baseline,
        "held": memory.resident() - baseline,
        "counted": memory_entries.counted_bytes(held, made),
    }


def row(entry: Entry, mode: Mode, error: float | None, config: MemoryConfig) -> dict[str, Any]:
    """What the JSON file says of an entry; one with a wrong product gets no bytes."""
    right = error is None or study.is_right(error, config)
    found = sizes_of(entry.name, mode, config) if right else None
    known = found if isinstance(found, dict) else {}
    return {
        "name": entry.name,
        "label": entry.label,
        "mode": study.mode(config) if mode == "compiled" else mode,
        "error": None if error is None else study.finite(error),
        "status": "wrong" if not right else "out of memory" if isinstance(found, MemoryError) else "ok",
        "message": str(found) if isinstance(found, MemoryError) else None,
        **{f"{name}_bytes": known.get(name) for name in ("baseline", "peak", "held", "counted")},
    }


def aims(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What linearizations hold over what training keeps in the same mode, by resident memory and by counting."""
    found = {(row["mode"], row["name"]): row for row in rows}
    made = []
    for (mode, name), own in found.items():
        if name.startswith("linearization"):
            kept = found[mode, "training"]
            by = {
                size: own[f"{size}_bytes"] / kept[f"{size}_bytes"]
                if own[f"{size}_bytes"] and kept[f"{size}_bytes"]
                else None
                for size in ("held", "counted")
            }
            met = None if by["held"] is None else by["held"] <= AIM
            made.append({"name": name, "mode": mode, "aim": AIM, **by, "met": met})
    return made


def columns(row: dict[str, Any]) -> dict[str, str]:
    """One entry's figures, by the heading of their column."""
    return {
        "": row["label"],
        "mode": row["mode"],
        "error": study.one_digit(row["error"]),
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


def caption(summary: dict[str, Any]) -> str:
    """What the figures mean and where they are from."""
    settings = summary["settings"]
    return (
        f"{study.subject(settings)}. Resident memory of a process of its own for each row, on the processor, in "
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
        f"jit; above {settings['tolerance']:g} an entry is wrong and gets no bytes. {study.ran_on(summary)}"
    )


def _megabytes(size: int | None) -> str:
    return "" if size is None else f"{size / 1e6:.1f}"


def _times(ratio: float | None) -> str:
    return "(not measured)" if ratio is None else f"{ratio:.2f} times"


STUDY = Benchmark(
    "memory",
    measured,
    lambda summary: [[columns(row) for row in summary["entries"]], headline(summary["aims"]), caption(summary)],
)
