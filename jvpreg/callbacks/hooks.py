"""What Keras does not tell a callback: which others are listed before it, and how many batches were taken."""

from typing import Any

import keras


def listed_before(callback: keras.callbacks.Callback, frame: Any) -> list[keras.callbacks.Callback]:
    """The callbacks before this one in the list that is just giving it its model; none if there is no such list.

    Args:
        callback: this is called in its `set_model`.
        frame: of that `set_model`, by `inspect.currentframe()`. There is no public way: Keras gives a callback its
            model but not the list, which is a local of `fit`. So the list is read from the calling frame.
    """
    owner = frame.f_back.f_locals.get("self") if frame is not None and frame.f_back is not None else None
    if not isinstance(owner, keras.callbacks.CallbackList) or callback not in owner.callbacks:
        return []
    return owner.callbacks[: owner.callbacks.index(callback)]


def batches_taken(callback: keras.callbacks.Callback, batch: int) -> int:
    """The number of batches of the epoch that were taken, by the number that a hook is given.

    With `steps_per_execution`, Keras counts beyond the end of the epoch: such batches do not count.
    """
    steps = (callback.params or {}).get("steps")
    return batch + 1 if steps is None else min(batch + 1, steps)


def is_due(passed: int, batches: int, every: int) -> bool:
    """Whether a measurement is due after some batch since `passed`: a hook may run after several batches at once."""
    return batches // every > passed // every
