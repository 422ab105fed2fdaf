"""Tangents that go through a model along with `x`, node by node, while it is frozen."""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import keras
from keras import ops

from jvpreg.eager import cast
from jvpreg.folding import fold, unfold
from jvpreg.frozen import FrozenGraph, Node, Value, push_node
from jvpreg.rules.contract import Context
from jvpreg.tangents import zeros

MANY_WEIGHTS = 2**13
"""From how many on x and its tangents may share a layer's call: fewer are read faster than what shares it is copied."""


class Companions:
    """The tangents of one product, which go through a model node by node, as soon as each is frozen.

    Args:
        tangents: `(P, B, …)`, one for each input of the model; None for zero.
        weights: pairs of a variable and its tangent `(P, …)`.

    Attributes:
        num_probes: P.
        weights: their tangents, by their `id`.
        go_along: whether they do. Several do not where operations run eagerly, and would hold to the end what a
            compiler lets go: `products` pushes them through the graph once it is frozen.
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
        pairs = [(self.of(value), value.primal.dtype) for value in inputs]
        tangents = [None if tangent is None else cast(tangent, dtype) for tangent, dtype in pairs]
        apply = context.apply
        if len(inputs) == 1 and tangents[0] is not None:
            apply = functools.partial(apply_at_once, inputs[0].primal, tangents[0])

        def along(*primals):
            # Several inputs may be one tensor, with a tangent each: they are asked for in their order.
            left = [(value.primal, tangent) for value, tangent in zip(inputs, tangents, strict=True)]
            found = []
            for x in primals:
                place = next((i for i, (primal, _) in enumerate(left) if primal is x), None)
                if place is None:
                    return None
                found.append(left.pop(place)[1])
            return found

        return replace(context, apply=apply, along=along, weights=self.weights)

    def push(self, node: Node) -> None:
        """Pushes the tangents of a node's inputs through it."""
        images = push_node(node, [self.of(value) for value in node.inputs], self.weights, (self.num_probes, None, None))
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


def apply_at_once(known, tangent, function: Callable, x, num_weights: int) -> tuple:
    """`function` of x and its tangent, as `Context.apply`: in one call where weights, which it reads once, dominate.

    Args:
        known: the input, `(B, …)`.
        tangent: its tangent, `(P, B, …)`.
        function: what is linear.
        x: what it is to be applied to; tangents go along if it is the input itself.
        num_weights: how many numbers the function reads beside.
    """
    # Unknown sizes stay separate: whether they are few cannot be known.
    if x is not known or not all(isinstance(size, int) for size in (*x.shape, *tangent.shape)):
        return function(x), None
    batch, num_probes = x.shape[0], tangent.shape[0]
    if num_weights < max(MANY_WEIGHTS, math.prod(x.shape) * (1 + num_probes)):
        return function(x), None
    y, image = ops.split(function(ops.concatenate([x, fold(tangent)])), [batch])
    return y, unfold(image, num_probes)


def runs_eagerly(tensor) -> bool:
    """Whether operations on a tensor run as they are called, so that Python holds what they return."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.executing_eagerly()
    if keras.backend.backend() == "jax":
        import jax

        return not isinstance(tensor, jax.core.Tracer)
    return True
