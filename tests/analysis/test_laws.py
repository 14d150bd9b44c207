"""The laws and what follows from them, against the papers' formulas, each other, and numeric minimisation."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from analysis.fit import fit
from analysis.laws import (
    BNSL_2,
    CHINCHILLA,
    CHINCHILLA_EQUAL,
    DATA_CONSTRAINED,
    KAPLAN_ND,
    LAWS,
    OVERTRAINING,
    Law,
    Parameter,
    coefficient,
    exponent,
    exponents,
    frontier,
)
from tests.analysis.planted import PLANTED

HOFFMANN = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}
EXPONENTS = st.floats(0.05, 1.5)


def test_chinchilla_law_is_the_sum_written_in_the_paper():
    n, d = np.array([7e10, 1e9]), np.array([1.4e12, 2e10])
    written = 1.69 + 406.4 / n**0.34 + 410.7 / d**0.28
    np.testing.assert_allclose(CHINCHILLA.predict(HOFFMANN, {"N": n, "D": d}), written, rtol=1e-14)


def test_kaplan_law_of_both_is_the_formula_of_the_paper_and_has_its_limits():
    p, n, d = PLANTED["kaplan_nd"][0], np.array([1e8, 1e9]), np.array([1e9, 1e11])
    written = ((p["Nc"] / n) ** (p["alphaN"] / p["alphaD"]) + p["Dc"] / d) ** p["alphaD"]
    np.testing.assert_allclose(KAPLAN_ND.predict(p, {"N": n, "D": d}), written, rtol=1e-12)
    for one, other, name in (("N", "D", "kaplan_n"), ("D", "N", "kaplan_d")):
        alone = {f"{one}c": p[f"{one}c"], f"alpha{one}": p[f"alpha{one}"]}
        ample = KAPLAN_ND.predict(p, {one: 1e9, other: 1e60})
        assert ample == pytest.approx(float(LAWS[name].predict(alone, {one: 1e9})), rel=1e-5)


def test_broken_law_is_the_formula_of_the_paper():
    p, x = PLANTED["bnsl_2"][0], np.geomspace(1, 1e7, 9)
    written = p["b"] * x ** -p["c0"]
    for i in "12":
        written *= (1 + (x / p["d" + i]) ** (1 / p["f" + i])) ** (-p["c" + i] * p["f" + i])
    np.testing.assert_allclose(BNSL_2.predict(p, {"x": x}), p["a"] + written, rtol=1e-12)


def test_data_constrained_law_is_the_formula_of_the_paper():
    p, n, u = PLANTED["data_constrained"][0], 1e9, 2e9
    log_g = np.log(p["alpha"] * p["A"] / (p["beta"] * p["B"])) / (p["alpha"] + p["beta"])
    base = np.exp(log_g + p["beta"] / p["alpha"] * (np.log(u) + log_g))  # compute-optimal for u tokens
    assert frontier(p, 6 * base * u)[0] == pytest.approx(base)
    for d in (2e9, 8e9, 2e11):
        of_n = base * (1 + p["RN"] * (1 - np.exp(-(n / base - 1) / p["RN"]))) if n > base else n
        of_d = u * (1 + p["RD"] * (1 - np.exp(-(d / u - 1) / p["RD"])))
        written = p["E"] + p["A"] / of_n ** p["alpha"] + p["B"] / of_d ** p["beta"]
        assert DATA_CONSTRAINED.predict(p, {"N": n, "D": d, "U": u}) == pytest.approx(written, rel=1e-12)
    assert base < n


def test_data_that_does_not_repeat_gives_the_chinchilla_law():
    p, n, d = PLANTED["data_constrained"][0], np.array([1e6, 1e7]), np.array([1e10, 1e11])
    plain = CHINCHILLA.predict(p, {"N": n, "D": d})
    np.testing.assert_allclose(DATA_CONSTRAINED.predict(p, {"N": n, "D": d, "U": 10 * d}), plain, rtol=1e-12)


def test_overtraining_form_is_chinchilla_with_equal_exponents_in_other_parameters():
    """N = (C / 6M)^(1/2) and D = (C M / 6)^(1/2), so eta = alpha / 2, a = A 6^eta and b = B 6^eta."""
    p, eta = {"E": 1.7, "A": 300.0, "B": 500.0, "alpha": 0.3}, 0.15
    n, d = np.array([1e7, 1e8, 1e9]), np.array([3e8, 1e11, 1e10])
    same = {"E": 1.7, "a": 300 * 6**eta, "b": 500 * 6**eta, "eta": eta}
    np.testing.assert_allclose(
        OVERTRAINING.predict(same, {"C": 6 * n * d, "M": d / n}),
        CHINCHILLA_EQUAL.predict(p, {"N": n, "D": d}),
        rtol=1e-12,
    )


def test_overtraining_fit_is_the_fit_of_chinchilla_with_equal_exponents():
    table = PLANTED["chinchilla"][1]
    n, d = table["N"], table["D"]
    loss = CHINCHILLA.predict(PLANTED["chinchilla"][0], table) * np.exp(0.02 * np.sin(np.arange(len(n))))
    one = fit(CHINCHILLA_EQUAL, table, loss, starts=30, bootstraps=0)
    other = fit(OVERTRAINING, {"C": 6 * n * d, "M": d / n}, loss, starts=30, bootstraps=0)
    assert other.objective == pytest.approx(one.objective, rel=1e-9)
    assert other.best["eta"] == pytest.approx(one.best["alpha"] / 2, rel=1e-6)
    assert other.best["a"] == pytest.approx(one.best["A"] * 6 ** other.best["eta"], rel=1e-5)


@pytest.mark.parametrize("name", LAWS)
def test_a_law_says_all_that_one_must_know(name):
    law, (truth, table) = LAWS[name], PLANTED[name]
    assert law.name == name
    assert set(law.names) == set(truth)
    assert set(law.variables) == set(table)
    assert "arXiv:" in law.citation
    assert all(p.unit for p in law.parameters)
    assert all(p.bounds[0] <= p.start[0] < p.start[1] <= p.bounds[1] for p in law.parameters)
    assert all(variable in law.formula for variable in law.variables)


@pytest.mark.parametrize("name", LAWS)
def test_internal_coordinates_and_natural_parameters_are_inverse_and_predict_the_same(name):
    law, (truth, table) = LAWS[name], PLANTED[name]
    logs_VxM = np.log([table[v] for v in law.variables])
    centre = np.append(logs_VxM.mean(axis=1), 1.1)
    theta_1xp = law.internal({k: np.array([v]) for k, v in truth.items()}, centre)
    back = law.natural(theta_1xp, centre)
    assert theta_1xp.shape == (1, len(truth))
    assert {k: float(v[0]) for k, v in back.items()} == pytest.approx(truth, rel=1e-10)
    middle = dict(zip(law.variables, centre, strict=False))
    centred = dict(zip(law.variables, logs_VxM - centre[:-1, None], strict=True))
    inner = law.log_loss(dict(zip(law.names, theta_1xp[0], strict=True)), centred, middle) + 1.1
    np.testing.assert_allclose(inner, np.log(law.predict(truth, table)), rtol=1e-10)


@pytest.mark.parametrize("name", LAWS)
def test_parameters_and_variables_broadcast_in_a_prediction(name):
    law, (truth, table) = LAWS[name], PLANTED[name]
    many = {k: v * np.array([[1.0], [1.01], [1.02]]) for k, v in truth.items()}
    loss = law.predict(many, table)
    assert loss.shape == (3, len(table[law.variables[0]]))
    for i in range(3):
        np.testing.assert_allclose(loss[i], law.predict({k: v[i, 0] for k, v in many.items()}, table), rtol=1e-12)


@pytest.mark.parametrize("name", [*list(LAWS)[:-1], pytest.param("bnsl_3", marks=pytest.mark.slow)])
def test_planted_parameters_come_back_without_noise(name):
    law, (truth, table) = LAWS[name], PLANTED[name]
    # a curve's starts are few here, for speed, and begin around the truth
    starts = {k: v * np.linspace(0.8, 1.25, 9) for k, v in truth.items()} if law.curve else 60
    fitted = fit(law, table, law.predict(truth, table), starts=starts, bootstraps=0)
    assert fitted.best == pytest.approx(truth, rel=1e-6)


def test_a_parameter_without_effect_on_the_table_is_not_identified():
    """Fewer parameters than are compute-optimal for the tokens everywhere: nothing depends on RN."""
    table = {"N": np.tile(np.geomspace(1e4, 1e6, 6), 12), "D": np.repeat(np.geomspace(1e9, 1e12, 12), 6)}
    table["U"] = np.minimum(table["D"], 3e10) / np.tile([1, 2], 36)
    truth = PLANTED["data_constrained"][0]
    loss = DATA_CONSTRAINED.predict(truth, table)
    starts = {name: np.array([value, 1.05 * value]) for name, value in truth.items()}
    fitted = fit(DATA_CONSTRAINED, table, loss, starts=starts, bootstraps=2)
    assert fitted.parameters["RN"].remark == "does not change the losses of this table"
    assert fitted.best["RD"] == pytest.approx(15, rel=1e-4)


def test_breaks_are_reported_in_their_order():
    truth, table = PLANTED["bnsl_2"]
    swapped = {**truth, **{f"{k}{i}": np.array([truth[f"{k}{j}"]]) for k in "cdf" for i, j in ((1, 2), (2, 1))}}
    swapped = {k: np.atleast_1d(v) for k, v in swapped.items()}
    fitted = fit(BNSL_2, table, BNSL_2.predict(truth, table), starts=swapped, bootstraps=0)
    assert fitted.best == pytest.approx(truth, rel=1e-6)


def test_a_law_is_added_in_ten_lines():
    shifted = Law(
        name="shifted",
        formula="L(x) = A (1 + x / s)^-alpha",
        citation="made up here",
        variables=("x",),
        parameters=(
            coefficient("A", "nats"),
            exponent("alpha"),
            Parameter("s", "x", "place", (0, 1), (0.1, 0.9), 3, "x"),
        ),
        terms=(("A", {}),),
        curve=lambda at, log, _, xp: at["A"] - at["alpha"] * xp.logaddexp(0.0, log["x"] - at["s"]),
    )
    truth, table = {"A": 5.0, "alpha": 0.4, "s": 100.0}, {"x": np.geomspace(1, 1e5, 20)}
    loss = 5 * (1 + table["x"] / 100) ** -0.4
    np.testing.assert_allclose(shifted.predict(truth, table), loss, rtol=1e-13)
    assert fit(shifted, table, loss, starts=40, bootstraps=0).best == pytest.approx(truth, rel=1e-6)


@given(st.floats(0.1, 3), EXPONENTS, EXPONENTS, st.floats(15, 60))
def test_frontier_is_the_minimum_along_fixed_compute(irreducible, alpha, beta, log_flops):
    parameters = {"E": irreducible, "A": 300.0, "B": 700.0, "alpha": alpha, "beta": beta}
    flops = np.exp(log_flops)
    n, d, loss = frontier(parameters, flops)

    def reducible(log_n):  # without E, beside which the minimum may be too shallow to see in float64
        at = {"N": np.exp(log_n), "D": flops / 6 / np.exp(log_n)}
        return CHINCHILLA.predict(parameters | {"E": 1e-300}, at)

    numeric = minimize_scalar(reducible, bracket=(np.log(n) - 1, np.log(n) + 1.5), tol=1e-9)
    assert 6 * n * d == pytest.approx(flops, rel=1e-10)
    assert loss == pytest.approx(irreducible + numeric.fun, rel=1e-12)
    assert np.log(n) == pytest.approx(numeric.x, abs=1e-5)


@given(EXPONENTS, EXPONENTS)
def test_frontier_grows_with_the_exponents_a_and_b_which_sum_to_one(alpha, beta):
    parameters = HOFFMANN | {"alpha": alpha, "beta": beta}
    a, b = exponents(parameters)
    n, d, _ = frontier(parameters, np.array([1e18, 1e21]))
    assert a + b == pytest.approx(1)
    assert np.log10(n[1] / n[0]) / 3 == pytest.approx(a)
    assert np.log10(d[1] / d[0]) / 3 == pytest.approx(b)


def test_equal_exponents_share_compute_equally():
    assert exponents({"alpha": 0.37, "beta": 0.37}) == (0.5, 0.5)
