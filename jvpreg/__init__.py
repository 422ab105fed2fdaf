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
from jvpreg.rules.registry import register_rule
from jvpreg.tangent_model import TangentModel

__version__ = "0.1.0"

__all__ = [
    "FullJacobian",
    "JacobianDistiller",
    "JacobianModel",
    "Linearization",
    "TangentModel",
    "callbacks",
    "clone",
    "constraints",
    "distillation",
    "estimators",
    "full_jacobian",
    "jacobian",
    "jvp",
    "layer_paths",
    "layers",
    "linearize",
    "probes",
    "register_rule",
    "regularizers",
    "rules",
    "saliency",
    "testing",
    "vjp",
    "weight_jvp",
]
