"""Matching of input-Jacobians and of bias-Jacobians."""

import math
from collections.abc import Sequence
from typing import Literal

import keras
from keras import ops, tree

from jvpreg import probes
from jvpreg.common import checks
from jvpreg.common.typing import Config, Seed, Structure, Tensor
from jvpreg.distillation.base import TARGETS, MatchingLoss, View, squared_distance
from jvpreg.distillation.maps import alike
from jvpreg.distillation.pairs import LayerPairs, Site


@keras.saving.register_keras_serializable(package="jvpreg")
class JacobianMatching(MatchingLoss):
    """Matches input-Jacobians: `‖∇ₓ f_c − ∇ₓ g_c‖²` for one output c, or `‖J_f − J_g‖_F²` for all of them.

    Its metric has a companion, `NAME_angle`: the mean angle between the two Jacobians, in degrees. A weight of 0
    reports both and trains on neither.

    Args:
        weight: the loss gains `weight × mean` of this distance.
        target: which output. `"label"`, the default: the output of the label. Labels are those of `fit`, class indices
            or one-hot; a single output `(B, 1)` is the target whatever the labels are, and needs none. `"predicted"`:
            the teacher's largest output.
        num_probes: P, instead of a target: all outputs are matched, by P random directions u for each example, the same
            for both networks. The mean of `‖(J_f − J_g) u‖²` is `‖J_f − J_g‖_F²`, and its weight gradient takes only
            first-order autodiff through a forward computation. The angle is then that of the products, an estimate.
        name: of its metric; it logs `jacobian_matching`, the mean over the examples of the squared distance.

    Raises:
        ValueError: an argument is out of its range; in `fit`, there are no labels.

    Reference: Czarnecki et al. (2017), "Sobolev Training for Neural Networks"; Srinivas & Fleuret (2018),
    "Full-Jacobian Representation of Neural Networks", section 7.1.

    Example:

    >>> import jvpreg
    >>> jvpreg.distillation.JacobianMatching(0.1).target, jvpreg.distillation.JacobianMatching(0.1, num_probes=4).target
    ('label', None)
    """

    measures = ("angle",)

    def __init__(
        self,
        weight: float,
        target: Literal["label", "predicted"] | None = None,
        num_probes: int | None = None,
        name: str | None = None,
    ):
        super().__init__(weight, name)
        if num_probes is None:
            self.target = checks.choice("target", target, (*TARGETS, None)) or "label"
        elif target is not None:
            raise checks.invalid("num_probes", f"None beside `target`, which is {target!r}", num_probes)
        self.num_probes = checks.count("num_probes", num_probes, optional=True)
        self.draws = num_probes is not None
        self.sees_inputs = num_probes is None

    def draw(self, inputs: Structure, seed: Seed) -> Structure:
        """Standard normal directions, `(P, B, …)`."""
        return probes.draw("gaussian", inputs, self.num_probes or 1, seed)

    def see(self, view: View, sites: Sequence[Site], directions: Structure | None) -> list:
        """The input-Jacobian of the target, like the inputs; or `J u`, `(B, P, …)` like the outputs."""
        if directions is None:
            return view.input_jacobian(self.target)  # type: ignore[arg-type]  # not None without directions
        return [ops.moveaxis(product, 0, 1) for product in tree.flatten(view.linearization.jvp(directions))]

    def distance(self, teacher: list, student: list) -> Tensor:
        """The distance of each example, over all inputs; or the mean over the probes: `(B,)`."""
        return squared_distance(teacher, student) / (self.num_probes or 1)

    def measure(self, teacher: list, student: list) -> dict[str, Tensor]:
        """The angle in degrees, `(B,)`."""
        return {"angle": angle(teacher, student)}

    def get_config(self) -> Config:
        """The arguments of `__init__`."""
        return {**super().get_config(), "target": self.target, "num_probes": self.num_probes}


@keras.saving.register_keras_serializable(package="jvpreg")
class BiasJacobianMatching(MatchingLoss):
    """Matches bias-Jacobians layer by layer, summed over channels only: `Σ_l ‖Σ_ch f^b_l − Σ_ch g^b_l‖²`.

    The bias-Jacobian of a layer is `∂f_c/∂y ⊙ c`, with y its output and c its intercept: an explicit bias, the
    implicit bias of batch normalization, or what a smooth activation leaves over. With `JacobianMatching` it matches
    full-Jacobians.

    Args:
        weight: the loss gains `weight × mean` of this distance.
        layers: pairs of paths, `(teacher_layer, student_layer)`, of layers or of blocks of them; or `"auto"`: the last
            layer with a bias, or normalization, of each spatial size that both have, and the choice is printed. If two
            maps differ in size, each is summed to the smaller size.
        target: `"label"` or `"predicted"`: see `JacobianMatching`. Losses of one target share their backward passes.
        name: of its metric; it logs `bias_jacobian_matching`, the mean over the examples of the squared distance.

    Raises:
        ValueError: an argument is out of its range; in `JacobianDistiller`, a layer is not found, or has no bias.

    Reference: Srinivas & Fleuret (2018), "Full-Jacobian Representation of Neural Networks", section 4.1.3.

    Example:

    >>> import jvpreg
    >>> jvpreg.distillation.BiasJacobianMatching(0.1, layers=[("norm6", "norm9")]).target
    'label'
    """

    def __init__(
        self,
        weight: float,
        layers: Sequence[tuple[str, str]] | Literal["auto"] = "auto",
        target: Literal["label", "predicted"] = "label",
        name: str | None = None,
    ):
        super().__init__(weight, name)
        self.pairs = LayerPairs(layers, "biases", type(self).__name__)
        self.layers = layers if isinstance(layers, str) else [list(pair) for pair in layers]
        self.target: Literal["label", "predicted"] = checks.choice("target", target, TARGETS)

    def see(self, view: View, sites: Sequence[Site], directions: Structure | None) -> list:
        """The bias-Jacobian of each layer, summed over its channels: `(B, *sizes)`."""
        return [
            sum(ops.sum(view.bias_jacobian(self.target, node), axis=site.channel_axis) for node in site.nodes)
            for site in sites
        ]

    def distance(self, teacher: list, student: list) -> Tensor:
        """The distance of each example, over all pairs: `(B,)`."""
        maps = [alike(g, f, keep_sum=True) for g, f in zip(teacher, student, strict=True)]
        return squared_distance([g for g, _ in maps], [f for _, f in maps])

    def get_config(self) -> Config:
        """The arguments of `__init__`."""
        return {**super().get_config(), "layers": self.layers, "target": self.target}


def angle(left: Sequence, right: Sequence) -> Tensor:
    """The angle between two lists of tensors `(B, …)`, each list one vector an example: degrees, `(B,)`.

    By half-angles, since an arccos near 1 loses all digits. With one vector of zeros it is 90, with two it is 0.

    Reference: Kahan (2006), "How Futile are Mindless Assessments of Roundoff in Floating-Point Computation?"
    """
    a, b = (_unit(vector) for vector in (left, right))
    return (360 / math.pi) * ops.arctan2(_length(a - b), _length(a + b))


def _unit(tensors: Sequence) -> Tensor:
    flat = [ops.reshape(tensor, (ops.shape(tensor)[0], -1)) for tensor in tensors]
    joined = ops.concatenate(flat, axis=-1)
    # In units of the largest entry first: the square of a small number may be 0.
    largest = ops.max(ops.abs(joined), axis=-1, keepdims=True)
    joined = joined / ops.where(largest > 0, largest, 1.0)
    length = ops.expand_dims(_length(joined), -1)
    return joined / ops.where(length > 0, length, 1.0)


def _length(vectors: Tensor) -> Tensor:
    return ops.sqrt(ops.sum(ops.square(vectors), axis=-1))
