"""What docs/explanation/units_of_rho.md says in formulas, held against the library."""

import math
import pathlib
import re

import numpy as np
import pytest
from keras import ops

import keras_sharp
from keras_sharp import methods, neighborhoods
from keras_sharp.neighborhoods import AdaptiveBall, Ball, WeightScaledBall
from tests import oracles
from tests.test_readme import blocks

PAGE = pathlib.Path(__file__).resolve().parent.parent / "docs/explanation/units_of_rho.md"
SHAPES, BIASES = ((5, 4), (4,), (3, 2)), (False, True, False)
BIAS = oracles.mask(BIASES, SHAPES)
RHO = 0.3

#: The neighborhood and its three formulas, as they stand in the table of the page.
ROWS = re.findall(
    r"^\| `(\w+\([^`]*\))` \| `([^`]+)` \| `([^`]+)` \| `([^`]+)` \|$",
    PAGE.read_text("utf-8"),
    re.MULTILINE,
)
#: Values for the one row that has any order.
ORDERS = [1.3, 3.0, 6.0]
CASES = [(row, p) for row in ROWS for p in (ORDERS if "p=p" in row[0] else [None])]


def norm(x, q=2):
    return np.sum(np.abs(x) ** q) ** (1 / q)


def vectors(seed):
    rng = np.random.default_rng(seed)
    # Sizes from layer to layer and from entry to entry differ; some gradients are 0.
    g, w = rng.normal(size=30) ** 3, rng.normal(size=30) * np.repeat([0.05, 1.0, 3.0], [20, 4, 6])
    g[rng.permutation(30)[:7]] = 0.0
    return g, w


def perturbation(region, g, w, rho, float64):
    g, w = (float64.tensors(oracles.split(v, SHAPES)) for v in (g, w))
    return oracles.join(float64.arrays(region.perturbation(g, w, float64.tensor(rho), BIASES)))


def test_the_table_has_every_neighborhood():
    named = {row[0].split("(")[0] for row in ROWS}
    assert named == {region.__name__ for region in neighborhoods.NEIGHBORHOODS.values()}
    assert len(ROWS) == 7


@pytest.mark.parametrize(
    ("row", "p"), CASES, ids=[f"{row[0]}{'' if p is None else f', p={p:g}'}" for row, p in CASES]
)
@pytest.mark.parametrize("seed", range(3))
def test_the_formulas_of_the_page_are_those_of_the_library(row, p, seed, float64):
    g, w = vectors(seed)
    names = {"p": p, "inf": math.inf}
    region = eval(row[0], vars(neighborhoods) | names)
    scales = {
        "AdaptiveBall": np.where(BIAS, 1.0, np.abs(w) + 0.01),
        "WeightScaledBall": np.abs(w) + 0.01,
    }
    names |= {"g": g, "w": w, "n": np.count_nonzero(g), "norm": norm, "sum": np.sum}
    names |= {"abs": np.abs, "sign": np.sign, "sqrt": np.sqrt}
    names |= {"T": scales.get(type(region).__name__), "q": p and p / (p - 1)}
    unit, length, slope = (eval(formula, names) for formula in row[1:])
    e = perturbation(region, g, w, RHO, float64)
    np.testing.assert_allclose(e, RHO * unit, rtol=1e-12)
    np.testing.assert_allclose(norm(e), RHO * length, rtol=1e-12)
    np.testing.assert_allclose(g @ e, RHO * slope, rtol=1e-12)


@pytest.mark.parametrize("p", ORDERS)
def test_the_length_in_a_p_norm_lies_between_rho_and_that_of_equal_gradients(p, float64):
    g, w = vectors(0)
    n = np.count_nonzero(g)
    ends = sorted([RHO, RHO * n ** (1 / 2 - 1 / p)])
    assert ends[0] < norm(perturbation(Ball(p), g, w, RHO, float64)) < ends[1]
    equal = norm(perturbation(Ball(p), np.sign(g), w, RHO, float64))
    np.testing.assert_allclose(equal, RHO * n ** (1 / 2 - 1 / p), rtol=1e-12)


@pytest.mark.parametrize("region", [AdaptiveBall(), WeightScaledBall(), Ball(math.inf), Ball(4)])
def test_conversions_by_slope_and_by_length_differ_by_the_cosine(region, float64):
    g, w = vectors(0)
    sam, e = (perturbation(r, g, w, 1.0, float64) for r in (Ball(), region))
    by_slope, by_length = (g @ sam) / (g @ e), norm(sam) / norm(e)
    cosine = g @ e / (norm(g) * norm(e))
    assert 0.1 < cosine < 0.95
    np.testing.assert_allclose(by_slope / by_length, 1 / cosine, rtol=1e-12)


SMALL, ALPHA = 1e-4, 0.7
RULES = {
    "sam": (methods.SAM(SMALL), 1.0, 1.0),
    "gsam": (methods.GSAM(SMALL, alpha=ALPHA), 1.0, 1.0 + ALPHA),
    "bsam": (methods.BSAM(SMALL, rho_min=0.4 * SMALL), 0.0, 1.0 + 0.4),
}


@pytest.mark.parametrize("rule", RULES)
def test_what_a_rule_makes_of_rho_to_first_order(rule, float64):
    """How much of `rho H u`, along the gradient and across it, is added to the gradient."""
    method, along, across = RULES[rule]
    form = oracles.Quadratic()
    hessian = float64.tensor(form.hessian)

    def loss(w):
        column = ops.concatenate([ops.reshape(t, (-1, 1)) for t in w])
        return 0.5 * ops.sum(column * (hessian @ column))

    w = float64.tensors(oracles.split(form.start, form.shapes))
    result = keras_sharp.sharpness_aware_gradient(loss, w, method)
    g = form.gradient(form.start)
    u = g / norm(g)
    added = (oracles.join(float64.arrays(result.direction)) - g) / SMALL
    curved = form.hessian @ u
    expected = along * (u @ curved) * u + across * (curved - (u @ curved) * u)
    np.testing.assert_allclose(added, expected, atol=1e-3)


@pytest.mark.slow
def test_what_the_page_measures_is_what_training_sees():
    names = {}
    for _, code in blocks(PAGE.read_text("utf-8")):
        exec(code, names)
    for method, region in (
        (methods.SAM, Ball()),
        (methods.ASAM, AdaptiveBall()),
        (methods.AdaptiveGSAM, WeightScaledBall()),
    ):
        length, slope = names["one_unit"](region)
        rho = 0.001 / length  # So short that the second order is a fraction of a percent.
        np.testing.assert_allclose(names["rise"](method(rho)) / rho, slope, rtol=0.02)
