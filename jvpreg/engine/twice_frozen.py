"""The second derivatives of a model frozen at `x`: along pairs of directions, and their sum over many."""

import warnings
from typing import Any

import numpy as np
from keras import ops, tree

from jvpreg import probes
from jvpreg.common import checks
from jvpreg.common.dtypes import widest_dtype
from jvpreg.common.typing import Structure, Tensor
from jvpreg.engine.frozen_model import FrozenModel
from jvpreg.engine.inputs import check_moving
from jvpreg.engine.second_order import bends, push_twice
from jvpreg.engine.starts import possible_starts
from jvpreg.engine.tangents import (
    at_least_float32,
    check_count,
    each_name,
    pack_products,
    standardize_tangents,
    zeros,
)


class TwiceFrozenModel(FrozenModel):
    """A model frozen at `x`, with products of its second derivatives if it was linearized with `order=2`."""

    _warned = False

    def hvp(self, u: Structure, w: Structure) -> Structure:
        """The second derivative along pairs of directions: `d²f(x)[u, w]`, for each output.

        Args:
            u: a direction like `x`, or with a leading axis of P pairs, `(P, B, …)`; a structure of them for several
                inputs, where None stands for zero.
            w: the other direction of each pair, with the same number of them.

        Returns:
            Like the outputs, with a leading axis if u and w have one. In float32 at least.

        Raises:
            ValueError: a shape does not fit, or the model was not linearized with `order=2`.

        Example:

        >>> import keras, numpy as np, jvpreg
        >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Lambda(lambda x: x**3)])
        >>> lin = jvpreg.linearize(model, np.array([[1.0, 2.0]]), order=2)
        >>> keras.ops.convert_to_numpy(lin.hvp(np.ones((1, 2)), np.ones((1, 2)))).tolist()
        [[6.0, 12.0]]
        """
        self._check_order("hvp")
        first, second = self._flatten_inputs(u, "u"), self._flatten_inputs(w, "w")
        check_count(first, self.inputs, "u", "x")
        check_count(second, self.inputs, "w", "x")
        count = len(self.inputs)
        names = each_name("u", "x", count) + each_name("w", "x", count)
        tangents, probed = standardize_tangents([*first, *second], [*self.inputs, *self.inputs], names)
        self._check_moving(first, "u")
        self._check_moving(second, "w")
        self._warn_if_flat()
        number = next(ops.shape(t)[0] for t in tangents if t is not None)
        products = push_twice(self._graph, tangents[:count], tangents[count:])
        return pack_products(self._filled(products, number), self.outputs, probed)

    def laplacian(self, directions: Structure | None = None, chunk_size: int = 64) -> Structure:
        """The sum of the second derivatives `d²f(x)[v, v]` over directions v, for each output, in one forward pass.

        Args:
            directions: `(P, B, …)`, or a structure of them like `x`; by default each coordinate of x, so that the sum
                is the Laplacian of each output. With the rows of a factor, `A = VᵀV`, it is `tr(A H)` for the Hessian H
                of the output; with random directions of unit covariance an unbiased estimate of P Laplacians.
            chunk_size: how many directions go through the model at once; a smaller number takes less memory.

        Returns:
            Like the outputs. In float32 at least.

        Raises:
            ValueError: a shape does not fit, the chunk size is not a positive integer, the examples of the batch are
                coupled and no directions are given, or the model was not linearized with `order=2`.

        Reference: Li et al. (2024), "A computational framework for neural network-based variational Monte Carlo with
        Forward Laplacian".

        Example:

        >>> import keras, numpy as np, jvpreg
        >>> square = keras.layers.Lambda(lambda x: keras.ops.sum(x**2, axis=-1, keepdims=True))
        >>> model = keras.Sequential([keras.Input((3,)), square])
        >>> lin = jvpreg.linearize(model, np.ones((1, 3)), order=2)
        >>> keras.ops.convert_to_numpy(lin.laplacian()).tolist()
        [[6.0]]
        """
        self._check_order("laplacian")
        chunk_size = checks.count("chunk_size", chunk_size)
        self._check_moving(self.inputs, "x")
        if directions is None:
            self._check_uncoupled("Laplacian", " Pass `directions` of the whole batch.")
            chunks, shared = self._coordinates(chunk_size), True
        else:
            flat = self._flatten_inputs(directions, "directions")
            check_count(flat, self.inputs, "directions", "x")
            names = each_name("directions", "x", len(self.inputs))
            tangents, probed = standardize_tangents(flat, self.inputs, names)
            if not probed:
                raise checks.invalid("directions", "a leading axis of P directions, (P, B, ...)", directions)
            self._check_moving(flat, "directions")
            number = next(t.shape[0] for t in tangents if t is not None)
            starts = range(0, number or 1, chunk_size if number else 1)
            step = chunk_size if number else None  # Their number is not known in every graph.
            chunks = [[None if t is None else t[i : i + step if step else None] for t in tangents] for i in starts]
            shared = False
        self._warn_if_flat()
        total: list = [None] * len(tree.flatten(self.outputs))
        for chunk in chunks:
            found = push_twice(self._graph, chunk, summed=True, shared=shared)
            total = [b if a is None else a if b is None else a + b for a, b in zip(total, found, strict=True)]
        return pack_products(self._filled(total, 1), self.outputs, probed=False)

    def hessian(self, chunk_size: int = 64) -> Structure:
        """The whole second derivative of each example, for models of few inputs: `D (D + 1) / 2` pairs of coordinates.

        Args:
            chunk_size: how many pairs go through the model at once; a smaller number takes less memory.

        Returns:
            `(B, *output, *input, *input)`. For several inputs, a structure like `x` of structures like `x` of them; for
            several outputs, a structure like the outputs of these. In float32 at least.

        Raises:
            ValueError: the chunk size is not a positive integer, the examples of the batch are coupled, or the model
                was not linearized with `order=2`.

        Example:

        >>> import keras, numpy as np, jvpreg
        >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Lambda(lambda x: x[:, :1] * x[:, 1:])])
        >>> lin = jvpreg.linearize(model, np.ones((1, 2)), order=2)
        >>> keras.ops.convert_to_numpy(lin.hessian()).tolist()
        [[[[0.0, 1.0], [1.0, 0.0]]]]
        """
        self._check_order("hessian")
        chunk_size = checks.count("chunk_size", chunk_size)
        self._check_moving(self.inputs, "x")
        self._check_uncoupled("Hessian")
        self._warn_if_flat()
        size, dtype = probes.dimension(self.inputs), widest_dtype(self.inputs)
        first, second = np.triu_indices(size)
        moving = [value.has_tangents for value in self._graph.inputs]
        batch = ops.shape(self.inputs[0])[0]

        def directions(places: np.ndarray) -> list:
            rows = ops.expand_dims(ops.one_hot(ops.convert_to_tensor(places, "int32"), size, dtype=dtype), 1)
            split = probes.split(ops.broadcast_to(rows, (len(places), batch, size)), self.inputs)
            return [t if moves else None for t, moves in zip(tree.flatten(split), moving, strict=True)]

        chunks = []
        for start in range(0, len(first), chunk_size):
            one, other = (places[start : start + chunk_size] for places in (first, second))
            found = push_twice(self._graph, directions(one), directions(other))
            chunks.append(self._filled(found, len(one)))
        pair_of = np.zeros((size, size), "int32")
        pair_of[first, second] = pair_of[second, first] = np.arange(len(first))
        ends = np.cumsum([0, *(probes.dimension(x) for x in self.inputs)])
        places = list(zip(ends[:-1], ends[1:], self.inputs, strict=True))
        blocks = []
        for y, *parts in zip(tree.flatten(self.outputs), *chunks, strict=True):
            pairs = ops.take(at_least_float32(ops.concatenate(parts)), ops.convert_to_tensor(pair_of), axis=0)
            whole = ops.moveaxis(pairs, (0, 1), (-2, -1))  # (D, D, B, …) to (B, …, D, D)

            def block(one: tuple, other: tuple, whole: Tensor = whole, y: Tensor = y) -> Tensor:
                part = whole[..., one[0] : one[1], other[0] : other[1]]
                return ops.reshape(part, (*ops.shape(y), *one[2].shape[1:], *other[2].shape[1:]))

            rows = [self.pack_inputs([block(one, other) for other in places]) for one in places]
            blocks.append(self.pack_inputs(rows))
        return tree.pack_sequence_as(self.outputs, blocks)

    def _coordinates(self, chunk_size: int) -> list[list]:
        """All unit vectors of the inputs that have tangents, in chunks `(P, 1, …)`: one row does for all examples."""
        moving = [v.has_tangents for v in self._graph.inputs]
        space = [x[:1] for x, moves in zip(self.inputs, moving, strict=True) if moves]
        size, dtype = probes.dimension(space), widest_dtype(space)
        chunks = []
        for start in range(0, size, chunk_size):
            rows = ops.one_hot(ops.arange(start, min(start + chunk_size, size)), size, dtype=dtype)
            remaining = iter(tree.flatten(probes.split(ops.expand_dims(rows, 1), space)))
            chunks.append([next(remaining) if moves else None for moves in moving])
        return chunks

    def _check_moving(self, tangents: list, argument: str) -> None:
        check_moving(tangents, [value.primal for value in self._graph.inputs], argument, lambda: possible_starts(self))

    def _check_order(self, product: str) -> None:
        if self._whole is not None:
            raise ValueError(f"Expected the linearization of a whole batch for `{product}`: linearize the part itself.")
        if self.order != 2:
            raise ValueError(
                f"Invalid value for argument `order` of `jvpreg.linearize`. Expected order=2, which `{product}` needs. "
                f"Received: order={self.order}."
            )

    def _check_uncoupled(self, product: str, remedy: str = "") -> None:
        if self.couples_examples:
            raise ValueError(f"A linearization that couples the examples of a batch has no {product} of each.{remedy}")

    def _warn_if_flat(self) -> None:
        if self._warned or bends(self._graph):
            return
        self._warned = True
        warnings.warn(
            "The model is piecewise affine, as a network of ReLU is: its second derivatives are zero wherever they "
            "exist, and a penalty on them trains nothing. Use a smooth activation, for example tanh or softplus.",
            stacklevel=3,
        )

    def _filled(self, products: list, count: Any) -> list[Tensor]:
        pairs = zip(products, tree.flatten(self.outputs), strict=True)
        return [zeros(count, y) if p is None else p for p, y in pairs]
