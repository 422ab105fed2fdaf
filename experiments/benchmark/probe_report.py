"""The benchmark of the Jacobian's health as a table, on the terminal and in Markdown, and as a figure."""

from typing import Any

from matplotlib.figure import Figure

from experiments.benchmark import study

COLORS = {"classifier": "C0", "unet": "C2"}
BACKGROUND = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}


def columns(row: dict[str, Any]) -> dict[str, str]:
    """One entry's figures, by the heading of their column."""
    products = row["num_products"]
    return {
        "step": row["label"],
        "J v": str(products) if products else "",
        "error": study.one_digit(row["error"]),
        "may be": study.one_digit(row["allowed_error"]),
        "× forward pass": study.ratio(row),
        **study.times(row),
        "traces": "" if row["traces"] is None else f"{row['traces']}+{row['traces_again']}",
    }


def caption(summary: dict[str, Any]) -> str:
    """What the figures mean and where they are from."""
    settings = summary["settings"]
    size = settings["unet_image_size"]
    return (
        f"{study.subject(settings)}; UNet of `verify`, batches of {settings['unet_batch_size']} images of "
        f"{size}x{size}x3, an output for each pixel and class. Inference mode. One compiled call linearizes, computes "
        "`f(x)` and what the row names; a full probe is `frobenius_norm(num_probes=16)` and "
        "`spectral_norm(tolerance=1e-3)`, each of which has a row too, and so has `JacobianProbe` as `fit` calls it "
        "(which TensorFlow runs without XLA); `top_singular_values` has k=5. J v: products with `J` or `Jᵀ` an "
        "example. Where a model has few outputs the estimators materialize its Jacobian: one product with `Jᵀ` for "
        "each. n × jvp (vjp): n products, each of "
        f"which waits for the one before. {costs(summary)} Ratios to the forward pass of the same model, batch and "
        f"round, median and quartiles of {settings['rounds']} rounds. Errors are relative, of the compiled values in "
        "float32 for a few examples (the UNet's of 8x8x3) against the whole Jacobian and its SVD in float64, without "
        f"jit; they may be {settings['tolerance']:g}, and what the estimate itself says, 5 standard errors or the "
        "residual. What is off by more is wrong and is not timed. First s: seconds of the first call, compilation "
        "included. Traces: by the first call + by all later ones; what is traced again is not timed. "
        f"{study.ran_on(summary)}"
    )


def costs(summary: dict[str, Any]) -> str:
    """What a full probe and a further product cost, beside what was aimed at."""
    names = {"probe": "a full probe", "further_jvp": "a further `J u`", "further_vjp": "a further `Jᵀ v`"}
    parts = [
        f"{names[aim['name']]} {aim['measured']:.2f} (at most {aim['aim']:g}: {'met' if aim['met'] else 'missed'})"
        for aim in summary["aims"]
        if aim["measured"] is not None
    ]
    return f"In forward passes: {', '.join(parts)}." if parts else ""


def figure(summary: dict[str, Any]) -> Figure:
    """The ratios as bars with their quartiles."""
    rows = [row for row in summary["entries"] if not row["name"].endswith("forward")]
    drawing = Figure(figsize=(8.0, 0.36 * len(rows) + 1.3), layout="constrained")
    axes = drawing.subplots()
    for place, row in enumerate(rows):
        if row["ratio"] is None:
            axes.text(1.1, place, row["status"], va="center", color="C3")
            continue
        upper, color = row["ratio_quartiles"][1], COLORS[row["network"]]
        axes.barh(place, row["ratio"], xerr=study.spread([row]), height=0.62, color=color, ecolor="0.2", capsize=3)
        products = f"  ({row['num_products']} products)" if (row["num_products"] or 0) > 1 else ""
        axes.text(1.05 * upper, place, f"{row['ratio']:.3g}{products}", va="center", fontsize=9, bbox=BACKGROUND)
    axes.axvline(1.0, color="0.4", linewidth=1, linestyle=":")
    axes.axvline(60.0, color="C3", linewidth=1, linestyle="--")
    axes.text(60.0, -0.75, "aim of a full probe", color="C3", fontsize=8, ha="center", va="bottom")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    largest = max((row["ratio_quartiles"][1] for row in rows if row["ratio"] is not None), default=1.0)
    axes.set_xlim(0.5, 4 * max(largest, 60.0))
    unit = "forward passes of the same batch (median and quartiles, logarithmic)"
    study.name_bars(axes, [row["label"] for row in rows], unit, summary, pad=14)
    return drawing
