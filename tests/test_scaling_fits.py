"""Fits of scaling laws: surfaces come back, minima are minima, units and order change nothing."""

import pathlib
import traceback
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize, minimize_scalar

from experiments.scaling import data, huber, law, overtraining, varpro

CHINCHILLA = law.Law(1.8172, 482.01, 2085.43, 0.3478, 0.3658)
NAMES = ("E", "A", "B", "alpha", "beta")


def grid(truth, sizes=7, lengths=6):
    """Runs without noise at every pair of sizes and lengths."""
    n = np.repeat(np.geomspace(1e7, 1e10, sizes), lengths)
    d = np.tile(np.geomspace(1e8, 1e11, lengths), sizes)
    return data.runs(n, d, truth.loss(n, d))


def noisy(seed=0, count=60, noise=0.01, outliers=0):
    """Runs spread over sizes and compute, with multiplicative noise."""
    rng = np.random.default_rng(seed)
    n, c = np.exp(rng.uniform(np.log([5e7, 6e18]), np.log([1.6e10, 3e21]), (count, 2))).T
    d = c / (6 * n)
    loss = CHINCHILLA.loss(n, d) * np.exp(rng.normal(0, noise, count))
    loss[:outliers] *= 1.3
    return data.runs(n, d, loss)


def distance(found, truth):
    return max(abs(getattr(found, name) / getattr(truth, name) - 1) for name in NAMES)


@st.composite
def surfaces(draw):
    alpha, beta = (draw(st.floats(0.15, 0.9)) for _ in range(2))
    shares = [draw(st.floats(0.05, 1.5)) for _ in range(2)]
    return law.Law(draw(st.floats(0.5, 3.0)), shares[0] * 3e8**alpha, shares[1] * 3e9**beta, alpha, beta)


@settings(max_examples=12, deadline=None)
@given(surfaces())
def test_surfaces_without_noise_come_back(truth):
    runs = grid(truth)
    assert distance(varpro.fit(runs), truth) < 1e-8
    # Not from the answer of least squares: from its own grid.
    assert distance(huber.fit(runs, starts=[law.Law(1.0, 1e2, 1e2, 0.3, 0.3)]), truth) < 1e-8


def test_tied_surfaces_come_back_and_overtrained_runs_lie_on_parallel_lines():
    truth = overtraining.Overtraining(1.8, 150.0, 350.0, -0.28)
    n, m = np.repeat(np.geomspace(1e7, 4e8, 4), 3), np.tile([20.0, 80.0, 320.0], 4)
    runs = data.runs(n, m * n, truth.loss(n, m))
    found = overtraining.fit(runs)
    for name, value in truth.to_dict().items():
        assert abs(getattr(found, name) / value - 1) < 1e-9
    for multiplier in (20.0, 640.0):
        size = np.array([1e8, 3e9])
        reducible = found.loss(size, multiplier) - found.E
        compute = 6 * multiplier * size**2
        assert abs(np.diff(np.log(reducible)) / np.diff(np.log(compute)) - found.exponent / 2).max() < 1e-9


def sum_of_squares(x, runs):
    rest = (
        x[0]
        + np.exp(x[1] - x[3] * np.log(runs.params))
        + np.exp(x[2] - x[4] * np.log(runs.tokens))
        - runs.loss
    )
    return rest @ rest


def sum_of_huber(x, runs, delta):
    model = (
        np.exp(x[0]) + np.exp(x[1] - x[3] * np.log(runs.params)) + np.exp(x[2] - x[4] * np.log(runs.tokens))
    )
    rest = np.abs(np.log(model) - np.log(runs.loss))
    return np.where(rest <= delta, rest**2 / 2, delta * (rest - delta / 2)).sum()


def simplex(objective, start, *args):
    """Somebody else's minimum: restarts of the downhill simplex."""
    for _ in range(4):
        start = minimize(objective, start, args, "Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-15}).x
    return objective(start, *args)


def test_no_simplex_gets_below_least_squares():
    runs = noisy()
    found = varpro.fit(runs)
    x = [found.E, np.log(found.A), np.log(found.B), found.alpha, found.beta]
    here = sum_of_squares(np.array(x), runs)
    truth = [CHINCHILLA.E, np.log(CHINCHILLA.A), np.log(CHINCHILLA.B), CHINCHILLA.alpha, CHINCHILLA.beta]
    assert here <= simplex(sum_of_squares, truth, runs) * (1 + 1e-9)
    assert here < sum_of_squares(np.array(truth), runs)
    for i in range(5):
        for step in (-1e-4, 1e-4):
            assert sum_of_squares(np.array(x) + step * np.eye(5)[i], runs) > here


def test_least_squares_have_all_their_digits_however_large_the_residuals():
    runs = noisy(3, count=300, noise=0.1)
    found = varpro.fit(runs)
    assert distance(varpro.fit(runs, start=law.Law(1.0, 1e2, 1e2, 1.2, 0.1)), found) < 1e-11
    model = [np.full(len(runs), found.E), found.term("N", runs.params), found.term("D", runs.tokens)]
    logs = [np.ones(len(runs)), np.log(runs.params), np.log(runs.tokens)]
    slopes = [np.ones(len(runs)), model[1], model[2], model[1] * logs[1], model[2] * logs[2]]
    rest = sum(model) - runs.loss
    assert all(abs(rest @ slope) < 1e-11 * np.linalg.norm(rest) * np.linalg.norm(slope) for slope in slopes)


@pytest.mark.parametrize("delta", [1e-4, 1e-3, 1e-1])
def test_no_simplex_gets_below_the_huber_fit(delta):
    runs = noisy(1, outliers=3)
    found = huber.fit(runs, delta=delta)
    x = np.array([np.log(found.E), np.log(found.A), np.log(found.B), found.alpha, found.beta])
    here = sum_of_huber(x, runs, delta)
    assert here == pytest.approx(huber.value(found, runs, delta), rel=1e-10)
    truth = [
        np.log(CHINCHILLA.E),
        np.log(CHINCHILLA.A),
        np.log(CHINCHILLA.B),
        CHINCHILLA.alpha,
        CHINCHILLA.beta,
    ]
    assert here <= simplex(sum_of_huber, truth, runs, delta) * (1 + 1e-9)
    for start in (law.Law(0.5, 1e3, 1e4, 0.5, 0.5), law.Law(2.0, 50.0, 200.0, 0.2, 0.25)):
        assert distance(huber.fit(runs, delta=delta, starts=[start]), found) < 1e-7


def test_huber_ignores_outliers_that_pull_least_squares_away():
    runs = grid(CHINCHILLA)
    bad = replace(runs, loss=runs.loss * np.where(np.isin(np.arange(len(runs)), [3, 17, 30]), 1.2, 1.0))
    assert distance(varpro.fit(bad), CHINCHILLA) > 0.05
    assert distance(huber.fit(bad, delta=1e-5), CHINCHILLA) < 1e-3


@settings(max_examples=5, deadline=None)
@given(st.floats(-12, 12), st.floats(-12, 12), st.randoms(use_true_random=False))
def test_units_and_order_change_nothing(of_params, of_tokens, random):
    runs = noisy(2, count=30)
    order = list(range(len(runs)))
    random.shuffle(order)
    columns = runs.params[order] * 10**of_params, runs.tokens[order] * 10**of_tokens, runs.loss[order]
    other = data.runs(*columns)
    for fit in (varpro.fit, huber.fit):
        one, two = fit(runs), fit(other)
        assert abs(one.alpha - two.alpha) < 1e-10 and abs(one.beta - two.beta) < 1e-10
        predictions = one.loss(runs.params, runs.tokens), two.loss(other.params, other.tokens)
        np.testing.assert_allclose(*predictions, rtol=1e-10)
    same = data.runs(runs.params[order], runs.tokens[order], runs.loss[order])
    assert varpro.fit(same) == varpro.fit(runs)


@pytest.mark.parametrize("power", [1.0, 0.9, 1.2])
def test_the_optimum_is_the_lowest_loss_of_its_budget(power):
    cost = law.Cost(factor=5.0, power=power)
    for compute in (1e18, 1e22):
        n, d = cost.optimum(CHINCHILLA, compute)
        assert cost.flops(n, d) == pytest.approx(compute, rel=1e-12)
        along = minimize_scalar(
            lambda x, c=compute: CHINCHILLA.loss(np.exp(x), c / cost.flops(np.exp(x), 1.0)),
            bounds=(np.log(n) - 3, np.log(n) + 3),
            method="bounded",
            options={"xatol": 1e-9},
        )
        assert along.x == pytest.approx(float(np.log(n)), abs=1e-5)
    a, b = cost.exponents(CHINCHILLA)
    n, d = cost.optimum(CHINCHILLA, np.array([1e18, 1e22]))
    assert [a, b] == pytest.approx([np.log(n[1] / n[0]) / np.log(1e4), np.log(d[1] / d[0]) / np.log(1e4)])


def test_flops_decide_what_a_budget_buys():
    runs = grid(CHINCHILLA)
    assert str(law.cost_of(runs)) == "6 N D"
    cost = law.cost_of(replace(runs, flops=7.5 * runs.params**0.95 * runs.tokens))
    assert (cost.factor, cost.power) == pytest.approx((7.5, 0.95), rel=1e-10) and cost.misfit < 1e-9
    # Per token 6 (N + 1e8): no power of N, and the difference is told.
    flops = 6 * (runs.params + 1e8) * runs.tokens
    bent = law.cost_of(replace(runs, flops=flops))
    worst = np.abs(flops / bent.flops(runs.params, runs.tokens) - 1).max()
    assert worst > 0.5 and bent.misfit == pytest.approx(worst) and "within 76 % of it" in str(bent)


def test_edges_are_flagged():
    runs = grid(law.Law(1.0, 30.0, 800.0, 0.25, 0.3))
    lower = replace(runs, loss=runs.loss - 1.2 + 0.001 * np.sin(np.arange(len(runs))))
    assert lower.loss.min() > 0
    found = varpro.fit(lower)
    assert found.E == 0 and any("E = 0" in flag for flag in varpro.flags(found, lower))
    only_tokens = 2 + 500 / runs.tokens**0.3 + 1e-4 * (runs.params / 1e10)
    found = varpro.fit(replace(runs, loss=only_tokens))
    assert any(
        "A = 0" in flag and "params" in flag for flag in varpro.flags(found, replace(runs, loss=only_tokens))
    )
    assert np.isnan(law.Cost().optimum(found, 1e20)[0])


def test_hardly_determined_exponents_are_flagged():
    n, d = np.repeat([1e8, 1.02e8, 1.04e8], 3), np.tile([1e9, 3e9, 9e9], 3)
    near = data.runs(n, d, 2 + 0.01 * np.sin(np.arange(9)))
    assert any(flag.startswith("underdetermined") for flag in varpro.flags(varpro.fit(near), near))
    exact = grid(CHINCHILLA, 3, 3).take([0, 1, 4, 6, 8])
    assert any("no error left" in flag for flag in varpro.flags(varpro.fit(exact), exact))
    assert varpro.flags(varpro.fit(noisy()), noisy()) == []


def cross(n, d):
    n, d = np.array(n, float), np.array(d, float)
    return data.runs(n, d, CHINCHILLA.loss(n, d))


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        (cross([1e8] * 6, [1e9] * 6), "all 6 runs are duplicates"),
        (cross([1e8] * 6, np.geomspace(1e9, 1e11, 6)), "1 distinct values of params"),
        (cross(np.geomspace(1e8, 1e10, 6), [1e9, 2e9] * 3), "2 distinct values of tokens"),
        (cross([1e8, 2e8, 4e8, 8e8], [1e9, 3e9, 1e9, 4e9]), r"4 distinct \(params, tokens\) for the 5"),
        (cross(np.geomspace(1e8, 1e10, 8), 20 * np.geomspace(1e8, 1e10, 8)), "one power of params"),
    ],
)
def test_underdetermined_runs_are_refused(runs, message):
    for fit in (varpro.fit, huber.fit):
        with pytest.raises(ValueError, match=f"underdetermined: .*{message}") as error:
            fit(runs)
        assert "\n" not in str(error.value)
        # `zoo` shows one line for what the project's own checks raise.
        assert pathlib.Path(traceback.extract_tb(error.tb)[-1].filename).parent.name == "layers"


@pytest.mark.parametrize(
    ("column", "value"),
    [("params", 0.0), ("tokens", -1e9), ("loss", np.nan), ("loss", 0.0), ("params", np.inf)],
)
def test_runs_with_impossible_numbers_are_refused(column, value):
    columns = {"params": [1e8, 2e8], "tokens": [1e9, 2e9], "loss": [3.0, 2.9]}
    columns[column][1] = value
    with pytest.raises(ValueError, match=f"{column} must be positive and finite; run 2 has"):
        data.runs(**columns)


GADRE = pathlib.Path(__file__).parents[2] / "shared" / "data" / "gadre_overtraining" / "gadre104_runs.csv"


@pytest.mark.skipif(not GADRE.exists(), reason="the runs of Gadre et al. are not on this machine")
@pytest.mark.parametrize(
    ("corpus", "errors"),
    [
        # per cent, at 1.4B parameters and at 6.9B
        ("rpj", {640: 0.710, 20: 0.732}),
        ("c4_original", {20: 4.30}),
        ("rw_original", {320: 0.005, 20: 1.62}),
    ],
)
def test_five_small_runs_predict_large_ones_as_published(corpus, errors):
    """Gadre et al., arXiv 2403.08540: fitted to models of up to 0.41B, loss on C4."""
    table = data.read(GADRE, params="N", tokens="D", loss="loss_c4_val").where("train", corpus)
    runs, notes = table.runs()
    multiplier = np.round(runs.tokens / runs.params)
    small = (multiplier == 20) & (runs.params < 5e8) | (multiplier == 320) & (runs.params < 2e7)
    found = overtraining.fit(runs.take(small))
    assert small.sum() == 5 and notes == []
    if corpus == "rpj":
        values = [found.a, found.scale, found.exponent, found.E]
        assert values == pytest.approx([166.211, 366.687, -0.272851, 1.836648], rel=2e-6)
    error = 100 * np.abs(found.loss(runs.params, multiplier) / runs.loss - 1)
    for of, expected in errors.items():
        largest = (multiplier == of) & (runs.params > (1e9 if of != 20 else 5e9))
        assert largest.sum() == 1 and error[largest][0] == pytest.approx(expected, abs=0.0055)
