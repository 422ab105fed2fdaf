"""jvpreg: the input-output Jacobian of a Keras model, to see and to train with."""

from jvpreg import callbacks, clone, estimators, layers, probes, regularizers, rules, testing
from jvpreg.linearization import Linearization, jacobian, jvp, linearize, vjp, weight_jvp
from jvpreg.model import JacobianModel
from jvpreg.registry import Pushforward, affine, elementwise, gate, linear, register_rule, scale
from jvpreg.tangent_model import TangentModel

__version__ = "0.1.0"

__all__ = [
    "JacobianModel",
    "Linearization",
    "Pushforward",
    "TangentModel",
    "affine",
    "callbacks",
    "clone",
    "elementwise",
    "estimators",
    "gate",
    "jacobian",
    "jvp",
    "layers",
    "linear",
    "linearize",
    "probes",
    "register_rule",
    "regularizers",
    "rules",
    "scale",
    "testing",
    "vjp",
    "weight_jvp",
]
