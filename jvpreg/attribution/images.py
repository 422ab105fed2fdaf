"""Maps of images by what layers return: those of the full-Jacobian, and Grad-CAM."""

import math
from collections.abc import Sequence

import keras
from keras import ops

from jvpreg.attribution.decomposition import FullJacobian
from jvpreg.attribution.decomposition import full_jacobian as decompose
from jvpreg.attribution.subject import Subject, in_batches
from jvpreg.common import checks
from jvpreg.common.typing import Structure, Tensor

# The methods of `keras.ops.image.resize` that all backends have.
INTERPOLATIONS = ("bilinear", "nearest", "bicubic", "lanczos3", "lanczos5")


def full_jacobian(
    model: keras.Layer,
    x: Structure,
    target: Structure | None = None,
    interpolation: str = "bilinear",
    batch_size: int | None = None,
) -> Structure:
    """The full-Jacobian map: the sum of `|x ⊙ ∇ₓ f|` and of the resized `|Σ_c f^b|` of every spatial layer.

    Channels are summed before the absolute value; nothing else is done: layers are not normalized against each other.
    Layers whose output is not an image are left out, as in the paper.

    Args:
        model: a Keras model.
        x: images `(B, H, W, C)`, or a structure of them.
        target: which output: see `jvpreg.full_jacobian`.
        interpolation: of `keras.ops.image.resize`.
        batch_size: how many examples are computed at once; by default all.

    Returns:
        The map, `(B, H, W)`, not negative; for several inputs, a structure of maps like `x`, each with the layers that
        depend on its input.

    Raises:
        ValueError: an input of the model is not a batch of images.

    Reference: Srinivas & Fleuret (2018), "Full-Jacobian Representation of Neural Networks", equation 4.

    Example:

    >>> import keras, numpy as np, jvpreg
    >>> model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3), keras.layers.Flatten(),
    ...     keras.layers.Dense(2)])
    >>> tuple(jvpreg.attribution.saliency.full_jacobian(model, np.ones((5, 8, 8, 3))).shape)
    (5, 8, 8)
    """
    checks.choice("interpolation", interpolation, INTERPOLATIONS)

    def maps(subject: Subject) -> Structure:
        full = _decomposed(subject)
        gradients = subject.linearization.flatten_inputs(full.input_jacobian)
        found = []
        for place, (image, gradient) in enumerate(zip(subject.points, gradients, strict=True)):
            at_input = ops.abs(ops.sum(ops.cast(image, gradient.dtype) * gradient, axis=-1))
            found.append(at_input + _from_biases(full, subject, place, interpolation))
        return subject.linearization.pack_inputs(found)

    return in_batches(maps, model, x, target, batch_size=batch_size)


def bias_jacobian(
    model: keras.Layer,
    x: Structure,
    target: Structure | None = None,
    interpolation: str = "bilinear",
    batch_size: int | None = None,
) -> Structure:
    """The full-Jacobian map without the input's part.

    Args:
        model: a Keras model.
        x: images `(B, H, W, C)`, or a structure of them.
        target: which output: see `jvpreg.full_jacobian`.
        interpolation: of `keras.ops.image.resize`.
        batch_size: how many examples are computed at once; by default all.

    Returns:
        The map, `(B, H, W)`, not negative; for several inputs, a structure of maps like `x`.

    Reference: Srinivas & Fleuret (2018), equation 4, its second term.
    """
    checks.choice("interpolation", interpolation, INTERPOLATIONS)

    def maps(subject: Subject) -> Structure:
        full = _decomposed(subject)
        found = [_from_biases(full, subject, place, interpolation) for place in range(len(subject.points))]
        # If no layer has a bias, only the output shows whether an example is finite.
        return subject.packed([part + 0 * ops.reshape(full.target_output, (-1, 1, 1)) for part in found])

    return in_batches(maps, model, x, target, batch_size=batch_size)


def grad_cam(
    model: keras.Layer,
    x: Structure,
    target: Structure | None = None,
    layer: str | None = None,
    interpolation: str = "bilinear",
    batch_size: int | None = None,
) -> Structure:
    """A layer's channels, weighted by their mean gradients, where their sum is positive.

    Args:
        model: a Keras model.
        x: images `(B, H, W, C)`, or a structure of them.
        target: which output: see `jvpreg.full_jacobian`.
        layer: path of the layer; by default the last one that depends on the input and whose output is an image of more
            than one pixel.
        interpolation: of `keras.ops.image.resize`.
        batch_size: how many examples are computed at once; by default all.

    Returns:
        The map, `(B, H, W)`, not negative; for several inputs, a structure of maps like `x`.

    Raises:
        ValueError: there is no such layer, or it does not depend on every input.

    Reference: Selvaraju et al. (2017), "Grad-CAM".
    """
    checks.choice("interpolation", interpolation, INTERPOLATIONS)
    checks.text("layer", layer, optional=True)

    def maps(subject: Subject) -> Structure:
        _check_images(subject)
        places = range(len(subject.points))
        names = [_layer_of(subject, place, layer) for place in places]
        outputs = subject.linearization.node_outputs()
        _, gradients = subject.linearization.gradients(subject.cotangent, list(dict.fromkeys(names)), with_inputs=False)
        found = []
        for image, name in zip(subject.points, names, strict=True):
            weights = ops.mean(gradients[name], axis=(1, 2), keepdims=True)
            salient = ops.relu(ops.sum(weights * ops.cast(outputs[name], weights.dtype), axis=-1))
            found.append(_resized(salient, image.shape[1:3], interpolation))
        return subject.packed(found)

    return in_batches(maps, model, x, target, batch_size=batch_size)


def _decomposed(subject: Subject) -> FullJacobian:
    _check_images(subject)
    return decompose(subject.linearization, None, subject.cotangent)


def _check_images(subject: Subject) -> None:
    """Raises unless every input is a batch of images with the channels last."""
    if keras.config.image_data_format() != "channels_last":
        raise ValueError("Saliency maps need `keras.config.image_data_format()` to be channels_last.")
    shapes = [tuple(image.shape) for image in subject.points]
    if any(len(shape) != 4 for shape in shapes):
        raise ValueError(
            "Invalid value for argument `x`. Expected images (B, H, W, C) in each input. Received: x with shape "
            f"{', '.join(map(str, shapes))}. `input_gradient` and its kin take any input."
        )


def _layer_of(subject: Subject, place: int, layer: str | None) -> str:
    """The name of the last output of a layer, or of all that depend on an input, that is an image."""
    linearization = subject.linearization
    outputs, reached = linearization.node_outputs(), {node.name for node in linearization.nodes_after_input(place)}
    given = linearization.nodes if layer is None else linearization.nodes_of(layer)
    names = [name for node in given if node.name in reached for name in node.output_names if name in outputs]
    images = [name for name in names if len(outputs[name].shape) == 4 and math.prod(outputs[name].shape[1:3]) > 1]
    if not images:
        of_input = "" if len(subject.points) == 1 else f", and depends on input {place}"
        raise ValueError(
            "Invalid value for argument `layer`. Expected a layer whose output is an image (B, H, W, C) of more than "
            f"one pixel{of_input}. Received: layer={layer!r}"
        )
    return images[-1]


def _from_biases(full: FullJacobian, subject: Subject, place: int, interpolation: str) -> Tensor:
    """The sum of the maps of the layers that depend on an input, `(B, H, W)`."""
    image = subject.points[place]
    reached = {name for node in subject.linearization.nodes_after_input(place) for name in node.output_names}
    spatial = [c for name, c in full.bias_jacobians.items() if name in reached and len(c.shape) == 4]
    maps = [_resized(ops.abs(ops.sum(c, axis=-1)), image.shape[1:3], interpolation) for c in spatial]
    return sum(maps, ops.zeros(ops.shape(image)[:3], full.target_output.dtype))


def _resized(maps: Tensor, size: Sequence[int], interpolation: str) -> Tensor:
    resized = ops.image.resize(ops.expand_dims(maps, -1), size, interpolation=interpolation)
    return ops.cast(resized[..., 0], maps.dtype)
