"""Implicit differentiation of fixed points: the backend's part, and the pushforward."""

import contextlib
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from jvpreg.common import replicas
from jvpreg.common.typing import Tensor
from jvpreg.engine.transpose import transposed
from jvpreg.rules.contract import Gate, Pushforward


def solve(matvec: Callable, rhs, rmatvec: Callable, loop: Callable):
    """The solution of `w = rhs + A w`, differentiable to any order in `rhs` and in everything that `A` depends on.

    Args:
        matvec: `A w`, linear, for w like `rhs`.
        rhs: any tensor.
        rmatvec: `Aᵀ v`.
        loop: `loop(matvec, rhs) -> w`, the solver, through which no gradient goes.
    """
    return _SOLVE[keras.backend.backend()](matvec, rhs, rmatvec, loop)


def at_fixed_point(value, points: list, function: Callable, pull: Callable, loop: Callable):
    """A fixed point `z = f(z)` that was found, made differentiable to any order in everything that f depends on.

    Args:
        value: z.
        points: the tensors on which f depends.
        function: `function(points, z) -> f(z)`.
        pull: `pull(z, v) -> u` with `u = v + ∂f(z)ᵀ u`; on JAX it is not used.
        loop: as in `solve`.
    """
    if keras.backend.backend() == "jax":
        import jax

        def tangent_solve(linear, rhs):
            return solve(lambda w: linear(w) + w, -rhs, lambda v: v, loop)

        return jax.lax.custom_root(lambda z: function(points, z) - z, value, lambda _, z: z, tangent_solve)

    return _ATTACH[keras.backend.backend()](value, points, function, pull)


def _solve_attached(matvec, rhs, rmatvec, loop):
    with unrecorded():
        value = ops.stop_gradient(loop(matvec, ops.stop_gradient(rhs)))
    image = rhs + matvec(value)
    attach = _ATTACH[keras.backend.backend()]
    return attach(value, [image], lambda points, _: points[0], lambda _, v: solve(rmatvec, v, matvec, loop))


def _solve_jax(matvec, rhs, rmatvec, loop):
    import jax

    def iterate(operator, rhs):
        return loop(lambda w: w - operator(w), rhs)

    return jax.lax.custom_linear_solve(lambda w: w - matvec(w), rhs, iterate, iterate)


# `value` as a tensor whose gradient goes to `points`: for a cotangent v it is the gradient of
# `⟨function(points, value), u⟩` with `u = pull(value, v)`. Points are copied, since the value may depend on them too.


def _attach_tensorflow(value, points, function, pull):
    import tensorflow as tf

    @tf.custom_gradient
    def attached(*points):
        def backward(v):
            u = pull(result, v)
            copies = [tf.identity(point) for point in points]
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(copies)
                image = function(copies, result)
            return tape.gradient(image, copies, u, unconnected_gradients=tf.UnconnectedGradients.ZERO)

        return tf.identity(value), backward

    result = attached(*map(tf.convert_to_tensor, points))
    return result


def _attach_torch(value, points, function, pull):
    import torch

    class Attached(torch.autograd.Function):
        @staticmethod
        def forward(context, *points):
            result = value.clone()
            # Saved in Torch's way, not in a closure: a graph that refers to itself is never freed.
            context.save_for_backward(result, *points)
            return result

        @staticmethod
        def backward(context, v):
            result, *points = context.saved_tensors
            u = pull(result, v)
            again = torch.is_grad_enabled()
            with torch.enable_grad():
                copies = [point.view_as(point) if again else point.detach() for point in points]
                wanted = [copy for copy, needed in zip(copies, context.needs_input_grad, strict=True) if needed]
                if not again:
                    for copy in wanted:
                        copy.requires_grad_()
                image = function(copies, result if again else result.detach())
                found = torch.autograd.grad(image, wanted, u, create_graph=again, allow_unused=True)
            remaining = iter(found)
            return tuple(next(remaining) if needed else None for needed in context.needs_input_grad)

    return Attached.apply(*points)


_SOLVE = {"tensorflow": _solve_attached, "torch": _solve_attached, "jax": _solve_jax}
_ATTACH = {"tensorflow": _attach_tensorflow, "torch": _attach_torch}


def unrecorded() -> contextlib.AbstractContextManager:
    """A context in which Torch records nothing for backpropagation. Other backends do not record what is stopped."""
    if keras.backend.backend() != "torch":
        return contextlib.nullcontext()
    import torch

    return torch.no_grad()


def tell(counts, hear: Callable, variable) -> None:
    """Hands counts to `hear(counts, at_once)` as an array. In a TensorFlow graph they are added to a variable instead.

    `at_once` says that this happens within the call; on JAX a compiled function calls back while it runs.
    """
    if is_graph():
        # The variable is the mean over the replicas.
        variable.assign(variable + replicas.number() * counts)
        return
    if keras.backend.backend() == "jax":
        import jax

        if isinstance(counts, jax.core.Tracer):
            jax.debug.callback(lambda counts: hear(counts, False), counts)
            return
    hear(ops.convert_to_numpy(counts), True)


def is_graph() -> bool:
    """Whether this is a TensorFlow graph, which has no callbacks."""
    if keras.backend.backend() != "tensorflow":
        return False
    import tensorflow as tf

    return not tf.executing_eagerly()


def wait() -> None:
    """Waits for JAX's callbacks to end."""
    if keras.backend.backend() == "jax":
        import jax

        jax.effects_barrier()


class ImplicitPushforward(Gate):
    """The pushforward of a fixed point `z = f(x, z)`: `w = ∂ₓf u + ∂_z f w`, solved for each tangent.

    Args:
        z: the fixed point, `(B, …)`.
        cell: f frozen at `(x, z)`; its inputs are tangents of x and z.
        loop: as in `solve`.
    """

    def __init__(self, z, cell: Pushforward, loop: Callable):
        self.cell = cell
        self.loop = loop
        super().__init__(
            lambda u, _, *residuals: self._close(cell.function(u, None, *residuals), residuals),
            z,
            *cell.residuals,
            masks=[None, *cell.masks],
            weights=[(variable, self._part(part)) for variable, part in cell.weights],
            batch_axes=[0, *cell.batch_axes],
            examples=cell.examples,
        )

    def state_product(self, tangents: Tensor) -> Tensor:
        """`∂_z f w` at the fixed point, for tangents `(P, B, …)` like z: one product, and no solve."""
        return self.cell.function(None, tangents, *self.broadcast_residuals()[1:])

    def _part(self, part: Callable) -> Callable:
        def along(u, z, *residuals):
            # A part may need broadcasting.
            image = part(u, *residuals) + ops.zeros((u.shape[0], *ops.shape(z)[1:]), z.dtype)
            return self._close(image, residuals)

        return along

    def _close(self, rhs, residuals) -> Any:
        return close(self.cell, rhs, residuals, self.loop)


def close(cell: Pushforward, rhs, residuals, loop: Callable, adjoint: bool = False):
    """Solves `w = rhs + ∂_z f w`, or `w = rhs + ∂_z fᵀ w`, for a frozen cell with its residuals `(1, B, …)`."""

    def matvec(w):
        return cell.function(None, w, *residuals)

    pull = transposed(lambda inputs: [matvec(*inputs)], [ops.zeros_like(rhs)])

    def rmatvec(v):
        return pull([v])[0]

    return solve(rmatvec, rhs, matvec, loop) if adjoint else solve(matvec, rhs, rmatvec, loop)
