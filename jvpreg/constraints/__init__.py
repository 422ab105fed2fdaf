"""Constraints on the input-output Jacobian, listed in `compile(jacobian_regularizers=[...])` like any regularizer.

A constraint says what must hold of `J u`, and where (`at`); its `enforcement` says how a model is made to obey it. The
violation is a metric in training and validation, and `verify` reports it for a trained model.
"""

from jvpreg.constraints import tangents
from jvpreg.constraints.base import Constraint
from jvpreg.constraints.enforcement import AugmentedLagrangian, Penalty
from jvpreg.constraints.fields import DivergenceFree, Symmetric
from jvpreg.constraints.linear import Linear
from jvpreg.constraints.points import Box, between
from jvpreg.constraints.regions import Rectangle, Segment
from jvpreg.constraints.slopes import Bounded, Invariant, KnownDerivative, Lipschitz, Monotone
from jvpreg.constraints.verification import ExactReport, Report, verify

__all__ = [
    "AugmentedLagrangian",
    "Bounded",
    "Box",
    "Constraint",
    "DivergenceFree",
    "ExactReport",
    "Invariant",
    "KnownDerivative",
    "Linear",
    "Lipschitz",
    "Monotone",
    "Penalty",
    "Rectangle",
    "Report",
    "Segment",
    "Symmetric",
    "between",
    "tangents",
    "verify",
]
