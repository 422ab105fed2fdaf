"""Attributes of Keras that are others while a call is traced: for the thread that traces it, and for no other.

Another thread, such as one that reads data or answers another request, finds what Keras has.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable
from typing import Any

_lock = threading.Lock()
_by_keras: dict[tuple, Any] = {}
"""By owner and name, what Keras has there, while any thread has something else."""
_users: dict[tuple, int] = {}
"""In how many contexts that is."""
_local = threading.local()


@contextlib.contextmanager
def replaced(changes: Iterable[tuple[Any, str, Callable | None]]):
    """A context in which functions of Keras are others in this thread.

    Args:
        changes: an owner (a class or module), the name of its function, and the other one:
            `function(before, *args, **kwargs)` gets the one that was there. None takes the name away, for all threads.
    """
    with contextlib.ExitStack() as put_back:
        for owner, name, function in changes:
            put_back.enter_context(_one(owner, name, function))
        yield


@contextlib.contextmanager
def _one(owner, name: str, function: Callable | None):
    key, here = (owner, name), _of_this_thread()
    with _lock:
        _users[key] = _users.get(key, 0) + 1
        if key not in _by_keras:
            _by_keras[key] = by_keras = getattr(owner, name)
            if function is None:
                delattr(owner, name)
            else:
                setattr(owner, name, _dispatching(key, by_keras))
    outer = here.get(key)
    here[key] = function and functools.partial(function, outer or _by_keras[key])
    try:
        yield
    finally:
        here[key] = outer
        with _lock:
            _users[key] -= 1
            if not _users[key]:
                setattr(owner, name, _by_keras.pop(key))


def _dispatching(key: tuple, by_keras: Callable) -> Callable:
    @functools.wraps(by_keras)
    def call(*args, **kwargs):
        return (_of_this_thread().get(key) or by_keras)(*args, **kwargs)

    return call


def _of_this_thread() -> dict[tuple, Any]:
    """By owner and name, what this thread has there."""
    return _local.__dict__.setdefault("here", {})
