"""A graph frozen at `x`: its nodes in the order in which they ran, and the tangent pass over them."""

import functools
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from keras import ops

from jvpreg.common.dtypes import is_complex
from jvpreg.common.eager import cast, shape_of
from jvpreg.engine.kernel_scaling import with_scaled_kernel
from jvpreg.engine.node import Node, Value, pull_node, push_node, zero_tangents
from jvpreg.rules.contract import Affine, ChannelScale, FrozenBody
from jvpreg.rules.examples import FIRST, GONE, MIXED, Place, makes_rows
from jvpreg.rules.families import plus


class Returned(NamedTuple):
    """What the layers of a model returned.

    Attributes:
        runs: by the path of each layer, as `layer_paths` has it, what it returned in each of its runs: a structure of
            values.
        by_attributes: a function from such a path to the one by attributes alone.
    """

    runs: Mapping[str, Sequence]
    by_attributes: Callable

    def runs_of(self, path: str) -> Sequence:
        """What the layer of a path returned in each of its runs; empty if there is no such layer."""
        return next((runs for known, runs in self.runs.items() if path in (known, self.by_attributes(known))), ())


class FrozenGraph:
    """Nodes, and where tangents enter and leave them.

    Args:
        nodes: in the order in which they ran.
        inputs: values of the graph's inputs.
        outputs: values of its outputs.
        variables: variables that operations take as an input, each with the value that stands for it.
        returned: what layers returned, if it is the graph of a whole model.
    """

    def __init__(
        self,
        nodes: Sequence[Node],
        inputs: Sequence[Value],
        outputs: Sequence[Value],
        variables: Sequence[tuple[Any, Value]],
        returned: Returned | None = None,
    ):
        self.nodes = list(nodes)
        self.inputs = list(inputs)
        self.outputs = list(outputs)
        self.variables = list(variables)
        self.returned = returned or Returned({}, str)

    @functools.cached_property
    def places(self) -> dict[int, Place]:
        """Where the examples are in each value that a tangent of an input can reach, by its slot."""
        places = {value.slot: FIRST for value in self.inputs if value.batched and len(value.primal.shape)}
        for node in self.nodes:
            given = [places.get(value.slot) for value in node.inputs]
            if node.pushforward is not None and any(place is not None for place in given):
                after = MIXED if MIXED in given else node.examples_after(given)
                places |= {value.slot: MIXED if after.mixed else after for value in node.outputs}
        return places

    @functools.cached_property
    def locations(self) -> dict[int, Place]:
        """Where the examples are in each value that depends on them, by its slot, even if no tangent reaches it.

        Here `mixed` does not matter: a row of what is frozen belongs to one example, whatever else it depends on.
        """
        # A number, as a loop counts its steps by, has no axis for the examples.
        locations: dict[int, Place] = {v.slot: GONE for v in self.inputs if v.batched and not len(v.primal.shape)}
        for node in self.nodes:
            given = [locations.get(value.slot, FIRST) if value.batched else None for value in node.inputs]
            given = [None if place == GONE else place for place in given]
            if any(value.batched for value in node.inputs):
                unknown = MIXED if MIXED in given or makes_rows(node.operation) else GONE
                after = node.examples_after(given) if any(given) and MIXED not in given else unknown
                locations |= {value.slot: after for value in node.outputs}
        return locations

    @functools.cached_property
    def couples_examples(self) -> bool:
        """Whether one example's tangent depends on another's, or the outputs have them on another axis."""
        ends = [self.places.get(value.slot, FIRST) for value in self.outputs]
        # A number that ends in a comparison, as the condition of a branch, passes no tangent on.
        numbers = {value.slot for node in self.nodes for value in node.outputs if not len(value.primal.shape)}
        passed = {value.slot for value in self.outputs}
        for node in reversed(self.nodes):
            if node.pushforward is not None and any(value.slot in passed for value in node.outputs):
                passed |= {value.slot for value in node.inputs}
        mixed = {slot for slot, place in self.places.items() if place == MIXED}
        return bool(mixed - (numbers - passed)) or any(place != FIRST for place in ends)

    @property
    def moving(self) -> list[Node]:
        """The nodes that cannot be cut by example although no examples mix: what is frozen has them on another axis."""
        pairs = [pair for pair in zip(self.nodes, self._cuttable, strict=True) if not pair[1]]
        return [node for node, _ in pairs if any(value.slot in self._reached for value in node.outputs)]

    @functools.cached_property
    def _cuttable(self) -> list[bool]:
        """Whether each node can be cut by examples."""
        return [node.can_be_cut(self.locations, self._reached) for node in self.nodes]

    @functools.cached_property
    def _reached(self) -> set[int]:
        """The slots of the values that a tangent of an input or of a weight can reach."""
        reached = {value.slot for value in [*self.inputs, *(value for _, value in self.variables)]}
        for node in self.nodes:
            if node.pushforward and (node.pushforward.variables or any(v.slot in reached for v in node.inputs)):
                reached |= {value.slot for value in node.outputs}
        return reached

    @property
    def is_constant(self) -> bool:
        """Whether no output depends on an input by a tangent: integers have no derivative."""
        reached = {value.slot for value in self.inputs if value.has_tangents}
        for node in self.nodes:
            if node.pushforward is not None and any(value.slot in reached for value in node.inputs):
                reached.update(value.slot for value in node.outputs if value.has_tangents)
        return not any(value.slot in reached for value in self.outputs)

    @property
    def weights(self) -> list:
        """The variables that can be perturbed, in the order of their first use."""
        owned = [variable for node in self.nodes if node.pushforward for variable in node.pushforward.variables]
        found = {id(variable): variable for variable in [v for v, _ in self.variables] + owned}
        return list(found.values())

    def take(self, indices) -> "FrozenGraph":
        """The graph for the examples at `indices` only."""
        pairs = zip(self.nodes, self._cuttable, strict=True)
        nodes = [node.take(indices, self.locations) if cuttable else node for node, cuttable in pairs]
        return FrozenGraph(nodes, self.inputs, self.outputs, self.variables)

    def push(
        self,
        tangents: Sequence,
        batch: Any = None,
        *,
        taps: Mapping[str, Any] | None = None,
        weights: Mapping[int, Any] | None = None,
        residuals: Iterator | None = None,
        scaled_kernels: bool = True,
    ) -> list:
        """The tangent pass.

        Args:
            tangents: one for each input, `(P, B, …)`; None for zero.
            batch: B if the graph is that of a part of a batch; None for the whole batch, whose shapes are known.
            taps: tangents added at nodes' outputs, by name.
            weights: tangents `(P, …)` of variables, by their `id`.
            residuals: residuals in place of the nodes' own, in the order of the nodes, with the probe axis, and
                without those that are constant.
            scaled_kernels: whether to multiply the slope of a `ChannelScale` into the kernel of the `Affine` before it;
                off for the transpose, where that is slower under XLA.

        Returns:
            A tangent for each output; None where it is zero.
        """
        taps, weights = taps or {}, weights or {}
        given = [*tangents, *taps.values(), *weights.values()]
        count = next(shape_of(t)[0] for t in given if t is not None)
        leading = (count, None, None) if batch is None else (count, batch, self.places)
        pairs = zip(self.inputs, tangents, strict=True)
        slots = {value.slot: tangent if value.has_tangents else None for value, tangent in pairs}
        slots |= {value.slot: weights[id(variable)] for variable, value in self.variables if id(variable) in weights}
        nodes = self._with_scaled_kernels(leading) if scaled_kernels and not (taps or weights) else self.nodes
        last_use = {value.slot: i for i, node in enumerate(nodes) for value in node.inputs}
        kept = {value.slot for value in self.outputs}
        for i, node in enumerate(nodes):
            own = None
            if residuals is not None and node.pushforward is not None:
                own = [
                    ops.expand_dims(residual, 0) if node.is_constant(residual) else next(residuals)
                    for residual in node.pushforward.residuals
                ]
            images = push_node(node, [slots.get(value.slot) for value in node.inputs], weights, leading, own)
            for j, name in enumerate(node.output_names):
                image = images[j] if images else None
                if name in taps:
                    image = taps[name] if image is None else image + taps[name]
                slots[node.outputs[j].slot] = image
            for value in node.inputs:
                if last_use[value.slot] == i and value.slot not in kept:
                    slots.pop(value.slot, None)
        return [slots.get(value.slot) for value in self.outputs]

    def pull(
        self,
        cotangents: Sequence,
        change: Callable[[Node, list], list] = lambda node, cotangents: cotangents,
        batch: Any = None,
        *,
        at: Iterable[int] = (),
        with_inputs: bool = True,
    ) -> tuple[list, dict[int, Any]]:
        """The transpose of the tangent pass, node by node, with `change` applied to the cotangents of each node.

        Args:
            cotangents: one for each output, `(P, B, …)`; None for zero.
            change: a function `(node, cotangents) -> cotangents` of the node's outputs; None for zero.
            batch: as `push` takes it.
            at: the slots of values whose cotangents are wanted too.
            with_inputs: whether those of the inputs are wanted; otherwise nodes before the values at `at` do not run.

        Returns:
            A cotangent for each input; None where it is zero. And those of the values at `at`, by slot, if not zero.
        """
        count = next(shape_of(c)[0] for c in cotangents if c is not None)
        leading = (count, None, None) if batch is None else (count, batch, self.places)
        arriving: dict[int, Any] = {}
        stops, found_at = set(at), dict[int, Any]()
        leading_to = self._following(stops | {value.slot for value in self.inputs if with_inputs})

        def arrive(values, cotangents):
            for value, cotangent in zip(values, cotangents, strict=True):
                if cotangent is not None and value.has_tangents and value.slot in leading_to:
                    known = arriving.get(value.slot)
                    arriving[value.slot] = cotangent if known is None else plus(known, cotangent)

        arrive(self.outputs, cotangents)
        for node in reversed(self.nodes):
            found = [arriving.pop(value.slot, None) for value in node.outputs]
            pairs = zip(node.outputs, found, strict=True)
            found = [c if c is None else cast(c, value.primal.dtype) for value, c in pairs]
            known = {value.slot: c for value, c in zip(node.outputs, found, strict=True) if c is not None}
            found_at |= {slot: c for slot, c in known.items() if slot in stops}
            passes = node.pushforward is not None and any(value.slot in leading_to for value in node.inputs)
            if passes and known:
                arrive(*pull_node(node, change(node, found), leading, leading_to))
        return [arriving.get(value.slot) for value in self.inputs], found_at

    def _following(self, slots: Iterable[int]) -> set[int]:
        """The slots of values that a tangent of one of these can reach."""
        reached = set(slots)
        for node in self.nodes:
            if node.pushforward is not None and any(value.slot in reached for value in node.inputs):
                reached |= {value.slot for value in node.outputs}
        return reached

    @functools.cached_property
    def _scaled_afterwards(self) -> list[tuple[int, int]]:
        """Pairs of places: an affine node, and the node that alone takes its output and multiplies its channels."""
        uses = Counter(value.slot for values in (*(n.inputs for n in self.nodes), self.outputs) for value in values)
        kinds = [(i, node, node.pushforward) for i, node in enumerate(self.nodes)]
        made_at = {node.outputs[0].slot: i for i, node, kind in kinds if isinstance(kind, Affine) and kind.scaled}
        scaling = [(node.inputs[0].slot, i) for i, node, kind in kinds if isinstance(kind, ChannelScale)]
        return [(made_at[slot], i) for slot, i in scaling if slot in made_at and uses[slot] == 1]

    def _with_scaled_kernels(self, leading) -> list[Node]:
        """The nodes, with the slopes of batch normalizations in the kernels before them where that costs less."""
        nodes = list(self.nodes)
        for i, j in self._scaled_afterwards:
            nodes[i], nodes[j] = with_scaled_kernel(nodes[i], nodes[j], leading)
        return nodes

    def intercepts(self, names: Container[str] | None = None) -> dict[str, Any]:
        """`y − pushforward(x)` at every output of the nodes of these names, or of every node, by name.

        Nothing is pushed if the rule knows the intercept. An infinite one counts as 0: either a later node drops the
        entry (as a maximum drops padded −∞), or the graph's output is infinite itself.
        """
        finite = self._finite_slots
        made = [value for node in self.nodes for value in node.outputs]
        # What has no tangent (an index, a comparison) has no intercept, nor has what follows from weights alone.
        fed = {value.slot for value in [*self.inputs, *made] if value.batched and value.has_tangents}
        result = {}
        for node in self.nodes:
            if names is not None and not any(name in names for name in node.output_names):
                continue
            if not any(value.slot in fed for value in node.outputs):
                continue
            known = None if node.pushforward is None else node.pushforward.intercept
            # A constant among a node's inputs has no tangent: what it adds belongs to the intercept.
            if known is not None and all(value.slot in fed for value in node.inputs):
                ((name, value),) = zip(node.output_names, node.outputs, strict=True)
                result[name] = ops.broadcast_to(ops.cast(known, value.primal.dtype), ops.shape(value.primal))
                continue
            fed_in = [v.primal if v.slot in finite else _finite_part(v.primal) for v in node.inputs]
            pairs = zip(fed_in, node.inputs, strict=True)
            tangents = [ops.expand_dims(primal, 0) if v.slot in fed else None for primal, v in pairs]
            images = push_node(node, tangents, {}, (1, None, None))
            for j, (name, value) in enumerate(zip(node.output_names, node.outputs, strict=True)):
                if value.slot in fed:
                    added = value.primal if not images else value.primal - images[j][0]
                    result[name] = added if value.slot in finite else _finite_part(added)
        return result

    @functools.cached_property
    def _finite_slots(self) -> set[int]:
        """The slots of values that are known to be finite. A constant, and what follows from it, may not be."""
        finite = {value.slot for value in [*self.inputs, *(value for _, value in self.variables)]}
        for node in self.nodes:
            makes_finite = node.pushforward is None or node.pushforward.finite
            if makes_finite and all(value.slot in finite for value in node.inputs):
                finite |= {value.slot for value in node.outputs}
        return finite

    def as_pushforward(self, of_elements: bool = False) -> FrozenBody:
        """The whole graph as the pushforward of one operation, with the residuals and masks of all its nodes.

        Args:
            of_elements: whether it is that of one element of a map, which may have no axis for the examples.
        """
        if of_elements:
            self.nodes = [replace(node, of_element=True) for node in self.nodes]
        found = [
            (residual, None if node.is_whole(residual, self.locations) else axis, mask)
            for node in self.nodes
            for frozen in ([] if node.pushforward is None else [node.pushforward])
            for residual, axis, mask in zip(frozen.residuals, frozen.batch_axes, frozen.masks, strict=True)
            if not node.is_constant(residual)
        ]
        axes = [axis for _, axis, _ in found]
        count = len(self.inputs)
        with_examples = [value.batched and len(value.primal.shape) > 0 for value in self.inputs]

        def batch_of(tangents, residuals):
            if of_elements or self.couples_examples:
                return None
            sizes = [ops.shape(t)[1] for t, has in zip(tangents, with_examples, strict=False) if has and t is not None]
            pairs = zip(residuals, axes, strict=True) if not sizes else ()
            sizes += [ops.shape(residual)[1 + axis] for residual, axis in pairs if axis is not None]
            return sizes[0] if sizes else None

        def push_all(tangents, leading, residuals, weights=None):
            images = self.push(tangents, leading[1], residuals=iter(residuals), weights=weights)
            pairs = zip(images, self.outputs, strict=True)
            filled = [zero_tangents(leading, v) if t is None else t for t, v in pairs]
            return filled[0] if len(filled) == 1 else tuple(filled)

        def push(*arguments):
            tangents, residuals = arguments[:count], arguments[count:]
            probes = ops.shape(next(tangent for tangent in tangents if tangent is not None))[0]
            return push_all(tangents, (probes, batch_of(tangents, residuals), None), residuals)

        def part(tangent, *residuals, key):
            leading = (ops.shape(tangent)[0], batch_of([], residuals), None)
            return push_all([None] * count, leading, residuals, {key: tangent})

        return FrozenBody(
            push,
            *(residual for residual, *_ in found),
            batch_of=batch_of,
            masks=[mask for *_, mask in found],
            weights=[(variable, functools.partial(part, key=id(variable))) for variable in self.weights],
            batch_axes=axes,
            examples="coupled" if self.couples_examples else "moved" if self.moving else "apart",
            takes_none=True,
            finite=all(value.slot in self._finite_slots for value in self.outputs),
        )


def _finite_part(tensor):
    """A tensor, with 0 where it is infinite or not a number."""
    if is_complex(tensor):
        real, imaginary = (ops.cast(_finite_part(part(tensor)), tensor.dtype) for part in (ops.real, ops.imag))
        return real + 1j * imaginary
    return ops.where(ops.isfinite(tensor), tensor, 0.0)
