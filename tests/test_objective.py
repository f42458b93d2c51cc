"""The batch loss as a function of the weights: values, gradients, masks, scaling, `through`."""

import numpy as np
import pytest
from keras import ops

from keras_sharp import Objective
from tests import oracles
from tests.models import BACKEND

pytestmark = pytest.mark.usefixtures("as_written")


def tanh_net(float64, **kwargs):
    """An objective in float64, its oracle, and the weights to start at."""
    net = oracles.TanhNet()
    x, y = float64.tensors([net.x, net.y])

    def loss(w):
        hidden = 1 - 2 / (ops.exp(2 * (x @ w[0] + w[1])) + 1)
        return ops.sum((hidden @ w[2] - y) ** 2) / len(net.y)

    w = float64.tensors(oracles.split(net.start, net.shapes))
    return Objective(loss, **kwargs), net, w


def numbers(tensors):
    return [None if t is None else np.array(ops.convert_to_numpy(t)) for t in tensors]


def assert_equal(actual, expected):
    for a, e in zip(numbers(actual), numbers(expected), strict=True):
        np.testing.assert_array_equal(a, e)


def vector(*entries):
    return ops.convert_to_tensor(np.array(entries, "float32"))


# Loss and gradient


def test_loss_and_gradient_are_those_of_the_oracle(float64):
    objective, net, w = tanh_net(float64)
    loss, gradient = objective(w)
    float64.assert_close([loss], [net.value(net.start)])
    float64.assert_close(gradient, oracles.split(net.gradient(net.start), net.shapes))


def test_asking_again_gives_the_same_answer(float64):
    objective, _, w = tanh_net(float64)
    before = numbers(w)
    first = objective(w)
    objective([t + 1.0 for t in w])
    second = objective(w)
    assert float(first.loss) == float(second.loss)
    assert_equal(first.gradient, second.gradient)
    assert_equal(w, before)


def test_to_ask_again_costs_nothing(float64):
    objective, _, w = tanh_net(float64)
    first, elsewhere = objective(w), [t + 1.0 for t in w]
    assert objective(w) is first
    assert float(objective.record.num_gradients) == 1
    assert objective(elsewhere) is objective(elsewhere)
    assert float(objective.record.num_gradients) == 2
    assert objective(list(w)) is not first  # Another list may hold other weights.


def test_the_record_tells_of_the_reported_pass_and_the_last_one(float64):
    objective, _, w = tanh_net(float64)
    first, last = objective(w), objective([t + 1.0 for t in w])
    record = objective.record
    assert float(record.report.loss) == float(first.loss)
    assert float(record.grad_norm) == float(first.gradient.norm)
    assert float(record.perturbed_loss) == float(last.loss)
    assert float(record.is_perturbed) == 1


def test_a_gradient_knows_its_norm(float64):
    objective, net, w = tanh_net(float64)
    length = np.linalg.norm(net.gradient(net.start))
    float64.assert_close([objective(w).gradient.norm], [length])


def test_a_weight_without_a_part_in_the_loss_has_no_gradient():
    objective = Objective(lambda w: ops.sum(w[0] ** 2))
    _, (used, unused) = objective([vector(1.0, 2.0), vector(5.0)])
    np.testing.assert_array_equal(numbers([used])[0], [2.0, 4.0])
    if BACKEND == "jax":  # JAX does not tell the two apart.
        np.testing.assert_array_equal(numbers([unused])[0], [0.0])
    else:
        assert unused is None


def test_rows_of_an_embedding_that_occur_twice_are_added_up():
    """TensorFlow gives the gradient of `take` row by row."""
    table = ops.convert_to_tensor(np.ones((4, 2), "float32"))
    rows = ops.convert_to_tensor(np.array([1, 3, 1]))
    objective = Objective(lambda w: ops.sum(ops.take(w[0], rows, axis=0)))
    _, (gradient,) = objective([table])
    np.testing.assert_array_equal(numbers([gradient])[0], [[0, 0], [2, 2], [0, 0], [1, 1]])


def test_what_comes_beside_the_loss_is_kept():
    objective = Objective.with_aux(
        lambda w, batch: (ops.sum(w[0] ** 2), {"seen": w[0] + 1.0}), hand_on=lambda aux: aux["seen"]
    )
    assert objective.record.report is None
    objective([vector(1.0)])
    objective([vector(2.0)])
    assert float(objective.record.report.aux["seen"][0]) == 2.0  # Of the first pass.
    assert float(objective.record.aux[0]) == 3.0  # Of the last one.


# Which weights


def test_by_default_all_weights_are_perturbed():
    g = [vector(1.0), None]
    assert Objective(None).perturbed(g) is g
    assert Objective(None, perturbed=[True, True]).perturbed(g) is g


def test_weights_that_are_not_perturbed_have_no_entry():
    g = [vector(1.0), vector(2.0), None]
    objective = Objective(None, perturbed=[False, True, True])
    perturbed = objective.perturbed(g)
    assert perturbed[0] is None
    assert perturbed[1] is g[1]
    assert perturbed[2] is None


def test_weights_that_are_not_perturbed_have_a_gradient_all_the_same():
    objective = Objective(lambda w: ops.sum(w[0] ** 2) + ops.sum(w[1]), perturbed=[False, True])
    _, gradient = objective([vector(3.0), vector(1.0)])
    assert_equal(gradient, [[6.0], [1.0]])


def test_the_gradient_of_frozen_weights_is_kept_apart():
    """Float8 scales: what stands for their gradient is no slope, and has no norm."""
    objective = Objective(lambda w: ops.sum(4.0 * w[0]) + ops.sum(100.0 * w[1]), frozen=[0, 1])
    _, gradient = objective([vector(1.0), vector(1.0)])
    assert gradient[1] is None
    assert float(gradient.norm) == 4.0
    frozen = objective.record.report.frozen
    assert frozen[0] is None
    assert float(frozen[1][0]) == 100.0


def test_nan_for_frozen_weights_is_none_of_the_methods_business():
    objective = Objective(lambda w: ops.sum(w[0]) + ops.sum(ops.sqrt(w[1])), frozen=[False, True])
    objective([vector(1.0), vector(0.0)])
    assert bool(objective.is_finite([]))


# A scaled loss


@pytest.mark.parametrize("scale", [2.0**15, 2.0**-3])
def test_a_scale_of_the_loss_is_taken_out_of_loss_and_gradient(scale, float64):
    plain, _, w = tanh_net(float64)
    scaled, _, _ = tanh_net(float64, loss_scale=ops.convert_to_tensor(np.float32(scale)))
    expected, actual = plain(w), scaled(w)
    assert float(actual.loss) == float(expected.loss)
    assert_equal(actual.gradient, expected.gradient)  # To the bit: powers of two.


def test_a_scale_saves_a_gradient_from_underflow_in_float16():
    def loss(w):
        half = ops.cast(w[0], "float16")
        small = ops.cast(1e-4, "float16")
        return ops.cast(ops.sum(half * small * small), "float32")

    w = [vector(1.0, 1.0)]
    _, (lost,) = Objective(loss)(w)
    _, (saved,) = Objective(loss, loss_scale=ops.convert_to_tensor(2.0**15))(w)
    np.testing.assert_array_equal(numbers([lost])[0], [0.0, 0.0])
    np.testing.assert_allclose(numbers([saved])[0], [1e-8, 1e-8], rtol=1e-2)


# Finite or not


def test_finite_where_all_losses_and_gradients_are():
    objective = Objective(lambda w: ops.sum(w[0] ** 2))
    objective([vector(1.0, -2.0)])
    objective([vector(0.0, 0.0)])
    objective([vector(1e18, 1e18)])  # Its square is near the end of float32.
    assert bool(objective.is_finite([]))


@pytest.mark.parametrize(
    "entries", [(np.nan, 1.0), (np.inf, 1.0), (1e30, 1.0)], ids=["nan", "inf", "overflow"]
)
def test_not_finite_where_a_loss_is_not(entries):
    objective = Objective(lambda w: ops.sum(w[0] ** 2))
    objective([vector(1.0, 1.0)])
    assert bool(objective.is_finite([]))
    objective([vector(*entries)])
    objective([vector(1.0, 1.0)])
    assert not bool(objective.is_finite([]))


def test_not_finite_where_a_gradient_alone_is_not():
    objective = Objective(lambda w: ops.sum(ops.sqrt(w[0])))
    loss, _ = objective([vector(0.0, 1.0)])
    assert float(loss) == 1.0
    assert not bool(objective.is_finite([]))


def test_a_gradient_whose_square_overflows_is_finite():
    objective = Objective(lambda w: ops.sum(1e30 * w[0]))
    objective([vector(1.0, 1.0)])
    assert bool(objective.is_finite([]))


# Through an ascent


def ascent_by(length):
    """`w + length * g(w)`: a step whose derivative is `1 + length * H`."""

    def ascent(objective, w):
        g = objective(w).gradient
        return [t + length * d for t, d in zip(w, g, strict=True)]

    return ascent


def test_through_gives_the_whole_derivative(float64):
    objective, net, w = tanh_net(float64)
    loss, gradient = objective.through(ascent_by(0.3), w)
    expected = oracles.differentiate(lambda v: net.value(v + 0.3 * net.gradient(v)), net.start)
    float64.assert_close([loss], [net.value(net.start + 0.3 * net.gradient(net.start))])
    split = oracles.split(expected, net.shapes)
    float64.assert_close(gradient, split, rtol=1e-8, atol=1e-9)


def test_through_two_steps_gives_the_whole_derivative(float64):
    objective, net, w = tanh_net(float64)

    def twice(objective, w):
        step = ascent_by(0.2)
        return step(objective, step(objective, w))

    def value(v):
        v = v + 0.2 * net.gradient(v)
        return net.value(v + 0.2 * net.gradient(v))

    _, gradient = objective.through(twice, w)
    expected = oracles.split(oracles.differentiate(value, net.start), net.shapes)
    float64.assert_close(gradient, expected, rtol=1e-8, atol=1e-9)


def test_through_no_ascent_is_the_gradient(float64):
    objective, _, w = tanh_net(float64)
    expected = objective(w)
    actual = objective.through(lambda objective, w: w, w)
    assert float(actual.loss) == float(expected.loss)
    assert_equal(actual.gradient, expected.gradient)


def test_through_counts_as_one_question(float64):
    objective, _, w = tanh_net(float64)
    answer = objective.through(ascent_by(0.1), w)
    assert objective.record.report.loss is answer.loss
    assert float(objective.record.num_gradients) == 2  # The one inside as well.


def test_the_ascent_sees_the_same_masks_and_scale():
    seen = []

    def ascent(inner, w):
        seen.extend([inner.biases, inner.perturbed([1, 2])])
        loss, g = inner(w)
        seen.append((float(ops.stop_gradient(loss)), float(ops.stop_gradient(g.norm))))
        return w

    objective = Objective(
        lambda w: ops.sum(3.0 * w[0]) + ops.sum(w[1]),
        perturbed=[True, False],
        biases=[False, True],
        frozen=[False, True],
        loss_scale=ops.convert_to_tensor(8.0),
    )
    if BACKEND == "jax":  # Its tracers have no values to look at.
        objective.through(lambda inner, w: (seen.append(inner.biases), w)[1], [vector(1.0)] * 2)
        assert seen == [[False, True]]
        return
    objective.through(ascent, [vector(1.0), vector(1.0)])
    assert seen == [[False, True], [1, None], (4.0, 3.0)]


def test_through_keeps_frozen_weights_and_scale(float64):
    plain, _, w = tanh_net(float64)
    objective, _, _ = tanh_net(
        float64,
        frozen=[False, True, False],
        loss_scale=ops.convert_to_tensor(np.float32(1024.0)),
    )

    def ascent(objective, w):  # The frozen weight has no gradient.
        g = objective(w).gradient
        return [w[0] + 0.3 * g[0], w[1], w[2] + 0.3 * g[2]]

    expected = plain.through(ascent, w)
    actual = objective.through(ascent, w)
    assert actual.gradient[1] is None
    assert float(actual.loss) == float(expected.loss)
    assert_equal(actual.gradient[::2], expected.gradient[::2])


def test_through_returns_what_comes_beside_the_loss_at_the_end_of_the_ascent():
    objective = Objective.with_aux(lambda w, batch: (ops.sum(w[0] ** 2), w[0]))
    objective.through(ascent_by(0.5), [vector(1.0)])
    assert float(ops.stop_gradient(objective.record.report.aux)[0]) == 2.0


def test_not_finite_where_the_ascent_is_not():
    objective = Objective(lambda w: ops.sum(ops.sqrt(w[0])))
    objective.through(ascent_by(0.1), [vector(0.0)])
    assert not bool(objective.is_finite([]))
