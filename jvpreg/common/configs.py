"""The values in a config: objects themselves, as `get_config` returns them, or their serialized form."""

from typing import Any

import keras


def revive(value: Any) -> Any:
    """The objects that a value of a config stands for.

    Args:
        value: an object, as `get_config` returned it; its serialized form; or a list of either.

    Raises:
        ValueError: Keras does not know a function or a class.
    """
    if isinstance(value, (list, tuple)):
        return type(value)(revive(item) for item in value)
    if not isinstance(value, dict) or "class_name" not in value:
        return value
    try:
        return keras.saving.deserialize_keras_object(value)
    except (TypeError, ValueError) as error:
        if value["class_name"] not in ("function", "__lambda__"):
            raise
        name = "a lambda" if value["class_name"] == "__lambda__" else f"the function `{value['config']}`"
        raise ValueError(
            f"Keras does not find {name} of a config again. Expected a named function that is registered with "
            "`@keras.saving.register_keras_serializable()` where it is defined, or listed in `custom_objects`. "
            f"Received: {value}"
        ) from error
