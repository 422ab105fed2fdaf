"""A penalty on the Jacobian of one block, inside any model."""

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops, tree

from jvpreg.common import checks, keras_private, replicas, seeds
from jvpreg.common.typing import Config, Shapes, Structure
from jvpreg.engine.inputs import call_signature
from jvpreg.products import linearize
from jvpreg.regularizers.base import JacobianRegularizer
from jvpreg.regularizers.capabilities import carried_variable, is_scheduled
from jvpreg.regularizers.checks import check_dependence, check_fit, check_inputs, check_regularizers
from jvpreg.regularizers.serving import serve
from jvpreg.rules.registry import register_wrapper


@keras.saving.register_keras_serializable(package="jvpreg")
class JacobianPenalty(keras.layers.Layer):
    """Computes what `block` computes and, in training, adds penalties on its Jacobian through `add_loss`.

    Works inside any model, and in a custom training loop that adds `model.losses`. Outside training it costs nothing: a
    layer cannot tell evaluation from prediction. Labels and sample weights do not reach a layer: its regularizers get
    None, and all examples count alike, as in Keras' own activity regularizers.

    Args:
        block: a functional or Sequential model, or a layer that has a rule.
        regularizers: from `jvpreg.regularizers`, or your own; also constraints at the data or a layer, without a
            schedule and without labels of their own.
        seed: of the random directions; None for one that Keras draws.
        **kwargs: of `keras.Layer`: `name`.

    Raises:
        ValueError: a regularizer needs what only a `JacobianModel` has (other points, the number of the step, labels);
            in a call, the block takes integers only.

    Example:

    >>> import keras, jvpreg
    >>> block = keras.Sequential([keras.Input((8,)), keras.layers.Dense(8, activation="tanh")])
    >>> layer = jvpreg.layers.JacobianPenalty(block, [jvpreg.regularizers.JacobianNorm(0.1)])
    >>> y = layer(keras.ops.ones((4, 8)), training=True)
    >>> len(layer.losses)
    1
    """

    def __init__(
        self,
        block: keras.Layer,
        regularizers: Sequence[JacobianRegularizer],
        seed: int | None = None,
        **kwargs: Any,
    ):
        if not isinstance(block, keras.Layer):
            raise checks.invalid("block", "a Keras model or layer", block)
        super().__init__(**{"autocast": False, "dtype": block.dtype_policy, **kwargs})
        self.block = block
        self.regularizers = check_regularizers(regularizers, "regularizers")
        for regularizer in self.regularizers:
            scheduled = is_scheduled(regularizer)
            if callable(regularizer.at) or scheduled or regularizer.label_keys:
                at = regularizer.get_config().get("at", regularizer.at)  # as its user wrote it
                labels = f" and the labels {list(regularizer.label_keys)}" if regularizer.label_keys else ""
                raise ValueError(
                    "Invalid value for argument `regularizers`. Expected regularizers on the data, without a schedule "
                    f"or labels of their own, which is what a layer sees. Received: `{regularizer.name}`, with "
                    f"at={at!r}{' and a schedule' if scheduled else ''}{labels}. List it in "
                    "`compile` of a JacobianModel."
                )
        self.seed = checks.seed("seed", seed, optional=True)
        self._seed_generator = seeds.generator(self.seed)
        self._carried: list = []

    def build(self, input_shape: Shapes) -> None:
        """Builds the block."""
        if not self.block.built:
            self.block.build(input_shape)
        inputs = tree.map_shape_structure(lambda shape: keras.KerasTensor(shape), input_shape)
        check_inputs(self.regularizers, self.block)
        outputs = _call(self.block, inputs, None)
        check_fit(self.regularizers, inputs, outputs, self.block)
        for i, regularizer in enumerate(self.regularizers):
            variable = carried_variable(regularizer, outputs, seeds.derived(self.seed or 0, 1 + i))
            self._carried.append(variable and self.add_weight(**variable))

    def call(self, inputs: Structure, training: bool | None = None) -> Structure:
        """What the block computes."""
        symbolic = any(isinstance(x, keras.KerasTensor) for x in tree.flatten(inputs))
        if not training or symbolic or not self.regularizers:
            return _call(self.block, inputs, training)
        linearization = linearize(self.block, inputs, training=True)
        check_dependence(self.regularizers, linearization, self.block)
        serving = serve(self.regularizers, linearization, self._seed_generator, carried=self._carried)
        found = serving.run()
        combined = replicas.combine(found.means, found.counts, sums=found.sums)
        serving.carry_on(combined.sums)
        if replicas.number() > 1:
            # All replicas share a layer's list of losses, and take turns where they reduce. Losses of another replica
            # would be counted in the logged loss.
            keras_private.clear_own_losses(self)
        for i, regularizer in enumerate(self.regularizers):
            self.add_loss(regularizer.strength * combined.for_loss[i])
        return linearization.outputs

    def save_own_variables(self, store: Any) -> None:
        """As Keras', with the state of the seed: a loaded layer draws what this one would have drawn."""
        super().save_own_variables(store)
        store["seed"] = ops.convert_to_numpy(self._seed_generator.state)

    def load_own_variables(self, store: Any) -> None:
        """Loads what `save_own_variables` stored."""
        store = {key: store[key] for key in store.keys()}  # noqa: SIM118 -- an h5 store has no __iter__
        state = store.pop("seed", None)
        if state is not None:
            self._seed_generator.state.assign(state)
        super().load_own_variables(store)

    def compute_output_shape(self, input_shape: Shapes) -> Shapes:
        """The block's."""
        return self.block.compute_output_shape(input_shape)

    def get_config(self) -> Config:
        """The block and its regularizers."""
        return {
            **super().get_config(),
            "block": keras.saving.serialize_keras_object(self.block),
            "regularizers": [keras.saving.serialize_keras_object(r) for r in self.regularizers],
            "seed": self.seed,
        }

    @classmethod
    def from_config(cls, config: Config) -> "JacobianPenalty":
        """The layer that `get_config` described."""
        parts = {key: keras.saving.deserialize_keras_object(config[key]) for key in ("block", "regularizers")}
        return cls(**{**config, **parts})


register_wrapper(JacobianPenalty, lambda layer: layer.block)


def _call(block: keras.Layer, inputs: Structure, training: bool | None) -> Structure:
    takes_training = "training" in call_signature(block).parameters
    return block(inputs, training=training) if takes_training else block(inputs)
