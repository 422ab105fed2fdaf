"""Jacobian regularizers: directions in which to look at the Jacobian, and a price for what is seen."""

from jvpreg.regularizers.base import JacobianRegularizer, Seen
from jvpreg.regularizers.jacobian import JacobianNorm

__all__ = ["JacobianNorm", "JacobianRegularizer", "Seen"]
