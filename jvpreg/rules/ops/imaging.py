"""Operations that take the entries of an image from other places: linear in the image, not in the places."""

import functools
from collections.abc import Callable

import keras
from keras import ops

from jvpreg.common.keras_private import image
from jvpreg.rules.contract import Pushforward
from jvpreg.rules.examples import along, has_batch
from jvpreg.rules.families import each_input
from jvpreg.rules.folding import each_probe
from jvpreg.rules.registry import register_rule


@register_rule(image.MapCoordinates)
def map_coordinates(operation, x, coordinates, context):
    """The slope along an axis is that of the line between two grid points, whose values are interpolated as y is.

    Nearest neighbours have no slope.
    """
    y = operation.call(x, coordinates)
    of_points = ops.unstack(coordinates, len(x.shape), axis=0)

    def at(axis, points):
        return operation.call(x, ops.stack([*of_points[:axis], points, *of_points[axis + 1 :]]))

    slopes = []
    if operation.order == 1:
        below = [ops.floor(points) for points in of_points]
        slopes = [at(axis, points + 1) - at(axis, points) for axis, points in enumerate(below)]
    # A constant beyond the edge has no tangent.
    moved = image.MapCoordinates(operation.order, operation.fill_mode)

    def of_image(tangent, coordinates, *slopes):
        return each_probe(lambda row: moved.call(row, coordinates[0]))(tangent)

    def of_places(tangent, coordinates, *slopes):
        rows = ops.unstack(tangent, len(x.shape), axis=1)
        products = [slope * row for slope, row in zip(slopes, rows, strict=True)] if slopes else []
        return functools.reduce(ops.add, products, ops.zeros_like(rows[0]))

    push = each_input(of_image, of_places)
    return y, Pushforward(push, coordinates, *slopes, takes_none=True, examples="coupled")


@register_rule(image.AffineTransform, image.PerspectiveTransform, image.ScaleAndTranslate)
def transformed(operation, x, *geometry, context):
    """Linear in the image. What says where each entry comes from is left to autodiff, if it has a tangent at all.

    TensorFlow has no derivative by a transform.
    """
    shape, given = ((geometry[0],), geometry[1:]) if isinstance(operation, image.ScaleAndTranslate) else ((), geometry)
    held = [i for i, a in enumerate(given) if ops.is_tensor(a)]
    without_filling = operation
    if getattr(operation, "fill_value", 0) != 0:  # What fills an image beyond its edge has no tangent.
        names = [name for name in ("interpolation", "fill_mode", "data_format") if hasattr(operation, name)]
        without_filling = type(operation)(**{name: getattr(operation, name) for name in names})

    def apply(operation, x, geometry):
        # A copy: on Torch, `affine_transform` writes into the transform that it is given.
        return operation.call(x, *shape, *(ops.copy(ops.convert_to_tensor(a)) for a in geometry))

    def frozen_among(given, frozen):
        return [frozen[held.index(i)][0] if i in held else a for i, a in enumerate(given)]

    def of_image(tangent, x, *frozen):
        return each_probe(lambda row: apply(without_filling, row, frozen_among(given, frozen)))(tangent)

    def of_place(i, tangent, x, *frozen):
        if keras.backend.backend() == "tensorflow" and not isinstance(operation, image.ScaleAndTranslate):
            raise NotImplementedError(
                f"`keras.ops.image.{operation.name}` is asked for a derivative by its transform, which TensorFlow does "
                "not have. Sample the image by `keras.ops.image.map_coordinates` instead."
            )
        at = frozen_among(given, frozen)

        def moved(place):
            return apply(operation, x[0], [*at[:i], place, *at[i + 1 :]])

        return each_probe(lambda row: ops.jvp(moved, (at[i],), (row,))[1])(tangent)

    parts: list[Callable] = [of_image, *(functools.partial(of_place, i) for i in held)]
    examples = along(operation, x.shape) if has_batch(operation, len(x.shape)) else "coupled"
    tensors = [given[i] for i in held]
    return apply(operation, x, given), Pushforward(each_input(*parts), x, *tensors, takes_none=True, examples=examples)


@register_rule(image.ElasticTransform)
def elastic_transform(operation, x, context):
    """Linear in the image, for one draw of the field that bends it."""
    if keras.backend.backend() == "torch" or not isinstance(operation.seed, int):
        raise NotImplementedError(
            "`keras.ops.image.elastic_transform` draws another field at each call, so it cannot be frozen. Give it a "
            "whole number as its seed (Torch ignores that), or transform the images before the model."
        )
    return operation.call(x), Pushforward(each_probe(operation.call), examples=along(operation, x.shape))
