"""The transpose of a linear map, by each backend's reverse mode."""

import keras
import numpy as np
import pytest
from compare import assert_close, normal
from keras import ops

from jvpreg.engine.transpose import transpose

numpy = ops.convert_to_numpy


def tensors(*shapes, seed=0):
    random = np.random.default_rng(seed)
    return [ops.convert_to_tensor(random.normal(size=shape)) for shape in shapes]


def test_a_matrix(float64):
    matrix = normal(4, 3, seed=1)
    (x,), (v,) = tensors((2, 3)), tensors((2, 4), seed=2)
    product = transpose(lambda inputs: [ops.matmul(inputs[0], matrix.T)], [x], [v])
    assert_close(product, [numpy(v) @ matrix])


def test_the_values_of_the_inputs_do_not_matter(float64):
    (v,) = tensors((2, 3))
    for (x,) in (tensors((2, 3), seed=1), [ops.zeros((2, 3), dtype="float64")]):
        assert_close(transpose(lambda inputs: [3.0 * inputs[0]], [x], [v]), [3 * numpy(v)])


def test_several_inputs_and_outputs(float64):
    x, y = tensors((2, 3), (2, 3))
    v, w = tensors((2, 3), (2, 3), seed=1)
    products = transpose(lambda inputs: [inputs[0] + 2.0 * inputs[1], -1.0 * inputs[1]], [x, y], [v, w])
    assert_close(products, [v, 2 * numpy(v) - numpy(w)])


def test_an_input_passed_on(float64):
    (x,), (v, w, z) = tensors((2, 3)), tensors((2, 3), (2, 3), (2, 3), seed=1)
    assert_close(transpose(lambda inputs: [inputs[0]], [x], [v]), [v])
    products = transpose(lambda inputs: [inputs[0], 2.0 * inputs[0], inputs[0]], [x], [v, w, z])
    assert_close(products, [numpy(v) + 2 * numpy(w) + numpy(z)])


def test_what_is_not_connected_is_zero(float64):
    x, y = tensors((2, 3), (2, 4))
    v, w = tensors((2, 3), (2, 5), seed=1)
    constant = ops.zeros((2, 5), dtype="float64")
    products = transpose(lambda inputs: [inputs[0] * 1.0, constant], [x, y], [v, w])
    assert_close(products, [numpy(v), np.zeros((2, 4))])
    assert_close(transpose(lambda inputs: [constant], [x], [w]), [np.zeros((2, 3))])


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="other backends have no such switch")
def test_under_no_grad(float64):
    import torch

    (x,), (v,) = tensors((2, 3)), tensors((2, 3), seed=1)
    with torch.no_grad():
        (product,) = transpose(lambda inputs: [3.0 * inputs[0]], [x], [v])
    assert_close(product, 3 * numpy(v))
    assert not product.requires_grad
