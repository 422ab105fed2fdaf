"""Matching of attention maps."""

from collections.abc import Sequence
from typing import Literal

import keras
from keras import ops

from jvpreg.common import checks
from jvpreg.common.typing import Config, Structure, Tensor
from jvpreg.distillation.base import MatchingLoss, View, squared_distance
from jvpreg.distillation.maps import alike
from jvpreg.distillation.pairs import LayerPairs, Site


@keras.saving.register_keras_serializable(package="jvpreg")
class AttentionMatching(MatchingLoss):
    """Matches where layers are active: `Σ_l ‖A(f_l) − A(g_l)‖²`, with A the sum of `|activation|` over the channels.

    Args:
        weight: the loss gains `weight × mean` of this distance.
        layers: pairs of paths, `(teacher_layer, student_layer)`, of layers or of blocks of them, whose last output
            counts; or `"auto"`: the last layer of each spatial size that both have, and the choice is printed. If two
            maps differ in size, each is averaged to the smaller size.
        normalized: whether A is the sum of squares instead, divided by its norm over all positions: then only where a
            layer is active counts, not how much.
        name: of its metric; it logs `attention_matching`, the mean over the examples of the squared distance.

    Raises:
        ValueError: an argument is out of its range; in `JacobianDistiller`, a layer is not found, or has no positions.

    Reference: Srinivas & Fleuret (2018), "Full-Jacobian Representation of Neural Networks", section 7.1; normalized,
    Zagoruyko & Komodakis (2017), "Paying More Attention to Attention", section 3.1, with its norm squared and p = 2.

    Example:

    >>> import jvpreg
    >>> jvpreg.distillation.AttentionMatching(1.0, layers=[("relu3", "relu5")]).normalized
    False
    """

    def __init__(
        self,
        weight: float,
        layers: Sequence[tuple[str, str]] | Literal["auto"] = "auto",
        normalized: bool = False,
        name: str | None = None,
    ):
        super().__init__(weight, name)
        self.pairs = LayerPairs(layers, "maps", type(self).__name__)
        self.layers = layers if isinstance(layers, str) else [list(pair) for pair in layers]
        self.normalized = checks.boolean("normalized", normalized)

    def see(self, view: View, sites: Sequence[Site], directions: Structure | None) -> list:
        """The attention map of each layer, `(B, *sizes)`."""
        return [self._attention(view.node_output(site.nodes[-1]), site.channel_axis) for site in sites]

    def _attention(self, activation: Tensor, channel_axis: int) -> Tensor:
        activation = ops.cast(activation, keras.backend.result_type(activation.dtype, "float32"))
        return ops.sum((ops.square if self.normalized else ops.abs)(activation), axis=channel_axis)

    def distance(self, teacher: list, student: list) -> Tensor:
        """The distance of each example, over all pairs: `(B,)`."""
        maps = [alike(g, f, keep_sum=False) for g, f in zip(teacher, student, strict=True)]
        if self.normalized:
            maps = [(_unit(g), _unit(f)) for g, f in maps]
        return squared_distance([g for g, _ in maps], [f for _, f in maps])

    def get_config(self) -> Config:
        """The arguments of `__init__`."""
        return {**super().get_config(), "layers": self.layers, "normalized": self.normalized}


def _unit(attention: Tensor) -> Tensor:
    """Each example's map divided by its norm; a map of zeros stays zero."""
    flat = ops.reshape(attention, (ops.shape(attention)[0], -1))
    square = ops.sum(ops.square(flat), axis=-1, keepdims=True)
    return flat / ops.sqrt(ops.where(square > 0, square, 1.0))
