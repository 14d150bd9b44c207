"""Profile likelihood: which values of one quantity a table allows when everything else is fitted again.

For squared errors of the log loss the likelihood is Gaussian with unknown variance: twice the rise of the objective
over the residual variance is compared with the squared quantile of Student's t with M - p degrees of freedom. For Huber
the rise of the objective is the likelihood-ratio type statistic of robust regression (Schrader & Hettmansperger 1980):
its scale is the mean square of psi, the objective's slope, over the mean slope of psi, which is the share of points
inside delta. With delta below the noise hardly a point lies there, so the share comes from a kernel estimate of the
residuals' density. All this is for independent points: a profile knows nothing of groups.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from analysis import intervals
from analysis.fit import Estimate, Fit, judge
from analysis.solve import minimise
from analysis.table import FitError

NEWTON_STEPS = 60  # to a starting point where the quantity has the wanted value
EXACT = 1e-9  # distance from it that counts as none
DOUBLINGS, HALVINGS = 30, 40  # of the distance to an interval's end
SHORT = 0.99  # of the limit; a profile that stays below it up to where the law's bounds end was never crossed


def profile(fitted: Fit, names: Sequence[str] | None = None) -> dict[str, Estimate]:
    """Profile intervals at the fit's level, by name; all parameters and derived quantities without `names`.

    An interval that ends where the law's bounds end, and one that is too wide, leave the quantity not identified, in
    words (see `analysis.fit.Estimate`). Raises FitError as `profile_p` does.
    """
    from scipy.stats import t

    names = [*fitted.law.names, *fitted.law.derived] if names is None else list(names)
    _check(fitted, names)
    limit = t.ppf((1 + fitted.level) / 2, _freedom(fitted)) ** 2
    names_R, sign_R = [n for n in names for _ in range(2)], np.tile([-1.0, 1.0], len(names))
    of_R = [_quantity(fitted, name) for name in names_R]
    best_R = np.array([of(fitted.theta[None])[0] for of in of_R])

    def excess(distance_R):
        return _rises(fitted, of_R, best_R + sign_R * distance_R)[0] - limit

    inner_R, outer_R = np.zeros(len(of_R)), np.sqrt(limit) * _errors(fitted, of_R)
    for _ in range(DOUBLINGS):
        short_R = excess(outer_R) < 0
        if not short_R.any():
            break
        inner_R, outer_R = np.where(short_R, outer_R, inner_R), np.where(short_R, 2 * outer_R, outer_R)
    for _ in range(HALVINGS):
        middle_R = (inner_R + outer_R) / 2
        short_R = excess(middle_R) < 0
        inner_R, outer_R = np.where(short_R, middle_R, inner_R), np.where(short_R, outer_R, middle_R)
    reached_R = excess(inner_R) < (SHORT - 1) * limit
    end_Rx2 = [float(v) for v in best_R + sign_R * inner_R]
    found = {}
    for i, name in enumerate(names):
        low, high = (_plain(fitted, name, end) for end in end_Rx2[2 * i : 2 * i + 2])
        parameter = next((p for p in fitted.law.parameters if p.name == name), None)
        value = _plain(fitted, name, float(best_R[2 * i]))
        kind, span = (parameter.kind, parameter.span) if parameter else ("", None)
        remark = _remark(reached_R[2 * i], reached_R[2 * i + 1], low, high, kind)
        found[name] = judge(value, (low, high), np.array([low, high]), fitted.level, remark, span, kind)
    return found


def profile_p(fitted: Fit, values: Mapping[str, float]) -> dict[str, float]:
    """P-value of each value on its own: the profile interval at level 1 - p ends there.

    `values` names parameters or derived quantities, in the law's units. A value that the law's bounds exclude has
    p = 0. Raises FitError for a fit with groups, without an objective on the log loss, and for an unknown name.
    """
    from scipy.stats import t

    _check(fitted, list(values))
    logs = [np.log(v) if _is_log(fitted, name) else v for name, v in values.items()]
    rise_R, _ = _rises(fitted, [_quantity(fitted, name) for name in values], np.array(logs, dtype=np.float64))
    return dict(zip(values, (2 * t.sf(np.sqrt(rise_R), _freedom(fitted))).tolist(), strict=True))


def _check(fitted: Fit, names: Sequence[str]) -> None:
    known = [*fitted.law.names, *fitted.law.derived]
    for name in names:
        if name not in known:
            raise FitError(f"{name} is not a quantity of the {fitted.law.name} law; it has {', '.join(known)}")
    if fitted.groups is not None:
        raise FitError("a profile takes points for independent; with groups use the cluster bootstrap's intervals")
    if fitted.objective_name == "squared":
        raise FitError("objective='squared' has no profile here; fit with huber or squared_log")


def _is_log(fitted: Fit, name: str) -> bool:
    kinds = {p.name: p.kind for p in fitted.law.parameters}
    return kinds.get(name, "") in ("coefficient", "scale", "positive", "place")


def _plain(fitted: Fit, name: str, value: float) -> float:
    return float(np.exp(min(value, 700.0))) if _is_log(fitted, name) else value


def _quantity(fitted: Fit, name: str) -> Callable[[np.ndarray], np.ndarray]:
    """From coordinates (S, p) to the quantity (S,), a positive one as its logarithm: its level sets are then planes."""
    law, logarithm = fitted.law, _is_log(fitted, name)

    def of(theta_Sxp):
        at = law.natural(theta_Sxp, fitted.problem.centre)
        found = at[name] if name in at else law.derived[name](at)
        return np.log(found) if logarithm else found

    return of


def _gradient(of: Callable, theta_p: np.ndarray) -> np.ndarray:
    return intervals.jacobian(lambda theta_Sxp: of(theta_Sxp)[:, None], theta_p)[0]


def _freedom(fitted: Fit) -> int:
    return fitted.points - len(fitted.law.names)


def _residuals(fitted: Fit) -> np.ndarray:
    return fitted.problem.losses(fitted.theta[None])[0] - fitted.problem.y_M


def _scale(fitted: Fit) -> float:
    """What twice the objective's rise is divided by: the residual variance, or its counterpart for Huber."""
    from scipy.special import ndtr

    residual_M, delta = _residuals(fitted), fitted.delta
    psi_M = np.clip(residual_M, -delta, delta)
    share = 1.0
    if np.isfinite(delta):
        # the fit passes through about p points, whose residuals say nothing about the noise near zero
        rest_M = residual_M[np.argsort(np.abs(residual_M))[len(fitted.theta) :]]
        spread = min(np.std(rest_M), np.subtract(*np.quantile(rest_M, [0.75, 0.25])) / 1.349)
        width = max(1.06 * spread * len(rest_M) ** -0.2, 1e-300)
        share = float(np.mean(ndtr((delta - rest_M) / width) - ndtr((-delta - rest_M) / width)))
    return float(max((fitted.weights * psi_M**2).sum() / _freedom(fitted) / max(share, 1e-300), 1e-300))


def _information(fitted: Fit) -> np.ndarray:
    """(p, p) inverse of the least-squares curvature at the optimum."""
    return np.linalg.pinv(fitted.linear.slope.T @ fitted.linear.slope, rcond=1e-12, hermitian=True)


def _errors(fitted: Fit, of_R: Sequence[Callable]) -> np.ndarray:
    """Standard errors (R,) of the linear approximation: where the search for an interval's end begins."""
    gradient_Rxp = np.stack([_gradient(of, fitted.theta) for of in of_R])
    variance_R = np.einsum("rp,pq,rq->r", gradient_Rxp, _information(fitted), gradient_Rxp)
    return np.maximum(np.sqrt(variance_R) * max(fitted.scatter, 1e-9), 1e-9)


def _rises(fitted: Fit, of_R: Sequence[Callable], target_R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Twice the objective's rise over its scale when each quantity is held at its target, (R,), and the optima (R, p).

    Infinite where the law's bounds allow no such value.
    """
    information = _information(fitted)
    rise_R, theta_Rxp = np.full(len(of_R), np.inf), np.tile(fitted.theta, (len(of_R), 1))
    starts = [_start(fitted, information, of, target) for of, target in zip(of_R, target_R, strict=True)]
    rows = [i for i, start in enumerate(starts) if start is not None]
    if not rows:
        return rise_R, theta_Rxp
    start_Sxp = np.stack([start for start in starts if start is not None])
    hold_Sxp = np.stack([_gradient(of_R[i], start_p) for i, start_p in zip(rows, start_Sxp, strict=True)])
    weights_SxM = np.broadcast_to(fitted.weights, (len(rows), fitted.points))
    end_Sxp, objective_S, _ = minimise(fitted.problem, weights_SxM, start_Sxp, hold_Sxp)
    for i, end_p in zip(rows, end_Sxp, strict=True):
        if abs(of_R[i](end_p[None])[0] - target_R[i]) > 1e-5 * max(1.0, abs(target_R[i])):
            raise FitError(f"a derived quantity of the {fitted.law.name} law is no ratio of exponents: no profile")
    rise_R[rows] = np.maximum(2 * (objective_S - fitted.objective) / _scale(fitted), 0.0)
    theta_Rxp[rows] = end_Sxp
    return rise_R, theta_Rxp


def _start(fitted: Fit, information: np.ndarray, of: Callable, target: float) -> np.ndarray | None:
    """Coordinates (p,) within the bounds where the quantity is `target`, near the profile's path; else None."""
    low_p, high_p = fitted.problem.bounds.T
    theta_p, free_p = fitted.theta.copy(), np.ones(len(fitted.theta), dtype=bool)
    for _ in range(NEWTON_STEPS):
        gap = target - of(theta_p[None])[0]
        if not np.isfinite(gap):
            return None
        if abs(gap) <= EXACT * max(1.0, abs(target)):
            return theta_p
        gradient_p = _gradient(of, theta_p)
        move_p = np.where(free_p, information @ gradient_p, 0.0)
        if not gradient_p @ move_p > 0:
            move_p = np.where(free_p, gradient_p, 0.0)
        along = gradient_p @ move_p
        if not along > 0:
            return None
        step_p = move_p * gap / along
        step_p *= min(1.0, 1.0 / np.abs(step_p).max())
        trial_p = theta_p + step_p
        outside_p = (trial_p < low_p) | (trial_p > high_p)
        free_p &= ~outside_p
        theta_p = np.clip(trial_p, low_p, high_p)
    return None


def _remark(at_low: bool, at_high: bool, low: float, high: float, kind: str) -> str:
    if at_low and at_high:
        return f"has a flat profile: everything from {low:.3g} to {high:.3g}, where the law's bounds end, fits as well"
    if at_low or at_high:
        zero = at_low and kind in ("coefficient", "scale")
        return f"cannot be told from {'zero' if zero else f'{low if at_low else high:.3g}, where the bounds end'}"
    return ""
