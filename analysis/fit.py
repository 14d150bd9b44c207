"""Fit a scaling law to a table: many starts, every one refined to convergence, bootstrap intervals, plain words.

All starts and all bootstrap resamples are one batch of small float64 Newton problems in NumPy, which needs no
compilation. The objective is the sum over points of the Huber loss of log L_predicted - log L_measured; infinite
`delta` makes it half the summed squared error of the log loss.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from analysis.laws import Law, log_loss

SHARE_TOLERANCE = 1e-6  # a start has reached the optimum when its objective is within this relative distance
WIDEST_SHARE = 0.3  # a derived share of [0, 1] with a wider interval is not identified
PERMUTATIONS = 999
LEAST_SPREAD = 0.05  # of the log of one variable given another; less and the two count as one variable
MAJORISER_STEPS, MAJORISER_RETRY, MOST_STEPS = 10, 6, 1000


class FitError(ValueError):
    """The table cannot be fitted; the message is one line that says why and what is needed."""


@dataclass(frozen=True)
class Estimate:
    """A number with its percentile interval; `remark` says in words why it is not identified ("" when it is).

    Not identified is, in this order:
    - a parameter whose interval reaches a bound (for a coefficient the lower bound means zero);
    - a parameter whose interval spans a factor of more than its `span` in the law;
    - a coefficient in whose term stands an exponent that is not identified, as the two trade off along a line;
    - a derived share, such as a and b = 1 - a, when any exponent's interval reaches a bound, or when its own interval
      is wider than WIDEST_SHARE: a width, not a factor, so that a and 1 - a always agree.
    Without bootstraps there is no interval and nothing is identified.
    """

    value: float
    interval: tuple[float, float]
    identified: bool
    remark: str


@dataclass(frozen=True)
class Fit:
    """A fitted law. `parameters` and `derived` (for Chinchilla: a, b) map names to estimates.

    objective         summed Huber loss at the optimum
    gradient_norm     largest |derivative| of the objective there, in the law's internal coordinates, bounds respected
    share_at_optimum  share of starts whose objective is within a factor 1 + SHARE_TOLERANCE of the best
    scatter           root mean square of log L_predicted - log L_measured
    misfit_p          permutation p-value for "the residuals of log loss do not depend on the product of the centred log
                      variables" (Chinchilla: log N x log D). Small: the residuals are structured, the law misses
                      something, and the intervals, which take misfit for noise, are not to be trusted. Large: this one
                      shape of misfit was not seen. Noise that is larger in the corners of the table makes it somewhat
                      too small. NaN when the law's own slopes contain that product.
    redrawn           resamples that could not determine the law (fewer distinct points than parameters, too few
                      distinct values of a variable) and were drawn again: the intervals are over the other resamples
    sample            bootstrap parameters, each of shape (bootstraps,)
    """

    law: Law
    parameters: dict[str, Estimate]
    derived: dict[str, Estimate]
    objective: float
    gradient_norm: float
    share_at_optimum: float
    scatter: float
    misfit_p: float
    points: int
    delta: float
    level: float
    starts: int
    bootstraps: int
    redrawn: int
    sample: dict[str, np.ndarray] = field(repr=False)  # thousands of numbers

    @property
    def best(self) -> dict[str, float]:
        """The parameters at the optimum, in the law's units."""
        return {name: estimate.value for name, estimate in self.parameters.items()}


def fit(
    law: Law,
    table: Mapping,
    loss,
    *,
    delta: float = 1e-3,
    starts: int | Mapping = 500,
    bootstraps: int = 1000,
    seed: int = 0,
    level: float = 0.9,
) -> Fit:
    """Fit `law` to `loss` (nats per token, shape (M,)) at the variables in `table` (name -> shape (M,)).

    `starts` is how many points of the law's start box to begin from, or the starting parameters themselves
    (name -> shape (S,), in the law's units). Intervals are pairs bootstrap percentiles at `level`: they assume that
    the points are independent, and describe the law, not the scatter of single runs around it. Each resample is
    fitted from the optimum and from the middle of the start box, and the better one is kept. What counts as identified
    is written at `Estimate`, what speaks against the law itself at `Fit.misfit_p`. Raises FitError.
    """
    logs_VxM, log_loss_M = _check(law, table, loss)
    if not delta > 0 or not 0 < level < 1:
        raise FitError(f"delta={delta} must be positive and level={level} between 0 and 1")
    centre = np.append(logs_VxM.mean(axis=1), log_loss_M.mean())
    design_KxMxp, y_M = law.design(logs_VxM - centre[:-1, None]), log_loss_M - centre[-1]
    _check_design(law, logs_VxM, design_KxMxp)

    first_Sxp = _spread_starts(law, starts) if isinstance(starts, int) else law.internal(starts, centre)
    once_SxM = np.ones((len(first_Sxp), len(y_M)))
    end_Sxp, objective_S, gradient_S = minimise(law, design_KxMxp, y_M, once_SxM, first_Sxp, delta)
    best = int(objective_S.argmin())
    noise_floor = 1e-12 * len(y_M) * min(delta, 1.0) ** 2  # below it, objectives of exact fits are all "the best"
    at_best_S = objective_S <= objective_S[best] * (1 + SHARE_TOLERANCE) + noise_floor
    predicted_1xM, slope_1xMxp, _ = log_loss(end_Sxp[best : best + 1], design_KxMxp)
    residual_M = predicted_1xM[0] - y_M
    interaction_M = (logs_VxM - centre[:-1, None]).prod(axis=0)

    counts_BxM, redrawn = _resamples(law, design_KxMxp, bootstraps, np.random.default_rng(seed))
    two_2xp = np.stack([end_Sxp[best], _box(law, "start").mean(axis=1)])
    tries_Bxp, objective_B, _ = minimise(
        law, design_KxMxp, y_M, counts_BxM.repeat(2, axis=0), np.tile(two_2xp, (bootstraps, 1)), delta
    )
    better_B = 2 * np.arange(bootstraps) + objective_B.reshape(-1, 2).argmin(axis=1)
    sample_Bxp = tries_Bxp[better_B]

    values = {name: float(v[0]) for name, v in law.natural(end_Sxp[best : best + 1], centre).items()}
    sample = law.natural(sample_Bxp, centre)
    at_bound = _bound_remarks(law, sample_Bxp, level)
    parameters = {
        p.name: _estimate(values[p.name], sample[p.name], level, at_bound[p.name], p.span) for p in law.parameters
    }
    for name, powers in law.terms:
        loose = [e for e in powers.values() if not parameters[e].identified]
        if loose and parameters[name].identified:
            remark = f"goes with {loose[0]}, which {parameters[loose[0]].remark}"
            parameters[name] = replace(parameters[name], identified=False, remark=remark)
    exponents = [p.name for p in law.parameters if p.kind == "exponent"]
    stuck = next((f"rests on {name}, which {at_bound[name]}" for name in exponents if at_bound[name]), "")
    derived = {name: _estimate(float(of(values)), of(sample), level, stuck) for name, of in law.derived.items()}
    return Fit(
        law=law,
        parameters=parameters,
        derived=derived,
        objective=float(objective_S[best]),
        gradient_norm=float(gradient_S[best]),
        share_at_optimum=float(at_best_S.mean()),
        scatter=float(np.sqrt(np.mean(residual_M**2))),
        misfit_p=_misfit_p(interaction_M, slope_1xMxp[0], residual_M, np.random.default_rng(seed)),
        points=len(y_M),
        delta=float(delta),
        level=float(level),
        starts=len(first_Sxp),
        bootstraps=bootstraps,
        redrawn=redrawn,
        sample=sample,
    )


def with_interval(fitted: Fit, quantity: Callable[[Mapping], np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Value, low and high of any function of the parameters that returns shape (G,) and broadcasts over them."""
    value_G = quantity(fitted.best)
    each_BxG = quantity({name: draws_B[:, None] for name, draws_B in fitted.sample.items()})
    low_G, high_G = _percentiles(each_BxG, fitted.level)
    return value_G, low_G, high_G


def predict(fitted: Fit, **variables) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The law's loss (nats per token) at e.g. N=..., D=... of shape (G,), with the bounds of its interval.

    The interval is the law's own; a single new run scatters around it by about `fitted.scatter` in log loss.
    """
    at = {name: np.atleast_1d(np.asarray(v, dtype=np.float64)) for name, v in variables.items()}
    return with_interval(fitted, lambda parameters: fitted.law.predict(parameters, at))


def to_json(fitted: Fit) -> dict:
    """The fit's numbers for machines; null for what is not a finite number."""
    units = {p.name: p.unit for p in fitted.law.parameters}

    def estimate(name: str, e: Estimate) -> dict:
        return {
            "value": _number(e.value),
            "interval": [_number(v) for v in e.interval],
            "identified": e.identified,
            "remark": e.remark,
            "unit": units.get(name, "1"),
        }

    return {
        "law": fitted.law.name,
        "formula": fitted.law.formula,
        "citation": fitted.law.citation,
        "objective": _number(fitted.objective),
        "objective_is": "sum of Huber losses of log predicted - log measured loss",
        "delta": _number(fitted.delta),
        "parameters": {name: estimate(name, e) for name, e in fitted.parameters.items()},
        **{name: estimate(name, e) for name, e in fitted.derived.items()},
        "level": fitted.level,
        "points": fitted.points,
        "starts": fitted.starts,
        "share_at_optimum": _number(fitted.share_at_optimum),
        "share_tolerance": SHARE_TOLERANCE,
        "gradient_norm": _number(fitted.gradient_norm),
        "scatter": _number(fitted.scatter),
        "misfit_p": _number(fitted.misfit_p),
        "misfit_is": f"p-value ({PERMUTATIONS} permutations) for residuals of log loss that do not depend on the "
        f"product of centred log {' and log '.join(fitted.law.variables)}; small: structured, the law misses something",
        "bootstraps": fitted.bootstraps,
        "redrawn": fitted.redrawn,
    }


# --- the optimiser ------------------------------------------------------------------------------------------------


def huber(theta_Sxp, design_KxMxp, y_M, counts_SxM, delta):
    """Summed Huber loss (S,), gradient (S, p), Hessian (S, p, p) and majoriser (S, p, p).

    `counts` weights the points, so a resample is a row of counts. The majoriser is the Gauss-Newton matrix of the
    weighted least-squares problem that touches the Huber loss from above: always positive, good far from the optimum.
    """
    predicted_SxM, slope_SxMxp, share_KxSxM = log_loss(theta_Sxp, design_KxMxp)
    residual_SxM = predicted_SxM - y_M
    psi_SxM = np.clip(residual_SxM, -delta, delta)
    value_S = (counts_SxM * psi_SxM * (residual_SxM - psi_SxM / 2)).sum(axis=1)
    pull_SxM = counts_SxM * psi_SxM
    gradient_Sxp = (pull_SxM[:, None] @ slope_SxMxp)[:, 0]

    def gram(weight_SxM):
        return (slope_SxMxp * weight_SxM[:, :, None]).transpose(0, 2, 1) @ slope_SxMxp

    # log L is a log-sum-exp of linear terms: its Hessian is sum_k share_k t_k t_k' minus the outer product of its slope
    inside_SxM = counts_SxM * (np.abs(residual_SxM) < delta)
    hessian_Sxpxp = gram(inside_SxM - pull_SxM)
    for share_SxM, term_Mxp in zip(share_KxSxM, design_KxMxp, strict=True):
        used = np.flatnonzero(term_Mxp.any(axis=0))
        outer_MxUU = (term_Mxp[:, used, None] * term_Mxp[:, None, used]).reshape(len(y_M), -1)
        block_SxUU = (pull_SxM * share_SxM) @ outer_MxUU
        hessian_Sxpxp[:, used[:, None], used] += block_SxUU.reshape(-1, len(used), len(used))
    majoriser_Sxpxp = gram(counts_SxM * np.minimum(1.0, delta / np.maximum(np.abs(residual_SxM), 1e-300)))
    return value_S, gradient_Sxp, hessian_Sxpxp, majoriser_Sxpxp


def minimise(law: Law, design_KxMxp, y_M, counts_SxM, theta_Sxp, delta):
    """Minimise every row's Huber loss inside the law's bounds: theta (S, p), objective (S,), gradient norm (S,)."""
    # a batch stays in the cache, and each product below the size at which BLAS starts threads that cost more than it
    rows = max(1, 20_000 // len(y_M))
    parts = [
        _descend(law, design_KxMxp, y_M, counts_SxM[i : i + rows], theta_Sxp[i : i + rows], delta)
        for i in range(0, len(theta_Sxp), rows)
    ]
    return tuple(np.concatenate(part) for part in zip(*parts, strict=True)) if parts else (theta_Sxp, *np.empty((2, 0)))


def _descend(law: Law, design_KxMxp, y_M, counts_SxM, theta_Sxp, delta):
    """One batch of `minimise`: damped steps on the majoriser first, then on the exact Hessian.

    A Newton step uses the Hessian's absolute eigenvalues, so it descends where the objective is not convex. A row that
    Newton cannot improve (the Huber loss has kinks in its slope) returns to the majoriser for a few steps. A row ends
    when a barely damped Newton step promises nothing above rounding, or no step however small improves it.
    """
    low_p, high_p = _box(law, "bounds").T
    theta_Sxp = np.clip(theta_Sxp, low_p, high_p)
    end_Sxp, objective_S, gradient_S = theta_Sxp.copy(), np.empty(len(theta_Sxp)), np.empty(len(theta_Sxp))
    row_S, damping_S = np.arange(len(theta_Sxp)), np.full(len(theta_Sxp), 1e-2)
    majoriser_left_S = np.full(len(theta_Sxp), MAJORISER_STEPS)
    value_S, slope_Sxp, hessian, majoriser = huber(theta_Sxp, design_KxMxp, y_M, counts_SxM, delta)

    for step in range(MOST_STEPS):
        free_Sxp = _free(theta_Sxp, slope_Sxp, low_p, high_p)
        newton_S = majoriser_left_S == 0
        curvature = np.where(newton_S[:, None, None], hessian, majoriser) * (free_Sxp[:, :, None] & free_Sxp[:, None])
        eigenvalue_Sxp, basis = np.linalg.eigh(curvature)
        eigenvalue_Sxp = np.abs(eigenvalue_Sxp)
        size_Sx1 = np.maximum(eigenvalue_Sxp.max(axis=1, keepdims=True), 1e-300)
        along_Sxp = ((slope_Sxp * free_Sxp)[:, None] @ basis)[:, 0] / (eigenvalue_Sxp + damping_S[:, None] * size_Sx1)
        move_Sxp = -(basis @ along_Sxp[:, :, None])[:, :, 0] * free_Sxp
        move_Sxp /= np.maximum(1.0, np.abs(move_Sxp).max(axis=1, keepdims=True) / 2)
        promised_S = -(slope_Sxp * move_Sxp).sum(axis=1)

        trial_Sxp = np.clip(theta_Sxp + move_Sxp, low_p, high_p)
        new = trial_Sxp, *huber(trial_Sxp, design_KxMxp, y_M, counts_SxM, delta)
        # at equal objective (to rounding) a clearly smaller gradient is progress too
        level_S = new[1] <= value_S * (1 + 4e-15)
        flatter_S = np.abs(new[2]).max(axis=1) < np.abs(slope_Sxp).max(axis=1) / 2
        better_S = (new[1] < value_S) | (level_S & flatter_S)
        done_S = ~better_S & ((newton_S & (damping_S < 0.1) & (promised_S <= 1e-14 * value_S)) | (damping_S > 1e6))
        retry_S = newton_S & (damping_S > 0.1)
        majoriser_left_S = np.where(
            better_S, np.maximum(majoriser_left_S - 1, 0), np.where(retry_S, MAJORISER_RETRY, majoriser_left_S)
        )
        damping_S = np.where(better_S, np.maximum(damping_S / 10, 1e-12), damping_S * 8)
        for old, fresh in zip((theta_Sxp, value_S, slope_Sxp, hessian, majoriser), new, strict=True):
            old[better_S] = fresh[better_S]

        if step == MOST_STEPS - 1:
            done_S[:] = True
        if done_S.any():
            ended = row_S[done_S]
            end_Sxp[ended], objective_S[ended] = theta_Sxp[done_S], value_S[done_S]
            free_slope_Sxp = slope_Sxp * _free(theta_Sxp, slope_Sxp, low_p, high_p)
            gradient_S[ended] = np.abs(free_slope_Sxp[done_S]).max(axis=1)
            theta_Sxp, value_S, slope_Sxp, hessian, majoriser, counts_SxM, row_S, damping_S, majoriser_left_S = (
                a[~done_S]
                for a in (
                    theta_Sxp, value_S, slope_Sxp, hessian, majoriser, counts_SxM, row_S, damping_S, majoriser_left_S,
                )
            )  # fmt: skip
            if not len(row_S):
                break
    return end_Sxp, objective_S, gradient_S


def _free(theta_Sxp, slope_Sxp, low_p, high_p):
    """Where a descent step may move: not a coordinate at its bound that the slope pushes outwards."""
    return ~(((theta_Sxp <= low_p) & (slope_Sxp > 0)) | ((theta_Sxp >= high_p) & (slope_Sxp < 0)))


def _box(law: Law, which: str) -> np.ndarray:
    """(p, 2) in internal coordinates: the law's "bounds" or "start" box."""
    box_px2 = np.array([getattr(p, which) for p in law.parameters])
    is_coefficient_p = np.array([p.kind == "coefficient" for p in law.parameters])
    return np.where(is_coefficient_p[:, None], np.log(box_px2), box_px2)


def _spread_starts(law: Law, number: int) -> np.ndarray:
    """(number, p) points that fill the start box evenly for any number: an additive recurrence.

    Step sizes are powers of 1 / g with g^(p+1) = g + 1, the generalised golden ratio (Roberts 2018, R_d sequence).
    """
    low_p, high_p = _box(law, "start").T
    golden = 2.0
    for _ in range(60):
        golden = (1 + golden) ** (1 / (len(low_p) + 1))
    steps_p = golden ** -np.arange(1.0, len(low_p) + 1)
    return low_p + (high_p - low_p) * np.mod(0.5 + np.arange(1, number + 1)[:, None] * steps_p, 1.0)


# --- what the table can tell --------------------------------------------------------------------------------------


def _check(law: Law, table: Mapping, loss) -> tuple[np.ndarray, np.ndarray]:
    """Logarithms of the variables (V, M) and of the loss (M,), or a FitError that names the column and the value."""
    missing = [v for v in law.variables if v not in table]
    if missing:
        raise FitError(f"the table lacks {', '.join(missing)}; the {law.name} law needs {', '.join(law.variables)}")
    columns = {}
    for name, column in {**{v: table[v] for v in law.variables}, "loss": loss}.items():
        try:
            columns[name] = np.asarray(column, dtype=np.float64).ravel()
        except (TypeError, ValueError) as error:
            raise FitError(f"column {name} is not numeric: {error}") from None
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise FitError("columns differ in length: " + ", ".join(f"{name} has {n}" for name, n in lengths.items()))
    for name, column in columns.items():
        bad = np.flatnonzero(~(np.isfinite(column) & (column > 0)))
        if len(bad):
            raise FitError(f"column {name} holds {column[bad[0]]:g} (row {bad[0]}); only positive finite numbers fit")
    needed = len(law.names) + 2
    if lengths["loss"] < needed:
        raise FitError(f"{lengths['loss']} points are too few: the {law.name} law needs at least {needed}")
    return np.log([columns[v] for v in law.variables]), np.log(columns["loss"])


def _check_design(law: Law, logs_VxM: np.ndarray, design_KxMxp: np.ndarray) -> None:
    """Raise FitError when no loss at these points could separate the parameters."""
    for name, logs_M in zip(law.variables, logs_VxM, strict=True):
        different = len(np.unique(np.round(logs_M, 9)))
        if different < 3:
            raise FitError(f"the table has {different} different {name}; separating the parameters needs at least 3")
    for i, first in enumerate(law.variables):
        for j in range(i + 1, len(law.variables)):
            slope, offset = np.polyfit(logs_VxM[i], logs_VxM[j], 1)
            if np.std(logs_VxM[j] - slope * logs_VxM[i] - offset) < LEAST_SPREAD:
                raise FitError(
                    f"{law.variables[j]} is {first}^{slope:.2g} times a constant within {LEAST_SPREAD:.0%}, so their "
                    f"terms cannot be separated; vary {law.variables[j]} at fixed {first}"
                )
    if not _determined(law, design_KxMxp, np.ones((1, design_KxMxp.shape[1])))[0]:
        raise FitError(f"these points cannot separate {', '.join(law.names)}; vary {', '.join(law.variables)} more")


def _determined(law: Law, design_KxMxp: np.ndarray, counts_BxM: np.ndarray) -> np.ndarray:
    """(B,) whether each weighting of the points has as many independent slopes as the law has parameters.

    Slopes are taken where all terms are equal and all exponents 1/2: where D follows N, the terms then coincide.
    """
    equal_1xp = np.array([[0.0 if p.kind == "coefficient" else 0.5 for p in law.parameters]])
    slope_Mxp = log_loss(equal_1xp, design_KxMxp)[1][0]
    slope_Mxp = slope_Mxp / np.linalg.norm(slope_Mxp, axis=0)
    eigenvalue_Bxp = np.linalg.eigvalsh((slope_Mxp.T * counts_BxM[:, None]) @ slope_Mxp)
    return eigenvalue_Bxp[:, 0] > 1e-10 * eigenvalue_Bxp[:, -1]


def _resamples(law: Law, design_KxMxp: np.ndarray, number: int, rng) -> tuple[np.ndarray, int]:
    """Counts (number, M) of pairs resamples that determine the law, and how many did not and were drawn again."""
    points = design_KxMxp.shape[1]
    kept, have, redrawn = [np.empty((0, points))], 0, 0
    while have < number:
        drawn_BxM = rng.multinomial(points, np.full(points, 1 / points), size=number - have).astype(np.float64)
        kept.append(drawn_BxM[_determined(law, design_KxMxp, drawn_BxM)])
        have += len(kept[-1])
        redrawn += len(drawn_BxM) - len(kept[-1])
        if redrawn > 100 * number:
            raise FitError(f"{redrawn} of {redrawn + have} bootstrap resamples leave the law open: more points needed")
    return np.concatenate(kept), redrawn


def _bound_remarks(law: Law, sample_Bxp: np.ndarray, level: float) -> dict[str, str]:
    low_p, high_p = _percentiles(sample_Bxp, level)
    remarks = {}
    for p, low, high, (least, most) in zip(law.parameters, low_p, high_p, _box(law, "bounds"), strict=True):
        zero = "zero" if p.kind == "coefficient" else f"its lower bound {least:g}"
        reached = {zero: low <= least + 1e-6, f"its upper bound {p.bounds[1]:g}": high >= most - 1e-6}
        ends = [end for end, is_reached in reached.items() if is_reached]
        remarks[p.name] = f"cannot be told from {' or '.join(ends)}" if ends else ""
    return remarks


def _estimate(value: float, sample_B: np.ndarray, level: float, remark: str, span: float | None = None) -> Estimate:
    """With the first reason not to be identified: `remark`, no interval, a wide one (without `span`, of a share)."""
    low, high = (float(v) for v in _percentiles(sample_B, level))
    if not remark and not math.isfinite(low):
        remark = "has no interval (no bootstraps)"
    elif not remark and span is None and high - low > WIDEST_SHARE:
        remark = f"has a {level:.0%} interval that is {high - low:.2g} wide (more than {WIDEST_SHARE:g})"
    elif not remark and span is not None and high > span * low:
        remark = f"has a {level:.0%} interval that spans a factor {high / low:.3g} (more than {span:g})"
    return Estimate(value, (low, high), not remark, remark)


def _misfit_p(interaction_M: np.ndarray, slope_Mxp: np.ndarray, residual_M: np.ndarray, rng) -> float:
    """P-value of the |correlation| of residuals with the interaction, against permutations of the residuals.

    Only the part of the interaction that no small change of the parameters imitates is correlated: to first order its
    product with the residuals is that with the noise, however the law was fitted. The fit has made the residuals
    smaller than the noise, so the permuted ones are scaled up by the degrees of freedom it took.
    """
    points, parameters = slope_Mxp.shape
    if np.abs(residual_M).max() < 1e-9:  # rounding only
        return 1.0
    rest_M = interaction_M - slope_Mxp @ np.linalg.lstsq(slope_Mxp, interaction_M, rcond=None)[0]
    if np.linalg.norm(rest_M) < 1e-6 * np.linalg.norm(interaction_M):
        return math.nan
    # log L's slopes to its coefficients sum to 1, so `rest` has mean zero and its products are correlations but for a
    # factor that permuting does not change
    permuted_RxM = rng.permuted(np.tile(residual_M, (PERMUTATIONS, 1)), axis=1)
    by_chance_R = np.abs(permuted_RxM @ rest_M) * math.sqrt((points - 1) / (points - parameters))
    return float(1 + (by_chance_R >= abs(residual_M @ rest_M)).sum()) / (1 + PERMUTATIONS)


def _percentiles(sample: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Central interval over the first axis; NaN without a sample."""
    if not len(sample):
        return np.full(sample.shape[1:], np.nan), np.full(sample.shape[1:], np.nan)
    low, high = np.quantile(sample, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
