"""Calibrated bootstrap intervals and profiles: textbook widths where the model is linear, coverage where points share
runs, and words where a table says too little."""

import numpy as np
import pytest
from scipy import stats

from analysis import intervals
from analysis.fit import fit, with_interval
from analysis.laws import CHINCHILLA, KAPLAN_N, SATURATING
from analysis.profile import profile, profile_p
from analysis.table import FitError
from benchmarks import coverage


def mean_of(value_M, group_M):
    """The fit of a constant with a thousand resamples, as a linear approximation, and the resampled means."""
    clusters = group_M.max() + 1
    counts_BxM = np.random.default_rng(0).multinomial(clusters, np.full(clusters, 1 / clusters), 1000)[:, group_M]
    counts_BxM = counts_BxM.astype(float)
    constant = np.ones((len(value_M), 1))
    at = intervals.linear(constant, value_M.mean() - value_M, group_M, np.ones(len(value_M)), counts_BxM)
    return at, counts_BxM @ value_M / counts_BxM.sum(axis=1)


def honest_width(at, jacobian_Qxp, level=0.9):
    """Half the width that `reach` gives to the linear approximation's bootstrap."""
    low_Q, high_Q = np.quantile(at.shift @ jacobian_Qxp.T, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return intervals.reach(at, jacobian_Qxp, level).factor * (high_Q - low_Q) / 2


def test_a_mean_of_independent_points_has_students_interval():
    value_M = np.random.default_rng(1).normal(size=7)
    at, _ = mean_of(value_M, np.arange(7))
    one = np.ones((1, 1))
    assert intervals.reach(at, one, 0.9).freedom == pytest.approx(6)
    assert honest_width(at, one) == pytest.approx(stats.t.ppf(0.95, 6) * value_M.std(ddof=1) / np.sqrt(7))


def test_a_mean_of_clusters_has_students_interval_of_their_means():
    generator = np.random.default_rng(2)
    value_M = generator.normal(size=9).repeat(5) + 0.3 * generator.normal(size=45)
    at, _ = mean_of(value_M, np.arange(9).repeat(5))
    mean_G = value_M.reshape(9, 5).mean(axis=1)
    one = np.ones((1, 1))
    assert intervals.reach(at, one, 0.9).freedom == pytest.approx(8)
    assert honest_width(at, one) == pytest.approx(stats.t.ppf(0.95, 8) * mean_G.std(ddof=1) / 3)


def test_moments_are_those_of_the_matrices_they_avoid():
    generator = np.random.default_rng(3)
    slope_Mxp, group_M = generator.normal(size=(30, 3)), generator.integers(0, 8, 30)
    group_M = np.unique(group_M, return_inverse=True)[1]
    residual_M = generator.normal(size=group_M.max() + 1)[group_M] + generator.normal(size=30)
    at = intervals.linear(slope_Mxp, residual_M, group_M, np.ones(30), np.empty((0, 30)))
    direction_1xp = generator.normal(size=(1, 3))
    rho = intervals.within(at)
    assert 0.05 < rho < 0.95
    same_MxM = group_M[:, None] == group_M
    noise_MxM = (1 - rho) * np.eye(30) + rho * same_MxM
    gram_pxp = np.linalg.inv(slope_Mxp.T @ slope_Mxp)
    lever_M = (direction_1xp @ gram_pxp @ slope_Mxp.T)[0]
    member_GxM = np.arange(group_M.max() + 1)[:, None] == group_M
    contribution_GxM = member_GxM @ (lever_M[:, None] * (np.eye(30) - slope_Mxp @ gram_pxp @ slope_Mxp.T))
    k = contribution_GxM @ noise_MxM @ contribution_GxM.T
    freedom = intervals.reach(at, direction_1xp, 0.9).freedom
    assert freedom == pytest.approx(np.trace(k) ** 2 / np.trace(k @ k))


def test_percentiles_stand_around_the_estimates_rank_on_any_scale():
    sample_Bx1 = np.random.default_rng(4).normal(size=(999, 1))
    middle = np.median(sample_Bx1, axis=0)
    low, high = intervals.ends(middle, sample_Bx1, 0.9, 1.0)
    assert [low[0], high[0]] == pytest.approx(np.quantile(sample_Bx1, [0.05, 0.95]), abs=2e-3)
    bent = intervals.ends(np.exp(middle), np.exp(sample_Bx1), 0.9, 1.0)
    assert np.log(np.ravel(bent)) == pytest.approx([low[0], high[0]], abs=1e-3)
    wide_low, wide_high = intervals.ends(middle, sample_Bx1, 0.9, 1.3)
    assert [wide_low[0], wide_high[0]] == pytest.approx(
        np.quantile(sample_Bx1, stats.norm.cdf([-1.3 * stats.norm.ppf(0.95), 1.3 * stats.norm.ppf(0.95)])), abs=2e-3
    )
    above = intervals.ends(middle + 9, sample_Bx1, 0.9, 1.0)
    assert above[0] <= middle + 9 <= above[1]


def test_points_that_share_runs_need_their_groups():
    """90 % of 40 is 36 (standard deviation 1.9). Taken for independent points, 61 % were seen: 24 (3.1)."""
    held = {True: 0, False: 0}
    for repetition in range(40):
        at, loss_M, trunk_M = coverage.table("clustered", np.random.default_rng([9, repetition]))
        for grouped in held:
            fitted = fit(CHINCHILLA, at, loss_M, objective="squared_log", groups=trunk_M if grouped else None,
                         starts={n: np.array([v]) for n, v in coverage.TRUTH.items()}, bootstraps=100)  # fmt: skip
            low, high = fitted.parameters["alpha"].interval
            held[grouped] += low <= coverage.TRUTH["alpha"] <= high
    assert held[True] >= 31
    assert held[False] <= 32


def test_few_groups_are_called_too_few():
    at, loss_M, trunk_M = coverage.table("clustered", np.random.default_rng(0))
    many = fit(CHINCHILLA, at, loss_M, groups=trunk_M, starts=10, bootstraps=50)
    assert many.caution == ""
    one_per_size = trunk_M % coverage.TRUNKS == 0
    few = fit(
        CHINCHILLA, {n: v[one_per_size] for n, v in at.items()}, loss_M[one_per_size], groups=trunk_M[one_per_size],
        starts=10, bootstraps=50,
    )  # fmt: skip
    assert "6 groups leave" in few.caution
    assert "not to be trusted" in few.caution


def line(noise=0.02, points=8, seed=0):
    """L(N) without a floor: a straight line in logarithms."""
    n_M = np.geomspace(1e5, 1e8, points)
    return {"N": n_M}, (1e9 / n_M) ** 0.1 * np.exp(noise * np.random.default_rng(seed).normal(size=points))


def test_a_profile_of_a_straight_line_is_students_interval():
    at, loss_M = line()
    fitted = fit(KAPLAN_N, at, loss_M, objective="squared_log", starts=10, bootstraps=20)
    (name,) = (p.name for p in KAPLAN_N.parameters if p.kind == "exponent")
    regression = stats.linregress(np.log(at["N"]), np.log(loss_M))
    half = stats.t.ppf(0.95, 6) * regression.stderr
    found = profile(fitted, [name])[name]
    assert found.value == pytest.approx(-regression.slope)
    assert found.interval == pytest.approx((-regression.slope - half, -regression.slope + half), rel=1e-6)
    assert profile_p(fitted, {name: found.interval[1]})[name] == pytest.approx(0.1, abs=1e-6)
    assert profile_p(fitted, {name: 1e-9 - regression.slope})[name] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("objective", ["huber", "squared_log"])
def test_profiles_end_where_their_p_value_says(objective):
    at, loss_M, _ = coverage.table("gaussian", np.random.default_rng(1))
    fitted = fit(CHINCHILLA, at, loss_M, objective=objective, starts=20, bootstraps=20)
    found = profile(fitted)
    assert list(found) == ["E", "A", "B", "alpha", "beta", "a", "b"]
    for end in (0, 1):
        p = profile_p(fitted, {name: estimate.interval[end] for name, estimate in found.items()})
        assert list(p.values()) == pytest.approx([0.1] * 7, abs=1e-4)
    assert all(estimate.identified for estimate in found.values())
    assert found["b"].interval == pytest.approx(tuple(1 - v for v in reversed(found["a"].interval)), abs=1e-5)


def test_a_floor_that_the_table_cannot_see_is_not_identified():
    at, loss_M = line(noise=0.01)
    fitted = fit(SATURATING, {"x": at["N"]}, loss_M, objective="squared_log", starts=20, bootstraps=20)
    found = profile(fitted, ["E"])["E"]
    assert not found.identified
    assert found.remark == "cannot be told from zero"


def test_a_profile_says_what_it_cannot_do():
    at, loss_M, trunk_M = coverage.table("clustered", np.random.default_rng(0))
    grouped = fit(CHINCHILLA, at, loss_M, groups=trunk_M, starts=5, bootstraps=20)
    with pytest.raises(FitError, match="cluster bootstrap"):
        profile(grouped)
    plain = fit(CHINCHILLA, at, loss_M, objective="squared", starts=5, bootstraps=0)
    with pytest.raises(FitError, match="squared_log"):
        profile(plain)
    with pytest.raises(FitError, match="gamma is not a quantity of the chinchilla law"):
        profile_p(plain, {"gamma": 1.0})


def test_a_quantity_of_the_parameters_has_the_parameters_interval():
    at, loss_M, trunk_M = coverage.table("clustered", np.random.default_rng(0))
    fitted = fit(CHINCHILLA, at, loss_M, groups=trunk_M, starts=5, bootstraps=100)
    value_G, low_G, high_G = with_interval(fitted, lambda p: p["alpha"] * np.ones(2))
    expected = fitted.parameters["alpha"]
    assert value_G == pytest.approx([expected.value] * 2)
    assert np.stack([low_G, high_G], axis=1) == pytest.approx(np.array([expected.interval] * 2))
