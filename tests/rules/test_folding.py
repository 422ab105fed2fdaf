"""The axis of the probes, folded into the batch and out of it."""

import numpy as np
import pytest
from compare import normal
from keras import ops

from jvpreg.rules import folding

numpy = ops.convert_to_numpy


def test_fold_and_unfold_are_inverse():
    tangent = ops.convert_to_tensor(normal(2, 3, 4, 5))
    folded = folding.fold(tangent)
    assert tuple(folded.shape) == (6, 4, 5)
    np.testing.assert_array_equal(numpy(folding.unfold(folded, 2)), numpy(tangent))
    # Probe by probe: the second probe's first example stands after the first probe's last one.
    np.testing.assert_array_equal(numpy(folded[3]), numpy(tangent[1, 0]))


@pytest.mark.parametrize("shape", [(1, 3, 4), (2, 3, 4), (1,), (2,)])
@pytest.mark.parametrize("with_residual", [False, True])
def test_a_function_of_a_batch_is_that_of_all_axes(shape, with_residual):
    tangent = ops.convert_to_tensor(normal(*shape))
    residuals = [ops.convert_to_tensor(normal(1, *shape[1:], seed=1))] if with_residual else []

    def function(tangent, *residuals):
        return ops.square(tangent) * sum(residuals, start=1.0)

    found = folding.as_batch(function, tangent, *residuals)
    np.testing.assert_allclose(numpy(found), numpy(function(tangent, *residuals)), rtol=1e-12)


def test_axes_of_size_one_after_the_probes():
    assert tuple(folding.align(ops.ones((2, 4)), 4).shape) == (2, 1, 1, 4)
    assert tuple(folding.align(ops.ones((2, 3, 4)), 3).shape) == (2, 3, 4)


@pytest.mark.parametrize("shape", [(), (3,), (3, 4)])
def test_a_residual_gets_an_axis_for_the_probes(shape):
    assert tuple(folding.with_probe_axis(ops.ones(shape)).shape) == (1, *shape)
