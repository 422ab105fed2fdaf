"""Where the examples of a batch are: which axis of a value is theirs after each operation, and where they mix."""

import math
import string
from collections.abc import Callable, Sequence
from typing import NamedTuple

import keras
from keras import tree

from jvpreg.common.keras_private import Operations, core, image, linalg, math_ops, nn, numpy_ops


class Place(NamedTuple):
    """The axis of the examples in a value, of size `before · B · after`: other axes may be merged into it.

    `mixed` is whether an entry depends on other examples than that of its own row.
    """

    axis: int
    before: int = 1
    after: int = 1
    mixed: bool = False


FIRST = Place(0)
MIXED = Place(-1, mixed=True)
"""The place in a value that holds no example, or whose examples are at an unknown axis."""
GONE = Place(-2, mixed=True)
"""The place in a value that was reduced over its examples: it has no axis for them, and is the same for all."""


def kept(*places: Place | None) -> Place:
    """The place after an entrywise operation: that of all inputs that have examples; None is a weight or constant."""
    known = [place for place in places if place is not None]
    where = {place._replace(mixed=False) for place in known}
    return where.pop()._replace(mixed=any(place.mixed for place in known)) if len(where) == 1 else MIXED


class broadcast:  # noqa: N801 -- called like the functions beside it
    """As `kept`, for inputs of these ranks, which are broadcast to the largest."""

    def __init__(self, *ranks: int):
        self.ranks = ranks

    def __call__(self, *places: Place | None) -> Place:
        """The place in the output."""
        pairs = zip(places, self.ranks, strict=True)
        return kept(*(p and p._replace(axis=p.axis + max(self.ranks) - rank) for p, rank in pairs))


def besides(axes, rank: int) -> Callable:
    """As `kept`, for an operation along these axes: it mixes examples that lie along one of them."""
    axes = [axis % rank for axis in tree.flatten(axes)]

    def after(*places):
        place = kept(*places)
        return place._replace(mixed=True) if place.axis in axes else place

    return after


def _classes(operations: Operations, names: str) -> tuple[type, ...]:
    """The classes of these names that this version of Keras has."""
    return tuple(vars(operations)[name] for name in names.split() if name in vars(operations))


_ENTRYWISE = (
    *_classes(core, "Cast SaturateCast StopGradient"),
    *_classes(nn, "SparseSigmoid SoftShrink SparsePlus HardShrink Threshold Polar"),
    *_classes(math_ops, "Erf Erfc Erfinv"),
    *_classes(
        numpy_ops,
        "Abs Absolute Angle BitwiseAnd BitwiseInvert BitwiseLeftShift BitwiseNot BitwiseOr BitwiseRightShift "
        "BitwiseXor Cbrt Ceil Conj Conjugate Deg2rad Digitize DivideNoNan EmptyLike Equal Fabs Floor FloorDivide Fmax "
        "Fmin Fmod FullLike Gcd Greater GreaterEqual Heaviside Hypot I0 Imag Isclose Isfinite Isinf Isnan Isneginf "
        "Isposinf Isreal Lcm Ldexp LeftShift Less LessEqual Logaddexp2 LogicalAnd LogicalNot LogicalOr LogicalXor Mod "
        "NanToNum Nextafter NotEqual OnesLike Rad2deg Real RightShift Round Sign Signbit Sinc Trunc ZerosLike",
    ),
)
_LEADING = {
    # The lowest rank at which the first axis is that of a batch.
    3: (
        *_classes(nn, "AdaptiveAveragePool AdaptiveMaxPool AveragePool Fold MaxPool"),
        *_classes(linalg, "Cholesky CholeskyInverse Det Eig Eigh Inv LuFactor Pinv Qr SVD"),
        *_classes(numpy_ops, "Slogdet"),
        *_classes(math_ops, "FFT2 IFFT2 ISTFT Logdet"),
    ),
    4: (
        *_classes(nn, "DepthToSpace SpaceToDepth Unfold"),
        *_classes(
            image,
            "AffineTransform CropImages ElasticTransform ExtractPatches GaussianBlur HSVToRGB PadImages "
            "PerspectiveTransform RGBToGrayscale RGBToHSV Resize ScaleAndTranslate SobelEdges",
        ),
    ),
    2: _classes(math_ops, "ExtractSequences FFT IRFFT RFFT STFT TopK ViewAsComplex ViewAsReal"),
}


def of_class(operation, shapes: Sequence[tuple]) -> Callable:
    """Where the examples are after an operation whose rule does not say so, by its class and its inputs' shapes."""
    if isinstance(operation, keras.Layer) or type(operation).__module__.split(".")[0] != "keras":
        # A layer, or somebody's own operation or function, is taken to work example by example.
        return _first_or_mixed
    if isinstance(operation, _ENTRYWISE):
        return broadcast(*map(len, shapes))
    if isinstance(operation, nn.OneHot):
        return kept if operation.axis == -1 else lambda *places: MIXED
    if len({len(shape) for shape in shapes}) == 1:
        return along(operation, shapes[0])
    return lambda *places: MIXED


def _first_or_mixed(*places: Place) -> Place:
    place = kept(*places)
    return place if place._replace(mixed=False) == FIRST else MIXED


_MOVES = (numpy_ops.Transpose, numpy_ops.Swapaxes, numpy_ops.Moveaxis)
_REMOVES = (core.Unstack, numpy_ops.Squeeze, numpy_ops.Diagonal, numpy_ops.Trace, numpy_ops.Trapezoid)
_REDUCES = (
    linalg.Norm,
    math_ops.Logsumexp,
    nn.Moments,
    numpy_ops.All,
    numpy_ops.Amax,
    numpy_ops.Amin,
    numpy_ops.Any,
    numpy_ops.Argmax,
    numpy_ops.Argmin,
    numpy_ops.Max,
    numpy_ops.Mean,
    numpy_ops.Median,
    numpy_ops.Min,
    numpy_ops.Percentile,
    numpy_ops.Prod,
    numpy_ops.Quantile,
    numpy_ops.Std,
    numpy_ops.Sum,
    numpy_ops.Var,
)


def along(operation, shape: tuple) -> Callable:
    """Where the examples are after an operation that works along axes of tensors of this shape."""
    rank = len(shape)

    def after(*places):
        place = kept(*places)
        if place in (MIXED, GONE):
            return place
        if isinstance(operation, _MOVES):
            return place._replace(axis=_order(operation, rank).index(place.axis))
        if isinstance(operation, numpy_ops.Ravel):
            return reshaped(shape, (-1,))(place)
        if isinstance(operation, (numpy_ops.ExpandDims, numpy_ops.Stack)):
            new = [axis % (rank + 1) for axis in tree.flatten(operation.axis)]
            return place._replace(axis=place.axis + sum(axis <= place.axis for axis in new)) if len(new) == 1 else MIXED
        if isinstance(operation, numpy_ops.Tile):
            repeats = [operation.repeats] if isinstance(operation.repeats, int) else list(operation.repeats)
            repeats = [1] * (rank - len(repeats)) + repeats
            axis = place.axis + len(repeats) - rank
            return place._replace(axis=axis) if repeats[axis] == 1 else MIXED
        axes = _axes(operation, rank)
        if place.axis in axes:
            return GONE if isinstance(operation, _REDUCES) else MIXED
        if isinstance(operation, _REMOVES) or (isinstance(operation, _REDUCES) and not operation.keepdims):
            return place._replace(axis=place.axis - sum(axis < place.axis for axis in axes))
        return place

    return after


def looked_up(operation, x, index_rank: int) -> Callable:
    """Where the examples are after `take` or `take_along_axis`, of a tensor of examples or of a table."""
    axis = None if operation.axis is None else operation.axis % len(x.shape)
    whole = isinstance(operation, numpy_ops.Take)

    def after(place, *of_index):
        if axis is None:
            return MIXED
        known = [p for p in of_index if p is not None]
        if place is None:  # A table.
            return kept(*known)._replace(axis=known[0].axis + axis * whole) if len(known) == 1 else MIXED
        if place.axis == axis or (known and whole):
            return MIXED
        moved = place._replace(axis=place.axis + (index_rank - 1) * (whole and axis < place.axis))
        return kept(moved, *known)

    return after


def joined(operation, x) -> Callable:
    """Where the examples are after tensors like x were concatenated or stacked."""
    if isinstance(operation, numpy_ops.Vstack):
        return besides([0], len(x.shape))
    if isinstance(operation, numpy_ops.Hstack):
        return besides([min(1, len(x.shape) - 1)], len(x.shape))
    return along(operation, x.shape)


def _order(operation, rank: int) -> list[int]:
    """The axes of its input in the order of its output."""
    if isinstance(operation, numpy_ops.Transpose):
        return [axis % rank for axis in operation.axes] if operation.axes else list(range(rank))[::-1]
    order = list(range(rank))
    if isinstance(operation, numpy_ops.Swapaxes):
        first, second = operation.axis1 % rank, operation.axis2 % rank
        order[first], order[second] = second, first
        return order
    source, destination = ([axis % rank for axis in tree.flatten(a)] for a in (operation.source, operation.destination))
    order = [axis for axis in order if axis not in source]
    for to, axis in sorted(zip(destination, source, strict=True)):
        order.insert(to, axis)
    return order


def _axes(operation, rank: int) -> list[int]:
    """The axes along which an operation works; no axis means all of them, or the flat tensor."""
    if isinstance(operation, numpy_ops.Pad):
        widths = tree.flatten(operation.pad_width)
        pairs = [widths[i : i + 2] for i in range(0, len(widths), 2)] if len(widths) == 2 * rank else [widths] * rank
        return [axis for axis, pair in enumerate(pairs) if any(pair)]
    if isinstance(operation, (numpy_ops.Tril, numpy_ops.Triu)):
        return [rank - 2, rank - 1]
    named = ("axis", "axes", "axis1", "axis2")
    given = [getattr(operation, name) for name in named if hasattr(operation, name)]
    if isinstance(operation, (numpy_ops.Array, numpy_ops.Copy)):
        return []
    if isinstance(operation, (numpy_ops.Fliplr, numpy_ops.Flipud)):
        return [int(isinstance(operation, numpy_ops.Fliplr))]
    if not given:
        # All but the first axis of a batch; all axes if it is not known that there is a batch.
        return list(range(int(has_batch(operation, rank)), rank))
    if any(axes is None for axes in given):
        return list(range(rank))
    return [axis % rank for axes in given for axis in tree.flatten(axes)]


def has_batch(operation, rank: int) -> bool:
    """Whether an operation takes the first axis of a tensor of this rank for that of a batch."""
    rank -= bool(getattr(operation, "is_3d", False))  # patches of volumes
    return any(isinstance(operation, classes) and rank >= least for least, classes in _LEADING.items())


def reshaped(before, after) -> Callable:
    """Where the examples are after a reshape of the sizes `before` to those of `after`, one of which may be -1."""

    def place_after(place):
        leading = _product(before[: place.axis])
        trailing = _product(before[place.axis + 1 :])
        if leading is None or trailing is None:
            return place if place == FIRST and not moves_examples(before, after) else MIXED
        leading, trailing = leading * place.before, trailing * place.after
        found = []
        for axis in range(len(after)):
            left, right = _product(after[:axis]), _product(after[axis + 1 :])
            if left and right and leading % left == 0 and trailing % right == 0:
                found.append(Place(axis, leading // left, trailing // right))
        # Axes of size 1 may leave several: the axis of the examples alone comes first.
        return min(found, key=lambda place: (place.before * place.after, place.axis), default=MIXED)

    return place_after


def _product(sizes) -> int | None:
    return math.prod(sizes) if all(isinstance(size, int) and size != -1 for size in sizes) else None


def moves_examples(before, after) -> bool:
    """Whether a reshape moves the examples to another axis, as far as the sizes `(B, …)` are known."""
    sizes = [*before[1:], *after[1:]]
    known = all(isinstance(size, int) and size != -1 for size in sizes)
    return known and math.prod(before[1:]) != math.prod(after[1:])


def indexed(key, rank: int) -> Callable:
    """Where the examples are after `x[key]`. They stay together if the key takes a whole slice of their axis."""
    keys = list(key) if isinstance(key, (tuple, list)) else [key]
    simple = all(entry is None or entry is Ellipsis or isinstance(entry, (int, slice)) for entry in keys)
    taken = sum(isinstance(entry, (int, slice)) for entry in keys)
    if Ellipsis not in [entry for entry in keys if entry is None or entry is Ellipsis]:
        keys.append(Ellipsis)
    axes: list[int | None] = []  # of the input, for each of the output
    axis = 0
    whole, picked = set(range(rank)), set()
    for entry in keys:
        if entry is None:
            axes.append(None)
        elif entry is Ellipsis:
            axes += range(axis, axis + rank - taken)
            axis += rank - taken
        else:
            if isinstance(entry, slice):
                axes.append(axis)
            else:
                picked.add(axis)
            if entry != slice(None):
                whole.discard(axis)
            axis += 1

    def after(place, *of_key):
        if not simple:  # Tensors in a key move axes by NumPy's rules, but leave a first axis that is taken whole.
            first_is_whole = keys[0] is Ellipsis or (isinstance(keys[0], slice) and keys[0] == slice(None))
            if place is None:
                return MIXED if first_is_whole else kept(*of_key)
            return FIRST if place == FIRST and first_is_whole else MIXED
        if place.axis in whole:
            return place._replace(axis=axes.index(place.axis))
        return GONE if place.axis in picked else MIXED

    return after


def multiplied(operation, ranks: list[int]) -> Callable:
    """Where the examples are in a product of tensors of these ranks, which has axes of both: `matmul`, `einsum` etc."""
    if isinstance(operation, (numpy_ops.Correlate, numpy_ops.Kron, numpy_ops.Outer, numpy_ops.Vdot)):
        return lambda *places: MIXED  # Their operands are flat, or every axis is.

    def after(*places):
        letters, result = _letters(operation, ranks)
        found = {(letters[i][p.axis], p.before, p.after) for i, p in enumerate(places) if p is not None}
        if len(found) != 1:
            return MIXED
        ((letter, *merged),) = found
        return Place(result.index(letter), *merged) if letter in result else GONE

    return after


def _letters(operation, ranks: list[int]) -> tuple[list[str], str]:
    """A product's operands and its result as an einsum has them, a letter for each axis."""
    if isinstance(operation, numpy_ops.Einsum):
        operands, arrow, result = operation.subscripts.replace(" ", "").partition("->")
        free = sorted(letter for letter in set(operands) - {",", "."} if operands.count(letter) == 1)
        # An ellipsis stands for axes that are broadcast.
        given, dots = operands.replace("...", ".").split(","), string.digits
        counts = [rank - len(term.replace(".", "")) for term, rank in zip(given, ranks, strict=True)]
        spelled = [term.replace(".", dots[10 - count :]) for term, count in zip(given, counts, strict=True)]
        return spelled, (result if arrow else "..." + "".join(free)).replace("...", dots[10 - max(counts) :])
    left, right = string.ascii_lowercase[: ranks[0]], string.ascii_uppercase[: ranks[1]]
    if isinstance(operation, numpy_ops.Tensordot):
        axes = operation.axes
        pairs = (
            zip(range(ranks[0] - axes, ranks[0]), range(axes), strict=True)
            if isinstance(axes, int)
            else zip(*(tree.flatten(side) for side in axes), strict=True)
        )
        contracted = [(left[i], right[j]) for i, j in pairs]
    else:
        behind = ranks[1] == 1 or isinstance(operation, numpy_ops.Inner)
        contracted = [(left[-1], right[-1 if behind else -2])] if min(ranks) else []
        if isinstance(operation, numpy_ops.Matmul):  # whose axes before the matrices are broadcast
            shared = zip(left[-3::-1], right[-3::-1], strict=False) if min(ranks) > 2 else ()
            for i, j in shared:
                right = right.replace(j, i)
    for i, j in contracted:
        left, right = left.replace(i, "*"), right.replace(j, "*")
    if isinstance(operation, numpy_ops.Matmul) and min(ranks) > 1:
        batch = max(left[:-2], right[:-2], key=len)
        return [left, right], batch + left[-2] + right[-1]
    return [left, right], (left + right).replace("*", "")


def cuts(operation) -> bool:
    """Whether an operation does the same to a part of the batch as to all of it, on whichever axis the examples are."""
    return not isinstance(operation, (numpy_ops.Reshape, numpy_ops.BroadcastTo))


def makes_rows(operation) -> bool:
    """Whether an operation may make rows for the examples out of a value that is the same for all of them."""
    return isinstance(operation, (numpy_ops.Reshape, numpy_ops.BroadcastTo, numpy_ops.Repeat, numpy_ops.Tile))
