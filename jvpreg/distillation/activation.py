"""Matching of outputs."""

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from jvpreg.common import checks
from jvpreg.common.typing import Config, Structure, Tensor
from jvpreg.distillation.base import MatchingLoss, View, squared_distance
from jvpreg.distillation.pairs import Site


@keras.saving.register_keras_serializable(package="jvpreg")
class ActivationMatching(MatchingLoss):
    """Matches outputs: `‖f − g‖²`; or softened probabilities, `T² KL(softmax(g/T) ‖ softmax(f/T))`.

    It can be used in `keras.distillation.Distiller` too.

    Args:
        weight: the loss gains `weight × mean` of it.
        temperature: T; None for the squared distance of the logits.
        name: of its metric; it logs `activation_matching`, the mean over the
            examples of the squared distance or divergence.

    Raises:
        ValueError: an argument is out of its range.

    Reference: Ba & Caruana (2014), "Do Deep Nets Really Need to be Deep?"; with a temperature, Hinton, Vinyals & Dean
    (2015), "Distilling the Knowledge in a Neural Network".

    Example:

    >>> import jvpreg, numpy as np
    >>> loss = jvpreg.distillation.ActivationMatching(1.0)
    >>> [float(d) for d in loss.distance([np.array([[1.0, 2.0]])], [np.array([[1.0, 5.0]])])]
    [9.0]
    """

    def __init__(self, weight: float, temperature: float | None = None, name: str | None = None):
        super().__init__(weight, name)
        self.temperature = checks.number("temperature", temperature, above=0, optional=True)

    def see(self, view: View, sites: Sequence[Site], directions: Structure | None) -> list:
        """The outputs."""
        return view.outputs

    def distance(self, teacher: list, student: list) -> Tensor:
        """The distance of each example, over all outputs: `(B,)`."""
        if self.temperature is None:
            return squared_distance(teacher, student)
        return sum(_divergence(g, f, self.temperature) for g, f in zip(teacher, student, strict=True))

    def compute_loss(self, teacher_outputs: Structure, student_outputs: Structure, **kwargs: Any) -> Tensor:
        """`weight × mean(distance)`, as `keras.distillation.Distiller` asks for it."""
        outputs = (keras.tree.flatten(teacher_outputs), keras.tree.flatten(student_outputs))
        return self.weight * ops.mean(self.distance(*outputs))

    def validate_model_compatibility(self, teacher: keras.Model, student: keras.Model) -> None:
        """Does nothing: this loss needs only outputs, which any two models have."""

    def get_config(self) -> Config:
        """The arguments of `__init__`."""
        return {**super().get_config(), "temperature": self.temperature}


def _divergence(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    dtype = keras.backend.result_type(student.dtype, "float32")
    g, f = (ops.log_softmax(ops.cast(logits, dtype) / temperature) for logits in (teacher, student))
    divergence = temperature**2 * ops.exp(g) * (g - f)
    return ops.sum(ops.reshape(divergence, (ops.shape(f)[0], -1)), axis=-1)
