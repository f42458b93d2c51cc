"""The curvature of each layer, against the blocks of a dense matrix."""

import types

import keras
import numpy as np
import pytest
from keras import layers

from keras_sharp import SharpnessAwareModel, curvature
from keras_sharp.callbacks import HessianProbe
from keras_sharp.curvature import products
from tests import models, oracles
from tests.test_curvature import Matrix, data, like_a_network, twin

pytestmark = pytest.mark.usefixtures("as_written")


@pytest.fixture(autouse=True)
def _uncertified(monkeypatch):
    """`test_certificate.py` is about that."""
    monkeypatch.setattr(curvature.HessianOperator, "_check_product", lambda *_: None)
    monkeypatch.setattr(curvature.GaussNewtonOperator, "_check_product", lambda *_: None)


def of_variables(matrix, **shapes):
    """An operator whose rows are those of these variables."""
    operator = Matrix(matrix)
    operator.variables = [types.SimpleNamespace(path=p, shape=s) for p, s in shapes.items()]
    return operator


def blocks_of(matrix, sizes):
    ends = np.cumsum(sizes)[:-1]
    parts = zip(np.split(matrix, ends), np.cumsum([0, *sizes[:-1]]), sizes, strict=True)
    return [rows[:, start : start + size] for rows, start, size in parts]


def one_by_one(variable):
    return variable.path


# In float64


def test_each_block_has_its_own_eigenvalue_and_trace():
    matrix = like_a_network().matrix
    operator = of_variables(matrix, a=(20, 5), b=(60,), c=(40,))
    blocks = blocks_of(matrix, [100, 60, 40])
    found = curvature.per_layer(operator, block_of=one_by_one, tol=1e-6, num_products=400)
    assert found.names == ("a", "b", "c")
    assert found.sizes.tolist() == [100, 60, 40]
    true = [np.linalg.eigvalsh(block)[-1] for block in blocks]
    np.testing.assert_allclose(found.lambda_max, true, rtol=1e-9)
    assert np.all(found.residuals <= 1e-6 * found.lambda_max)
    errors = found.traces - [np.trace(block) for block in blocks]
    assert np.all(np.abs(errors) <= 3 * found.standard_errors)
    assert np.all(found.standard_errors < 0.1 * found.traces)
    assert found.products == operator.products
    # All of them at once: the traces add up to the one of the same vectors.
    whole = curvature.trace(matrix_of(operator), num_products=400)
    assert found.traces.sum() == pytest.approx(whole.value, rel=1e-9)
    assert found.certificate is None


def matrix_of(operator):
    return Matrix(operator.matrix)


def test_the_standard_errors_are_right():
    """The traces of many seeds are as far apart as they say, though blocks share the products."""
    operator = of_variables(like_a_network(60).matrix, a=(20,), b=(40,))
    found = [
        curvature.per_layer(operator, block_of=one_by_one, num_products=20, seed=seed, tol=1.0)
        for seed in range(200)
    ]
    spread = np.std([one.traces for one in found], axis=0)
    said = np.mean([one.standard_errors for one in found], axis=0)
    np.testing.assert_allclose(said, spread, rtol=0.15)


def test_a_block_may_have_variables_that_are_apart_and_some_may_be_left_out():
    matrix = like_a_network(60).matrix
    operator = of_variables(matrix, a=(10,), b=(20,), c=(30,))
    names = {"a": "outer", "b": None, "c": "outer"}
    found = curvature.per_layer(operator, block_of=lambda v: names[v.path], tol=1e-8)
    rows = np.r_[0:10, 30:60]
    true = np.linalg.eigvalsh(matrix[np.ix_(rows, rows)])[-1]
    assert found.names == ("outer",)
    assert found.sizes.tolist() == [40]
    np.testing.assert_allclose(found.lambda_max, [true], rtol=1e-9)


def test_an_eigenvalue_that_is_not_exact_is_told_with_its_block():
    operator = of_variables(like_a_network().matrix, a=(100,), b=(100,))
    with pytest.warns(UserWarning, match=r"0 of 1 eigenvalues.*`max_products`") as caught:
        curvature.per_layer(operator, block_of=one_by_one, num_products=2, max_products=2)
    assert [str(w.message)[:14] for w in caught] == ["The block 'a':", "The block 'b':"]


def test_the_seed_decides_and_progress_is_shown_when_it_takes_long(capsys, monkeypatch):
    operator = of_variables(like_a_network(60).matrix, a=(60,))

    def traces(**kwargs):
        return curvature.per_layer(operator, block_of=one_by_one, **kwargs).traces

    np.testing.assert_array_equal(traces(seed=1), traces(seed=1))
    assert np.any(traces(seed=1) != traces(seed=2))
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(products, "LONG", 0.0)
    traces()
    assert capsys.readouterr().out.endswith("\n")
    traces(verbose=0)
    assert capsys.readouterr().out == ""


# Of models


@pytest.mark.parametrize("network", [oracles.Mlp, oracles.ConvNet])
def test_the_blocks_are_those_of_the_layers(network):
    net = network()
    model = twin(net)
    found = curvature.per_layer(SharpnessAwareModel(model, "sam").model, *data(net), tol=1e-4)
    owners = [v.path.split("/")[-2] for v in model.trainable_variables]
    names = list(dict.fromkeys(owners))
    sizes = [
        sum(int(np.prod(v.shape)) for v, o in zip(model.trainable_variables, owners, strict=True)
            if o == name)
        for name in names
    ]  # fmt: skip
    assert found.names == tuple(names)
    assert found.sizes.tolist() == sizes
    blocks = blocks_of(net.hessian(), sizes)
    true = [np.linalg.eigvalsh(block)[-1] for block in blocks]
    np.testing.assert_allclose(found.lambda_max, true, rtol=1e-3)
    errors = found.traces - [np.trace(block) for block in blocks]
    assert np.all(np.abs(errors) <= 4 * found.standard_errors)
    whole = curvature.eigenvalues(model, *data(net), k=1).values[0]
    assert np.all(found.lambda_max <= 1.001 * whole)


def test_of_an_operator_for_some_of_the_variables():
    model = models.mlp()
    model.compile("sgd", "mse")
    x, y = models.regression()
    last = model.layers[-1].trainable_variables
    operator = curvature.GaussNewtonOperator(model, x, y, variables=last)
    found = curvature.per_layer(operator)
    assert found.names == ("last",)
    assert found.lambda_max[0] == pytest.approx(
        curvature.eigenvalues(operator, k=1).values[0], rel=1e-3
    )


def test_layers_of_the_same_name_stay_apart_and_inner_layers_are_found():
    def inner():
        a = keras.Input((3,))
        return keras.Model(a, layers.Dense(3, name="dense")(a))

    class Outer(keras.Model):
        def __init__(self):
            super().__init__(name="outer")
            self.parts = [inner(), inner()]

        def build(self, shape):
            self.scale = self.add_weight(shape=(3,), name="scale", initializer="ones")
            self.built = True

        def call(self, x):
            return self.parts[1](keras.ops.tanh(self.parts[0](x))) * self.scale

    model = Outer()
    model.compile("sgd", "mse")
    x, y = models.regression(outputs=3)
    model.evaluate(x, y, verbose=0)
    found = curvature.per_layer(model, x, y, num_products=2)
    assert sorted(found.names) == ["dense", "dense (2)", "outer"]
    assert dict(zip(found.names, found.sizes.tolist(), strict=True)) == {
        "dense": 12,
        "dense (2)": 12,
        "outer": 3,
    }


def test_a_probe_keeps_it_for_each_look():
    model = models.mlp()
    model.compile(keras.optimizers.SGD(0.05), "mse")
    x, y = models.regression()
    probe = HessianProbe(x, y, k=1, per_layer=True)
    logs = model.fit(x, y, epochs=2, verbose=0, callbacks=[probe]).history
    assert [one.names for one in probe.history["per_layer"]] == [("first", "last")] * 2
    now = curvature.per_layer(model, x, y, verbose=0)
    np.testing.assert_allclose(probe.history["per_layer"][-1].lambda_max, now.lambda_max, rtol=1e-3)
    assert "per_layer" not in logs
    with pytest.raises(ValueError, match="`per_layer` must be True or False"):
        HessianProbe(x, y, per_layer=2)


# Bad input


class Untouchable(Matrix):
    variables = (types.SimpleNamespace(path="a", shape=(6,)),)

    def matvec(self, v):
        raise AssertionError("a product was taken")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"block_of": "layer"}, r"`block_of` must be a function.*Received: block_of='layer'"),
        ({"block_of": lambda v: None}, r"`block_of` leaves no variable.*\['a'\]"),
        ({"num_products": 1}, "`num_products` must be an integer >= 2"),
        ({"max_products": 0}, "`max_products` must be an integer >= 1"),
        ({"tol": float("nan")}, "`tol` must be a number >= 0"),
        ({"verbose": 3}, "`verbose` must be 0, 1 or 'auto'"),
    ],
)
def test_wrong_arguments_are_refused_before_the_first_product(arguments, match):
    with pytest.raises(ValueError, match=match):
        curvature.per_layer(Untouchable(np.eye(6)), **arguments)


def test_a_matrix_without_variables_has_no_layers():
    with pytest.raises(ValueError, match=r"variables of a model. Received: a Matrix"):
        curvature.per_layer(Matrix(np.eye(6)))
