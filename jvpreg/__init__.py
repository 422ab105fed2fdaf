"""jvpreg: the input-output Jacobian of a Keras model, to see and to train with."""

from jvpreg import (
    callbacks,
    clone,
    constraints,
    distillation,
    estimators,
    layers,
    probes,
    regularizers,
    rules,
    saliency,
    testing,
)
from jvpreg.distillation import JacobianDistiller
from jvpreg.freeze import jacobian, jvp, linearize, vjp, weight_jvp
from jvpreg.full_jacobian import FullJacobian, full_jacobian
from jvpreg.linearization import Linearization
from jvpreg.model import JacobianModel
from jvpreg.paths import layer_paths
from jvpreg.registry import Pushforward, affine, elementwise, gate, linear, register_rule, scale
from jvpreg.tangent_model import TangentModel

__version__ = "0.1.0"

__all__ = [
    "FullJacobian",
    "JacobianDistiller",
    "JacobianModel",
    "Linearization",
    "Pushforward",
    "TangentModel",
    "affine",
    "callbacks",
    "clone",
    "constraints",
    "distillation",
    "elementwise",
    "estimators",
    "full_jacobian",
    "gate",
    "jacobian",
    "jvp",
    "layer_paths",
    "layers",
    "linear",
    "linearize",
    "probes",
    "register_rule",
    "regularizers",
    "rules",
    "saliency",
    "scale",
    "testing",
    "vjp",
    "weight_jvp",
]
