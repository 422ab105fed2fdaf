"""Checks of a distiller's arguments: teacher, student and losses must fit each other, before anything is computed."""

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops, tree

from jvpreg.common import checks, keras_private
from jvpreg.common.typing import Structure
from jvpreg.distillation.base import KerasLoss, MatchingLoss
from jvpreg.layers.jacobian_penalty import JacobianPenalty
from jvpreg.linearization import Linearization
from jvpreg.rules.registry import unwrap
from jvpreg.training.model import JacobianModel


def zeros_like_inputs(model: keras.Model, role: str) -> Structure:
    """One example of zeros, as the model's input."""
    specs = getattr(model, "inputs", None)
    if not specs and model.built:  # a subclassed model
        shapes = (model.get_build_config() or {}).get("input_shape")
        specs = None if shapes is None else tree.map_shape_structure(keras.KerasTensor, shapes)
    if specs is None or any(None in spec.shape[1:] for spec in tree.flatten(specs)):
        raise ValueError(
            f"Invalid value for argument `{role}`. Expected a built model with inputs of known shape, since a loss has "
            f"`layers`. Received: `{model.name}` with inputs {specs}. Give it a `keras.Input`."
        )
    return tree.map_structure(lambda spec: ops.zeros((1, *spec.shape[1:])), specs)


def metric_names(losses: Sequence[MatchingLoss]) -> list[str]:
    """The name of each loss, and the names of what else it measures."""
    return [name for loss in losses for name in (loss.name, *(f"{loss.name}_{measure}" for measure in loss.measures))]


def checked_losses(losses: Any) -> tuple[MatchingLoss, ...]:
    """The losses as matching losses.

    Raises:
        ValueError: it is not a list of losses, or they share a name.
    """
    known = (MatchingLoss, keras.distillation.DistillationLoss)
    if not isinstance(losses, (list, tuple)) or not losses or not all(isinstance(loss, known) for loss in losses):
        raise checks.invalid("losses", "a list of losses of `jvpreg.distillation` or of `keras.distillation`", losses)
    checked = tuple(loss if isinstance(loss, MatchingLoss) else KerasLoss(loss) for loss in losses)
    names = metric_names(checked)
    if len(set(names)) < len(names) or "loss" in names:
        raise ValueError(
            'Invalid value for argument `losses`. Expected names that differ, and none of them "loss", since each '
            f"names a metric (pass `name=`). Received: {names}"
        )
    return checked


def check_models(teacher: keras.Model, student: keras.Model) -> None:
    """Raises a ValueError if the two models cannot be teacher and student."""
    for role, model in (("teacher", teacher), ("student", student)):
        if not isinstance(model, keras.Model) or (role == "student" and isinstance(model, JacobianModel)):
            raise checks.invalid(role, "a plain Keras model", model)
    if not teacher.built:
        raise ValueError(
            f"Invalid value for argument `teacher`. Expected a built model. Received: `{teacher.name}`, which has no "
            "weights yet. Call it on a batch, or give it a `keras.Input`, first."
        )
    own = {id(variable) for variable in student.variables}
    if shared := [variable.path for variable in teacher.variables if id(variable) in own]:
        raise ValueError(
            "Invalid value for argument `student`. Expected a model with variables of its own, since the teacher's are "
            f"frozen. Received: a student that shares {shared}. Use `keras.models.clone_model`."
        )
    blocks = [layer.name for layer in keras_private.layers_within(student) if isinstance(layer, JacobianPenalty)]
    if blocks:
        raise ValueError(
            "Invalid value for argument `student`. Expected a model without JacobianPenalty layers, whose penalties a "
            f"step that linearizes the whole model leaves out. Received: {blocks}. Pass `jacobian_regularizers` to "
            "`compile`."
        )
    outputs = [_output_shapes(unwrap(teacher)), _output_shapes(student)]
    if None not in outputs and outputs[0] != outputs[1]:
        raise ValueError(
            "Invalid value for argument `student`. Expected outputs like the teacher's: "
            f"{outputs[0]}. Received: {outputs[1]}"
        )


def check_dependence(losses: Sequence[MatchingLoss], linearization: Linearization) -> None:
    """Raises a ValueError if a Jacobian is zero whatever the weights are, and a loss looks at it."""
    looking = [f"`{loss.name}` ({type(loss).__name__})" for loss in losses if loss.sees_inputs or loss.draws]
    if looking and linearization.is_constant:
        raise ValueError(
            "Invalid value for argument `losses`. Expected losses without input-Jacobians, such as "
            "`BiasJacobianMatching`, since the outputs do not depend on an input of real numbers and integers have no "
            f"Jacobian. Received: {', '.join(looking)}, which would be 0. If the integers stand for real numbers, give "
            "the networks floats; if they are token ids, distill what comes after the embedding."
        )


def _output_shapes(model: keras.Model) -> list[tuple] | None:
    """The output shapes for one example; None if they are not known before the model runs."""
    outputs = getattr(model, "outputs", None)
    return [tuple(output.shape[1:]) for output in outputs] if outputs else None
