"""Plans: against closed forms of the Chinchilla law, and what they say where the law cannot answer."""

import numpy as np
import pytest

from analysis.fit import FitError
from analysis.laws import CHINCHILLA, DATA_CONSTRAINED, KAPLAN_ND, OVERTRAINING, frontier
from analysis.planning import best_split, flops_for_loss, flops_for_size, plan, surface, tokens_for_loss

LAW = {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658}  # Besiroglu et al. 2024
FLOPS = np.array([1e12, 1e18, 1e21, 1e26])


def draws(number=60, spread=0.02, seed=0):
    rng = np.random.default_rng(seed)
    return {name: value * np.exp(spread * rng.standard_normal(number)) for name, value in LAW.items()}


def test_the_best_split_is_the_closed_form_of_the_chinchilla_law():
    n, d = best_split(surface(CHINCHILLA, LAW), FLOPS)
    expected_n, expected_d, _ = frontier(LAW, FLOPS)
    np.testing.assert_allclose(n, expected_n, rtol=1e-6)
    np.testing.assert_allclose(d, expected_d, rtol=1e-6)
    np.testing.assert_allclose(6 * n * d, FLOPS, rtol=1e-12)


def test_the_best_split_of_kaplans_law_has_no_better_neighbour():
    loss = surface(KAPLAN_ND, {"Nc": 6.4e13, "Dc": 1.8e13, "alphaN": 0.076, "alphaD": 0.103})
    n, d = best_split(loss, FLOPS)
    for step in (0.97, 1.03):
        assert np.all(loss(n * step, d / step) > loss(n, d))


def test_a_law_of_compute_and_tokens_per_parameter_is_planned_as_one_of_n_and_d():
    law = {"E": 1.8, "a": 100.0, "b": 200.0, "eta": 0.17}
    n, d = best_split(surface(OVERTRAINING, law), FLOPS)
    # d/dM (a M^eta + b M^-eta) = 0
    np.testing.assert_allclose(d / n, (law["b"] / law["a"]) ** (1 / (2 * law["eta"])), rtol=1e-5)


def test_the_inverse_questions_invert_the_law():
    loss = surface(CHINCHILLA, LAW)
    n, d, best = frontier(LAW, FLOPS)
    np.testing.assert_allclose(flops_for_size(loss, n), FLOPS, rtol=1e-5)
    np.testing.assert_allclose(flops_for_loss(loss, best), FLOPS, rtol=1e-5)
    np.testing.assert_allclose(tokens_for_loss(loss, n, best), d, rtol=1e-9)
    assert np.isinf(flops_for_loss(loss, np.array(LAW["E"] - 0.01)))
    assert np.isinf(tokens_for_loss(loss, np.array(1e6), np.array(LAW["E"] + 0.01)))


@pytest.mark.parametrize("target", ["flops", "params", "loss"])
def test_each_target_gives_the_same_plan_at_the_same_place(target):
    n, d, best = (float(v) for v in frontier(LAW, 1e21))
    found = plan(CHINCHILLA, LAW, {}, **{target: {"flops": 1e21, "params": n, "loss": best}[target]})
    values = {name: span.value for name, span in found.optimum.items()}
    assert values == pytest.approx({"C": 1e21, "N": n, "D": d, "loss": best, "tokens_per_parameter": d / n}, rel=1e-5)
    assert all(np.isnan(span.low) for span in found.optimum.values())  # no draws, no intervals


def test_being_off_costs_what_the_law_says_and_is_worth_less_compute():
    found = plan(CHINCHILLA, LAW, draws(), flops=1e21)
    n, d, best = (float(v) for v in frontier(LAW, 1e21))
    assert [one.factor for one in found.off] == [0.5, 2.0]
    for one in found.off:
        there = float(CHINCHILLA.predict(LAW, {"N": n * one.factor, "D": d / one.factor}))
        assert one.spans["loss"].value == pytest.approx(there, rel=1e-9)
        assert one.spans["penalty"].value == pytest.approx(there - best, rel=1e-6)
        assert 0 < one.spans["penalty"].low <= one.spans["penalty"].value <= one.spans["penalty"].high
        equal = float(frontier(LAW, 1e21 * one.spans["equivalent"].value)[2])
        assert equal == pytest.approx(there, rel=1e-9)
        assert one.spans["equivalent"].high < 1


def test_smaller_models_reach_the_same_loss_with_more_compute_or_never():
    found = plan(CHINCHILLA, LAW, draws(), flops=1e21)
    best = found.optimum["loss"].value
    compute = [one.spans["compute"].value for one in found.overtrained]
    assert 1 < compute[0] < compute[1] < compute[2]
    for one in found.overtrained:
        at = {"N": one.spans["N"].value, "D": one.spans["D"].value}
        assert float(CHINCHILLA.predict(LAW, at)) == pytest.approx(best, rel=1e-9)
        assert one.spans["C"].value == pytest.approx(6 * at["N"] * at["D"])
    steep = LAW | {"alpha": 1.2, "A": 3e8}  # where size is all, a quarter of it can never do
    assert np.isinf(plan(CHINCHILLA, steep, {}, flops=1e21).overtrained[-1].spans["compute"].value)


def test_intervals_hold_the_law_and_widen_with_reach_and_away_from_the_data():
    narrow, wide = (plan(CHINCHILLA, LAW, draws(400), flops=1e21, reach=r).optimum["N"] for r in (1.0, 1.5))
    assert wide.low < narrow.low < narrow.value < narrow.high < wide.high
    each = frontier(draws(400), 1e21)[0]
    below = np.mean(each < narrow.low), np.mean(each < narrow.high)
    assert below[1] - below[0] == pytest.approx(0.9, abs=0.02)


def test_draws_that_cannot_reach_a_loss_make_its_interval_infinite_and_are_counted():
    some = draws(200)
    target = float(np.quantile(some["E"], 0.9))
    found = plan(CHINCHILLA, LAW, some, loss=target)
    assert found.unreachable == pytest.approx(0.1, abs=0.01)
    assert np.isinf(found.optimum["C"].high)
    assert np.isfinite(found.optimum["C"].low)
    assert any("cannot reach" in remark for remark in found.remarks)


def test_a_plan_far_outside_the_fitted_range_says_so():
    fitted = {"N": (1e7, 1e9), "D": (1e8, 1e12), "C": (1e18, 1e21)}
    near, far = (plan(CHINCHILLA, LAW, {}, flops=c, fitted=fitted).remarks for c in (1e20, 1e24))
    assert near == ()
    assert [line.split()[1] for line in far] == ["N", "C"]
    assert "1e+03 times above" in far[1]


BAD = {
    "none": ({}, "one target"),
    "two": ({"flops": 1e20, "loss": 3.0}, "one target"),
    "negative": ({"flops": -1.0}, "flops=-1"),
    "NaN": ({"params": np.nan}, "params=nan"),
    "beyond all compute": ({"flops": 1e300}, r"flops=1e\+300 is out of reach: the law has no best run for it"),
    "worse than any run": ({"loss": 1e6}, r"loss=1e\+06 is out of reach: the law has no best run for it"),
    "below the floor": ({"loss": 1.8}, r"loss=1.8 is not above the fitted floor E = 1.817"),
}


@pytest.mark.parametrize(("target", "message"), BAD.values(), ids=BAD)
def test_an_impossible_target_is_refused_in_one_line(target, message):
    with pytest.raises(FitError, match=message) as refusal:
        plan(CHINCHILLA, LAW, {}, **target)
    assert "\n" not in str(refusal.value)


def test_a_law_that_needs_more_than_n_and_d_is_refused():
    with pytest.raises(FitError, match="one of N, D, U"):
        surface(DATA_CONSTRAINED, LAW)
