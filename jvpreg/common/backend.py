"""Keras, or one sentence that says which backend is to be installed: Keras alone would fail with a missing module."""

import importlib.util
import os

BACKENDS = ("tensorflow", "jax", "torch")

if os.environ.get("KERAS_BACKEND") not in (None, "", *BACKENDS):
    raise ImportError(
        "Invalid value for the environment variable `KERAS_BACKEND`. Expected tensorflow, jax or torch, on which "
        f"jvpreg runs. Received: {os.environ['KERAS_BACKEND']}"
    )

try:
    import keras  # noqa: F401
except ModuleNotFoundError as error:
    missing = (error.name or "").partition(".")[0]
    if missing not in BACKENDS:
        raise
    found = [name for name in BACKENDS if importlib.util.find_spec(name)]
    names = " or ".join(found) or "jax or torch, once that is installed"
    raise ImportError(
        f"Keras' backend is {missing}, which is not installed. Install with `pip install jvpreg[{missing}]`, or "
        f"set the environment variable `KERAS_BACKEND` to {names}."
    ) from None
