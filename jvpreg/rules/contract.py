"""What a rule is told, and what it returns: a pushforward of one of five kinds.

A *rule* runs one operation at a batch `x` and returns `(y, pushforward)`: the output, and the operation frozen at `x`,
a linear map from the tangents of its inputs to the tangent of its output. If the operation is affine, the rule returns
an `Affine` alone, and the engine runs it. (Balestriero & Baraniuk (2021) call the network of all pushforwards the clone
of the network at `x`.)

Shapes, here and in every rule: a value is `(B, …)`, and its tangent `(P, B, …)` for P probes. What is frozen for each
example (a mask, a slope) has no axis for the probes, and is never repeated P times.
"""

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import keras
from keras import ops

from jvpreg.common import checks
from jvpreg.common.dtypes import has_tangents
from jvpreg.common.eager import cast
from jvpreg.common.typing import Shape, Structure, Tensor
from jvpreg.rules.folding import as_batch, each_probe, folded, with_probe_axis


@dataclass(frozen=True)
class Context:
    """What a rule is told beside its inputs: what the caller wants, facts about the run, and services of the engine.

    Attributes:
        training: whether dropout is active and moving averages are updated.
        batch_statistics: `"moving"`, `"frozen"` or `"coupled"`: see `jvpreg.linearize`.
        xla: whether XLA compiles the run; None if that is not known.
        in_graph: whether TensorFlow traces a graph, and not yet for XLA.
        batch: B: a number, or a tensor in a TensorFlow graph in which it is not known.
        linearize: `linearize(operation, *inputs, **kwargs) -> (outputs, pushforward)` of another operation, which a
            wrapper holds.
        linearize_step: the same of an operation that a loop repeats: what it freezes is of one kind in all steps.
        repeated: whether a loop repeats the operation.
        along: `along(*inputs)` returns the tangents `(P, B, …)` that travel with these inputs (None for zero) if the
            caller wants a single product; None otherwise. A rule that gets some may return a `Pushed`.
        weights: the tangents `(P, …)` of variables, by their `id`, that belong to this product.
    """

    training: bool = False
    batch_statistics: str = "moving"
    xla: bool | None = None
    in_graph: bool = False
    batch: Any = None
    linearize: Callable | None = None
    linearize_step: Callable | None = None
    repeated: bool = False
    along: Callable = lambda *inputs: None
    weights: Mapping[int, Any] = field(default_factory=dict)

    @property
    def plain_graph(self) -> bool:
        """Whether TensorFlow runs a graph without XLA: its own kernels are the fastest there, fused by nobody."""
        return keras.backend.backend() == "tensorflow" and self.xla is False

    @property
    def prefers_kernels(self) -> bool:
        """Whether TensorFlow's own kernels are likely the fastest. Only those that are right under XLA too may be used.

        XLA may still compile a graph into which this one is called.
        """
        return self.plain_graph or (self.in_graph and self.xla is None)

    @property
    def under_xla(self) -> bool:
        """Whether XLA is known to compile the run. On JAX it always does."""
        return bool(self.xla) or keras.backend.backend() == "jax"


class Pushforward:
    """An operation frozen at `x`: a linear map from the tangents of its inputs to the tangent of its output.

    Args:
        function: `function(*tangents, *residuals) -> tangent`, linear in the tangents `(P, B, …)`, one for each input;
            for several outputs it returns a tuple. It may read weights, and statistics of the whole batch.
        *residuals: what the rule found at `x` for each example, `(B, …)`. The function gets it as `(1, B, …)`, which
            broadcasts over the probes.
        weights: a pair for each variable that can have a tangent: the variable (a pair with None is left out), and
            `part(tangent, *residuals) -> tangent`, linear in the variable's tangent `(P, *variable.shape)`. The result
            need only broadcast to `(P, B, …)`.
        batch_axes: the axis of the examples in each residual, 0 by default; None for one that is the same for all.
        examples: `"apart"`: an example's tangent depends on that example alone, and stays on the first axis.
            `"coupled"`: it depends on other examples. `"moved"`: the residuals do not have the examples in their order,
            so they cannot be cut. Or `examples(*places) -> place`, where the examples are in the output, by where they
            are in the inputs: see `jvpreg.rules.examples`.
        takes_none: whether the function takes None for a tangent that is zero; otherwise it gets zeros.
        finite: whether finite inputs give finite outputs; not if the operation divides, or pads with −∞.
        curvature: of an operation entry by entry of one input: `curvature(x, y) -> (B, …)`, its second derivative.
        second: `second(u, w, inputs) -> (P, B, …)`, the operation's second derivative at the `inputs`, `(B, …)` each:
            bilinear and symmetric in two lists of tangents, with None for zero, which it may return too. If neither
            `curvature` nor `second` is stated, a second derivative is found by running the rule again along w.
        transposed: `transposed(cotangent, *residuals) -> cotangent`, the transpose of a function with one output; for
            several inputs it returns a tuple. `"itself"` for a function that is its own, as a product with a slope at
            each entry is. By default it is left to the backend's autodiff.
        homogeneous: whether the operation at x is the function of x, with nothing added, as a ReLU is.

    Attributes:
        masks: for each residual how to read a mask off it, or None: see `Gate`.
    """

    def __init__(
        self,
        function: Callable,
        *residuals: Any,
        weights: Iterable[tuple[Any, Callable]] = (),
        batch_axes: Sequence[int | None] | None = None,
        examples: str | Callable = "apart",
        takes_none: bool = False,
        finite: bool = True,
        curvature: Callable | None = None,
        second: Callable | None = None,
        transposed: Callable | Literal["itself"] | None = None,
        homogeneous: bool = False,
    ):
        if not callable(examples):
            checks.choice("examples", examples, ("apart", "coupled", "moved"))
        if not callable(transposed):
            checks.choice("transposed", transposed, ("itself", None))
        self.function = function
        self.residuals = residuals
        self.weights = [(variable, part) for variable, part in weights if variable is not None]
        self.batch_axes = tuple([0] * len(residuals) if batch_axes is None else batch_axes)
        if len(self.batch_axes) != len(residuals):
            raise checks.invalid("batch_axes", f"an axis for each of {len(residuals)} residuals", batch_axes)
        self.examples = examples
        self.takes_none = takes_none
        self.finite = finite
        self.curvature = curvature
        self.second = second
        self.homogeneous = homogeneous
        self.is_symmetric = isinstance(transposed, str)
        self.transposed = function if isinstance(transposed, str) else transposed
        self.masks: list[Callable | None] = [None] * len(residuals)

    def __call__(self, *tangents: Tensor | None) -> Tensor:
        """The output's tangent `(P, B, …)`, from those of the inputs."""
        return self.function(*tangents, *self.broadcast_residuals())

    @property
    def intercept(self) -> Any:
        """What the operation adds to its linear part; None if only the engine can tell, by comparing with `y`."""
        return 0.0 if self.homogeneous else None

    @property
    def bends(self) -> bool:
        """Whether the operation may have a second derivative: not if what it freezes is the same around `x`."""
        return self.examples == "coupled" or any(map(has_tangents, self.residuals))

    @property
    def variables(self) -> list:
        """The variables that can have a tangent."""
        return [variable for variable, _ in self.weights]

    def pull(self, cotangent: Tensor) -> Structure | None:
        """The transpose, of a cotangent `(P, B, …)`, if it is stated; None leaves it to autodiff."""
        return None if self.transposed is None else self.transposed(cotangent, *self.broadcast_residuals())

    def broadcast_residuals(self) -> list:
        """The residuals as the function gets them, `(1, B, …)`."""
        return [with_probe_axis(residual) for residual in self.residuals]

    def map_residuals(self, function: Callable) -> "Pushforward":
        """The same map with `function(residual, batch_axis)` in place of each residual."""
        return self.at(list(map(function, self.residuals, self.batch_axes)))

    def at(self, residuals: Sequence) -> "Pushforward":
        """The same map with other residuals."""
        moved = copy.copy(self)
        moved.residuals = tuple(residuals)
        return moved

    def with_function(self, function: Callable) -> "Pushforward":
        """Another function of the same residuals, without tangents of weights."""
        return Pushforward(function, *self.residuals, batch_axes=self.batch_axes)


class Affine(Pushforward):
    """An operation that is `A x + b`, example by example. The rule states it, and the engine runs it.

    If the caller wants a single product and the weights are many, x and its tangents go through `function` in one call.

    Args:
        function: `A`: takes `(N, …)` and returns `(N, …)`, where N is B, P·B or (1 + P)·B.
        x: the input, `(B, …)`.
        weights: a pair for each variable in `A`: the variable, or None, and `part(u, x)`: `A x` with a tangent u
            `(*variable.shape)` in place of that weight, in the dtype of x.
        bias: the variable b; None for zero.
        spread: `spread(b)` gives b axes with which it broadcasts to the output.
        scaled: `scaled(slope, axis)` returns the function of `A` with the channels of its output, along that axis of
            `(B, …)`, multiplied by a slope `(C,)`; or None if the channels lie along another axis.
        transposed: `Aᵀ`, of cotangents `(N, …)`; None leaves it to the backend's autodiff.
        **facts: as of `Pushforward`.
    """

    def __init__(
        self,
        function: Callable,
        x: Tensor,
        weights: Iterable[tuple[Any, Callable]] = (),
        bias: Any = None,
        spread: Callable = lambda bias: bias,
        scaled: Callable | None = None,
        transposed: Callable | None = None,
        **facts: Any,
    ):
        def of_each_probe(part: Callable) -> Callable:
            def in_dtype(u: Tensor) -> Tensor:
                return ops.cast(u, x.dtype) if has_tangents(x) else u

            return lambda tangent, x: each_probe(lambda u: part(in_dtype(u), x[0]))(tangent)

        push, pairs = folded(function), [*weights, (bias, lambda u, x: spread(u))]
        parts = [(variable, of_each_probe(part)) for variable, part in pairs]
        pull = None if transposed is None else folded(transposed)
        back = None if pull is None else lambda cotangent, x: pull(cotangent)
        super().__init__(lambda tangent, x: push(tangent), x, weights=parts, transposed=back, **facts)
        self.linear_part, self.scaled, self.bias = function, scaled, bias
        self._shift = None if bias is None else spread(ops.convert_to_tensor(bias))

    @property
    def bends(self) -> bool:
        """An affine operation does not."""
        return False

    @property
    def intercept(self) -> Any:
        """b, to be broadcast to the output."""
        return ops.zeros((), self.residuals[0].dtype) if self._shift is None else self._shift

    @property
    def num_weights(self) -> int:
        """How many numbers there are in A."""
        return sum(math.prod(variable.shape) for variable in self.variables if variable is not self.bias)

    def with_bias(self, y: Tensor, name: str) -> Tensor:
        """`y + b`, for `y = A x`.

        Raises:
            ValueError: b does not broadcast to y; the error has the name of the node.
        """
        if self._shift is None:
            return y
        if not broadcasts(self._shift.shape, y.shape):
            expected = f"one that `spread` gives axes with which it broadcasts to {tuple(y.shape)}, the shape of `A x`"
            raise checks.invalid("bias", expected, self.bias, owner=f"`Affine`, of the rule of `{name}`")
        return ops.add(y, cast(self._shift, y.dtype))

    def with_channels_scaled(self, slope: Tensor, axis: int) -> Pushforward | None:
        """The map with `scaled(slope, axis)` in place of A; None if there is none."""
        function = None if self.scaled is None else self.scaled(slope, axis)
        if function is None:
            return None
        push = folded(function)
        return self.with_function(lambda tangent, x: push(tangent))


class ChannelScale(Pushforward):
    """An operation that multiplies each channel by a number and adds another one, as batch normalization does.

    The tangent pass multiplies the slope into the kernel of an `Affine` before it if that costs less.

    Args:
        x: the input, `(B, …)`, which the parts of weights get.
        slope: the numbers `(C,)` that the channels are multiplied by, in the dtype in which that is done.
        axis: of the channels in x; not 0.
        offset: what is added, to be broadcast to the output.
        **facts: as of `Pushforward`.
    """

    def __init__(self, x: Tensor, slope: Tensor, axis: int, offset: Tensor, **facts: Any):
        axis = axis % len(x.shape)
        shape = [-1 if i == axis else 1 for i in range(1, len(x.shape))]
        along = slope if axis == len(x.shape) - 1 else ops.reshape(slope, shape)

        def push(tangent: Tensor, x: Tensor) -> Tensor:
            return as_batch(lambda t: cast(ops.cast(t, slope.dtype) * along, t.dtype), tangent)

        super().__init__(push, x, transposed="itself", **facts)
        self.slope, self.axis, self.offset = slope, axis, offset

    @property
    def bends(self) -> bool:
        """It does not: a slope of the whole batch counts as constant."""
        return False

    @property
    def intercept(self) -> Any:
        """What is added, to be broadcast to the output."""
        return self.offset


class Gate(Pushforward):
    """An operation that has one slope or another at each entry, and freezes which: ReLU, a maximum of two, max pooling.

    A model of affine operations and gates is affine in each region of inputs that have the same masks.

    Args:
        function: as of `Pushforward`, and so `*residuals` and `**facts`.
        masks: for each residual `mask(residual)`, the boolean mask that it holds, or None if it holds none; by default
            every residual is a mask itself.
    """

    def __init__(
        self, function: Callable, *residuals: Any, masks: Sequence[Callable | None] | None = None, **facts: Any
    ):
        super().__init__(function, *residuals, **facts)
        if masks is not None and len(masks) != len(residuals):
            raise checks.invalid("masks", f"a function or None for each of {len(residuals)} residuals", masks)
        dtypes = {keras.backend.standardize_dtype(residual.dtype) for residual in residuals}
        if masks is None and dtypes - {"bool"}:
            expected = f"a function or None for each of {len(residuals)} residuals, which are not all boolean"
            raise checks.invalid("masks", expected, masks)
        self.masks = [lambda residual: residual for _ in residuals] if masks is None else list(masks)

    @property
    def bends(self) -> bool:
        """Whether it freezes more than masks, which are constant around `x`: a whole loop does, or a fixed point."""
        pairs = zip(self.residuals, self.masks, strict=True)
        return self.examples == "coupled" or any(mask is None and has_tangents(residual) for residual, mask in pairs)


class FrozenBody(Gate):
    """A whole graph as one pushforward: of a cell, of a loop's body, of a branch.

    Args:
        function: as of `Gate`, and so `*residuals` and `**facts`. A batch axis is None where a residual has none.
        batch_of: `batch_of(tangents, residuals)`, for how many examples these are; None if that cannot be told.
    """

    def __init__(self, function: Callable, *residuals: Any, batch_of: Callable, **facts: Any):
        super().__init__(function, *residuals, **facts)
        self.batch_of = batch_of


class Pushed(Pushforward):
    """The tangent that travelled with the inputs, already pushed, in place of a map that can be used again.

    Args:
        image: the output's tangent `(P, B, …)`; a tuple of tangents for several outputs; None if it is zero.
        variables: those whose tangents, if they have one, are part of it.
    """

    def __init__(self, image: Structure | None, variables: Iterable = ()):
        super().__init__(lambda *_: image)
        self.image = image
        self._variables = list(variables)

    @property
    def variables(self) -> list:
        """The variables whose tangents are part of the image."""
        return self._variables


class Declined(Exception):  # noqa: N818 -- no error: the engine has other ways
    """Raised by a rule for arguments that it does not cover: the operation is then treated as one without a rule.

    Args:
        reason: why.
        to_autodiff: whether autodiff is the right way for the operation, so that no message is needed.
    """

    def __init__(self, reason: str, to_autodiff: bool = False):
        super().__init__(reason)
        self.to_autodiff = to_autodiff


def broadcasts(shape: Shape, to: Shape) -> bool:
    """Whether a tensor of a shape broadcasts to another shape, as far as the dimensions are known."""
    pairs = list(zip(reversed(tuple(shape)), reversed(tuple(to)), strict=False))
    known = [pair for pair in pairs if all(isinstance(size, int) for size in pair)]
    return len(shape) <= len(to) and all(a in (1, b) for a, b in known)


def checked_pair(returned: Any, name: str, operation: Any) -> tuple:
    """What a rule returned, which must be an output with its pushforward, or with None if no tangent passes."""
    pair = isinstance(returned, tuple) and len(returned) == 2
    if not pair or not (returned[1] is None or isinstance(returned[1], Pushforward)):
        received = (
            [type(part).__name__ for part in returned] if isinstance(returned, tuple) else type(returned).__name__
        )
        raise TypeError(
            f"The rule of `{name}` ({type(operation).__name__}) returned something else than it must. Expected "
            f"(y, Pushforward), (y, None) or an Affine. Received: {received}"
        )
    return returned
