"""Fit a scaling law to a table: many starts, every one refined to convergence, bootstrap intervals, plain words."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from analysis import intervals
from analysis.laws import Law
from analysis.solve import Objective, Problem, minimise, spread_starts
from analysis.table import FLAT, FitError, check_columns, check_design, check_weights, determined, slopes

SHARE_TOLERANCE = 1e-6  # a start has reached the optimum when its objective is within this relative distance
WIDEST_SHARE = 0.3  # a derived share of [0, 1] with a wider interval is not identified
PERMUTATIONS = 999
ROBUST_FROM, DELTA = 30, 1e-3  # the Huber loss is the default from so many points on, with Hoffmann et al.'s delta
PILOT = 100  # resamples that are fitted from a second start, and all are if it ever finds a lower optimum

OBJECTIVES = {
    "huber": "sum over points of Huber losses of log predicted - log measured loss",
    "squared_log": "sum over points of half the squared difference of log predicted and log measured loss",
    "squared": "sum over points of half the squared difference of predicted and measured loss, in nats^2",
}


@dataclass(frozen=True)
class Estimate:
    """A number with its percentile interval; `remark` says in words why it is not identified ("" when it is).

    Not identified is, in this order:
    - a parameter on which the losses at the table's points do not depend at the optimum, alone or with others;
    - a parameter whose interval reaches a bound (for a coefficient the lower bound means zero);
    - a parameter whose interval spans a factor of more than its `span` in the law (a slope: is wider than that);
    - a coefficient in whose term stands an exponent that is not identified, as the two trade off along a line;
    - a derived share, such as a and b = 1 - a, when any exponent's interval reaches a bound, or when its own interval
      is wider than WIDEST_SHARE: a width, not a factor, so that a and 1 - a always agree.
    Without bootstraps there is no interval and nothing is identified. `standard_error` is the standard deviation of
    the bootstrap sample; of a parameter that is not identified it says nothing.
    """

    value: float
    interval: tuple[float, float]
    identified: bool
    remark: str
    standard_error: float = math.nan


@dataclass(frozen=True)
class Fit:
    """A fitted law. `parameters` and `derived` (for Chinchilla: a, b) map names to estimates.

    objective         at the optimum; `objective_name` says which (a key of OBJECTIVES), always a sum over points
    gradient_norm     largest |derivative| of the objective there, in the law's internal coordinates, bounds respected
    condition         condition number of its Hessian there, in those coordinates, without those at a bound; inf when it
                      is singular
    share_at_optimum  share of starts whose objective is within a factor 1 + SHARE_TOLERANCE of the best
    scatter           root mean square of log L_predicted - log L_measured
    misfit_p          permutation p-value for "the residuals of log loss do not depend on the product of the centred log
                      variables" (Chinchilla: log N x log D; of one variable: its square). Small: the residuals are
                      structured, the law misses something, and the intervals, which take misfit for noise, are not to
                      be trusted. Large: this one shape of misfit was not seen. Noise that is larger in the corners of
                      the table makes it somewhat too small. NaN when the law's own slopes contain that product, and
                      with groups, whose points cannot be permuted.
    delta             of the Huber loss; infinite for the other objectives
    redrawn           resamples that could not determine the law (fewer distinct points than parameters, too few
                      distinct values of a variable) and were drawn again: the intervals are over the other resamples
    sample            bootstrap parameters, each of shape (bootstraps,)
    caution           in words, when too few points or groups stand behind some interval to trust it; else ""
    linear            the linear approximation that calibrates the intervals
    problem, theta, weights, groups    what was minimised, its optimum in internal coordinates (p,), the points' weights
                      (M,), and their labels (M,) or None
    """

    law: Law
    parameters: dict[str, Estimate]
    derived: dict[str, Estimate]
    objective: float
    objective_name: Objective
    gradient_norm: float
    condition: float
    share_at_optimum: float
    scatter: float
    misfit_p: float
    points: int
    delta: float
    level: float
    starts: int
    bootstraps: int
    redrawn: int
    caution: str
    sample: dict[str, np.ndarray] = field(repr=False)  # thousands of numbers
    linear: intervals.Linear = field(repr=False)
    problem: Problem = field(repr=False)
    theta: np.ndarray = field(repr=False)
    weights: np.ndarray = field(repr=False)
    groups: np.ndarray | None = field(repr=False)

    @property
    def best(self) -> dict[str, float]:
        """The parameters at the optimum, in the law's units."""
        return {name: estimate.value for name, estimate in self.parameters.items()}


def fit(
    law: Law,
    table: Mapping,
    loss,
    *,
    objective: Objective | None = None,
    delta: float | None = None,
    weights=None,
    groups=None,
    starts: int | Mapping = 500,
    bootstraps: int = 1000,
    seed: int = 0,
    level: float = 0.9,
) -> Fit:
    """Fit `law` to `loss` (nats per token, shape (M,)) at the variables in `table` (name -> shape (M,)).

    `objective` is a key of OBJECTIVES. None: "huber" when `delta` is given or there are at least ROBUST_FROM points,
    else "squared_log"; `delta` None: DELTA. `weights` (M,) multiply the points' losses, for example the inverse squares
    of the standard errors of log loss. `starts` is how many points of the law's start box to begin from, or the
    starting parameters themselves (name -> shape (S,), in the law's units), which are moved into the law's bounds.

    Intervals are calibrated bootstrap percentiles at `level` (`analysis.intervals`). Without `groups` single points are
    resampled: this assumes that they are independent. `groups` (M,) labels what shares a run, a budget or a seed, and
    whole groups are resampled. They describe the law, not the scatter of single runs around it. Each resample is fitted
    from the optimum, and from the middle of the start box too unless that found nothing lower in the first PILOT; the
    better one is kept.

    What counts as identified is written at `Estimate`, what speaks against the law itself at `Fit.misfit_p`. Raises
    FitError.
    """
    logs_VxM, log_loss_M = check_columns(law, table, loss)
    weights_M, groups_M = check_weights(weights, groups, len(log_loss_M))
    objective, delta = _check_objective(objective, delta, level, len(log_loss_M))
    centre = np.append(logs_VxM.mean(axis=1), log_loss_M.mean())
    problem = Problem(law, logs_VxM - centre[:-1, None], log_loss_M - centre[-1], centre, objective, delta)
    slopes_Mxp = check_design(problem)

    first_Sxp = spread_starts(problem, starts) if isinstance(starts, int) else law.internal(starts, centre)
    # starts that the bounds move to one place are one problem
    distinct_Sxp, which_S = np.unique(np.clip(first_Sxp, *problem.bounds.T), axis=0, return_inverse=True)
    each_SxM = np.broadcast_to(weights_M, (len(distinct_Sxp), len(weights_M)))
    end_Sxp, objective_S, gradient_S = (end[which_S] for end in minimise(problem, each_SxM, distinct_Sxp))
    best = int(objective_S.argmin())
    theta_p = law.ordered(end_Sxp[best : best + 1])[0]
    predicted_M, slope_Mxp = problem.losses(theta_p[None])[0], slopes(problem, theta_p)
    residual_M = predicted_M - problem.y_M

    generator = np.random.default_rng(seed)
    counts_BxM, redrawn = _resamples(slopes_Mxp, bootstraps, groups_M, generator)
    sample_Bxp = law.ordered(_fit_resamples(problem, counts_BxM * weights_M, theta_p))

    sample = law.natural(sample_Bxp, centre)
    linear = _linear(problem, slope_Mxp, predicted_M, weights_M, groups_M, counts_BxM)
    values, between, freedom = _with_ends(law, linear, theta_p, sample_Bxp, centre, level)
    remarks = _flat_remarks(law, slope_Mxp)
    reach_p = intervals.reach(linear, np.eye(len(theta_p)), level)
    at_bound = _bound_remarks(problem, *intervals.ends(theta_p, sample_Bxp, level, reach_p.factor))
    parameters = {
        p.name: judge(
            values[p.name], between[p.name], sample[p.name], level, remarks[p.name] or at_bound[p.name], p.span, p.kind
        )
        for p in law.parameters
    }
    for name, powers in law.terms:
        loose = [e for e in (e.removeprefix("-") for e in powers.values()) if not parameters[e].identified]
        if loose and parameters[name].identified:
            remark = f"goes with {loose[0]}, which {parameters[loose[0]].remark}"
            parameters[name] = replace(parameters[name], identified=False, remark=remark)
    exponents = [p.name for p in law.parameters if p.kind == "exponent"]
    stuck = {name: remarks[name] or at_bound[name] for name in exponents}
    why = next((f"rests on {name}, which {stuck[name]}" for name in exponents if stuck[name]), "")
    derived = {n: judge(values[n], between[n], of(sample), level, why) for n, of in law.derived.items()}
    return Fit(
        law=law,
        parameters=parameters,
        derived=derived,
        objective=float(objective_S[best]),
        objective_name=objective,
        gradient_norm=float(gradient_S[best]),
        condition=_condition(problem, theta_p, weights_M),
        share_at_optimum=float(np.mean(_is_as_low(problem, objective_S, objective_S[best], weights_M))),
        scatter=float(np.sqrt(np.mean(residual_M**2))),
        misfit_p=_misfit_p(problem, slope_Mxp, residual_M, weights_M, groups_M, np.random.default_rng(seed)),
        points=len(residual_M),
        delta=delta,
        level=float(level),
        starts=len(first_Sxp),
        bootstraps=bootstraps,
        redrawn=redrawn,
        caution=intervals.caution(freedom, int(linear.group.max()) + 1, groups_M is not None),
        sample=sample,
        linear=linear,
        problem=problem,
        theta=theta_p,
        weights=weights_M,
        groups=groups_M,
    )


def with_interval(fitted: Fit, quantity: Callable[[Mapping], np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Value, low and high of any function of the parameters that returns shape (G,) and broadcasts over them."""

    def each(theta_Sxp):
        draws = fitted.law.natural(theta_Sxp, fitted.problem.centre)
        return quantity({name: draws_S[:, None] for name, draws_S in draws.items()})

    value_G = quantity(fitted.best)
    each_BxG = quantity({name: draws_B[:, None] for name, draws_B in fitted.sample.items()})
    reach_G = intervals.reach(fitted.linear, intervals.jacobian(each, fitted.theta), fitted.level)
    return value_G, *intervals.ends(value_G, each_BxG, fitted.level, reach_G.factor)


def predict(fitted: Fit, **variables) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The law's loss (nats per token) at e.g. N=..., D=... of shape (G,), with the bounds of its interval.

    The interval is the law's own. A single new run scatters around it by about `fitted.scatter` in log loss:
    `analysis.choice.predict_run` says where it will lie.
    """
    at = {name: np.atleast_1d(np.asarray(v, dtype=np.float64)) for name, v in variables.items()}
    return with_interval(fitted, lambda parameters: fitted.law.predict(parameters, at))


def to_json(fitted: Fit) -> dict:
    """The fit's numbers for machines; null for what is not a finite number."""
    units, variables = {p.name: p.unit for p in fitted.law.parameters}, fitted.law.variables
    product = f"{'product' if len(variables) > 1 else 'square'} of centred log {' and log '.join(variables)}"

    def estimate(name: str, e: Estimate) -> dict:
        return {
            "value": _number(e.value),
            "interval": [_number(v) for v in e.interval],
            "identified": e.identified,
            "remark": e.remark,
            "unit": units.get(name, "1"),
            "standard_error": _number(e.standard_error),
        }

    return {
        "law": fitted.law.name,
        "formula": fitted.law.formula,
        "citation": fitted.law.citation,
        "objective": _number(fitted.objective),
        "objective_name": fitted.objective_name,
        "objective_is": OBJECTIVES[fitted.objective_name],
        "delta": _number(fitted.delta),
        "parameters": {name: estimate(name, e) for name, e in fitted.parameters.items()},
        **{name: estimate(name, e) for name, e in fitted.derived.items()},
        "level": fitted.level,
        "points": fitted.points,
        "starts": fitted.starts,
        "share_at_optimum": _number(fitted.share_at_optimum),
        "share_tolerance": SHARE_TOLERANCE,
        "gradient_norm": _number(fitted.gradient_norm),
        "condition": _number(fitted.condition),
        "scatter": _number(fitted.scatter),
        "misfit_p": _number(fitted.misfit_p),
        "misfit_is": f"p-value ({PERMUTATIONS} permutations) for residuals of log loss that do not depend on the "
        f"{product}; small: structured, the law misses something",
        "bootstraps": fitted.bootstraps,
        "resampled": "points" if fitted.groups is None else f"{len(np.unique(fitted.groups))} groups",
        "redrawn": fitted.redrawn,
        "caution": fitted.caution,
    }


# --- starts and resamples ------------------------------------------------------------------------------------------


def _resamples(slopes_Mxp: np.ndarray, number: int, groups_M: np.ndarray | None, rng) -> tuple[np.ndarray, int]:
    """Counts (number, M) of resamples that determine the law, and how many did not and were drawn again.

    Pairs bootstrap of the points, or of whole groups. Whether a resample determines the law is judged by `slopes`.
    """
    points = len(slopes_Mxp)
    group_M = np.arange(points) if groups_M is None else np.unique(groups_M, return_inverse=True)[1]
    groups = int(group_M.max()) + 1
    kept, have, redrawn = [np.empty((0, points))], 0, 0
    while have < number:
        drawn_BxG = rng.multinomial(groups, np.full(groups, 1 / groups), size=number - have).astype(np.float64)
        drawn_BxM = drawn_BxG[:, group_M]
        kept.append(drawn_BxM[determined(slopes_Mxp, drawn_BxM)])
        have += len(kept[-1])
        redrawn += len(drawn_BxM) - len(kept[-1])
        if redrawn > 100 * number:
            raise FitError(f"{redrawn} of {redrawn + have} bootstrap resamples leave the law open: more points needed")
    return np.concatenate(kept), redrawn


def _fit_resamples(problem: Problem, weights_BxM: np.ndarray, theta_p: np.ndarray) -> np.ndarray:
    """(B, p): each resample's optimum, from the table's own and from the middle of the start box; see `fit`."""
    middle_p = problem.law.box("start", problem.logs_VxM).mean(axis=1)
    end_Bxp, objective_B, _ = minimise(problem, weights_BxM, np.tile(theta_p, (len(weights_BxM), 1)))
    for part in (slice(0, PILOT), slice(PILOT, None)):
        second_Bxp, second_B, _ = minimise(problem, weights_BxM[part], np.tile(middle_p, (len(weights_BxM[part]), 1)))
        lower_B = second_B < objective_B[part] * (1 - SHARE_TOLERANCE)
        end_Bxp[part] = np.where(lower_B[:, None], second_Bxp, end_Bxp[part])
        if not lower_B.any():
            break
    return end_Bxp


# --- what is identified ---------------------------------------------------------------------------------------------


def _check_objective(objective: Objective | None, delta: float | None, level: float, points: int):
    """(objective, delta) as `fit` says."""
    if delta is not None and not delta > 0:
        raise FitError(f"delta={delta:g} is not allowed; it must be positive")
    if not 0 < level < 1:
        raise FitError(f"level={level:g} is not allowed; it must be between 0 and 1")
    if objective is None:
        objective = "huber" if delta is not None or points >= ROBUST_FROM else "squared_log"
    if objective not in OBJECTIVES:
        raise FitError(f"objective={objective!r} is not one of {', '.join(OBJECTIVES)}")
    if objective != "huber" and delta is not None:
        raise FitError(f"delta={delta:g} belongs to the objective huber, not to {objective}")
    return objective, float(DELTA if delta is None else delta) if objective == "huber" else math.inf


def _condition(problem: Problem, theta_p: np.ndarray, weights_M: np.ndarray) -> float:
    """Condition number of the objective's Hessian, among the coordinates inside their bounds."""
    low_p, high_p = problem.bounds.T
    inside = np.flatnonzero((theta_p > low_p) & (theta_p < high_p))
    hessian_pxp = problem.evaluate(theta_p[None], weights_M[None], np.array([True]), np.array([problem.delta]))[2][0]
    eigenvalue_p = np.abs(np.linalg.eigvalsh(hessian_pxp[np.ix_(inside, inside)]))
    return float(eigenvalue_p.max() / eigenvalue_p.min()) if len(inside) and eigenvalue_p.min() > 0 else math.inf


def _is_as_low(problem: Problem, objective_S: np.ndarray, best: float, weights_M: np.ndarray) -> np.ndarray:
    """(S,) within SHARE_TOLERANCE; below a floor of rounding, objectives of exact fits are all "the best"."""
    unit = math.exp(2 * problem.centre[-1]) if problem.objective == "squared" else min(problem.delta, 1.0) ** 2
    return objective_S <= best * (1 + SHARE_TOLERANCE) + 1e-12 * weights_M.sum() * unit


def _flat_remarks(law: Law, slope_Mxp: np.ndarray) -> dict[str, str]:
    """By parameter, what the losses at the points do not depend on, to first order."""
    norm_p = np.linalg.norm(slope_Mxp, axis=0)
    remarks = {
        n: "" if size > 1e-9 else "does not change the losses of this table"
        for n, size in zip(law.names, norm_p, strict=True)
    }
    live = [i for i, name in enumerate(law.names) if not remarks[name]]
    unit_Mxp = slope_Mxp[:, live] / norm_p[live]
    eigenvalue_p, basis = np.linalg.eigh(unit_Mxp.T @ unit_Mxp)
    for vector_p in basis.T[eigenvalue_p < FLAT * 1e-3 * eigenvalue_p[-1]]:
        names = [law.names[live[i]] for i in np.flatnonzero(np.abs(vector_p) > 0.1)]
        for name in names:
            others = " and ".join(n for n in names if n != name)
            remarks[name] = f"trades off with {others} without changing the losses of this table"
    return remarks


def _linear(problem: Problem, slope_Mxp, predicted_M, weights_M, groups_M, counts_BxM) -> intervals.Linear:
    """The linear approximation that calibrates the intervals, with the weights of the log loss's squared errors."""
    residual_M = predicted_M - problem.y_M
    group_M = np.arange(len(residual_M)) if groups_M is None else np.unique(groups_M, return_inverse=True)[1]
    if problem.objective == "squared":
        weights_M = weights_M * np.exp(2 * predicted_M)
    inside = float(np.mean(np.abs(residual_M) < problem.delta)) if problem.objective == "huber" else 1.0
    return intervals.linear(slope_Mxp, residual_M, group_M, weights_M, counts_BxM, inside)


def _with_ends(law: Law, linear: intervals.Linear, theta_p, sample_Bxp, centre, level: float):
    """By name of parameters and derived quantities: the value, its interval, and the interval's degrees of freedom."""
    names = [*law.names, *law.derived]

    def all_of(theta_Sxp):
        at = law.natural(theta_Sxp, centre)
        return np.stack([at[name] for name in law.names] + [of(at) for of in law.derived.values()], axis=1)

    value_Q = all_of(theta_p[None])[0]
    with np.errstate(invalid="ignore"):  # a constant such as Nc = A^(1 / alpha) may be infinite
        slope_Qxp = intervals.jacobian(all_of, theta_p)
    known_Q = np.asarray(np.isfinite(slope_Qxp).all(axis=1))
    reach = intervals.reach(linear, np.where(known_Q[:, None], slope_Qxp, 0.0), level)
    low_Q, high_Q = intervals.ends(value_Q, all_of(sample_Bxp), level, reach.factor)
    between = {n: (float(low), float(high)) for n, low, high in zip(names, low_Q, high_Q, strict=True)}
    freedom = {n: float(f) for n, f, known in zip(names, reach.freedom, known_Q, strict=True) if known}
    return dict(zip(names, value_Q.tolist(), strict=True)), between, freedom


def _bound_remarks(problem: Problem, low_p: np.ndarray, high_p: np.ndarray) -> dict[str, str]:
    remarks = {}
    for p, low, high, (least, most) in zip(problem.law.parameters, low_p, high_p, problem.bounds, strict=True):
        if p.kind == "place":
            ends = ("the table's end at low", "the table's end at high")
        else:
            ends = (
                "zero" if p.kind == "coefficient" else f"its lower bound {p.bounds[0]:g}",
                f"its upper bound {p.bounds[1]:g}",
            )
        reached = {ends[0]: low <= least + 1e-6, ends[1]: high >= most - 1e-6}
        ends = [end for end, is_reached in reached.items() if is_reached]
        remarks[p.name] = f"cannot be told from {' or '.join(ends)}" if ends else ""
    return remarks


def judge(
    value: float,
    between: tuple[float, float],
    sample_B: np.ndarray,
    level: float,
    remark: str,
    span: float | None = None,
    kind: str = "",
) -> Estimate:
    """An estimate, with the first reason not to be identified: `remark`, no interval, one too wide.

    Without `span` it is a derived share.
    """
    low, high = between
    widest = WIDEST_SHARE if span is None else span if kind == "slope" else math.inf
    if not remark and not len(sample_B):
        remark = "has no interval (no bootstraps)"
    elif not remark and high - low > widest:
        remark = f"has a {level:.0%} interval that is {high - low:.2g} wide (more than {widest:g})"
    elif not remark and span is not None and kind != "slope" and not (high <= span * low and math.isfinite(high)):
        factor = high / low if low > 0 and math.isfinite(high) else math.inf
        remark = f"has a {level:.0%} interval that spans a factor {factor:.3g} (more than {span:g})"
    with np.errstate(over="ignore"):  # a constant such as Nc = A^(1 / alpha) may be of any size
        error = float(np.std(sample_B, ddof=1)) if len(sample_B) > 1 and np.isfinite(sample_B).all() else math.nan
    return Estimate(value, (low, high), not remark, remark, error)


def _misfit_p(problem: Problem, slope_Mxp, residual_M, weights_M, groups_M, rng) -> float:
    """P-value of the |correlation| of residuals with the interaction, against permutations of the residuals.

    Only the part of the interaction that no small change of the parameters imitates is correlated: to first order its
    product with the residuals is that with the noise, however the law was fitted. The fit has made the residuals
    smaller than the noise, so the permuted ones are scaled up by the degrees of freedom it took. Weighted points are
    permuted after each was divided by its standard error.
    """
    points, parameters = slope_Mxp.shape
    if groups_M is not None:
        return math.nan
    if np.abs(residual_M).max() < 1e-9:  # rounding only
        return 1.0
    logs_VxM, root_M = problem.logs_VxM, np.sqrt(weights_M)
    interaction_M = root_M * (logs_VxM.prod(axis=0) if len(logs_VxM) > 1 else logs_VxM[0] ** 2)
    slope_Mxp, residual_M = slope_Mxp * root_M[:, None], residual_M * root_M
    # the constant too, as permuting keeps the mean; where log L's slopes to its coefficients sum to 1, it is in them
    imitable = np.column_stack([slope_Mxp, np.ones(points)])
    rest_M = interaction_M - imitable @ np.linalg.lstsq(imitable, interaction_M, rcond=None)[0]
    if np.linalg.norm(rest_M) < 1e-6 * np.linalg.norm(interaction_M):
        return math.nan
    permuted_RxM = rng.permuted(np.tile(residual_M, (PERMUTATIONS, 1)), axis=1)
    by_chance_R = np.abs(permuted_RxM @ rest_M) * math.sqrt((points - 1) / (points - parameters))
    return float(1 + (by_chance_R >= abs(residual_M @ rest_M)).sum()) / (1 + PERMUTATIONS)


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
