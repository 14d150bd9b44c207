"""Four ways from runs to the compute-optimal exponents N ~ C^a and D ~ C^b, side by side, each with its known bias.

`envelope` is approach 1 of Hoffmann et al. 2022 (lowest training curve at each compute), `parabola` and `akima` are
approach 2 (lowest loss of each IsoFLOP budget, by a parabola in log N or by Akima's interpolation), `parametric` is
approach 3 (the Chinchilla law), `projection` the same law with its linear coefficients eliminated.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pandas as pd
from scipy.interpolate import Akima1DInterpolator

from analysis.fit import Fit, FitError, fit, with_interval
from analysis.laws import CHINCHILLA, exponents, frontier
from analysis.planning import Span
from analysis.projection import BOUNDS, project

GRID = 200  # compute values at which the envelope is read off
TRIES = 20  # resamples drawn for each one wanted before the bootstrap is given up


@dataclass(frozen=True)
class Approach:
    """What one approach makes of the runs.

    a, b                  N ~ C^a, D ~ C^b; a + b = 1 where C = 6 N D
    tokens_per_parameter  D / N at `flops`
    bias                  of a: what the approach finds in noise-free losses of the fitted Chinchilla law at exactly
                          these runs, minus that law's own a. NaN without a fitted law. It is not subtracted.
    ratio_bias            the same for tokens_per_parameter, as a factor: found over the law's own. A parabola that is
                          as wide around every optimum has the right slope and still the wrong place when alpha and
                          beta differ
    optima                the optima that the exponents are slopes through: C (FLOPs), N, D (tokens); empty for laws
    refused               budgets without a usable minimum, each with the reason
    redrawn               resamples in which an optimum was lost and that were drawn again
    remark                why there is no number, or no interval, in words ("" where there are both)
    """

    name: str
    a: Span
    b: Span
    tokens_per_parameter: Span
    flops: float
    bias: float
    ratio_bias: float
    optima: pd.DataFrame
    refused: tuple[str, ...] = ()
    redrawn: int = 0
    remark: str = ""


@dataclass(frozen=True)
class _Asked:
    flops: float
    bootstraps: int
    starts: int
    level: float
    seed: int
    groups: str | None


@dataclass(frozen=True)
class _Optima:
    """Optima C, N, D, each of shape (K,), and the budgets that have none (label -> reason)."""

    c: np.ndarray
    n: np.ndarray
    d: np.ndarray
    refused: Mapping[object, str]

    def line(self, flops: float) -> np.ndarray:
        """(a, b, D / N at `flops`) of straight lines through the optima; NaN where there are too few."""
        if len(np.unique(self.c)) < 2:
            return np.full(3, np.nan)
        x = np.log(self.c) - np.log(flops)
        a, log_n = np.polyfit(x, np.log(self.n), 1)
        b, log_d = np.polyfit(x, np.log(self.d), 1)
        return np.asarray([a, b, np.exp(log_d - log_n)])


def approaches(
    runs: pd.DataFrame,
    curves: pd.DataFrame | None = None,
    *,
    flops: float | None = None,
    groups: str | None = None,
    bootstraps: int = 1000,
    starts: int = 200,
    level: float = 0.9,
    seed: int = 0,
) -> dict[str, Approach]:
    """All approaches by name: envelope, parabola, akima, parametric, projection.

    runs      one line per run: N, D (tokens), C (FLOPs), loss (nats per token); `budget` labels the IsoFLOP budget that
              a run belongs to (missing or NaN: none), run_id joins the curves
    curves    logged steps: run_id, loss, and C (FLOPs so far) or D (tokens so far; then C is 6 N D). Losses before a
              schedule has ended are higher than those of a run that ends there, and the envelope does not know
    flops     where tokens per parameter are wanted; the largest C of the runs unless given
    groups    a column of `runs` whose values are resampled as wholes (a seed, a trunk); without it runs are resampled:
              within each budget for approach 2, among all for the others

    Intervals are bootstrap percentiles at `level`. Raises FitError for missing columns and values that are not
    positive; an approach that these runs do not allow says so in its `remark`.
    """
    runs = _checked(runs, ("N", "D", "C", "loss"), "runs").reset_index(drop=True)
    if groups is not None and groups not in runs:
        raise FitError(f"runs lack the column {groups}; they have {', '.join(map(str, runs.columns))}")
    asked = _Asked(
        np.asarray(runs["C"], dtype=np.float64).max() if flops is None else flops,
        bootstraps,
        starts,
        level,
        seed,
        groups,
    )
    try:
        law, why = _fit(runs, asked), ""
    except FitError as error:
        law, why = None, str(error)
    loss_M, exact_M = np.asarray(runs["loss"], dtype=np.float64), None if law is None else _exact(law, runs)
    truth_3 = np.full(3, np.nan) if law is None else _line_of(law.best, asked.flops)
    labels_M = runs.index.to_numpy() if groups is None else runs[groups].to_numpy()

    def resampler(within: str | None = None) -> Callable:
        strata_M = runs[within].to_numpy() if within in runs and groups is None else None
        return _resampler(labels_M, strata_M, np.random.default_rng(seed))

    found = {}
    if curves is None:
        found["envelope"] = _nothing("envelope", asked.flops, "no training curves were given")
    else:
        read = _read_curves(runs, curves)
        exact_MxG = None if law is None else _exact_curves(law, runs, read)
        found["envelope"] = _by_optima(
            "envelope", partial(_envelope, runs, read.grid), read.loss, exact_MxG, truth_3, resampler(), asked
        )
    for name, minimum in (("parabola", parabola_minimum), ("akima", akima_minimum)):
        found[name] = _by_optima(
            name, partial(_isoflop, runs, minimum), loss_M, exact_M, truth_3, resampler("budget"), asked
        )
    found["parametric"] = _parametric(law, why, runs, asked)
    found["projection"] = _projection(runs, exact_M, truth_3, resampler(), law, why, asked)
    return found


def side_by_side(found: Mapping[str, Approach]) -> pd.DataFrame:
    """One line per approach: a, b and tokens_per_parameter, with _low and _high; biases, optima, refused."""
    rows = []
    for name, one in found.items():
        spans = {"a": one.a, "b": one.b, "tokens_per_parameter": one.tokens_per_parameter}
        numbers = {
            key + end: getattr(span, which)
            for key, span in spans.items()
            for end, which in (("", "value"), ("_low", "low"), ("_high", "high"))
        }
        rows.append({"approach": name, **numbers, "flops": one.flops, "bias": one.bias, "ratio_bias": one.ratio_bias,
                     "optima": len(one.optima),
                     "refused": "; ".join(one.refused), "remark": one.remark})  # fmt: skip
    return pd.DataFrame(rows)


# --- approach 2: one minimum per budget ------------------------------------------------------------------------------


def parabola_minimum(log_n, loss, count) -> float:
    """log N at the vertex of the parabola through loss (shape (M,)) over log N, points counted `count` times.

    Raises FitError with the reason where there is no minimum between the smallest and the largest N.
    """
    log_n, loss, count = (np.asarray(v, dtype=np.float64) for v in (log_n, loss, count))
    used = count > 0
    different = len(np.unique(np.round(log_n[used], 9)))
    if different < 3:
        raise FitError(f"{different} different N; a parabola needs at least 3")
    middle = log_n[used].mean()
    curvature, slope, _ = np.polyfit(log_n[used] - middle, loss[used], 2, w=np.sqrt(count[used]))
    if curvature <= 0:
        raise FitError("the parabola opens downwards: there is no minimum")
    vertex = middle - slope / (2 * curvature)
    low, high = log_n[used].min(), log_n[used].max()
    if not low < vertex < high:
        raise FitError(
            f"the parabola's minimum, N = {np.exp(np.clip(vertex, -700, 700)):.3g}, is not between the smallest N "
            f"({np.exp(low):.3g}) and the largest ({np.exp(high):.3g})"
        )
    return float(vertex)


def akima_minimum(log_n, loss, count) -> float:
    """log N at the minimum of Akima's interpolation of the mean loss over log N; as `parabola_minimum` otherwise."""
    log_n, loss, count = (np.asarray(v, dtype=np.float64) for v in (log_n, loss, count))
    used = count > 0
    x_K, which = np.unique(np.round(log_n[used], 9), return_inverse=True)
    if len(x_K) < 3:
        raise FitError(f"{len(x_K)} different N; an interpolation with a minimum inside needs at least 3")
    weight_K = np.bincount(which, count[used])
    curve = Akima1DInterpolator(x_K, np.bincount(which, count[used] * loss[used]) / weight_K)
    flat = np.asarray(curve.derivative().roots(extrapolate=False))
    places = np.concatenate([x_K, flat[np.isfinite(flat)]])
    best = float(places[curve(places).argmin()])
    if best in (x_K[0], x_K[-1]):
        end = "smallest" if best == x_K[0] else "largest"
        raise FitError(f"the lowest loss is at the {end} N ({np.exp(best):.3g}), so the minimum may lie beyond")
    return best


def _isoflop(runs: pd.DataFrame, minimum: Callable, loss_M: np.ndarray, count_M: np.ndarray) -> _Optima:
    """The optimum of every budget that has one; D by the straight line of log D over log N among the budget's runs."""
    if "budget" not in runs:
        return _nowhere({"approach 2": "the runs have no column `budget`"})
    label_M, (n_M, d_M, c_M) = runs["budget"].to_numpy(), np.log(np.asarray(runs[["N", "D", "C"]], dtype=np.float64)).T
    optima, refused = [], {}
    for budget in runs["budget"].dropna().unique():
        mine_M = (label_M == budget) & (count_M > 0)
        try:
            best = minimum(n_M[mine_M], loss_M[mine_M], count_M[mine_M])
        except FitError as error:
            refused[budget] = str(error)
            continue
        w = count_M[mine_M]
        tokens = np.polyval(np.polyfit(n_M[mine_M], d_M[mine_M], 1, w=np.sqrt(w)), best)
        optima.append((np.average(c_M[mine_M], weights=w), best, tokens))
    c, n, d = np.exp(np.asarray(optima).reshape(-1, 3).T)
    return _Optima(c, n, d, refused)


# --- approach 1: the envelope of the curves --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Curves:
    """Loss (M, G) of each run when it has used the compute grid (G,); NaN where its curve is not."""

    grid: np.ndarray
    loss: np.ndarray


def _read_curves(runs: pd.DataFrame, curves: pd.DataFrame) -> _Curves:
    lacking = [name for name in ("run_id", "loss") if name not in curves] + ["C or D"] * (not {"C", "D"} & {*curves})
    if "run_id" not in runs or lacking:
        raise FitError(f"curves lack {', '.join(lacking)}" if lacking else "runs lack run_id, which joins the curves")
    n_of = dict(zip(runs["run_id"], runs["N"].astype(float), strict=True))
    curves = curves.loc[curves["run_id"].isin(n_of) & curves["loss"].notna()]
    n_P = np.asarray([n_of[run_id] for run_id in curves["run_id"]])
    c_P = curves["C"] if "C" in curves else 6 * n_P * curves["D"]
    curves = _checked(curves.assign(C=c_P), ("C", "loss"), "curves").sort_values("C")
    grid_G = np.geomspace(curves["C"].min(), curves["C"].max(), GRID)
    loss_MxG = np.full((len(runs), GRID), np.nan)
    for i, run_id in enumerate(runs["run_id"]):
        mine = curves[curves["run_id"] == run_id]
        if len(mine):
            x, y = np.log(np.asarray(mine["C"], dtype=np.float64)), np.asarray(mine["loss"], dtype=np.float64)
            loss_MxG[i] = np.interp(np.log(grid_G), x, y, left=np.nan, right=np.nan)
    return _Curves(grid_G, loss_MxG)


def _exact_curves(law: Fit, runs: pd.DataFrame, read: _Curves) -> np.ndarray:
    """What the law says where `read` has losses: curves of runs that end wherever one looks."""
    n_Mx1 = np.asarray(runs["N"], dtype=np.float64)[:, None]
    exact_MxG = CHINCHILLA.predict(law.best, {"N": n_Mx1, "D": read.grid / (6 * n_Mx1)})
    return np.where(np.isfinite(read.loss), exact_MxG, np.nan)


def _envelope(runs: pd.DataFrame, grid_G: np.ndarray, loss_MxG: np.ndarray, count_M: np.ndarray) -> _Optima:
    """The size with the lowest curve at each compute, where that is neither the smallest nor the largest one.

    At those two the envelope says only that the best size lies beyond.
    """
    n_M = np.asarray(runs["N"], dtype=np.float64)
    shown_MxG = np.where(np.isfinite(loss_MxG) & (count_M > 0)[:, None], loss_MxG, np.inf)
    there_G = np.isfinite(shown_MxG).any(axis=0)
    best_G = n_M[shown_MxG.argmin(axis=0)]
    present_M = n_M[count_M > 0]
    inside_G = there_G & (best_G > present_M.min()) & (best_G < present_M.max())
    c, n = grid_G[inside_G], best_G[inside_G]
    if len(np.unique(n)) < 2:
        few = f"{len(np.unique(n))} sizes between the smallest and the largest have the lowest curve anywhere"
        return _nowhere({"envelope": f"{few}; at least 2 are needed"})
    return _Optima(c, n, c / (6 * n), {})


# --- from optima to exponents ----------------------------------------------------------------------------------------


def _by_optima(
    name: str,
    optima_of: Callable[[np.ndarray, np.ndarray], _Optima],
    loss: np.ndarray,
    exact: np.ndarray | None,
    truth_3: np.ndarray,
    draw: Callable[[], np.ndarray],
    asked: _Asked,
) -> Approach:
    """An approach that finds optima of `loss` with points counted so often, and draws a line through them."""
    once_M = np.ones(len(loss))
    here = optima_of(loss, once_M)
    refused = tuple(f"{label}: {why}" for label, why in here.refused.items())
    value_3 = here.line(asked.flops)
    if not np.isfinite(value_3).all():
        remark = "; ".join(refused) or "fewer than 2 budgets"
        return replace(_nothing(name, asked.flops, f"fewer than 2 optima ({remark})"), refused=refused)
    sample_Bx3, redrawn = _bootstrap(optima_of, loss, here, draw, asked)
    remark = "" if len(sample_Bx3) or not asked.bootstraps else (
        f"no interval: hardly any resample keeps the optima of all budgets ({redrawn} drawn)"
    )  # fmt: skip
    found_3 = np.full(3, np.nan) if exact is None else optima_of(exact, once_M).line(asked.flops)
    a, b, ratio = (_span(value, sample_B, asked.level) for value, sample_B in zip(value_3, sample_Bx3.T, strict=True))
    bias, ratio_bias = _biases(found_3, truth_3)
    optima = pd.DataFrame({"C": here.c, "N": here.n, "D": here.d})
    return Approach(name, a, b, ratio, asked.flops, bias, ratio_bias, optima, refused, redrawn, remark)


def _bootstrap(optima_of, loss, here: _Optima, draw, asked: _Asked) -> tuple[np.ndarray, int]:
    """(B, 3) lines of resamples that keep the optimum of each budget that has one, and how many others were drawn."""
    lines, drawn = [], 0
    while len(lines) < asked.bootstraps and drawn < TRIES * asked.bootstraps:
        drawn += 1
        again = optima_of(loss, draw())
        line_3 = again.line(asked.flops)
        if np.isfinite(line_3).all() and set(again.refused) <= set(here.refused):
            lines.append(line_3)
    short = len(lines) < asked.bootstraps
    return np.asarray([] if short else lines).reshape(-1, 3), drawn - len(lines)


def _resampler(labels_M: np.ndarray, strata_M: np.ndarray | None, rng: np.random.Generator) -> Callable:
    """Draws counts (M,): of whole groups of equal label, within each stratum where there are some (NaN is none)."""
    if strata_M is None:
        pools = [np.arange(len(labels_M))]
    else:
        pools = [np.flatnonzero(strata_M == one) for one in pd.unique(pd.Series(strata_M).dropna())]

    def draw() -> np.ndarray:
        count_M = np.zeros(len(labels_M))
        for pool in pools:
            _, which = np.unique(labels_M[pool], return_inverse=True)
            size = which.max() + 1
            count_M[pool] = rng.multinomial(size, np.full(size, 1 / size))[which]
        return count_M

    return draw


# --- approach 3, and the same law by variable projection -------------------------------------------------------------


def _parametric(law: Fit | None, why: str, runs: pd.DataFrame, asked: _Asked) -> Approach:
    if law is None:
        return _nothing("parametric", asked.flops, why)
    ratio = Span(*(float(v[0]) for v in with_interval(law, lambda p: _ratio(p, np.asarray([asked.flops])))))
    a, b = (Span(law.derived[key].value, *law.derived[key].interval) for key in ("a", "b"))
    once = runs.assign(loss=_exact(law, runs)).drop_duplicates(["N", "D"])  # without noise seeds are one point
    again = _fit(once, replace(asked, bootstraps=0, groups=None))
    biases = _biases(_line_of(again.best, asked.flops), _line_of(law.best, asked.flops))
    return Approach("parametric", a, b, ratio, asked.flops, *biases, _no_optima(), redrawn=law.redrawn,
                    remark=law.derived["a"].remark)  # fmt: skip


def _projection(runs, exact_M, truth_3: np.ndarray, draw, law: Fit | None, why: str, asked: _Asked) -> Approach:
    if law is None:
        return _nothing("projection", asked.flops, why)
    n, d, loss = (np.asarray(runs[key], dtype=np.float64) for key in ("N", "D", "loss"))
    counts = np.stack([np.ones(len(n)), *(draw() for _ in range(asked.bootstraps))])
    found = project(n, d, loss, counts)
    with np.errstate(divide="ignore", invalid="ignore"):  # a term may be 0
        line_3xR = _line_of(found, asked.flops)
        biases = _biases(_line_of(project(n, d, exact_M), asked.flops)[:, 0], truth_3)
    a, b, ratio = (_span(line_R[0], line_R[1:], asked.level) for line_R in line_3xR)
    at_end_R = np.any([np.isclose(found[key], end) for key in ("alpha", "beta") for end in BOUNDS], axis=0)
    at_end_R |= (found["A"] <= 0) | (found["B"] <= 0)
    remark = "" if not at_end_R[0] and at_end_R.mean() <= (1 - asked.level) / 2 else (
        f"not identified: a term is 0, or an exponent at an end of {BOUNDS}, in {at_end_R.mean():.0%} of the fits"
    )  # fmt: skip
    return Approach("projection", a, b, ratio, asked.flops, *biases, _no_optima(), remark=remark)


def _line_of(parameters: Mapping, flops: float) -> np.ndarray:
    """(3, ...): a, b, D / N at `flops` of Chinchilla laws, whose parameters have any one shape."""
    return np.stack([*exponents(parameters), _ratio(parameters, flops)])


def _biases(found_3: np.ndarray, truth_3: np.ndarray) -> tuple[float, float]:
    """Of a, as a difference, and of tokens per parameter, as a factor."""
    return float(found_3[0] - truth_3[0]), float(found_3[2] / truth_3[2])


def _ratio(parameters: Mapping, flops) -> np.ndarray:
    n, d, _ = frontier(parameters, flops)
    return d / n


def _fit(runs: pd.DataFrame, asked: _Asked) -> Fit:
    table = {key: np.asarray(runs[key], dtype=np.float64) for key in ("N", "D")}
    return fit(
        CHINCHILLA, table, np.asarray(runs["loss"], dtype=np.float64), starts=asked.starts,
        groups=None if asked.groups is None else runs[asked.groups].to_numpy(), bootstraps=asked.bootstraps,
        level=asked.level, seed=asked.seed,
    )  # fmt: skip


def _exact(law: Fit, runs: pd.DataFrame) -> np.ndarray:
    return CHINCHILLA.predict(law.best, {key: np.asarray(runs[key], dtype=np.float64) for key in ("N", "D")})


# --- parts -----------------------------------------------------------------------------------------------------------


def _checked(table: pd.DataFrame, columns: tuple[str, ...], name: str) -> pd.DataFrame:
    """The table, or a FitError that names the column and the value."""
    if lacking := [column for column in columns if column not in table]:
        raise FitError(f"{name} lack {', '.join(lacking)}; they need {', '.join(columns)}")
    for column in columns:
        values = np.asarray(pd.to_numeric(table[column], errors="coerce"), dtype=np.float64)
        if len(bad := np.flatnonzero(~(np.isfinite(values) & (values > 0)))):
            raise FitError(f"{name}: column {column} holds {table[column].iloc[bad[0]]} (row {bad[0]}); only positive "
                           "finite numbers can be used")  # fmt: skip
    if not len(table):
        raise FitError(f"{name} are empty")
    return table


def _span(value: float, sample_B: np.ndarray, level: float) -> Span:
    if not len(sample_B):
        return Span(float(value), np.nan, np.nan)
    low, high = np.quantile(sample_B, [(1 - level) / 2, (1 + level) / 2])
    return Span(float(value), float(low), float(high))


def _nothing(name: str, flops: float, remark: str) -> Approach:
    nan = Span(np.nan, np.nan, np.nan)
    return Approach(name, nan, nan, nan, flops, np.nan, np.nan, _no_optima(), remark=remark)


def _nowhere(refused: Mapping[object, str]) -> _Optima:
    return _Optima(*(np.empty(0) for _ in "CND"), refused=refused)


def _no_optima() -> pd.DataFrame:
    return pd.DataFrame({"C": [], "N": [], "D": []}, dtype=float)
