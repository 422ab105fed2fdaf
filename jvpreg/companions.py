"""Tangents that go through a model along with `x`, node by node, while it is frozen."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from keras import ops

from jvpreg.frozen import Node, Value, push_node
from jvpreg.registry import Context, fold, unfold

FEW = 2
"""Times fewer numbers than weights must there be in `x` and its tangents, for both to go in one call."""

MANY = 2**18
"""Weights that no cache next to a core holds. Fewer are read fast enough twice, and two calls may run side by side."""


class Companions:
    """The tangents of one product, which are pushed as soon as a node is frozen.

    Args:
        tangents: `(P, B, …)`, one for each input of the model; None for zero.
        weights: pairs of a variable and its tangent `(P, …)`.

    Attributes:
        num_probes: P.
        weights: their tangents, by their `id`.
        variables: those that have tangents.
    """

    def __init__(self, tangents: Sequence, weights: Sequence[tuple[Any, Any]] = ()):
        self._tangents = list(tangents)
        self.weights = {id(variable): tangent for variable, tangent in weights}
        self._by_slot: dict[int, Any] = {}
        self.num_probes = next(ops.shape(t)[0] for t in [*tangents, *self.weights.values()] if t is not None)
        self.variables = [variable for variable, _ in weights]

    def enter(self, inputs: Sequence[Value]) -> None:
        """States which values the model's inputs are."""
        self._by_slot.update({value.slot: t for value, t in zip(inputs, self._tangents, strict=True)})

    def enter_weight(self, variable, value: Value) -> None:
        """States which value stands for a variable."""
        self._by_slot[value.slot] = self.weights.get(id(variable))

    def of(self, value: Value):
        """The tangent of a value; None where it is zero."""
        return self._by_slot.get(value.slot)

    def context(self, context: Context, operation, inputs: Sequence[Value]) -> Context:
        """The context with what goes along with an operation's inputs."""
        packing = Packing(inputs[0], self.of(inputs[0])) if len(inputs) == 1 else Packing()
        tangents = [self.of(value) for value in inputs]
        weights = {id(v): self.weights[id(v)] for v in getattr(operation, "variables", ()) if id(v) in self.weights}
        moved = bool(weights) or any(tangent is not None for tangent in tangents)
        return replace(context, apply=packing, tangents=tangents if moved else None, weights=weights)

    def push(self, node: Node, context: Context) -> None:
        """Pushes the tangents of a node's inputs through it, unless they went along in the `context` of its rule."""
        image = getattr(context.apply, "image", None)
        tangents = [self.of(value) for value in node.inputs]
        images = push_node(node, tangents, self.weights, (self.num_probes, None), image=image)
        for value, tangent in zip(node.outputs, images or [None] * len(node.outputs), strict=True):
            self._by_slot[value.slot] = tangent


class Packing:
    """Runs what is linear on a value and its tangent at once, where the batch is so small that the weights dominate.

    Args:
        value: an operation's input.
        tangent: `(P, B, …)`; None for zero.

    Attributes:
        image: what the tangent became, `(P, B, …)`; None unless it was run along.
    """

    def __init__(self, value: Value | None = None, tangent: Any = None):
        self._value = value
        self._tangent = tangent
        self.image: Any = None

    def __call__(self, function, x, num_weights: int):
        """`function(x)`; see `Context.apply`."""
        if self._value is None or self._tangent is None or x is not self._value.primal:
            return function(x)
        shapes = (*x.shape, *self._tangent.shape)
        # Unknown sizes stay separate: whether they are few cannot be known.
        if not all(isinstance(size, int) for size in shapes):
            return function(x)
        batch, num_probes = x.shape[0], self._tangent.shape[0]
        if num_weights < MANY or FEW * math.prod(x.shape) * (1 + num_probes) > num_weights:
            return function(x)
        both = function(ops.concatenate([x, fold(ops.cast(self._tangent, x.dtype))]))
        y, image = ops.split(both, [batch])
        self.image = unfold(image, num_probes)
        return y
