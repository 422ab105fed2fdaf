"""Loops and branches, frozen: the body at each step, over which tangents are scanned, or the branch that was taken."""

import functools
import itertools
from collections.abc import Callable, Sequence

import keras
from keras import ops

from jvpreg.common.dtypes import has_tangents
from jvpreg.common.eager import cast, runs_eagerly
from jvpreg.rules.contract import Declined, FrozenBody, Gate, Pushforward
from jvpreg.rules.control_flow import Map, Scan, Switch, WhileLoop, choose
from jvpreg.rules.examples import FIRST, MIXED, kept
from jvpreg.rules.registry import register_rule
from jvpreg.rules.scanning import next_axes, plus_parts, scan_steps


@register_rule(Scan, Map)
def scan(operation, *inputs, context):
    body, count = operation.bodies[0], operation.num_carried
    _check(operation, context)
    (closed_over,), elements = operation.closed_over(inputs), operation.elements(inputs)
    # The first step runs outside the scan. Every step has the maps of its nodes, with residuals of its own.
    first = list(inputs[:count])
    outputs, frozen = context.linearize_step(body, *first, *(x[0] for x in elements[:-1]), *closed_over)

    def step(carried, now):
        outputs, frozen = context.linearize_step(body, *carried, *now[:-1], *closed_over)
        return outputs[:count], [*outputs[count:], *frozen.residuals]

    last, steps = operation.run(step, first, elements, [*outputs[count:], *frozen.residuals])
    ys, residuals = steps[: len(outputs) - count], steps[len(outputs) - count :]
    inner = frozen.examples
    after = _after_map(body.num_arguments, inner) if isinstance(operation, Map) else inner
    pushforward = _scan_of(
        _Steps(operation, frozen, outputs, elements[-1], context.batch), len(inputs), residuals, after
    )
    return [*last, *map(operation.finish, ys)], pushforward


@register_rule(WhileLoop)
def while_loop(operation, *inputs, context):
    if context.repeated or not runs_eagerly(inputs[0]):
        return _bounded_loop(operation, inputs, context)
    body = operation.bodies[0]
    of_body, of_condition = operation.closed_over(inputs)
    carried = list(inputs[: body.num_arguments])
    steps: list[FrozenBody] = []
    while (operation.maximum is None or len(steps) < operation.maximum) and operation.goes_on(carried, of_condition):
        carried, frozen = context.linearize(body, *carried, *of_body)
        steps.append(frozen)
    return carried, _one_after_another(
        steps, carried, body.num_arguments, len(inputs) - len(of_condition), context.batch
    )


@register_rule(Switch)
def switch(operation, index, *inputs, context):
    arguments, bodies = operation.arguments(inputs), operation.bodies
    if runs_eagerly(index) and not context.repeated:
        taken = min(max(int(index), 0), len(bodies) - 1)
        outputs, frozen = context.linearize(bodies[taken], *arguments[taken])
        return outputs, _switch_of(
            _Branches(operation, outputs, [frozen], [taken], context.batch), None, frozen.residuals
        )
    _check(operation, context)
    # Only what a branch freezes, and of which shapes, matters here: what it computes is dropped by the compiler.
    every = [context.linearize(body, *given) for body, given in zip(bodies, arguments, strict=True)]

    def branch(i):
        outputs, frozen = context.linearize(bodies[i], *arguments[i])
        parts = [frozen.residuals if j == i else map(ops.zeros_like, f.residuals) for j, (_, f) in enumerate(every)]
        return [*outputs, *(residual for part in parts for residual in part)]

    found = choose(index, [functools.partial(branch, i) for i in range(len(bodies))])
    count, frozen_all = len(every[0][0]), [frozen for _, frozen in every]
    branches = _Branches(operation, found[:count], frozen_all, range(len(bodies)), context.batch)
    return list(found[:count]), _switch_of(branches, index, found[count:])


def _check(operation, context) -> None:
    layers = [one for body in operation.bodies for one in body.graph.operations if isinstance(one, keras.Layer)]
    if context.training and any(not v.trainable for layer in layers if layer.trainable for v in layer.variables):
        raise Declined("a layer in the loop draws random numbers or keeps statistics in training")


def _after_map(num_elements: int, inner: str) -> Callable:
    """Where the examples are after a map over the first axis, of elements and of what its body closes over."""

    def after(*places):
        place = kept(*places[:num_elements]) if any(places[:num_elements]) else MIXED
        if any(places[num_elements:]):
            return MIXED
        within = place.axis == 1 and inner != "coupled" and place == FIRST._replace(axis=1, mixed=place.mixed)
        return place if within or place._replace(mixed=False) == FIRST else MIXED

    return after


class _Steps:
    """The tangents of a scan: from those of its inputs, over what its body froze in each step.

    Args:
        operation: the scan.
        frozen: the pushforward of its body.
        outputs: of the body, in one step.
        counted: the number of each step.
        whole: how many examples there are in the batch.
        gated: whether some steps do nothing: the last residual, (T,), says for each whether it counts.
    """

    def __init__(self, operation: Scan, frozen: FrozenBody, outputs: Sequence, counted, whole, gated: bool = False):
        self.operation, self.frozen, self.outputs = operation, frozen, list(outputs)
        self.counted, self.whole, self.gated = counted, whole, gated
        self.moving = [has_tangents(y) for y in self.outputs[: operation.num_carried]]

    def push(self, tangents: Sequence, residuals: Sequence, weights: Sequence[tuple] = ()) -> tuple:
        """The tangents of the scan's outputs; None for an output that has none.

        Args:
            tangents: one for each input; None for zero.
            residuals: of all steps, (T, …).
            weights: pairs of a weight's part in one step, and its tangent.
        """
        count, frozen = self.operation.num_carried, self.frozen
        num_arguments = self.operation.bodies[0].num_arguments
        probes = ops.shape(next(t for t in [*tangents, *(u for _, u in weights)] if t is not None))[0]
        own = residuals[: len(frozen.residuals)]
        zeros = functools.partial(zero_tangents, probes, batch=frozen.batch_of(tangents, own), whole=self.whole)
        first = [
            zeros(y) if t is None else ops.cast(t, y.dtype)
            for t, y, moves in zip(tangents, self.outputs, self.moving, strict=False)
            if moves
        ]
        elements = [None if t is None else self.operation.in_order(t, True) for t in tangents[count:num_arguments]]
        given = [t for t in elements if t is not None]
        closed_over = tangents[num_arguments:]

        def step(carried, now):
            moved, arriving = iter(carried), iter(now)
            before = [next(moved) if moves else None for moves in self.moving]
            element = [None if t is None else next(arriving) for t in elements]
            kept = [ops.expand_dims(next(arriving), 0) for _ in residuals]
            arrived = [*before, *element, *closed_over]
            on = kept.pop()[0] if self.gated else None
            if any(t is not None for t in arrived):
                images = _several(frozen.function(*arrived, *kept))
            else:
                images = [zeros(y) for y in self.outputs]
            images = plus_parts(images, weights, kept)
            images = [cast_like(t, y) for t, y in zip(images, self.outputs, strict=True)]
            following = [t for t, moves in zip(images, self.moving, strict=False) if moves]
            if on is not None:
                following = [ops.where(on, new, old) for new, old in zip(following, carried, strict=True)]
            return following, images[count:]

        like = [zeros(y) for y in self.outputs[count:]]
        last, steps = self.operation.run(step, first, [*given, *residuals] or [self.counted], like)
        moved = iter(last)
        return (
            *(next(moved) if moves else None for moves in self.moving),
            *(self.operation.finish(y, True) for y in steps),
        )


def _scan_of(steps: _Steps, num_inputs: int, residuals: Sequence, after) -> Gate:
    frozen = steps.frozen

    def push(*arguments):
        return steps.push(arguments[:num_inputs], [residual[0] for residual in arguments[num_inputs:]])

    def part_of(part):
        def push_weight(u, *residuals):
            return steps.push([None] * num_inputs, [residual[0] for residual in residuals], [(part, u)])

        return push_weight

    # The elements of a map may be the examples; the steps of a scan have the examples on the next axis.
    batch_axes = [0] * len(frozen.residuals) if isinstance(steps.operation, Map) else next_axes(frozen.batch_axes)
    return Gate(
        push,
        *residuals,
        masks=[*frozen.masks, *[None] * steps.gated],
        weights=[(variable, part_of(part)) for variable, part in frozen.weights],
        batch_axes=[*batch_axes, *[None] * steps.gated],
        examples=after,
        takes_none=True,
        finite=frozen.finite,
    )


def _bounded_loop(operation: WhileLoop, inputs: Sequence, context):
    """A while loop in a compiled function: a scan over as many steps as there can be, of which some do nothing."""
    _check(operation, context)
    body = operation.bodies[0]
    of_body, of_condition = operation.closed_over(inputs)
    count = body.num_arguments
    first = list(inputs[:count])
    most = operation.maximum
    if most is None:
        if context.repeated:
            raise Declined("how many steps it takes differs from step to step of a loop: give `maximum_iterations`")
        if context.under_xla:
            raise Declined("how many steps the loop takes is not known when it is compiled: give `maximum_iterations`")
        most = ops.maximum(_counted(operation, first, of_body, of_condition), 1)
    counted = ops.arange(most)
    outputs, frozen = context.linearize_step(body, *first, *of_body)

    def step(carried, now):
        on = operation.goes_on(carried, of_condition)
        outputs, frozen = context.linearize_step(body, *carried, *of_body)
        following = [ops.where(on, new, old) for new, old in zip(outputs, carried, strict=True)]
        return following, [*frozen.residuals, on]

    last, kept = scan_steps(step, first, [counted], [*frozen.residuals, ops.ones((), "bool")])
    as_scan = Scan(body, count, operation.maximum, False)
    num_inputs = len(inputs) - len(of_condition)
    pushforward = _scan_of(
        _Steps(as_scan, frozen, outputs, counted, context.batch, True), num_inputs, kept, frozen.examples
    )
    return last, _without(pushforward, num_inputs, len(inputs))


def _counted(operation: WhileLoop, first, of_body, of_condition):
    """How many steps a loop takes."""
    return ops.while_loop(
        lambda step, *carried: operation.goes_on(carried, of_condition),
        lambda step, *carried: (step + 1, *operation.bodies[0](*carried, *of_body)),
        (ops.zeros((), "int32"), *first),
    )[0]


def _one_after_another(
    steps: Sequence[FrozenBody], outputs: Sequence, num_carried: int, num_inputs: int, whole
) -> Gate:
    """The pushforward of a loop of known steps. `num_inputs`: those whose tangents matter, the first ones."""
    counts = [len(step.residuals) for step in steps]
    variables = {id(variable): variable for step in steps for variable in step.variables}

    def push_all(tangents, residuals, variable=None, u=None):
        carried, closed_over = list(tangents[:num_carried]), tangents[num_carried:num_inputs]
        rest = iter(residuals)
        for frozen, count in zip(steps, counts, strict=True):
            kept = [next(rest) for _ in range(count)]
            parts = [(part, u) for v, part in frozen.weights if v is variable]
            arrived = [*carried, *closed_over]
            images = []
            if any(t is not None for t in arrived):
                images = _several(frozen.function(*arrived, *kept))
            for part, tangent in parts:
                moved = _several(part(tangent, *kept))
                images = [a + b for a, b in zip(images, moved, strict=True)] if images else moved
            if images:
                carried = [t if has_tangents(y) else None for t, y in zip(images, outputs, strict=True)]
        return tuple(carried)

    def filled(images, like, tangents, residuals):
        batch = steps[0].batch_of(tangents, residuals[: counts[0]]) if steps else None
        zeros = functools.partial(zero_tangents, ops.shape(like)[0], batch=batch, whole=whole)
        return tuple(zeros(y) if t is None else t for t, y in zip(images, outputs, strict=True))

    def push(*arguments):
        given = next(t for t in arguments if t is not None)
        residuals = arguments[-sum(counts) :] if sum(counts) else ()
        return filled(push_all(arguments, residuals), given, arguments[:num_inputs], residuals)

    def part_of(variable):
        def push_weight(u, *residuals):
            return filled(push_all([None] * num_inputs, residuals, variable, u), u, [], residuals)

        return push_weight

    return Gate(
        push,
        *(residual for step in steps for residual in step.residuals),
        masks=[mask for step in steps for mask in step.masks],
        weights=[(variable, part_of(variable)) for variable in variables.values()],
        batch_axes=[axis for step in steps for axis in step.batch_axes],
        examples=_examples_of(steps),
        takes_none=True,
        finite=all(step.finite for step in steps),
    )


class _Branches:
    """The tangents of a switch, from those of its inputs, through the branch that was taken.

    Args:
        operation: the switch.
        outputs: of the branch.
        frozen: the pushforwards of the branches that may have been taken.
        taken: their numbers. If there are several, the last residual is the number of the one.
        whole: how many examples there are in the batch.
    """

    def __init__(self, operation: Switch, outputs: Sequence, frozen: Sequence[FrozenBody], taken: Sequence[int], whole):
        closed_over = sum(len(body.graph.inputs) - body.num_arguments for body in operation.bodies)
        self.num_inputs = operation.bodies[0].num_arguments + closed_over
        self.outputs, self.frozen, self.whole = outputs, frozen, whole
        every = operation.arguments(range(self.num_inputs))
        self.places = [every[number] for number in taken]
        self.ends = [sum(len(one.residuals) for one in frozen[:i]) for i in range(len(frozen) + 1)]

    def push(self, tangents: Sequence, residuals: Sequence, variable=None, u=None) -> tuple:
        """The tangents of the outputs, from those of the inputs (None for zero), or from that of a variable."""
        probes = ops.shape(next(t for t in [*tangents, u] if t is not None))[0]
        parts = [residuals[start:end] for start, end in itertools.pairwise(self.ends)]
        given = [[tangents[place] for place in places] for places in self.places]
        sizes = [one.batch_of(*known) for one, *known in zip(self.frozen, given, parts, strict=True)]
        batch = next((size for size in sizes if size is not None), None)
        zeros = functools.partial(zero_tangents, probes, batch=batch, whole=self.whole)

        def branch(i):
            images = [None] * len(self.outputs)
            if any(t is not None for t in given[i]):
                images = _several(self.frozen[i].function(*given[i], *parts[i]))
            for part in (part for known, part in self.frozen[i].weights if known is variable):
                images = _several(part(u, *parts[i]))
            return [zeros(y) if t is None else cast_like(t, y) for t, y in zip(images, self.outputs, strict=True)]

        branches = [functools.partial(branch, i) for i in range(len(self.frozen))]
        return tuple(branches[0]() if len(branches) == 1 else choose(residuals[-1][0], branches))


def _switch_of(branches: _Branches, index, residuals: Sequence) -> Gate:
    """The pushforward of a switch. `index`: which branch was taken, if several may have been; otherwise None."""
    frozen, count = branches.frozen, branches.num_inputs
    known = [] if index is None else [index]
    variables = {id(variable): variable for one in frozen for variable in one.variables}

    def push(_, *arguments):
        # The index has no tangent. Without any other, its zeros say how many probes there are.
        return branches.push(arguments[:count], arguments[count:], u=_)

    def part_of(variable):
        return lambda u, *residuals: branches.push([None] * count, residuals, variable, u)

    return Gate(
        push,
        *residuals,
        *known,
        masks=[*(mask for one in frozen for mask in one.masks), *[None] * len(known)],
        weights=[(variable, part_of(variable)) for variable in variables.values()],
        batch_axes=[*(axis for one in frozen for axis in one.batch_axes), *[None] * len(known)],
        examples=_examples_of(frozen),
        takes_none=True,
        finite=all(one.finite for one in frozen),
    )


def _without(pushforward: Gate, count: int, num_inputs: int) -> Gate:
    """A pushforward of the first inputs as one of all, of which the others have no tangents."""
    inner = pushforward.function
    pushforward.function = lambda *arguments: inner(*arguments[:count], *arguments[num_inputs:])
    return pushforward


def _examples_of(frozen: Sequence[Pushforward]) -> str:
    kinds = {one.examples for one in frozen}
    return next((kind for kind in ("coupled", "moved") if kind in kinds), "apart")


def zero_tangents(probes, y, batch, whole):
    """Zero tangents of an output; in floats if it has none.

    Args:
        probes: how many there are.
        y: the output, of the whole batch.
        batch: for how many examples; None for all.
        whole: how many there are in the whole batch.
    """
    shape = list(ops.shape(y))
    if batch is not None and shape and (y.shape[0] is None or (isinstance(whole, int) and y.shape[0] == whole)):
        shape[0] = batch
    return ops.zeros((probes, *shape), y.dtype if has_tangents(y) else None)


def cast_like(tangent, y):
    """A tangent in the dtype of an output."""
    return cast(tangent, y.dtype) if has_tangents(y) else cast(tangent, keras.config.floatx())


def _several(images) -> list:
    return list(images) if isinstance(images, (list, tuple)) else [images]
