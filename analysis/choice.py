"""Which law: errors on held-out larger scales with AICc beside them; and where a new run's loss will lie."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import numpy as np

from analysis import intervals
from analysis.fit import Fit, fit
from analysis.laws import Law
from analysis.solve import Objective
from analysis.table import FitError, check_columns, check_weights

LEAST_HELD = 4  # held-out points (with groups: groups); an interval of a mean over fewer says nothing
SAME = 1e-4  # root mean square of log loss below which one law imitates another
PAIRS = 4000  # of a bootstrap law and a residual, behind a prediction interval


@dataclass(frozen=True)
class Choice:
    """One law in a comparison.

    law         its name; `parameters` how many it has
    error       mean squared difference of log predicted and log measured loss on the held-out points, by the law fitted
                to the rest; `interval` over resamples of both, the fitted points and the held-out ones
    behind      how much larger its error is than the best law's; `behind_interval` over the same resamples
    aicc        of the least-squares fit of log loss to the points below the cut (Hurvich & Tsai 1989), less the
                smallest of all laws; NaN with groups, whose points are not independent
    nested_in   laws of the comparison that can imitate this one on this table
    remark      what follows, in words
    """

    law: str
    parameters: int
    fitted_points: int
    held_out: int
    error: float
    interval: tuple[float, float]
    behind: float
    behind_interval: tuple[float, float]
    aicc: float
    nested_in: tuple[str, ...]
    remark: str


def to_json(row: Choice) -> dict:
    """The row for machines; null for what is not a finite number."""

    def plain(value):
        if isinstance(value, float):
            return value if math.isfinite(value) else None
        return [plain(v) for v in value] if isinstance(value, tuple) else value

    return {name: plain(value) for name, value in asdict(row).items()}


def compare(
    laws: Sequence[Law],
    table: Mapping,
    loss,
    *,
    cut: tuple[str, float],
    weights=None,
    groups=None,
    objective: Objective | None = None,
    delta: float | None = None,
    starts: int = 200,
    bootstraps: int = 300,
    seed: int = 0,
    level: float = 0.9,
) -> list[Choice]:
    """Fit each law where the column `cut[0]` of the table is at most `cut[1]`, predict the rest; the best law first.

    Other arguments are those of `analysis.fit.fit`. All held-out points share the error that the noise below the cut
    gave the law, so that intervals over these points alone would call one of two true laws worse: each resample is
    fitted again below the cut, and tested on resampled points (or groups) above it. A law that cannot be fitted there
    comes last, with its reason as the remark. Raises FitError for an unknown column, and for a cut that leaves too few
    points above it.
    """
    name, value = cut
    if name not in table:
        raise FitError(f"cut: the table has no column {name}; it has {', '.join(map(str, table))}")
    beyond_M = np.asarray(table[name], dtype=np.float64).ravel() > value
    weights_M, groups_M = check_weights(weights, groups, len(beyond_M))
    labels_M = np.arange(len(beyond_M)) if groups_M is None else groups_M
    group_H = np.unique(labels_M[beyond_M], return_inverse=True)[1]
    if (held := len(np.unique(group_H))) < LEAST_HELD:
        what = "points" if groups_M is None else "groups"
        raise FitError(f"cut: {held} {what} have {name} above {value:g}; at least {LEAST_HELD} are needed")
    loss_M = np.asarray(loss, dtype=np.float64).ravel()
    below, above, loss_H = _rows(table, ~beyond_M), _rows(table, beyond_M), loss_M[beyond_M]
    options = {"weights": weights_M[~beyond_M], "starts": starts, "seed": seed, "level": level}
    resample = {"groups": None if groups_M is None else groups_M[~beyond_M], "bootstraps": bootstraps}
    fits, criterion, refused = {}, {}, {}
    for law in laws:
        try:
            check_columns(law, table, loss)
            f = fit(law, below, loss_M[~beyond_M], objective=objective, delta=delta, **options, **resample)
            squares = fit(law, below, loss_M[~beyond_M], objective="squared_log", bootstraps=0, **options)
            fits[law.name], criterion[law.name] = f, aicc(squares) if groups_M is None else math.nan
        except FitError as error:
            refused[law] = f"not fitted: {error}"
    error_by_law = {n: np.log(f.law.predict(f.best, above) / loss_H) ** 2 for n, f in fits.items()}
    drawn_by_law = {n: _drawn_errors(f, above, loss_H) for n, f in fits.items()}
    weight_H, interval = weights_M[beyond_M], partial(_mean_interval, group_H, weights_M[beyond_M], level, seed)
    order = sorted(fits, key=lambda n: np.average(error_by_law[n], weights=weight_H))

    def row(fitted: Fit) -> Choice:
        error_H, drawn_BxH = error_by_law[fitted.law.name], drawn_by_law[fitted.law.name]
        behind_H, behind_BxH = error_H - error_by_law[order[0]], drawn_BxH - drawn_by_law[order[0]]
        larger = [fits[n].law for n in order if len(fits[n].law.names) > len(fitted.law.names)]
        return Choice(
            law=fitted.law.name,
            parameters=len(fitted.law.names),
            fitted_points=fitted.points,
            held_out=len(error_H),
            error=float(np.average(error_H, weights=weight_H)),
            interval=interval(error_H, drawn_BxH),
            behind=float(np.average(behind_H, weights=weight_H)),
            behind_interval=interval(behind_H, behind_BxH),
            aicc=criterion[fitted.law.name] - min(criterion.values()),
            nested_in=tuple(big.name for big in larger if _imitates(big, fitted, table)),
            remark="",
        )

    nan, no = math.nan, (math.nan, math.nan)
    counts = int((~beyond_M).sum()), int(beyond_M.sum())
    last = [Choice(x.name, len(x.names), *counts, nan, no, nan, no, nan, (), why) for x, why in refused.items()]
    return _with_remarks([row(fits[n]) for n in order]) + last


def predict_run(
    fitted: Fit, *, level: float | None = None, seed: int = 0, **variables
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The law's loss (nats per token) at e.g. N=..., D=... of shape (G,), and where a new run's loss will lie.

    The interval, at `level` (None: the fit's), holds the law's uncertainty and the scatter of single runs: the
    bootstrap's laws, their distance from the fit widened as its intervals are, times residuals of the fit, widened by
    the degrees of freedom that the fit took and by Student's t. With groups the new run is of a new group. With weights
    it has weight 1. It takes the scatter to be the same at all scales. Raises FitError without bootstraps.
    """
    from scipy.stats import norm, t

    if not fitted.bootstraps:
        raise FitError("bootstraps=0: a prediction interval needs the fit's bootstrap sample")
    level = fitted.level if level is None else level
    at = {name: np.atleast_1d(np.asarray(v, dtype=np.float64)) for name, v in variables.items()}

    def log_loss(theta_Sxp):
        parameters = fitted.law.natural(theta_Sxp, fitted.problem.centre)
        return np.log(fitted.law.predict({name: v_S[:, None] for name, v_S in parameters.items()}, at))

    value_G = log_loss(fitted.theta[None])[0]
    drawn_BxG = np.log(fitted.law.predict({name: v_B[:, None] for name, v_B in fitted.sample.items()}, at))
    reach_G = intervals.reach(fitted.linear, intervals.jacobian(log_loss, fitted.theta), level)
    generator = np.random.default_rng(seed)
    which_P = np.arange(max(PAIRS, fitted.bootstraps)) % fitted.bootstraps
    law_PxG = (reach_G.factor * (drawn_BxG - value_G))[which_P]
    widen, freedom = _scatter(fitted.linear)
    tail = t.ppf((1 + level) / 2, freedom) / norm.ppf((1 + level) / 2)
    run_P = generator.choice(fitted.linear.residual, size=len(which_P)) * generator.choice([-1, 1], size=len(which_P))
    run_PxG = (widen * tail * run_P)[:, None] / (np.exp(value_G) if fitted.objective_name == "squared" else 1.0)
    low_G, high_G = np.quantile(value_G + law_PxG + run_PxG, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return np.exp(value_G), np.exp(low_G), np.exp(high_G)


def _scatter(at: intervals.Linear) -> tuple[float, float]:
    """By what residuals are smaller than the noise, and the degrees of freedom behind their variance.

    Under the working model of the noise: one variance, one correlation within groups.
    """
    rho, points = intervals.within(at), len(at.residual)
    sums_GxP = intervals.sums(at.slope, at.group)
    gram = np.linalg.pinv(at.slope.T @ at.slope, rcond=1e-12, hermitian=True)
    taken = (1 - rho) * at.slope.shape[1] + rho * np.trace(gram @ sums_GxP.T @ sums_GxP)
    left = max(points - taken, 1.0)
    size_G = np.bincount(at.group)
    alike = 1 + rho**2 * (size_G * (size_G - 1)).sum() / points
    return math.sqrt(points / left), max(left / alike, 1.0)


def _rows(table: Mapping, chosen_M: np.ndarray) -> dict[str, np.ndarray]:
    return {name: np.asarray(column).ravel()[chosen_M] for name, column in table.items()}


def aicc(fitted: Fit) -> float:
    """Akaike's criterion, corrected for few points (Hurvich & Tsai 1989), of a least-squares fit of log loss.

    Gaussian likelihood with unknown variance, which counts as a parameter; infinite with too few points for it.
    """
    points, k = fitted.points, len(fitted.law.names) + 1
    if points - k - 1 <= 0:
        return math.inf
    variance = max(2 * fitted.objective / points, 1e-300)
    return points * math.log(variance) + 2 * k + 2 * k * (k + 1) / (points - k - 1)


def _imitates(big: Law, small: Fit, table: Mapping) -> bool:
    """Whether `big` can follow the fitted smaller law at the table's points."""
    wanted_M = small.law.predict(small.best, table)
    try:
        return fit(big, table, wanted_M, objective="squared_log", starts=100, bootstraps=0).scatter < SAME
    except FitError:
        return False


def _drawn_errors(fitted: Fit, above: Mapping, loss_H: np.ndarray) -> np.ndarray:
    """Squared errors of log loss (B, H) of each bootstrap law."""
    parameters = {name: drawn_B[:, None] for name, drawn_B in fitted.sample.items()}
    return np.log(fitted.law.predict(parameters, above) / loss_H) ** 2


def _mean_interval(group_H, weight_H, level: float, seed: int, value_H, drawn_BxH) -> tuple[float, float]:
    """Of a mean over the held-out points: the fit of a constant, so it is calibrated as a fit's intervals are.

    `drawn_BxH`: the values under each bootstrap law; each is averaged over a resample of the held-out groups.
    """
    groups = int(group_H.max()) + 1
    counts_BxG = np.random.default_rng(seed).multinomial(groups, np.full(groups, 1 / groups), size=len(drawn_BxH))
    counts_BxH = counts_BxG[:, group_H].astype(np.float64)
    mean = np.average(value_H, weights=weight_H)
    each_B = (counts_BxH * weight_H * drawn_BxH).sum(axis=1) / (counts_BxH @ weight_H)
    constant = intervals.linear(np.ones((len(value_H), 1)), mean - value_H, group_H, weight_H, counts_BxH)
    factor_1 = intervals.reach(constant, np.ones((1, 1)), level, noise=0.0).factor
    low_1, high_1 = intervals.ends(np.array([mean]), each_B[:, None], level, factor_1)
    return float(low_1[0]), float(high_1[0])


def _with_remarks(found: list[Choice]) -> list[Choice]:
    """What follows from each row, in words."""

    def remark(row: Choice) -> str:
        if row is found[0]:
            level = [other for other in found[1:] if other.behind_interval[0] <= 0]
            if not level:
                return "smallest error on the held-out points" if len(found) > 1 else ""
            smaller = [other.law for other in level if row.law in other.nested_in]
            if smaller:
                return f"no better than {' and '.join(smaller)}, nested in it: more parameters for the same prediction"
            return f"not to be told from {' and '.join(other.law for other in level)}"
        if row.behind_interval[0] > 0:
            return f"predicts worse than {found[0].law}"
        if found[0].law in row.nested_in:
            return f"nested in {found[0].law} and predicts as well with fewer parameters"
        if row.law in found[0].nested_in:
            return f"predicts no better than {found[0].law}, which is nested in it"
        return f"not to be told from {found[0].law}"

    return [replace(row, remark=remark(row)) for row in found]
