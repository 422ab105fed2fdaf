"""Models of images and points that tutorials build, small, each with the operations that the tutorial uses."""

import keras
from keras import layers, ops

from experiments.verify.zoos import draws
from experiments.verify.zoos.member import Member

register = keras.saving.register_keras_serializable("zoos")


@register
class Patches(layers.Layer):
    """The patches of an image, a row each."""

    def call(self, images):
        """(B, H, W, C) to (B, N, 4·C)."""
        patches = ops.image.extract_patches(images, size=2, strides=2, padding="valid")
        return ops.reshape(patches, (ops.shape(images)[0], -1, patches.shape[-1]))


@register
class PatchEncoder(layers.Layer):
    """Patches projected, and what is learned of their places."""

    def build(self, shape):
        """A row of the table for each patch."""
        self.count = shape[1]
        self.projection = layers.Dense(8)
        self.position_embedding = layers.Embedding(self.count, 8)
        self.projection.build(shape)
        self.position_embedding.build(())

    def call(self, patches):
        """(B, N, K) to (B, N, 8)."""
        positions = ops.arange(start=0, stop=self.count, step=1)
        return self.projection(patches) + self.position_embedding(positions)


def _feed_forward(x):
    y = layers.Dense(16, activation="gelu")(layers.LayerNormalization()(x))
    return layers.Add()([layers.Dense(8)(layers.Dropout(0.1)(y)), x])


def _cross_attention(num_latents, num_patches):
    latents = layers.Input((num_latents, 8), name="latent_array")
    data = layers.Input((num_patches, 8), name="data_array")
    x, y = layers.LayerNormalization()(latents), layers.LayerNormalization()(data)
    query, key, value = layers.Dense(8)(x), layers.Dense(8)(y), layers.Dense(8)(y)
    attended = layers.Attention(use_scale=True, dropout=0.1)([query, key, value])
    outputs = _feed_forward(layers.Add()([attended, latents]))
    return keras.Model({"latent_array": latents, "data_array": data}, outputs)


def _transformer(num_latents):
    x = layers.Input((num_latents, 8))
    normalized = layers.LayerNormalization()(x)
    attended = layers.MultiHeadAttention(2, 4, dropout=0.1)(normalized, normalized)
    return keras.Model(x, _feed_forward(layers.Add()([attended, x])))


@register
class Perceiver(keras.Model):
    """Learned latents that look at the patches of an image, twice."""

    def build(self, shape):
        """The layers for images of a shape."""
        num_patches = shape[1] * shape[2] // 4
        self.latent_array = self.add_weight((4, 8), "random_normal", name="latent_array")
        self.patcher, self.encoder = Patches(), PatchEncoder()
        self.encoder.build((None, num_patches, 4 * shape[3]))
        self.cross_attention, self.transformer = _cross_attention(4, num_patches), _transformer(4)
        self.pooling, self.head = layers.GlobalAveragePooling1D(), layers.Dense(3)
        self.head.build((None, 8))

    def call(self, images):
        """(B, H, W, C) to logits (B, 3)."""
        inputs = {
            "latent_array": ops.expand_dims(self.latent_array, 0),
            "data_array": self.encoder(self.patcher(images)),
        }
        for _ in range(2):
            inputs["latent_array"] = self.transformer(self.cross_attention(inputs))
        return self.head(self.pooling(inputs["latent_array"]))


@register
class OrthogonalRegularizer(keras.regularizers.Regularizer):
    """How far a matrix for each example is from an orthogonal one."""

    def __init__(self, num_features, strength=0.001):
        self.num_features, self.strength = num_features, strength

    def __call__(self, x):
        """(B, N²) to a number."""
        x = ops.reshape(x, (-1, self.num_features, self.num_features))
        product = ops.tensordot(x, x, axes=(2, 2))
        product = ops.reshape(product, (-1, self.num_features, self.num_features))
        return ops.sum(self.strength * ops.square(product - ops.eye(self.num_features, dtype=x.dtype)))

    def get_config(self):
        """The arguments of `__init__`."""
        return {"num_features": self.num_features, "strength": self.strength}


def point_net():
    """A transform of the points by a net of its own, and the maximum over them."""

    def normalized(x):
        return layers.Activation("relu")(layers.BatchNormalization(momentum=0.0)(x))

    def transformed(inputs, num_features):
        x = normalized(layers.Conv1D(8, 1, padding="valid")(inputs))
        x = layers.GlobalMaxPooling1D()(normalized(layers.Conv1D(16, 1, padding="valid")(x)))
        x = layers.Dense(
            num_features * num_features,
            activity_regularizer=OrthogonalRegularizer(num_features),
        )(normalized(layers.Dense(8)(x)))
        return layers.Dot(axes=(2, 1))([inputs, layers.Reshape((num_features, num_features))(x)])

    inputs = keras.Input((6, 3))
    x = normalized(layers.Conv1D(4, 1)(transformed(inputs, 3)))
    x = layers.GlobalMaxPooling1D()(normalized(layers.Conv1D(8, 1)(transformed(x, 4))))
    return keras.Model(inputs, layers.Dense(3)(layers.Dropout(0.3)(x)))


def super_resolution():
    """Efficient sub-pixel convolution: channels become pixels at the end."""
    inputs = keras.Input((4, 4, 1))
    x = layers.Conv2D(6, 5, activation="tanh", padding="same")(inputs)
    x = layers.Conv2D(4, 3, activation="tanh", padding="same")(x)
    return keras.Model(inputs, ops.depth_to_space(layers.Conv2D(4, 3, padding="same")(x), 2))


@register
def squash(x):
    """Vectors shortened to a length below 1."""
    square = ops.sum(ops.square(x), axis=-1, keepdims=True)
    return square / (1.0 + square) * x / ops.sqrt(square + 1e-7)


@register
def lengths(x):
    """Of vectors."""
    return ops.sqrt(ops.sum(ops.square(x), axis=-1) + 1e-7)


@register
class Capsules(layers.Layer):
    """Capsules that agree by routing: coupling coefficients from three rounds."""

    def build(self, shape):
        """A matrix for each pair of capsules."""
        self.kernel = self.add_weight((shape[1], 3, shape[2], 4), name="kernel")

    def call(self, x):
        """(B, I, D) to (B, 3, 4)."""
        votes = ops.einsum("bid,ijdk->bijk", x, self.kernel)
        logits = ops.zeros_like(votes[..., 0])
        for turn in range(3):
            coupling = ops.softmax(logits, axis=2)
            outputs = squash(ops.sum(ops.expand_dims(coupling, -1) * votes, axis=1))
            if turn < 2:
                logits = logits + ops.sum(votes * ops.expand_dims(outputs, 1), axis=-1)
        return outputs


def capsule_net():
    """The lengths of the capsules that a convolution's capsules agree on."""
    inputs = keras.Input((6, 6, 1))
    x = layers.Conv2D(8, 3, activation="relu")(inputs)
    x = layers.Reshape((-1, 4))(layers.Conv2D(8, 3, strides=2)(x))
    x = Capsules()(layers.Lambda(squash)(x))
    return keras.Model(inputs, layers.Lambda(lengths)(x))


@register
class BilinearSampler(layers.Layer):
    """An image read at the places to which an affine map takes a grid, between four pixels each."""

    def call(self, images, theta):
        """(B, H, W, C) and (B, 6) to (B, H, W, C)."""
        _, height, width, channels = images.shape
        x, y = ops.meshgrid(ops.linspace(-1.0, 1.0, width), ops.linspace(-1.0, 1.0, height))
        grid = ops.stack([ops.reshape(x, (-1,)), ops.reshape(y, (-1,)), ops.ones((height * width,))])
        places = ops.matmul(ops.reshape(theta, (-1, 2, 3)), ops.cast(grid, theta.dtype))
        x = 0.5 * (places[:, 0] + 1.0) * (width - 1)
        y = 0.5 * (places[:, 1] + 1.0) * (height - 1)
        left, top = ops.floor(x), ops.floor(y)
        flat, sampled = ops.reshape(images, (-1, height * width, channels)), 0.0
        for row in (top, top + 1):
            for column in (left, left + 1):
                weight = (1 - ops.abs(x - column)) * (1 - ops.abs(y - row))
                inside = ops.clip(row, 0, height - 1) * width + ops.clip(column, 0, width - 1)
                pixels = ops.take_along_axis(flat, ops.expand_dims(ops.cast(inside, "int32"), -1), axis=1)
                sampled = sampled + ops.expand_dims(weight, -1) * pixels
        return ops.reshape(sampled, (-1, height, width, channels))


def spatial_transformer():
    """A net that says how to turn the image before another classifies it."""
    inputs = keras.Input((6, 6, 1))
    x = layers.MaxPooling2D()(layers.Conv2D(4, 3, activation="relu")(inputs))
    theta = layers.Dense(6)(layers.Dense(8, activation="relu")(layers.Flatten()(x)))
    x = BilinearSampler()(inputs, theta)
    x = layers.GlobalAveragePooling2D()(layers.Conv2D(4, 3, activation="relu")(x))
    return keras.Model(inputs, layers.Dense(3)(x))


MEMBERS = (
    Member("Perceiver", Perceiver, draws.normal(4, 4, 1)),
    Member("PointNet", point_net, draws.normal(6, 3)),
    Member("super-resolution", super_resolution, draws.normal(4, 4, 1)),
    Member("capsules", capsule_net, draws.normal(6, 6, 1)),
    Member("spatial transformer", spatial_transformer, draws.normal(6, 6, 1)),
)
