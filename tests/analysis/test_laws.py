"""The Chinchilla law and what follows from it, against closed forms, finite differences and numeric minimisation."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from analysis.laws import CHINCHILLA, exponents, frontier, log_loss

HOFFMANN = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}
EXPONENTS = st.floats(0.05, 1.5)


def test_chinchilla_law_is_the_sum_written_in_the_paper():
    n, d = np.array([7e10, 1e9]), np.array([1.4e12, 2e10])
    written = 1.69 + 406.4 / n**0.34 + 410.7 / d**0.28
    np.testing.assert_allclose(CHINCHILLA.predict(HOFFMANN, {"N": n, "D": d}), written, rtol=1e-14)


def test_internal_coordinates_and_natural_parameters_are_inverse():
    centre = np.array([18.0, 22.0, 1.1])
    theta_1xp = CHINCHILLA.internal({k: np.array([v]) for k, v in HOFFMANN.items()}, centre)
    back = CHINCHILLA.natural(theta_1xp, centre)
    assert theta_1xp.shape == (1, 5)
    assert {k: float(v[0]) for k, v in back.items()} == pytest.approx(HOFFMANN, rel=1e-13)


def test_internal_coordinates_predict_the_same_loss():
    rng = np.random.default_rng(0)
    logs_VxM = np.stack([rng.uniform(16, 24, 9), rng.uniform(20, 28, 9)])
    centre = np.append(logs_VxM.mean(axis=1), 1.1)
    theta_1xp = CHINCHILLA.internal({k: np.array([v]) for k, v in HOFFMANN.items()}, centre)
    inner = log_loss(theta_1xp, CHINCHILLA.design(logs_VxM - centre[:2, None]))[0][0] + centre[2]
    outer = np.log(CHINCHILLA.predict(HOFFMANN, dict(zip("ND", np.exp(logs_VxM), strict=True))))
    np.testing.assert_allclose(inner, outer, rtol=1e-13)


def test_slope_of_log_loss_agrees_with_finite_differences():
    rng = np.random.default_rng(1)
    design = CHINCHILLA.design(rng.normal(size=(2, 7)))
    theta_1xp = np.array([[-0.5, -1.2, -0.8, 0.4, 0.3]])
    _, slope_SxMxp, _ = log_loss(theta_1xp, design)
    for i, step in enumerate(1e-6 * np.eye(5)):
        difference = (log_loss(theta_1xp + step, design)[0] - log_loss(theta_1xp - step, design)[0]) / 2e-6
        np.testing.assert_allclose(slope_SxMxp[..., i], difference, atol=1e-9)


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
