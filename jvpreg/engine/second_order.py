"""The second-order pass: tangents and their second derivatives go through a frozen graph together, node by node.

Through a node y = φ(x), a tangent u becomes `J u`, and a second derivative s becomes `J s + d²φ[u, w]`. If the second
derivatives of all directions are summed on the way, which is the forward Laplacian, only one s goes along with them.

References: Li et al. (2024), "A computational framework for neural network-based variational Monte Carlo with Forward
Laplacian"; Dangel et al. (2025), "Collapsing Taylor mode automatic differentiation".
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from keras import ops

from jvpreg.common.dtypes import is_complex
from jvpreg.common.eager import cast, shape_of
from jvpreg.engine.autodiff import along_autodiff
from jvpreg.engine.frozen_graph import FrozenGraph
from jvpreg.engine.node import Node, push_node, zero_tangents
from jvpreg.rules.contract import Affine
from jvpreg.rules.examples import broadcast
from jvpreg.rules.folding import align, each_probe


class Jet(NamedTuple):
    """What goes along with a value; None stands for zero.

    Attributes:
        u: its tangents `(P, B, …)`.
        w: those of the other directions; the same tensor as u if these are the same.
        second: its second derivatives, `(P, B, …)`, or their sum over the directions, `(1, B, …)`.
    """

    u: Any = None
    w: Any = None
    second: Any = None


ZERO = Jet()


def push_twice(
    graph: FrozenGraph, u: Sequence, w: Sequence | None = None, summed: bool = False, shared: bool = False
) -> list:
    """The second derivatives of the outputs along pairs of directions.

    Args:
        graph: of a model that was linearized to the second order.
        u: directions, one tensor `(P, B, …)` for each input; None for zero.
        w: the second direction of each pair; by default the first one again.
        summed: whether to sum over the pairs, on the way.
        shared: whether u is the same for all examples, `(P, 1, …)`, and w is not given.

    Returns:
        For each output `(P, B, …)`, or `(1, B, …)` if summed; None where it is zero.
    """
    count = next(shape_of(t)[0] for t in u if t is not None)
    second = [None] * len(u) if w is None else w
    jets = {
        value.slot: Jet(a, a if w is None else b) if value.has_tangents else ZERO
        for value, a, b in zip(graph.inputs, u, second, strict=True)
    }
    of_one = {value.slot for value in graph.inputs} if shared else set()
    last_use = {value.slot: i for i, node in enumerate(graph.nodes) for value in node.inputs}
    ends = {value.slot for value in graph.outputs}
    for i, node in enumerate(graph.nodes):
        given = [jets.get(value.slot, ZERO) for value in node.inputs]
        one_row = False
        if any(value.slot in of_one for value in node.inputs):
            # An affine node treats each example alike, so that one row does for the whole batch.
            one_row = isinstance(node.pushforward, Affine)
            if not one_row:
                pairs = zip(given, node.inputs, strict=True)
                given = [_repeated(jet, value) if value.slot in of_one else jet for jet, value in pairs]
        leading = (1, graph.places) if one_row else (None, None)
        for value, jet in zip(node.outputs, _through(node, given, leading, count, summed), strict=True):
            jets[value.slot] = jet
            if one_row:
                of_one.add(value.slot)
        for value in node.inputs:
            if last_use[value.slot] == i and value.slot not in ends:
                jets.pop(value.slot, None)
    return [jets.get(value.slot, ZERO).second for value in graph.outputs]


def bends(graph: FrozenGraph) -> bool:
    """Whether a node that a tangent reaches may have a second derivative; a piecewise affine graph has none."""
    reached = {value.slot for value in graph.inputs if value.has_tangents}
    for node in graph.nodes:
        if node.pushforward is not None and any(value.slot in reached for value in node.inputs):
            if node.pushforward.bends:
                return True
            reached |= {value.slot for value in node.outputs}
    return False


def _repeated(jet: Jet, value) -> Jet:
    if jet.u is None:
        return jet
    u = ops.broadcast_to(jet.u, (shape_of(jet.u)[0], *shape_of(value.primal)))
    return Jet(u, u, jet.second)


def _through(node: Node, jets: Sequence[Jet], leading: tuple, count, summed: bool) -> list[Jet]:
    """The jets of a node's outputs."""
    pushforward = node.pushforward
    if pushforward is None or all(part is None for jet in jets for part in jet):
        return [ZERO] * len(node.outputs)
    same = all(jet.u is jet.w for jet in jets)
    # All that goes through the node goes at once, since a pushforward is linear and takes any number of probes.
    groups: list[tuple[str, Any]] = [("u", count)] + ([] if same else [("w", count)])
    groups += [("second", 1 if summed else count)]
    groups = [(name, size) for name, size in groups if any(getattr(jet, name) is not None for jet in jets)]
    joined: list = []
    for jet, value in zip(jets, node.inputs, strict=True):
        parts = [(getattr(jet, name), size) for name, size in groups]
        if all(part is None for part, _ in parts):
            joined.append(None)
            continue
        filled = [zero_tangents((size, *leading), value) if part is None else part for part, size in parts]
        joined.append(filled[0] if len(filled) == 1 else ops.concatenate(filled))
    total = sum(size for _, size in groups)
    images = push_node(node, joined, {}, (total, *leading)) or [None] * len(node.outputs)
    added: Sequence = [None] * len(node.outputs)
    if pushforward.bends and all(any(getattr(jet, name) is not None for jet in jets) for name in ("u", "w")):
        added = _second(node, [jet.u for jet in jets], [jet.w for jet in jets], summed)
    found = []
    for image, more, value in zip(images, added, node.outputs, strict=True):
        if not value.has_tangents:  # The counter of a loop has none, beside outputs that do.
            found.append(ZERO)
            continue
        pushed, start = {}, 0
        for name, size in groups:
            pushed[name] = None if image is None else image[start : start + size]
            start += size
        second = pushed.get("second")
        if more is not None:
            more = cast(more, image.dtype)
            second = more if second is None else second + more
        u = pushed.get("u")
        found.append(Jet(u, u if same else pushed.get("w"), second))
    return found


def _second(node: Node, u: Sequence, w: Sequence, summed: bool) -> Sequence:
    """`d²φ[u, w]` of a node, for each of its outputs: as its rule states it, or by running the rule again along w."""
    pushforward = node.pushforward
    assert pushforward is not None
    pairs = list(zip(node.inputs, u, w, strict=True))
    # Mixed precision: as in the first-order pass, a tangent has the dtype in which the layer sees its input.
    u = [None if a is None else cast(a, v.primal.dtype) for v, a, _ in pairs]
    w = [None if b is None else cast(b, v.primal.dtype) for v, _, b in pairs]
    primals = [value.primal for value in node.inputs]
    if pushforward.curvature is not None:
        curvature = ops.expand_dims(pushforward.curvature(primals[0], node.outputs[0].primal), 0)
        return [curvature * _product(u[0], w[0], summed)]
    if pushforward.second is not None:
        stated = pushforward.second(u, w, primals)
        return [None if stated is None else _total(stated, summed)]
    if node.again is None:
        raise NotImplementedError(f"`{node.name}` ({type(node.operation).__name__}) has no second derivative.")
    if _is_entrywise(node):
        return [_entrywise(node, u, w, primals, summed)]
    count = next(shape_of(t)[0] for t in u if t is not None)
    full = [
        [zero_tangents((count, None, None), v) if t is None else t for t, v in zip(side, node.inputs, strict=True)]
        if side_is_needed
        else list(side)
        for side, side_is_needed in ((u, not pushforward.takes_none), (w, False))
    ]
    moving = [i for i, t in enumerate(w) if t is not None]
    given = [i for i, t in enumerate(full[0]) if t is not None]

    def of_row(*rows):
        along = dict(zip(given, (ops.expand_dims(row, 0) for row in rows), strict=False))
        images = _derivative(node, primals, along, dict(zip(moving, rows[len(given) :], strict=True)))
        return tuple(image[0] for image in images)

    images = each_probe(of_row)(*(full[0][i] for i in given), *(w[i] for i in moving))
    return [_total(image, summed) for image in images]


def _derivative(node: Node, primals: Sequence, u: dict, w: dict) -> tuple:
    """The derivative along w, `(B, …)` by the place of an input, of the node's images of u, `(1, B, …)`."""
    moving = list(w)

    def images(*moved):
        at = list(primals)
        for i, tensor in zip(moving, moved, strict=True):
            at[i] = tensor
        assert node.again is not None
        pushed = node.again(at)(*(u.get(i) for i in range(len(at))))
        return tuple(pushed) if isinstance(pushed, (list, tuple)) else (pushed,)

    return along_autodiff(images, [primals[i] for i in moving], list(w.values()))


def _is_entrywise(node: Node) -> bool:
    """Whether each entry of the output depends on the same entry of its inputs alone, once these are broadcast."""
    tensors = [value.primal for value in (*node.inputs, *node.outputs)]
    if len(node.outputs) != 1 or not node.is_entrywise or any(map(is_complex, tensors)):
        return False
    # One that says how its inputs are broadcast does so as operations do; another one may have a vector for an axis.
    spread = isinstance(node.pushforward.examples, broadcast)  # type: ignore[union-attr]
    return spread or len({len(tensor.shape) for tensor in tensors}) == 1


def _entrywise(node: Node, u: Sequence, w: Sequence, primals: Sequence, summed: bool) -> Any:
    """The second derivatives by each pair of inputs are found once for all directions, along ones."""
    rank = len(node.outputs[0].primal.shape) + 1
    total = None
    for i, a in enumerate(u):
        for j, b in enumerate(w):
            if a is None or b is None:
                continue
            one = {i: ops.expand_dims(ops.ones_like(primals[i]), 0)}
            if not node.pushforward.takes_none:  # type: ignore[union-attr]
                others = enumerate(node.inputs)
                one = {k: zero_tangents((1, None, None), value) for k, value in others if k != i} | one
            (curvature,) = _derivative(node, primals, one, {j: ops.ones_like(primals[j])})
            part = curvature * _product(align(a, rank), align(b, rank), summed)
            total = part if total is None else total + part
    return total


def _product(a, b, summed: bool):
    product = ops.square(a) if a is b else a * b
    return _total(product, summed)


def _total(tensor, summed: bool):
    return ops.sum(tensor, axis=0, keepdims=True) if summed else tensor
