"""`f(x)` and `J u` of several directions in one call: by jvpreg, and by the backend's own autodiff.

Each product is a function `(bound, xs, us) -> (y, products)`: `bound` is a model with its weights; `xs` are its inputs
`(B, …)`, `us` directions of each `(P, B, …)`, and the products `(P, B, …)` are like its output.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops

import jvpreg
from experiments.benchmark import calls
from experiments.benchmark.reference import float64
from experiments.verify.measure import error
from experiments.verify.products import stateless

Product = Callable[["Bound", Sequence, Sequence], tuple]


@dataclass(frozen=True)
class Bound:
    """A model with values for its variables, which every run starts from: it draws the same dropout masks again.

    Attributes:
        model: of one output.
        values: of its variables.
        training: whether it runs in training mode.
    """

    model: keras.Model
    values: Sequence
    training: bool

    def __call__(self, *xs: Any) -> Any:
        """`f(x)`."""
        return stateless(self.model, lambda *xs: self.model(_pack(xs), training=self.training))(self.values, *xs)

    def linearize(self, *xs: Any) -> jvpreg.Linearization:
        """The model frozen at `x`; an error where a node has no rule."""

        def frozen(*xs):
            return jvpreg.linearize(self.model, _pack(xs), training=self.training, fallback="error")

        return stateless(self.model, frozen)(self.values, *xs)


def plain(bound: Bound, xs: Sequence, us: Sequence) -> tuple:
    """`f(x)` alone, by the model itself."""
    return (bound(*xs),)


def primal(bound: Bound, xs: Sequence, us: Sequence) -> tuple:
    """`f(x)` alone, by jvpreg."""
    return (bound.linearize(*xs).outputs,)


def by_jvpreg(bound: Bound, xs: Sequence, us: Sequence) -> tuple:
    """`f(x)` and `J u` by jvpreg."""
    lin = bound.linearize(*xs)
    return lin.outputs, lin.jvp(_pack(us))


def forward_mode(bound: Bound, xs: Sequence, us: Sequence) -> tuple:
    """By the backend's forward mode: a pass for each probe on TensorFlow, which has no other; vmap on the others."""
    with _differentiable_attention():
        return _forward_mode(bound, xs, us)


def _forward_mode(bound, xs, us):
    backend, count = keras.backend.backend(), us[0].shape[0]
    if count == 1 or backend == "tensorflow":
        pairs = [ops.jvp(bound, tuple(xs), tuple(u[probe] for u in us)) for probe in range(count)]
        return pairs[0][0], _stacked([product for _, product in pairs])

    def both(*row):
        return ops.jvp(bound, tuple(xs), row)

    if backend == "jax":
        import jax

        return jax.vmap(both, out_axes=(None, 0))(*us)
    import torch

    return torch.func.vmap(both, out_dims=(None, 0), randomness="same")(*us)


def double_vjp(bound: Bound, xs: Sequence, us: Sequence) -> tuple:
    """By reverse mode twice: `v ↦ Jᵀ v` is linear, and its transpose is `J`. The primal pass runs once."""
    return {"tensorflow": _double_vjp_tensorflow, "jax": _double_vjp_jax, "torch": _double_vjp_torch}[
        keras.backend.backend()
    ](bound, list(xs), list(us))


def _double_vjp_tensorflow(bound, xs, us):
    import tensorflow as tf

    with tf.GradientTape(watch_accessed_variables=False, persistent=True) as outer:
        with tf.GradientTape(watch_accessed_variables=False) as inner:
            inner.watch(xs)
            y = bound(*xs)
        # Watched only now, so that the outer tape holds the way back and nothing of the way there.
        v = tf.zeros_like(y)
        outer.watch(v)
        pulled = inner.gradient(y, xs, output_gradients=v, unconnected_gradients=tf.UnconnectedGradients.ZERO)
    rows = zip(*(tf.unstack(u) for u in us), strict=True)
    return y, _stacked([outer.gradient(pulled, v, output_gradients=list(row)) for row in rows])


def _double_vjp_jax(bound, xs, us):
    import jax

    y, pull = jax.vjp(bound, *xs)
    push = jax.linear_transpose(pull, y)
    if us[0].shape[0] == 1:
        return y, ops.expand_dims(push(tuple(u[0] for u in us))[0], 0)
    return y, jax.vmap(lambda *row: push(row)[0])(*us)


def _double_vjp_torch(bound, xs, us):
    import torch

    with torch.enable_grad(), _differentiable_attention():
        xs = [x.detach().requires_grad_() for x in xs]
        y = bound(*xs)
        v = torch.zeros_like(y, requires_grad=True)
        pulled = torch.autograd.grad(y, xs, v, create_graph=True)
        rows = [torch.autograd.grad(pulled, v, row, retain_graph=True)[0] for row in zip(*us, strict=True)]
    return y.detach(), _stacked(rows)


def call(
    model: keras.Model, product: Product, xs: Sequence, us: Sequence, jit: bool | None, training: bool = False
) -> Callable[[], tuple]:
    """A product as one compiled call without arguments, which waits for what it returns."""

    def function(values, *tensors):
        return product(Bound(model, values, training), tensors[: len(xs)], tensors[len(xs) :])

    return calls.prepared(model, function, jit, [*xs, *us])


def exact(model: keras.Model, xs: Sequence[np.ndarray], us: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """`f(x)` and `J u` of a model that is in float64, by forward mode that is not jitted, a probe at a time."""
    with float64(), _differentiable_attention():
        bound = Bound(model, [ops.convert_to_tensor(variable.value) for variable in model.variables], training=False)
        points = tuple(ops.convert_to_tensor(x, "float64") for x in xs)
        pairs = []
        for row in zip(*us, strict=True):
            tangents = tuple(ops.convert_to_tensor(u, "float64") for u in row)
            pairs.append([to_numpy(tensor) for tensor in ops.jvp(bound, points, tangents)])
    return pairs[0][0], np.stack([product for _, product in pairs])


def _differentiable_attention() -> contextlib.AbstractContextManager:
    """On Torch, attention by the only kernel that has a forward mode and a second derivative."""
    if keras.backend.backend() != "torch":
        return contextlib.nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.MATH)


def largest_error(received: Sequence, expected: Sequence[np.ndarray]) -> float:
    """The larger of the relative errors of `f(x)` and, where it is there, of `J u`."""
    errors = [error(to_numpy(a), b) for a, b in zip(received, expected, strict=False)]
    return float(np.max(errors))  # not a number if one of them is


def directions(xs: Sequence[np.ndarray], num_probes: int, seed: int) -> list[np.ndarray]:
    """Random directions `(P, B, …)` of each input `(B, …)`, in float32."""
    random = np.random.default_rng(seed + 1)  # not those that the inputs were drawn by
    return [random.normal(size=(num_probes, *x.shape)).astype("float32") for x in xs]


def _pack(tensors: Sequence) -> Any:
    return tensors[0] if len(tensors) == 1 else list(tensors)


def _stacked(rows: list) -> Any:
    """With an axis for the probes; of one, without a copy."""
    return ops.expand_dims(rows[0], 0) if len(rows) == 1 else ops.stack(rows)


def to_numpy(tensor: Any) -> np.ndarray:
    """The tensor as an array, which on Torch is to have no graph."""
    return ops.convert_to_numpy(ops.stop_gradient(tensor))
