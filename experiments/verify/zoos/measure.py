"""The figures of one model of a zoo, one after the other."""

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops, tree

import jvpreg
from experiments import processes
from experiments.processes import reason
from experiments.verify import weights
from experiments.verify.config import VerifyConfig
from experiments.verify.measure import FLOAT64, error, middle_kernel
from experiments.verify.products import stateless
from experiments.verify.zoos import times
from experiments.verify.zoos.member import Member, named
from experiments.verify.zoos.point import (
    ZooPoint,
    autodiff_jvp,
    autodiff_vjp,
    joined,
    places_of_floats,
    point,
    separated,
    vectors_of,
)

USES = ("fit", "save")
STRENGTH = 1e-3


def row(member: Member, config: VerifyConfig) -> dict[str, Any]:
    """What could be measured of a model within the time limit; `failure` says why the rest was not."""
    return processes.row(figures_of, (member.name, config), config.time_limit, {"JAX_ENABLE_X64": "1"})


def figures_of(name: str, config: VerifyConfig) -> Iterator[dict[str, Any]]:
    """As `figures`, of a model by its name: functions within functions cannot be handed to a process."""
    yield from figures(named(config.zoo, [name])[0], config)


def figures(member: Member, config: VerifyConfig) -> Iterator[dict[str, Any]]:
    """In a process of its own: parts of a row, so that what is there is kept if the rest takes too long.

    Errors and their references are those of `experiments.verify.measure`.
    """
    start = time.perf_counter()
    with float64():
        yield from products(drawn(member, config), generator(config))
    if config.times:
        yield from times.figures(*model_and_inputs(member, config, times.EXAMPLES), member.at, config)
    model, x = model_and_inputs(member, config, 2 * config.batch_size)
    yield from uses(member, model, x, config.batch_size)
    yield {"seconds": time.perf_counter() - start}


@contextlib.contextmanager
def float64() -> Iterator[None]:
    """Keras computes in float64, and so do models, and parts of Keras, that have float32 whatever they are given."""

    def cast(x, dtype):
        narrowed = dtype == "float32" and keras.backend.standardize_dtype(getattr(x, "dtype", "int32")) == "float64"
        return before(x, "float64" if narrowed else dtype)

    before = keras.ops.cast
    with contextlib.ExitStack() as stack:
        stack.enter_context(jvpreg.testing.float64())
        stack.callback(setattr, keras.ops, "cast", before)
        keras.ops.cast = cast
        if keras.backend.backend() == "torch":
            import torch

            # Keras' `associative_scan` and `segment_sum` compute in float32 whatever they are given.
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(torch.float64)
            stack.callback(setattr, torch.Tensor, "float", torch.Tensor.float)
            torch.Tensor.float = torch.Tensor.double
        yield


def drawn(member: Member, config: VerifyConfig) -> ZooPoint:
    """The point of a model with the weights of `verify` at random inputs, in the dtype that Keras is set to."""
    model, x = model_and_inputs(member, config, config.batch_size)
    return point(model, x, member.at)


def generator(config: VerifyConfig) -> np.random.Generator:
    """By which directions are drawn."""
    return np.random.default_rng(config.seed + 1)  # not those that the inputs were drawn by


def model_and_inputs(member: Member, config: VerifyConfig, batch_size: int) -> tuple[keras.Model, Any]:
    """A model with random weights, and random inputs of a number of examples."""
    keras.utils.set_random_seed(config.seed)
    random = np.random.default_rng(config.seed)
    examples = member.inputs(random, weights.CALIBRATION_EXAMPLES)
    model = member.built(examples)
    if keras.config.floatx() == "float64":
        _widen(model)
    weights.draw(model, random, examples)
    return model, member.inputs(random, batch_size)


def _widen(model: keras.Model) -> None:
    """Lets layers without weights compute in float64 that are of float32 whatever the dtype of the model is."""
    for layer in jvpreg.layer_paths(model).values():
        if layer.compute_dtype == "float32" and not layer.weights:
            layer.dtype_policy = "float64"


def products(at: ZooPoint, random: np.random.Generator) -> Iterator[dict[str, Any]]:
    """The errors in float64, without jit, and what is left to autodiff."""
    yield {"parameters": at.model.count_params()}
    lin = _stateless(at, lambda: at.linearize(whole=True))
    yield {"nodes": len(lin.nodes), "left": dict(lin.fallbacks)}
    directions = [_vector(random, primal) for primal in at.primals]
    expected = _numpy(autodiff_jvp(at, directions))
    yield {"jacobian": float(np.linalg.norm(expected) / np.linalg.norm(_flat(directions)))}
    cotangent = ops.convert_to_tensor(random.normal(size=expected.shape))
    kernel = _kernel(lin.weights)
    along = ops.convert_to_tensor(random.normal(size=kernel.shape))
    yield {"weight": kernel.path}
    by_weight = dataclasses.replace(at, weights=(_place(at.model.variables, kernel),))
    measured = {
        "jvp": lambda: _error(at, lambda lin: joined(lin.jvp(at.tangents(directions)), lin.outputs), expected),
        "vjp": lambda: _error(at, lambda lin: _pulled(at, lin, cotangent), autodiff_vjp(at, cotangent)),
        "weight_jvp": lambda: _error(
            at,
            lambda lin: joined(lin.jvp(weights=[(kernel, along)]), lin.outputs),
            autodiff_jvp(by_weight, [along]),
            whole=True,
        ),
        "completeness": lambda: _error(at, _completed, at.outputs(*at.primals)),
    }
    for name in FLOAT64:
        yield _figure(name, measured[name])


def _error(at: ZooPoint, product, expected, whole: bool = False) -> float:
    received = _stateless(at, lambda: product(at.linearize(whole)))
    return error(_flat(received), _flat(expected))


def _pulled(at: ZooPoint, lin: jvpreg.Linearization, cotangent: Any) -> list:
    pulled = vectors_of(lin.vjp(separated(cotangent, lin.outputs)))
    return pulled if at.at or len(pulled) == len(at.moving) else [pulled[place] for place in at.moving]


def _completed(lin: jvpreg.Linearization) -> Any:
    inputs = [x if given in places_of_floats(lin.given_inputs) else None for given, x in enumerate(lin.inputs)]
    return joined(lin.jvp(inputs if len(inputs) > 1 else inputs[0], taps=lin.intercepts), lin.outputs)


def _stateless(at: ZooPoint, function) -> Any:
    return stateless(at.model, function)(at.values)


def _kernel(variables: list) -> Any:
    """The kernel in the middle of a model, or whatever matrix stands there."""
    named_so = [variable for variable in variables if variable.name.endswith("kernel")]
    if named_so:
        return middle_kernel(variables)
    matrices = [variable for variable in variables if len(variable.shape) > 1] or variables
    return matrices[len(matrices) // 2]


def _place(variables: list, wanted: Any) -> int:
    return next(place for place, variable in enumerate(variables) if variable is wanted)


def _vector(random: np.random.Generator, like: Any) -> Any:
    return ops.convert_to_tensor(random.normal(size=tuple(like.shape)))


def _numpy(tensor: Any) -> np.ndarray:
    return ops.convert_to_numpy(ops.stop_gradient(tensor))


def _flat(tensors: Any) -> np.ndarray:
    leaves = tree.flatten(tensors)
    return np.concatenate([(leaf if isinstance(leaf, np.ndarray) else _numpy(leaf)).ravel() for leaf in leaves])


def uses(member: Member, model: keras.Model, x: Any, batch_size: int) -> Iterator[dict[str, Any]]:
    """Whether two steps of `fit` with a penalty change the weights, and whether a file brings the model back."""
    trained = jvpreg.JacobianModel(model, seed=0)

    def fit() -> str:
        where: dict[str, Any] = {} if member.at is None else {"at": member.at}
        norm = jvpreg.regularizers.JacobianNorm(STRENGTH, **where)
        trained.compile(keras.optimizers.SGD(1e-4), loss="mse", jacobian_regularizers=[norm])
        before = [_numpy(variable.value) for variable in model.trainable_variables]
        batch = tree.map_structure(lambda leaf: leaf[:batch_size], x)
        labels = tree.map_structure(lambda y: np.zeros((2 * batch_size, *y.shape[1:]), "float32"), model(batch))
        logs = trained.fit(x, labels, batch_size=batch_size, epochs=1, verbose=0).history
        moved = [_numpy(variable.value) for variable in model.trainable_variables]
        penalty = logs["frobenius_norm_squared"][-1]
        assert penalty > 0, f"the penalty is {penalty}"
        assert np.isfinite(logs["loss"][-1]), f"the loss is {logs['loss'][-1]}"
        assert all(np.isfinite(after).all() for after in moved), "a weight is not finite"
        assert any((after != was).any() for after, was in zip(moved, before, strict=True)), "no weight has moved"
        return "ok"

    def save() -> str:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.keras"
            trained.save(path)
            loaded = keras.saving.load_model(path)
        difference = error(_flat(joined(loaded.base(x))), _flat(joined(model(x))))
        assert difference < 1e-5, f"the loaded model's outputs differ by {difference:.0e}"
        return "ok"

    yield _figure("fit", fit)
    yield _figure("save", save)


def _figure(name: str, measured) -> dict[str, Any]:
    """The figure; or why there is none, so that the others go on."""
    try:
        return {name: measured()}
    except Exception as cause:
        return {f"{name}_failure": reason(cause)}
