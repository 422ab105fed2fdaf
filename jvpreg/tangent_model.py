"""`TangentModel`: outputs and Jacobian-vector product as one Keras model, to deploy where there is no autodiff."""

from collections.abc import Mapping
from typing import Any

import keras
from keras import tree

from jvpreg.common import checks
from jvpreg.common.dtypes import has_tangents
from jvpreg.common.typing import Config, DType, Structure, Tensor
from jvpreg.engine.inputs import flatten_inputs
from jvpreg.engine.tangents import flatten_tangents
from jvpreg.products import jvp_with
from jvpreg.rules.contract import Context
from jvpreg.rules.registry import unwrap


@keras.saving.register_keras_serializable(package="jvpreg")
class TangentModel(keras.Model):
    """Maps `[x, u]` to `(f(x), J u)`, in inference: one forward pass, to save and to export as any model.

    Inputs of whole numbers, such as token ids, have no tangent: `u` is like `x` without them, a dict without their
    names and a list without their places.

    An exported model has the inputs `x` and `u`, or `x_name` and `u_name` for each of several `keras.Input`s. It holds
    no autodiff: an operation without a rule is an error. Only the product of a `TangentModel`, which is a second
    derivative, is by the backend's forward mode.

    Args:
        base: a Keras model, built; for a `JacobianModel`, the plain model in it. The weights are shared with it.
        **kwargs: of `keras.Model`: `name`.

    Raises:
        ValueError: `base` is not a model, or not built, or it takes whole numbers only.

    Example:

    >>> import keras, numpy as np, jvpreg
    >>> base = keras.Sequential([keras.Input((8,)), keras.layers.Dense(16, activation="relu"), keras.layers.Dense(3)])
    >>> tangent = jvpreg.TangentModel(base)
    >>> y, ju = tangent([np.ones((4, 8)), np.ones((4, 8))])
    >>> tuple(y.shape), tuple(ju.shape)
    ((4, 3), (4, 3))
    """

    def __init__(self, base: keras.Model, **kwargs: Any):
        base = unwrap(base)
        if not isinstance(base, keras.Model) or not base.built:
            raise checks.invalid("base", "a Keras model, built", base)
        known = getattr(base, "inputs", None)
        if known and not any(map(_moves, known)):
            raise _whole_numbers_only("base", base)
        # `base` casts its own inputs; a second cast here would round them.
        super().__init__(**{"autocast": False, "dtype": base.dtype_policy, **kwargs})
        self.base = base
        # A base without a graph has no known inputs: Keras records those of the first call, for `export`.
        self.built = _known_inputs(base) is not None

    def call(self, inputs: Structure) -> Structure:
        """`(f(x), J u)` for `inputs` = `[x, u]`.

        Args:
            inputs: a list of `x`, like the base model's input, `(B, …)` or a structure of them, and `u`, like `x`
                without whole numbers.

        Returns:
            A tuple of `f(x)` and `J u`, each in the base model's own structure. `J u` is in float32 at least.

        Raises:
            NotImplementedError: an operation has no rule.
            ValueError: `inputs` is no pair, a shape does not fit, or `x` holds whole numbers only.
        """
        x, u = self._split(inputs)
        # A product is not taken apart, since rules compute it by functions of the backend's that take no symbols.
        # By operations alone that every format of an export has: gradients of the backend's are not among them.
        return jvp_with(self.base, x, u, (Context(), "ignore" if isinstance(self.base, TangentModel) else "error"))

    def compute_output_spec(self, inputs: Structure, **kwargs: Any) -> Structure:
        """The base model's outputs twice, the second time in float32 at least."""
        x, _ = self._split(inputs)
        outputs = self.base.compute_output_spec(x)
        return outputs, tree.map_structure(_tangent_spec, outputs)

    def export(
        self,
        filepath: str,
        format: str = "tf_saved_model",
        verbose: bool | None = None,
        input_signature: Structure | None = None,
        **kwargs: Any,
    ) -> None:
        """As `keras.Model.export`, with inputs that are named and have the dtypes that the base model expects."""
        input_signature = self._input_signature() if input_signature is None else input_signature
        super().export(filepath, format, verbose=verbose, input_signature=input_signature, **kwargs)

    def _input_signature(self) -> list | None:
        """One argument, `[x, u]`; None, for Keras to infer it from the first call, if the base model has no graph."""
        structure = _known_inputs(self.base)
        if structure is None:
            return None
        several = len(tree.flatten(structure)) > 1
        floatx = keras.config.floatx()

        def spec(tensor: Tensor, prefix: str, dtype: DType) -> Tensor:
            name = f"{prefix}_{tensor.name}" if several else prefix
            return keras.InputSpec(shape=(None, *tensor.shape[1:]), dtype=dtype, name=name)

        def tangent(tensor: Tensor) -> Tensor:
            return spec(tensor, "u", tensor.dtype if keras.backend.is_float_dtype(tensor.dtype) else floatx)

        primals = tree.map_structure(lambda tensor: spec(tensor, "x", tensor.dtype), structure)
        return [[primals, tree.map_structure(tangent, _without_whole_numbers(structure))]]

    def _split(self, inputs: Structure) -> tuple:
        """`x`, and `u` like it, with None for whole numbers; the others have the same shapes."""
        if not isinstance(inputs, (list, tuple)) or len(inputs) != 2:
            received = f"{len(inputs)} of them" if isinstance(inputs, (list, tuple)) else f"{type(inputs).__name__}"
            raise ValueError(
                "Invalid value for argument `inputs`. Expected a pair [x, u], each like the input of "
                f"`{self.base.name}`. Received: {received}."
            )
        x, u = inputs
        primals = flatten_inputs(self.base, x, "x")
        if not any(map(_moves, primals)):
            raise _whole_numbers_only("x", self.base)
        u = _filled(u, x)
        for primal, tangent in zip(primals, flatten_tangents(self.base, x, u), strict=True):
            if tangent is not None and not _alike(tuple(primal.shape), tuple(tangent.shape)):
                raise ValueError(
                    f"Invalid value for argument `u`. Expected shape {tuple(primal.shape)}, like x. Received: u with "
                    f"shape {tuple(tangent.shape)}. For several directions at once, use `jvpreg.linearize`."
                )
        return x, u

    def build_from_config(self, config: Config) -> None:
        """Nothing is built: all weights are the base model's, which was loaded with them."""
        self.built = self.base.built

    def get_config(self) -> Config:
        """The base model."""
        return {"base": keras.saving.serialize_keras_object(self.base), "name": self.name}

    @classmethod
    def from_config(cls, config: Config, custom_objects: Mapping[str, Any] | None = None) -> "TangentModel":
        """The model that `get_config` described."""
        base = keras.saving.deserialize_keras_object(config["base"], custom_objects=custom_objects)
        return cls(**{**config, "base": base})


def _known_inputs(base: keras.Model) -> Structure:
    """The inputs of a model, each with a name, in its own structure; None if they are not known."""
    if isinstance(base, TangentModel):
        signature = base._input_signature()
        return None if signature is None else signature[0]
    if isinstance(base, keras.Function):
        return base.input
    # A Sequential model keeps its one input in a list.
    return base.inputs[0] if getattr(base, "inputs", None) else None


def _moves(leaf: Tensor) -> bool:
    """Whether an input has a tangent: real numbers, and bytes, which stand for them."""
    return has_tangents(leaf) or keras.backend.standardize_dtype(leaf.dtype) == "uint8"


def _without_whole_numbers(structure: Structure) -> Structure:
    """A structure without the leaves that have no tangent; what is left empty is left out too."""
    if isinstance(structure, dict):
        parts = {name: _without_whole_numbers(part) for name, part in structure.items()}
        return {name: part for name, part in parts.items() if part is not None} or None
    if isinstance(structure, (list, tuple)):
        kept = [part for part in map(_without_whole_numbers, structure) if part is not None]
        return kept or None
    return structure if _moves(structure) else None


def _filled(u: Structure, x: Structure) -> Structure:
    """Tangents `u` with None for the whole numbers of `x`, whether they were left out or given."""
    if _without_whole_numbers(x) is None:
        return tree.map_structure(lambda leaf: None, x)
    if isinstance(x, dict) and isinstance(u, dict):
        whole = {name: _filled(None, part) for name, part in x.items() if _without_whole_numbers(part) is None}
        return {**{name: _filled(part, x[name]) if name in x else part for name, part in u.items()}, **whole}
    if isinstance(x, (list, tuple)):
        moving = [_without_whole_numbers(part) is not None for part in x]
        given = u if isinstance(u, (list, tuple)) else [u]
        if len(given) == sum(moving) < len(x):
            rest = iter(given)
            given = [next(rest) if moves else None for moves in moving]
        if len(given) == len(x):
            return [_filled(part, each) for part, each in zip(given, x, strict=True)]
    return u


def _whole_numbers_only(argument: str, base: keras.Model) -> ValueError:
    return ValueError(
        f"Invalid value for argument `{argument}`. Expected real numbers in one input at least: integers have no "
        f"derivative. Received: integers in every input of `{base.name}`. If they are token ids, give "
        "`jvpreg.TangentModel` a model of the layers after the embedding."
    )


def _alike(shape: tuple, other: tuple) -> bool:
    pairs = zip(shape, other, strict=False)
    return len(shape) == len(other) and all(a is None or b is None or a == b for a, b in pairs)


def _tangent_spec(output: Tensor) -> Structure:
    dtype = output.dtype if has_tangents(output) else keras.config.floatx()
    return keras.KerasTensor(output.shape, "float32" if dtype in ("float16", "bfloat16") else dtype)
