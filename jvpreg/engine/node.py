"""One operation frozen at `x`, and the values between operations."""

import functools
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from keras import ops

from jvpreg.common.dtypes import has_tangents, is_complex
from jvpreg.common.eager import cast, shape_of
from jvpreg.engine.transpose import transpose
from jvpreg.rules.contract import Pushforward, broadcasts
from jvpreg.rules.control_flow import ControlFlow
from jvpreg.rules.examples import FIRST, GONE, MIXED, Place, broadcast, cuts, kept, of_class
from jvpreg.rules.families import plus
from jvpreg.rules.folding import align


@dataclass(frozen=True)
class Value:
    """A primal value on its way through the graph, and the slot that holds its tangent.

    Attributes:
        primal: `(B, …)`, or any shape if it is not batched.
        slot: of its tangent, `(P, *primal.shape)`.
        batched: whether it follows from an input of the graph; otherwise it is a weight, a constant, or made of them.
        mask: which of its steps count, `(B, T)`, as Keras carries it along with a tensor; it has no tangent.
    """

    primal: Any
    slot: int
    batched: bool = True
    mask: "Value | None" = None

    def with_mask(self, mask: "Value | None") -> "Value":
        """The same value under a mask."""
        return self if mask is self.mask else replace(self, mask=mask)

    @functools.cached_property
    def has_tangents(self) -> bool:
        """Whether it holds real or complex numbers: integers and booleans have no tangent."""
        return has_tangents(self.primal)


def moved_to(leaf, primal):
    """A value at another point, with the slot and the mask that it had; what is no value stays as it is."""
    return replace(leaf, primal=ops.cast(primal, leaf.primal.dtype)) if isinstance(leaf, Value) else leaf


@dataclass(frozen=True)
class Node:
    """One operation, frozen at `x`.

    Attributes:
        name: path of the layer within the model, as `layer_paths` has it; a layer's second use is `name:1`, its
            activation `name/activation`.
        operation: the layer, operation or function.
        inputs: its inputs, in the dtype in which it sees them.
        outputs: its outputs.
        pushforward: the frozen operation; None if no tangent passes through it (an argmax, a comparison).
        layer: the operation itself, or the layer within whose call it was found when that was opened up; None for a
            function or operation of the model's own graph.
        examples: as in the pushforward, for the case that this was dropped since the outputs have no tangents.
        path: the name, with attributes in place of the names that the user gave to layers of a subclassed model.
        kept: the indices of the examples for which the node is; None for all.
        of_element: whether it runs on one element of a map, in which no axis need be that of the examples.
        again: `again(primals) -> pushforward`, the operation frozen at other inputs, for its second derivative; None
            if none was asked for.
    """

    name: str
    operation: Any
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    pushforward: Pushforward | None
    layer: Any = None
    examples: Callable | None = None
    path: str = ""
    kept: Any = None
    of_element: bool = False
    again: Callable | None = None

    @property
    def output_names(self) -> list[str]:
        """The node's name for its output, or `name[i]` for each of several."""
        several = len(self.outputs) > 1
        return [f"{self.name}[{i}]" if several else self.name for i in range(len(self.outputs))]

    def examples_after(self, places: Sequence[Place | None]) -> Place:
        """Where the examples are in its outputs, by where they are in its inputs (None: nowhere)."""
        if self.pushforward is None:
            known = self.examples or of_class(self.operation, [value.primal.shape for value in self.inputs])
            return known(*places)
        after = self.pushforward.examples
        if callable(after):
            return after(*places)
        place = kept(*places)
        return MIXED if after == "coupled" or place.axis != 0 else place

    def take(self, indices, locations: Mapping[int, Place]) -> "Node":
        """The node for the examples at `indices` only. Its primal values stay whole: only their shapes matter.

        Args:
            indices: integers (N,).
            locations: of the graph: see `FrozenGraph.locations`.
        """
        if self.pushforward is None:
            return self

        def cut(residual, axis):
            kept_whole = axis is None or self.is_constant(residual) or self.is_whole(residual, locations)
            return residual if kept_whole else ops.take(residual, indices, axis=axis)

        known = indices if self.kept is None else ops.take(self.kept, indices)
        return replace(self, pushforward=self.pushforward.map_residuals(cut), kept=known)

    def is_constant(self, residual) -> bool:
        """Whether a residual is the same for all examples: a weight or constant, or made of these alone."""
        batched = any(value.batched for value in self.inputs)
        return not batched or any(residual is value.primal for value in self._constants)

    @functools.cached_property
    def _constants(self) -> list[Value]:
        """The inputs that are the same for all examples."""
        return [value for value in self.inputs if not value.batched and not self.has_rows(value)]

    def has_rows(self, value: Value) -> bool:
        """Whether an input that follows from none of the graph's has a row for each example all the same.

        A call may make one, as `ops.ones((ops.shape(x)[0], 3))`.
        """
        after, shape = self.pushforward and self.pushforward.examples, tuple(value.primal.shape)
        if value.batched or not callable(after) or shape[:1] != tuple(self.outputs[0].primal.shape[:1]):
            return False
        batched = [v for v in self.inputs if v.batched and len(v.primal.shape)]
        # A weight of another rank, as the scales of a normalization, is aligned with other axes.
        if self.of_element or shape[:1] in ((), (1,)) or len(shape) not in {len(v.primal.shape) for v in batched}:
            return False
        with_rows = {v.slot for v in (value, *batched)}
        return after(*(FIRST if v.slot in with_rows else None for v in self.inputs)) == FIRST

    def is_whole(self, residual, locations: Mapping[int, Place]) -> bool:
        """Whether a residual has no axis for the examples: it was reduced over it, or will be broadcast along it."""
        if self.is_entrywise:
            return not self._is_aligned(residual)
        return any(residual is value.primal for value in self.inputs if locations.get(value.slot) == GONE)

    def can_be_cut(self, locations: Mapping[int, Place], reached: Container[int]) -> bool:
        """Whether what is frozen can be cut by example along its first axis, or need not be cut.

        Args:
            locations: of the graph: see `FrozenGraph.locations`.
            reached: the slots of its values that a tangent can reach.
        """
        if self.pushforward is None or not any(value.batched for value in self.inputs):
            return True
        if self.pushforward.examples in ("coupled", "moved"):
            return False
        where = {v.slot: locations.get(v.slot, FIRST) for v in (*self.inputs, *self.outputs) if v.batched}
        if isinstance(
            self.operation, ControlFlow
        ):  # Of a number, its bodies know that it is the same for all examples.
            where = {v.slot: where[v.slot] for v in (*self.inputs, *self.outputs) if v.batched and len(v.primal.shape)}
        where = {slot: place._replace(mixed=False) if place.axis >= 0 else place for slot, place in where.items()}
        frozen = [residual for residual in self.pushforward.residuals if not self.is_constant(residual)]
        if all(place == FIRST for place in where.values()):
            return True
        # An input that no tangent reaches gets zeros, in its whole shape.
        if not frozen and cuts(self.operation) and all(value.slot in reached for value in self.inputs):
            return True
        # A residual that is the same for all examples stays whole, if it can be told from the others.
        known = [v.primal for v in self.inputs if where.get(v.slot) in (FIRST, GONE)]
        known += [v.primal for v in self.outputs]
        told = self.is_entrywise or all(any(residual is primal for primal in known) for residual in frozen)
        ends = all(where[v.slot] == FIRST for v in self.outputs if v.batched)
        return ends and set(where.values()) <= {FIRST, GONE} and told

    @property
    def is_entrywise(self) -> bool:
        """Whether each entry of the output depends on the same entry of the inputs alone, once these are broadcast."""
        after = self.pushforward and self.pushforward.examples
        return after is kept or isinstance(after, broadcast)

    def _is_aligned(self, residual) -> bool:
        """Whether a residual of an entrywise operation has the axes of the output, that of the examples included."""
        output = self.outputs[0].primal
        examples = output if self.kept is None else self.kept
        return len(residual.shape) == len(output.shape) and residual.shape[0] == examples.shape[0]


def push_node(
    node: Node,
    tangents: Sequence,
    weights: Mapping[int, Any],
    leading: tuple,
    residuals: Sequence | None = None,
    image: Any = None,
) -> list | None:
    """The tangents of one node's outputs; None if they are all zero.

    Args:
        node: the node.
        tangents: one for each of its inputs; None for zero.
        weights: tangents `(P, …)` of variables, by their `id`.
        leading: P, B or None, and where the examples are: see `FrozenGraph.push`.
        residuals: with the probe axis; by default the node's own.
        image: the output's tangent, if it was computed together with the output.
    """
    pushforward = node.pushforward
    if pushforward is None:
        return None
    moved = [(part, weights[id(variable)]) for variable, part in pushforward.weights if id(variable) in weights]
    arriving = any(tangent is not None for tangent in tangents)
    if residuals is None:
        residuals = pushforward.broadcast_residuals() if moved or arriving else []
    images: list[Sequence] = []
    if image is not None:
        images.append(_tuple(image))
    elif arriving:
        pairs = list(zip(tangents, node.inputs, strict=True))
        # Mixed precision: a tangent has the dtype in which the layer sees its input.
        seen = [None if t is None else cast(t, v.primal.dtype) for t, v in pairs]
        if not pushforward.takes_none:
            seen = [zero_tangents(leading, v) if t is None else t for t, (_, v) in zip(seen, pairs, strict=True)]
        if node.kept is not None:
            cut = [t is not None and node.has_rows(v) for t, (_, v) in zip(seen, pairs, strict=True)]
            seen = [ops.take(t, node.kept, axis=1) if rows else t for t, rows in zip(seen, cut, strict=True)]
        images.append(_tuple(pushforward.function(*seen, *residuals)))
    for part, tangent in moved:
        pairs = list(zip(_tuple(part(tangent, *residuals)), node.outputs, strict=True))
        images.append([_spread(node, t, leading, v) if v.has_tangents else None for t, v in pairs])
    if not images:
        return None
    return [
        _checked(node, functools.reduce(plus, parts), leading, value) if value.has_tangents else None
        for parts, value in zip(zip(*images, strict=True), node.outputs, strict=True)
    ]


def pull_node(node: Node, cotangents: Sequence, leading: tuple, wanted: Container[int]) -> tuple[list[Value], list]:
    """The inputs of a node that have tangents, and the transpose of the node: a cotangent for each of these.

    Args:
        node: the node.
        cotangents: one for each of its outputs; None for zero.
        leading: as `push_node` takes it.
        wanted: the slots of values whose cotangents are wanted.
    """
    # An input that the node takes twice gets the sum of both cotangents.
    moved = [value for value in node.inputs if value.batched and value.has_tangents and value.slot in wanted]
    inputs = list({value.slot: value for value in moved}.values())
    if not inputs:
        return [], []
    pairs = zip(cotangents, node.outputs, strict=True)
    filled = [zero_tangents(leading, value) if c is None else cast(c, value.primal.dtype) for c, value in pairs]

    stated = _stated_transpose(node, filled)
    if stated is not None:
        known = {value.slot: pulled for value, pulled in zip(node.inputs, stated, strict=True)}
        return inputs, [cast(known[value.slot], value.primal.dtype) for value in inputs]

    def push(tangents):
        known = dict(zip((value.slot for value in inputs), tangents, strict=True))
        images = push_node(node, [known.get(value.slot) for value in node.inputs], {}, leading)
        images = images or [None] * len(filled)
        return [ops.zeros_like(c) if image is None else image for image, c in zip(images, filled, strict=True)]

    return inputs, transpose(push, [zero_tangents(leading, value) for value in inputs], filled)


def _stated_transpose(node: Node, cotangents: Sequence):
    """Cotangents of a node's inputs by the transpose that its rule states; None if it must be left to autodiff."""
    pushforward, ends = node.pushforward, [*node.inputs, *node.outputs]
    twice = len({value.slot for value in ends}) < len(ends)
    if pushforward is None or len(node.outputs) != 1 or twice or any(is_complex(value.primal) for value in ends):
        return None
    # What is broadcast is not its own transpose.
    if pushforward.is_symmetric and len({tuple(value.primal.shape) for value in ends}) > 1:
        return None
    stated = pushforward.pull(cotangents[0])
    return None if stated is None else _tuple(stated)


def tangent_shape(leading, value: Value) -> tuple:
    """The shape of a value's tangents. `leading` = (P, B, places): B is None for the whole batch, of known shapes."""
    probes, batch, places = leading
    shape = shape_of(value.primal)
    if batch is None or not value.batched or not shape:
        return (probes, *shape)
    axis, before, after, _ = max((places or {}).get(value.slot, FIRST), FIRST)
    return (probes, *shape[:axis], before * batch * after if before * after != 1 else batch, *shape[axis + 1 :])


def _checked(node: Node, tangent, leading, value: Value):
    """The tangent in the dtype of its output. Raises if it does not have the output's shape."""
    expected, received = tangent_shape(leading, value), tuple(tangent.shape)
    pairs = zip(expected, received, strict=False)
    if len(expected) != len(received) or any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in pairs):
        raise ValueError(
            f"The rule of `{node.name}` ({type(node.operation).__name__}) returned a tangent of the wrong shape. "
            f"Expected {expected}, probes first and then like its output. Received: {received}. "
            "Check the rule with `jvpreg.testing.check_rule`."
        )
    return cast(tangent, value.primal.dtype)


def _spread(node: Node, tangent, leading, value: Value):
    """A weight's part, broadcast to the shape of the output's tangent."""
    shape = tangent_shape(leading, value)
    if not broadcasts(align(tangent, len(shape)).shape, shape):
        raise ValueError(
            f"The rule of `{node.name}` ({type(node.operation).__name__}) returned a part of a weight of the wrong "
            f"shape. Expected one that broadcasts to {shape}, probes first. Received: {tuple(tangent.shape)}. "
            "Check the rule with `jvpreg.testing.check_rule`."
        )
    return ops.broadcast_to(align(tangent, len(shape)), shape)


def zero_tangents(leading, value: Value):
    """Zero tangents of a value; in floats if the value has no tangents."""
    return ops.zeros(tangent_shape(leading, value), value.primal.dtype if value.has_tangents else None)


def _tuple(images) -> tuple:
    return tuple(images) if isinstance(images, (list, tuple)) else (images,)
