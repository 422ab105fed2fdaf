"""The study of a zoo as a table, on the terminal and in Markdown."""

from collections.abc import Callable
from typing import Any

from experiments.study import Rows
from experiments.verify.measure import FLOAT64
from experiments.verify.report import HEADINGS
from experiments.verify.zoos.measure import USES
from experiments.verify.zoos.times import EXAMPLES

TITLES = {
    "keras_hub": "Backbones of keras-hub against autodiff",
    "tutorials": "What tutorials build, against autodiff",
}

# Rows that are wrong, and why, by the backend.
KNOWN = {
    ("torch", "MobileNet"): (
        "MobileNet: Torch's `hardsigmoid` has its slope of 1/6 in float32, in float64 too; jvpreg has the exact "
        "constant."
    ),
}

# Why rows are wrong that have no reason of their own.
OF_BACKEND = {
    "jax": "Models with attention: JAX computes its softmax in float32, in float64 too, and autodiff the slopes; "
    "jvpreg's are exact."
}

COLUMNS = {**{name: HEADINGS[name] for name in FLOAT64}, "fit": "fit", "save": "save"}
TIMES = {
    "trace_seconds": "first call, s",
    "forward_passes": "× forward",
    "speed_up": "best other / jvpreg",
}


def columns(row: dict[str, Any], config: dict[str, Any]) -> dict[str, str]:
    """One model's figures, by the heading of their column."""
    timed = {TIMES[name]: f"{row[name]:.2g}" if row.get(name) else "–" for name in TIMES} if config["times"] else {}
    return {
        "model": row["name"],
        "at": row["at"] or "input",
        "parameters": str(row.get("parameters", "")),
        "nodes": str(row.get("nodes", "")),
        "left": str(len(row["left"])) if "left" in row else "",
        "‖Ju‖/‖u‖": f"{row['jacobian']:.1e}" if "jacobian" in row else "",
        **{heading: _figure(row, name) for name, heading in COLUMNS.items()},
        **timed,
        "s": f"{row['seconds']:.0f}" if "seconds" in row else "",
        "": row["status"],
    }


def _figure(row: dict[str, Any], name: str) -> str:
    if f"{name}_failure" in row:
        return "failed"
    found = row.get(name, "–")
    return f"{found:.0e}" if isinstance(found, float) else found


def status(row: dict[str, Any], config: dict[str, Any]) -> str:
    """Whether the errors are within the tolerance and all else went well, in a word: ok, wrong or incomplete."""
    if any(not row[name] <= config["tolerance"] for name in FLOAT64 if name in row):
        return "wrong"
    complete = all(name in row for name in (*FLOAT64, *USES))
    return "ok" if complete and "failure" not in row and not row["left"] else "incomplete"


def page(zoo: str) -> Callable[[dict[str, Any]], list[Rows | str]]:
    """From the summary to the command, the table, what it means and what failed."""

    def parts(summary: dict[str, Any]) -> list[Rows | str]:
        heading = f"# {TITLES[zoo]}: {summary['machine']['backend'].split()[0]}"
        table = [columns(row, summary["settings"]) for row in summary["rows"]]
        return [heading, f"    {summary['command']}", table, caption(summary), *notes(summary)]

    return parts


def caption(summary: dict[str, Any]) -> str:
    """What the figures mean and where they are from."""
    settings, machine = summary["settings"], summary["machine"]
    timed = (
        "first call: of one product by jvpreg, with tracing and compilation; × forward: what a later one takes, in "
        "forward passes; best other / jvpreg: how many times longer the fastest of the other ways takes that are "
        f"right, all for {EXAMPLES} examples and {'compiled' if settings['jit'] else 'not compiled by XLA'}. "
    )
    return (
        "Relative errors of jvpreg in float64 without jit, against forward autodiff (`J u`; `∂W`, the derivative "
        "along a random direction of the kernel in the middle of the model), reverse autodiff (`Jᵀ v`) and the model's "
        "own output (`f(x)`, as `J x` and the contributions of all intercepts). at: derivatives by the inputs that are "
        "no whole numbers, or, where all are, by what the "
        "layer of this path returns. left: nodes that have no rule and are left to autodiff. fit: two steps with a "
        "JacobianNorm in float32, after which weights have moved and all is finite. save: the trained model from its "
        f".keras file computes the same. {timed if settings['times'] else ''}ok: errors of at most "
        f"{settings['tolerance']:g}, nothing left to autodiff, nothing failed. Batches of {settings['batch_size']}, "
        "inference mode; random weights as in the tables of whole architectures. What a model, or Keras "
        "itself, casts to float32 whatever it is given is of float64 here, for autodiff and for jvpreg. "
        f"{machine['backend']}, Keras {machine['keras']}, {machine['cores']} cores of an {machine['processor']}; s: "
        "seconds of the whole row, compilations included."
    )


def notes(summary: dict[str, Any]) -> list[str]:
    """Why rows or figures are missing, a paragraph each."""
    said = []
    backend = summary["machine"]["backend"].split()[0]
    wrong = [row["name"] for row in summary["rows"] if row["status"] == "wrong"]
    if backend in OF_BACKEND and any((backend, name) not in KNOWN for name in wrong):
        said.append(OF_BACKEND[backend])
    for row in summary["rows"]:
        if row["status"] == "wrong" and (backend, row["name"]) in KNOWN:
            said.append(KNOWN[backend, row["name"]])
        if "failure" in row:
            said.append(f"{row['name']}: {row['failure'].rstrip('.')}.")
        for name, heading in COLUMNS.items():
            if f"{name}_failure" in row:
                said.append(f"{row['name']}, {heading}: {row[f'{name}_failure'].rstrip('.')}.")
        left = [f"`{node}` ({reason})" for node, reason in row.get("left", {}).items()]
        if left:
            said.append(f"{row['name']}, left to autodiff: {'; '.join(left)}.")
    return said
