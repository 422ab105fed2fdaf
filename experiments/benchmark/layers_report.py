"""The benchmark of layers as a table, on the terminal and in Markdown, and as a figure."""

from typing import Any

from matplotlib.figure import Figure

from experiments.benchmark import study
from experiments.study import Rows

LABELS = {"jvpreg": "jvpreg", "forward_mode": "forward mode", "double_vjp": "double VJP"}
COLORS = {"jvpreg": "C0", "forward_mode": "C1", "double_vjp": "C3"}


def columns(row: dict[str, Any]) -> dict[str, str]:
    """One layer's figures, by the heading of their column."""
    plain, own, best = row["products"]["plain"], row["products"]["jvpreg"], row["best_alternative"]
    cells = {"layer": row["name"], "error": study.one_digit(own["error"])}
    cells["× layer"] = _ratio(own)
    for name in ("forward_mode", "double_vjp"):
        part = row["products"][name]
        cells[LABELS[name]] = _status(part) if part["ratio"] is None else f"{part['ratio']:.2f}"
    cells["best ÷ jvpreg"] = study.with_quartiles(best["over_jvpreg"], best["over_jvpreg_quartiles"]) if best else ""
    cells["layer ms"] = _milliseconds(plain)
    cells["jvpreg ms"] = _milliseconds(own)
    cells["first s"] = f"{own['first_call_seconds']:.1f}" if own["seconds"] is not None else ""
    return cells


def caption(summary: dict[str, Any]) -> str:
    """What the figures mean and where they are from."""
    settings = summary["settings"]
    size = settings["image_size"]
    return (
        f"Models of one layer, batches of {settings['batch_size']}: images of {size}x{size}x{settings['channels']}, or "
        f"sequences of {settings['sequence_length']} steps of {settings['units']} (Dense, LayerNormalization, Softmax, "
        "recurrent layers and attention); inference mode, but for dropout. One compiled call computes `f(x)` and the "
        f"product with {settings['num_probes']} direction(s), by jvpreg (× layer) or by autodiff; the unit is a call "
        f"of the plain layer in the same round, median and quartiles of {settings['rounds']} rounds. Forward mode: "
        f"{_forward_mode(summary)}. Double VJP: reverse mode twice, its primal pass run once. Best ÷ jvpreg: the "
        "faster of those two that is right, in units of jvpreg in the same round; below 1, the backend's own is the "
        "faster. Errors are relative, of `f(x)` and of the compiled product in float32 against autodiff in float64 "
        f"that is not jitted; above {settings['tolerance']:g} a product is wrong and is not timed. First s: seconds "
        f"of jvpreg's first call, compilation included. {study.ran_on(summary)}"
    )


def page(summary: dict[str, Any]) -> list[Rows | str]:
    """The table, what it means, and why figures are missing."""
    rows = summary["layers"]
    failures = [f"{row['name']}, {text}" for row in rows for text in failures_of(row)]
    return [[columns(row) for row in rows], caption(summary), *failures]


def failures_of(row: dict[str, Any]) -> list[str]:
    """Why products of a layer have no time, where a message says so."""
    found = row["products"].items()
    return [f"{LABELS.get(name, name)}: {part['message']}" for name, part in found if part["message"]]


def figure(summary: dict[str, Any]) -> Figure:
    """The ratios as horizontal bars from 1, the plain layer, with their quartiles."""
    rows, height = summary["layers"], 0.8 / len(LABELS)
    drawing = Figure(figsize=(8.0, 0.42 * len(rows) + 1.5), layout="constrained")
    axes = drawing.subplots()
    axes.set_xscale("log")
    for offset, (name, label) in enumerate(LABELS.items()):
        places = [place + (offset - 1) * height for place in range(len(rows))]
        parts = [row["products"][name] for row in rows]
        timed = [(place, part) for place, part in zip(places, parts, strict=True) if part["ratio"] is not None]
        ratios = [part["ratio"] for _, part in timed]
        axes.barh(
            [place for place, _ in timed],
            [ratio - 1 for ratio in ratios],
            left=1.0,
            xerr=study.spread([part for _, part in timed]),
            height=height,
            color=COLORS[name],
            ecolor="0.2",
            label=label,
        )
        for place, part in zip(places, parts, strict=True):
            if part["ratio"] is None:
                axes.text(1.02, place, f"{label}: {_status(part)}", va="center", color=COLORS[name], fontsize=7)
    axes.axvline(1.0, color="0.4", linewidth=1)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    unit = "time of f(x) and J u, times the plain layer (median and quartiles)"
    study.name_bars(axes, [row["name"] for row in rows], unit, summary)
    drawing.legend(loc="outside lower center", ncols=len(LABELS), fontsize=9)
    return drawing


def _ratio(part: dict[str, Any]) -> str:
    return _status(part) if part["ratio"] is None else study.ratio(part)


def _status(part: dict[str, Any]) -> str:
    if part["status"] == "wrong":
        return f"wrong ({study.one_digit(part['error'])})"
    return part["status"] if part["status"] != "ok" else ""


def _milliseconds(part: dict[str, Any]) -> str:
    return f"{1000 * part['seconds']:.2f}" if part["seconds"] is not None else ""


def _forward_mode(summary: dict[str, Any]) -> str:
    backend = summary["machine"]["backend"].split()[0]
    return {
        "tensorflow": "`tf.autodiff.ForwardAccumulator`, a pass for each direction",
        "jax": "`jax.jvp`, under `jax.vmap` where there are several directions",
        "torch": "`torch.func.jvp`, under `torch.func.vmap` where there are several directions; both alternatives with "
        "the attention kernel that they can differentiate",
    }[backend]
