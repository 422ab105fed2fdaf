"""How examples are weighed, and which labels and weights belong to the loss and which to a regularizer alone."""

from collections.abc import Collection, Iterable, Mapping, Sequence

import keras
import numpy as np
from keras import ops, tree

from jvpreg.common.typing import ArrayLike, Structure, Tensor
from jvpreg.regularizers.base import JacobianRegularizer


def own_keys(regularizers: Sequence[JacobianRegularizer]) -> frozenset[str]:
    """The keys of the labels that belong to the regularizers alone."""
    return frozenset(key for regularizer in regularizers for key in regularizer.label_keys)


def compiled_labels(labels: Structure | None, own: Collection[str], alone: bool = False) -> Structure:
    """The labels without those that belong to a regularizer alone; a single label that is left is returned by itself.

    Args:
        labels: those given to `fit`.
        own: the keys of the labels that belong to a regularizer alone.
        alone: whether there may be no other labels.

    Raises:
        ValueError: labels are missing.
    """
    if not own:
        return labels
    if not isinstance(labels, dict) or not set(own) <= set(labels) or (len(labels) == len(own) and not alone):
        raise ValueError(
            f"Invalid value for argument `y`. Expected a dict with the labels of the loss and {sorted(own)}, which "
            f"a regularizer asks for. Received: {sorted(labels) if isinstance(labels, dict) else type(labels)}"
        )
    return _without(labels, own)


def compiled_weights(sample_weight: Structure | None, own: Collection[str]) -> Structure:
    """The weights of the labels of the loss, in the structure of `compiled_labels`."""
    return _without(sample_weight, own) if own and isinstance(sample_weight, dict) else sample_weight


def _without(structure: dict, own: Collection[str]) -> Structure:
    left = {key: value for key, value in structure.items() if key not in own}
    return left if len(left) > 1 else next(iter(left.values()), None)


def example_weights(
    sample_weight: Structure | None, own: Collection[str] = (), keys: Iterable[str] = ()
) -> Tensor | None:
    """One weight for each example, `(B,)`; None if there are no weights.

    Args:
        sample_weight: as Keras hands them to a step: a tensor `(B, …)`, or a structure of them like the labels.
        own: the keys of the labels that belong to a regularizer alone.
        keys: the keys of the regularizer whose penalty is weighed: it has the weights of these labels.

    Without weights of its own, a regularizer has the mean of the other labels' weights; a missing weight counts as 1.
    Weights of parts of an example, of steps in time for instance, are averaged first, as the loss averages over the
    parts.
    """
    leaves = [sample_weight[key] for key in keys if isinstance(sample_weight, dict) and key in sample_weight]
    if all(leaf is None for leaf in leaves):
        leaves = tree.flatten(compiled_weights(sample_weight, own))
    if all(leaf is None for leaf in leaves):
        return None
    return sum(1.0 if leaf is None else _of_examples(leaf) for leaf in leaves) / len(leaves)


def _of_examples(weights: Tensor) -> Tensor:
    weights = ops.convert_to_tensor(weights)
    weights = ops.cast(weights, keras.backend.result_type(weights.dtype, "float32"))
    return weights if len(weights.shape) == 1 else ops.mean(weights, axis=tuple(range(1, len(weights.shape))))


def check_labels_beside(sample_weight: Structure | None, labels: Structure | None) -> None:
    """Raises a ValueError if there are weights but no labels: Keras would drop the weights silently."""
    if sample_weight is not None and labels is None:
        raise ValueError(
            "Invalid value for argument `sample_weight`. Expected None where there are no labels `y`, without which "
            f"Keras drops it. Received: sample_weight={sample_weight!r}; pass labels, or give both in a dataset."
        )


def given_weights(
    labels: Structure | None,
    own: Collection[str],
    sample_weight: Structure | None,
    class_weight: Mapping[int, float] | None,
    validation_split: float | None = None,
) -> tuple:
    """`sample_weight` and `class_weight` as Keras can take them.

    Keras weighs classes only if the labels are one tensor. If some labels belong to a regularizer alone, the classes
    are those of the other labels, and become weights of examples here.

    Raises:
        ValueError: the labels of the loss are several, or come in a dataset, or Keras is to split them.
    """
    if class_weight is None or sample_weight is not None or not own:
        return sample_weight, class_weight
    rest = None if labels is None else compiled_labels(labels, own)
    if rest is None or tree.is_nested(rest) or validation_split:
        raise ValueError(
            "Invalid value for argument `class_weight`. Expected None if the loss has several labels beside those of a "
            "regularizer, or if labels come in a dataset or are split by `validation_split`. "
            f"Received: class_weight={class_weight!r}; give each example a `sample_weight` instead."
        )
    return _weights_of_classes(rest, class_weight), None


def _weights_of_classes(labels: ArrayLike, class_weight: Mapping[int, float]) -> np.ndarray:
    """Each example's weight, `(B,)`, by its class; labels are class indices `(B,)` or `(B, 1)`, or one-hot `(B, K)`."""
    labels = np.asarray(ops.convert_to_numpy(labels))
    if labels.ndim > 1:
        labels = labels[..., 0] if labels.shape[-1] == 1 else labels.argmax(axis=-1)
    return np.array([class_weight.get(int(label), 1.0) for label in labels.round()], "float32")
