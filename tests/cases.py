"""The table of cases: at least one row for every operation that has a rule, and architectures made of them.

A row is `(id, make, input_shape)`; `make()` returns a layer, and `input_shape` leaves out the batch and is a list for
layers with several inputs. A registered rule without a row here fails `test_rules.py`.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import keras
import operation_rows
import pytest
from keras import activations, layers, ops
from selections_and_matrices import COMPILED, MATRICES_AND_LOSSES, NEEDED, SELECTIONS, WITHIN_A_CALL

import jvpreg
from jvpreg.rules.registry import _RULES


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
        compiled: whether it is checked compiled too. Of recurrent layers, which take long, one of each kind is.
        on_jax: whether it is checked on JAX, which compiles every operation by itself: of a family, one row is.
    """

    id: str
    make: Callable[[], keras.Layer]
    input_shape: tuple | list
    arguments: dict = field(default_factory=dict)
    operation: object = None
    channels_first: bool = False
    float32_on_tensorflow: bool = False
    random: bool = False
    compiled: bool = True
    on_jax: bool = True


def _row(make, input_shape, name=None, channels_first=False, float32_on_tensorflow=False, compiled=True, **arguments):
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
        compiled,
    )


def _activation(function):
    """Every activation, inside a `Dense`, so that its intercept and its layer's bias are told apart as well."""
    return Case(f"Dense-{function.__name__}", lambda: layers.Dense(6, activation=function), (5,), operation=function)


def _call(operation, make, shapes, name=None, **arguments):
    """A row for a function of several tensors, or for one that is no layer: it gets a functional model of its own."""

    def model():
        with jvpreg.testing.float64():
            inputs = [keras.Input(shape) for shape in shapes]
            return keras.Model(inputs, make(*inputs))

    shape = shapes if len(shapes) > 1 else shapes[0]
    return Case(name or operation.__name__, model, shape, arguments, operation)


def _dense(units):
    return layers.Dense(units, activation="tanh", dtype="float64")


# An activation without default arguments can be reached only by `Activation` with a function of the user's own.
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

# Random in training, the identity at inference; but the last, which is the same always.
AUGMENTATIONS = [
    layers.CutMix,
    layers.MixUp,
    lambda: layers.RandomBrightness(0.5),
    lambda: layers.RandomColorDegeneration(0.5),
    layers.RandomColorJitter,
    lambda: layers.RandomContrast(0.5),
    layers.RandomElasticTransform,
    layers.RandomErasing,
    layers.RandomFlip,
    layers.RandomGaussianBlur,
    layers.RandomGrayscale,
    lambda: layers.RandomHue(0.5),
    layers.RandomInvert,
    layers.RandomPerspective,
    lambda: layers.RandomPosterization(4),
    lambda: layers.RandomSaturation(0.5),
    lambda: layers.RandomSharpness(0.5),
    layers.RandomShear,
    lambda: layers.RandomTranslation(0.5, 0.5),
    lambda: layers.RandomZoom(0.5),
    layers.Equalization,
    layers.Solarization,
    layers.AutoContrast,
]
AUGMENTATIONS_IN_FLOAT32 = [layers.AugMix, layers.RandAugment, lambda: layers.RandomRotation(0.5)]

IMAGE = (6, 7, 3)
SEQUENCE = (7, 3)
VOLUME = (4, 5, 4, 2)


def _positive(x):
    return ops.exp(0.3 * x)


def _bounded(x):
    return 0.9 * ops.tanh(x)


ROWS_OF_THEIR_OWN = SELECTIONS | MATRICES_AND_LOSSES


def _operations():
    """A row for every operation of `keras.ops` with a rule; the last operation of each function is the tested one."""
    unary = {
        "absolute": ops.absolute,
        "add-a-number": lambda x: x + 2.0,
        "subtract-from-a-number": lambda x: 2.0 - x,
        "arccos": lambda x: ops.arccos(_bounded(x)),
        "arccosh": lambda x: ops.arccosh(1 + _positive(x)),
        "arcsin": lambda x: ops.arcsin(_bounded(x)),
        "arcsinh": ops.arcsinh,
        "arctan": ops.arctan,
        "arctanh": lambda x: ops.arctanh(_bounded(x)),
        "average-pool": lambda x: ops.average_pool(x, (2,), 2, data_format="channels_last"),
        "broadcast-to": lambda x: ops.broadcast_to(x[:, :1], (3, 4, 3)),
        "cast": lambda x: ops.cast(ops.cast(x, "int32"), "float64"),
        "clip": lambda x: ops.clip(x, -0.5, 0.5),
        "copy": ops.copy,
        "cos": ops.cos,
        "cosh": ops.cosh,
        "cumsum": lambda x: ops.cumsum(x, axis=1),
        "diagonal": lambda x: ops.diagonal(x, axis1=1, axis2=2),
        "diff": lambda x: ops.diff(x, axis=1),
        "divide-a-number": lambda x: 2.0 / _positive(x),
        "erf": ops.erf,
        "exp": ops.exp,
        "exp2": ops.exp2,
        "expand-dims": lambda x: ops.expand_dims(x, 1),
        "expm1": ops.expm1,
        "flip": lambda x: ops.flip(x, axis=1),
        "get-item": lambda x: x[:, ::2, None, 1],
        "log": lambda x: ops.log(_positive(x)),
        "log10": lambda x: ops.log10(_positive(x)),
        "log1p": lambda x: ops.log1p(_positive(x)),
        "log2": lambda x: ops.log2(_positive(x)),
        "logsumexp": lambda x: ops.logsumexp(x, axis=(1, 2)),
        "max": lambda x: ops.max(x, axis=-1),
        "amax": lambda x: ops.amax(x, axis=1, keepdims=True),
        "min": lambda x: ops.min(x, axis=(1, 2), keepdims=True),
        "amin": lambda x: ops.amin(x, axis=1),
        "mean": lambda x: ops.mean(x, axis=1, keepdims=True),
        "multiply-by-a-tensor-of-no-axes": lambda x: x * ops.convert_to_tensor(3.0, "float64"),
        "moveaxis": lambda x: ops.moveaxis(x, 1, 2),
        "multiply-by-a-number": lambda x: 3.0 * x,
        "negative": ops.negative,
        "normalize": lambda x: ops.normalize(x, axis=1),
        "pad": lambda x: ops.pad(x, ((0, 0), (1, 2), (0, 0))),
        "power": lambda x: _positive(x) ** 1.5,
        "power-of-two": lambda x: ops.power(x, 2),
        "power-of-three": lambda x: ops.power(x, 3),
        "power-below-zero": lambda x: _positive(x) ** -0.5,
        "ravel": lambda x: ops.ravel(x),
        "reciprocal": lambda x: ops.reciprocal(_positive(x)),
        "repeat": lambda x: ops.repeat(x, 2, axis=1),
        "reshape": lambda x: ops.reshape(x, (-1, 12)),
        "roll": lambda x: ops.roll(x, 1, axis=1),
        "rot90": lambda x: ops.rot90(x, axes=(1, 2)),
        "rsqrt": lambda x: ops.rsqrt(_positive(x)),
        "sin": ops.sin,
        "sinh": ops.sinh,
        "sqrt": lambda x: ops.sqrt(_positive(x)),
        "square": ops.square,
        "squeeze": lambda x: ops.squeeze(x[:, :1], axis=1),
        "std": lambda x: ops.std(x, axis=1),
        "sum": lambda x: ops.sum(x, axis=(1, 2)),
        "swapaxes": lambda x: ops.swapaxes(x, 1, 2),
        "take": lambda x: ops.take(x, [2, 0], axis=1),
        "tan": lambda x: ops.tan(_bounded(x)),
        "tanh": ops.tanh,
        "tile": lambda x: ops.tile(x, (1, 2, 1)),
        "transpose": lambda x: ops.transpose(x, (0, 2, 1)),
        "transpose-with-the-batch": lambda x: ops.transpose(x, (2, 1, 0)),
        "tril": ops.tril,
        "triu": ops.triu,
        "var": lambda x: ops.var(x, axis=(1, 2)),
        "where": lambda x: ops.where(x > 0.1, x, 2 * x),
        "relu": ops.relu,
        "relu6": ops.relu6,
        "leaky-relu": lambda x: ops.leaky_relu(x, 0.25),
        "elu": ops.elu,
        "celu": ops.celu,
        "selu": ops.selu,
        "silu": ops.silu,
        "hard-silu": ops.hard_silu,
        "sigmoid": ops.sigmoid,
        "log-sigmoid": ops.log_sigmoid,
        "softplus": ops.softplus,
        "softsign": ops.softsign,
        "softmax": ops.softmax,
        "log-softmax": ops.log_softmax,
        "squareplus": ops.squareplus,
        "convert-to-tensor": ops.convert_to_tensor,
        "tanh-shrink": ops.tanh_shrink,
        "hard-tanh": ops.hard_tanh,
        "glu": lambda x: ops.glu(x, axis=1),
        "layer-normalization": ops.layer_normalization,
        "rms-normalization": ops.rms_normalization,
        "split": lambda x: ops.split(x, 2, axis=1),
        "unstack": lambda x: ops.unstack(x, axis=1),
        "moments": lambda x: ops.moments(x, axes=[1]),
        "relu-with-arguments": lambda x: activations.relu(x, negative_slope=0.25, threshold=0.1),
        "matmul-by-a-matrix": lambda x: ops.matmul(x, ops.cast([[1, 2], [-1, 1], [0, 3]], x.dtype)),
        "einsum-implicit": lambda x: ops.einsum("bij,jk", x, ops.cast([[1, 2], [-1, 1], [0, 3]], x.dtype)),
        "matmul-by-a-vector": lambda x: ops.matmul(x, ops.cast([1, 2, -1], x.dtype)),
        "matrix-by-matmul": lambda x: ops.matmul(ops.cast([[1, 2, 0, 3], [-1, 1, 2, 0]], x.dtype), x),
        "adaptive-average-pool": lambda x: ops.adaptive_average_pool(x, (2,)),
    }
    binary = {
        "add": (ops.add, (4, 3), (1, 3)),
        "subtract": (ops.subtract, (4, 3), (1, 3)),
        "multiply": (ops.multiply, (4, 3), (4, 1)),
        "divide": (lambda x, y: ops.divide(x, _positive(y)), (4, 3), (4, 3)),
        "true-divide": (lambda x, y: ops.true_divide(x, _positive(y)), (4, 3), (4, 3)),
        "arctan2": (ops.arctan2, (4, 3), (4, 1)),
        "maximum": (ops.maximum, (4, 3), (4, 3)),
        "minimum": (ops.minimum, (4, 3), (4, 3)),
        "power-of-both": (lambda x, y: ops.power(_positive(x), y), (4, 3), (4, 3)),
        "logaddexp": (ops.logaddexp, (4, 3), (4, 3)),
        "matmul": (ops.matmul, (4, 3), (3, 2)),
        "einsum": (lambda x, y: ops.einsum("bij,bkj->bik", x, y), (4, 3), (2, 3)),
        "tensordot": (lambda x, y: ops.tensordot(x, y[0], axes=1), (4, 3), (3, 2)),
        "dot": (lambda x, y: ops.dot(x, y[0]), (4, 3), (3, 2)),
        "concatenate": (lambda x, y: ops.concatenate([x, y], axis=1), (4, 3), (2, 3)),
        "stack": (lambda x, y: ops.stack([x, y], axis=-1), (4, 3), (4, 3)),
        "hstack": (lambda x, y: ops.hstack([x, y]), (4, 3), (2, 3)),
        "vstack": (lambda x, y: ops.vstack([x, y]), (4, 3), (4, 3)),
        "take-along-axis": (lambda x, y: ops.take_along_axis(x, ops.argsort(y, axis=1), axis=1), (4, 3), (4, 3)),
    }
    rows = [(name, function, [(4, 3)]) for name, function in unary.items()]
    rows += [(name, function, [(4, 3)]) for name, function in operation_rows.UNARY.items()]
    rows += [(name, function, [(4, 6, 3)]) for name, function in operation_rows.IMAGES.items()]
    binary |= operation_rows.BINARY
    rows += [(name, function, [(4, 3)]) for name, function in ROWS_OF_THEIR_OWN.items()]
    rows += [(name, function, [left, right]) for name, (function, left, right) in binary.items()]
    # In a graph, Keras' own `exp2` does not take float64 on TensorFlow.
    own = {*ROWS_OF_THEIR_OWN, *WITHIN_A_CALL} - COMPILED
    named = [(row[0], _operation(*row)) for row in rows]
    named += [(name, _within_a_call(name, *row)) for name, row in WITHIN_A_CALL.items()]
    return [replace(case, compiled=name not in {"exp2", *own}, on_jax=name not in own) for name, case in named]


def _within_a_call(name, function, call):
    operation = _made_by(lambda x: function(x, *NEEDED.get(function, ())), keras.KerasTensor((3, 4)))
    return _call(operation, lambda x: layers.Lambda(call)(x), [(4, 3)], f"ops-{name}")


class WithKernel(layers.Layer):
    """A layer of one's own, with a weight of shape (2, 3, 3) that an operation takes as an input."""

    def __init__(self, operation="conv", **kwargs):
        super().__init__(**kwargs)
        self.operation = operation

    def build(self, shape):
        self.kernel = self.add_weight(shape=(2, 3, 3))
        if self.operation == "separable_conv":
            self.pointwise = self.add_weight(shape=(1, 9, 2))

    def call(self, x):
        kernels = [self.kernel] + ([self.pointwise] if self.operation == "separable_conv" else [])
        return getattr(ops, self.operation)(x, *kernels, 1, padding="valid", data_format="channels_last")

    def get_config(self):
        return {**super().get_config(), "operation": self.operation}


def _made_by(function, *symbols):
    """The class of the operation that makes the first output of a function."""
    return type(keras.Function(symbols, keras.tree.flatten(function(*symbols))[0]).operations[-1])


def _own_convolution(name):
    shapes = [(3, 4, 3), (2, 3, 3)] + ([(1, 9, 2)] if name == "separable_conv" else [])
    operation = _made_by(lambda *given: getattr(ops, name)(*given, 1), *map(keras.KerasTensor, shapes))
    return Case(f"ops-{name}", lambda: WithKernel(name), (4, 3), operation=operation)


def _operation(name, function, shapes):
    symbols = [keras.KerasTensor((3, *shape), dtype="float64") for shape in shapes]
    operation = _made_by(function, *symbols)
    known = operation_rows.REFERENCES.get(name)
    return _call(operation, function, shapes, f"ops-{name}", **({"reference": known} if known else {}))


MORE_RECURRENT = [
    _row(lambda: layers.Bidirectional(layers.LSTM(2, return_sequences=True, dtype="float64"), dtype="float64"), (4, 3)),
    _row(
        lambda: layers.Bidirectional(layers.GRU(2, dtype="float64"), "mul", dtype="float64"),
        (4, 3),
        "Bidirectional-product",
    ),
    _row(
        lambda: layers.SimpleRNN(3, activation="relu", return_sequences=True, go_backwards=True),
        (4, 3),
        "SimpleRNN-back",
    ),
    _row(lambda: layers.LSTM(3, return_state=True, return_sequences=True, use_bias=False), (4, 3), "LSTM-with-states"),
    _row(lambda: layers.LSTM(3, dropout=0.3, recurrent_dropout=0.3, seed=2), (4, 3), "LSTM-dropout", training=True),
    _row(lambda: layers.GRU(3, reset_after=False), (4, 3), "GRU-reset-before"),
    _call(layers.RNN, lambda x: layers.RNN([layers.GRUCell(3), layers.LSTMCell(2)])(x), [(4, 3)]),
    _call(
        layers.LSTM,
        lambda x, h, c: layers.LSTM(3, return_sequences=True)(x, initial_state=[h, c]),
        [(4, 3), (3,), (3,)],
        "LSTM-from-a-state",
    ),
    Case("LSTMCell", lambda: layers.RNN(layers.LSTMCell(2, dtype="float64")), (3, 2), operation=layers.LSTMCell),
    Case("GRUCell", lambda: layers.RNN(layers.GRUCell(2, dtype="float64")), (3, 2), operation=layers.GRUCell),
    Case(
        "SimpleRNNCell",
        lambda: layers.RNN(layers.SimpleRNNCell(2, dtype="float64")),
        (3, 2),
        operation=layers.SimpleRNNCell,
    ),
    _call(
        layers.StackedRNNCells,
        lambda x: layers.RNN(layers.StackedRNNCells([layers.SimpleRNNCell(2), layers.SimpleRNNCell(3)]))(x),
        [(3, 2)],
    ),
    _row(lambda: layers.ConvLSTM2D(2, 2, return_sequences=True), (2, 3, 3, 1)),
    _row(lambda: layers.ConvLSTM3D(1, 2), (2, 2, 3, 2, 1)),
]

OPERATIONS = _operations()

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
    _row(layers.Masking, (4, 3)),
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
    _row(lambda: layers.EinsumDense("abc,cd->abd", (None, 4), bias_axes="d", activation="tanh"), (5, 3)),
    _call(layers.Lambda, lambda x: layers.Lambda(lambda y: ops.tanh(y) * 2)(x), [(4,)]),
    _row(lambda: layers.LayerNormalization(), (5, 3)),
    _row(lambda: layers.LayerNormalization(axis=(1, 2), scale=False), (5, 3), "LayerNormalization-two-axes"),
    _row(lambda: layers.GroupNormalization(2), (5, 4)),
    _row(lambda: layers.GroupNormalization(-1), (5, 4), "GroupNormalization-of-instances"),
    _row(layers.RMSNormalization, (5, 3)),
    _row(layers.UnitNormalization, (5, 3)),
    _row(lambda: layers.SpectralNormalization(_dense(3)), (4,)),
    _row(lambda: layers.TimeDistributed(_dense(3)), SEQUENCE),
    _row(lambda: layers.SimpleRNN(3), (3, 3)),
    _row(lambda: layers.LSTM(3), (3, 3)),
    _row(lambda: layers.GRU(3, return_sequences=True), (3, 3)),
    _row(lambda: layers.ConvLSTM1D(2, 2), (2, 4, 2), compiled=False),
    *[replace(case, compiled=False) for case in MORE_RECURRENT],
    _call(layers.Attention, lambda x, y: layers.Attention()([x, y]), [(4, 3), (3, 3)]),
    _call(layers.AdditiveAttention, lambda x, y: layers.AdditiveAttention()([x, y]), [(4, 3), (3, 3)]),
    _row(lambda: layers.AdaptiveAveragePooling1D(3), SEQUENCE),
    _row(lambda: layers.AdaptiveAveragePooling2D((2, 3)), IMAGE),
    _row(lambda: layers.AdaptiveMaxPooling1D(3), SEQUENCE),
    _row(lambda: layers.AdaptiveMaxPooling2D((2, 3)), IMAGE),
    _row(lambda: layers.AdaptiveMaxPooling3D(2), VOLUME, float32_on_tensorflow=True),
    _row(lambda: layers.AdaptiveAveragePooling3D(2), VOLUME, float32_on_tensorflow=True),
    _row(lambda: layers.CenterCrop(4, 4), IMAGE),
    _row(lambda: layers.RandomCrop(4, 4), IMAGE),
    _call(layers.Pipeline, lambda x: layers.Pipeline([layers.Rescaling(0.5), layers.CenterCrop(4, 4)])(x), [IMAGE]),
    _row(lambda: layers.STFTSpectrogram(mode="real", frame_length=8, frame_step=4, fft_length=8), (32, 1)),
    *[_row(make, IMAGE) for make in AUGMENTATIONS],
    *[_row(make, IMAGE, float32_on_tensorflow=True) for make in AUGMENTATIONS_IN_FLOAT32],
    *OPERATIONS,
    *[_own_convolution(name) for name in ("conv", "depthwise_conv", "conv_transpose", "separable_conv")],
]

# Layers without a rule, and the reason: they have no tangent, or none that means anything.
MEANINGLESS = {
    layers.Layer: "abstract",
    layers.Wrapper: "abstract",
    layers.InputLayer: "computes nothing",
    layers.CategoryEncoding: "of integers",
    layers.Discretization: "piecewise constant",
    layers.HashedCrossing: "of integers or strings",
    layers.Hashing: "of integers or strings",
    layers.IntegerLookup: "of integers",
    layers.StringLookup: "of strings",
    layers.TextVectorization: "of strings",
    layers.MaxNumBoundingBoxes: "of bounding boxes",
    layers.MelSpectrogram: "Keras computes it in float32, with constants of its own: left to autodiff",
    layers.TFSMLayer: "another framework's code: left to autodiff",
    layers.FlaxLayer: "another framework's code: left to autodiff",
    layers.JaxLayer: "another framework's code: left to autodiff",
    layers.TorchModuleWrapper: "another framework's code: left to autodiff",
}


WINDOWS = ("jvpreg.rules.convolution", "jvpreg.rules.pooling")


@functools.cache
def first_rows():
    """The first row of each rule, since the others run the same code; on TensorFlow also rows that XLA may treat apart.

    XLA has kernels of its own for windows, and a layer without a rule is opened up: of both, every row is taken.
    """
    chosen = {}
    for case in LAYERS:
        rule = _RULES.get(case.operation)
        key = rule and rule.function
        if keras.backend.backend() == "tensorflow" and (rule is None or key.__module__ in WINDOWS):
            key = case.id
        if case.compiled:
            chosen.setdefault(key, case)
    assert len(chosen) > 80
    return list(chosen.values())


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


def skip_if_unavailable(case: Case):
    if case.channels_first and keras.backend.backend() == "tensorflow":
        pytest.skip("TensorFlow has no channels-first kernels on CPU")
    if not case.on_jax and keras.backend.backend() == "jax":
        pytest.skip("compilation takes a second a row, and another row of its family is checked")
    if case.float32_on_tensorflow and keras.backend.backend() == "tensorflow":
        pytest.skip("TensorFlow has no float64 kernel: see test_pooling_of_volumes_in_float32")
