"""The affine regions of a piecewise affine model on a segment or a rectangle, found exactly."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops

from jvpreg.common import checks
from jvpreg.common.typing import ArrayLike, Tensor
from jvpreg.engine.node import Node
from jvpreg.linearization import Linearization
from jvpreg.products import linearize

MOST_REGIONS = 20_000
# Relative to the segment or to the sides of the rectangle: narrower regions are not found. float32 has no finer points.
RESOLUTION = {"float32": 1e-6, "float64": 1e-12}
BATCH = 1024
# How far inside its corners, from 0 to 1 at its middle, a region is compared with its middle.
INSIDE = 1e-2


class Segment:
    """The inputs `start + t (end − start)`, 0 ≤ t ≤ 1.

    Args:
        start: a point like one example's input.
        end: another such point.

    Raises:
        ValueError: they differ in shape, or are equal.
    """

    def __init__(self, start: ArrayLike, end: ArrayLike):
        self.origin = checks.array("start", start)
        last = checks.array("end", end)
        if last.shape != self.origin.shape or not np.any(last != self.origin):
            raise checks.invalid("end", f"another point than `start`, of shape {self.origin.shape}", end)
        self.sides = [last - self.origin]


class Rectangle:
    """The inputs `corner + s first + t second`, 0 ≤ s, t ≤ 1: a box in two features, or any parallelogram.

    Args:
        corner: a point like one example's input.
        first: one side of it, a vector.
        second: the other one.

    Raises:
        ValueError: they differ in shape, or a side is zero.
    """

    def __init__(self, corner: ArrayLike, first: ArrayLike, second: ArrayLike):
        self.origin = checks.array("corner", corner)
        self.sides = [checks.array("first", first), checks.array("second", second)]
        for name, side in zip(("first", "second"), self.sides, strict=True):
            if side.shape != self.origin.shape or not np.any(side):
                raise checks.invalid(name, f"a side that is not zero, of shape {self.origin.shape}", side)


@dataclass(frozen=True)
class Region:
    """A part of a segment or a rectangle in which the model is affine.

    Attributes:
        corners: `(n, 1)` or `(n, 2)`: the two ends t, or the corners (s, t) of a convex polygon in their order.
        size: the fraction of the domain that it covers, from 0 to 1.
    """

    corners: np.ndarray
    size: float

    @property
    def middle(self) -> np.ndarray:
        """A point inside, `(1,)` or `(2,)`."""
        return self.corners.mean(axis=0)


def regions(model: keras.Model, domain: Segment | Rectangle) -> list[Region]:
    """The affine regions of a model on a segment or a rectangle.

    Args:
        model: piecewise affine: its nonlinear operations select (ReLU and similar ones, max pooling, sorting, the k
            largest, comparisons), each by a rule; on a rectangle, only those whose kink is at zero.
        domain: the segment or rectangle.

    Returns:
        Regions that cover the domain; on a segment they are in its order.

    Raises:
        ValueError: the model is not affine between the kinks that were found, or has others there; an operation of it
            is left to autodiff; or it has too many regions.
    """
    found = _along(model, domain) if len(domain.sides) == 1 else _across(model, domain)
    _check_affine(model, domain, found)
    return found


def points_of(domain: Segment | Rectangle, places: ArrayLike) -> np.ndarray:
    """The inputs `(N, …)` at places `(N, 1)` or `(N, 2)`."""
    return domain.origin + np.tensordot(np.asarray(places, "float64"), np.stack(domain.sides), axes=1)


def _along(model: keras.Layer, domain: Segment | Rectangle) -> list[Region]:
    """By bisection: a region is convex, so if two places have the same masks, all places between them do."""
    resolution = _resolution(model)
    known = dict(zip((0.0, 1.0), _masks(model, domain, [[0.0], [1.0]]), strict=True))
    wide = [(0.0, 1.0)]
    while wide := [(a, b) for a, b in wide if known[a] != known[b] and b - a > resolution]:
        middles = [(a + b) / 2 for a, b in wide]
        known |= dict(zip(middles, _masks(model, domain, np.reshape(middles, (-1, 1))), strict=True))
        wide = [half for (a, b), m in zip(wide, middles, strict=True) for half in ((a, m), (m, b))]
        if len(known) > 64 * MOST_REGIONS:
            raise _too_many(model)
    places = sorted(known)
    changes = [(a + b) / 2 for a, b in itertools.pairwise(places) if known[a] != known[b]]
    ends = [0.0, *changes, 1.0]
    return [Region(np.array([[a], [b]]), b - a) for a, b in itertools.pairwise(ends)]


def _across(model: keras.Layer, domain: Segment | Rectangle) -> list[Region]:
    """By cutting: the kinks of a layer in a polygon are known once the layers before it have no kinks left there."""
    resolution = _resolution(model)
    waiting = [np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])]
    done: list[np.ndarray] = []
    while waiting:
        lines = [line for part in _batches(waiting) for line in _first_kinks(model, domain, part, resolution)]
        cut: list[np.ndarray] = []
        for polygon, kinks in zip(waiting, lines, strict=True):
            pieces = [polygon]
            for normal, offset in kinks:
                pieces = [half for piece in pieces for half in _halves(piece, normal, offset, resolution)]
            (cut if kinks else done).extend(pieces)
        waiting = cut
        if len(waiting) + len(done) > MOST_REGIONS:
            raise _too_many(model)
    return [Region(polygon, _area(polygon)) for polygon in done]


def _first_kinks(
    model: keras.Layer, domain: Segment | Rectangle, polygons: Sequence[np.ndarray], resolution: float
) -> list[list[tuple[np.ndarray, float]]]:
    """For each polygon the lines `normal · place = offset` that are kinks of the first node which has some in it."""
    middles = np.array([polygon.mean(axis=0) for polygon in polygons])
    lin = _linearized(model, domain, middles)
    sides = [np.broadcast_to(side, (len(polygons), *side.shape)) for side in domain.sides]
    tangents = lin.tangents_by_slot(np.stack(sides))
    kinks: list[list[tuple[np.ndarray, float]]] = [[] for _ in polygons]
    for node in lin.nodes:
        if not _frozen_masks(node):
            continue
        value = node.inputs[0]
        slopes = tangents.get(value.slot)
        if slopes is None:
            continue
        heights = _rows(value.primal)
        gradients = np.stack([_rows(slope) for slope in slopes], axis=-1)
        for i, polygon in enumerate(polygons):
            if kinks[i]:
                continue
            corners = heights[i] + (polygon - middles[i]) @ gradients[i].T
            least = resolution * np.linalg.norm(gradients[i], axis=-1)
            for unit in np.flatnonzero((corners.min(0) < -least) & (corners.max(0) > least)):
                normal = gradients[i, unit]
                kinks[i].append((normal, float(normal @ middles[i] - heights[i, unit])))
    return kinks


def _halves(polygon: np.ndarray, normal: np.ndarray, offset: float, resolution: float) -> list[np.ndarray]:
    """The parts of the polygon on both sides of a line; the polygon itself, if the line does not really cross it."""
    distances = (polygon @ normal - offset) / np.linalg.norm(normal)
    if distances.min() > -resolution or distances.max() < resolution:
        return [polygon]
    sides: tuple[list, list] = ([], [])
    for i, here in enumerate(distances):
        there, following = distances[(i + 1) % len(polygon)], polygon[(i + 1) % len(polygon)]
        for side, sign in zip(sides, (1, -1), strict=True):
            if sign * here >= 0:
                side.append(polygon[i])
            if here * there < 0:
                side.append(polygon[i] + here / (here - there) * (following - polygon[i]))
    return [np.array(side) for side in sides]


def _area(polygon: np.ndarray) -> float:
    x, y = polygon.T
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)


def _check_affine(model: keras.Layer, domain: Segment | Rectangle, found: list[Region]) -> None:
    """Raises if the model is not the affine map of a region's middle at the region's corners, or kinks in between."""
    for part in _batches(found):
        middles = [region.middle for region in part]
        lin = _linearized(model, domain, middles)
        outputs, frozen = _rows(lin.outputs), _signatures(model, lin, len(part))
        for corner in range(max(len(region.corners) for region in part)):
            places = np.array([region.corners[corner % len(region.corners)] for region in part])
            steps = points_of(domain, places) - points_of(domain, middles)
            expected = outputs + _rows(lin.jvp(steps))
            received = _rows(_linearized(model, domain, places).outputs)
            off = np.abs(received - expected).max(axis=1) / (1e-3 + np.abs(received).max())
            kinks = np.zeros(len(part), bool)
            if len(domain.sides) == 2:  # On a segment all are found.
                # A region is convex. Rounding decides what is frozen at a corner itself: it is compared a bit inside.
                inside = places + INSIDE * (middles - places)
                wide = INSIDE * np.abs(places - middles).max(axis=1) > 10 * _resolution(model)
                kinks = wide & [a != b for a, b in zip(frozen, _masks(model, domain, inside), strict=True)]
            if off.max() > 1e-3 or kinks.any():
                where = part[int(kinks.argmax() if kinks.any() else off.argmax())].corners.round(6).tolist()
                raise ValueError(
                    f"Invalid value for argument `model`. Expected a piecewise affine model with masks (ReLU and its "
                    f"kin, max pooling{'' if len(domain.sides) == 1 else ' not on a rectangle'}). Received: "
                    f"`{model.name}`, which is not affine between {where}. Verify it at points instead."
                )


def _masks(model: keras.Layer, domain: Segment | Rectangle, places: ArrayLike) -> list[bytes]:
    """Everything discrete that is frozen at each place: if two places have the same, so have all between them."""
    result = []
    for part in _batches(list(places)):
        result += _signatures(model, _linearized(model, domain, part), len(part))
    return result


def _signatures(model: keras.Layer, lin: Linearization, count: int) -> list[bytes]:
    """Everything discrete that is frozen at each of so many places."""
    found = [pair for node in lin.nodes for pair in _frozen(node)]
    frozen = [_rows(value, axis) if len(value.shape) else np.zeros((0, 1), bool) for value, axis in found]
    if any(len(rows) != count for rows in frozen):
        raise ValueError(
            f"Invalid value for argument `model`. Expected one that keeps examples on the first axis where it selects "
            f"or compares. Received: `{model.name}`. Verify it at points instead."
        )
    packed = [np.packbits(rows, axis=1) if rows.dtype == bool else rows for rows in frozen]
    return [b"".join(rows[i].tobytes() for rows in packed) for i in range(count)]


def _frozen_masks(node: Node) -> list[tuple[Any, int]]:
    """The masks of a node that depend on the input, with the axis of the examples in each."""
    if node.pushforward is None:
        return []
    frozen = node.pushforward
    gates = zip(frozen.residuals, frozen.batch_axes, frozen.masks, strict=True)
    return [(mask(r), axis) for r, axis, mask in gates if mask and axis is not None and not node.is_constant(r)]


def _frozen(node: Node) -> list[tuple[Any, int]]:
    """The masks of a node, the indices by which it selects, and what it computes without a slope: signs, comparisons.

    A mask may stand for two sides, as that of a clip does for what is below and above: then they are told apart.
    """
    if node.pushforward is None:
        return [(value.primal, 0) for value in node.outputs if value.batched]
    found, frozen = _frozen_masks(node), node.pushforward
    placed = [(r, axis) for r, axis in zip(frozen.residuals, frozen.batch_axes, strict=True) if axis is not None]
    indices = [(r, axis) for r, axis in placed if "int" in _dtype(r) and not node.is_constant(r)]
    x, y = node.inputs[0].primal, node.outputs[0].primal
    sides = [
        (side, axis)
        for mask, axis in (found if len(node.inputs) == 1 else [])
        if tuple(mask.shape) == tuple(x.shape) == tuple(y.shape)
        for side in (x > 0, ops.logical_and(ops.logical_not(mask), _is_below(x, y)))
    ]
    return found + indices + sides


def _is_below(x: Tensor, y: Tensor) -> Tensor:
    """Where y = f(x) is cut off from below. A bound itself is on its side, so that it is no region of its own."""
    return ops.logical_or(y > x, ops.logical_and(ops.equal(y, x), x <= 0))


def _dtype(tensor: Tensor) -> str:
    return keras.backend.standardize_dtype(tensor.dtype)


def _linearized(model: keras.Layer, domain: Segment | Rectangle, places: ArrayLike) -> Linearization:
    lin = linearize(model, points_of(domain, places).astype(model.variable_dtype), fallback="ignore")
    if lin.fallbacks:
        raise ValueError(
            "Invalid value for argument `model`. Expected one whose operations all have a rule, so that their kinks "
            f"are known. Received: `{model.name}`, of which {list(lin.fallbacks)} are left to autodiff. Verify it at "
            "points instead."
        )
    return lin


def _rows(tensor: Tensor, axis: int = 0) -> np.ndarray:
    """The tensor as `(B, n)`."""
    array = np.moveaxis(ops.convert_to_numpy(tensor), axis, 0)
    array = array if array.dtype == bool else array.astype("float64")
    return array.reshape(len(array), -1)


def _batches(items: list) -> list[list]:
    return [items[start : start + BATCH] for start in range(0, len(items), BATCH)]


def _resolution(model: keras.Layer) -> float:
    return RESOLUTION.get(model.variable_dtype, RESOLUTION["float32"])


def _too_many(model: keras.Layer) -> ValueError:
    return ValueError(
        f"`{model.name}` has more than {MOST_REGIONS} affine regions here. Expected a smaller model or domain. Verify "
        "it at points instead."
    )
