"""Rules: what an operation does to a batch `x`, and what it then does to tangents at that `x`.

A *rule* runs one operation of a graph on its primal inputs and returns `(y, pushforward)`. The pushforward is the
operation frozen at `x`: a linear map from the tangents of its inputs to the tangent of its output. Balestriero &
Baraniuk (2021) call the network of all pushforwards the clone of the network at `x`.

Shapes, in this file and in every rule: a primal value is `(B, …)`, its tangent `(P, B, …)` with `P` the number of
probes. What is frozen per example (a mask, an argmax, a slope) has no probe axis: it is never repeated `P` times.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jvpreg.folding import with_probe_axis


@dataclass(frozen=True)
class Context:
    """How the model is run while it is linearized.

    Attributes:
        training: whether dropout is active and moving averages are updated.
        batch_statistics: `"moving"`, `"frozen"` or `"coupled"`: see `jvpreg.linearize`.
        fallback: `"warn"`, `"allow"` or `"error"`: see `jvpreg.linearize`.
        xla: whether XLA compiles the run; None where that is not known.
        batch: how many examples there are: a number, or a tensor in a graph in which it is not known.
        run: `run(operation, *inputs) -> (outputs, Pushforward)` linearizes another operation, for the rule of a
            wrapper or of a layer that repeats another one.
        apply: `apply(function, x, num_weights) -> (function(x), image)` runs the linear part, with so many weights, of
            an operation of one input `x`, example by example. Tangents that travel along with `x` go through it in the
            same call, where that is cheaper, since the weights are read once: `image` is then what they became, for
            the `Pushforward`, and else None.
        along: `along(*inputs) -> tangents` `(P, B, …)` of these inputs of the operation, in their order (None: zero),
            where one product with them is all that will be asked of it: its rule may then return what they become, as
            `Pushed`, and freeze nothing. Else, and for tensors that are none of its inputs, it returns None.
        weights: tangents `(P, …)` of variables, by their `id`, which are part of that product.
    """

    training: bool = False
    batch_statistics: str = "moving"
    fallback: str = "warn"
    xla: bool | None = None
    batch: Any = None
    run: Callable | None = None
    apply: Callable = lambda function, x, num_weights: (function(x), None)
    along: Callable = lambda *inputs: None
    weights: Mapping[int, Any] = field(default_factory=dict)


class Pushforward:
    """A node frozen at `x`: a linear map from the tangents of its inputs to the tangent of its output.

    Args:
        function: `function(*tangents, *residuals) -> tangent`, linear in the tangents, which are `(P, B, …)`; a tuple
            of tangents for several outputs. It may close over weights and over statistics of the whole batch.
        *residuals: what is frozen per example, each `(B, …)`. The functions see them as `(1, B, …)`, so that they
            broadcast over the probes.
        weights: a pair for each variable that can be perturbed too: the variable (or None, which is left out) and
            `part(tangent, *residuals) -> tangent`, linear in the variable's tangent `(P, *variable.shape)`. What it
            returns need only broadcast to `(P, B, …)`.
        batch_axes: for each residual, its axis of the examples; by default the first one.
        couples_examples: whether one example's tangent depends on another's.
        moves_examples: whether the first axis of the output is not that of the examples.
        examples: `examples(*places) -> place`, where the examples are in the output, by where they are in the inputs:
            see `jvpreg.examples`. By default, on the first axis if they are in all of the inputs, and else mixed.
        takes_none: whether the function takes None for an input without a tangent; else it is given zeros.
        intercept: what the operation adds to its linear part, to be broadcast to its output, where the rule knows it:
            a bias; by default it is found as `y − function(x)`, at the cost of one more run and its gradient.
        image: what tangents became that went along with the inputs: nothing more is pushed then.
        finite: whether the operation returns finite numbers for finite inputs; not if it pads with −∞, or divides.
        mask: of a map with two slopes that freezes something else, `mask(residual)` is where the one of them holds.
        channel_slope: of a map that multiplies each channel by a number, these numbers (C,) and the channels' axis.
        scaled: `scaled(slope, axis)`, the function of the same map with the channels of its output along that axis
            multiplied by a slope (C,), which costs a product with its weights only; or None, if it has them elsewhere.
    """

    def __init__(
        self,
        function: Callable,
        *residuals: Any,
        weights: Iterable[tuple[Any, Callable]] = (),
        batch_axes: Sequence[int] | None = None,
        couples_examples: bool = False,
        moves_examples: bool = False,
        examples: Callable | None = None,
        takes_none: bool = False,
        intercept: Any = None,
        image: Any = None,
        finite: bool = True,
        mask: Callable | None = None,
        channel_slope: tuple[Any, int] | None = None,
        scaled: Callable | None = None,
    ):
        self.function = function
        self.residuals = residuals
        self.batch_axes = tuple(batch_axes or [0] * len(residuals))
        self.weights = [(variable, part) for variable, part in weights if variable is not None]
        self.couples_examples = couples_examples
        self.moves_examples = moves_examples
        self.examples = examples
        self.takes_none = takes_none
        self.intercept = intercept
        self.image = image
        self.finite = finite
        self.mask = mask
        self.channel_slope: Any = channel_slope
        self.scaled: Any = scaled

    def __call__(self, *tangents):
        """The output's tangent `(P, B, …)` for the inputs' tangents `(P, B, …)`."""
        return self.function(*tangents, *self.broadcast_residuals())

    @property
    def variables(self) -> list:
        """The variables that can be perturbed."""
        return [variable for variable, _ in self.weights]

    def map_residuals(self, function: Callable) -> "Pushforward":
        """The same map with `function(residual, batch_axis)` for each residual."""
        mapped = copy.copy(self)
        mapped.residuals = tuple(map(function, self.residuals, self.batch_axes))
        return mapped

    def with_function(self, function: Callable) -> "Pushforward":
        """Another map that takes the same residuals, and no weights' tangents."""
        return Pushforward(function, *self.residuals, batch_axes=self.batch_axes)

    def broadcast_residuals(self) -> list:
        """The residuals with an axis for the probes, `(1, B, …)`."""
        return [with_probe_axis(residual) for residual in self.residuals]


class Pushed(Pushforward):
    """What a node made of the tangents that went along, in place of a map that can be used again.

    Args:
        image: the output's tangent `(P, B, …)`; a tuple of tangents for several outputs; None if nothing moves.
        variables: those whose tangents are part of it, where they have one.
    """

    def __init__(self, image, variables: Iterable = ()):
        super().__init__(lambda *_: image, image=image)
        self._variables = list(variables)

    @property
    def variables(self) -> list:
        """Those whose tangents are part of the image."""
        return self._variables


class Declined(Exception):  # noqa: N818 -- no error: the engine has other ways
    """Raised by a rule for arguments that it does not cover: the operation is then treated as one without a rule.

    Args:
        reason: why.
        to_autodiff: whether autodiff is what should serve it, so that nobody needs to be told.
    """

    def __init__(self, reason: str, to_autodiff: bool = False):
        super().__init__(reason)
        self.to_autodiff = to_autodiff
