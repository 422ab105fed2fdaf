"""Names in the logs: two metrics of one name would be one line there, and which of them it is would not be told."""

from collections.abc import Iterable, Sequence

from keras import tree

from jvpreg.regularizers.base import JacobianRegularizer


def reported_names(regularizers: Sequence[JacobianRegularizer]) -> list[str]:
    """Of each regularizer its own, and those of what else it measures."""
    return [name for r in regularizers for name in (r.name, *(f"{r.name}/{measure}" for measure in r.measures))]


def check_names(names: Sequence[str], output_names: Iterable[str], *args, **compiled) -> None:
    """Raises a ValueError where what a model reports beside Keras has the name of something else in the logs.

    Args:
        names: of all that it reports of regularizers and matching losses.
        output_names: those of the model's outputs, where it has several.
        *args: of `keras.Model.compile`.
        **compiled: of `keras.Model.compile`.
    """
    if len(set(names)) < len(names):
        raise ValueError(
            "Invalid value for argument `jacobian_regularizers`. Expected names that differ, since each names a metric "
            f"(pass `name=`). Received: {names}"
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
                'Expected a name other than "loss", than '
                f'those of the metrics, and not one that begins with "val_". Received: name={name!r}, which would '
                f"replace {other} in the logs"
            )


def _name_of(metric) -> str:
    return metric if isinstance(metric, str) else str(getattr(metric, "name", None) or getattr(metric, "__name__", ""))
