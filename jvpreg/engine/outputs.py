"""What an operation returns beside its values: None, numbers, and the losses that it records."""

from collections.abc import Callable, Sequence

from keras import ops, tree

from jvpreg.common.eager import leaves_of
from jvpreg.engine.node import Value


def tensors_of(outputs):
    """The outputs of a model, without None and whatever else is no tensor: then a list, or a single tensor."""
    leaves = tree.flatten(outputs)
    kept = [leaf for leaf in leaves if isinstance(leaf, Value)]
    return outputs if len(kept) == len(leaves) else kept if len(kept) > 1 else kept[0]


def as_recorded(outputs, kept: Sequence[bool] | None, constant: Callable):
    """The outputs of an operation for which its call with symbols had a symbol.

    Args:
        outputs: with values for tensors, and for other leaves whatever they are.
        kept: for each leaf whether there was a symbol; None if there was one for all.
        constant: makes the value of a tensor that no input reaches: `constant(tensor, batched=False)`.
    """
    if kept is None:
        return outputs
    found = [leaf for leaf, keep in zip(leaves_of(outputs), kept, strict=True) if keep]
    # A number is a tensor for some backends.
    return [x if isinstance(x, Value) else constant(ops.convert_to_tensor(x), batched=False) for x in found]


def record_activity_losses(operation, outputs) -> None:
    """Adds activity losses, as `Layer.__call__` does: of each output the loss, divided by the size of the batch."""
    regularizer = getattr(operation, "activity_regularizer", None)
    if regularizer is not None:
        for primal in (leaf.primal for leaf in leaves_of(outputs) if isinstance(leaf, Value)):
            loss = regularizer(primal)
            operation.add_loss(loss / ops.cast(ops.shape(primal)[0], loss.dtype) if len(primal.shape) else loss)
