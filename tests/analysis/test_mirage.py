"""Planted mirages and planted jumps are told apart, from many seeds and from one; what nothing decides is left open."""

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import norm

from analysis import mirage

SCALES = np.geomspace(1e3, 1e5, 10)


def planted_mirage(draw, seeds, steepness=1.5, length=8):
    """A smooth answer probability, and all of `length` answers right with its power."""
    rng, n = np.random.default_rng(draw), np.repeat(SCALES, seeds)
    p = 0.03 + 0.97 * expit(steepness * np.log(n / 1e4) + 0.15 * rng.standard_normal(len(n)))
    return n, np.log(p), rng.binomial(2000, p**length) / 2000, p**length


def planted_jump(draw, seeds, spread=0.3):
    """Runs that know the skill or do not, at a threshold that differs between runs by `spread` in ln N."""
    rng, n = np.random.default_rng(draw), np.repeat(SCALES, seeds)
    knows = spread * rng.standard_normal(len(n)) < np.log(n / 1e4)
    loss = np.where(knows, 0.1 * np.exp(0.5 * rng.standard_normal(len(n))), 3.4 + 0.05 * rng.standard_normal(len(n)))
    right = rng.binomial(2000, np.where(knows, 0.97, 0.04)) / 2000
    return n, -loss, right, right


@pytest.mark.parametrize("seeds", [1, 4])
@pytest.mark.parametrize("steepness", [1.5, 4.0])
def test_a_smooth_skill_under_a_hard_metric_is_a_mirage(seeds, steepness):
    found = [mirage.diagnose(*planted_mirage(draw, seeds, steepness)) for draw in range(4)]
    assert [each.verdict for each in found] == ["mirage"] * 4
    assert min(each.soft.evidence for each in found) > mirage.DECISIVE


@pytest.mark.parametrize("seeds", [1, 4])
@pytest.mark.parametrize("spread", [0.05, 0.3])
def test_a_skill_that_runs_have_or_have_not_is_a_jump(seeds, spread):
    assert {mirage.diagnose(*planted_jump(draw, seeds, spread)).verdict for draw in range(4)} == {"jump"}


def test_the_levels_and_the_width_are_those_that_were_planted():
    low, high = mirage.two_laws(*planted_jump(0, 8)[:2]).levels
    assert (low, high) == pytest.approx((-3.4, -0.11), abs=0.06)
    n = np.repeat(SCALES, 4)
    score = expit(2.0 * np.log(n / 8e3)) + 0.01 * np.random.default_rng(0).standard_normal(len(n))
    # A logistic curve of slope k in ln N goes from .1 to .9 over 2 ln 9 / k.
    assert mirage.two_laws(n, score).width == pytest.approx(9 ** (2 / 2.0), rel=0.25)


def test_a_score_that_leaps_under_the_soft_metric_as_well_is_no_mirage():
    n, soft, _, _ = planted_mirage(0, 4, steepness=4.0)
    p = np.exp(soft)
    assert mirage.diagnose(n, p, p, p).verdict == "smooth"
    assert mirage.diagnose(n, p, p**8, p**8).verdict == "mirage"


def test_a_smooth_skill_whose_answers_do_not_explain_the_hard_metric_is_left_undecided():
    n, soft, hard, predicted = planted_mirage(0, 4)
    found = mirage.diagnose(n, soft, hard, predicted**3)
    assert found.verdict == "undecided"
    assert found.excess > 0
    assert found.r2 < mirage.PREDICTED


@pytest.mark.parametrize(("hard", "said", "because"), [
    (lambda x: 0.04 * x, "nothing emerges", "largest two scales"),
    (lambda x: 0.3 + 0.7 * x, "already there", "smallest third"),
])  # fmt: skip
def test_a_hard_metric_that_never_rises_and_one_that_is_high_from_the_start_are_told_apart(hard, said, because):
    n, soft, right, predicted = planted_mirage(0, 4)
    found = mirage.diagnose(n, soft, hard(right), hard(predicted))
    assert found.verdict == said
    assert because in found.reason


@pytest.mark.parametrize("seeds", [1, 4])
def test_a_hard_metric_that_rises_as_a_straight_line_is_no_mirage(seeds):
    n, noise = np.repeat(np.geomspace(1e3, 1e5, 20), seeds), np.random.default_rng(0)
    hard = (np.log(n) - np.log(1e3)) / np.log(100) * 0.9 + 0.01 * noise.standard_normal(len(n))
    hard = np.where(n < 5e3, 0.0, hard)  # near chance at the smallest third
    found = mirage.diagnose(n, hard, hard, hard)
    assert found.verdict == "smooth"
    assert "does not leap" in found.reason
    leaping = hard**4
    assert mirage.diagnose(n, hard, leaping, leaping).verdict == "mirage"


def test_steepness_is_that_of_the_planted_curve_and_1_for_a_straight_line():
    u = np.linspace(0, 10, 41)
    for slope in (2.0, 4.0):  # of a logistic curve: slope / 4 at its middle
        assert mirage.steepness(np.exp(u), 3 + 7 * expit(slope * (u - 5))) == pytest.approx(
            10 * slope / 4,
            rel=0.1,  # widths are searched on a grid
        )
    assert mirage.steepness(np.exp(u), u) == pytest.approx(1, abs=0.1)
    assert np.isnan(mirage.steepness(np.exp(u), np.ones(41)))


def test_noise_alone_is_neither_smooth_nor_a_jump_that_is_sure_of_itself():
    rng = np.random.default_rng(0)
    shapes = [mirage.two_laws(SCALES, rng.standard_normal(10)).shape for _ in range(10)]
    assert shapes.count("smooth") <= 1


def test_both_likelihoods_are_the_best_that_an_optimiser_finds():
    n, soft, *_ = planted_jump(1, 3, spread=0.8)
    u, y = np.log(n), (soft - soft.min()) / np.ptp(soft)

    def smooth(v):
        return -norm.logpdf(y, v[0] + v[1] * expit((u - v[2]) / np.exp(v[3])), np.exp(v[4])).sum()

    def jump(v):
        upper = expit((u - v[2]) / np.exp(v[3]))
        density = (1 - upper) * norm.pdf(y, v[0], np.exp(v[4])) + upper * norm.pdf(y, v[1], np.exp(v[4]))
        return -np.log(density).sum()

    starts = [[a, b, place, width, -2] for a, b in ((0, 1),) for place in (8.5, 9.2, 9.8) for width in (-2, -1, 0)]
    best = [max(-minimize(law, start, method="Nelder-Mead", options={"maxiter": 4000}).fun for start in starts)
            for law in (smooth, jump)]  # fmt: skip
    # A grid of places and widths: a little below the optimum.
    assert mirage.two_laws(n, soft).evidence == pytest.approx(best[0] - best[1], abs=1.0)


def test_r_squared_is_one_for_a_perfect_prediction_and_zero_for_the_mean():
    observed = np.array([0.0, 0.2, 0.9])
    assert mirage.r_squared(observed, observed) == 1
    assert mirage.r_squared(observed, np.full(3, observed.mean())) == pytest.approx(0)
    assert np.isnan(mirage.r_squared(np.ones(3), observed))


@pytest.mark.parametrize(("scale", "soft"), [(np.arange(1.0, 5), np.arange(4.0)), (SCALES, np.ones(10)),
                                         (SCALES, np.full(10, np.nan)), (SCALES - 1e3, np.arange(10.0))])  # fmt: skip
def test_what_is_too_little_to_tell_is_refused(scale, soft):
    with pytest.raises(ValueError, match="scale"):
        mirage.two_laws(scale, soft)
