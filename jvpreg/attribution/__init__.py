"""What the input and every source of bias contribute to an output, and saliency maps made of it and of gradients."""

from jvpreg.attribution import saliency
from jvpreg.attribution.decomposition import FullJacobian, full_jacobian

__all__ = ["FullJacobian", "full_jacobian", "saliency"]
