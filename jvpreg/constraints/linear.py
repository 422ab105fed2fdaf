"""The general constraint on what a model computes and how it changes."""

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from jvpreg.common import checks
from jvpreg.common.typing import Config, DirectionsLike, Structure, Tensor
from jvpreg.constraints.slopes import _Directed
from jvpreg.regularizers.base import Seen


@keras.saving.register_keras_serializable(package="jvpreg")
class Linear(_Directed):
    """`g(x, f(x), J u) ≤ 0`, or `= 0`, for a function g of your own, linear in `J u`.

    Args:
        function: `function(inputs, outputs, products) -> g`, from `(B, …)`, `(B, …)` and `(P, B, …)` to `(B,)` or
            `(B, …)`. Register it with Keras, if the model is to be saved.
        directions: as `Bounded` takes them.
        equality: whether g must be zero; otherwise it must not be positive.
        **arguments: of every `Constraint`: `enforcement`, `at`, `tolerance`, `name`.

    The violation is `max(0, g)`, or `abs(g)`; all components share one multiplier.

    Raises:
        ValueError: an argument is out of its range; in `fit`, what the function returns has no axis of examples.

    Reference: Márquez-Neila, Salzmann & Fua (2017), "Imposing hard constraints on deep networks: promises and
    limitations", section 3.

    Example: `f' = −f`, a differential equation.

    >>> import keras, numpy as np, jvpreg
    >>> decays = jvpreg.constraints.Linear(lambda x, y, slopes: slopes[0] + y, directions=[0], equality=True)
    >>> model = jvpreg.JacobianModel(keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)]))
    >>> model.compile(loss="mse", jacobian_regularizers=[decays])
    >>> sorted(model.fit(np.zeros((4, 1)), np.ones((4, 1)), verbose=0).history)[:2]
    ['linear', 'linear/violated']
    """

    def __init__(self, function: Callable, directions: DirectionsLike, equality: bool = False, **arguments: Any):
        super().__init__(directions, "directions", arguments)
        self.function = checks.function("function", function, "a function of inputs, outputs and products")
        self.equality = checks.boolean("equality", equality)

    def components(self, outputs: Structure) -> int:
        """One for all: the shape that the function returns is known only after a call."""
        return 1

    def violation(self, seen: Seen) -> Tensor:
        """`max(0, g)`, or `abs(g)`."""
        value = self.function(seen.inputs, seen.outputs, seen.jvp)
        outputs = keras.tree.flatten(seen.outputs)[0]
        if not value.shape or (None not in (value.shape[0], outputs.shape[0]) and value.shape[0] != outputs.shape[0]):
            raise ValueError(
                f"`function` of `{self.name}` ({type(self).__name__}) returned the wrong shape. Expected (B,) or "
                f"(B, …). Received: {tuple(value.shape)}"
            )
        value = ops.reshape(value, (ops.shape(value)[0], -1))
        return ops.abs(value) if self.equality else ops.relu(value)

    @property
    def is_constant_in_regions(self) -> bool:
        """False: the function may depend on the point."""
        return False

    def get_config(self) -> Config:
        """The arguments of `__init__`."""
        config = {"function": self.function, "directions": self._directions.given, "equality": self.equality}
        return {**super().get_config(), **config}
