"""Right calls with one argument or two made wrong: each ends in a right result or in an error that names the argument.

`pytest tests/test_fuzz_interface.py --fuzz-interface=5000` makes so many calls.
"""

import dataclasses
import warnings

import keras
import numpy as np
import pytest
from interface import NOT_CALLED, public_names, rows

import jvpreg

# Arguments for which a huge value is right, but would run for hours or take more memory than there is.
UNBOUNDED = ("num_", "max_", "batch_size", "every_", "window", "pool_size")
HUGE = 10**9
RECTIFIED = (jvpreg.attribution.saliency.grad_cam, jvpreg.attribution.saliency.guided_backpropagation)
"""Maps that may be zero everywhere, since these methods leave out negative contributions."""

# These compile many programs on JAX, or run for long, so they are called rarely.
SLOW = ("testing.", "estimators.", "JacobianDistiller")


def ragged_or_sparse():
    """Ragged and sparse tensors of the backend, if it has them."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        return [tf.ragged.constant([[1.0], [2.0, 3.0]]), tf.sparse.from_dense([[1.0, 0.0]]), tf.constant(["a"])]
    if backend == "jax":
        from jax.experimental import sparse

        return [sparse.BCOO.fromdense(keras.ops.ones((2, 2)))]
    import torch

    return [torch.ones(2, 2).to_sparse(), torch.nested.nested_tensor([torch.ones(1), torch.ones(2)])]


def wrong_values(right) -> list:
    """Values that a user might give in place of a right one."""
    values = [None, True, False, -1, 0, 1, 1.5, HUGE, -HUGE, float("nan"), float("inf"), "", "nonsense", b"bytes"]
    values += [[], {}, (), [[1.0], [2.0, 3.0]], [None], ["nonsense"], {"wrong": 1.0}, object(), 1j, abs, keras.Layer]
    values += [np.array([]), np.array(["a", "b"]), np.array([None, 1.0]), np.array([1j]), np.float64("nan")]
    values += [keras.layers.ReLU(), keras.Input((3,)), *ragged_or_sparse()]
    if isinstance(right, np.ndarray):
        values += [right[:0], right[:1], right[..., :1], right[None], right[0], right + 1j, right.astype("str")]
        values += [right.astype(object), right > 0, right.astype("int32") + 9, right.astype("int32") - 9]
        values += [{"wrong": right}, [right, right], np.full(right.shape, np.nan), right[:, None]]
    if isinstance(right, (list, tuple)):
        values += [[*right, *right], [*right, None], [*right, "nonsense"], {"wrong": right}, [right]]
    return values


def other_forms(right) -> list:
    """The same value in other forms, whose result must be the same."""
    if isinstance(right, np.ndarray):
        return [keras.ops.convert_to_tensor(right), np.asfortranarray(right), right.astype(right.dtype)]
    if isinstance(right, bool):
        return [np.bool_(right)]
    if isinstance(right, (int, float)):
        return [np.asarray(right)[()]]
    return [list(right)] if isinstance(right, tuple) else []


def numbers_in(result) -> list[np.ndarray]:
    """The arrays that a call returned."""
    if dataclasses.is_dataclass(result):
        result = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    if isinstance(result, jvpreg.Linearization):
        result = result.outputs
    leaves = keras.tree.flatten(result) if isinstance(result, (list, tuple, dict)) else [result]
    found = [leaf for leaf in leaves if keras.ops.is_tensor(leaf) or isinstance(leaf, (np.ndarray, float))]
    stopped = [keras.ops.stop_gradient(leaf) if keras.ops.is_tensor(leaf) else leaf for leaf in found]
    return [np.asarray(keras.ops.convert_to_numpy(leaf)) for leaf in stopped]


def call(row, changed):
    made = {
        name: value() if callable(value) and name in ("teacher", "student") else value
        for name, value in row.arguments.items()
    }
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = row.function(**{**made, **changed})
    strange = [str(warning.message) for warning in caught if issubclass(warning.category, RuntimeWarning)]
    assert not strange, f"a warning that is not the project's: {strange[0]}"
    return result


def has_wrong_numbers(value) -> bool:
    """Whether a value itself holds numbers that are not finite, or so large that a result overflows."""
    try:
        return not np.all(np.abs(np.asarray(value, "complex128")) < HUGE)
    except Exception:
        return False


def fault_of(row, changed, expected, same: bool = False) -> str | None:
    """What is wrong with how the call ended; None if nothing is."""
    try:
        received = numbers_in(call(row, changed))
    except (ValueError, TypeError, NotImplementedError, KeyError) as error:
        message = str(error)
        if same:
            return f"a right value in another form is refused: {message[:300]}"
        # The changed value may be right by itself, so the error may name another argument that does not fit it.
        named = any(f"`{argument}`" in message or f"'{argument}'" in message for argument in row.arguments)
        return None if named else f"an error that names no argument: {type(error).__name__}: {message[:300]}"
    except Exception as error:
        return f"an obscure error: {type(error).__name__}: {str(error)[:300]}"
    if same and not all(np.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(received, expected, strict=True)):
        return "another result for another form of a right value"
    numbers = [array for array in received if array.dtype.kind in "fc"]
    if not all(np.isfinite(array).all() for array in numbers) and not any(map(has_wrong_numbers, changed.values())):
        return "numbers that are not finite"
    zero = numbers and all(array.size and not array.any() for array in numbers) and row.function not in RECTIFIED
    if zero and any(array.any() for array in expected if array.dtype.kind in "fc"):
        given = [value for value in changed.values() if isinstance(value, (np.ndarray, int, float))]
        # Deviations of equal numbers are rightly zero.
        if not any(np.size(value) and np.ptp(np.asarray(value, dtype=float)) == 0 for value in given):
            return "nothing but zeros"
    return None


def test_every_public_name_has_a_row():
    known = set(rows())
    missing = [name for name in public_names() if name not in known and name not in NOT_CALLED]
    assert not missing, f"without a row in tests/interface.py: {missing}"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_interface(request):
    calls = request.config.getoption("--fuzz-interface")
    random = np.random.default_rng(request.config.getoption("--fuzz-interface-seed"))
    table = rows()
    names = list(table)
    weights = np.array([0.15 if name.startswith(SLOW) else 1.0 for name in names])
    expected: dict[str, list] = {}
    faults = {}
    for _ in range(calls):
        name = str(random.choice(names, p=weights / weights.sum()))
        row = table[name]
        if name not in expected:
            expected[name] = numbers_in(call(row, {}))
        free = [argument for argument in row.arguments if argument not in row.fixed]
        if not free:
            continue
        count = 2 if len(free) > 1 and random.random() < 0.15 else 1
        changed, all_same = {}, True
        for argument in random.choice(free, size=count, replace=False):
            right = row.arguments[argument]
            forms = other_forms(right)
            other_form = bool(forms) and random.random() < 0.15
            all_same &= other_form
            pool = forms if other_form else wrong_values(right)
            value = pool[random.integers(len(pool))]
            if argument.startswith(UNBOUNDED) and isinstance(value, int) and value == HUGE:
                value = -HUGE
            changed[str(argument)] = value
        if fault := fault_of(row, changed, expected[name], same=all_same):
            # The shortest call: one wrong argument, if that is enough.
            for argument, value in changed.items() if len(changed) > 1 else ():
                if alone := fault_of(row, {argument: value}, expected[name]):
                    changed, fault = {argument: value}, alone
                    break
            text = ", ".join(
                f"{argument}={str(value)[:80]} ({type(value).__name__})" for argument, value in changed.items()
            )
            faults.setdefault((name, tuple(changed), fault[:60]), f"{name}({text}): {fault}")
    assert not faults, f"{len(faults)} kinds of faults in {calls} calls:\n" + "\n".join(sorted(faults.values()))
