"""Rules: what an operation does to a batch `x`, and what it then does to tangents at that `x`.

A *rule* runs one operation of a graph on its primal inputs and returns `(y, pushforward)`. The pushforward is the
operation frozen at `x`: a linear map from the tangents of its inputs to the tangent of its output. Balestriero &
Baraniuk (2021) call the network of all pushforwards the clone of the network at `x`.

Shapes, in this file and in every rule: a primal value is `(B, …)`, its tangent `(P, B, …)` with `P` the number of
probes. What is frozen per example (a mask, an argmax, a slope) has no probe axis: it is never repeated `P` times.
"""

import copy
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import keras
from keras import ops, tree

from jvpreg import checks
from jvpreg.eager import cast, shape_of
from jvpreg.examples import kept
from jvpreg.folding import as_batch, fold, unfold, with_probe_axis


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


def linear(function: Callable) -> Pushforward:
    """The pushforward of an operation that is linear already: the operation itself.

    `function` maps one `(N, …)` tensor or more to one, example by example. The probes are folded into its batch,
    so that a convolution sees one batch of `P·B` tangents and runs once.
    """

    def push(*tangents):
        num_probes = shape_of(tangents[0])[0]
        return unfold(function(*(fold(tangent) for tangent in tangents)), num_probes)

    return Pushforward(push)


def affine(function: Callable, x, weights: Iterable[tuple[Any, Callable]], **arguments: Any) -> Pushforward:
    """As `linear`, for an operation with weights, in which it is linear too.

    `weights` pairs each variable (or None, which is left out) with `part(tangent, x)`: what the operation returns with
    one tangent of the variable, `(*shape,)`, in its place, at the input `x` (B, …), and without the other weights. The
    other arguments are those of `Pushforward`.
    """
    push = linear(function).function

    def probed(part):
        return lambda tangent, x: each_probe(lambda row: part(ops.cast(row, x.dtype), x[0]))(tangent)

    parts = [(variable, probed(part)) for variable, part in weights]
    return Pushforward(lambda tangent, x: push(tangent), x, weights=parts, **arguments)


def each_probe(function: Callable) -> Callable:
    """A linear `function` of tensors of any axes to one or to a tuple of them, as a map of `(P, …)` to `(P, …)`.

    For operations whose first axis need not be the batch, so that probes cannot be folded into it.
    """

    def push(*tangents):
        num_probes = tangents[0].shape[0]
        if num_probes is None:
            return ops.map(lambda rows: function(*rows), tangents)
        if num_probes == 1:
            return tree.map_structure(lambda image: ops.expand_dims(image, 0), function(*(t[0] for t in tangents)))
        images = [function(*rows) for rows in zip(*map(ops.unstack, tangents), strict=True)]
        return tree.map_structure(lambda *rows: ops.stack(rows), *images)

    return push


def scale(slope) -> Pushforward:
    """The pushforward of a smooth elementwise operation; `slope` is its derivative at `x`, `(B, …)`."""

    def push(tangent, slope):
        return as_batch(ops.multiply, tangent, cast(slope, tangent.dtype))

    return Pushforward(push, slope, examples=kept)


def scale_by(slope: Callable, kernel: Callable, *frozen) -> Pushforward:
    """As `scale`, where the backend has one operation for the product.

    Args:
        slope: `slope(*frozen) -> (1, B, …)`, by which several tangents are multiplied: it is made once for all.
        kernel: `kernel(tangent, *frozen)`, the product for one tangent (1, B, …).
        *frozen: what the slope follows from, `(B, …)`.
    """

    def push(tangent, *frozen):
        if tangent.shape[0] == 1:
            return kernel(tangent, *frozen)
        return tangent * cast(slope(*frozen), tangent.dtype)

    return Pushforward(push, *frozen, examples=kept)


def gate(mask) -> Pushforward:
    """The pushforward that keeps a tangent where the boolean `mask` (B, …) holds and drops it elsewhere."""
    # A select, not a product with a cast mask: half the time of a ResNet-50 JVP in a TensorFlow graph. A kernel of the
    # backend's, where there is one, takes less still.
    return Pushforward(lambda tangent, mask: ops.where(mask, tangent, 0.0), mask, examples=kept)


def identity() -> Pushforward:
    """The pushforward of an operation that passes its input on, or only adds a constant."""
    return Pushforward(lambda tangent: tangent, examples=kept)


class Declined(Exception):  # noqa: N818 -- no error: the engine has other ways
    """Raised by a rule for arguments that it does not cover: the operation is then treated as one without a rule.

    Args:
        reason: why.
        to_autodiff: whether autodiff is what should serve it, so that nobody needs to be told.
    """

    def __init__(self, reason: str, to_autodiff: bool = False):
        super().__init__(reason)
        self.to_autodiff = to_autodiff


@dataclass(frozen=True)
class Rule:
    """A registered rule.

    Attributes:
        function: the rule itself.
        activation: the attribute that holds the layer's fused activation, if any.
        derivative: of a smooth elementwise function; see `elementwise`.
    """

    function: Callable
    activation: str | None = None
    derivative: Callable | None = None


_RULES: dict[Any, Rule] = {}
_WRAPPERS: dict[type, Callable] = {}


def register_rule(*operations, activation: str | None = None) -> Callable:
    """Registers a rule for operations: classes of layers or of `keras.ops` nodes, or activation functions.

    Lookup is by exact class: a subclass that overrides `call` never silently inherits its parent's rule.

    Args:
        *operations: classes of `keras.Layer` or `keras.Operation`, or functions of `keras.activations`.
        activation: name of the attribute that holds the layer's fused activation. The rule then leaves the
            activation out; the engine runs it as a node of its own, so a layer's bias and its activation's
            intercept stay apart.

    Returns:
        A decorator for `rule(operation, *inputs, context, **kwargs) -> (y, Pushforward)`. A layer's masks are among the
        keyword arguments, by their names in its `call`: they have no tangents, and are frozen as residuals.

    Raises:
        ValueError: an operation has a rule already.

    Example:

    >>> import keras, jvpreg
    >>> class Halve(keras.layers.Layer):
    ...     def call(self, x):
    ...         return x / 2
    >>> @jvpreg.register_rule(Halve)
    ... def halve(layer, x, context):
    ...     return x / 2, jvpreg.linear(lambda t: t / 2)
    >>> jvpreg.testing.check_rule(Halve(), (3,))
    """

    checks.text("activation", activation, optional=True)
    if not operations:
        raise checks.invalid("operations", "a class of layers or of operations, or a function", operations)
    for operation in operations:
        is_class = isinstance(operation, type) and issubclass(operation, keras.Operation)
        if not is_class and (isinstance(operation, (type, keras.Operation)) or not callable(operation)):
            raise checks.invalid("operations", "classes of layers or of operations, or functions", operation)

    def decorate(function: Callable) -> Callable:
        checks.function("function", function, "a rule, `rule(operation, *inputs, context) -> (y, Pushforward)`")
        for operation in operations:
            if operation in _RULES:
                raise ValueError(
                    f"Invalid value for argument `operations`. Expected an operation without a rule. "
                    f"Received: {_name_of(operation)}, which has the rule `{_RULES[operation].function.__name__}`."
                )
        _RULES.update(dict.fromkeys(operations, Rule(function, activation)))
        return function

    return decorate


def register_wrapper(operation: type, inner: Callable) -> None:
    """States that an `operation` computes just what `inner(operation)` computes, and is linearized as that."""
    _WRAPPERS[operation] = inner


def unwrap(operation):
    """The operation that is really computed: wrappers such as `JacobianModel` are looked through."""
    while type(operation) in _WRAPPERS:
        operation = _WRAPPERS[type(operation)](operation)
    return operation


def find_rule(operation) -> Rule | None:
    """The rule of a layer instance (by its exact class) or of an activation function; None if it has none."""
    rule = _RULES.get(type(operation))
    if rule is None and isinstance(operation, Callable) and not isinstance(operation, keras.Operation):  # type: ignore[arg-type]
        rule = _RULES.get(operation)
    return rule


def registered_operations() -> list:
    """Everything that has a rule: layer classes and activation functions."""
    return list(_RULES)


def missing_rule_error(operation, path: str, reason: str) -> NotImplementedError:
    """The error for an operation that the engine cannot linearize, for a `reason`."""
    return NotImplementedError(
        f"`{path}` ({_name_of(type(operation) if isinstance(operation, keras.Operation) else operation)}) has no "
        f"pushforward rule ({reason}), so the model cannot be linearized. Register one with `jvpreg.register_rule` "
        "(and test it with `jvpreg.testing.check_rule`), or replace the operation by a layer that has one."
    )


def _name_of(operation) -> str:
    return getattr(operation, "__qualname__", None) or repr(operation)


def elementwise(*operations, kernel: Callable | None = None) -> Callable:
    """Registers smooth elementwise functions by their derivative: `derivative(x, y, **kwargs) -> slope (B, …)`.

    Args:
        *operations: functions of `keras.activations`, or your own.
        kernel: returns `kernel(tangent, y)`, what one tangent becomes, where the derivative follows from y alone and
            the backend has one operation for it; or None where it has not.
    """

    if not operations or not all(callable(operation) for operation in operations):
        raise checks.invalid("operations", "functions", operations)
    checks.function("kernel", kernel, "a function without arguments", optional=True)

    def decorate(derivative: Callable) -> Callable:
        checks.function("derivative", derivative, "a function `derivative(x, y) -> slope`")
        for operation in operations:

            @register_rule(operation)
            @functools.wraps(derivative)
            def rule(function, x, context, **kwargs):
                y = function(x, **kwargs)
                of_backend = kernel and kernel()
                if of_backend:
                    return y, scale_by(functools.partial(derivative, None, **kwargs), of_backend, y)
                return y, scale(derivative(x, y, **kwargs))

            _RULES[operation] = replace(_RULES[operation], derivative=derivative)

        return derivative

    return decorate
