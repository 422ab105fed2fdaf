"""Where a Jacobian can start in place of the inputs: at what a layer returned."""

import re
from typing import TypeVar

import keras

from jvpreg.common import checks
from jvpreg.common.eager import leaves_of
from jvpreg.engine.frozen_graph import FrozenGraph
from jvpreg.engine.frozen_model import FrozenModel
from jvpreg.engine.node import Value
from jvpreg.engine.paths import MOST_LISTED, unknown, walk
from jvpreg.rules.examples import GONE
from jvpreg.rules.registry import unwrap

_RUN = re.compile(r":\d+$")
LAYER = "the path of a layer, as `jvpreg.layer_paths` has it"

Frozen = TypeVar("Frozen", bound=FrozenModel)


def started_at(model: Frozen, at: str, owner: str = "") -> Frozen:
    """The Jacobian of the outputs with respect to what a layer returned, at the same `x`. Nothing is run again.

    It differs from `FrozenModel.after` in what it refuses: whatever would be a zero Jacobian or leave open what is
    meant.

    Args:
        model: a frozen model, of a whole batch.
        at: the layer's path. If it runs several times, with the number of the run, from 0: `shared:1` is the second.
        owner: whose argument it is, for the error, if its name alone does not tell.

    Returns:
        The frozen model from the layer's output on. Paths that bypass the layer are held constant; masks stay.

    Raises:
        ValueError: there is no such layer, or it is open which of its runs is meant; or what it returned is not one
            tensor of real numbers with the examples first, on which the outputs depend.
    """
    graph = model._graph
    value = _returned(graph, at, owner)
    _check_examples(graph, value, at, owner)
    part = model._after(value)
    if part.is_constant:
        raise _refused(at, owner, "on whose output the model's outputs depend", "on whose output they do not depend")
    return part


def check_path(model: keras.Layer, at: str, owner: str = "", others: str = "") -> None:
    """Raises a ValueError, before the model runs, unless it has a layer `at`. `others`: what else `at` could be."""
    checks.text("at", at, owner=owner)
    paths = [(name, path) for name, path, _ in walk(unwrap(model))]
    if not any(at in known or _RUN.sub("", at) in known for known in paths):
        raise unknown("at", at, [name for name, _ in paths], others + LAYER, owner)


def possible_starts(model: FrozenModel) -> list[str]:
    """The paths of the first layers at which a Jacobian can start: for token ids, the embeddings."""
    runs = model._graph.returned.runs
    fitting: dict[int, str] = {}
    numbered = [f"{path}:{i}" if len(runs[path]) > 1 else path for path in runs for i in range(len(runs[path]))]
    for path in numbered:
        if _fits(model, path):
            fitting.setdefault(_returned(model._graph, path, "").slot, path)
    # The slots of what a first layer returned, and of all that follows from it.
    behind: set[int] = set()
    found = []
    for node in model.nodes:
        follows = any(value.slot in behind for value in node.inputs)
        for value in node.outputs:
            if follows or value.slot in fitting:
                behind.add(value.slot)
            if not follows and value.slot in fitting:
                found.append(fitting[value.slot])
    return found


def _fits(model: FrozenModel, path: str) -> bool:
    try:
        started_at(model, path)
    except ValueError:
        return False
    return True


def _returned(graph: FrozenGraph, at: str, owner: str) -> Value:
    """The value that the layer of a path returned."""
    runs, number = graph.returned.runs_of(at), _RUN.search(at)
    if not runs and number:
        runs = list(graph.returned.runs_of(_RUN.sub("", at)))[int(number[0][1:]) :][:1]
    if not runs:
        raise _refused(at, owner, "that runs", f"which does not. These do: {list(graph.returned.runs)[:MOST_LISTED]}")
    if len(runs) > 1:
        known = " or ".join(f'`at="{at}:{i}"`' for i in range(min(len(runs), 2)))
        raise _refused(at, owner, "that runs once", f"which runs {len(runs)} times. Give the number of a run: {known}")
    found = [leaf for leaf in leaves_of(runs[0]) if isinstance(leaf, Value)]
    if len(found) != 1:
        raise _refused(at, owner, "with one output", f"which has {len(found)}. Name a layer within it or after it")
    return found[0]


def _check_examples(graph: FrozenGraph, value: Value, at: str, owner: str) -> None:
    """Raises unless a value has real numbers for each example, along its first axis."""
    shape = tuple(value.primal.shape)
    if not value.batched:
        raise _refused(at, owner, "whose output depends on the inputs", "whose output does not")
    if not value.has_tangents:
        raise _refused(at, owner, "that returns real numbers", f"which returns {value.primal.dtype}")
    place = graph.locations.get(value.slot)
    moved = place is not None and (place == GONE or place.axis > 0 or place.before * place.after != 1)
    sizes = (shape[:1], tuple(graph.inputs[0].primal.shape[:1]))
    if moved or not shape or (None not in (sizes[0][0], *sizes[1]) and sizes[0] != sizes[1]):
        received = "whose output has them on another axis, merged with others, or not at all"
        raise _refused(at, owner, "whose output has the examples on its first axis", received)


def _refused(at: str, owner: str, expected: str, received: str) -> ValueError:
    of, what = f" of {owner}" if owner else "", f"the path of a layer {expected}"
    return ValueError(f"Invalid value for argument `at`{of}. Expected {what}. Received: at={at!r}, {received}.")
