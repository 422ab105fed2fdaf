"""Jacobian-vector products by jvpreg and by all that a backend offers, each of which is right to use.

A start is a function of a `Point` to a push: what it does once for a point. A push is a function of tangents, one
`(P, …)` like each of the point's primals, to `f(x)` and the products `(P, B, …)`: what it does for each direction.
"""

import contextlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import keras
from keras import ops

import jvpreg
from experiments.benchmark import literal

Tangents = Sequence[Any]
Push = Callable[[Tangents], tuple]

FEW_OUTPUTS = 16
"""Of an example, up to which the whole Jacobian is an alternative."""


@dataclass(frozen=True)
class Point:
    """Where a model is differentiated, and by what.

    Attributes:
        model: with one output.
        values: of its variables, which every run starts from: it draws the same dropout masks again.
        xs: its inputs, `(B, …)` each.
        weights: places, among the variables, of those that are differentiated by; none of them: the inputs are.
        training: whether it runs in training mode.
        xla: whether all is compiled by XLA.
    """

    model: keras.Model
    values: Sequence[Any]
    xs: tuple
    weights: tuple[int, ...] = ()
    training: bool = False
    xla: bool = False

    @property
    def primals(self) -> tuple:
        """What is differentiated by."""
        return tuple(self.values[place] for place in self.weights) or self.xs

    def outputs(self, *primals):
        """The model's outputs, `(B, …)`, as a function of what is differentiated by."""
        values = list(self.values)
        for place, value in zip(self.weights, primals, strict=False):
            values[place] = value
        with keras.StatelessScope(state_mapping=list(zip(self.model.variables, values, strict=True))):
            return self.model(packed(self.xs if self.weights else primals), training=self.training)

    def along(self, tangents: Tangents) -> list[tuple[Any, Any]]:
        """The weights that are differentiated by, each with its tangent."""
        return list(zip([self.model.variables[place] for place in self.weights], tangents, strict=True))

    def linearize(self) -> jvpreg.Linearization:
        """The model frozen here, by the values that its variables have; an error where a node has no rule."""
        return jvpreg.linearize(self.model, packed(self.xs), training=self.training, fallback="error", xla=self.xla)


Start = Callable[[Point], Push]


def jvp(point: Point) -> Push:
    """By jvpreg, all directions at once and along with `x`; nothing is kept for the next call."""

    def push(tangents):
        options: dict[str, Any] = {"training": point.training, "fallback": "error", "xla": point.xla}
        if point.weights:
            return jvpreg.weight_jvp(point.model, packed(point.xs), point.along(tangents), **options)
        return jvpreg.jvp(point.model, packed(point.xs), packed(tangents), **options)

    return push


def linearize(point: Point) -> Push:
    """By jvpreg, all directions at once, on the model frozen at `x`."""
    lin = point.linearize()

    def push(tangents):
        products = lin.jvp(weights=point.along(tangents)) if point.weights else lin.jvp(packed(tangents))
        return lin.outputs, products

    return push


def linearize_alone(point: Point) -> Push:
    """`f(x)` by jvpreg, and no products."""
    lin = point.linearize()
    return lambda tangents: (lin.outputs,)


def clone(point: Point) -> Push:
    """By a model of one input that takes a concatenated batch, as `literal` makes it."""

    def push(tangents):
        h = point.outputs(jvpreg.clone.stack(point.xs[0], tangents[0]))
        return jvpreg.clone.unstack(h, tangents[0].shape[0])

    return push


class Repeated(keras.Model):
    """A model on a batch that holds `x` once for `f(x)` and once for each direction; it returns `f(x)`.

    So long takes the arithmetic of a product by any way that takes each direction through the model, and no more.

    Args:
        model: with one input.
        num_probes: P.
    """

    def __init__(self, model: keras.Model, num_probes: int):
        super().__init__()
        self.model, self.num_probes = model, num_probes

    def call(self, x, training=False):
        """`f(x)`, `(B, …)`."""
        return self.model(ops.concatenate([x] * (1 + self.num_probes)), training=training)[: x.shape[0]]


def forward_mode(point: Point) -> Push:
    """By `keras.ops.jvp`, which is the backend's forward mode, one direction after the other."""

    def push(tangents):
        with _differentiable_attention():
            pairs = [ops.jvp(point.outputs, point.primals, row) for row in _rows(tangents)]
        return pairs[0][0], _stacked([product for _, product in pairs])

    return push


def vectorized_forward_mode(point: Point) -> Push:
    """The same for all directions at once, by the backend's vectorized map."""

    def both(*row):
        return ops.jvp(point.outputs, point.primals, row)

    def push(tangents):
        if keras.backend.backend() == "jax":
            import jax

            return jax.vmap(both, out_axes=(None, 0))(*tangents)
        if keras.backend.backend() == "torch":
            import torch

            with _differentiable_attention():
                return torch.func.vmap(both, out_dims=(None, 0), randomness="same")(*tangents)
        outputs, products = ops.vectorized_map(lambda row: both(*row), tuple(tangents))
        return outputs[0], products

    return push


def jax_linearize(point: Point) -> Push:
    """By `jax.linearize`, and by `jax.vmap` of it for several directions."""
    import jax

    outputs, product = jax.linearize(point.outputs, *point.primals)
    return _jax_push(outputs, product)


def jax_double_vjp(point: Point) -> Push:
    """`Jᵀ v` is linear in `v`, and its reverse mode is `J u`."""
    import jax

    outputs, pull = jax.vjp(point.outputs, *point.primals)
    _, pull_again = jax.vjp(pull, ops.zeros_like(outputs))
    return _jax_push(outputs, lambda *row: pull_again(row)[0])


def _jax_push(outputs: Any, product: Callable) -> Push:
    import jax

    def push(tangents):
        if tangents[0].shape[0] == 1:
            return outputs, product(*next(_rows(tangents)))[None]
        return outputs, jax.vmap(product)(*tangents)

    return push


def jax_batch_jacobian(point: Point) -> Push:
    """By `jax.jacrev`, under `jax.vmap` over the examples if inputs are differentiated by."""
    import jax

    def twice(*primals):
        y = point.outputs(*primals)
        return y, y

    def of_example(*xs):
        y = point.outputs(*(x[None] for x in xs))[0]
        return y, y

    jacobian = jax.jacrev(
        twice if point.weights else of_example, argnums=tuple(range(len(point.primals))), has_aux=True
    )
    jacobians, outputs = (jacobian if point.weights else jax.vmap(jacobian))(*point.primals)
    return lambda tangents: (outputs, _product(jacobians, tangents, point))


def tensorflow_double_vjp(point: Point) -> Push:
    """A tape within a tape, of which the outer one is asked once for each direction."""
    import tensorflow as tf

    with tf.GradientTape(watch_accessed_variables=False) as inner:
        inner.watch(point.primals)
        outputs = point.outputs(*point.primals)
    cotangent = tf.zeros_like(outputs)
    with tf.GradientTape(watch_accessed_variables=False, persistent=True) as outer:
        outer.watch(cotangent)
        pulled = inner.gradient(
            outputs, point.primals, output_gradients=cotangent, unconnected_gradients=tf.UnconnectedGradients.ZERO
        )

    def push(tangents):
        products = [outer.gradient(pulled, cotangent, output_gradients=row) for row in _rows(tangents)]
        return outputs, _stacked(products)

    return push


def tensorflow_batch_jacobian(point: Point) -> Push:
    """By `tape.batch_jacobian`, or `tape.jacobian` if weights are differentiated by."""
    import tensorflow as tf

    with tf.GradientTape(watch_accessed_variables=False, persistent=len(point.primals) > 1) as tape:
        tape.watch(point.primals)
        outputs = point.outputs(*point.primals)
    zero = {"unconnected_gradients": tf.UnconnectedGradients.ZERO}
    if point.weights:
        jacobians = tape.jacobian(outputs, point.primals, **zero)
    else:
        jacobians = [tape.batch_jacobian(outputs, x, **zero) for x in point.primals]
    return lambda tangents: (outputs, _product(jacobians, tangents, point))


def torch_linearize(point: Point) -> Push:
    """By `torch.func.linearize`, which traces the model."""
    import torch

    with warnings.catch_warnings(), _differentiable_attention():
        warnings.simplefilter("ignore")  # of the traced graph, about constants that no module owns
        outputs, product = torch.func.linearize(point.outputs, *point.primals)
    return lambda tangents: (outputs, _stacked([product(*row) for row in _rows(tangents)]))


def torch_double_vjp(point: Point) -> Push:
    """Twice `torch.autograd.grad`, the second once for each direction."""
    import torch

    primals = [primal.detach().requires_grad_() for primal in point.primals]
    with _differentiable_attention():
        outputs = point.outputs(*primals)
    cotangent = torch.zeros_like(outputs, requires_grad=True)
    pulled = torch.autograd.grad(outputs, primals, cotangent, create_graph=True)

    def push(tangents):
        products = [torch.autograd.grad(pulled, cotangent, row, retain_graph=True)[0] for row in _rows(tangents)]
        return outputs.detach(), _stacked(products)

    return push


def torch_batch_jacobian(point: Point) -> Push:
    """A row of the Jacobian by each of so many reverse passes."""
    import torch

    primals = [primal.detach().requires_grad_() for primal in point.primals]
    outputs = point.outputs(*primals)
    if point.weights:
        rows = [torch.autograd.grad(y, primals, retain_graph=True) for y in outputs.flatten()]
        jacobians = [torch.stack(part).reshape(*outputs.shape, *part[0].shape) for part in zip(*rows, strict=True)]
    else:  # an input reaches the outputs of its own example only
        rows = [torch.autograd.grad(y, primals, retain_graph=True) for y in outputs.sum(dim=0)]
        jacobians = [torch.stack(part, dim=1) for part in zip(*rows, strict=True)]
    return lambda tangents: (outputs.detach(), _product(jacobians, tangents, point))


def _rows(tangents: Tangents):
    """The tangents of one direction after the other."""
    return zip(*(ops.unstack(tangent) for tangent in tangents), strict=True)


def packed(tensors: Sequence) -> Any:
    """As a model takes its inputs: one, or a list of several."""
    return tensors[0] if len(tensors) == 1 else list(tensors)


def _stacked(rows: list) -> Any:
    """With an axis for the directions; of one, without a copy."""
    return ops.expand_dims(rows[0], 0) if len(rows) == 1 else ops.stack(rows)


def _differentiable_attention() -> contextlib.AbstractContextManager:
    """On Torch, attention by the only kernel that has a forward mode and a second derivative."""
    if keras.backend.backend() != "torch":
        return contextlib.nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.MATH)


def _product(jacobians: Sequence, tangents: Tangents, point: Point):
    """`J u` of Jacobians `(B, K, …)`, one by each primal, and tangents `(P, …)`: `(P, B, K)`."""
    products = []
    for jacobian, tangent in zip(jacobians, tangents, strict=True):
        batch, outputs = jacobian.shape[:2]
        matrices = ops.reshape(jacobian, (batch, outputs, -1))
        if point.weights:
            vectors = ops.reshape(tangent, (tangent.shape[0], -1))
            products.append(ops.einsum("bkn,pn->pbk", matrices, vectors))
        else:
            vectors = ops.reshape(tangent, (tangent.shape[0], batch, -1))
            products.append(ops.einsum("bkn,pbn->pbk", matrices, vectors))
    return sum(products[1:], start=products[0])


@dataclass(frozen=True)
class Entry:
    """One way to compute products.

    Attributes:
        name: in the files.
        label: in the table and in the figures.
        start: None for a forward pass without a product.
        start_again: the same for one call after another at one point, where that is another; None: it is not.
        alternative: whether it is one to jvpreg.
        model: from the model and the number of directions to the model that it needs.
        only: what it is for, where it is not for all: along the input, directions in one call, several of them, few
            outputs.
    """

    name: str
    label: str
    start: Start | None
    start_again: Start | None = None
    alternative: bool = True
    model: Callable[[keras.Model, int], keras.Model] = lambda model, num_probes: model
    only: tuple[Literal["input", "once", "several", "few outputs"], ...] = ()


JVPREG = "jvpreg"
FORWARD = Entry("forward", "forward pass", None, alternative=False)
_OURS = (
    FORWARD,
    Entry(JVPREG, "jvpreg", jvp, linearize, alternative=False),
    Entry("arithmetic", "(1+P)·B examples", None, alternative=False, model=Repeated, only=("input", "once")),
    Entry("clone", "jvpreg.clone", clone, alternative=False, model=literal.cloned, only=("input",)),
)


def _entries(
    forward: str, vectorized: str, double_vjp: Start, batch_jacobian: Start, *more: Entry
) -> tuple[Entry, ...]:
    """Ours, and those of a backend: what it calls its forward modes, and what only it has."""
    return (
        *_OURS,
        Entry("forward_mode", forward, forward_mode),
        Entry("vectorized", vectorized, vectorized_forward_mode, only=("several",)),
        *more,
        Entry("double_vjp", "double VJP", double_vjp),
        Entry("batch_jacobian", "batch Jacobian", batch_jacobian, only=("few outputs",)),
    )


_JAX_LINEARIZE = Entry("linearize", "jax.linearize", jax_linearize)
_TORCH_LINEARIZE = Entry("linearize", "torch.func.linearize", torch_linearize)

ENTRIES = {
    "tensorflow": _entries(
        "ForwardAccumulator", "vectorized_map of it", tensorflow_double_vjp, tensorflow_batch_jacobian
    ),
    "jax": _entries("jax.jvp", "vmap of jax.jvp", jax_double_vjp, jax_batch_jacobian, _JAX_LINEARIZE),
    "torch": _entries("torch.func.jvp", "vmap of it", torch_double_vjp, torch_batch_jacobian, _TORCH_LINEARIZE),
}


def entries() -> tuple[Entry, ...]:
    """Those of the backend."""
    return ENTRIES[keras.backend.backend()]
