"""`JacobianDistiller`: a student that is trained to match its teacher, through plain `compile` and `fit`."""

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from jvpreg.attribution.decomposition import as_cotangent
from jvpreg.common import checks, replicas
from jvpreg.common.typing import Config, Structure, Tensor
from jvpreg.distillation.base import KerasLoss, MatchingLoss, View
from jvpreg.distillation.checks import (
    check_dependence,
    check_models,
    checked_losses,
    metric_names,
    zeros_like_inputs,
)
from jvpreg.distillation.pairs import Site
from jvpreg.engine.finite import finite_examples, nan_unless
from jvpreg.linearization import Linearization
from jvpreg.products import linearize
from jvpreg.regularizers.base import JacobianRegularizer
from jvpreg.regularizers.full_jacobian import target_cotangent
from jvpreg.regularizers.serving import weighted_mean
from jvpreg.rules.registry import register_wrapper, unwrap
from jvpreg.training.model import JacobianModel
from jvpreg.training.steps import Step
from jvpreg.training.trackers import PenaltyTracker
from jvpreg.training.weighting import compiled_labels, example_weights, own_keys

INPUTS, PRODUCTS = "inputs", "teacher_products"


@keras.saving.register_keras_serializable(package="jvpreg")
class JacobianDistiller(JacobianModel):
    """Trains a student to match its teacher: outputs, Jacobians, feature maps. It computes what the student computes.

    In a step the student and the teacher run once each, and one backward pass of each serves all losses that pull a
    cotangent back. The loss is the compiled one, plus `weight × mean(distance)` of each matching loss, plus Jacobian
    regularizers, if `compile` is given any. The distances are metrics, in training and in evaluation.

    Both networks see the same input, and Jacobians are with respect to it. If they expect different ranges, put a
    `Rescaling` or `Normalization` layer in front of one of them. The teacher runs in inference mode and is frozen:
    `teacher.trainable` is set to False, as Keras' own `Distiller` does.

    Args:
        teacher: a built Keras model; for a `JacobianModel`, its base.
        student: a Keras model with outputs like the teacher's. `distiller.student` is the plain model, to save.
        losses: of `jvpreg.distillation`, or of `keras.distillation`.
        seed: of the random directions; None for one that Keras draws.
        **kwargs: of `keras.Model`: `name`.

    Raises:
        ValueError: a model is none, is not built, or shares variables with the other; the outputs differ; a layer is
            not found, or does not fit its partner.

    Reference: Srinivas & Fleuret (2018), "Full-Jacobian Representation of Neural Networks", sections 4 and 7.1.

    Example:

    >>> import keras, numpy as np, jvpreg
    >>> def network(width):
    ...     return keras.Sequential([keras.Input((8,)), keras.layers.Dense(width, activation="relu"),
    ...         keras.layers.Dense(3)])
    >>> distiller = jvpreg.JacobianDistiller(network(16), network(4), losses=[
    ...     jvpreg.distillation.ActivationMatching(1.0), jvpreg.distillation.JacobianMatching(0.1)])
    >>> distiller.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    >>> history = distiller.fit(np.ones((32, 8)), np.zeros(32), verbose=0)
    >>> sorted(history.history)
    ['activation_matching', 'jacobian_matching', 'jacobian_matching_angle', 'loss']
    """

    always_penalized = True

    def __init__(
        self,
        teacher: keras.Model,
        student: keras.Model,
        losses: Sequence[MatchingLoss | keras.distillation.DistillationLoss],
        seed: int | None = None,
        **kwargs: Any,
    ):
        matching = checked_losses(losses)
        check_models(teacher, student)
        super().__init__(student, seed, **kwargs)
        self.teacher = unwrap(teacher)
        self.teacher.trainable = False
        self.matching_losses = matching
        self._sites = self._find_sites()
        self._matching_trackers = [PenaltyTracker(name) for name in metric_names(matching)]

    @property
    def student(self) -> keras.Model:
        """The plain model that is trained."""
        return self.base

    @property
    def has_penalties(self) -> bool:
        """True: the distances are penalties."""
        return True

    @property
    def penalty_metrics(self) -> list[keras.metrics.Metric]:
        """The metrics of the regularizers, of the distances, and of what else is measured."""
        return [*super().penalty_metrics, *self._matching_trackers]

    def reported_names(self, regularizers: Sequence[JacobianRegularizer]) -> list[str]:
        """The names of the regularizers' metrics and of the distances."""
        return [*super().reported_names(regularizers), *metric_names(self.matching_losses)]

    def compile(self, *args: Any, jacobian_regularizers: Sequence = (), **kwargs: Any) -> None:
        """As `JacobianModel.compile`. `jacobian_evaluate` applies to the distances too; interval and fraction do not.

        Raises:
            ValueError: a matching loss has the name of a regularizer, of a metric, or of another entry in Keras' logs.
        """
        super().compile(*args, jacobian_regularizers=jacobian_regularizers, **kwargs)

    def base_inputs(self, inputs: Structure) -> Structure:
        """The inputs, without the teacher's products that may come with them."""
        return _split(inputs)[0]

    def penalty(self, step: Step, labels: Structure | None, sample_weight: Structure | None, training: bool) -> Tensor:
        """The sum of `weight × mean(distance)` over the matching losses, and the regularizers' penalties."""
        (x, products), linearization = _split(step.inputs), step.linearization
        seed = self.training_seed if training else self.evaluation_seed
        directions = {loss.name: loss.draw(x, seed) if loss.draws else None for loss in self.matching_losses}
        plain = compiled_labels(labels, own_keys(self.jacobian_regularizers), alone=True)
        if products is None:
            products = self._teacher_products(x, plain, directions)
        products = tree.map_structure(ops.stop_gradient, products)
        cotangents = {
            target: products["predicted"]
            if target == "predicted"
            else target_cotangent(loss, linearization.outputs, plain)
            for target, loss in self._targets().items()
        }
        seen = self._see(linearization, plain, cotangents, directions, side=1)
        total = self._compare(products, seen, finite_examples(linearization), sample_weight, training)
        if self.jacobian_regularizers:
            return total + super().penalty(step, labels, sample_weight, training)
        if training:
            self.steps_taken.assign(self.steps_taken + 1)
        return total

    def _compare(
        self, products: dict, seen: dict, finite: Tensor | None, sample_weight: Structure | None, training: bool
    ) -> Tensor:
        """The weighted sum of the mean distances; NaN for examples that are not finite. Also updates the trackers."""
        weights = example_weights(sample_weight, own_keys(self.jacobian_regularizers))
        number = self.steps_taken + 1 if training else None
        means: list = []
        weighings: list[float] = []
        for loss in self.matching_losses:
            teacher, student = (_of_loss(loss, side) for side in (products, seen))
            if len(teacher) != len(student):
                raise ValueError(
                    "Invalid value for argument `x`. Expected the teacher's products as this distiller's "
                    f"`with_teacher` returns them. Received: none for `{loss.name}`."
                )
            batch = ops.shape(student[0])[0]
            mean = weighted_mean(nan_unless(finite, loss.distance(teacher, student)), weights)
            # A loss that is only reported gets no gradient, not even zeros: 0 times an infinite slope is NaN.
            means.append(mean if loss.weight else ops.stop_gradient(mean))
            measured = loss.measure(teacher, tree.map_structure(ops.stop_gradient, student))
            means += [ops.mean(nan_unless(finite, measured[name])) for name in loss.measures]
            weighings += [loss.weight, *[0.0] * len(loss.measures)]
        dtype = keras.backend.result_type("float32", *(mean.dtype for mean in means))
        found = ops.stack([ops.cast(mean, dtype) for mean in means])
        whole = replicas.combine(found, ops.full_like(found, ops.cast(batch, found.dtype)))
        for i, tracker in enumerate(self._matching_trackers):
            tracker.update_state(whole.means[i], 1.0, batch, number)
        return sum((weight * whole.for_loss[i] for i, weight in enumerate(weighings) if weight), ops.zeros(()))

    def _targets(self) -> dict[str, MatchingLoss]:
        """The targets that losses ask for, each with one of these losses."""
        return {loss.target: loss for loss in self.matching_losses if loss.target is not None}

    def _teacher_products(self, x: Structure, labels: Structure, directions: dict) -> dict[str, Any]:
        """What the losses see of the teacher, each `(B, …)`, by name; and the cotangent of its largest output."""
        linearization = linearize(self.teacher, x, xla=bool(self.jit_compile))
        targets = self._targets()
        cotangents = {}
        if "label" in targets:
            cotangents["label"] = target_cotangent(targets["label"], linearization.outputs, labels)
        if "predicted" in targets:
            cotangents["predicted"] = as_cotangent(linearization.outputs, None)
        products = self._see(linearization, labels, cotangents, directions, side=0)
        return products | {key: value for key, value in cotangents.items() if key == "predicted"}

    def _see(
        self, linearization: Linearization, labels: Structure | None, cotangents: dict, directions: dict, side: int
    ) -> dict[str, Any]:
        """What the losses see of the teacher (side 0) or of the student (side 1)."""
        check_dependence(self.matching_losses, linearization)
        sites = {name: [pair[side] for pair in pairs] for name, pairs in self._sites.items()}
        biased = [loss for loss in self.matching_losses if loss.pairs is not None and loss.pairs.kind == "biases"]
        nodes = dict.fromkeys(node for loss in biased for site in sites[loss.name] for node in site.nodes)
        with_inputs = any(loss.sees_inputs for loss in self.matching_losses)
        view = View(linearization, labels, cotangents, list(nodes), with_inputs)
        return {
            f"{loss.name}/{i}": tensor
            for loss in self.matching_losses
            for i, tensor in enumerate(loss.see(view, sites[loss.name], directions[loss.name]))
        }

    def with_teacher(self, x: Structure, y: Structure | None = None, batch_size: int = 128) -> dict[str, np.ndarray]:
        """The data with what the losses see of the teacher, computed once. Pass it to `fit` in place of `x`.

        It is for data that is the same in every epoch: then the teacher runs only once. If input-Jacobians are
        matched, the products take about as much memory as `x`.

        Args:
            x: arrays `(N, …)`, as `fit` takes them.
            y: the labels `(N, …)`, if a loss has `target="label"`.
            batch_size: how many examples are computed at once.

        Returns:
            A dict of arrays, each with a first axis N, for `fit`, `evaluate` or `tf.data`.

        Raises:
            ValueError: a loss has random directions, which are new in every step.

        Example:

        >>> import keras, numpy as np, jvpreg
        >>> teacher, student = (keras.Sequential([keras.Input((8,)), keras.layers.Dense(3)]) for _ in range(2))
        >>> distiller = jvpreg.JacobianDistiller(teacher, student, [jvpreg.distillation.JacobianMatching(0.1)])
        >>> distiller.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        >>> x, y = np.ones((32, 8)), np.zeros(32)
        >>> history = distiller.fit(distiller.with_teacher(x, y), y, epochs=3, verbose=0)
        """
        if random := [loss.name for loss in self.matching_losses if loss.draws]:
            raise ValueError(
                "`with_teacher` needs losses that see the same of the teacher in every step. Received losses with "
                f"random directions: {random}. Pass the plain data to `fit`."
            )
        checks.count("batch_size", batch_size)
        own = own_keys(self.jacobian_regularizers)
        if isinstance(y, dict) and not own.isdisjoint(y):
            y = compiled_labels(y, own, alone=True)
        if y is not None and "label" in self._targets():
            self._check_labels(y)
        given = {INPUTS: x} if y is None else {INPUTS: x, "labels": y}
        products = _TeacherProducts(self).predict(given, batch_size=batch_size, verbose=0)
        return {INPUTS: x, PRODUCTS: products}

    def _check_labels(self, y: Structure) -> None:
        """Raises if labels are class indices for outputs `(B, K)`, K > 1, and there is no such class."""
        labels, shapes = tree.flatten(y), [output.shape for output in getattr(self.student, "outputs", None) or ()]
        if len(labels) == 1 and len(shapes) == 1 and len(shapes[0]) == 2 and shapes[0][1] != 1:
            shape = np.shape(labels[0])
            if len(shape) == 1 or (len(shape) == 2 and shape[1] == 1):
                checks.classes("y", labels[0], shapes[0][1])

    def _find_sites(self) -> dict[str, list[tuple[Site, Site]]]:
        """The layers that the losses name, found by running both networks on one example of zeros, if any are named."""
        sites: dict[str, list[tuple[Site, Site]]] = {loss.name: [] for loss in self.matching_losses}
        paired = [loss for loss in self.matching_losses if loss.pairs is not None]
        if paired:
            teacher, student = (linearize(model, zeros_like_inputs(model, role)) for model, role in _roles(self))
            sites |= {loss.name: loss.pairs.find(teacher, student) for loss in paired if loss.pairs is not None}
        return sites

    def get_config(self) -> Config:
        """The teacher, the student, the losses and the seed."""
        losses = [loss.loss if isinstance(loss, KerasLoss) else loss for loss in self.matching_losses]
        return {
            "teacher": keras.saving.serialize_keras_object(self.teacher),
            "student": keras.saving.serialize_keras_object(self.student),
            "losses": [keras.saving.serialize_keras_object(loss) for loss in losses],
            "seed": self.seed,
            "name": self.name,
        }

    @classmethod
    def from_config(cls, config: Config, custom_objects: Mapping[str, Any] | None = None) -> "JacobianDistiller":
        """The distiller that `get_config` described."""
        parts = {
            key: keras.saving.deserialize_keras_object(config[key], custom_objects=custom_objects)
            for key in ("teacher", "student", "losses")
        }
        return cls(**{**config, **parts})


register_wrapper(JacobianDistiller, lambda model: model.base)


class _TeacherProducts(keras.Model):
    """A model from inputs, and labels if there are any, to the teacher's products, for `predict`."""

    def __init__(self, distiller: JacobianDistiller):
        super().__init__(autocast=False, name="teacher_products")
        self.distiller = distiller
        self.built = True

    def call(self, given: Structure) -> Structure:
        nothing = dict.fromkeys(loss.name for loss in self.distiller.matching_losses)
        return self.distiller._teacher_products(given[INPUTS], given.get("labels"), nothing)


def _split(inputs: Structure) -> tuple[Any, dict[str, Any] | None]:
    """The inputs, and the teacher's products if they came with them."""
    if isinstance(inputs, dict) and PRODUCTS in inputs:
        return inputs[INPUTS], inputs[PRODUCTS]
    return inputs, None


def _of_loss(loss: MatchingLoss, products: dict[str, Any]) -> list:
    """What a loss saw, in the order of its tensors."""
    count = sum(key.rpartition("/")[0] == loss.name for key in products)
    return [products[f"{loss.name}/{i}"] for i in range(count)]


def _roles(distiller: JacobianDistiller) -> tuple[tuple[keras.Model, str], ...]:
    return (distiller.teacher, "teacher"), (distiller.student, "student")
