"""Laws compared on held-out scales, and prediction intervals that hold new runs as often as they say."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from analysis.choice import _mean_interval, compare, predict_run, to_json
from analysis.fit import fit, predict
from analysis.laws import BNSL_1, CHINCHILLA, CHINCHILLA_EQUAL, KAPLAN_N, SATURATING
from analysis.table import FitError

TRUTH = {"E": 1.8, "A": 480.0, "B": 900.0, "alpha": 0.35, "beta": 0.35}
LINE = {"E": 1.5, "A": 90.0, "alpha": 0.35}


def grid(seed, sizes=6, budgets=5, noise=0.01, top=1e8):
    n, d = (g.ravel() for g in np.meshgrid(np.geomspace(1e6, top, sizes), np.geomspace(1e8, 1e2 * top, budgets)))
    generator = np.random.default_rng(seed)
    return {"N": n, "D": d}, CHINCHILLA.predict(TRUTH, {"N": n, "D": d}) * np.exp(noise * generator.normal(size=n.size))


def curve(seed, points=24, noise=0.005):
    """A saturating law under both names of its variable."""
    x = np.geomspace(1e5, 1e8, points)
    generator = np.random.default_rng(seed)
    return {"x": x, "N": x}, SATURATING.predict(LINE, {"x": x}) * np.exp(noise * generator.normal(size=points))


def test_of_nested_laws_that_predict_alike_the_comparison_says_so():
    at, loss = grid(0)
    rows = compare(
        [CHINCHILLA, CHINCHILLA_EQUAL], at, loss, cut=("N", 2e7), objective="squared_log", starts=30, bootstraps=100
    )
    by_law = {row.law: row for row in rows}
    assert by_law["chinchilla_equal"].nested_in == ("chinchilla",)
    assert by_law["chinchilla"].nested_in == ()
    first, second = rows
    assert first.behind == 0
    assert second.behind_interval[0] <= 0 <= second.behind
    assert second.behind == pytest.approx(second.error - first.error)
    expected = {
        "chinchilla": "no better than chinchilla_equal, nested in it: more parameters for the same prediction",
        "chinchilla_equal": "not to be told from chinchilla",
    }
    assert first.remark == expected[first.law]
    assert "nested in it" in second.remark or "with fewer parameters" in second.remark


def test_a_law_without_the_floor_that_is_there_predicts_worse_and_has_the_larger_aicc():
    at, loss = curve(0)
    rows = compare([KAPLAN_N, SATURATING], at, loss, cut=("N", 1e7), objective="squared_log", starts=30, bootstraps=100)
    assert [row.law for row in rows] == ["saturating", KAPLAN_N.name]
    assert rows[0].remark == "smallest error on the held-out points"
    assert rows[1].remark == "predicts worse than saturating"
    assert rows[1].behind_interval[0] > 0
    assert rows[0].aicc == 0 < rows[1].aicc
    assert rows[0].fitted_points + rows[0].held_out == 24


def test_error_and_aicc_are_those_of_a_straight_line_in_logarithms():
    at, loss = curve(1)
    below = at["x"] <= 1e7
    rows = {row.law: row for row in compare([KAPLAN_N, SATURATING], at, loss, cut=("x", 1e7), starts=30, bootstraps=20)}
    slope, offset = np.polyfit(np.log(at["x"][below]), np.log(loss[below]), 1)
    residual = np.log(loss) - slope * np.log(at["x"]) - offset
    assert rows[KAPLAN_N.name].error == pytest.approx(np.mean(residual[~below] ** 2), rel=1e-6)
    points = below.sum()
    aicc = {KAPLAN_N.name: points * math.log(np.mean(residual[below] ** 2)) + 2 * 3 + 2 * 3 * 4 / (points - 4)}
    curved = fit(SATURATING, {"x": at["x"][below]}, loss[below], objective="squared_log", starts=30, bootstraps=0)
    aicc["saturating"] = points * math.log(curved.scatter**2) + 2 * 4 + 2 * 4 * 5 / (points - 5)
    difference = rows[KAPLAN_N.name].aicc - rows["saturating"].aicc
    assert difference == pytest.approx(aicc[KAPLAN_N.name] - aicc["saturating"], rel=1e-4)


def test_the_interval_of_an_error_is_students():
    value = np.random.default_rng(5).normal(3.0, 1.0, size=12)
    low, high = _mean_interval(np.arange(12), np.ones(12), 0.9, 0, value, np.tile(value, (2000, 1)))
    half = stats.t.ppf(0.95, 11) * value.std(ddof=1) / math.sqrt(12)
    assert (low, high) == pytest.approx((value.mean() - half, value.mean() + half), abs=0.1 * half)


def test_a_law_that_cannot_be_fitted_comes_last_with_its_reason():
    at, loss = curve(2)
    rows = compare([BNSL_1, SATURATING], at, loss, cut=("x", 1e7), starts=10, bootstraps=20)
    assert [row.law for row in rows] == ["saturating", BNSL_1.name]
    assert rows[1].remark.startswith("not fitted: 24 points are too few")
    written = json.loads(json.dumps(to_json(rows[1]), allow_nan=False))
    assert written["error"] is None
    assert written["interval"] == [None, None]


def test_with_groups_aicc_is_not_given_and_groups_are_counted():
    at, loss = grid(1)
    groups = np.unique(at["N"], return_inverse=True)[1]
    with pytest.raises(FitError, match="2 groups have N above 2e"):
        compare([CHINCHILLA], at, loss, cut=("N", 2e7), groups=groups)
    rows = compare(
        [CHINCHILLA], at, loss, cut=("D", 1e9), groups=groups, objective="squared_log", starts=10, bootstraps=20
    )
    assert math.isnan(rows[0].aicc)


def test_a_cut_on_no_column_is_refused():
    with pytest.raises(FitError, match="no column C"):
        compare([CHINCHILLA], *grid(0), cut=("C", 1e18))


def test_prediction_intervals_hold_new_runs_as_often_as_they_say():
    """Within the table and 3 times beyond it. 90 % of 30 tables x 40 runs, which share their table's fit: 84 to 95."""
    n, d = (np.tile(v, 10) for v in ([1e7, 1e8, 3e8, 3e8], [1e9, 1e10, 1e10, 3e10]))
    held, held_by_law = [], []
    for seed in range(30):
        at, loss = grid(seed, sizes=5, budgets=4)
        fitted = fit(CHINCHILLA, at, loss, starts=8, bootstraps=100)
        new = CHINCHILLA.predict(TRUTH, {"N": n, "D": d}) * np.exp(
            0.01 * np.random.default_rng(10_000 + seed).normal(size=len(n))
        )
        value, low, high = predict_run(fitted, N=n, D=d)
        assert value == pytest.approx(predict(fitted, N=n, D=d)[0])
        held.append(np.mean((low <= new) & (new <= high)))
        _, low, high = predict(fitted, N=n, D=d)
        held_by_law.append(np.mean((low <= new) & (new <= high)))
    assert 0.84 <= np.mean(held) <= 0.95
    assert np.mean(held_by_law) < 0.75


def test_a_prediction_interval_needs_bootstraps():
    fitted = fit(CHINCHILLA, *grid(0), starts=5, bootstraps=0)
    with pytest.raises(FitError, match="bootstraps=0"):
        predict_run(fitted, N=1e8, D=1e10)
