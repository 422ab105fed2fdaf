"""What Keras does not tell the hooks of a callback: which others are listed, and how many batches were taken."""

import keras


def listed_before(callback: keras.callbacks.Callback, frame) -> list[keras.callbacks.Callback]:
    """Those before a callback in the list that is just giving it its model; none if there is no such list.

    Args:
        callback: in whose `set_model` this is called.
        frame: of that `set_model`, by `inspect.currentframe()`. There is no public way: Keras hands a callback its
            model and not its list, which `fit` keeps for itself, so the list is found in the caller.
    """
    owner = frame.f_back.f_locals.get("self") if frame is not None and frame.f_back is not None else None
    if not isinstance(owner, keras.callbacks.CallbackList) or callback not in owner.callbacks:
        return []
    return owner.callbacks[: owner.callbacks.index(callback)]


def batches_taken(callback: keras.callbacks.Callback, batch: int) -> int:
    """How many batches of the epoch were taken, by the number that a hook is given, and no more than there are.

    With `steps_per_execution`, Keras counts on beyond the end of the epoch.
    """
    steps = (callback.params or {}).get("steps")
    return batch + 1 if steps is None else min(batch + 1, steps)


def is_due(passed: int, batches: int, every: int) -> bool:
    """Whether an n-th batch is among those since `passed`: with `steps_per_execution`, a hook runs after several."""
    return batches // every > passed // every
