"""The table of cases: at least one row for every operation that has a rule, and architectures made of them.

A row is `(id, make, input_shape)`; `make()` returns a layer, and `input_shape` leaves out the batch and is a list for
layers with several inputs. A registered rule without a row here fails `test_rules.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import keras
from keras import activations, layers, ops


@dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
        id: its name in the test's output.
        make: makes the layer.
        input_shape: without the batch; a list for several inputs.
        arguments: of `check_rule`.
        operation: what it is a row for, where that is not the layer's class.
        channels_first: whether it needs a backend that has channels-first kernels on CPU (TensorFlow has none).
        float32_on_tensorflow: whether TensorFlow has no float64 kernel for it on CPU.
        random: whether it draws random numbers, which TensorFlow draws otherwise under XLA than without.
    """

    id: str
    make: Callable[[], keras.Layer]
    input_shape: tuple | list
    arguments: dict = field(default_factory=dict)
    operation: object = None
    channels_first: bool = False
    float32_on_tensorflow: bool = False
    random: bool = False


def _row(make, input_shape, name=None, channels_first=False, float32_on_tensorflow=False, **arguments):
    kind = type(make())
    random = "seed_generator" in vars(make()) and bool(arguments.get("training"))
    return Case(
        name or kind.__name__,
        make,
        input_shape,
        arguments,
        kind,
        channels_first,
        float32_on_tensorflow,
        random,
    )


def _activation(function):
    """Every activation, inside a `Dense`, so that its intercept and its layer's bias are told apart as well."""
    return Case(f"Dense-{function.__name__}", lambda: layers.Dense(6, activation=function), (5,), operation=function)


# Activations whose arguments have no default are only reachable through `Activation` with a function of one's own.
ACTIVATIONS = [
    activations.celu,
    activations.elu,
    activations.exponential,
    activations.glu,
    activations.hard_shrink,
    activations.hard_silu,
    activations.hard_tanh,
    activations.leaky_relu,
    activations.linear,
    activations.log_sigmoid,
    activations.log_softmax,
    activations.mish,
    activations.relu,
    activations.relu6,
    activations.selu,
    activations.sigmoid,
    activations.silu,
    activations.soft_shrink,
    activations.softmax,
    activations.softplus,
    activations.softsign,
    activations.sparse_plus,
    activations.sparse_sigmoid,
    activations.sparsemax,
    activations.squareplus,
    activations.tanh,
    activations.tanh_shrink,
]

IMAGE = (6, 7, 3)
SEQUENCE = (7, 3)
VOLUME = (4, 5, 4, 2)

LAYERS = [
    _row(lambda: layers.Dense(4), (3,)),
    _row(lambda: layers.Dense(4, use_bias=False), (3,), "Dense-no-bias"),
    _row(lambda: layers.Dense(4, activation="relu"), (5, 3), "Dense-on-a-sequence"),
    _row(
        lambda: layers.Dense(4, activation=layers.LeakyReLU(0.25, dtype="float64")),
        (3,),
        "Dense-with-a-layer-as-activation",
    ),
    _row(layers.Identity, (3,)),
    _row(lambda: layers.Activation("tanh"), (3,)),
    _row(layers.ReLU, (9,)),
    _row(lambda: layers.ReLU(max_value=0.7), (9,), "ReLU-max-value"),
    _row(lambda: layers.ReLU(max_value=6), (9,), "ReLU-6"),
    _row(lambda: layers.ReLU(negative_slope=0.3), (9,), "ReLU-negative-slope"),
    _row(lambda: layers.ReLU(threshold=0.4), (9,), "ReLU-threshold"),
    _row(lambda: layers.ReLU(max_value=0.9, negative_slope=0.3, threshold=0.2), (9,), "ReLU-every-argument"),
    _row(layers.LeakyReLU, (9,)),
    _row(lambda: layers.ELU(alpha=0.7), (9,)),
    _row(layers.PReLU, (9,)),
    _row(lambda: layers.PReLU(shared_axes=[1, 2]), IMAGE, "PReLU-shared-axes"),
    _row(layers.Softmax, (4, 5)),
    _row(lambda: layers.Softmax(axis=1), (4, 5), "Softmax-axis-1"),
    _row(lambda: layers.Softmax(axis=(1, 2)), (4, 5), "Softmax-two-axes"),
    _row(lambda: layers.Conv1D(4, 3, padding="causal", dilation_rate=2, activation="relu"), SEQUENCE),
    _row(lambda: layers.Conv1D(4, 3, strides=2, padding="same"), SEQUENCE, "Conv1D-same-strided"),
    _row(lambda: layers.Conv2D(4, 3, activation="silu"), IMAGE),
    _row(lambda: layers.Conv2D(4, (2, 3), strides=2, padding="same", use_bias=False), IMAGE, "Conv2D-strided"),
    _row(lambda: layers.Conv2D(4, 2, dilation_rate=2), IMAGE, "Conv2D-dilated"),
    _row(lambda: layers.Conv2D(4, 3, groups=2), (6, 6, 4), "Conv2D-groups"),
    _row(
        lambda: layers.Conv2D(4, 3, data_format="channels_first"),
        (3, 6, 7),
        "Conv2D-channels-first",
        channels_first=True,
    ),
    _row(lambda: layers.Conv3D(3, 2, activation="relu"), VOLUME),
    _row(lambda: layers.DepthwiseConv1D(3, depth_multiplier=2, padding="same"), SEQUENCE),
    _row(lambda: layers.DepthwiseConv2D(3, depth_multiplier=2, activation="tanh"), IMAGE),
    _row(lambda: layers.SeparableConv1D(4, 3, strides=2, activation="relu"), SEQUENCE),
    _row(lambda: layers.SeparableConv2D(4, 3, depth_multiplier=2, padding="same"), IMAGE),
    _row(lambda: layers.Conv1DTranspose(4, 3, strides=2, activation="relu"), SEQUENCE),
    _row(lambda: layers.Conv2DTranspose(4, 3, strides=2, padding="same", activation="relu"), IMAGE),
    _row(lambda: layers.Conv3DTranspose(2, 2, strides=2), (3, 3, 2, 2)),
    _row(layers.BatchNormalization, IMAGE),
    _row(lambda: layers.BatchNormalization(center=False, scale=False), (5,), "BatchNormalization-plain"),
    _row(lambda: layers.BatchNormalization(axis=1), (3, 4, 5), "BatchNormalization-axis-1"),
    _row(
        layers.BatchNormalization,
        IMAGE,
        "BatchNormalization-coupled",
        training=True,
        batch_statistics="coupled",
        batch_size=5,
    ),
    _row(
        lambda: layers.BatchNormalization(axis=1),
        (3, 4),
        "BatchNormalization-coupled-axis-1",
        training=True,
        batch_statistics="coupled",
        batch_size=5,
    ),
    _row(lambda: layers.Rescaling(1 / 3, offset=0.4), IMAGE),
    _row(lambda: layers.Normalization(mean=[0.1, 0.2, 0.3], variance=[0.5, 2.0, 3.0]), IMAGE),
    _row(
        lambda: layers.Normalization(mean=[0.1, 0.2, 0.3], variance=[0.5, 2.0, 3.0], invert=True),
        IMAGE,
        "Normalization-inverted",
    ),
    _row(lambda: layers.AveragePooling1D(2), SEQUENCE),
    _row(lambda: layers.AveragePooling2D(3, strides=2, padding="same"), IMAGE),
    _row(lambda: layers.AveragePooling3D(2), VOLUME, float32_on_tensorflow=True),
    _row(lambda: layers.MaxPooling1D(2), SEQUENCE),
    _row(lambda: layers.MaxPooling1D(3, strides=1, padding="same"), SEQUENCE, "MaxPooling1D-overlapping"),
    _row(lambda: layers.MaxPooling2D(2), IMAGE),
    _row(lambda: layers.MaxPooling2D((2, 3), padding="same"), IMAGE, "MaxPooling2D-same"),
    _row(lambda: layers.MaxPooling2D(3, strides=2), IMAGE, "MaxPooling2D-overlapping"),
    _row(lambda: layers.MaxPooling2D(3, strides=2, padding="same"), IMAGE, "MaxPooling2D-overlapping-same"),
    _row(lambda: layers.MaxPooling2D(2, strides=3, padding="same"), IMAGE, "MaxPooling2D-gaps-same"),
    _row(
        lambda: layers.MaxPooling2D(2, data_format="channels_first"),
        (3, 6, 7),
        "MaxPooling2D-channels-first",
        channels_first=True,
    ),
    _row(lambda: layers.MaxPooling3D(2), VOLUME, float32_on_tensorflow=True),
    _row(layers.GlobalAveragePooling1D, SEQUENCE),
    _row(layers.GlobalAveragePooling2D, IMAGE),
    _row(lambda: layers.GlobalAveragePooling3D(keepdims=True), VOLUME),
    _row(layers.GlobalMaxPooling1D, SEQUENCE),
    _row(lambda: layers.GlobalMaxPooling2D(keepdims=True), IMAGE),
    _row(
        lambda: layers.GlobalMaxPooling2D(data_format="channels_first"),
        (3, 6, 7),
        "GlobalMaxPooling2D-channels-first",
    ),
    _row(layers.GlobalMaxPooling3D, VOLUME),
    _row(layers.Add, [(4, 3), (4, 3), (4, 3)]),
    _row(layers.Add, [(4, 3), (3,)], "Add-broadcast"),
    _row(layers.Subtract, [(4, 3), (4, 3)]),
    _row(layers.Average, [(4, 3), (4, 3), (4, 3)]),
    _row(lambda: layers.Concatenate(axis=1), [(4, 3), (2, 3)]),
    _row(layers.Concatenate, [(4, 3), (4, 2)], "Concatenate-last-axis"),
    _row(layers.Multiply, [(4, 3), (4, 3), (4, 3)]),
    _row(layers.Multiply, [(4, 5, 3), (1, 1, 3)], "Multiply-broadcast"),
    _row(layers.Multiply, [(4, 5, 3), (3,)], "Multiply-broadcast-rank"),
    _row(layers.Maximum, [(4, 3), (4, 3), (4, 3)]),
    _row(layers.Minimum, [(4, 3), (4, 3), (4, 3)]),
    _row(lambda: layers.Dot(axes=1), [(4,), (4,)]),
    _row(lambda: layers.Dot(axes=(2, 1)), [(3, 4), (4, 5)], "Dot-matrices"),
    _row(lambda: layers.Dot(axes=-1, normalize=True), [(3, 4), (2, 4)], "Dot-normalized"),
    _row(layers.Flatten, IMAGE),
    _row(lambda: layers.Reshape((-1, 3)), IMAGE),
    _row(lambda: layers.Permute((3, 1, 2)), IMAGE),
    _row(lambda: layers.RepeatVector(3), (4,)),
    _row(lambda: layers.Cropping1D((1, 2)), SEQUENCE),
    _row(lambda: layers.Cropping2D(((1, 0), (2, 1))), IMAGE),
    _row(lambda: layers.Cropping3D(1), VOLUME),
    _row(lambda: layers.ZeroPadding1D(2), SEQUENCE),
    _row(lambda: layers.ZeroPadding2D(((1, 0), (2, 1))), IMAGE),
    _row(lambda: layers.ZeroPadding3D(1), VOLUME),
    _row(lambda: layers.UpSampling1D(2), SEQUENCE),
    _row(lambda: layers.UpSampling2D((2, 3)), IMAGE),
    _row(lambda: layers.UpSampling3D(2), VOLUME),
    _row(lambda: layers.Dropout(0.4, seed=1), IMAGE, training=True),
    _row(lambda: layers.Dropout(0.4), IMAGE, "Dropout-inference"),
    _row(
        lambda: layers.Dropout(0.4, noise_shape=(None, 1, None, 3), seed=1),
        IMAGE,
        "Dropout-noise-shape",
        training=True,
    ),
    _row(lambda: layers.SpatialDropout1D(0.4, seed=1), SEQUENCE, training=True),
    _row(lambda: layers.SpatialDropout2D(0.4, seed=1), IMAGE, training=True),
    _row(
        lambda: layers.SpatialDropout2D(0.4, seed=1, data_format="channels_first"),
        (3, 6, 7),
        "SpatialDropout2D-channels-first",
        training=True,
    ),
    _row(lambda: layers.SpatialDropout3D(0.4, seed=1), VOLUME, training=True),
    _row(lambda: layers.GaussianDropout(0.4, seed=1), IMAGE, training=True),
    _row(lambda: layers.GaussianNoise(0.4, seed=1), IMAGE, training=True),
    _row(lambda: layers.AlphaDropout(0.4, seed=1), IMAGE, training=True),
    _row(layers.ActivityRegularization, (4,)),
    *[_activation(function) for function in ACTIVATIONS],
]


# Whole models. They are made in float64, since `check_rule` takes a model as it is.


def vgg(pooling=layers.MaxPooling2D, activation="relu"):
    """Two blocks of convolution, batch normalization and pooling."""
    block = []
    for filters in (4, 6):
        block += [
            layers.Conv2D(filters, 3, padding="same", use_bias=False),
            layers.BatchNormalization(),
            layers.Activation(activation),
            pooling(2),
        ]
    return keras.Sequential([keras.Input((8, 8, 2)), *block, layers.Flatten(), layers.Dense(3)])


def residual_block():
    x = keras.Input((5, 5, 3))
    y = layers.Conv2D(3, 3, padding="same")(x)
    y = layers.ReLU()(layers.BatchNormalization()(y))
    y = layers.BatchNormalization()(layers.Conv2D(3, 3, padding="same")(y))
    y = layers.ReLU()(layers.Add()([x, y]))
    return keras.Model(x, layers.Dense(2)(layers.GlobalAveragePooling2D()(y)))


def squeeze_and_excite():
    x = keras.Input((5, 5, 4))
    y = layers.Conv2D(4, 3, activation="silu")(x)
    gates = layers.GlobalAveragePooling2D(keepdims=True)(y)
    gates = layers.Dense(4, activation="sigmoid")(layers.Dense(2, activation="relu")(gates))
    return keras.Model(x, layers.Dense(2)(layers.GlobalMaxPooling2D()(layers.Multiply()([y, gates]))))


def _functional(units, activation="tanh", size=4):
    x = keras.Input((size,))
    return keras.Model(x, layers.Dense(units)(layers.Dense(5, activation=activation)(x)))


def functional_in_functional():
    x = keras.Input((4,))
    return keras.Model(x, layers.Dense(2)(_functional(3)(layers.Dense(4, activation="softplus")(x))))


def sequential_in_functional():
    x = keras.Input((4,))
    inner = keras.Sequential([layers.Dense(3, activation="relu"), layers.BatchNormalization()])
    return keras.Model(x, layers.Dense(2)(inner(x)))


def twice_nested():
    inner = keras.Sequential([keras.Input((3,)), layers.Dense(4, activation="elu")])
    x = keras.Input((3,))
    middle = keras.Model(x, layers.Add()([inner(x), layers.Dense(4)(x)]))
    return keras.Sequential([keras.Input((3,)), layers.Dense(3), middle, layers.Dense(2)])


def shared_layer():
    x = keras.Input((4,))
    shared = layers.Dense(4, activation="tanh")
    return keras.Model(x, layers.Add()([shared(x), shared(shared(x))]))


def shared_sub_model():
    first, second = keras.Input((4,)), keras.Input((4,))
    shared = _functional(3, "softplus")
    return keras.Model([first, second], layers.Multiply()([shared(first), shared(second)]))


def several_inputs_and_outputs():
    first, second = keras.Input((4,), name="zulu"), keras.Input((3,), name="alpha")
    both = layers.Concatenate()([first, second])
    hidden = layers.Dense(5, activation="relu")(both)
    return keras.Model([first, second], [layers.Dense(2)(hidden), layers.Dense(3, activation="tanh")(first)])


def input_as_output():
    x = keras.Input((4,))
    return keras.Model(x, [x, layers.Dense(2)(x)])


def output_twice():
    x = keras.Input((4,))
    y = layers.Dense(2, activation="tanh")(x)
    return keras.Model(x, [y, layers.Dense(2)(y), y])


def sub_model_with_an_unused_output():
    x = keras.Input((4,))
    two_heads = keras.Model(x, [layers.Dense(3)(x), layers.Dense(2, activation="tanh")(x)])
    y = keras.Input((4,))
    return keras.Model(y, two_heads(y)[1])


def sequential_without_input():
    return keras.Sequential([layers.Dense(4, activation="tanh"), layers.Dense(2)])


def with_dropout():
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(8, activation="relu"),
            layers.Dropout(0.4, seed=3),
            layers.GaussianDropout(0.2, seed=4),
            layers.Dense(2),
        ]
    )


def constant_branch():
    """A merge with a constant of one row for the whole batch."""
    x = keras.Input((4,))
    y = layers.Dense(3, activation="tanh")(x)
    constant = ops.convert_to_tensor([[0.3, -2.0, 1.5]], dtype=keras.config.floatx())
    return keras.Model(x, layers.Dense(2)(layers.Average()([y, constant])))


def _architecture(make, input_shape, name=None, **arguments):
    return Case(name or make.__name__.strip("_"), make, input_shape, arguments)


ARCHITECTURES = [
    _architecture(vgg, (8, 8, 2)),
    _architecture(vgg, (8, 8, 2), "vgg-coupled", training=True, batch_statistics="coupled"),
    _architecture(residual_block, (5, 5, 3)),
    _architecture(residual_block, (5, 5, 3), "residual_block-coupled", training=True, batch_statistics="coupled"),
    _architecture(squeeze_and_excite, (5, 5, 4)),
    _architecture(functional_in_functional, (4,)),
    _architecture(sequential_in_functional, (4,)),
    _architecture(twice_nested, (3,)),
    _architecture(shared_layer, (4,)),
    _architecture(shared_sub_model, [(4,), (4,)]),
    _architecture(several_inputs_and_outputs, [(4,), (3,)]),
    _architecture(input_as_output, (4,)),
    _architecture(output_twice, (4,)),
    _architecture(sub_model_with_an_unused_output, (4,)),
    _architecture(sequential_without_input, (4,)),
    _architecture(with_dropout, (6,), training=True),
    _architecture(constant_branch, (4,)),
]
