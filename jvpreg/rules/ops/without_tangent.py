"""Operations through which no tangent passes: comparisons, indices, and what is made of shapes alone."""

from jvpreg.common.keras_private import core, nn, numpy_ops
from jvpreg.rules.registry import register_rule


@register_rule(
    core.StopGradient,
    nn.OneHot,
    numpy_ops.All,
    numpy_ops.Any,
    numpy_ops.Argmax,
    numpy_ops.Argmin,
    numpy_ops.Argsort,
    numpy_ops.Ceil,
    numpy_ops.Equal,
    numpy_ops.Floor,
    numpy_ops.FloorDivide,
    numpy_ops.Greater,
    numpy_ops.GreaterEqual,
    numpy_ops.Isfinite,
    numpy_ops.Less,
    numpy_ops.LessEqual,
    numpy_ops.LogicalAnd,
    numpy_ops.LogicalNot,
    numpy_ops.LogicalOr,
    numpy_ops.NotEqual,
    numpy_ops.OnesLike,
    numpy_ops.Round,
    numpy_ops.Sign,
    numpy_ops.Trunc,
    numpy_ops.ZerosLike,
)
def constant(operation, *inputs, context, **kwargs):
    """Piecewise constant, or meant to have no derivative."""
    return operation.call(*inputs, **kwargs), None
