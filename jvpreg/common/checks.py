"""Checks of arguments: one function for each kind, and one form for the error, which names the argument.

Each returns the value for the caller to keep (a plain number for one of NumPy's), or raises a ValueError before
anything is computed. They look at Python values, shapes and dtypes; only `classes` reads a tensor's numbers.
"""

import importlib.util
import math
import operator
import os
from collections.abc import Collection
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops

LONGEST = 300  # characters of a value in an error
MOST_ENTRIES = 16  # of an array that is shown as it is
NUMBERS = "a dense array of real numbers"
# Attributes that ragged and sparse tensors have, and dense ones do not. Their classes would have to be imported.
RAGGED_OR_SPARSE = ("row_splits", "dense_shape", "nse", "is_sparse", "is_sparse_csr", "is_nested")


def invalid(name: str, expected: str, value, owner: str = "") -> ValueError:
    """The error for an argument.

    Args:
        name: of the argument, as its caller writes it.
        expected: what was expected, in words.
        value: what was received.
        owner: whose argument it is, if its name alone does not tell.
    """
    of = f" of {owner}" if owner else ""
    received = f"Received: {name}={described(value)}"
    return ValueError(f"Invalid value for argument `{name}`{of}. Expected {expected}. {received}")


def described(value) -> str:
    """A value for an error: an array or a tensor by its shape, anything else as it prints, shortened if it is long."""
    if _is_ragged_or_sparse(value):
        return f"a ragged, sparse or symbolic {type(value).__name__}"  # which may have no shape to be told
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        few = isinstance(value, (np.ndarray, np.generic)) and value.size <= MOST_ENTRIES
        return f"{value!r}" if few else f"{type(value).__name__} of shape {tuple(value.shape)} and dtype {value.dtype}"
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def count(name: str, value, least: int = 1, most: int | None = None, optional: bool = False) -> Any:
    """An integer from `least` to `most`; None passes if it is optional."""
    if optional and value is None:
        return None
    if not is_integer(value) or value < least or (most is not None and value > most):
        expected = f"an integer, {least} or more" if most is None else f"an integer from {least} to {most}"
        raise invalid(name, f"{expected}{', or None' if optional else ''}", value)
    return int(value)


def number(
    name: str,
    value,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    optional: bool = False,
    finite: bool = True,
    owner: str = "",
) -> Any:
    """A number within bounds: `least` and `most` included, `above` and `below` not; it must be finite if `finite`."""
    if optional and value is None:
        return None
    bounds = [
        (", {:g} or more", operator.ge, least),
        (" above {:g}", operator.gt, above),
        (", at most {:g}", operator.le, most),
        (", below {:g}", operator.lt, below),
    ]
    fits = is_real(value) and not math.isnan(value) and (math.isfinite(value) or not finite)
    if not fits or not all(holds(value, bound) for _, holds, bound in bounds if bound is not None):
        limits = "".join(words.format(bound) for words, _, bound in bounds if bound is not None)
        raise invalid(name, f"a {'finite ' * finite}number{limits}{', or None' if optional else ''}", value, owner)
    return float(value)


def boolean(name: str, value, optional: bool = False) -> Any:
    """True or False; None passes if it is optional."""
    if optional and value is None:
        return None
    if not isinstance(value, (bool, np.bool_)):
        raise invalid(name, f"True{', False or None' if optional else ' or False'}", value)
    return bool(value)


def choice(name: str, value, choices: Collection) -> Any:
    """One of the choices."""
    # Not compared with arrays; nor with True, which equals 1.
    comparable = value is None or isinstance(value, str) or is_integer(value)
    found = [known for known in choices if comparable and value == known]
    if not found:
        shown = [str(known) if known is None or is_integer(known) else f'"{known}"' for known in choices]
        raise invalid(name, " or ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown), value)
    return found[0]


def text(name: str, value, optional: bool = False, owner: str = "") -> Any:
    """A string that is not empty; None passes if it is optional."""
    if optional and value is None:
        return None
    if not isinstance(value, str) or not value:
        raise invalid(name, f"a string that is not empty{', or None' if optional else ''}", value, owner)
    return value


def names(name: str, value, optional: bool = False, owner: str = "", what: str = "names of nodes") -> Any:
    """A list of strings, each once; None passes if they are optional."""
    if optional and value is None:
        return None
    several = list(value) if isinstance(value, (list, tuple)) else [value]
    if not isinstance(value, (list, tuple)) or not all(isinstance(path, str) and path for path in several):
        raise invalid(name, f"a list of {what}{', or None' if optional else ''}", value, owner)
    if len(set(several)) < len(several):
        raise invalid(name, "each of them once", value, owner)
    return several


def paths(name: str, value, optional: bool = False, owner: str = "") -> Any:
    """A list of paths of layers, each once; None passes if they are optional."""
    return names(name, value, optional, owner, "paths of layers")


def path(name: str, value, optional: bool = False) -> Any:
    """A path of the file system; None passes if it is optional."""
    if optional and value is None:
        return None
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value) or isinstance(os.fspath(value), bytes):
        raise invalid(name, f"a path{', or None' if optional else ''}", value)
    return Path(value)


def packages(owner: str, extra: str, *needed: str) -> None:
    """Raises unless optional packages are installed.

    Args:
        owner: what needs them.
        extra: the extra of this package that installs them.
        needed: the names by which they are imported.

    Raises:
        ImportError: one is not installed; the message says how to install it.
    """
    if missing := [package for package in needed if importlib.util.find_spec(package) is None]:
        raise ImportError(f"`{owner}` needs {' and '.join(missing)}. Install with `pip install jvpreg[{extra}]`.")


def function(name: str, value, expected: str, optional: bool = False) -> Any:
    """A callable; None passes if it is optional."""
    if not callable(value) and not (optional and value is None):
        raise invalid(name, f"{expected}{', or None' if optional else ''}", value)
    return value


def seed(name: str, value, generator: bool = False, optional: bool = False) -> Any:
    """An integer, 0 or more; a generator or None only if they are allowed."""
    if (optional and value is None) or (generator and isinstance(value, keras.random.SeedGenerator)):
        return value
    if not is_integer(value) or value < 0:
        others = [", or a `keras.random.SeedGenerator`"] * generator + [", or None"] * optional
        raise invalid(name, "an integer, 0 or more" + "".join(others), value)
    return int(value)


def is_integer(value) -> bool:
    """Whether it is one integer, and not a boolean. NumPy's integers pass."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_real(value) -> bool:
    """Whether it is one real number, and not a boolean. NumPy's numbers pass."""
    return isinstance(value, Real) and not isinstance(value, bool)


def float_dtype(name: str, value) -> str:
    """The name of a floating-point dtype."""
    try:
        dtype = keras.backend.standardize_dtype(value)
    except Exception:  # Not a dtype at all: backends fail in different ways.
        dtype = ""
    if not dtype or not keras.backend.is_float_dtype(dtype):
        raise invalid(name, "a floating-point dtype", value)
    return dtype


def tensor(name: str, value, dtype=None):
    """A dense tensor of real numbers: from an array, a tensor, a variable, a number, or lists of numbers.

    If it is to have a complex dtype, its numbers may be complex.
    """
    given = value if hasattr(value, "dtype") else _as_array(value)
    of_complex = dtype is not None and "complex" in keras.backend.standardize_dtype(dtype)
    if given is None or not _holds_numbers(given.dtype, of_complex) or _is_ragged_or_sparse(given):
        raise invalid(name, NUMBERS, value)
    try:
        return ops.convert_to_tensor(value, dtype=dtype)
    except Exception as error:  # Each backend has its own errors.
        raise invalid(name, NUMBERS, value) from error


def array(name: str, value) -> np.ndarray:
    """Finite numbers as a NumPy array in float64, not empty."""
    found = _as_array(value)
    if isinstance(found, np.ndarray) and found.dtype.kind in "iuf" and found.size and np.all(np.isfinite(found)):
        return found.astype("float64")
    raise invalid(name, "a finite number, or an array of them", value)


def classes(name: str, indices, num_classes: int) -> None:
    """Raises if there is no such class, unless the indices are a tensor in a graph, which cannot be read."""
    try:
        array = np.asarray(indices if isinstance(indices, (np.ndarray, np.generic)) else ops.convert_to_numpy(indices))
    except Exception:  # A tensor that has no value yet. Each backend has its own error.
        return
    if array.dtype.kind not in "iuf":
        raise invalid(name, "classes, integers", indices)
    wrong = (array < 0) | (array >= num_classes) | (array != np.floor(array))
    if wrong.any():
        expected = f"classes from 0 to {num_classes - 1}"
        raise ValueError(
            f"Invalid value for argument `{name}`. Expected {expected}. Received: {array[wrong].flat[0]} among them."
        )


def _as_array(value) -> np.ndarray | None:
    """Numbers, or lists of them, as an array; None if they are not numbers."""
    if isinstance(value, keras.KerasTensor) or value is None:
        return None
    try:
        return np.asarray(value)
    except Exception:  # For example lists of different lengths, tensors of a graph.
        leaves = keras.tree.flatten(value)
        return leaves[0] if leaves and all(hasattr(leaf, "dtype") for leaf in leaves) else None


def _holds_numbers(dtype, of_complex: bool = False) -> bool:
    try:
        name = keras.backend.standardize_dtype(dtype)
    except (ValueError, TypeError):
        return False
    return name not in ("string", "object") and (of_complex or "complex" not in name)


def _is_ragged_or_sparse(value) -> bool:
    return isinstance(value, keras.KerasTensor) or any(
        getattr(value, attribute, False) is not False for attribute in RAGGED_OR_SPARSE
    )
