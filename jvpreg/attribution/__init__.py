"""The contributions of the input and of every source of bias to an output, and saliency maps."""

from jvpreg.attribution import saliency
from jvpreg.attribution.decomposition import FullJacobian, full_jacobian

__all__ = ["FullJacobian", "full_jacobian", "saliency"]
