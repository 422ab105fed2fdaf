"""Saliency maps: that of the full-Jacobian, and those with which it is compared, all with one signature.

Each function takes a model of images `(B, H, W, C)`, the images and a target as `jvpreg.full_jacobian` takes it, and
returns a map `(B, H, W)`. If an input or an output of an example is not finite, its map is NaN.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from jvpreg.attribution.decomposition import FullJacobian, as_cotangent
from jvpreg.attribution.decomposition import full_jacobian as decompose
from jvpreg.common import checks, seeds
from jvpreg.common.typing import ArrayLike, Structure, Tensor
from jvpreg.engine.finite import finite_examples, nan_unless
from jvpreg.engine.node import Node
from jvpreg.linearization import Linearization
from jvpreg.products import linearize

# The methods of `keras.ops.image.resize` that all backends have.
INTERPOLATIONS = ("bilinear", "nearest", "bicubic", "lanczos3", "lanczos5")


def full_jacobian(
    model: keras.Layer, x: Structure, target: Structure | None = None, interpolation: str = "bilinear"
) -> Tensor:
    """The full-Jacobian map: the sum of `|x ⊙ ∇ₓ f|` and of the resized `|Σ_c f^b|` of every spatial layer.

    Channels are summed before the absolute value; nothing else is done: layers are not normalized against each other.
    Layers whose output is not an image are left out, as in the paper.

    Args:
        model: a Keras model.
        x: images `(B, H, W, C)`.
        target: which output: see `jvpreg.full_jacobian`.
        interpolation: of `keras.ops.image.resize`.

    Returns:
        The map, `(B, H, W)`, not negative.

    Raises:
        ValueError: the model's input is not one batch of images.

    Reference: Srinivas & Fleuret (2018), "Full-Jacobian Representation of Neural Networks", equation 4.

    Example:

    >>> import keras, numpy as np, jvpreg
    >>> model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3), keras.layers.Flatten(),
    ...     keras.layers.Dense(2)])
    >>> tuple(jvpreg.attribution.saliency.full_jacobian(model, np.ones((5, 8, 8, 3))).shape)
    (5, 8, 8)
    """
    checks.choice("interpolation", interpolation, INTERPOLATIONS)
    full = decompose(model, _images(x), target)
    gradient = full.input_jacobian
    at_input = ops.abs(ops.sum(ops.cast(full.inputs, gradient.dtype) * gradient, axis=-1))
    return at_input + _from_biases(full, interpolation)


def bias_jacobian(
    model: keras.Layer, x: Structure, target: Structure | None = None, interpolation: str = "bilinear"
) -> Tensor:
    """The full-Jacobian map without the input's part.

    Args:
        model: a Keras model.
        x: images `(B, H, W, C)`.
        target: which output: see `jvpreg.full_jacobian`.
        interpolation: of `keras.ops.image.resize`.

    Returns:
        The map, `(B, H, W)`, not negative.

    Reference: Srinivas & Fleuret (2018), equation 4, its second term.
    """
    checks.choice("interpolation", interpolation, INTERPOLATIONS)
    full = decompose(model, _images(x), target)
    # If no layer has a bias, only the output shows whether an example is finite.
    return _from_biases(full, interpolation) + 0 * ops.reshape(full.target_output, (-1, 1, 1))


def input_gradient(model: keras.Layer, x: Structure, target: Structure | None = None) -> Tensor:
    """The gradient at each pixel in absolute values: `Σ_c |∇ₓ f|`.

    Args:
        model: a Keras model.
        x: images `(B, H, W, C)`.
        target: which output: see `jvpreg.full_jacobian`.

    Returns:
        The map, `(B, H, W)`, not negative.

    Reference: Simonyan, Vedaldi & Zisserman (2014), "Deep inside convolutional networks".
    """
    linearization = linearize(model, _images(x))
    return _known(linearization, ops.sum(ops.abs(_gradient(linearization, target)), axis=-1))


def integrated_gradients(
    model: keras.Layer, x: Structure, target: Structure | None = None, baseline: ArrayLike = 0.0, num_steps: int = 32
) -> Tensor:
    """The gradient averaged on the line from a baseline to the image, times their difference: `Σ_c (x − x₀) ⊙ ∫ ∇f`.

    Args:
        model: a Keras model.
        x: images `(B, H, W, C)`.
        target: which output: see `jvpreg.full_jacobian`; by default the largest output at `x`.
        baseline: the image x₀: a number, or an array that broadcasts to `x`.
        num_steps: points of the midpoint rule; each costs a primal and a backward pass.

    Returns:
        The map, `(B, H, W)`, which may be negative: its sum is `f(x) − f(x₀)` up to the error of the rule.

    Raises:
        ValueError: `num_steps` is not a positive integer.

    Reference: Sundararajan, Taly & Yan (2017), "Axiomatic attribution for deep networks".
    """
    checks.count("num_steps", num_steps)
    x = _images(x)
    start = checks.tensor("baseline", baseline, dtype=x.dtype)
    pairs = zip(tuple(start.shape)[::-1], tuple(x.shape)[::-1], strict=False)
    if len(start.shape) > len(x.shape) or any(a not in (1, b) for a, b in pairs):
        raise checks.invalid("baseline", f"a number, or an array that broadcasts to `x`, {tuple(x.shape)}", baseline)
    start = ops.broadcast_to(start, ops.shape(x))
    linearization = linearize(model, x)
    cotangent = as_cotangent(linearization.outputs, target)
    total = ops.zeros_like(x)
    for step in range(num_steps):
        point = start + (step + 0.5) / num_steps * (x - start)
        total = total + _gradient(linearize(model, point), cotangent)
    return _known(linearization, ops.sum((x - start) * total / num_steps, axis=-1))


def smooth_grad(
    model: keras.Layer,
    x: Structure,
    target: Structure | None = None,
    noise: float = 0.15,
    num_samples: int = 16,
    seed: int = 0,
) -> Tensor:
    """The gradient averaged over noisy copies of the image: the sum of its absolute values at each pixel.

    Args:
        model: a Keras model.
        x: images `(B, H, W, C)`.
        target: which output: see `jvpreg.full_jacobian`; by default the largest output at `x`.
        noise: standard deviation, as a part of each image's range.
        num_samples: noisy copies; each costs a primal and a backward pass.
        seed: of the noise.

    Returns:
        The map, `(B, H, W)`, not negative.

    Raises:
        ValueError: `num_samples` is not a positive integer.

    Reference: Smilkov et al. (2017), "SmoothGrad".
    """
    checks.count("num_samples", num_samples)
    checks.number("noise", noise, least=0)
    seed = checks.seed("seed", seed)
    x = _images(x)
    linearization = linearize(model, x)
    cotangent = as_cotangent(linearization.outputs, target)
    spread = noise * (ops.max(x, axis=(1, 2, 3), keepdims=True) - ops.min(x, axis=(1, 2, 3), keepdims=True))
    generator = seeds.generator(seed)
    total = ops.zeros_like(x)
    for _ in range(num_samples):
        noisy = x + spread * keras.random.normal(ops.shape(x), dtype=x.dtype, seed=generator)
        total = total + _gradient(linearize(model, noisy), cotangent)
    return _known(linearization, ops.sum(ops.abs(total), axis=-1) / num_samples)


def guided_backpropagation(model: keras.Layer, x: Structure, target: Structure | None = None) -> Tensor:
    """The gradient at each pixel in absolute values, if every ReLU passes back positive gradients only.

    Args:
        model: a Keras model. Without a ReLU in it, this is `input_gradient`.
        x: images `(B, H, W, C)`.
        target: which output: see `jvpreg.full_jacobian`.

    Returns:
        The map, `(B, H, W)`, not negative.

    Reference: Springenberg et al. (2015), "Striving for simplicity: the all convolutional net".
    """
    linearization = linearize(model, _images(x))

    def guide(node: Node, cotangents: list) -> list:
        return [ops.maximum(c, 0.0) for c in cotangents] if _is_relu(node) else cotangents

    gradient = linearization.modified_vjp(as_cotangent(linearization.outputs, target), guide)
    return _known(linearization, ops.sum(ops.abs(gradient), axis=-1))


def grad_cam(
    model: keras.Layer,
    x: Structure,
    target: Structure | None = None,
    layer: str | None = None,
    interpolation: str = "bilinear",
) -> Tensor:
    """A layer's channels, weighted by their mean gradients, where their sum is positive.

    Args:
        model: a Keras model.
        x: images `(B, H, W, C)`.
        target: which output: see `jvpreg.full_jacobian`.
        layer: path of the layer; by default the last one whose output is an image of more than one pixel.
        interpolation: of `keras.ops.image.resize`.

    Returns:
        The map, `(B, H, W)`, not negative.

    Raises:
        ValueError: there is no such layer.

    Reference: Selvaraju et al. (2017), "Grad-CAM".
    """
    checks.choice("interpolation", interpolation, INTERPOLATIONS)
    checks.text("layer", layer, optional=True)
    linearization = linearize(model, _images(x))
    outputs = linearization.node_outputs()
    nodes = linearization.nodes if layer is None else linearization.nodes_of(layer)
    chosen = [name for node in nodes for name in node.output_names if name in outputs]
    images = [name for name in chosen if len(outputs[name].shape) == 4 and math.prod(outputs[name].shape[1:3]) > 1]
    if not images:
        raise ValueError(
            "Invalid value for argument `layer`. Expected a layer whose output is an image (B, H, W, C) of more than "
            f"one pixel. Received: layer={layer!r}"
        )
    cotangent = as_cotangent(linearization.outputs, target)
    _, gradients = linearization.gradients(cotangent, images[-1:], with_inputs=False)
    gradient = gradients[images[-1]]
    weights = ops.mean(gradient, axis=(1, 2), keepdims=True)
    salient = ops.relu(ops.sum(weights * ops.cast(outputs[images[-1]], gradient.dtype), axis=-1))
    return _known(linearization, _resized(salient, linearization.inputs[0].shape[1:3], interpolation))


METHODS: dict[str, Callable] = {
    "full-Jacobian": full_jacobian,
    "bias-Jacobian": bias_jacobian,
    "input gradient": input_gradient,
    "guided backpropagation": guided_backpropagation,
    "integrated gradients": integrated_gradients,
    "SmoothGrad": smooth_grad,
    "Grad-CAM": grad_cam,
}


def figure(images: ArrayLike, maps: Mapping[str, Any], titles: Sequence[str] | None = None) -> Any:
    """Lays out images and their maps as in table 5 of the paper: a row for each image, a column for each method.

    Args:
        images: `(B, H, W, C)` in [0, 1], of one channel or three.
        maps: a dict from a column's heading to maps `(B, H, W)`. Their absolute values are shown, each up to its 99th
            percentile.
        titles: a label for each row.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ImportError: matplotlib is not installed.

    Reference: Srinivas & Fleuret (2018), table 5.
    """
    checks.packages("saliency.figure", "pictures", "matplotlib")
    from matplotlib.figure import Figure

    images = ops.convert_to_numpy(images)
    rows, columns = len(images), 1 + len(maps)
    page = Figure(figsize=(1.5 * columns, 1.5 * rows + 0.3), layout="constrained")
    grid = page.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
    for row, image in enumerate(images):
        grid[row, 0].imshow(np.squeeze(image), cmap="gray", vmin=0.0, vmax=1.0)
        grid[row, 0].set_ylabel(titles[row] if titles else "")
        for column, salient in enumerate(maps.values(), start=1):
            shown = np.abs(ops.convert_to_numpy(salient)[row])
            grid[row, column].imshow(shown, cmap="magma", vmin=0.0, vmax=np.percentile(shown, 99) or 1.0)
    for axes, heading in zip(grid[0], ["image", *maps], strict=True):
        axes.set_title(heading.replace(" ", "\n", 1), fontsize=9)
    return page


def _images(x: Structure) -> Tensor:
    """Raises unless `x` is one batch of images with the channels last."""
    if keras.config.image_data_format() != "channels_last":
        raise ValueError("Saliency maps need `keras.config.image_data_format()` to be channels_last.")
    if isinstance(x, (list, tuple, dict)):
        raise checks.invalid("x", "images (B, H, W, C)", x)
    images = checks.tensor("x", x, dtype=None if ops.is_tensor(x) else keras.config.floatx())
    if len(images.shape) != 4:
        raise checks.invalid("x", "images (B, H, W, C)", x)
    return images


def _known(linearization: Linearization, maps: Tensor) -> Tensor:
    """Maps `(B, H, W)`, with NaN for examples with an input or an output that is not finite."""
    return nan_unless(finite_examples(linearization), maps)


def _gradient(linearization: Linearization, target: Structure) -> Tensor:
    return linearization.vjp(as_cotangent(linearization.outputs, target))


def _from_biases(full: FullJacobian, interpolation: str) -> Tensor:
    size = full.inputs.shape[1:3]
    spatial = [c for c in full.bias_jacobians.values() if len(c.shape) == 4]
    maps = [_resized(ops.abs(ops.sum(c, axis=-1)), size, interpolation) for c in spatial]
    return sum(maps, ops.zeros(ops.shape(full.inputs)[:3], full.input_jacobian.dtype))


def _resized(maps: Tensor, size: Sequence[int], interpolation: str) -> Tensor:
    resized = ops.image.resize(ops.expand_dims(maps, -1), size, interpolation=interpolation)
    return ops.cast(resized[..., 0], maps.dtype)


def _is_relu(node: Node) -> bool:
    operation = node.operation
    function = getattr(operation, "activation", operation)
    # Keras has no public name for the operation of `keras.ops.relu` in a graph.
    is_operation = isinstance(operation, keras.layers.ReLU) or type(operation).__name__ == "Relu"
    return is_operation or function is keras.activations.relu
