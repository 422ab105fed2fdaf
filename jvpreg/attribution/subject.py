"""What attributions are of: one output of a model, as a function of its inputs or of what a layer returned."""

from collections.abc import Callable, Sequence
from typing import Literal

import keras
from keras import ops, tree

from jvpreg.attribution.decomposition import as_cotangent, target_output
from jvpreg.common import checks
from jvpreg.common.dtypes import widest_dtype
from jvpreg.common.typing import Structure, Tensor
from jvpreg.engine.finite import finite_examples, nan_unless
from jvpreg.products import linearize, linearize_elsewhere

Reduction = Literal["sum", "abs", "norm"]
REDUCTIONS = ("sum", "abs", "norm", None)


class Subject:
    """The output that a target chooses, `vᵀ f`, as a function of a flat list of points.

    Args:
        model: a Keras model.
        x: its input, `(B, …)`, or a structure of inputs.
        target: which output: see `jvpreg.full_jacobian`; by default the largest one at `x`.
        at: the path of a layer whose output is the point, in place of the inputs.
        total: the number of examples of the whole batch, if `x` is a part of it.
        start: the index of the first example in the whole batch.

    Attributes:
        linearization: the model frozen at `x`.
        points: where it is frozen, a flat list of `(B, …)`.
        cotangent: v, like the outputs.
    """

    def __init__(
        self,
        model: keras.Layer,
        x: Structure,
        target: Structure | None,
        at: str | None = None,
        total: int | None = None,
        start: int = 0,
    ):
        self.linearization = linearize(model, x, at=at)
        self.points = self.linearization.inputs
        self.cotangent = as_cotangent(self.linearization.outputs, target)
        self.total, self.start = total, start
        self._model, self._x, self._at = model, x, at

    def gradient(self, points: Sequence | None = None) -> list:
        """The gradient of `vᵀ f` at other points, by default at `x`: a flat list like them."""
        at_points = self.linearization
        if points is not None:
            at_points = linearize_elsewhere(self._model, self._x, points, self._at)
        return at_points.flatten_inputs(at_points.vjp(self.cotangent))

    def value(self, points: Sequence | None = None) -> Tensor:
        """`vᵀ f` at other points, by default at `x`: `(B,)`."""
        outputs = self.linearization.outputs
        if points is not None:
            outputs = linearize_elsewhere(self._model, self._x, points, self._at).outputs
        return target_output(self.cotangent, outputs, widest_dtype(tree.flatten(outputs)))

    def known(self, tensor: Tensor) -> Tensor:
        """A tensor `(B, …)`, with NaN for examples with a point or an output that is not finite."""
        return nan_unless(finite_examples(self.linearization), tensor)

    def packed(self, attributions: Sequence, reduce: Reduction | None = None) -> Structure:
        """Attributions like the points in the structure of `x`, reduced over channels unless `reduce` is None."""
        return self.linearization.pack_inputs([self.known(reduced(part, reduce)) for part in attributions])


def reduced(attribution: Tensor, reduce: Reduction | None) -> Tensor:
    """Attributions `(B, …, C)` reduced over the channels, to `(B, …)`; those of a vector `(B, D)` have none."""
    if reduce is None:
        return attribution
    if len(attribution.shape) < 3:
        return attribution if reduce == "sum" else ops.abs(attribution)
    if reduce == "norm":
        return ops.norm(attribution, axis=-1)
    return ops.sum(attribution if reduce == "sum" else ops.abs(attribution), axis=-1)


def check_channels(reduce: Reduction | None) -> None:
    """Raises unless it is a reduction, and channels are on the last axis."""
    checks.choice("reduce", reduce, REDUCTIONS)
    if reduce is not None and keras.config.image_data_format() != "channels_last":
        raise ValueError(
            "Invalid value for argument `reduce`. Expected None, for attributions like the input, since "
            f"`keras.config.image_data_format()` is channels_first. Received: reduce={reduce!r}"
        )


def in_batches(
    method: Callable[[Subject], Structure],
    model: keras.Layer,
    x: Structure,
    target: Structure | None,
    at: str | None = None,
    batch_size: int | None = None,
) -> Structure:
    """What a method returns for all examples, at most `batch_size` of them at a time.

    Args:
        method: a function of a `Subject` that returns a structure of tensors `(B, …)`.
        model: a Keras model.
        x: its input.
        target: which output.
        at: the path of a layer.
        batch_size: by default all examples are computed at once.

    Raises:
        ValueError: an argument does not fit.
    """
    checks.count("batch_size", batch_size, optional=True)
    if batch_size is None:
        return method(Subject(model, x, target, at))
    x = tree.map_structure(lambda leaf: checks.tensor("x", leaf), x)
    sizes = {leaf.shape[0] if len(leaf.shape) else None for leaf in tree.flatten(x)}
    if len(sizes) != 1 or None in sizes:
        raise checks.invalid("x", "as many examples in each input, in a number that is known, with `batch_size`", x)
    total = sizes.pop()
    if not total:  # An empty batch gives what it gives without batches.
        return method(Subject(model, x, target, at))
    # A class for all is no structure of arrays; what does not fit is told by the target's own check.
    each = [leaf for leaf in tree.flatten(target) if hasattr(leaf, "shape") and len(leaf.shape)]
    if any(leaf.shape[0] != total for leaf in each):
        raise checks.invalid("target", f"one for each of the {total} examples", target)
    parts = []
    for start in range(0, total, batch_size):
        stop = min(start + batch_size, total)

        def cut(leaf: Tensor, start: int = start, stop: int = stop) -> Tensor:
            return leaf[start:stop] if hasattr(leaf, "shape") and len(leaf.shape) else leaf

        own = None if target is None else tree.map_structure(cut, target)
        parts.append(method(Subject(model, tree.map_structure(cut, x), own, at, total, start)))
    return tree.map_structure(lambda *found: ops.concatenate(found), *parts)
