"""jvpreg: the input-output Jacobian of a Keras model, to see and to train with."""

from jvpreg.common import backend  # noqa: F401 - before all that imports Keras

# isort: split
from jvpreg import (
    attribution,
    callbacks,
    clone,
    constraints,
    distillation,
    estimators,
    layers,
    probes,
    regularizers,
    rules,
    testing,
)
from jvpreg.attribution import FullJacobian, full_jacobian
from jvpreg.distillation import JacobianDistiller
from jvpreg.engine.paths import layer_paths
from jvpreg.linearization import Linearization
from jvpreg.products import hessian, jacobian, jvp, linearize, vjp, weight_jvp
from jvpreg.rules.registry import register_rule
from jvpreg.tangent_model import TangentModel
from jvpreg.training.model import JacobianModel

__version__ = "0.1.0"

__all__ = [
    "FullJacobian",
    "JacobianDistiller",
    "JacobianModel",
    "Linearization",
    "TangentModel",
    "attribution",
    "callbacks",
    "clone",
    "constraints",
    "distillation",
    "estimators",
    "full_jacobian",
    "hessian",
    "jacobian",
    "jvp",
    "layer_paths",
    "layers",
    "linearize",
    "probes",
    "register_rule",
    "regularizers",
    "rules",
    "testing",
    "vjp",
    "weight_jvp",
]
