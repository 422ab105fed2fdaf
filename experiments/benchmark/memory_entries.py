"""The entries of `benchmark memory`: what is run, and what of it is kept alive.

Each entry is a function `subject -> held`.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
from keras import ops, tree

import jvpreg
from experiments.benchmark import calls, entries
from experiments.benchmark.config import MemoryConfig
from experiments.benchmark.products import directions
from jvpreg.engine.transpose import transpose


@dataclass
class Subject:
    """A model and its batch, which are part of the baseline.

    Attributes:
        model: as `entries.plain_model` makes it.
        x: images `(B, H, W, 3)`.
        labels: `(B,)`.
        us: directions `(P, B, H, W, 3)`.
        jit: see `calls.compiled`; None if all is eager.
        made: functions that were compiled, by name.
    """

    model: keras.Model
    x: Any
    labels: Any
    us: Any
    jit: bool | None
    made: dict[str, Callable] = field(default_factory=dict)

    @property
    def weights(self) -> list:
        """The values of the trainable variables, which on Torch are leaves of a graph."""
        return [ops.convert_to_tensor(variable.value) for variable in self.model.trainable_variables]

    def loss(self, weights: list, x: Any) -> Any:
        """The loss of a training step, in training mode."""
        with keras.StatelessScope(state_mapping=list(zip(self.model.trainable_variables, weights, strict=True))):
            logits = self.model(x, training=True)
        return ops.mean(keras.losses.sparse_categorical_crossentropy(self.labels, logits, from_logits=True))

    def linearize(self, x: Any, training: bool = False) -> jvpreg.Linearization:
        """The model frozen at `x`."""
        return jvpreg.linearize(self.model, x, training=training, fallback="error", xla=bool(self.jit))

    def compiled(self, name: str, function: Callable) -> Callable:
        """The function, compiled once."""
        if name not in self.made:
            self.made[name] = calls.compiled(function, self.jit)
        return self.made[name]


def subject(config: MemoryConfig, num_probes: int, jit: bool | None) -> Subject:
    """The model with its weights, a batch, and so many directions."""
    model = entries.plain_model(config)
    split = entries.images(config, config.batch_size)
    x, labels = (ops.convert_to_tensor(array) for array in (split.images(), split.labels))
    (us,) = directions([tuple(x.shape)], num_probes, config.seed)
    return Subject(model, x, labels, ops.convert_to_tensor(us), jit)


def forward(subject: Subject) -> Any:
    """The logits."""

    def function(x):
        return subject.model(x, training=False)

    with _without_graph():
        return subject.compiled("forward", function)(subject.x)


def training(subject: Subject) -> Any:
    """What a training step keeps between its forward and its backward pass."""
    weights = subject.weights
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        function = subject.compiled("loss", subject.loss)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(weights)
            loss = function(weights, subject.x)
        return tape, loss
    if keras.backend.backend() == "jax":
        import jax

        def residuals(weights, x):
            return jax.vjp(lambda weights: subject.loss(weights, x), weights)

        return subject.compiled("residuals", residuals)(weights, subject.x)
    import torch

    saved: list[Any] = []

    def pack(tensor: Any) -> Any:
        saved.append(tensor.detach())  # which shares its numbers, and unlike the tensor itself makes no cycle
        return saved[-1]

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return subject.loss(weights, subject.x), saved


def gradient(subject: Subject) -> Any:
    """The gradient of the loss by the weights."""

    def function(weights, x):
        return transpose(
            lambda weights: [ops.cast(subject.loss(weights, x), "float32")], weights, [ops.ones((), "float32")]
        )

    with _without_graph():
        # On Torch as it is, like `training`.
        run = function if keras.backend.backend() == "torch" else subject.compiled("gradient", function)
        return run(subject.weights, subject.x)


def linearization(subject: Subject, training: bool = False) -> Any:
    """A frozen linearization: eagerly the object itself; compiled, what of it a tangent pass needs, and the outputs."""

    def function(x):
        with keras.StatelessScope():  # moving statistics are not to be updated by what is traced
            lin = subject.linearize(x, training)
        return list(residuals(lin)), lin.outputs

    with _without_graph():
        if subject.jit is None:
            return subject.linearize(subject.x, training)
        return subject.compiled("linearization", function)(subject.x)


def product(subject: Subject) -> Any:
    """`f(x)` and `J u` of all directions at once; eagerly with the linearization kept alive."""

    def function(x, us):
        lin = subject.linearize(x)
        return lin.outputs, lin.jvp(us)

    with _without_graph():
        if subject.jit is None:
            lin = subject.linearize(subject.x)
            return lin, lin.jvp(subject.us)
        return subject.compiled("product", function)(subject.x, subject.us)


def _without_graph() -> contextlib.AbstractContextManager:
    """On Torch, without autodiff's graph of what is run, which would be kept too."""
    if keras.backend.backend() != "torch":
        return contextlib.nullcontext()
    import torch

    return torch.no_grad()


@dataclass(frozen=True)
class Entry:
    """One thing to run.

    Attributes:
        name: in the files.
        label: in the table.
        make: runs it, and returns what is kept alive.
        frozen: whether it has a linearization, whose products must be right.
        several: whether it takes `num_probes` directions, and not one.
    """

    name: str
    label: str
    make: Callable[[Subject], Any]
    frozen: bool = False
    several: bool = False


ENTRIES = (
    Entry("forward", "forward pass", forward),
    Entry("training", "what training keeps", training),
    Entry("gradient", "gradient by the weights", gradient),
    Entry("linearization", "linearization, kept alive", linearization, frozen=True),
    Entry(
        "linearization_training",
        "the same, training=True",
        functools.partial(linearization, training=True),
        frozen=True,
    ),
    Entry("product", "one product", product, frozen=True),
    Entry("products", "several products at once", product, frozen=True, several=True),
)


def residuals(lin: jvpreg.Linearization) -> Iterator[Any]:
    """What the tangent pass needs of each node: masks, slopes, and inputs of layers with weights; once each."""
    seen = set()
    for node in lin.nodes:
        for residual in node.pushforward.residuals if node.pushforward else ():
            if id(residual) not in seen and not node.is_constant(residual):
                seen.add(id(residual))
                yield residual


def counted_bytes(held: Any, subject: Subject) -> int | None:
    """Bytes of the tensors that are held, but for the weights and the batch; None for TensorFlow's tape.

    TensorFlow does not tell what a tape has recorded.
    """
    tensors = tensors_of(held)
    if not tensors:
        return None
    own = [*(variable.value for variable in subject.model.variables), subject.x, subject.us, subject.labels]
    known = {_buffer(ops.convert_to_tensor(tensor))[0] for tensor in own}
    buffers = dict(_buffer(tensor) for tensor in tensors)
    return sum(size for address, size in buffers.items() if address not in known)


def tensors_of(held: Any) -> list:
    """The tensors within what an entry returned: the nodes of a linearization, or the leaves of a structure."""
    found: list[Any] = []
    for part in held if isinstance(held, tuple) else (held,):
        if isinstance(part, jvpreg.Linearization):
            found += [value.primal for node in part.nodes for value in (*node.inputs, *node.outputs)]
            found += [r for node in part.nodes if node.pushforward for r in node.pushforward.residuals]
            found += tree.flatten(part.outputs)
        elif keras.backend.backend() == "jax":
            import jax

            found += jax.tree_util.tree_leaves(part)
        elif type(part).__name__ != "GradientTape":
            found += tree.flatten(part)
        else:
            return []
    return [tensor for tensor in found if keras.ops.is_tensor(tensor)]


def _buffer(tensor: Any) -> tuple[int, int]:
    """Where the numbers of a tensor lie, and in how many bytes: views of one buffer count once."""
    backend = keras.backend.backend()
    if backend == "torch":
        storage = tensor.untyped_storage()
        return storage.data_ptr(), storage.nbytes()
    if backend == "jax":
        return tensor.unsafe_buffer_pointer(), tensor.nbytes
    import tensorflow as tf

    array = np.asarray(memoryview(tf.convert_to_tensor(tensor)))  # without a copy; of a variable, its value
    return array.__array_interface__["data"][0], array.nbytes
