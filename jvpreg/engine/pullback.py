"""The transpose of the tangent pass of a frozen model, the way that is fastest on the backend."""

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops, tree

from jvpreg.common.dtypes import as_floats
from jvpreg.common.eager import cast
from jvpreg.engine.tangents import zeros
from jvpreg.engine.transpose import transpose


def pull_back(model: Any, cotangents: Sequence, names: Sequence[str] = (), with_inputs: bool = True) -> tuple:
    """The cotangents of a frozen model's inputs and of nodes' outputs.

    On Torch they go from node to node: an operation that runs is paid for, and most nodes state their transpose, which
    spares a pass of zeros to record them. Elsewhere that pass is transposed as a whole: a compiler leaves out of it
    what the transpose does not need.

    Args:
        model: a `FrozenModel`.
        cotangents: one for each output, `(P, B, …)`; None for zero.
        names: of nodes' outputs.
        with_inputs: whether those of the inputs are wanted; otherwise layers before the nodes cost nothing.

    Returns:
        A list like the inputs, empty without them, and a list like the names, each tensor with the probes first.
    """
    count = next(ops.shape(c)[0] for c in cotangents if c is not None)
    inputs = model.inputs if with_inputs else []
    values = [model._value_of(name) for name in names]
    if keras.backend.backend() == "torch":
        slots = [value.slot for value in values]
        found, at = model._graph.pull(cotangents, batch=model._part_size, at=slots, with_inputs=with_inputs)
        pairs = zip(found, inputs, strict=False)
        pulled = [zeros(count, x) if t is None else cast(t, x.dtype) for t, x in pairs]
        given = zip(names, values, strict=True)
        return pulled, [_tap(model, count, name, v) if v.slot not in at else at[v.slot] for name, v in given]
    moved = [zeros(count, x) for x in inputs]
    taps = [_tap(model, count, name, value) for name, value in zip(names, values, strict=True)]

    def push(tangents: list) -> list:
        entering = tangents[: len(moved)] if with_inputs else [None] * len(model.inputs)
        return model._push(entering, dict(zip(names, tangents[len(moved) :], strict=True)), scaled_kernels=False)

    pairs = zip(cotangents, as_floats(tree.flatten(model.outputs)), strict=True)
    filled = [zeros(count, y) if c is None else cast(c, y.dtype) for c, y in pairs]
    pulled = transpose(push, [*moved, *taps], filled)
    return pulled[: len(moved)], pulled[len(moved) :]


def _tap(model, count, name: str, value):
    return ops.zeros((count, *model.shape_at(name)), value.primal.dtype)
