"""The optimiser, against finite differences, scipy, plain formulas, and minimisation with one parameter fixed."""

import numpy as np
import pytest
from scipy.optimize import minimize, minimize_scalar

from analysis.laws import CHINCHILLA, LAWS
from analysis.solve import OBJECTIVE_NAMES, Objective, Problem, minimise, spread_starts
from tests.analysis.planted import PLANTED


def posed(name="chinchilla", noise=0.02, objective: Objective = "huber", delta=1e-3, seed=0):
    """A law's planted table with log-normal noise as a problem."""
    law, (truth, table) = LAWS[name], PLANTED[name]
    y = np.log(law.predict(truth, table))
    y = y + noise * np.random.default_rng(seed).normal(size=y.shape)
    logs = np.log([table[v] for v in law.variables])
    centre = np.append(logs.mean(axis=1), y.mean())
    return Problem(law, logs - centre[:-1, None], y - centre[-1], centre, objective, delta)


def ones(problem, rows=1):
    return np.ones((rows, len(problem.y_M)))


def plain(problem, theta):
    """Each point's loss (S, M), as the formulas are written."""
    residual, delta = problem.losses(theta) - problem.y_M, problem.delta
    if problem.objective == "squared":
        return np.exp(2 * problem.centre[-1]) * (np.exp(problem.losses(theta)) - np.exp(problem.y_M)) ** 2 / 2
    if problem.objective == "squared_log":
        return residual**2 / 2
    return np.where(abs(residual) < delta, residual**2 / 2, delta * (abs(residual) - delta / 2))


def evaluate(problem, theta, weights, newton=True):
    rows = len(theta)
    return problem.evaluate(theta, weights, np.full(rows, newton), np.full(rows, problem.delta))


@pytest.mark.parametrize(
    ("name", "objective"), [*(("chinchilla", o) for o in OBJECTIVE_NAMES), ("kaplan_nd", "squared")]
)
def test_objectives_are_the_plain_formulas(name, objective):
    problem = posed(name, objective=objective, delta=0.02 if objective == "huber" else np.inf)
    theta = spread_starts(problem, 3)
    weights = np.random.default_rng(0).uniform(0.5, 2, (3, len(problem.y_M)))
    np.testing.assert_allclose(
        evaluate(problem, theta, weights)[0], (weights * plain(problem, theta)).sum(axis=1), rtol=1e-12
    )


@pytest.mark.parametrize(
    ("name", "objective", "delta"),
    [
        ("chinchilla", "huber", 1e-2),
        ("chinchilla", "squared_log", np.inf),
        ("chinchilla", "squared", np.inf),
        ("overtraining", "huber", np.inf),
        ("kaplan_nd", "huber", 1e-2),
        ("data_constrained", "squared_log", np.inf),
        ("bnsl_1", "huber", 1e-2),
    ],
)
def test_gradient_and_hessian_agree_with_finite_differences(name, objective, delta):
    problem = posed(name, objective=objective, delta=delta)
    theta = problem.law.internal(PLANTED[name][0], problem.centre)[None] + 0.01
    weights = np.random.default_rng(3).integers(0, 3, (1, len(problem.y_M))).astype(float)
    _, gradient, hessian = evaluate(problem, theta, weights)
    for i, step in enumerate(1e-6 * np.eye(theta.shape[1])):
        up, down = evaluate(problem, theta + step, weights), evaluate(problem, theta - step, weights)
        assert gradient[0, i] == pytest.approx((up[0] - down[0])[0] / 2e-6, rel=1e-5, abs=1e-8)
        np.testing.assert_allclose(hessian[0, i], (up[1] - down[1])[0] / 2e-6, rtol=1e-4, atol=1e-6)


def test_the_gauss_newton_matrix_of_the_huber_loss_touches_it_from_above():
    problem = posed(delta=5e-3)
    theta = problem.law.internal(PLANTED["chinchilla"][0], problem.centre)[None]
    value, gradient, majoriser = evaluate(problem, theta, ones(problem), newton=False)
    for direction in np.random.default_rng(0).normal(size=(5, 5)):
        step = 1e-3 * direction / np.sqrt(direction @ majoriser[0] @ direction)
        bound = value[0] + gradient[0] @ step + step @ majoriser[0] @ step / 2
        assert evaluate(problem, theta + step, ones(problem))[0][0] <= bound * (1 + 1e-6)


@pytest.mark.parametrize(
    ("name", "noise", "objective", "delta"),
    [
        ("chinchilla", 0.01, "huber", 1e-3),
        ("chinchilla", 0.03, "squared", np.inf),
        ("saturating", 0.02, "huber", 1e-3),
        ("kaplan_nd", 0.02, "huber", 1e-3),
        ("data_constrained", 0.005, "squared_log", np.inf),
        ("bnsl_1", 0.01, "huber", 1e-2),
    ],
)
def test_optimum_is_no_worse_than_scipy_from_the_same_starts(name, noise, objective, delta):
    problem = posed(name, noise, objective, delta)
    starts = spread_starts(problem, 2)

    def of(theta):
        value = plain(problem, theta[None])[0]
        return value.sum() * 1e4  # scipy's stopping rules are absolute

    oracle = min(minimize(of, s, method="L-BFGS-B", bounds=problem.bounds).fun / 1e4 for s in starts)
    theta, objective_S, gradient = minimise(problem, ones(problem, 2), starts)
    assert objective_S.min() <= oracle * (1 + 1e-9)
    assert gradient[objective_S.argmin()] < 1e-7
    assert np.all((theta >= problem.bounds[:, 0]) & (theta <= problem.bounds[:, 1]))


@pytest.mark.parametrize("noise", [0.003, 0.02, 0.1])
def test_every_start_ends_where_the_gradient_vanishes(noise):
    problem = posed(noise=noise, seed=2)
    _, objective, gradient = minimise(problem, ones(problem, 60), spread_starts(problem, 60))
    assert gradient.max() < 1e-7
    assert np.mean(objective <= objective.min() * (1 + 1e-6)) > 0.9


def test_rows_do_not_depend_on_their_company():
    problem = posed()
    starts = spread_starts(problem, 700)  # more than are worked on at once, on several threads
    weights = np.random.default_rng(0).integers(1, 3, (700, len(problem.y_M))).astype(float)
    together = minimise(problem, weights, starts)[1]
    some = [0, 350, 699]
    alone = [minimise(problem, weights[i : i + 1], starts[i : i + 1])[1][0] for i in some]
    np.testing.assert_allclose(together[some], alone, rtol=1e-9)
    assert np.array_equal(together, minimise(problem, weights, starts)[1])


def test_no_rows_give_no_results():
    problem = posed()
    theta, objective, gradient = minimise(problem, ones(problem, 0), np.empty((0, 5)))
    assert theta.shape == (0, 5)
    assert objective.shape == gradient.shape == (0,)


def test_a_held_parameter_stays_and_the_others_are_at_their_best():
    problem = posed(objective="squared_log", delta=np.inf)
    best = minimise(problem, ones(problem), spread_starts(problem, 1))[0][0]
    start = best + np.array([0.0, 0.0, 0.0, 0.1, 0.0])
    hold = np.eye(5)[3:4]
    theta, objective, gradient = minimise(problem, ones(problem), start[None], hold)
    assert theta[0, 3] == pytest.approx(start[3], abs=1e-12)
    others = [0, 1, 2, 4]

    def of(rest):
        value, slope, _ = evaluate(problem, np.insert(rest, 3, start[3])[None], ones(problem))
        return value[0] * 1e4, slope[0, others] * 1e4

    oracle = minimize(of, best[others], jac=True, method="L-BFGS-B", bounds=problem.bounds[others])
    assert objective[0] <= oracle.fun / 1e4 * (1 + 1e-9)
    assert gradient[0] < 1e-8


def test_a_held_combination_stays_and_its_bounds_are_kept():
    problem = posed(noise=0.05)
    rng = np.random.default_rng(0)
    low, high = problem.bounds.T
    starts = rng.uniform(np.maximum(low, -3), np.minimum(high, 1), (40, 5))
    hold = rng.normal(size=(40, 5))
    theta, objective, gradient = minimise(problem, ones(problem, 40), starts, hold)
    np.testing.assert_allclose((theta * hold).sum(axis=1), (starts * hold).sum(axis=1), atol=1e-9)
    assert np.all((theta >= low - 1e-9) & (theta <= high + 1e-9))
    assert np.all(objective <= evaluate(problem, starts, ones(problem, 40))[0])
    assert np.median(gradient) < 1e-7


def test_a_profile_over_held_values_has_its_lowest_point_at_the_optimum():
    problem = posed(objective="squared_log", delta=np.inf)
    best, lowest, _ = (end[0] for end in minimise(problem, ones(problem), spread_starts(problem, 1)))

    def profile(alpha):
        start = np.where(np.arange(5) == 3, alpha, best)
        return minimise(problem, ones(problem), start[None], np.eye(5)[3:4])[1][0]

    found = minimize_scalar(profile, bracket=(best[3] - 0.05, best[3] + 0.04))
    assert found.x == pytest.approx(best[3], abs=1e-5)
    assert found.fun == pytest.approx(lowest, rel=1e-9)


def test_bounds_in_natural_units_move_with_the_table():
    one = posed()
    other = Problem(CHINCHILLA, one.logs_VxM, one.y_M, one.centre + 3.0)
    np.testing.assert_array_equal(one.bounds, other.bounds)
