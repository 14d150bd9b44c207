"""Laws of whole curves: planted laws come back, areas and collapse agree with their definitions."""

import math

import numpy as np
import pytest

from analysis.curves import areas, collapse, fit_power
from analysis.fit import FitError

X = np.geomspace(3, 4000, 60)


@pytest.mark.parametrize("exponent", [0.08, 0.5, 1.7])
@pytest.mark.parametrize("floor", [0.3, 2.0])
def test_a_planted_power_law_with_a_floor_comes_back(floor, exponent):
    found = fit_power(X, floor + 1.5 * X**-exponent)
    assert found.floor == pytest.approx(floor, rel=1e-5)
    assert found.scale == pytest.approx(1.5, rel=1e-5)
    assert found.exponent == pytest.approx(exponent, rel=1e-5)
    assert found.scatter < 1e-7
    assert not found.at_bound
    assert found.predict([10.0]) == pytest.approx([floor + 1.5 * 10**-exponent], rel=1e-6)


def test_terms_that_are_subtracted_come_back_too():
    column = np.sin(np.arange(60.0)) ** 2
    found = fit_power(X, 1 + 2 * X**-0.4 - 0.3 * column, column)
    assert found.drop_K == pytest.approx([0.3], rel=1e-5)
    assert found.exponent == pytest.approx(0.4, rel=1e-5)
    assert found.predict(X[:3], column[None, :3]) == pytest.approx(1 + 2 * X[:3] ** -0.4 - 0.3 * column[:3], rel=1e-6)


def test_with_noise_no_other_solver_finds_a_lower_relative_error():
    from scipy.optimize import curve_fit

    loss = (0.8 + 2 * X**-0.3) * np.exp(0.01 * np.random.default_rng(0).standard_normal(60))
    found = fit_power(X, loss)
    other, _ = curve_fit(lambda x, e, a, b: e + a * x**-b, X, loss, p0=[0.8, 2, 0.3], sigma=loss, xtol=1e-14)
    theirs = math.sqrt(np.mean(((other[0] + other[1] * X ** -other[2]) / loss - 1) ** 2))
    assert found.scatter <= theirs * (1 + 1e-9)
    assert [found.floor, found.scale, found.exponent] == pytest.approx(list(other), rel=1e-4)


def test_a_curve_without_a_floor_or_a_power_is_told_to_be_at_a_bound():
    assert fit_power(X, 3 * X**-0.2 * (1 + X / 1e4) ** -0.2).at_bound  # steepens: the best floor is 0
    assert fit_power(X, 1 + 9 * X**-4.0).at_bound  # steeper than any exponent that is searched
    assert not fit_power(X, 1 + X**-0.5).at_bound


@pytest.mark.parametrize(
    ("x", "loss", "said"),
    [
        ([1.0, 2.0, -3.0], [3.0, 2.0, 1.0], "x holds -3"),
        ([1.0, 2.0, 3.0], [3.0, math.nan, 1.0], "loss holds nan"),
        ([1.0, 1.0, 2.0], [3.0, 3.0, 1.0], "2 different x are too few: the law needs at least 3"),
    ],
)
def test_points_that_cannot_be_fitted_are_refused_in_one_line(x, loss, said):
    with pytest.raises(FitError, match=said):
        fit_power(x, loss)


# --- areas ---------------------------------------------------------------------------------------------------------


def test_areas_are_the_papers_double_sum():
    rate = np.random.default_rng(0).uniform(0, 1, 30)
    s1, s2 = areas(rate, 0.9)
    for s in (0, 1, 7, 29):
        assert s1[s] == pytest.approx(rate[: s + 1].sum())
        double = sum((rate[k - 1] - rate[k]) * 0.9 ** (i - k) for i in range(1, s + 1) for k in range(1, i + 1))
        assert s2[s] == pytest.approx(double)


def test_one_fall_of_the_rate_counts_on_as_a_geometric_series_and_a_constant_rate_anneals_nothing():
    rate = np.where(np.arange(50) < 20, 0.3, 0.1)
    _, s2 = areas(rate, 0.95)
    assert s2[19] == 0
    assert s2[49] == pytest.approx(0.2 * (1 - 0.95**30) / 0.05)
    assert not areas(np.full(10, 0.2), 0.95)[1].any()


def test_the_rise_of_a_warm_up_is_no_annealing():
    rate = np.concatenate([np.linspace(0.1, 1, 10), np.full(20, 1.0), np.linspace(1, 0, 10)])
    _, with_rise = areas(rate, 0.9)
    _, s2 = areas(rate, 0.9, first=10)
    assert with_rise[15] < 0
    assert not s2[:30].any()
    assert s2[-1] > 0


def test_a_memory_of_one_or_more_is_refused():
    with pytest.raises(FitError, match="memory=1 must be at least 0 and below 1"):
        areas([0.1], 1)


# --- collapse ------------------------------------------------------------------------------------------------------

FRACTIONS = np.linspace(0.1, 1, 40)


def family(*, model=0.0, seed=0.0, point=0.0, floor=1.0):
    """4 models x 6 seeds of one universal curve, times scatter that a whole run, or each single point, has."""
    draw = np.random.default_rng(0).standard_normal
    shape = FRACTIONS ** -np.linspace(0.5, 0.5 + model, 4)[:, None, None]
    scatter = np.exp(seed * draw((4, 6, 1)) + point * draw((4, 6, 40)))
    return floor + np.array([2.0, 1.5, 1.2, 1.0])[:, None, None] * shape * scatter


def test_curves_of_one_shape_collapse_below_the_noise_that_whole_runs_have():
    found = collapse(family(seed=0.05, point=0.001), 1.0)
    assert found.curves_MxSxX.shape == (4, 6, 40)
    assert np.allclose(found.curves_MxSxX[:, :, -1], 1)
    assert found.noise_X == pytest.approx(np.full(40, 0.05), rel=0.4)
    assert found.ratio(FRACTIONS < 0.99) < 0.1


def test_noise_of_single_points_does_not_cancel():
    # Each point carries its own noise and that of its run's end: sqrt(2) times the noise.
    found = collapse(family(point=0.01), 1.0)
    assert found.ratio(FRACTIONS < 0.99) == pytest.approx(math.sqrt(2), rel=0.2)


def test_models_of_different_shapes_do_not_collapse_and_neither_does_a_wrong_floor():
    assert collapse(family(model=0.3, seed=0.02), 1.0).ratio(FRACTIONS < 0.5) > 3
    assert collapse(family(seed=0.02), 0.2).ratio(FRACTIONS < 0.5) > 3 * collapse(family(seed=0.02), 1.0).ratio(
        FRACTIONS < 0.5
    )


def test_the_deviation_is_the_relative_standard_deviation_over_all_runs():
    loss = family(model=0.1, seed=0.03, point=0.01)
    above = loss[:, :, 7] - 0.5
    normal = (above / (loss[:, :, -1] - 0.5)).ravel()
    found = collapse(loss, 0.5)
    assert found.deviation_X[7] == pytest.approx(normal.std(ddof=1) / normal.mean())
    noise = [row.std(ddof=1) / row.mean() for row in above]
    assert found.noise_X[7] == pytest.approx(math.sqrt(np.mean(np.square(noise))))


def test_a_floor_above_a_loss_and_a_single_seed_are_refused():
    with pytest.raises(FitError, match="floor=3 must lie below every loss"):
        collapse(family(), 3.0)
    with pytest.raises(FitError, match="1 seeds have no spread"):
        collapse(family()[:, :1], 0.5)
