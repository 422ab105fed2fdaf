"""Constraints on slopes: monotone, bounded, Lipschitz, invariant, or known."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import keras
from keras import ops, tree

from jvpreg import probes
from jvpreg.common import checks
from jvpreg.common.typing import Config, DirectionsLike, Seed, Structure, Tensor
from jvpreg.constraints.base import Constraint, by_example
from jvpreg.constraints.directions import Directions
from jvpreg.estimators.norms import root
from jvpreg.estimators.operator import flatten
from jvpreg.regularizers.base import Seen


class _Directed(Constraint):
    """A constraint on `J u` in given directions, with a multiplier for each direction and output."""

    def __init__(self, directions: DirectionsLike, argument: str, arguments: dict, features_only: bool = False):
        super().__init__(**arguments)
        self._directions = Directions(directions, argument, features_only)

    def check(self, inputs: Structure, outputs: Structure) -> None:
        """Raises a ValueError if the directions do not fit the inputs."""
        super().check(inputs, outputs)
        self._directions.check(inputs)

    def directions(self, inputs: Structure, labels: Structure | None, seed: Seed) -> Structure:
        """The directions, `(P, B, …)`."""
        return self._directions(inputs)

    def components(self, outputs: Structure) -> int:
        """One for each direction and output, if the number of directions is known."""
        count = self._directions.count
        return 1 if count is None else count * probes.dimension(outputs)

    @property
    def is_constant_in_regions(self) -> bool:
        """True unless the directions are a function of the inputs."""
        return not self._directions.functions


@keras.saving.register_keras_serializable(package="jvpreg")
class Monotone(_Directed):
    """`J e_i ≥ 0` for each feature i, and each output; or `≤ 0`.

    Args:
        features: indices of features, for inputs `(B, D)`: a list, a range or an array of integers.
        increasing: whether the outputs rise with the features; otherwise they fall.
        **arguments: of every `Constraint`: `enforcement`, `at`, `tolerance`, `name`.

    The violation of a component is `max(0, −J e_i)`, with a multiplier for each feature and output.

    Raises:
        ValueError: an argument is out of its range; in `compile`, there is no such feature, or another constraint
            contradicts it.

    Reference: Balestriero & Baraniuk (2021), "Fast Jacobian-Vector Product for Deep Networks", section 1.

    Example:

    >>> import keras, numpy as np, jvpreg
    >>> from jvpreg import constraints
    >>> model = jvpreg.JacobianModel(keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)]))
    >>> rising = constraints.Monotone([0, 2], enforcement=constraints.AugmentedLagrangian(rho=1.0), at="between")
    >>> model.compile(loss="mse", jacobian_regularizers=[rising])
    >>> history = model.fit(np.eye(3), np.ones((3, 1)), verbose=0)
    >>> sorted(history.history)  # doctest: +NORMALIZE_WHITESPACE
    ['loss', 'monotone', 'monotone/multiplier_max', 'monotone/violated', 'monotone/violation_max',
     'monotone/violation_mean']
    """

    def __init__(self, features: Sequence[int], increasing: bool = True, **arguments: Any):
        super().__init__(features, "features", arguments, features_only=True)
        self.features = list(self._directions.features or [])
        self.increasing = checks.boolean("increasing", increasing)

    def violation(self, seen: Seen) -> Tensor:
        """`max(0, −J e_i)`, or `max(0, J e_i)`."""
        slopes = by_example(seen.jvp)
        return ops.relu(-slopes if self.increasing else slopes)

    def intervals(self) -> dict[int, tuple[float, float]]:
        """The slopes above or below zero."""
        return dict.fromkeys(self.features, (0.0, math.inf) if self.increasing else (-math.inf, 0.0))

    def get_config(self) -> Config:
        """The arguments of `__init__`."""
        return {**super().get_config(), "features": self.features, "increasing": self.increasing}


@keras.saving.register_keras_serializable(package="jvpreg")
class Bounded(_Directed):
    """`low ≤ J u ≤ high` for each direction u, and each output.

    Args:
        low: the smallest slope; None: unbounded.
        high: the largest slope; None: unbounded.
        directions: a list of features, for inputs `(B, D)`; an array `(P, …)`, the same directions for each example;
            or a function of the inputs that returns `(P, B, …)`.
        **arguments: of every `Constraint`: `enforcement`, `at`, `tolerance`, `name`.

    Raises:
        ValueError: an argument is out of its range; in `compile`, the directions do not fit, or another constraint
            contradicts it.

    Reference: Balestriero & Baraniuk (2021), section 1.

    Example:

    >>> import jvpreg
    >>> jvpreg.constraints.Bounded(-1.0, 1.0, directions=[0]).intervals()
    {0: (-1.0, 1.0)}
    """

    def __init__(self, low: float | None, high: float | None, directions: DirectionsLike, **arguments: Any):
        super().__init__(directions, "directions", arguments)
        self.low = -math.inf if low is None else checks.number("low", low, below=math.inf, finite=False)
        self.high = math.inf if high is None else checks.number("high", high, above=-math.inf, finite=False)
        if (self.low, self.high) == (-math.inf, math.inf):
            raise checks.invalid("low", f"a bound if `high` is none, which is {high!r}", low)
        if self.low > self.high:
            raise checks.invalid("low", f"a bound that is not above `high`, which is {high!r}", low)

    def violation(self, seen: Seen) -> Tensor:
        """By how much a slope is below `low`, or above `high`."""
        slopes = by_example(seen.jvp)
        parts = [ops.relu(self.low - slopes)] if self.low > -math.inf else []
        parts += [ops.relu(slopes - self.high)] if self.high < math.inf else []
        return sum(parts)

    def intervals(self) -> dict[int, tuple[float, float]]:
        """The bounds, if the directions are features."""
        return dict.fromkeys(self._directions.features or [], (self.low, self.high))

    def get_config(self) -> Config:
        """The arguments of `__init__`."""
        low, high = (None if math.isinf(bound) else bound for bound in (self.low, self.high))
        return {**super().get_config(), "low": low, "high": high, "directions": self._directions.given}


@keras.saving.register_keras_serializable(package="jvpreg")
class Invariant(_Directed):
    """`J u = 0` along tangents u of what must not change the outputs.

    Args:
        tangents: a field of directions: a function of the inputs that returns `(P, B, …)`, one of
            `jvpreg.constraints.tangents`, a list of such functions, or what `Bounded` takes as directions.
        **arguments: of every `Constraint`: `enforcement`, `at`, `tolerance`, `name`.

    The violation of a component is `abs(J u)`. Each direction and output has a multiplier if the number of directions
    is known; otherwise all share one.

    Raises:
        ValueError: an argument is out of its range; in `compile`, the directions do not fit.

    Reference: Balestriero & Baraniuk (2021), section 1; Simard, Victorri, LeCun & Denker (1991), "Tangent prop".

    Example:

    >>> from jvpreg.constraints import Invariant, Penalty, tangents
    >>> Invariant([tangents.Translation(), tangents.Rotation()], enforcement=Penalty(0.1)).name
    'invariant'
    """

    def __init__(self, tangents: DirectionsLike, **arguments: Any):
        super().__init__(tangents, "tangents", arguments)

    def violation(self, seen: Seen) -> Tensor:
        """`abs(J u)`."""
        return ops.abs(by_example(seen.jvp))

    def get_config(self) -> Config:
        """The arguments of `__init__`."""
        return {**super().get_config(), "tangents": self._directions.given}


@keras.saving.register_keras_serializable(package="jvpreg")
class KnownDerivative(_Directed):
    """`J u = t(x)`: derivatives that are known, at the data or as a function (Sobolev training).

    Args:
        targets: a key in the dict of labels given to `fit`. Its entry is `(B, …)` with P·K numbers for each example,
            directions before outputs. The loss and the metrics do not get it; they get the other entries (a single one
            by itself, not in a dict). Or a function of the inputs that returns such a tensor.
        directions: as `Bounded` takes them; `[0, …, D − 1]` for whole gradients.
        **arguments: of every `Constraint`: `enforcement`, `at`, `tolerance`, `name`.

    The violation of a component is `abs(J u − t)`.

    Raises:
        ValueError: an argument is out of its range; in `fit`, there is no such label, or it does not fit.

    Reference: Czarnecki, Osindero, Jaderberg, Świrszcz & Pascanu (2017), "Sobolev training for neural networks".

    Example:

    >>> import keras, numpy as np, jvpreg
    >>> model = jvpreg.JacobianModel(keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)]))
    >>> known = jvpreg.constraints.KnownDerivative("slope", directions=[0], enforcement=10.0)
    >>> model.compile(loss="mse", jacobian_regularizers=[known])
    >>> x = np.linspace(0.0, 1.0, 8).reshape(-1, 1)
    >>> history = model.fit(x, {"value": np.sin(x), "slope": np.cos(x)}, verbose=0)
    >>> "known_derivative/violation_mean" in history.history
    True
    """

    def __init__(self, targets: str | Callable, directions: DirectionsLike, **arguments: Any):
        super().__init__(directions, "directions", arguments)
        if not isinstance(targets, str) and not callable(targets):
            raise checks.invalid("targets", "a key of the labels, or a function of the inputs", targets)
        if isinstance(targets, str) and callable(self.at):
            at = super().get_config()["at"]  # as the user wrote it
            raise ValueError(
                "Invalid value for argument `targets`. Expected a function of the inputs, since points other than the "
                f"data have no labels. Received: targets={targets!r}, at={at!r}"
            )
        self.targets = targets
        self.label_keys = (targets,) if isinstance(targets, str) else ()

    def violation(self, seen: Seen) -> Tensor:
        """`abs(J u − t)`."""
        slopes = by_example(seen.jvp)
        targets = ops.convert_to_tensor(self._targets_of(seen), dtype=slopes.dtype)
        size = math.prod(targets.shape[1:])
        if size != slopes.shape[1]:
            count = tree.flatten(seen.directions)[0].shape[0]
            raise ValueError(
                f"`{self.name}` ({type(self).__name__}) got targets that do not fit. Expected (B, …) with "
                f"{slopes.shape[1]} numbers an example, for {count} direction(s) and the outputs. "
                f"Received: {tuple(targets.shape)}"
            )
        return ops.abs(slopes - ops.reshape(targets, ops.shape(slopes)))

    def _targets_of(self, seen: Seen) -> Tensor:
        if not isinstance(self.targets, str):
            return self.targets(seen.inputs)
        if not isinstance(seen.labels, dict) or self.targets not in seen.labels:
            raise ValueError(
                f"`{self.name}` ({type(self).__name__}) takes its targets from the labels. Expected a dict with the "
                f"key {self.targets!r}. Received: "
                f"{sorted(seen.labels) if isinstance(seen.labels, dict) else type(seen.labels)}"
            )
        return seen.labels[self.targets]

    @property
    def is_constant_in_regions(self) -> bool:
        """False: targets differ from point to point."""
        return False

    def get_config(self) -> Config:
        """The arguments of `__init__`."""
        return {**super().get_config(), "targets": self.targets, "directions": self._directions.given}


@keras.saving.register_keras_serializable(package="jvpreg")
class Lipschitz(Constraint):
    """`‖J‖ ≤ bound`, in the operator norm of a norm of inputs and outputs; so `‖J u‖ ≤ bound · ‖u‖`.

    The norm is exact: the whole Jacobian of each example is computed in the shared pass, from as many cotangents as
    there are outputs, or as many directions as there are inputs. If both are many, `jvpreg.regularizers.SpectralNorm`
    estimates the norm by one product.

    Args:
        bound: L, above 0.
        norm: 1, 2 or `"inf"`: the largest sum of a column, the largest singular value, the largest sum of a row.
        side: `"output"` makes the Jacobian from cotangents, `"input"` from directions.
        **arguments: of every `Constraint`: `enforcement`, `at`, `tolerance`, `name`.

    The violation is `max(0, ‖J‖ − bound)`, with one multiplier. If the bound holds at every point between two inputs,
    it bounds the distance of their outputs; if it holds at the data alone, it does not.

    Raises:
        ValueError: an argument is out of its range; in `compile`, another constraint contradicts it.

    Reference: Balestriero & Baraniuk (2021), section 1.

    Example:

    >>> import jvpreg
    >>> jvpreg.constraints.Lipschitz(1.0, norm=2, at="between").at.__name__
    'between'
    """

    def __init__(
        self,
        bound: float,
        norm: Literal[1, 2, "inf"] = 2,
        side: Literal["input", "output"] = "output",
        **arguments: Any,
    ):
        super().__init__(**arguments)
        self.bound = checks.number("bound", bound, above=0)
        self.norm = checks.choice("norm", norm, (1, 2, "inf"))
        self.side = checks.choice("side", side, ("input", "output"))

    def directions(self, inputs: Structure, labels: Structure | None, seed: Seed) -> Structure | None:
        """The basis of the inputs, if that is the side."""
        return probes.basis(inputs) if self.side == "input" else None

    def cotangents(self, outputs: Structure, labels: Structure | None, seed: Seed) -> Structure | None:
        """The basis of the outputs, if that is the side."""
        return probes.basis(outputs) if self.side == "output" else None

    def violation(self, seen: Seen) -> Tensor:
        """`max(0, ‖J‖ − bound)`."""
        # For the shape (B, D, K) instead of (B, K, D), the norms 1 and inf change places.
        matrix = ops.transpose(flatten(seen.jvp if self.side == "input" else seen.vjp), (1, 0, 2))
        if self.norm == 2:
            norm = _largest_singular_value(matrix)
        else:
            rows = (self.norm == "inf") == (self.side == "output")
            norm = ops.max(ops.sum(ops.abs(matrix), axis=2 if rows else 1), axis=1)
        return ops.expand_dims(ops.relu(norm - self.bound), -1)

    @property
    def is_constant_in_regions(self) -> bool:
        """True: the violation is a function of `J` alone."""
        return True

    def get_config(self) -> Config:
        """The arguments of `__init__`."""
        return {**super().get_config(), "bound": self.bound, "norm": self.norm, "side": self.side}


def _largest_singular_value(matrix: Tensor) -> Tensor:
    """That of each of `(B, n, m)`, n the smaller: `(B,)`. Its gradient is `u vᵀ`, as if u and v were constant."""
    gram = ops.matmul(matrix, ops.transpose(matrix, (0, 2, 1)))
    vector = ops.stop_gradient(ops.linalg.eigh(ops.stop_gradient(gram))[1][:, :, -1:])
    return root(ops.sum(ops.square(ops.matmul(ops.transpose(vector, (0, 2, 1)), matrix)), axis=(1, 2)))
