"""`verify`: where a trained model violates a constraint, and by how much."""

from dataclasses import dataclass, field

import keras
import numpy as np
from keras import ops, tree

from jvpreg.common import checks, seeds
from jvpreg.common.typing import ArrayLike, Structure
from jvpreg.constraints.base import Constraint
from jvpreg.constraints.regions import Rectangle, Region, Segment, points_of, regions
from jvpreg.engine.finite import nan_unless
from jvpreg.products import linearize
from jvpreg.regularizers.serving import packed, serve
from jvpreg.rules.registry import unwrap

BATCH = 256
SHOWN = 3


@dataclass(frozen=True, repr=False)
class Report:
    """The violations at given points.

    Attributes:
        constraint: the constraint.
        violations: of the largest component at each point, `(N,)`.
        components: the violations of all components, `(N, C)`.
        tolerance: above which a point counts as violated.
        mean, max: of the violations.
        violated: the fraction of points.
        worst: the indices of the violated points, the worst first.
        holds: whether no point is violated.
    """

    constraint: Constraint
    components: np.ndarray
    tolerance: float
    violations: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "violations", self.components.max(axis=1))

    @property
    def mean(self) -> float:
        """The mean over the points."""
        return float(self.violations.mean())

    @property
    def max(self) -> float:
        """The maximum over the points."""
        return float(self.violations.max())

    @property
    def violated(self) -> float:
        """The fraction of points."""
        return float(np.mean(self._is_violated))

    @property
    def holds(self) -> bool:
        """Whether no point is violated."""
        return self.violated == 0

    @property
    def worst(self) -> np.ndarray:
        """The indices of the violated points, the worst first."""
        order = np.argsort(-np.where(np.isnan(self.violations), np.inf, self.violations), kind="stable")
        return order[self._is_violated[order]]

    @property
    def _is_violated(self) -> np.ndarray:
        # A violation of NaN counts as violated: it proves nothing.
        return ~(self.violations <= self.tolerance)

    def __repr__(self) -> str:
        count = len(self.violations)
        lines = [
            f"`{self.constraint.name}` ({type(self.constraint).__name__}) "
            f"{'holds' if self.holds else f'is violated at {len(self.worst)} of'}{' at' if self.holds else ''} "
            f"{count} points: mean {self.mean:.3g}, max {self.max:.3g} (tolerance {self.tolerance:g})"
        ]
        for point in self.worst[:SHOWN]:
            component = int(self.components[point].argmax())
            lines.append(f"  point {point}: {self.violations[point]:.3g}, in component {component}")
        return "\n".join(lines)


@dataclass(frozen=True, repr=False)
class ExactReport(Report):
    """The violation in every affine region of a segment or a rectangle: `Report` with regions in place of points.

    Attributes:
        regions: the regions: their corners, in coordinates of the domain, and the fraction of it that they cover.
        mean: over the domain, each region weighed by its size.
        violated: the fraction of the domain.
    """

    regions: list[Region] = field(default_factory=list)

    @property
    def sizes(self) -> np.ndarray:
        """The fraction of the domain that each region covers, `(N,)`."""
        return np.array([region.size for region in self.regions])

    @property
    def mean(self) -> float:
        """The mean over the domain."""
        return float(self.sizes @ self.violations)

    @property
    def violated(self) -> float:
        """The violated fraction of the domain."""
        return float(self.sizes @ self._is_violated)

    @property
    def holds(self) -> bool:
        """Whether no region is violated, however small it is."""
        return len(self.worst) == 0

    def __repr__(self) -> str:
        lines = [
            f"`{self.constraint.name}` ({type(self.constraint).__name__}) "
            f"{'holds' if self.holds else 'is violated'} in {'all' if self.holds else len(self.worst)} of "
            f"{len(self.regions)} affine regions, {100 * self.violated:.3g} % of the domain: mean {self.mean:.3g}, "
            f"max {self.max:.3g} (tolerance {self.tolerance:g})"
        ]
        for i in self.worst[:SHOWN]:
            corners = ", ".join("(" + ", ".join(f"{c:.4g}" for c in corner) + ")" for corner in self.regions[i].corners)
            lines.append(f"  between {corners}: {self.violations[i]:.3g}")
        return "\n".join(lines)


def verify(
    model: keras.Layer, constraint: Constraint, x: Structure, labels: Structure | None = None, seed: int = 0
) -> Report:
    """Where a model violates a constraint, and by how much, in inference mode.

    Args:
        model: a Keras model, or a `JacobianModel`.
        constraint: any constraint. Its enforcement does not matter, nor the points of its `at`.
        x: points `(N, …)`; or a `Segment` or a `Rectangle`, on which every affine region of a piecewise affine model is
            found, so that nothing is left out. The constraint must then be one on `J` in directions that are the same
            everywhere, and the model's kinks those of masks: ReLU and similar ones, on a segment also max pooling and
            what else selects (`sort`, `top_k`, comparisons).
            Regions narrower than a millionth of the domain (1e-12 in float64) are not found.
        labels: for `KnownDerivative`, a dict of `(N, …)`.
        seed: of random directions.

    Returns:
        A `Report`, or an `ExactReport`. If an output of the model is not finite, the violation is NaN, and counts as
        violated.

    Raises:
        ValueError: `x` or a label is not finite; the constraint does not fit the model; on a segment or a rectangle,
            the model is not piecewise affine, has too many regions, or the constraint is not constant in them.

    Example:

    >>> import keras, numpy as np
    >>> from jvpreg import constraints
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1), keras.layers.ReLU()])
    >>> model.set_weights([np.array([[-2.0]]), np.array([1.0])])
    >>> constraints.verify(model, constraints.Monotone([0]), np.array([[0.0], [1.0], [2.0]]))
    `monotone` (Monotone) is violated at 1 of 3 points: mean 0.667, max 2 (tolerance 0.001)
      point 0: 2, in component 0
    >>> constraints.verify(model, constraints.Monotone([0]), constraints.Segment([0.0], [1.0]))
    `monotone` (Monotone) is violated in 1 of 2 affine regions, 50 % of the domain: mean 1, max 2 (tolerance 0.001)
      between (0), (0.5): 2
    """
    if not isinstance(constraint, Constraint):
        raise checks.invalid("constraint", "one of `jvpreg.constraints`", constraint)
    seed = checks.seed("seed", seed)
    model = unwrap(model)
    _check_finite("labels", labels)
    if not isinstance(model, keras.Operation):
        raise checks.invalid("model", "a Keras model", model)
    if not isinstance(x, (Segment, Rectangle)):
        _check_finite("x", x)
        return Report(constraint, _violations(model, constraint, x, labels, seed), constraint.tolerance)
    if not constraint.is_constant_in_regions:
        raise ValueError(
            f"Invalid value for argument `constraint`. Expected one on `J` in directions that are the same everywhere, "
            f"which is constant in an affine region. Received: `{constraint.name}` ({type(constraint).__name__}). "
            "Verify it at points instead."
        )
    found = regions(model, x)
    middles = points_of(x, [region.middle for region in found]).astype(model.variable_dtype)
    components = _violations(model, constraint, middles, None, seed)
    return ExactReport(constraint, components, constraint.tolerance, regions=found)


def _violations(
    model: keras.Layer, constraint: Constraint, x: Structure, labels: Structure | None, seed: int
) -> np.ndarray:
    """The violations at all points, computed batch by batch: `(N, C)`."""
    leaves = [checks.tensor("x", leaf) for leaf in tree.flatten(x)]
    if not leaves or any(len(leaf.shape) == 0 or leaf.shape[0] != leaves[0].shape[0] for leaf in leaves):
        raise checks.invalid("x", "points (N, …), as many in each input", x)
    count = leaves[0].shape[0]
    if count == 0:
        raise checks.invalid("x", "points (N, …), one at least", x)
    for leaf in [leaf for leaf in tree.flatten(labels) if leaf is not None]:
        if np.shape(leaf)[:1] != (count,):
            raise checks.invalid("labels", f"a dict of arrays ({count}, …)", labels)
    generator = seeds.generator(seed)
    parts = []
    for start in range(0, count, BATCH):
        batch, own = tree.map_structure(
            lambda t, start=start: t[start : start + BATCH], (x, labels), none_is_leaf=False
        )
        lin = linearize(model, batch)
        constraint.check(packed(lin.inputs), lin.outputs)
        (seen,) = serve([constraint], lin, generator, labels=[own]).seen()
        parts.append(ops.convert_to_numpy(nan_unless(seen.finite, constraint.violation(seen))))
    return np.concatenate(parts)


def _check_finite(argument: str, given: ArrayLike) -> None:
    """Raises unless all numbers are finite: the slope of a ReLU at NaN is 0, which satisfies any bound."""
    for leaf in tree.flatten(given):
        array = np.atleast_1d(0 if leaf is None else ops.convert_to_numpy(checks.tensor(argument, leaf)))
        finite = array.dtype.kind in "iub" or np.isfinite(array)
        if not np.all(finite):
            examples = np.unique(np.nonzero(np.logical_not(finite))[0])
            raise ValueError(
                f"Invalid value for argument `{argument}`. Expected finite numbers. Received: NaN or infinity in "
                f"{len(examples)} of {len(array)} examples, the first of which is {examples[0]}."
            )
