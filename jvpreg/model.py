"""`JacobianModel`: a Keras model that is trained with penalties on its Jacobian, through plain `compile` and `fit`."""

import math
from collections.abc import Sequence

import keras
import numpy as np
from keras import ops, tree

from jvpreg import checks, replicas, seeds
from jvpreg.engine import keras_private
from jvpreg.freeze import linearize
from jvpreg.layers.jacobian_penalty import JacobianPenalty
from jvpreg.linearization import Linearization
from jvpreg.names import check_names, reported_names
from jvpreg.regularizers.base import JacobianRegularizer
from jvpreg.regularizers.checks import check_dependence, check_fit, check_inputs, check_regularizers
from jvpreg.regularizers.serving import carried_name, carried_variable, packed, serve
from jvpreg.rules.registry import register_wrapper
from jvpreg.steps import SteppedModel
from jvpreg.trackers import MeasureTracker, PenaltyTracker, StopAtNonFinitePenalty
from jvpreg.weighting import (
    check_labels_beside,
    compiled_labels,
    compiled_weights,
    example_weights,
    given_weights,
    own_keys,
)


@keras.saving.register_keras_serializable(package="jvpreg")
class JacobianModel(SteppedModel):
    """Wraps a model so that `compile` takes Jacobian regularizers. It computes just what the model computes.

    In a training step the model runs once, and that run serves the outputs, the loss and every penalty; batch
    statistics are updated once, dropout masks are shared. The weights are the model's own: `model.base` is the plain
    model, trained, to deploy.

    Args:
        base: a Keras model; a subclassed one is opened up, see `jvpreg.linearize`.
        seed: of the random directions.
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

    def __init__(self, base: keras.Model, seed: int | None = None, **kwargs):
        if not isinstance(base, keras.Model) or isinstance(base, JacobianModel):
            raise checks.invalid("base", "a plain Keras model", base)
        # `base` casts its own inputs; a second cast here would round what it is given.
        super().__init__(**{"autocast": False, "dtype": base.dtype_policy, **kwargs})
        self.base = base
        self.seed = checks.seed("seed", seed, optional=True)
        if hasattr(base, "output_names"):
            # By these, Keras finds the losses, metrics and weights of several outputs, and names what it logs.
            self.output_names = base.output_names
        self._training_seed = seeds.generator(self.seed, 0)
        # Evaluation draws from a generator of its own: validating must not change what is trained.
        self._evaluation_seed = seeds.generator(self.seed, 1)
        self._trackers: list[PenaltyTracker] = []
        # What the regularizers measure beside their penalties, in their order.
        self._measures: list[MeasureTracker] = []
        self.built = base.built

    def build(self, input_shape):
        """Builds a base that was given no input shape, for batches of any size."""
        if not self.base.built:
            self.base(tree.map_shape_structure(lambda shape: keras.KerasTensor((None, *shape[1:])), input_shape))
        self._build_carried(self.jacobian_regularizers, self._trackers)

    def _build_carried(self, regularizers: Sequence[JacobianRegularizer], trackers: Sequence[PenaltyTracker]) -> None:
        """Variables for what regularizers carry from step to step, if the outputs' shape is known by now."""
        inputs = self._symbolic_inputs()
        if inputs is None:
            return
        check_inputs(regularizers, self.base)
        known = getattr(self.base, "outputs", None)
        outputs = packed(list(known)) if known else self.base.compute_output_spec(inputs)
        check_fit(regularizers, inputs, outputs)
        for i, (regularizer, tracker) in enumerate(zip(regularizers, trackers, strict=True)):
            variable = carried_variable(regularizer, outputs, seeds.derived(self.seed or 0, 2 + i))
            if variable is not None and tracker.carried is None:
                tracker.carry(variable)

    def _symbolic_inputs(self):
        """What the base takes, with batches of any size; None where it is not known yet."""
        if getattr(self.base, "inputs", None):
            return packed(list(self.base.inputs))
        shapes = (self.base.get_build_config() or {}).get("input_shape") if self.base.built else None
        # A subclassed model says no more than the shapes.
        return tree.map_shape_structure(lambda shape: keras.KerasTensor((None, *shape[1:])), shapes) if shapes else None

    def call(self, inputs, training=None):
        """What the base model computes; inside a step with penalties, by way of its linearization."""
        symbolic = any(isinstance(x, keras.KerasTensor) for x in tree.flatten(inputs))
        if self._running.penalized and not symbolic and not self._is_plain_step():
            linearization = linearize(self.base, inputs, training=bool(training), xla=bool(self.jit_compile))
            check_dependence(self.jacobian_regularizers, linearization, self.base)
            self._running.linearization = linearization
            return linearization.outputs
        return self.base(inputs, training=training)

    @property
    def _has_penalties(self) -> bool:
        """Whether a step linearizes the base."""
        return bool(self.jacobian_regularizers)

    @property
    def _all_trackers(self) -> "list[PenaltyTracker]":
        """Those of every penalty."""
        return self._trackers

    def _reported_names(self, regularizers: Sequence[JacobianRegularizer]) -> list[str]:
        """The names in the logs of what it reports beside Keras."""
        return reported_names(regularizers)

    def compute_output_shape(self, input_shape):
        """The base model's."""
        return self.base.compute_output_shape(input_shape)

    def compile(
        self,
        *args,
        jacobian_regularizers: Sequence[JacobianRegularizer] = (),
        jacobian_interval: int = 1,
        jacobian_fraction: float = 1.0,
        jacobian_evaluate: bool = True,
        **kwargs,
    ):
        """As `keras.Model.compile`, with penalties on the Jacobian.

        Args:
            *args: of `keras.Model.compile`.
            jacobian_regularizers: from `jvpreg.regularizers`, or your own; an empty list trains the plain model.
            jacobian_interval: the penalties are computed every k-th step, times k: unbiased, and cheaper.
            jacobian_fraction: the part of each batch, drawn at random, on which they are computed: unbiased too.
            jacobian_evaluate: whether `evaluate` reports the penalties and counts them in its loss, as Keras does
                with its own regularizers. If not, it costs nothing extra. `predict` never does.
            **kwargs: of `keras.Model.compile`.

        Raises:
            ValueError: an argument is out of its range, two regularizers share a name or contradict each other, or one
                does not fit the model.

        `sample_weight` and `class_weight` weigh an example's penalty as they weigh its loss. Of several outputs with
        a weight each, an example has the mean, and so it has of weights `(B, T)` of steps in time; a regularizer with
        labels of its own has their weight, where they are given one.

        What regularizers carry from step to step, multipliers and singular vectors, starts anew.
        """
        regularizers = check_regularizers(jacobian_regularizers, "jacobian_regularizers")
        interval = checks.count("jacobian_interval", jacobian_interval)
        fraction = checks.number("jacobian_fraction", jacobian_fraction, above=0, most=1)
        evaluate = checks.boolean("jacobian_evaluate", jacobian_evaluate)
        check_names(self._reported_names(regularizers), getattr(self.base, "output_names", ()), *args, **kwargs)
        _check_penalties_within(self.base, regularizers)
        trackers = [PenaltyTracker(regularizer.name) for regularizer in regularizers]
        self._build_carried(regularizers, trackers)
        super().compile(*args, **kwargs)
        # Set only now: a call that is refused, by Keras too, leaves the penalties as they were.
        self.jacobian_regularizers = regularizers
        self.jacobian_interval = interval
        self.jacobian_fraction = fraction
        self.jacobian_evaluate = evaluate
        # Cleared first: Keras would go on reporting what an earlier `compile` tracked.
        self._trackers.clear()
        self._trackers.extend(trackers)
        self._measures.clear()
        self._measures.extend(
            MeasureTracker(f"{regularizer.name}/{measure}", kind)
            for regularizer in regularizers
            for measure, kind in regularizer.measures.items()
        )

    def fit(self, x=None, y=None, batch_size=None, epochs=1, verbose="auto", callbacks=None, **kwargs):
        """As `keras.Model.fit`.

        Raises:
            FloatingPointError: a penalty was not finite in an epoch; the error names it and the step.
            ValueError: there are weights and no labels, without which Keras would drop them.
        """
        if self._has_penalties:
            check_labels_beside(kwargs.get("sample_weight"), y)
            given = [kwargs.get(name) for name in ("sample_weight", "class_weight", "validation_split")]
            weights = given_weights(y, own_keys(self.jacobian_regularizers), *given)
            kwargs |= dict(zip(("sample_weight", "class_weight"), weights, strict=True))
        if self._all_trackers:
            watch = StopAtNonFinitePenalty(self._all_trackers)
            # First in line: an epoch that went wrong must not be saved as a checkpoint.
            if isinstance(callbacks, keras.callbacks.CallbackList):
                watch.set_model(self)
                others = [c for c in callbacks.callbacks if not isinstance(c, StopAtNonFinitePenalty)]
                callbacks.callbacks = [watch, *others]
            else:
                callbacks = [watch, *tree.flatten(callbacks or [])]
        return super().fit(x, y, batch_size, epochs, verbose, callbacks, **kwargs)

    def evaluate(self, x=None, y=None, batch_size=None, verbose="auto", sample_weight=None, **kwargs):
        """As `keras.Model.evaluate`.

        Raises:
            ValueError: there are weights and no labels.
        """
        if self._has_penalties:
            check_labels_beside(sample_weight, y)
        return super().evaluate(x, y, batch_size, verbose, sample_weight, **kwargs)

    def train_on_batch(self, x, y=None, sample_weight=None, class_weight=None, return_dict=False):
        """As Keras'."""
        weights = given_weights(y, own_keys(self.jacobian_regularizers), sample_weight, class_weight)
        return super().train_on_batch(x, y, *weights, return_dict)

    def get_metrics_result(self):
        """As Keras', without the penalties in an evaluation that leaves them out."""
        results = super().get_metrics_result()
        if self._running.active and not self._running.penalized:
            ours = {tracker.name for tracker in self._all_trackers} | {measure.name for measure in self._measures}
            results = {k: v for k, v in results.items() if k not in ours}
        return results

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """The loss as compiled, plus `strength × mean(penalty)` of each regularizer."""
        linearization, self._running.linearization = self._running.linearization, None
        if self.loss is None and not self.losses and self._has_penalties:
            # Penalties alone: Keras would have nothing to compute. Not every step need have them.
            trained_on = any(one.scheduled or one.strength for one in self.jacobian_regularizers)
            always = linearization is not None and self.jacobian_interval == 1 and trained_on
            loss = ops.zeros(()) if always else _differentiable_zero(y_pred)
        else:
            labels, weights = self._compiled(y, sample_weight)
            loss = super().compute_loss(x, labels, y_pred, weights, training=training)
        if linearization is None:
            if self._running.penalized and self._is_plain_step():
                self._step.assign(self._step + 1)
            return loss
        penalty = self._penalty(linearization, y, sample_weight, training)
        # The losses of replicas are summed: each is given its share.
        return loss + ops.cast(keras_private.additional_loss(self, penalty), loss.dtype)

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        """As Keras', with the labels and weights that are the loss's."""
        labels, weights = self._compiled(y, sample_weight)
        return super().compute_metrics(x, labels, y_pred, weights)

    def _compiled(self, labels, sample_weight) -> tuple:
        """The labels and weights without those that are a regularizer's own."""
        own = own_keys(self.jacobian_regularizers)
        return compiled_labels(labels, own, alone=self.loss is None), compiled_weights(sample_weight, own)

    def _penalty(self, linearization: Linearization, labels, sample_weight, training: bool):
        """The weighted sum of the penalties' means, a scalar; the trackers are updated."""
        regularizers, own = self.jacobian_regularizers, own_keys(self.jacobian_regularizers)
        batch = ops.shape(tree.flatten(linearization.outputs)[0])[0]
        plain = compiled_labels(labels, own, alone=True)
        # The directions are drawn outside the conditional below: a seed must not advance inside a branch.
        serving = serve(
            regularizers,
            linearization,
            self._training_seed if training else self._evaluation_seed,
            labels=[labels if regularizer.label_keys else plain for regularizer in regularizers],
            weights=[example_weights(sample_weight, own, regularizer.label_keys) for regularizer in regularizers],
            carried=[tracker.carried for tracker in self._trackers],
            examples=self._draw_examples(batch) if training and self.jacobian_fraction < 1 else None,
            model=self.base,
        )
        served, active, step = self._run_when_due(serving.run, serving.skip, training)
        # Outside the conditional too, where replicas cannot wait for each other.
        means, counts, measured, sums = served
        whole = replicas.combine(means, counts, measured, serving.kinds, sums)
        for i, tracker in enumerate(self._trackers):
            tracker.update_state(whole.means[i], active, batch, step if training else None)
        for measure, value in zip(self._measures, whole.measured, strict=True):
            measure.update_state(value, active, batch)
        if training and self._running.due is not False:
            serving.carry_on(whole.sums, active)
        factor = self.jacobian_interval if training else 1
        strengths = [ops.convert_to_tensor(strength, means.dtype) for strength in serving.strengths(step)]
        return factor * ops.sum(ops.stack(strengths) * whole.for_loss)

    def _draw_examples(self, size):
        """Indices of a random part of the batch, rising, `(N,)`; on one of several replicas, of what it has of it."""
        batch, start = replicas.part_of_batch(size)
        order = ops.argsort(keras.random.uniform((batch,), seed=self._training_seed))
        # Less a little, so that 0.07 × 100 = 7.000000000000001 is 7.
        if isinstance(batch, int):
            count = max(1, math.ceil(self.jacobian_fraction * batch - 1e-3))
        else:
            count = ops.ceil(self.jacobian_fraction * ops.cast(batch, "float32") - 1e-3)
            count = ops.maximum(1, ops.cast(count, "int32"))
        # In order, so that replicas give each example the directions that one device gives it.
        return replicas.chosen_here(ops.sort(order[:count]), size, start)

    def export(self, *args, **kwargs):
        """As `keras.Model.export`, of the base, which computes the same."""
        inputs = self._symbolic_inputs()
        if inputs is not None:
            self.base(inputs)  # In `fit` it was linearized, and Keras exports only what was called.
        self.base.export(*args, **kwargs)

    def get_compile_config(self):
        """As Keras', with the regularizers and how they are computed."""
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

    def compile_from_config(self, config):
        """Compiles with what `get_compile_config` returned, and builds the optimizer's variables."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.optimizer is not None and self.built:
            self.optimizer.build(self.trainable_variables)

    def get_config(self):
        """The base model and the seed."""
        return {"base": keras.saving.serialize_keras_object(self.base), "seed": self.seed, "name": self.name}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        """The model that `get_config` described."""
        base = keras.saving.deserialize_keras_object(config["base"], custom_objects=custom_objects)
        return cls(**{**config, "base": base})

    def save_own_variables(self, store):
        """Keras does not save the state of seeds; with it, a resumed run draws what it would have drawn."""
        super().save_own_variables(store)
        for i, state in enumerate(self._seed_states()):
            store[f"seed_{i}"] = ops.convert_to_numpy(state)
        for tracker in self._trackers:
            if tracker.carried is not None:
                store[carried_name(tracker.name)] = ops.convert_to_numpy(tracker.carried)

    def load_own_variables(self, store):
        """Loads what `save_own_variables` stored."""
        store = {key: store[key] for key in store.keys()}  # noqa: SIM118 -- an h5 store has no __iter__
        # A base with more or less dropout has other seeds: those that are there are assigned.
        seeds_stored = {key: store.pop(key) for key in list(store) if key.startswith("seed_")}
        for i, state in enumerate(self._seed_states()):
            if f"seed_{i}" in seeds_stored:
                state.assign(seeds_stored[f"seed_{i}"])
        # Of a model that was compiled otherwise, they are left.
        carried = {key: store.pop(key) for key in list(store) if key.startswith("carried_")}
        for tracker in self._trackers:
            value = carried.get(carried_name(tracker.name))
            if tracker.carried is None or value is None or value.shape != tracker.carried.shape:
                continue
            if np.all(np.isfinite(value)):
                tracker.carried.assign(value)
        super().load_own_variables(store)

    def _seed_states(self) -> list:
        """The states of the model's seeds and of its base's (dropout): variables that Keras does not call weights."""
        weights = {id(weight) for weight in self.weights}
        return [variable for variable in self.variables if id(variable) not in weights]


register_wrapper(JacobianModel, lambda model: model.base)


def _check_penalties_within(base, regularizers) -> None:
    blocks = [layer for layer in keras_private.layers_within(base) if isinstance(layer, JacobianPenalty)]
    inner = [block.name for block in blocks if block.regularizers]
    if regularizers and inner:
        raise ValueError(
            f"`{base.name}` holds JacobianPenalty layers ({inner}), whose penalties a step that linearizes the whole "
            "model would leave out. Expected either `jacobian_regularizers` or JacobianPenalty layers. Received both: "
            "compile with `jacobian_regularizers=[]`, or take the blocks out of their JacobianPenalty."
        )


def _differentiable_zero(outputs):
    """The sum of no example: it has a gradient, without which Torch takes no step, and reads no number."""
    return sum(ops.sum(ops.cast(y[:0], keras.config.floatx())) for y in tree.flatten(outputs))
