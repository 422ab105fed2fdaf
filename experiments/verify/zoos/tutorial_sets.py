"""Models of graphs, and those that draw or look up what they decode, small, as tutorials build them."""

import keras
from keras import layers, ops

from experiments.verify.zoos import draws
from experiments.verify.zoos.member import Member

register = keras.saving.register_keras_serializable("zoos")

EDGES = ((0, 1, 2, 3, 4, 0, 2), (1, 2, 3, 4, 0, 2, 0))
"""From each of the first nodes to the one below."""


@register
class MessagePassing(layers.Layer):
    """Messages along the edges of a graph, their sum and their maximum at each node, and a node's update by them."""

    def build(self, shape):
        """The message of a pair of nodes, and the update."""
        self.message = layers.Dense(shape[-1], activation="relu")
        self.update = layers.GRUCell(shape[-1])
        self.message.build((*shape[:-1], 2 * shape[-1]))
        self.update.build((None, 2 * shape[-1]))

    def call(self, nodes):
        """(B, N, D) to the same."""
        sources, targets = EDGES
        _, count, size = nodes.shape
        pairs = [ops.take(nodes, ops.convert_to_tensor(ends, "int32"), axis=1) for ends in (sources, targets)]
        messages = ops.transpose(self.message(ops.concatenate(pairs, axis=-1)), (1, 0, 2))
        ends = ops.convert_to_tensor(targets, "int32")
        gathered = [reduce(messages, ends, num_segments=count) for reduce in (ops.segment_sum, ops.segment_max)]
        gathered = ops.transpose(ops.concatenate(gathered, axis=-1), (1, 0, 2))
        flat = ops.reshape(gathered, (-1, 2 * size))
        updated, _ = self.update(flat, [ops.reshape(nodes, (-1, size))])
        return ops.reshape(updated, (-1, count, size))


def graph_network():
    """Two rounds of messages, and the mean over the nodes."""
    inputs = keras.Input((5, 3))
    x = layers.Dense(4)(inputs)
    for _ in range(2):
        x = MessagePassing()(x)
    return keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling1D()(x)))


@register
class Sampling(layers.Layer):
    """A latent drawn by its mean and the logarithm of its variance."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seed_generator = keras.random.SeedGenerator(1337)

    def call(self, inputs):
        """Two tensors (B, D) to one."""
        mean, log_variance = inputs
        noise = keras.random.normal(ops.shape(mean), dtype=mean.dtype, seed=self.seed_generator)
        return mean + ops.exp(0.5 * log_variance) * noise


@register
class VAE(keras.Model):
    """A variational autoencoder, which adds its divergence to the loss."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        inputs = keras.Input((6, 6, 1))
        x = layers.Conv2D(4, 3, activation="relu", strides=2, padding="same")(inputs)
        x = layers.Dense(8, activation="relu")(layers.Flatten()(x))
        mean, log_variance = layers.Dense(2, name="z_mean")(x), layers.Dense(2, name="z_log_var")(x)
        self.encoder = keras.Model(inputs, [mean, log_variance, Sampling()([mean, log_variance])])
        latent = keras.Input((2,))
        x = layers.Reshape((3, 3, 4))(layers.Dense(36, activation="relu")(latent))
        x = layers.Conv2DTranspose(4, 3, activation="relu", strides=2, padding="same")(x)
        self.decoder = keras.Model(latent, layers.Conv2DTranspose(1, 3, padding="same")(x))

    def call(self, x):
        """(B, 6, 6, 1) to the same."""
        mean, log_variance, latent = self.encoder(x)
        divergence = -0.5 * (1 + log_variance - ops.square(mean) - ops.exp(log_variance))
        self.add_loss(1e-3 * ops.mean(ops.sum(divergence, axis=1)))
        return self.decoder(latent)


@register
class VectorQuantizer(layers.Layer):
    """The nearest of the vectors of a codebook; gradients go past it."""

    def __init__(self, num_codes=6, **kwargs):
        super().__init__(**kwargs)
        self.num_codes = num_codes

    def build(self, shape):
        """A column of the codebook for each code."""
        self.codes = self.add_weight((shape[-1], self.num_codes), "random_uniform", name="codes")

    def call(self, x):
        """(B, H, W, D) to the same."""
        flat = ops.reshape(x, (-1, x.shape[-1]))
        squares = ops.sum(flat**2, axis=1, keepdims=True) + ops.sum(self.codes**2, axis=0)
        nearest = ops.argmin(squares - 2 * ops.matmul(flat, self.codes), axis=1)
        chosen = ops.one_hot(nearest, self.num_codes, dtype=x.dtype)
        quantized = ops.reshape(ops.matmul(chosen, ops.transpose(self.codes)), ops.shape(x))
        self.add_loss(0.25 * ops.mean((ops.stop_gradient(quantized) - x) ** 2))
        self.add_loss(ops.mean((quantized - ops.stop_gradient(x)) ** 2))
        return x + ops.stop_gradient(quantized - x)

    def get_config(self):
        """The arguments of `__init__`."""
        return {**super().get_config(), "num_codes": self.num_codes}


def vq_vae():
    """An autoencoder whose latents are codes."""
    inputs = keras.Input((6, 6, 1))
    x = layers.Conv2D(4, 3, activation="relu", strides=2, padding="same")(inputs)
    x = VectorQuantizer()(layers.Conv2D(3, 1, padding="same")(x))
    x = layers.Conv2DTranspose(4, 3, activation="relu", strides=2, padding="same")(x)
    return keras.Model(inputs, layers.Conv2DTranspose(1, 3, padding="same")(x))


MEMBERS = (
    Member("graph network", graph_network, draws.normal(5, 3)),
    Member("VAE", VAE, draws.normal(6, 6, 1)),
    Member("VQ-VAE", vq_vae, draws.normal(6, 6, 1)),
)
