"""`PenalizedModel`: the training step of a model with penalties, whatever the penalties are."""

from collections.abc import Mapping
from typing import Any

import keras
from keras import ops, tree

from jvpreg.common import checks, keras_private, seeds
from jvpreg.common.typing import Logs, Shapes, Structure, Tensor
from jvpreg.products import linearize
from jvpreg.regularizers.capabilities import is_scheduled
from jvpreg.regularizers.checks import check_dependence
from jvpreg.regularizers.serving import packed
from jvpreg.training.steps import Step, SteppedModel
from jvpreg.training.trackers import PenaltyTracker, StopAtNonFinitePenalty
from jvpreg.training.weighting import (
    check_labels_beside,
    compiled_labels,
    compiled_weights,
    given_weights,
    own_keys,
)


class PenalizedModel(SteppedModel):
    """Base class: it computes what its base model computes, and its steps add penalties to the loss.

    In a step with penalties, `call` linearizes the base at the batch instead of running it. This one run serves the
    outputs, the loss as Keras computes it, and every penalty: `compute_loss` finds the linearization in `current_step`,
    and hands it to `penalty`. A subclass overrides `penalty`, `has_penalties` and `penalty_metrics`; and `base_inputs`,
    if its own inputs are more than those of the base.

    Args:
        base: a Keras model.
        seed: of the random directions; None for one that Keras draws.
        **kwargs: of `keras.Model`: `name`.

    Attributes:
        base: the model.
        seed: the argument `seed`.
        training_seed: a `keras.random.SeedGenerator`, from which training draws.
        evaluation_seed: another one, for evaluation, so that validating does not change the training.

    Raises:
        ValueError: `base` is not a model.
    """

    def __init__(self, base: keras.Model, seed: int | None = None, **kwargs: Any):
        if not isinstance(base, keras.Model) or isinstance(base, PenalizedModel):
            raise checks.invalid("base", "a plain Keras model", base)
        # `base` casts its own inputs; a second cast here would round them.
        super().__init__(**{"autocast": False, "dtype": base.dtype_policy, **kwargs})
        self.base = base
        self.seed = checks.seed("seed", seed, optional=True)
        if hasattr(base, "output_names"):
            # By these names Keras finds the losses, metrics and weights of several outputs, and names its logs.
            self.output_names = base.output_names
        self.training_seed = seeds.generator(self.seed, 0)
        self.evaluation_seed = seeds.generator(self.seed, 1)
        self.built = base.built

    @property
    def penalty_metrics(self) -> list[keras.metrics.Metric]:
        """All metrics of penalties. `fit` stops if one of them that is a `PenaltyTracker` is not finite."""
        raise NotImplementedError(f"{type(self).__name__} must override `penalty_metrics`.")

    def penalty(self, step: Step, labels: Structure | None, sample_weight: Structure | None, training: bool) -> Tensor:
        """The penalties of a step, a scalar that is added to the loss. Also updates the `penalty_metrics`.

        Args:
            step: the step, with the linearization of the base at its inputs.
            labels: those given to `fit`, `(B, …)`, or None.
            sample_weight: as Keras hands it to a step, a structure like that of the labels, or None.
            training: whether this is a training step, to be counted: see `run_when_due`.
        """
        raise NotImplementedError(f"{type(self).__name__} must override `penalty(self, step, …)`.")

    def symbolic_inputs(self) -> Structure:
        """Inputs of the base for batches of any size; None if they are not known yet."""
        if getattr(self.base, "inputs", None):
            return packed(list(self.base.inputs))
        shapes = (self.base.get_build_config() or {}).get("input_shape") if self.base.built else None
        # A subclassed model knows only their shapes.
        return _symbols(shapes) if shapes else None

    def call(self, inputs: Structure, training: bool | None = None) -> Structure:
        """The outputs of the base model; in a step with penalties, those of its linearization."""
        x, step = self.base_inputs(inputs), self.current_step
        symbolic = any(isinstance(leaf, keras.KerasTensor) for leaf in tree.flatten(x))
        if step is None or not step.penalized or symbolic or self.is_plain(step):
            return self.base(x, training=training)
        linearization = linearize(self.base, x, training=bool(training), xla=bool(self.jit_compile))
        check_dependence(self.jacobian_regularizers, linearization, self.base)
        step.inputs, step.linearization = inputs, linearization
        return linearization.outputs

    def base_inputs(self, inputs: Structure) -> Structure:
        """The part of this model's inputs that the base takes; by default all of it."""
        return inputs

    def compute_output_shape(self, input_shape: Shapes) -> Shapes:
        """The output shape of the base model."""
        return self.base.compute_output_shape(input_shape)

    def fit(
        self,
        x: Any = None,
        y: Structure | None = None,
        batch_size: int | None = None,
        epochs: int = 1,
        verbose: int | str = "auto",
        callbacks: Any = None,
        **kwargs: Any,
    ) -> keras.callbacks.History:
        """As `keras.Model.fit`.

        Raises:
            FloatingPointError: a penalty was not finite in an epoch; the error names it and the step.
            ValueError: there are weights but no labels: Keras would drop the weights.
        """
        if self.has_penalties:
            check_labels_beside(kwargs.get("sample_weight"), y)
            given = [kwargs.get(name) for name in ("sample_weight", "class_weight", "validation_split")]
            weights = given_weights(y, own_keys(self.jacobian_regularizers), *given)
            kwargs |= dict(zip(("sample_weight", "class_weight"), weights, strict=True))
        trackers = [metric for metric in self.penalty_metrics if isinstance(metric, PenaltyTracker)]
        if trackers:
            watch = StopAtNonFinitePenalty(trackers)
            # First in the list: an epoch that went wrong must not be saved as a checkpoint.
            if isinstance(callbacks, keras.callbacks.CallbackList):
                watch.set_model(self)
                others = [c for c in callbacks.callbacks if not isinstance(c, StopAtNonFinitePenalty)]
                callbacks.callbacks = [watch, *others]
            else:
                callbacks = [watch, *tree.flatten(callbacks or [])]
        return super().fit(x, y, batch_size, epochs, verbose, callbacks, **kwargs)

    def evaluate(
        self,
        x: Any = None,
        y: Structure | None = None,
        batch_size: int | None = None,
        verbose: int | str = "auto",
        sample_weight: Structure | None = None,
        **kwargs: Any,
    ) -> Any:
        """As `keras.Model.evaluate`.

        Raises:
            ValueError: there are weights but no labels.
        """
        if self.has_penalties:
            check_labels_beside(sample_weight, y)
        return super().evaluate(x, y, batch_size, verbose, sample_weight, **kwargs)

    def train_on_batch(
        self,
        x: Structure,
        y: Structure | None = None,
        sample_weight: Structure | None = None,
        class_weight: Mapping[int, float] | None = None,
        return_dict: bool = False,
    ) -> Any:
        """As Keras'."""
        weights = given_weights(y, own_keys(self.jacobian_regularizers), sample_weight, class_weight)
        return super().train_on_batch(x, y, *weights, return_dict)

    def get_metrics_result(self) -> Logs:
        """As Keras', but an evaluation that leaves out the penalties leaves out their metrics too."""
        results = super().get_metrics_result()
        if self.current_step is not None and not self.current_step.penalized:
            ours = {metric.name for metric in self.penalty_metrics}
            results = {k: v for k, v in results.items() if k not in ours}
        return results

    def compute_loss(
        self,
        x: Structure | None = None,
        y: Structure | None = None,
        y_pred: Structure | None = None,
        sample_weight: Structure | None = None,
        training: bool = True,
    ) -> Tensor:
        """The loss as compiled, plus the penalties of the step."""
        step = self.current_step
        linearized = step is not None and step.linearization is not None
        if self.loss is None and not self.losses and self.has_penalties:
            # With penalties alone Keras would have nothing to compute, and a step may have none of them.
            trained_on = any(is_scheduled(one) or one.strength for one in self.jacobian_regularizers)
            always = linearized and self.jacobian_interval == 1 and trained_on
            loss = ops.zeros(()) if always else _differentiable_zero(y_pred)
        else:
            labels, weights = self._compiled(y, sample_weight)
            loss = super().compute_loss(x, labels, y_pred, weights, training=training)
        if step is None or step.linearization is None:
            if step is not None and step.penalized and self.is_plain(step):
                self.steps_taken.assign(self.steps_taken + 1)
            return loss
        penalty = self.penalty(step, y, sample_weight, training)
        step.linearization = None  # A second loss in the same step would count its penalties twice.
        # The losses of replicas are summed, so each is given its share.
        return loss + ops.cast(keras_private.additional_loss(self, penalty), loss.dtype)

    def compute_metrics(
        self, x: Structure, y: Structure, y_pred: Structure, sample_weight: Structure | None = None
    ) -> dict[str, Any]:
        """As Keras', with the labels and weights of the loss only."""
        labels, weights = self._compiled(y, sample_weight)
        return super().compute_metrics(x, labels, y_pred, weights)

    def _compiled(self, labels: Structure | None, sample_weight: Structure) -> tuple:
        """The labels and weights without those that a regularizer alone takes."""
        own = own_keys(self.jacobian_regularizers)
        return compiled_labels(labels, own, alone=self.loss is None), compiled_weights(sample_weight, own)

    def export(self, *args: Any, **kwargs: Any) -> None:
        """As `keras.Model.export`, applied to the base, which computes the same."""
        inputs = self.symbolic_inputs()
        if inputs is not None:
            self.base(inputs)  # Keras exports only what was called, and `fit` linearized it instead.
        self.base.export(*args, **kwargs)

    def save_own_variables(self, store: Any) -> None:
        """As Keras', and also stores the state of the seeds, so that a resumed run draws as it would have drawn."""
        super().save_own_variables(store)
        for i, state in enumerate(self.seed_states()):
            store[f"seed_{i}"] = ops.convert_to_numpy(state)

    def load_own_variables(self, store: Any) -> None:
        """Loads what `save_own_variables` stored."""
        store = {key: store[key] for key in store.keys()}  # noqa: SIM118 -- an h5 store has no __iter__
        # A base with more or less dropout has other seeds: those that both have are assigned.
        stored = {key: store.pop(key) for key in list(store) if key.startswith("seed_")}
        for i, state in enumerate(self.seed_states()):
            if f"seed_{i}" in stored:
                state.assign(stored[f"seed_{i}"])
        super().load_own_variables(store)

    def seed_states(self) -> list:
        """The states of the seeds of the model and of its base (dropout), which Keras does not count as weights."""
        weights = {id(weight) for weight in self.weights}
        return [variable for variable in self.variables if id(variable) not in weights]


def _differentiable_zero(outputs: Structure) -> Tensor:
    """A zero with a gradient, as Torch needs for a step: the sum over no examples, which reads no number."""
    return sum(ops.sum(ops.cast(y[:0], keras.config.floatx())) for y in tree.flatten(outputs))


def _symbols(shapes: Shapes) -> Structure:
    """Symbols of these shapes, for batches of any size, in plain lists and dicts: JAX knows none of Keras' own."""
    if isinstance(shapes, dict):
        return {name: _symbols(part) for name, part in shapes.items()}
    if any(isinstance(part, (list, tuple, dict)) for part in shapes):
        return (tuple if isinstance(shapes, tuple) else list)(map(_symbols, shapes))
    return keras.KerasTensor((None, *shapes[1:]))
