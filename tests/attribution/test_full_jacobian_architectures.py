"""The full-Jacobian of whole architectures sums to their outputs."""

import contextlib

import keras
import numpy as np
import pytest
from keras import ops

import jvpreg
from experiments.verify import weights
from experiments.verify.architectures import ARCHITECTURES
from tests.compare import normal, numpy

# JAX compiles every operation of every node by itself.
NAMES = ["RNN", "UNet"] if keras.backend.backend() == "jax" else ["RNN", "UNet", "MobileNetV3Small"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-5)])
def test_the_parts_sum_to_the_output(name, dtype, tolerance):
    architecture = next(one for one in ARCHITECTURES if one.name == name)
    random = np.random.default_rng(0)
    with jvpreg.testing.float64() if dtype == "float64" else contextlib.nullcontext():
        model = architecture.make(architecture.input_shape)
        weights.draw(model, random)
        x = ops.convert_to_tensor(weights.inputs(model, 2, random), dtype=dtype)
        outputs = model.output_shape[1:]
        target = None if len(outputs) == 1 else normal(2, *outputs, seed=2).astype(dtype)
        full = jvpreg.full_jacobian(model, x, target)
        assert numpy(full.target_output).dtype == dtype
        assert numpy(full.completeness_error()).max() < tolerance
