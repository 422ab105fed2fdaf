"""Names in the logs. Two metrics of one name would share a line there, and nobody could tell them apart."""

from collections.abc import Iterable, Sequence
from typing import Any

from keras import tree

from jvpreg.regularizers.base import JacobianRegularizer


def reported_names(regularizers: Sequence[JacobianRegularizer]) -> list[str]:
    """The name of each regularizer, and the names of what else it measures."""
    return [name for r in regularizers for name in (r.name, *(f"{r.name}/{measure}" for measure in r.measures))]


def check_names(names: Sequence[str], output_names: Iterable[str], *args: Any, **compiled: Any) -> None:
    """Raises a ValueError if a penalty or measure has the name of something else in the logs.

    Args:
        names: the names of all penalties and measures.
        output_names: the names of the model's outputs, if it has several.
        *args: of `keras.Model.compile`.
        **compiled: of `keras.Model.compile`.
    """
    if len(set(names)) < len(names):
        raise ValueError(
            "Invalid value for argument `jacobian_regularizers`. Expected names that differ, since each names a metric "
            f"(pass `name=`, also to two of one kind that differ by `at`). Received: {names}"
        )
    order = ("optimizer", "loss", "loss_weights", "metrics", "weighted_metrics")
    compiled = {**dict(zip(order, args, strict=False)), **compiled}
    given = [metric for key in ("metrics", "weighted_metrics") for metric in tree.flatten(compiled.get(key))]
    metrics = [_name_of(metric) for metric in given if metric is not None]
    theirs = {"loss", *metrics, *(f"weighted_{metric}" for metric in metrics)}
    theirs |= {f"{output}_{name}" for output in output_names for name in ("loss", *theirs)}
    for name in names:
        if name in theirs or name.startswith("val_"):
            other = "what Keras reports of a validation" if name.startswith("val_") else f"the loss or metric `{name}`"
            raise ValueError(
                "Invalid value for argument `name` of a Jacobian regularizer or a matching loss. "
                'Expected a name that is not "loss", is not the name of a metric, and does not begin with "val_". '
                f"Received: name={name!r}, which would "
                f"replace {other} in the logs"
            )


def _name_of(metric: Any) -> str:
    return metric if isinstance(metric, str) else str(getattr(metric, "name", None) or getattr(metric, "__name__", ""))
