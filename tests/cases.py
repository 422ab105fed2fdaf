"""The table of cases: at least one row for every operation that has a rule, and architectures made of them.

A row is `(id, make, input_shape)`; `make()` returns a layer, and `input_shape` leaves out the batch and is a list for
layers with several inputs. A registered rule without a row here fails `test_rules.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import keras
from keras import activations, layers


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
