"""The `benchmark memory` study: what a frozen model holds, and what products need, beside plain training."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import tables
from experiments.benchmark import competitors, entries, kinks, memory_process, memory_report, products, study
from experiments.benchmark.config import MemoryConfig
from experiments.benchmark.memory_entries import ENTRIES, Entry
from experiments.benchmark.memory_process import Mode
from experiments.benchmark.reference import Reference
from experiments.errors import ExperimentError

CANDIDATES, EXAMPLES = 64, 4  # of the images at which products are checked, and that are
AIM = 1.2  # times what plain training keeps: what a frozen linearization should hold at most


def run(config: MemoryConfig) -> dict[str, Any]:
    """Measure the entries, and write and print what came out.

    Args:
        config: see `MemoryConfig`.

    Returns:
        What `memory.json` holds: the settings, the machine, a row an entry and mode, and what was aimed at.

    Raises:
        ExperimentError: where the system does not tell a process its memory.
    """
    if not Path("/proc/self/clear_refs").exists():
        raise ExperimentError("benchmark memory reads and resets a process' peak in /proc, which only Linux has.")
    console = tables.wide_console()
    modes: list[Mode] = ["eager"] if study.mode(config) == "eager" else ["eager", "compiled"]
    errors = check(modes, config)
    rows = []
    for mode in modes:
        for entry in ENTRIES:
            console.print(f"measuring {entry.label}, {mode}")
            error = errors[mode, entry.several] if entry.frozen else None
            rows.append(row(entry, mode, error, config))
    summary = {"study": "benchmark memory", **study.conditions(config), "entries": rows, "aims": aims(rows)}
    memory_report.write(summary, study.folder("memory", config), console)
    return summary


def check(modes: Sequence[Mode], config: MemoryConfig) -> dict[tuple[Mode, bool], float]:
    """Relative errors of products of one direction and of several, by mode, against float64 without jit."""
    model = entries.plain_model(config)
    xs = [kinks.far_from_kinks(entries.images(config, CANDIDATES), [model], EXAMPLES).images()]
    us = products.directions([xs[0].shape], config.num_probes, config.seed)
    y, expected = products.exact(Reference(model, "moving", xs[0]).model, xs, us)
    errors = {}
    for mode in modes:
        jit = None if mode == "eager" else config.jit_compile
        for several in (False, True):
            count = config.num_probes if several else 1
            received = products.call(model, competitors.linearize, xs, [u[:count] for u in us], jit)()
            errors[mode, several] = products.worst(received, [y, expected[:count]])
    return errors


def row(entry: Entry, mode: Mode, error: float | None, config: MemoryConfig) -> dict[str, Any]:
    """What the JSON file says of an entry; one with a wrong product gets no bytes."""
    right = error is None or error <= config.tolerance
    found = memory_process.measured(entry.name, mode, config) if right else None
    sizes = found if isinstance(found, dict) else {}
    return {
        "name": entry.name,
        "label": entry.label,
        "mode": study.mode(config) if mode == "compiled" else mode,
        "error": None if error is None else study.finite(error),
        "status": "wrong" if not right else "out of memory" if isinstance(found, MemoryError) else "ok",
        "message": str(found) if isinstance(found, MemoryError) else None,
        **{f"{name}_bytes": sizes.get(name) for name in ("baseline", "peak", "held", "counted")},
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
