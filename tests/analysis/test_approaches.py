"""The approaches side by side: planted laws, hand-made parabolas, and what they refuse."""

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize, nnls

from analysis.approaches import akima_minimum, approaches, parabola_minimum, side_by_side
from analysis.fit import FitError
from analysis.laws import CHINCHILLA, exponents, frontier
from analysis.projection import non_negative, project

EVEN = {"E": 1.7, "A": 300.0, "B": 300.0, "alpha": 0.35, "beta": 0.35}
UNEVEN = {"E": 1.7, "A": 400.0, "B": 400.0, "alpha": 0.5, "beta": 0.25}


def isoflop(law, *, noise=0.0, sizes=7, reach=6.0, drift=0.0, budgets=4, seeds=1, seed=0):
    """Budgets whose sizes spread around the optimum by a factor `reach`, off it by `drift` per e-fold of compute."""
    rng, rows = np.random.default_rng(seed), []
    for k, c in enumerate(np.geomspace(1e17, 1e20, budgets)):
        centre = float(frontier(law, c)[0]) * (c / 3e18) ** drift
        for n in centre * np.geomspace(1 / reach, reach, sizes):
            rows += [{"N": n, "D": c / (6 * n), "C": c, "budget": k, "seed": s} for s in range(seeds)]
    runs = pd.DataFrame(rows)
    runs["run_id"] = [f"run{i}" for i in range(len(runs))]
    runs["loss"] = CHINCHILLA.predict(law, runs) * np.exp(noise * rng.standard_normal(len(runs)))
    return runs


def curves_of(runs, law):
    """Logged losses of each run over its last two decades of compute, each that of a run that ends there."""
    shares = np.geomspace(0.01, 1, 25)
    rows = [{"run_id": r.run_id, "D": r.D * s, "N": r.N} for r in runs.itertuples() for s in shares]
    curves = pd.DataFrame(rows)
    return curves.assign(loss=CHINCHILLA.predict(law, curves))[["run_id", "D", "loss"]]


def test_all_approaches_find_the_exponents_of_a_symmetric_law():
    runs = isoflop(EVEN, sizes=9)
    found = approaches(runs, curves_of(runs, EVEN), bootstraps=0, starts=20)
    assert list(found) == ["envelope", "parabola", "akima", "parametric", "projection"]
    for name, one in found.items():
        assert one.a.value == pytest.approx(0.5, abs=0.03 if name == "envelope" else 1e-5), name
        assert one.a.value + one.b.value == pytest.approx(1, abs=1e-6), name
        if name != "envelope":  # it sees only the sizes that there are
            assert one.tokens_per_parameter.value == pytest.approx(1, rel=0.01), name
    assert len(found["parabola"].optima) == len(found["akima"].optima) == 4
    np.testing.assert_allclose(
        found["parabola"].optima["N"], frontier(EVEN, found["parabola"].optima["C"])[0], rtol=0.01
    )


def test_the_bias_of_the_parabola_is_what_it_gets_wrong_on_the_law_itself():
    runs = isoflop(UNEVEN, drift=0.2, reach=10, sizes=21)
    found = approaches(runs, bootstraps=0, starts=20)
    true_a = float(exponents(UNEVEN)[0])
    parabola, akima = found["parabola"], found["akima"]
    assert abs(parabola.bias) > 0.001
    assert parabola.a.value - true_a == pytest.approx(
        parabola.bias, abs=1e-6
    )  # no noise: all that is wrong is the bias
    assert abs(akima.bias) < abs(parabola.bias)
    assert abs(found["parametric"].bias) < 1e-6
    assert abs(found["projection"].bias) < 1e-5
    n, d, _ = frontier(UNEVEN, parabola.flops)
    assert parabola.tokens_per_parameter.value / (d / n) == pytest.approx(parabola.ratio_bias, rel=1e-5)
    assert abs(np.log(parabola.ratio_bias)) > 0.1


def test_around_every_optimum_alike_a_parabola_has_the_right_slope_in_the_wrong_place():
    parabola = approaches(isoflop(UNEVEN), bootstraps=0, starts=20)["parabola"]
    assert abs(parabola.bias) < 1e-9
    assert abs(np.log(parabola.ratio_bias)) > 0.1


def test_intervals_hold_the_truth_and_every_budget():
    runs = isoflop(EVEN, noise=0.002, seeds=3)
    found = approaches(runs, bootstraps=100, starts=20)
    for name in ("parabola", "akima", "parametric", "projection"):
        one = found[name]
        assert one.a.low < one.a.value < one.a.high, name
        assert one.a.low - 0.02 < 0.5 < one.a.high + 0.02, name
        assert one.remark == "", name
    again = approaches(runs, bootstraps=100, starts=20)
    assert side_by_side(found).equals(side_by_side(again))


def test_groups_are_resampled_as_wholes():
    runs = isoflop(EVEN, noise=0.001, seeds=6)
    shift = np.random.default_rng(0).normal(0, 0.02, 6)  # all runs of a seed share it, and tilt with size
    tilt = shift[runs["seed"]] * np.log(runs["N"] / runs.groupby("budget")["N"].transform("median"))
    runs["loss"] *= np.exp(tilt)
    alone, together = (approaches(runs, groups=g, bootstraps=100, starts=10) for g in (None, "seed"))
    for name in ("parabola", "projection"):
        ratio = "tokens_per_parameter"
        widths = [np.log(getattr(f[name], ratio).high / getattr(f[name], ratio).low) for f in (alone, together)]
        assert widths[1] > 1.3 * widths[0], name


def test_without_budgets_curves_or_a_separating_design_an_approach_says_why_it_has_no_number():
    runs = isoflop(EVEN).drop(columns="budget")
    found = approaches(runs, bootstraps=0, starts=10)
    assert "no training curves" in found["envelope"].remark
    assert "no column `budget`" in found["parabola"].remark
    assert np.isnan(found["parabola"].a.value)
    runs = isoflop(EVEN).assign(D=lambda t: 20 * t["N"])
    assert "vary D at fixed N" in approaches(runs, bootstraps=0, starts=10)["parametric"].remark


def test_projection_says_where_a_term_or_an_exponent_is_at_its_end():
    runs = isoflop(UNEVEN, noise=0.002)
    assert approaches(runs, bootstraps=20, starts=10)["projection"].remark == ""
    worse_with_data = runs.assign(loss=2 + 30 / runs["N"] ** 0.2 + 1e-3 * np.log(runs["D"]))
    found = approaches(worse_with_data, bootstraps=20, starts=10)["projection"]
    assert found.remark.startswith("not identified: a term is 0, or an exponent at an end of (0.01, 3.0), in ")


def test_a_budget_whose_best_size_lies_outside_is_refused_and_the_others_are_used():
    runs = isoflop(EVEN)
    small = (runs["budget"] == 0) & (runs["N"] > runs.loc[runs["budget"] == 0, "N"].median() / 2)
    found = approaches(runs[~small], bootstraps=0, starts=10)
    for name, words in (
        ("parabola", "needs at least 3|is not between"),
        ("akima", "lowest loss is at the largest N|3"),
    ):
        assert len(found[name].optima) == 3
        assert pd.Series(found[name].refused).str.contains(words).all()
        assert len(found[name].refused) == 1
        assert found[name].a.value == pytest.approx(0.5, abs=1e-3)


X = np.log(np.array([1e6, 2e6, 4e6, 8e6, 1.6e7]))
ONCE = np.ones(5)


def test_the_parabola_finds_its_own_vertex_and_counts_weigh_the_points():
    y = 3 + 0.2 * (X - X[1] - 0.3) ** 2
    assert parabola_minimum(X, y, ONCE) == pytest.approx(X[1] + 0.3)
    bent = y + np.array([0.02, -0.01, 0.0, 0.01, -0.02])
    twice = parabola_minimum(X, bent, np.array([1, 2, 1, 1, 0]))
    assert twice == pytest.approx(parabola_minimum(X[[0, 1, 1, 2, 3]], bent[[0, 1, 1, 2, 3]], ONCE))


def test_akima_goes_through_the_means_and_finds_an_interior_minimum():
    y = np.abs(X - X[2]) * 0.1 + 3
    assert akima_minimum(X, y, ONCE) == pytest.approx(X[2], abs=1e-5)  # a kink
    # two runs of one size count by their mean
    assert akima_minimum(np.append(X, X[2]), np.append(y, y[2] + 0.2), np.ones(6)) == pytest.approx(
        akima_minimum(X, np.where(np.arange(5) == 2, y + 0.1, y), ONCE)
    )


@pytest.mark.parametrize(
    ("minimum", "loss", "message"),
    [
        (parabola_minimum, 3 - 0.1 * (X - X[2]) ** 2, "opens downwards"),
        (parabola_minimum, 3 + 0.1 * (X - X[4] - 1) ** 2, "is not between the smallest N"),
        (akima_minimum, 3 - 0.1 * X, "at the largest N"),
        (akima_minimum, 3 + 0.1 * X, "at the smallest N"),
    ],
)
def test_no_interior_minimum_is_refused_with_a_reason(minimum, loss, message):
    with pytest.raises(FitError, match=message):
        minimum(X, loss, ONCE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop(columns="C"), "runs lack C"),
        (lambda t: t.assign(loss=-t["loss"]), r"runs: column loss holds -.* \(row 0\)"),
        (lambda t: t.assign(N="many"), r"runs: column N holds many"),
        (lambda t: t[:0], "runs are empty"),
    ],
)
def test_a_table_that_is_not_one_is_refused_in_one_line(change, message):
    with pytest.raises(FitError, match=message):
        approaches(change(isoflop(EVEN)), bootstraps=0)


def test_curves_that_cannot_be_joined_are_refused():
    runs = isoflop(EVEN)
    with pytest.raises(FitError, match="curves lack C or D"):
        approaches(runs, curves_of(runs, EVEN).drop(columns="D"), bootstraps=0)
    with pytest.raises(FitError, match="runs lack run_id"):
        approaches(runs.drop(columns="run_id"), curves_of(runs, EVEN), bootstraps=0)


# --- variable projection -------------------------------------------------------------------------------------------


def test_projection_recovers_a_planted_law():
    runs = isoflop(UNEVEN)
    found = project(runs["N"], runs["D"], runs["loss"])
    for name, value in UNEVEN.items():
        assert found[name][0] == pytest.approx(value, rel=1e-4), name


def test_projection_is_no_worse_than_scipys_non_negative_least_squares_inside_a_search():
    runs = isoflop(UNEVEN, noise=0.01, seed=3)
    n, d, loss = (runs[name].to_numpy() for name in ("N", "D", "loss"))

    def objective(log_powers):
        alpha, beta = np.exp(log_powers)
        columns = np.stack([np.ones_like(n), (n / 1e7) ** -alpha, (d / 1e9) ** -beta], axis=1) / loss[:, None]
        return nnls(columns, np.ones(len(n)))[1] ** 2

    starts = np.log([[0.3, 0.3], [0.6, 0.2], [0.2, 0.8]])
    options = {"xatol": 1e-9, "fatol": 1e-16}
    oracle = min(minimize(objective, first, method="Nelder-Mead", options=options).fun for first in starts)
    assert project(n, d, loss)["objective"][0] <= oracle * (1 + 1e-7)


def test_counting_a_point_twice_is_having_it_twice():
    runs = isoflop(EVEN, noise=0.01)
    counts = np.random.default_rng(0).multinomial(len(runs), np.full(len(runs), 1 / len(runs)))
    rows = runs.loc[runs.index.repeat(counts)]
    counted = project(runs["N"], runs["D"], runs["loss"], counts[None])
    repeated = project(rows["N"], rows["D"], rows["loss"])
    for name in EVEN:
        assert counted[name][0] == pytest.approx(repeated[name][0], rel=1e-3), name


def test_small_non_negative_problems_agree_with_scipy():
    rng = np.random.default_rng(1)
    columns, target = rng.standard_normal((40, 9, 3)), rng.standard_normal((40, 9))
    gram, right = columns.transpose(0, 2, 1) @ columns, (columns * target[:, :, None]).sum(axis=1)
    value, best = non_negative(gram, right, (target**2).sum(axis=1))
    for i in range(40):
        expected, norm = nnls(columns[i], target[i])
        if expected.any():  # all three zero is no face of ours: a loss is positive, so E, A or B is
            np.testing.assert_allclose(best[i], expected, atol=1e-9)
            assert value[i] == pytest.approx(norm**2)
