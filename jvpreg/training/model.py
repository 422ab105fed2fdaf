"""`JacobianModel`: a Keras model that is trained with penalties on its Jacobian, through plain `compile` and `fit`."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from jvpreg.common import checks, keras_private, replicas, seeds
from jvpreg.common.typing import Config, Shapes, Structure, Tensor
from jvpreg.layers.jacobian_penalty import JacobianPenalty
from jvpreg.regularizers.base import JacobianRegularizer
from jvpreg.regularizers.capabilities import carried_name, carried_variable
from jvpreg.regularizers.checks import check_fit, check_inputs, check_regularizers
from jvpreg.regularizers.serving import packed, serve
from jvpreg.rules.registry import register_wrapper
from jvpreg.training.metric_names import check_names, reported_names
from jvpreg.training.penalized_model import PenalizedModel
from jvpreg.training.steps import Step
from jvpreg.training.trackers import MeasureTracker, PenaltyTracker
from jvpreg.training.weighting import compiled_labels, example_weights, own_keys


@keras.saving.register_keras_serializable(package="jvpreg")
class JacobianModel(PenalizedModel):
    """Wraps a model so that `compile` takes Jacobian regularizers. Its outputs are those of the model.

    In a training step the model runs once, and that run serves the outputs, the loss and every penalty; batch
    statistics are updated once, dropout masks are shared. The weights are the model's own: `model.base` is the plain
    model, trained, to deploy.

    Args:
        base: a Keras model; a subclassed one is opened up, see `jvpreg.linearize`.
        seed: of the random directions; None for one that Keras draws.
        **kwargs: of `keras.Model`: `name`.

    Raises:
        ValueError: `base` is not a model.

    Example:

    >>> import keras, numpy as np, jvpreg
    >>> base = keras.Sequential([keras.Input((8,)), keras.layers.Dense(16, activation="relu"), keras.layers.Dense(3)])
    >>> model = jvpreg.JacobianModel(base)
    >>> model.compile(
    ...     loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    ...     jacobian_regularizers=[jvpreg.regularizers.JacobianNorm(0.01)])
    >>> history = model.fit(np.ones((32, 8)), np.zeros(32), verbose=0)
    >>> sorted(history.history)
    ['frobenius_norm_squared', 'loss']
    """

    def __init__(self, base: keras.Model, seed: int | None = None, **kwargs: Any):
        super().__init__(base, seed, **kwargs)
        self._trackers: list[PenaltyTracker] = []
        # What the regularizers measure beside their penalties, in the order of the regularizers.
        self._measures: list[MeasureTracker] = []

    def build(self, input_shape: Shapes) -> None:
        """Builds the base, for batches of any size, if it was given no input shape."""
        if not self.base.built:
            self.base(tree.map_shape_structure(lambda shape: keras.KerasTensor((None, *shape[1:])), input_shape))
        self._build_carried(self.jacobian_regularizers, self._trackers)

    def _build_carried(self, regularizers: Sequence[JacobianRegularizer], trackers: Sequence[PenaltyTracker]) -> None:
        """Makes the variables that regularizers carry from step to step, if the outputs' shape is known by now."""
        inputs = self.symbolic_inputs()
        if inputs is None:
            return
        check_inputs(regularizers, self.base)
        known = getattr(self.base, "outputs", None)
        outputs = packed(list(known)) if known else self.base.compute_output_spec(inputs)
        check_fit(regularizers, inputs, outputs, self.base)
        for i, (regularizer, tracker) in enumerate(zip(regularizers, trackers, strict=True)):
            variable = carried_variable(regularizer, outputs, seeds.derived(self.seed or 0, 2 + i))
            if variable is not None and tracker.carried is None:
                tracker.carry(variable)

    @property
    def has_penalties(self) -> bool:
        """Whether there are regularizers."""
        return bool(self.jacobian_regularizers)

    @property
    def penalty_metrics(self) -> list[keras.metrics.Metric]:
        """One metric for each regularizer's penalty, in their order, and then those of what else they measure."""
        return [*self._trackers, *self._measures]

    def reported_names(self, regularizers: Sequence[JacobianRegularizer]) -> list[str]:
        """The names that the model would add to Keras' own logs with these regularizers."""
        return reported_names(regularizers)

    def compile(
        self,
        *args: Any,
        jacobian_regularizers: Sequence[JacobianRegularizer] = (),
        jacobian_interval: int = 1,
        jacobian_fraction: float = 1.0,
        jacobian_evaluate: bool = True,
        **kwargs: Any,
    ) -> None:
        """As `keras.Model.compile`, with penalties on the Jacobian.

        Args:
            *args: of `keras.Model.compile`.
            jacobian_regularizers: from `jvpreg.regularizers`, or your own; an empty list trains the plain model.
            jacobian_interval: k: every k-th step computes the penalties, times k. This is unbiased, and cheaper.
            jacobian_fraction: the part of each batch, drawn at random, whose penalties are computed: unbiased too.
            jacobian_evaluate: whether `evaluate` reports the penalties and adds them to its loss, as Keras does with
                its own regularizers. If False, they cost `evaluate` nothing. `predict` never computes them.
            **kwargs: of `keras.Model.compile`.

        Raises:
            ValueError: an argument is out of its range, two regularizers share a name or contradict each other, or one
                does not fit the model.

        `sample_weight` and `class_weight` weigh an example's penalty as they weigh its loss. If several outputs, or
        several steps in time, have weights of their own, the example's weight is their mean. A regularizer with its own
        labels has the weight of these labels, if one is given.

        What regularizers carry from step to step (multipliers, singular vectors) starts anew.
        """
        regularizers = check_regularizers(jacobian_regularizers, "jacobian_regularizers")
        interval = checks.count("jacobian_interval", jacobian_interval)
        fraction = checks.number("jacobian_fraction", jacobian_fraction, above=0, most=1)
        evaluate = checks.boolean("jacobian_evaluate", jacobian_evaluate)
        check_names(self.reported_names(regularizers), getattr(self.base, "output_names", ()), *args, **kwargs)
        _check_penalties_within(self.base, regularizers)
        trackers = [PenaltyTracker(regularizer.name) for regularizer in regularizers]
        self._build_carried(regularizers, trackers)
        super().compile(*args, **kwargs)
        # Set only now: if Keras or a check refuses this call, the penalties stay as they were.
        self.jacobian_regularizers = regularizers
        self.jacobian_interval = interval
        self.jacobian_fraction = fraction
        self.jacobian_evaluate = evaluate
        # Cleared first: otherwise Keras goes on reporting what an earlier `compile` tracked.
        self._trackers.clear()
        self._trackers.extend(trackers)
        self._measures.clear()
        self._measures.extend(
            MeasureTracker(f"{regularizer.name}/{measure}", kind)
            for regularizer in regularizers
            for measure, kind in regularizer.measures.items()
        )

    def penalty(self, step: Step, labels: Structure | None, sample_weight: Structure | None, training: bool) -> Tensor:
        """The sum of `strength × mean(penalty)` over the regularizers."""
        regularizers, own = self.jacobian_regularizers, own_keys(self.jacobian_regularizers)
        batch = ops.shape(tree.flatten(step.linearization.outputs)[0])[0]
        plain = compiled_labels(labels, own, alone=True)
        # The directions are drawn outside the conditional below: a seed must not advance inside a branch.
        serving = serve(
            regularizers,
            step.linearization,
            self.training_seed if training else self.evaluation_seed,
            labels=[labels if regularizer.label_keys else plain for regularizer in regularizers],
            weights=[example_weights(sample_weight, own, regularizer.label_keys) for regularizer in regularizers],
            carried=[tracker.carried for tracker in self._trackers],
            examples=self._draw_examples(batch) if training and self.jacobian_fraction < 1 else None,
            model=self.base,
        )
        served, active, number = self.run_when_due(step, serving.run, serving.skip, training)
        # Outside the conditional too: replicas cannot wait for each other inside it.
        means, counts, measured, sums = served
        whole = replicas.combine(means, counts, measured, serving.kinds, sums)
        for i, tracker in enumerate(self._trackers):
            tracker.update_state(whole.means[i], active, batch, number if training else None)
        for measure, value in zip(self._measures, whole.measured, strict=True):
            measure.update_state(value, active, batch)
        if training and step.due is not False:
            serving.carry_on(whole.sums, active)
        factor = self.jacobian_interval if training else 1
        strengths = [ops.convert_to_tensor(strength, means.dtype) for strength in serving.strengths(number)]
        return factor * ops.sum(ops.stack(strengths) * whole.for_loss)

    def _draw_examples(self, size: Tensor) -> Any:
        """Indices `(N,)`, rising, of a random part of the batch; a replica returns those of its own examples."""
        batch, start = replicas.part_of_batch(size)
        order = ops.argsort(keras.random.uniform((batch,), seed=self.training_seed))
        # A little less, so that 0.07 × 100 = 7.000000000000001 gives 7.
        if isinstance(batch, int):
            count = max(1, math.ceil(self.jacobian_fraction * batch - 1e-3))
        else:
            count = ops.ceil(self.jacobian_fraction * ops.cast(batch, "float32") - 1e-3)
            count = ops.maximum(1, ops.cast(count, "int32"))
        # In order, so that replicas give each example the directions that one device gives it.
        return replicas.chosen_here(ops.sort(order[:count]), size, start)

    def get_compile_config(self) -> Config:
        """Keras' own, with the regularizers and how they are computed."""
        if not self.compiled:
            return super().get_compile_config()
        return {
            **super().get_compile_config(),
            "jacobian_regularizers": [
                keras.saving.serialize_keras_object(regularizer) for regularizer in self.jacobian_regularizers
            ],
            "jacobian_interval": self.jacobian_interval,
            "jacobian_fraction": self.jacobian_fraction,
            "jacobian_evaluate": self.jacobian_evaluate,
        }

    def compile_from_config(self, config: Config) -> None:
        """Compiles with what `get_compile_config` returned, and builds the optimizer's variables."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.optimizer is not None and self.built:
            self.optimizer.build(self.trainable_variables)

    def get_config(self) -> Config:
        """The base model and the seed."""
        return {"base": keras.saving.serialize_keras_object(self.base), "seed": self.seed, "name": self.name}

    @classmethod
    def from_config(cls, config: Config, custom_objects: Mapping[str, Any] | None = None) -> "JacobianModel":
        """The model that `get_config` described."""
        base = keras.saving.deserialize_keras_object(config["base"], custom_objects=custom_objects)
        return cls(**{**config, "base": base})

    def save_own_variables(self, store: Any) -> None:
        """As Keras', and also stores the state of the seeds, and what regularizers carry from step to step."""
        super().save_own_variables(store)
        for tracker in self._trackers:
            if tracker.carried is not None:
                store[carried_name(tracker.name)] = ops.convert_to_numpy(tracker.carried)

    def load_own_variables(self, store: Any) -> None:
        """Loads what `save_own_variables` stored."""
        store = {key: store[key] for key in store.keys()}  # noqa: SIM118 -- an h5 store has no __iter__
        # If the file is of a model with other regularizers, what is carried stays as it is.
        carried = {key: store.pop(key) for key in list(store) if key.startswith("carried_")}
        for tracker in self._trackers:
            value = carried.get(carried_name(tracker.name))
            if tracker.carried is None or value is None or value.shape != tracker.carried.shape:
                continue
            if np.all(np.isfinite(value)):
                tracker.carried.assign(value)
        super().load_own_variables(store)


register_wrapper(JacobianModel, lambda model: model.base)


def _check_penalties_within(base: keras.Model, regularizers: Sequence[JacobianRegularizer]) -> None:
    blocks = [layer for layer in keras_private.layers_within(base) if isinstance(layer, JacobianPenalty)]
    inner = [block.name for block in blocks if block.regularizers]
    if regularizers and inner:
        raise ValueError(
            f"`{base.name}` holds JacobianPenalty layers ({inner}). A step that linearizes the whole model would leave "
            "out their penalties. Expected either `jacobian_regularizers` or JacobianPenalty layers. Received both: "
            "compile with `jacobian_regularizers=[]`, or take the blocks out of their JacobianPenalty."
        )
