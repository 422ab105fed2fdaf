"""The study as a table, on the terminal and in Markdown."""

import math
from typing import Any

from experiments.study import Rows
from experiments.verify.architectures import ARCHITECTURES
from experiments.verify.measure import FIGURES, FLOAT64, JIT, MIXED

HEADINGS = {
    "jvp": "J u",
    "vjp": "Jᵀ v",
    "weight_jvp": "∂W",
    "completeness": "f(x)",
    "float32_autodiff": "f32 autodiff",
    "float32_jvpreg": "f32 jvpreg",
    "jit_autodiff": "f32 jit autodiff",
    "jit_jvpreg": "f32 jit jvpreg",
    "float16_autodiff": "f16 autodiff",
    "float16_jvpreg": "f16 jvpreg",
    "bfloat16_autodiff": "bf16 autodiff",
    "bfloat16_jvpreg": "bf16 jvpreg",
}

# Rows that are wrong, and why, by the backend.
KNOWN = {
    ("tensorflow", "ConvNeXtTiny"): (
        "ConvNeXtTiny: TensorFlow's `gelu` holds 1/√2 in float32, in float64 too, and so does its derivative by "
        "autodiff; jvpreg's slope has the exact constant."
    ),
}


def columns(row: dict[str, Any], config: dict[str, Any]) -> dict[str, str]:
    """One architecture's figures, by the heading of their column."""
    return {
        "model": row["name"],
        "input": "×".join(map(str, row["input_shape"])),
        "nodes": str(row.get("nodes", "")),
        "‖Ju‖/‖u‖": f"{row['jacobian']:.1e}" if "jacobian" in row else "",
        **{HEADINGS[name]: _figure(row, name, config) for name in FIGURES},
        "s": f"{row['seconds']:.0f}" if "seconds" in row else "",
        "": row["status"],
    }


def _figure(row: dict[str, Any], name: str, config: dict[str, Any]) -> str:
    if name in row:
        return f"{row[name]:.0e}"
    if f"{name}_failure" in row:
        return "failed"
    return "not run" if name in JIT and not config["jit"] else "–"


def status(row: dict[str, Any], config: dict[str, Any]) -> str:
    """Whether jvpreg's errors are within the tolerances, in a word: ok, wrong or incomplete."""
    if _is_wrong(row, config):
        return "wrong"
    expected = [*FLOAT64, "float32_jvpreg", *(["jit_jvpreg"] if config["jit"] else []), *_due_in_mixed_precision(row)]
    return "ok" if "failure" not in row and all(name in row for name in expected) else "incomplete"


def _is_wrong(row: dict[str, Any], config: dict[str, Any]) -> bool:
    exact = [row[name] for name in FLOAT64 if name in row]
    if any(not error <= config["tolerance"] for error in exact):
        return True
    # Where float32 itself is worse than that, no product could be better.
    within = row.get("float32_autodiff", math.inf) <= config["float32_tolerance"]
    single = [row[name] for name in ("float32_jvpreg", "jit_jvpreg") if name in row]
    if within and any(not error <= config["float32_tolerance"] for error in single):
        return True
    return any(not math.isfinite(row.get(name, 0.0)) for name in _due_in_mixed_precision(row))


def _due_in_mixed_precision(row: dict[str, Any]) -> list[str]:
    """The 16-bit figures for which jvpreg owes a finite value, because autodiff has one; how large is not judged."""
    return [ours for autodiff, ours in MIXED.values() if math.isfinite(row.get(autodiff, math.inf))]


def page(summary: dict[str, Any]) -> list[Rows | str]:
    """The command, the table, what it means and what failed."""
    heading = f"# Whole architectures against autodiff: {_backend(summary)}"
    table = [columns(row, summary["settings"]) for row in summary["rows"]]
    return [heading, f"    {summary['command']}", table, caption(summary), *notes(summary)]


def caption(summary: dict[str, Any]) -> str:
    """What the figures mean and where they are from."""
    settings, machine = summary["settings"], summary["machine"]
    return (
        f"Relative errors of jvpreg in float64 without jit, against forward autodiff (`J u`; `∂W`, the derivative "
        "along a random direction of the kernel in the middle of the model), reverse autodiff (`Jᵀ v`) and the model's "
        "own output (`f(x)`, as `J x` and the contributions of all intercepts). Then the errors of `J u` in float32, "
        "by autodiff and by jvpreg, without jit and with it, against that of float64; and without jit under the dtype "
        "policies mixed_float16 (f16) and mixed_bfloat16 (bf16), with the same weights. A node that would be left to "
        "autodiff is an error. ok: at most "
        f"{settings['tolerance']:g} in float64, and in float32 {settings['float32_tolerance']:g} where autodiff "
        "without jit has it, which one mask, or one winner of a pooling window, that rounding moves is enough to "
        "spoil; the errors of 16 bits are not judged, but a value that is not finite where autodiff's is would be "
        f"wrong. The smallest images that the models take, batches of {settings['batch_size']}, 10 classes, inference "
        "mode, logits. Random weights: kernels normal with variance 2/fan-in, scales in 0.5 to 1.5, "
        "biases normal with 0.1, offsets of normalizations the same around 1, moving statistics those of 16 random "
        "inputs; with Keras' own weights, Jacobians vanish or explode. "
        f"{machine['backend']}, Keras {machine['keras']}, {machine['cores']} cores of an {machine['processor']}; s: "
        "seconds of the whole row, compilations included."
    )


def _backend(summary: dict[str, Any]) -> str:
    return summary["machine"]["backend"].split()[0]


def notes(summary: dict[str, Any]) -> list[str]:
    """Why rows or figures are missing, a paragraph each."""
    rows = {row["name"] for row in summary["rows"]}
    missing = [architecture.name for architecture in ARCHITECTURES if architecture.name not in rows]
    said = [f"Not run: {', '.join(missing)}."] if missing else []
    for row in summary["rows"]:
        known = KNOWN.get((_backend(summary), row["name"]))
        if known and row["status"] == "wrong":
            said.append(known)
        if "failure" in row:
            said.append(f"{row['name']}: {row['failure'].rstrip('.')}.")
        for name in FIGURES:
            if f"{name}_failure" in row:
                said.append(f"{row['name']}, {HEADINGS[name]}: {row[f'{name}_failure'].rstrip('.')}.")
    return said
