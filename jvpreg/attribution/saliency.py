"""Saliency maps: that of the full-Jacobian, and those with which it is compared, all with one signature.

Each function takes a model, its input and a target as `jvpreg.full_jacobian` takes it. Of images `(B, H, W, C)` it
returns a map `(B, H, W)`; of several inputs a structure of maps like that of the inputs. Those that go by gradients
alone take any input, and with `at=` the embeddings of tokens, and return attributions that are not reduced if
`reduce=None`. If an input or an output of an example is not finite, its map is NaN.
"""

from collections.abc import Callable

from jvpreg.attribution.figures import figure, token_figure
from jvpreg.attribution.gradients import (
    gradient_times_input,
    guided_backpropagation,
    input_gradient,
    integrated_gradients,
    smooth_grad,
)
from jvpreg.attribution.images import bias_jacobian, full_jacobian, grad_cam

__all__ = [
    "METHODS",
    "bias_jacobian",
    "figure",
    "full_jacobian",
    "grad_cam",
    "gradient_times_input",
    "guided_backpropagation",
    "input_gradient",
    "integrated_gradients",
    "smooth_grad",
    "token_figure",
]

METHODS: dict[str, Callable] = {
    "full-Jacobian": full_jacobian,
    "bias-Jacobian": bias_jacobian,
    "input gradient": input_gradient,
    "guided backpropagation": guided_backpropagation,
    "integrated gradients": integrated_gradients,
    "SmoothGrad": smooth_grad,
    "Grad-CAM": grad_cam,
}
"""The maps of images by name, as the paper compares them."""
