"""From a fitted law to a plan: the compute-optimal run, what missing it costs, and smaller models trained for longer.

Everything here follows from a law of N and D by numerical minimisation, so it holds for any law with one best split of
the compute. Compute is C = 6 N D in the convention of N that the law was fitted in (see conventions.py).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from analysis.fit import FitError
from analysis.laws import Law

GOLDEN = (np.sqrt(5) - 1) / 2
REACH = 60.0  # how far from N = D the best split is sought, in units of log N
MOST_LOG_FLOPS = 230.0  # 1e100 FLOPs: what needs more than that is out of reach
LEAST_FLOPS = 2.0
OFF = (0.5, 2.0)
SMALLER = (1.5, 2.0, 4.0)
FAR = 3.0  # a plan further than so many times outside the fitted range is said to be an extrapolation

Surface = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Span:
    """A number with its percentile interval over the draws; an end is infinite where draws cannot reach the target."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Alternative:
    """Another run than the best one, N changed by `factor`: named numbers, see `Plan`."""

    factor: float
    spans: dict[str, Span]


@dataclass(frozen=True)
class Plan:
    """What a law says about one target.

    optimum       C (FLOPs), N, D (tokens), loss (nats per token), tokens_per_parameter
    off           at the optimum's compute with `factor` times the best N: N, D, loss, penalty (nats per token above the
                  optimum) and equivalent (share of the compute with which the best split ends at the same loss)
    overtrained   at the optimum's loss with N smaller by `factor`: N, D, C, compute (multiple of the optimum's) and
                  tokens_per_parameter; infinite where so small a model cannot reach that loss
    unreachable   share of the draws that cannot reach the target loss with any compute
    remarks       in words: extrapolation, draws that cannot reach the target
    """

    optimum: dict[str, Span]
    off: tuple[Alternative, ...]
    overtrained: tuple[Alternative, ...]
    unreachable: float
    level: float
    remarks: tuple[str, ...]


def surface(law: Law, parameters: Mapping) -> Surface:
    """The law as loss (nats per token) of N and D, which broadcast against the parameters. Raises FitError."""
    if set(law.variables) == {"N", "D"}:
        return lambda n, d: law.predict(parameters, {"N": n, "D": d})
    if set(law.variables) == {"C", "M"}:
        return lambda n, d: law.predict(parameters, {"C": 6 * n * d, "M": d / n})
    raise FitError(f"a plan needs a law of N and D; the {law.name} law is one of {', '.join(law.variables)}")


def best_split(
    loss: Surface, flops, per_token: Callable = lambda n: 6 * n, steps: int = 55
) -> tuple[np.ndarray, np.ndarray]:
    """N and D (tokens) with the lowest loss among those that cost `flops`; any shape that broadcasts with the loss's.

    `per_token` gives the FLOPs of a token, 6 N unless said otherwise. Golden-section search in log N: exact to about
    1e-8 in log N when the loss has one minimum along the line of equal compute, as any sum of falling power laws has.
    """
    flops = np.asarray(flops, dtype=np.float64)

    def at(log_n):
        n = np.exp(log_n)
        return loss(n, flops / per_token(n))

    middle = np.log(flops / 6) / 2
    shape = np.broadcast_shapes(np.shape(at(middle)), flops.shape)
    low, high = np.broadcast_to(middle - REACH, shape), np.broadcast_to(middle + REACH, shape)
    left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
    at_left, at_right = at(left), at(right)
    for _ in range(steps):
        down = at_left < at_right
        low, high = np.where(down, low, left), np.where(down, right, high)
        far = GOLDEN * (high - low)
        left, right = np.where(down, high - far, right), np.where(down, left, low + far)
        fresh = at(np.where(down, left, right))
        at_left, at_right = np.where(down, fresh, at_right), np.where(down, at_left, fresh)
    n = np.exp((low + high) / 2)
    return n, flops / per_token(n)


def best_loss(loss: Surface, flops) -> np.ndarray:
    """The lowest loss (nats per token) that `flops` = 6 N D buys."""
    return loss(*best_split(loss, flops, steps=33))  # log N within 1e-5: at a minimum the loss is then exact to 1e-10


def flops_for_loss(loss: Surface, target) -> np.ndarray:
    """The least compute whose best split reaches `target` (nats per token); infinite where none does."""
    return _rising(lambda log_c: -best_loss(loss, np.exp(log_c)), -np.asarray(target), 0.0, MOST_LOG_FLOPS)


def flops_for_size(loss: Surface, n) -> np.ndarray:
    """The compute at which a model of `n` parameters is the best; infinite where it never is."""
    return _rising(lambda log_c: best_split(loss, np.exp(log_c))[0], np.asarray(n), 0.0, MOST_LOG_FLOPS)


def tokens_for_loss(loss: Surface, n, target) -> np.ndarray:
    """The tokens after which a model of `n` parameters is at `target`; infinite where it never is."""
    return _rising(lambda log_d: -loss(np.asarray(n), np.exp(log_d)), -np.asarray(target), 0.0, MOST_LOG_FLOPS)


def _rising(of: Callable, target: np.ndarray, least: float, most: float) -> np.ndarray:
    """exp(x) at which `of` (rising in x) is `target`, by bisection; infinite where it stays below up to `most`."""
    shape = np.broadcast_shapes(np.shape(of(np.asarray(least))), target.shape)
    low, high = np.full(shape, least), np.full(shape, most)
    never = of(high) < target
    for _ in range(46):
        middle = (low + high) / 2
        below = of(middle) < target
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return np.where(never, np.inf, np.exp((low + high) / 2))


def plan(
    law: Law,
    best: Mapping[str, float],
    draws: Mapping[str, np.ndarray],
    *,
    level: float = 0.9,
    reach: float = 1.0,
    flops: float | None = None,
    params: float | None = None,
    loss: float | None = None,
    fitted: Mapping[str, tuple[float, float]] | None = None,
) -> Plan:
    """What the law advises for exactly one target: `flops` (6 N D), `params` (a size) or `loss` (nats per token).

    best: the parameters; draws: the same names, each of shape (B,), for example bootstraps. Every number is computed
    for each draw with that draw's own optimum, so intervals hold what is unknown of the law and not the scatter of
    single runs. reach: how much further out than a normal's the percentiles are read (see `analysis.intervals`).
    fitted: the least and largest N, D and C of the points behind the law, to tell extrapolation.
    Raises FitError for a law that is not one of N and D, a target that is not positive, none or several targets, and a
    loss that is not above the law's floor.
    """
    (name, target), *more = [
        (name, value) for name, value in (("flops", flops), ("params", params), ("loss", loss)) if value is not None
    ] or [("", 0.0)]
    if not name or more:
        raise FitError("a plan has one target: flops, params or loss")
    if not (np.isfinite(target) and target > 0):
        raise FitError(f"{name}={target:g} is not allowed; it must be a positive number")
    rows = {p: np.concatenate([[best[p]], np.asarray(draws.get(p, []), dtype=np.float64)]) for p in law.names}
    of = surface(law, rows)
    c_R = _compute(law, of, name, target, best, rows)
    reached_R = np.isfinite(c_R)
    if not reached_R[0]:
        raise FitError(f"{name}={target:g} is out of reach: the law needs more than 1e100 FLOPs for it")
    # A draw that cannot reach the target is computed at the plan's own compute, then taken as infinite.
    safe_R = np.where(reached_R, c_R, c_R[0])
    n_R, d_R = best_split(of, safe_R)
    loss_R = of(n_R, d_R)
    apart = abs(float(np.log(n_R[0] / d_R[0]))) / 2
    if not (LEAST_FLOPS < c_R[0] < np.exp(MOST_LOG_FLOPS) and apart < REACH - 1 and np.isfinite(loss_R[0])):
        raise FitError(f"{name}={target:g} is out of reach: the law has no best run for it from 2 to 1e100 FLOPs")

    def span(values_R: np.ndarray) -> Span:
        return _span(np.where(reached_R, values_R, np.inf), level, reach)

    optimum = {"C": c_R, "N": n_R, "D": d_R, "loss": loss_R, "tokens_per_parameter": d_R / n_R}
    spans = {key: span(values_R) for key, values_R in optimum.items()}
    off, longer = (
        tuple(
            Alternative(f, {key: span(values_R) for key, values_R in of_factor(of, n_R, d_R, loss_R, f).items()})
            for f in factors
        )
        for of_factor, factors in ((_off, OFF), (_longer, SMALLER))
    )
    unreachable = float(1 - reached_R[1:].mean()) if len(reached_R) > 1 else 0.0
    remarks = _extrapolation(spans, fitted or {})
    if unreachable:
        remarks.append(f"{unreachable:.1%} of the draws cannot reach {name}={target:g} with any compute")
    return Plan(spans, off, longer, unreachable, level, tuple(remarks))


def _off(of: Surface, n_R, d_R, loss_R, factor: float) -> dict[str, np.ndarray]:
    """At the compute of the best split (n, d), what `factor` times its N gives."""
    there_R = of(n_R * factor, d_R / factor)
    share_R = flops_for_loss(of, there_R) / (6 * n_R * d_R)
    return {"N": n_R * factor, "D": d_R / factor, "loss": there_R, "penalty": there_R - loss_R, "equivalent": share_R}


def _longer(of: Surface, n_R, d_R, loss_R, factor: float) -> dict[str, np.ndarray]:
    """At the loss of the best split (n, d), what N smaller by `factor` needs."""
    small_R = n_R / factor
    more_R = tokens_for_loss(of, small_R, loss_R)
    compute_R, ratio_R = small_R * more_R / (n_R * d_R), more_R / small_R
    return {
        "N": small_R,
        "D": more_R,
        "C": 6 * small_R * more_R,
        "compute": compute_R,
        "tokens_per_parameter": ratio_R,
    }


def _compute(law: Law, of: Surface, name: str, target: float, best: Mapping, rows: Mapping) -> np.ndarray:
    """The compute of each draw at the target; infinite where it is out of reach."""
    if name == "flops":
        return np.full(len(next(iter(rows.values()))), target)
    if name == "params":
        return flops_for_size(of, target)
    floor = best["E"] if "E" in law.names else 0.0
    if target <= floor:
        raise FitError(f"loss={target:g} is not above the fitted floor E = {floor:.4g}; no compute reaches it")
    return flops_for_loss(of, target)


def _extrapolation(spans: Mapping[str, Span], fitted: Mapping[str, tuple[float, float]]) -> list[str]:
    """One line for each of N, D and C that lies far outside what was fitted."""
    lines = []
    for key, (least, most) in fitted.items():
        value = spans[key].value
        factor, side = (value / most, "above") if value > most else (least / value, "below")
        if factor > FAR:
            lines.append(
                f"extrapolation: {key} is {factor:.3g} times {side} the fitted range ({least:.3g} to {most:.3g}); the "
                "intervals take the law to hold there"
            )
    return lines


def _span(values_R: np.ndarray, level: float, reach: float) -> Span:
    """First entry, and percentiles of the others around its rank, by order statistics, which infinities do not spoil.

    As analysis.intervals.ends, which interpolates.
    """
    value, draws_B = float(values_R[0]), values_R[1:]
    if not len(draws_B):
        return Span(value, np.nan, np.nan)
    same_B = np.isclose(draws_B, value, rtol=1e-9, atol=0)
    below = ((draws_B < value) & ~same_B).sum() + same_B.sum() / 2
    normal = NormalDist()
    centre, out = normal.inv_cdf((below + 0.5) / (len(draws_B) + 1)), reach * normal.inv_cdf((1 + level) / 2)
    low = float(np.quantile(draws_B, normal.cdf(centre - out), method="lower"))
    high = float(np.quantile(draws_B, normal.cdf(centre + out), method="higher"))
    return Span(value, min(low, value), max(high, value))
