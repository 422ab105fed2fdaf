"""One run of a rule, and the same rule at other points: the way to a second derivative that no rule has stated."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import keras
from keras import ops

from jvpreg.common.eager import map_leaves
from jvpreg.engine import masks
from jvpreg.engine.arguments import map_arguments
from jvpreg.engine.companions import Companions
from jvpreg.engine.node import Value
from jvpreg.rules.contract import Context, Pushforward
from jvpreg.rules.registry import Rule


@dataclass(frozen=True)
class Run:
    """A rule with the operation that it is to run.

    Attributes:
        rule: the rule.
        operation: the operation.
        masks: by their names, as the rule takes them.
        primals: the tracer's: the values among arguments, and the arguments with their primals.
        inner: the tracer's: runs another operation for the rule.
        context: what the rule is told.
        companions: tangents that go along.
    """

    rule: Rule
    operation: Any
    masks: Mapping[str, Any]
    primals: Callable
    inner: Callable
    context: Context
    companions: Companions | None

    def __call__(self, args, kwargs) -> tuple[list[Value], Any]:
        """The values among the arguments as the operation sees them, and what the rule returns."""
        values, args, kwargs = self.primals(self.operation, args, kwargs)
        kwargs |= {key: map_leaves(masks.primal_of, mask) for key, mask in self.masks.items()}
        kwargs = {key: value for key, value in kwargs.items() if key != "training" and value is not None}
        inner, step = (partial(self.inner, values, repeated) for repeated in (self.context.repeated, True))
        context = replace(self.context, linearize=inner, linearize_step=step)
        if self.companions is not None:
            context = self.companions.context(context, values)
        return values, self.rule.function(self.operation, *args, context=context, **kwargs)

    def at_other_points(self, args, kwargs) -> Callable:
        """A function from primals, like those among the arguments, to the operation frozen there.

        It finds the seeds and statistics as they are now, and leaves them as they are then.
        """
        variables = list(getattr(self.operation, "variables", []))
        tensors = [ops.convert_to_tensor(variable) for variable in variables]
        state = [(v, t if v.trainable else t + 0) for v, t in zip(variables, tensors, strict=True)]

        def again(primals) -> Pushforward:
            remaining = iter(primals)

            def moved(leaf):
                return replace(leaf, primal=next(remaining)) if isinstance(leaf, Value) else leaf

            with keras.StatelessScope(state_mapping=state):
                _, returned = self(*map_arguments(moved, args, kwargs))
            return returned if isinstance(returned, Pushforward) else returned[1]

        return again
