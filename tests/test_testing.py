"""`check_rule` finds every kind of wrong rule, says in what it is wrong, and passes a right one."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import jvpreg
from jvpreg.linearization import Linearization

BACKEND = keras.backend.backend()


class Curve(layers.Layer):
    """y = tanh(w x), with one weight for each feature."""

    def build(self, input_shape):
        self.w = self.add_weight(shape=(input_shape[-1],), name="w")

    def call(self, x):
        return ops.tanh(x * ops.cast(self.w, x.dtype))


def check(primal=None, slope=None, push=None, residual=True, parted=True, partless=False, **arguments):
    """`check_rule` of a rule that is right, except for the parts that are given.

    Args:
        primal: what it makes of y.
        slope: its derivative, a function of x, w and y.
        push: its pushforward, a function of a tangent and the slope.
        residual: whether the slope is a residual, and not closed over.
        parted: whether the part of the weight takes residuals, and closes over nothing.
        partless: whether it has no part for the weight.
        **arguments: of `check_rule`.
    """
    primal = primal or (lambda y: y)
    slope = slope or (lambda x, w, y: (1 - y**2) * w)
    push = push or (lambda tangent, slope: tangent * slope)

    @jvpreg.register_rule(Curve)
    def rule(layer, x, context):
        w = ops.cast(layer.w, x.dtype)
        y = ops.tanh(x * w)
        s = slope(x, w, y)

        def part(tangent, s, x, y):
            return jvpreg.rules.align(tangent, len(x.shape)) * x * (1 - y**2)

        def function(tangent, *frozen):
            return push(tangent, frozen[0] if residual else s)

        def closed(tangent, *_):
            return part(tangent, None, x[None], y[None])

        parts = [] if partless else [(layer.w, part if parted else closed)]
        return primal(y), jvpreg.rules.Pushforward(function, s, x, y, weights=parts)

    jvpreg.testing.check_rule(Curve(name="curve"), (4,), **arguments)


def fails(what):
    return pytest.raises(AssertionError, match=rf"rule of `curve` \(Curve\): wrong (in|shape in) {what}")


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_right_rule(batch_size):
    check(batch_size=batch_size)


@pytest.mark.skipif(BACKEND == "torch", reason="torch.compile takes half a minute")
def test_compiled():
    check(jit=True)


@pytest.mark.skipif(BACKEND == "torch", reason="torch.compile takes half a minute")
def test_compiled_and_wrong():
    with fails("the pullback, against autodiff"):
        check(slope=lambda x, w, y: (1 - y**2) * w * (1 + 1e-9), jit=True)


def test_wrong_primal():
    with fails("the primal"):
        check(primal=lambda y: y + 1e-9)


def test_primal_in_lower_precision():
    with fails("the primal"):
        check(primal=lambda y: ops.cast(y, "float32"))


def test_primal_of_the_wrong_shape():
    with fails(r"the primal. Expected \(3, 4\). Received: \(3, 2\)"):
        check(primal=lambda y: y[:, :2], push=lambda tangent, slope: (tangent * slope)[..., :2])


@pytest.mark.parametrize("error", [1e-6, 1e-9, -2.0])
def test_wrong_slope(error):
    with fails("the pullback, against autodiff"):
        check(slope=lambda x, w, y: (1 - y**2) * w * (1 + error))


def test_slope_of_the_wrong_weight():
    with fails("the pullback, against autodiff"):
        check(slope=lambda x, w, y: 1 - y**2)


def test_tangent_in_lower_precision():
    with fails("the pullback, against autodiff"):
        check(push=lambda tangent, slope: ops.cast(tangent * slope, "float32"))


def test_a_weight_without_a_part():
    with pytest.raises(AssertionError, match=r"output depends on `.*w`, and the pushforward has no part for it"):
        check(partless=True)


def test_an_error_in_a_part_of_a_weight_names_the_rule():
    @jvpreg.register_rule(Curve)
    def rule(layer, x, context):
        y = layer.call(x)
        slope = (1 - y**2) * layer.w
        return y, jvpreg.rules.scale(slope, weights=[(layer.w, lambda u, slope: u[..., :3] * slope)])

    with pytest.raises(Exception) as caught:  # noqa: PT011 -- the backend's own, with a note
        jvpreg.testing.check_rule(Curve(name="curve"), (4,))
    assert "rule of `curve` (Curve): this was raised while the parts of its weights ran" in "\n".join(
        caught.value.__notes__
    )


def test_tangent_of_the_wrong_shape():
    with pytest.raises(ValueError, match=r"rule of `curve` \(Curve\) returned a tangent of the wrong shape. Expected"):
        check(push=lambda tangent, slope: (tangent * slope)[..., :2])


def test_pushforward_whose_transpose_is_right():
    """Reverse mode sees the right slope, but the pushforward itself returns another one."""
    with fails("the pushforward, against finite differences"):
        check(push=lambda tangent, slope: tangent * slope + 1e-3 * ops.stop_gradient(tangent))


def test_transpose_that_is_wrong_under_a_right_pushforward():
    def push(tangent, slope):
        unseen = 1e-3 * (tangent - ops.stop_gradient(tangent))
        return tangent * slope + unseen

    with fails("the pullback, against autodiff"):
        check(push=push)


def test_pushforward_and_pullback_that_are_not_adjoint():
    """The error is too small for finite differences, and the pullback is right, so only adjointness can tell."""
    with fails("adjointness"):
        check(push=lambda tangent, slope: slope * (tangent + 1e-8 * ops.stop_gradient(tangent)))


@pytest.mark.parametrize("strength", [1e-2, 1e-8])
def test_pushforward_that_adds_a_constant(strength):
    """A large one shows in the finite differences, a small one only in linearity."""
    with fails("the pushforward, against finite" if strength > 1e-6 else "linearity"):
        check(push=lambda tangent, slope: tangent * slope + strength)


@pytest.mark.parametrize("strength", [1e-2, 1e-8])
def test_pushforward_that_squares(strength):
    with fails("the pushforward, against finite" if strength > 1e-6 else "linearity"):
        check(push=lambda tangent, slope: tangent * slope + strength * tangent**2)


def test_pushforward_that_mixes_probes():
    """With one probe it is right."""

    def push(tangent, slope):
        return slope * (tangent + 1e-6 * (tangent - ops.mean(tangent, axis=0, keepdims=True)))

    with fails("two probes at once, against one"):
        check(push=push)


def test_pushforward_that_mixes_examples():
    def push(tangent, slope):
        return slope * (tangent + 1e-6 * ops.mean(tangent, axis=1, keepdims=True))

    with fails("the pullback, against autodiff"):
        check(push=push)


def test_slope_that_is_closed_over():
    """It cannot be taken for a part of the batch: it broadcasts, and the tangent has too many examples."""
    with pytest.raises(ValueError, match=r"`curve`.*wrong shape. Expected \(., 1, 4\), probes first.* Received"):
        check(residual=False)


def test_a_part_of_a_weight_that_closes_over_the_input():
    with pytest.raises(ValueError, match=r"`curve` \(Curve\) returned a part of a weight of the wrong shape. Expected"):
        check(parted=False)


def test_a_kernel_with_a_slope_that_is_not_the_layers_own():
    class Times(layers.Layer):
        def build(self, shape):
            self.kernel = self.add_weight((shape[-1], 2))

        def call(self, x):
            return x @ self.kernel

    def rule(error):
        def times(layer, x, context):
            def scaled(slope, axis):
                return None if axis != 1 else lambda rows: rows @ (layer.kernel * slope * (1 + error))

            parts = [(layer.kernel, lambda u, x: x @ u)]
            return jvpreg.rules.Affine(lambda rows: rows @ layer.kernel, x, parts, scaled=scaled)

        return times

    jvpreg.register_rule(Times)(rule(0.0))
    jvpreg.testing.check_rule(Times(), (4,))
    del jvpreg.rules.registry._RULES[Times]
    jvpreg.register_rule(Times)(rule(1e-9))
    with pytest.raises(AssertionError, match="wrong in a kernel with the channels of its output multiplied"):
        jvpreg.testing.check_rule(Times(), (4,))


def test_part_of_the_batch_that_depends_on_the_rest():
    """The product is right for the whole batch, and wrong for one example taken out of it."""

    def push(tangent, slope):
        alone = tangent.shape[1] == 1
        return tangent * slope * (1 + 1e-6 * alone)

    with fails("one example taken out of the batch"):
        check(push=push)


def test_wrong_completeness(monkeypatch):
    """For one node completeness holds by definition, so this test falsifies the engine's intercepts."""
    right = Linearization.intercepts.fget
    wrong = property(lambda self: {name: (1 + 1e-9) * c for name, c in right(self).items()})
    monkeypatch.setattr(Linearization, "intercepts", wrong)
    with fails("completeness"):
        check()


def test_penalty_gradient_that_is_cut_at_the_weights():
    with fails(r"the penalty's gradient by .*\bw, against finite differences"):
        check(slope=lambda x, w, y: (1 - ops.tanh(x * ops.stop_gradient(w)) ** 2) * ops.stop_gradient(w))


def test_penalty_gradient_that_is_cut_at_one_path_of_a_weight():
    """One path of w to the slope has its gradient, the other has none. The moments of `tf.nn` have this fault."""
    with fails(r"the penalty's gradient by .*\bw, against finite differences"):
        check(slope=lambda x, w, y: (1 - ops.tanh(x * ops.stop_gradient(w)) ** 2) * w)


def test_penalty_gradient_that_is_cut_at_the_inputs():
    with fails("the penalty's gradient by input 0, against finite differences"):
        check(slope=lambda x, w, y: (1 - ops.tanh(ops.stop_gradient(x) * w) ** 2) * w)


def test_several_inputs_are_checked_each():
    class Product(layers.Layer):
        def call(self, inputs):
            left, right = inputs
            return left * right

    def rule(right_factor):
        def product(layer, inputs, context):
            left, right = inputs
            return left * right, jvpreg.rules.Pushforward(
                lambda t, s, left, right: t * right_factor(right) + left * s, left, right
            )

        return product

    jvpreg.register_rule(Product)(rule(lambda right: right))
    jvpreg.testing.check_rule(Product(), [(4,), (4,)])
    del jvpreg.rules.registry._RULES[Product]
    jvpreg.register_rule(Product)(rule(ops.stop_gradient))
    with pytest.raises(AssertionError, match="gradient by input 1"):
        jvpreg.testing.check_rule(Product(), [(4,), (4,)])


def test_a_reference_of_ones_own():
    """A reference is the map whose Jacobian is expected, if it is not the layer: here a part is held constant."""

    class Gated(layers.Layer):
        def call(self, x):
            return x * ops.sigmoid(x)

    @jvpreg.register_rule(Gated)
    def gated(layer, x, context):
        gate = ops.sigmoid(x)
        return x * gate, jvpreg.rules.scale(gate)

    gate = 1 / (1 + np.exp(-np.random.default_rng(0).normal(size=(3, 4))))
    jvpreg.testing.check_rule(Gated(), (4,), reference=lambda x: x * ops.convert_to_tensor(gate))
    with pytest.raises(AssertionError, match="the pullback"):
        jvpreg.testing.check_rule(Gated(), (4,))


def test_nothing_is_left_behind():
    state = keras.config.floatx(), keras.config.dtype_policy().name
    assert state == ("float32", "float32")
    check()
    with fails("the primal"):
        del jvpreg.rules.registry._RULES[Curve]
        check(primal=lambda y: y + 1)
    assert (keras.config.floatx(), keras.config.dtype_policy().name) == state


def test_a_model_is_taken_as_it_is():
    with jvpreg.testing.float64():
        model = keras.Sequential([keras.Input((3,)), layers.Dense(2, activation="tanh")])
    jvpreg.testing.check_rule(model, (3,))


def test_float64():
    with jvpreg.testing.float64():
        assert keras.config.floatx() == "float64"
        layer = layers.Dense(2)
        y = layer(np.ones((1, 3)))
        assert {keras.backend.standardize_dtype(t.dtype) for t in (y, layer.kernel)} == {"float64"}
        # A number as small as the step of a finite difference is not rounded away.
        assert float(ops.add(1.0, ops.convert_to_tensor(np.array(1e-12))) - 1.0) > 0
    assert keras.config.floatx() == "float32"
    with pytest.raises(ZeroDivisionError), jvpreg.testing.float64():
        raise ZeroDivisionError
    assert keras.config.floatx() == "float32"
    assert keras.backend.result_type("float32", "float32") == "float32"


@pytest.mark.skipif(BACKEND != "jax", reason="only JAX can turn float64 off")
def test_jax_without_float64():
    import jax

    with jax.enable_x64(False), pytest.raises(RuntimeError, match=r"float64.*jax_enable_x64"):
        jvpreg.testing.check_rule(layers.ReLU(), (3,))
