"""Tangents that go through a model along with `x`, node by node, while it is frozen."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from keras import ops

from jvpreg.common.eager import cast, runs_eagerly
from jvpreg.engine.frozen_graph import FrozenGraph
from jvpreg.engine.node import Node, Value, push_node
from jvpreg.engine.tangents import zeros
from jvpreg.rules.contract import Affine, Context
from jvpreg.rules.folding import fold, unfold

MANY_WEIGHTS = 2**13
"""Below this many weights, concatenating the inputs costs more than reading the weights twice."""


class Companions:
    """The tangents of one product, which go through a model node by node, as soon as each is frozen.

    Args:
        tangents: `(P, B, …)`, one for each input of the model; None for zero.
        weights: pairs of a variable and its tangent `(P, …)`.

    Attributes:
        num_probes: P.
        weights: their tangents, by their `id`.
        go_along: whether they do. Several do not if operations run eagerly, where every intermediate tangent would stay
            alive until the end: `products` pushes them through the graph once it is frozen.
    """

    def __init__(self, tangents: Sequence, weights: Iterable[tuple[Any, Any]] = ()):
        self._tangents = list(tangents)
        self.weights = {id(variable): tangent for variable, tangent in weights}
        self._by_slot: dict[int, Any] = {}
        first = next(tangent for tangent in [*tangents, *self.weights.values()] if tangent is not None)
        self.num_probes = ops.shape(first)[0]
        self.go_along = not runs_eagerly(first) or self.num_probes == 1

    def enter(self, inputs: Sequence[Value]) -> None:
        """States which values the model's inputs are."""
        pairs = zip(inputs, self._tangents, strict=True)
        self._by_slot.update({value.slot: tangent if value.has_tangents else None for value, tangent in pairs})

    def enter_weight(self, variable, value: Value) -> None:
        """States which value stands for a variable."""
        self._by_slot[value.slot] = self.weights.get(id(variable))

    def of(self, value: Value):
        """The tangent of a value; None where it is zero."""
        return self._by_slot.get(value.slot)

    def context(self, context: Context, inputs: Sequence[Value]) -> Context:
        """The context with what goes along with an operation's inputs."""
        tangents = [self._seen(value) for value in inputs]

        def along(*primals):
            # The same tensor may be several inputs, with a tangent for each: they are matched in their order.
            left = [(value.primal, tangent) for value, tangent in zip(inputs, tangents, strict=True)]
            found = []
            for x in primals:
                place = next((i for i, (primal, _) in enumerate(left) if primal is x), None)
                if place is None:
                    return None
                found.append(left.pop(place)[1])
            return found

        return replace(context, along=along, weights=self.weights)

    def run(self, affine: Affine, inputs: Sequence[Value]) -> tuple:
        """`A x` of an affine operation; and its tangent if that was computed in the same call, otherwise None."""
        x = affine.residuals[0]
        return run_at_once(affine, x, self._seen(inputs[0]) if inputs[0].primal is x else None)

    def _seen(self, value: Value):
        """The tangent of a value in the dtype in which the operation sees the value."""
        tangent = self.of(value)
        return None if tangent is None else cast(tangent, value.primal.dtype)

    def push(self, node: Node, image: Any = None) -> None:
        """Pushes the tangents of a node's inputs through it. `image`: its output's tangent, if it is known already."""
        tangents = [self.of(value) for value in node.inputs]
        images = push_node(node, tangents, self.weights, (self.num_probes, None, None), image=image)
        for value, tangent in zip(node.outputs, images or [None] * len(node.outputs), strict=True):
            self._by_slot[value.slot] = tangent

    def products(self, graph: FrozenGraph) -> list:
        """What the tangents are at the outputs of the graph, once it is frozen."""
        if self.go_along:
            products = [self.of(value) for value in graph.outputs]
        else:
            products = graph.push(self._tangents, weights=self.weights)
        pairs = zip(products, graph.outputs, strict=True)
        return [zeros(self.num_probes, y.primal) if product is None else product for product, y in pairs]


def run_at_once(affine: Affine, x, tangent) -> tuple:
    """`A x` at x `(B, …)`, and its tangent if it is cheaper to compute both in one call; otherwise None.

    It is if the weights, which one call reads once, outnumber x and its tangent `(P, B, …)` (None for zero).
    """
    # Unknown sizes stay separate: whether they are few cannot be known.
    if tangent is None or not all(isinstance(size, int) for size in (*x.shape, *tangent.shape)):
        return affine.linear_part(x), None
    batch, num_probes = x.shape[0], tangent.shape[0]
    if affine.num_weights < max(MANY_WEIGHTS, math.prod(x.shape) * (1 + num_probes)):
        return affine.linear_part(x), None
    y, image = ops.split(affine.linear_part(ops.concatenate([x, fold(tangent)])), [batch])
    return y, unfold(image, num_probes)
