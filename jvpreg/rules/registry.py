"""Which operation has which rule."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import keras

from jvpreg.common import checks
from jvpreg.common.typing import Tensor
from jvpreg.rules.contract import Context
from jvpreg.rules.families import scale, scale_by


@dataclass(frozen=True)
class Rule:
    """A rule that is registered.

    Attributes:
        function: the rule itself.
        activation: the attribute that holds the layer's fused activation, if any.
        derivative: of a smooth elementwise function; see `register_elementwise`.
    """

    function: Callable
    activation: str | None = None
    derivative: Callable | None = None


_RULES: dict[Any, Rule] = {}
_WRAPPERS: dict[type, Callable] = {}


def register_rule(*operations: Any, activation: str | None = None) -> Callable:
    """Registers a rule for operations: classes of layers or of `keras.ops` nodes, or activation functions.

    Lookup is by exact class: a subclass that overrides `call` never silently inherits its parent's rule.

    Args:
        *operations: classes of `keras.Layer` or `keras.Operation`, or functions of `keras.activations`.
        activation: name of the attribute that holds the layer's fused activation. The rule then leaves the
            activation out; the engine runs it as a node of its own, so a layer's bias and its activation's
            intercept stay apart.

    Returns:
        A decorator for `rule(operation, *inputs, context, **kwargs)`, which returns `(y, Pushforward)`, or `(y, None)`
        if no tangent passes, or an `Affine`. A layer's masks are among the keyword arguments, by their names in its
        `call`: they have no tangents, and are frozen as residuals.

    Raises:
        ValueError: an operation has a rule already.

    Example:

    >>> import keras, jvpreg
    >>> class Halve(keras.layers.Layer):
    ...     def call(self, x):
    ...         return x / 2
    >>> @jvpreg.register_rule(Halve)
    ... def halve(layer, x, context):
    ...     return x / 2, jvpreg.rules.linear(lambda t: t / 2)
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
        checks.function("function", function, "a rule, `rule(operation, *inputs, context)`")
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


def unwrap(operation: Any) -> Any:
    """The operation that is really computed: wrappers such as `JacobianModel` are looked through."""
    while type(operation) in _WRAPPERS:
        operation = _WRAPPERS[type(operation)](operation)
    return operation


def find_rule(operation: Any) -> Rule | None:
    """The rule of a layer instance (by its exact class) or of an activation function; None if it has none."""
    rule = _RULES.get(type(operation))
    if rule is None and isinstance(operation, Callable) and not isinstance(operation, keras.Operation):  # type: ignore[arg-type]
        rule = _RULES.get(operation)
    return rule


def registered_operations() -> list:
    """Everything that has a rule: layer classes and activation functions."""
    return list(_RULES)


def missing_rule_error(operation: Any, path: str, reason: str) -> NotImplementedError:
    """The error for an operation that the engine cannot linearize, for a `reason`."""
    return NotImplementedError(
        f"`{path}` ({_name_of(type(operation) if isinstance(operation, keras.Operation) else operation)}) has no "
        f"pushforward rule ({reason}), so the model cannot be linearized. Register one with `jvpreg.register_rule` "
        "(and test it with `jvpreg.testing.check_rule`), or replace the operation by a layer that has one."
    )


def _name_of(operation: Any) -> str:
    return getattr(operation, "__qualname__", None) or repr(operation)


def register_elementwise(
    *operations: Any, kernel: Callable | None = None, curvature: Callable | None = None
) -> Callable:
    """Registers smooth elementwise functions by their derivative: `derivative(x, y, **kwargs) -> slope (B, …)`.

    Args:
        *operations: functions of `keras.activations`, or your own.
        kernel: returns `kernel(tangent, y)`, the product of one tangent and the slope, if the derivative follows from y
            alone and the backend has one operation for the product; otherwise it returns None.
        curvature: `curvature(x, y, **kwargs)`, the second derivative `(B, …)`; found by autodiff if it is not stated.
    """

    if not operations or not all(callable(operation) for operation in operations):
        raise checks.invalid("operations", "functions", operations)
    checks.function("kernel", kernel, "a function without arguments", optional=True)
    checks.function("curvature", curvature, "a function `curvature(x, y)`", optional=True)

    def decorate(derivative: Callable) -> Callable:
        checks.function("derivative", derivative, "a function `derivative(x, y) -> slope`")
        for operation in operations:

            @register_rule(operation)
            @functools.wraps(derivative)
            def rule(function: Any, x: Tensor, context: Context, **kwargs: Any) -> tuple:
                y = function(x, **kwargs)
                bend = curvature and functools.partial(curvature, **kwargs)
                of_backend = kernel and kernel()
                if of_backend:
                    return y, scale_by(functools.partial(derivative, None, **kwargs), of_backend, y, curvature=bend)
                return y, scale(derivative(x, y, **kwargs), curvature=bend)

            _RULES[operation] = replace(_RULES[operation], derivative=derivative)

        return derivative

    return decorate
