"""The gradient penalty of a GAN's critic."""

import math
from collections.abc import Callable

import keras
from keras import ops, tree

from jvpreg.common import checks
from jvpreg.common.configs import revive
from jvpreg.common.typing import Config, Seed, Structure, Tensor
from jvpreg.estimators.norms import root, squared_norm
from jvpreg.regularizers.base import JacobianRegularizer, Seen
from jvpreg.regularizers.points import between_kinds


@keras.saving.register_keras_serializable(package="jvpreg")
class GradientPenalty(JacobianRegularizer):
    """Penalizes `(‖∇f‖ − target)²`, the gradient of a critic `f`, at points between real and generated examples.

    The critic is trained on batches that hold both, in any order. Their labels tell which is which: any two numbers, as
    1 and −1 here. A pair of a real and a generated example gives one point, at random between them, so that the penalty
    runs the critic at half as many points as the batch has examples.

    Args:
        strength: the loss gains `strength × mean penalty`: λ, which Gulrajani et al. set to 10.
        target: the norm that the gradient should have, not negative.
        at: `"between"`; `"data"`, which is the batch itself; a function `(inputs, seed) -> points (N, …)`; or the path
            of a layer: the gradient is then by what this layer returned, at the data.
        one_sided: whether a norm below the target costs nothing: `max(0, ‖∇f‖ − target)²`.
        name: of its metric; it logs `gradient_penalty`, the mean over the points.

    Where the gradient is zero, the norm's slope is taken to be zero: no weight gradient is NaN.

    Raises:
        ValueError: an argument is out of its range; in `compile`, the model has more than one number an example as its
            output; in `fit`, the labels are not one number an example.

    Reference: Gulrajani, Ahmed, Arjovsky, Dumoulin & Courville (2017), "Improved Training of Wasserstein GANs",
    equation 3; one-sided in Petzka, Fischer & Lukovnikov (2018), "On the regularization of Wasserstein GANs".

    Example:

    >>> import keras, numpy as np, jvpreg
    >>> critic = keras.Sequential([keras.Input((8,)), keras.layers.Dense(16, "leaky_relu"), keras.layers.Dense(1)])
    >>> model = jvpreg.JacobianModel(critic)
    >>> model.compile(
    ...     loss=lambda labels, scores: -labels * scores,
    ...     jacobian_regularizers=[jvpreg.regularizers.GradientPenalty(10.0)])
    >>> real, generated = np.ones((16, 8)), np.zeros((16, 8))
    >>> labels = np.concatenate([np.ones((16, 1)), -np.ones((16, 1))])
    >>> history = model.fit(np.concatenate([real, generated]), labels, batch_size=32, verbose=0)
    >>> sorted(history.history)
    ['gradient_penalty', 'loss']

    In a `train_step` of your own, one linearization serves the scores and the penalty:

    >>> part = np.random.default_rng(0).random((16, 1))
    >>> lin = jvpreg.linearize(critic, np.concatenate([real, generated, part * real + (1 - part) * generated]))
    >>> between = lin.take(np.arange(32, 48))
    >>> penalty = jvpreg.regularizers.GradientPenalty(10.0).price(between.vjp(np.ones((1, 16, 1)))[0])
    >>> loss = keras.ops.mean(lin.outputs[16:32]) - keras.ops.mean(lin.outputs[:16]) + 10.0 * keras.ops.mean(penalty)
    """

    def __init__(
        self,
        strength: float,
        target: float = 1.0,
        at: str | Callable = "between",
        one_sided: bool = False,
        name: str | None = None,
    ):
        super().__init__(strength, name)
        self.target = checks.number("target", target, least=0)
        if not callable(at) and not (isinstance(at, str) and at):
            expected = '"between", "data", a function `(inputs, seed) -> points`, or the path of a layer'
            raise checks.invalid("at", expected, at)
        self.at = between_kinds if isinstance(at, str) and at == "between" else at
        self.one_sided = checks.boolean("one_sided", one_sided)

    def check(self, inputs: Structure, outputs: Structure) -> None:
        """Raises a ValueError if the model is no critic, which has one number for each example."""
        shapes = [tuple(y.shape) for y in tree.flatten(outputs)]
        if len(shapes) != 1 or None in shapes[0][1:] or math.prod(shapes[0][1:]) != 1:
            raise ValueError(
                f"`{self.name}` ({type(self).__name__}) is a penalty on the gradient of a critic. Expected one output "
                "with one number an example, (B, 1); take the mean of the scores of several patches in the model. "
                f"Received: outputs of shape {', '.join(map(str, shapes))}"
            )

    def cotangents(self, outputs: Structure, labels: Structure | None, seed: Seed) -> Structure:
        """Ones, `(1, B, …)`."""
        return tree.map_structure(lambda y: ops.ones_like(ops.expand_dims(y, 0)), outputs)

    def penalty(self, seen: Seen) -> Tensor:
        """`(‖Jᵀ v‖ − target)²`: `(B,)`."""
        return self.price(tree.map_structure(lambda gradient: gradient[0], seen.vjp))

    def price(self, gradients: Structure) -> Tensor:
        """The penalty of each example, `(B,)`, for gradients `(B, …)`, or a structure of them."""
        norm = root(squared_norm(tree.map_structure(lambda g: ops.expand_dims(g, 0), gradients))[0])
        excess = norm - self.target
        return ops.square(ops.relu(excess) if self.one_sided else excess)

    def get_config(self) -> Config:
        """The arguments of `__init__`."""
        at = "between" if self.at is between_kinds else self.at
        return {**super().get_config(), "target": self.target, "at": at, "one_sided": self.one_sided}

    @classmethod
    def from_config(cls, config: Config) -> "GradientPenalty":
        """The regularizer that `get_config` described.

        Raises:
            ValueError: a function of the config is not registered with Keras.
        """
        return cls(**{key: revive(value) for key, value in config.items()})
