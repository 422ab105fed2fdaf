"""Models of sequences and tables that tutorials build, small, each with the operations that the tutorial uses."""

import keras
from keras import layers, ops

from experiments.verify.zoos import draws
from experiments.verify.zoos.member import Member

register = keras.saving.register_keras_serializable("zoos")


def _after_both(first, second):
    decay, state = first
    later_decay, later_state = second
    return decay * later_decay, later_decay * state + later_state


@register
class SelectiveScan(layers.Layer):
    """A block of Mamba: a linear recurrence whose coefficients are read off its input, by an associative scan."""

    def __init__(self, inner=6, states=3, **kwargs):
        super().__init__(**kwargs)
        self.inner, self.states = inner, states

    def build(self, shape):
        """The projections, and the logarithms of the decays."""
        self.into = layers.Dense(2 * self.inner, use_bias=False)
        self.convolution = layers.DepthwiseConv1D(3, padding="valid")
        self.selection = layers.Dense(1 + 2 * self.states, use_bias=False)
        self.steps = layers.Dense(self.inner)
        self.out = layers.Dense(shape[-1], use_bias=False)
        self.decay_log = self.add_weight((self.inner, self.states), name="decay_log")
        self.skip = self.add_weight((self.inner,), "ones", name="skip")
        self.into.build(shape)
        self.convolution.build((*shape[:-1], self.inner))
        self.selection.build((*shape[:-1], self.inner))
        self.steps.build((*shape[:-1], 1))
        self.out.build((*shape[:-1], self.inner))

    def call(self, x):
        """(B, T, D) to the same."""
        u, gate = ops.split(self.into(x), 2, axis=-1)
        u = ops.silu(self.convolution(ops.pad(u, ((0, 0), (2, 0), (0, 0)))))
        step, entering, leaving = ops.split(self.selection(u), [1, 1 + self.states], axis=-1)
        step = ops.softplus(self.steps(step))
        decay = ops.exp(ops.expand_dims(step, -1) * -ops.exp(self.decay_log))
        driven = ops.expand_dims(step * u, -1) * ops.expand_dims(entering, -2)
        _, states = ops.associative_scan(_after_both, (decay, driven), axis=1)
        y = ops.einsum("btds,bts->btd", states, leaving) + self.skip * u
        return self.out(y * ops.silu(gate))

    def get_config(self):
        """The arguments of `__init__`."""
        return {**super().get_config(), "inner": self.inner, "states": self.states}


def mamba():
    """A residual block, and the mean over the steps."""
    inputs = keras.Input((6, 4))
    x = inputs + SelectiveScan()(layers.RMSNormalization()(inputs))
    return keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling1D()(x)))


@register
class NeuralODE(layers.Layer):
    """A flow along a field that a network gives, by steps of Runge and Kutta."""

    def build(self, shape):
        """The network of the field."""
        self.field = keras.Sequential([layers.Dense(8, activation="tanh"), layers.Dense(shape[-1])])
        self.field.build((None, shape[-1] + 1))

    def call(self, x):
        """(B, D) to the same, at time 1."""
        step = 0.25

        def slope(time, x):
            return self.field(ops.concatenate([x, ops.full_like(x[:, :1], 1.0) * time], axis=-1))

        def advance(i, x):
            time = ops.cast(i, x.dtype) * step
            first = slope(time, x)
            second = slope(time + step / 2, x + step / 2 * first)
            third = slope(time + step / 2, x + step / 2 * second)
            fourth = slope(time + step, x + step * third)
            return x + step / 6 * (first + 2 * second + 2 * third + fourth)

        return ops.fori_loop(0, 4, advance, x)


def neural_ode():
    """A flow between two dense layers."""
    inputs = keras.Input((3,))
    return keras.Model(inputs, layers.Dense(3)(NeuralODE()(layers.Dense(4)(inputs))))


@register
class Experts(layers.Layer):
    """A mixture of four experts, of which each token goes through the two that a router likes best."""

    def build(self, shape):
        """The router, and the two matrices of each expert."""
        self.router = layers.Dense(4, use_bias=False)
        self.router.build(shape)
        self.up = self.add_weight((4, shape[-1], 8), name="up_kernel")
        self.down = self.add_weight((4, 8, shape[-1]), name="down_kernel")

    def call(self, x):
        """(B, T, D) to the same."""
        chances = ops.softmax(self.router(x), axis=-1)
        gates, experts = ops.top_k(chances, 2)
        gates = gates / ops.sum(gates, axis=-1, keepdims=True)
        chosen = ops.one_hot(experts, 4, dtype=gates.dtype)
        combine = ops.sum(ops.expand_dims(gates, -1) * chosen, axis=-2)
        # As Switch Transformers have it: the experts are to be used alike.
        used = ops.mean(ops.sum(chosen, axis=-2), axis=(0, 1))
        self.add_loss(1e-2 * 4 * ops.sum(used * ops.mean(chances, axis=(0, 1))))
        hidden = ops.relu(ops.einsum("btd,edf->btef", x, self.up))
        return ops.einsum("btef,efd,bte->btd", hidden, self.down, combine)


def mixture_of_experts():
    """A transformer's block with experts."""
    inputs = keras.Input((5, 4))
    x = inputs + layers.MultiHeadAttention(2, 4)(inputs, inputs)
    x = layers.LayerNormalization()(x)
    x = layers.LayerNormalization()(x + Experts()(x))
    return keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling1D()(x)))


@register
class ColumnEmbedding(layers.Layer):
    """What is learned of each column, added to its entry."""

    def build(self, shape):
        """A row of the table for each column."""
        self.count = shape[1]
        self.embedding = layers.Embedding(self.count, shape[-1])
        self.embedding.build(())

    def call(self, x):
        """(B, N, D) to the same."""
        return x + self.embedding(ops.arange(start=0, stop=self.count, step=1))


def tab_transformer():
    """A table's row by name: categories through a transformer, numbers beside it."""
    categories = {name: layers.Input((), name=name, dtype="int32") for name in ("education", "occupation", "race")}
    numbers = {name: layers.Input((1,), name=name) for name in ("age", "hours", "gain")}
    encoded = [layers.Embedding(5, 4)(entry) for entry in categories.values()]
    x = ColumnEmbedding()(ops.stack(encoded, axis=1))
    for _ in range(2):
        attended = layers.MultiHeadAttention(2, 4, dropout=0.1)(x, x)
        x = layers.LayerNormalization(epsilon=1e-6)(layers.Add()([attended, x]))
        y = layers.Dense(4)(layers.Dense(8, activation="gelu")(x))
        x = layers.LayerNormalization(epsilon=1e-6)(layers.Add()([y, x]))
    scaled = layers.LayerNormalization(epsilon=1e-6)(layers.concatenate(list(numbers.values())))
    x = layers.concatenate([layers.Flatten()(x), scaled])
    x = layers.Dense(8, activation="selu")(layers.BatchNormalization()(x))
    return keras.Model({**categories, **numbers}, layers.Dense(1)(layers.Dropout(0.2)(x)))


_ROW = draws.named(
    education=draws.whole(5),
    occupation=draws.whole(5),
    race=draws.whole(5),
    age=draws.normal(1),
    hours=draws.normal(1),
    gain=draws.normal(1),
)

MEMBERS = (
    Member("Mamba", mamba, draws.normal(6, 4)),
    Member("neural ODE", neural_ode, draws.normal(3)),
    Member("mixture of experts", mixture_of_experts, draws.normal(5, 4)),
    Member("TabTransformer", tab_transformer, _ROW),
)
