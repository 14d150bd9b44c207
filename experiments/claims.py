"""Claims: what a paper states, fixed before the experiment, and the verdict that the measurement computes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy

Scope = Literal["same_regime", "toy_analogue"]
VERDICTS = ("reproduced", "contradicted", "not seen at this scale", "inconclusive")  # in the order of tables


@dataclass(frozen=True)
class Claim:
    """One checkable statement. `expected` and `margin` are in `unit`; `row` is its number in claims.md, or None.

    level: of the interval that is held against it, e.g. 0.9. scope: `toy_analogue` where our scale is far from the
    source's; such a claim can be `not seen at this scale` but not `contradicted`. possible: the values that the
    quantity can have, e.g. (0, 1) of a share; an interval ends there.
    """

    id: str
    statement: str
    source: str
    expected: float
    margin: float
    unit: str
    scope: Scope
    level: float = 0.9
    row: int | None = None
    possible: tuple[float, float] = (-math.inf, math.inf)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.expected) and 0 < self.margin < math.inf and 0 < self.level < 1):
            raise ValueError(
                f"claim {self.id}: expected={self.expected} must be finite, margin={self.margin} finite and positive, "
                f"level={self.level} in (0, 1)"
            )


@dataclass(frozen=True)
class Measured:
    """What an experiment found: a value and its interval in the claim's unit, over `seeds` seeds.

    remark: why the data cannot decide, in words ("" where they can), e.g. that a parameter is not identified.
    """

    value: float
    low: float
    high: float
    seeds: int
    remark: str = ""


def mean_and_interval(values_S: Sequence[float] | numpy.ndarray, level: float = 0.9) -> tuple[float, float, float]:
    """The mean of one number per seed and its interval by Student's t; infinitely wide for a single seed."""
    import numpy as np
    from scipy.special import stdtrit

    n, mean = len(values_S), float(np.mean(values_S))
    if n < 2:
        return mean, -math.inf, math.inf
    half = float(stdtrit(n - 1, (1 + level) / 2)) * float(np.std(values_S, ddof=1)) / math.sqrt(n)
    return mean, mean - half, mean + half


def over_seeds(values_S: Sequence[float] | numpy.ndarray, level: float = 0.9, remark: str = "") -> Measured:
    """What one number per seed comes to: `mean_and_interval`."""
    return Measured(*mean_and_interval(values_S, level), len(values_S), remark)


def of_those_that_have(values_S: Sequence[float] | numpy.ndarray, seeds: int, why: str, level: float = 0.9) -> Measured:
    """`over_seeds` of the finite ones of one number per seed, of which there should be so many; `why`: what it means if
    some have none. A remark then leaves the claim open: the seeds that are left are not drawn at random.
    """
    import numpy as np

    values_S = np.asarray(values_S, float)
    there_S = values_S[np.isfinite(values_S)]
    lacks = seeds - len(there_S)
    remark = f"{lacks} of {seeds} seeds have no value: {why}" if lacks else ""
    return over_seeds(there_S, level, remark) if len(there_S) else Measured(math.nan, math.nan, math.nan, 0, remark)


def share_of(count: int, total: int, level: float = 0.9) -> Measured:
    """So many of all, with Jeffreys's interval (the posterior of a share under the prior Beta(1/2, 1/2)): it lies in
    [0, 1], ends there where all agree, and has a width even then. Raises ValueError unless 0 <= count <= total > 0.
    """
    from scipy.stats import beta

    if not 0 <= count <= total or total < 1:
        raise ValueError(f"count={count} must be from 0 to total={total}, and total at least 1")
    low, high = beta.ppf([(1 - level) / 2, (1 + level) / 2], count + 0.5, total - count + 0.5)
    return Measured(count / total, 0.0 if count == 0 else float(low), 1.0 if count == total else float(high), total)


def spoken(
    values_S: Sequence[float] | numpy.ndarray,
    level: float = 0.9,
    form: str = ".3g",
    possible: tuple[float, float] = (-math.inf, math.inf),
) -> str:
    """One number per seed as text for tables: mean (low to high), each in this format; `possible` as in Claim."""
    value, low, high = mean_and_interval(values_S, level)
    return f"{value:{form}} ({max(low, possible[0]):{form}} to {min(high, possible[1]):{form}})"


def from_0(measured: Measured) -> Measured:
    """By how much something exceeds a bound, 0 where it does not: for a claim that only asks for no more than that."""
    value, low, high = (max(x, 0.0) for x in (measured.value, measured.low, measured.high))  # a NaN that is first stays
    return replace(measured, value=value, low=low, high=high)


def within(claim: Claim, measured: Measured) -> Measured:
    """The measurement with its interval cut to what is possible. An endless one stays: it says that there is none."""
    if not (math.isfinite(measured.low) and math.isfinite(measured.high)):
        return measured
    low, high = claim.possible
    return replace(measured, low=max(measured.low, low), high=min(measured.high, high))


def verdict(claim: Claim, measured: Measured) -> str:
    """`reproduced`: the interval lies inside expected +- margin. `contradicted` (for a toy analogue `not seen at this
    scale`): it is disjoint from it. Otherwise, without a finite interval, and where a remark says that the data cannot
    decide, `inconclusive`.
    """
    low, high = claim.expected - claim.margin, claim.expected + claim.margin
    if measured.remark or not (math.isfinite(measured.low) and math.isfinite(measured.high)):
        return "inconclusive"
    if low <= measured.low and measured.high <= high:
        return "reproduced"
    if measured.high < low or measured.low > high:
        return "contradicted" if claim.scope == "same_regime" else "not seen at this scale"
    return "inconclusive"


def record(claim: Claim, measured: Measured, scale: str) -> dict[str, Any]:
    """The claim's entry in claims.json. The verdict is on the interval as it is told."""
    measured = within(claim, measured)
    return {
        "id": claim.id, "row": claim.row, "statement": claim.statement, "source": claim.source,
        "expected": claim.expected, "margin": round(claim.margin, 9), "measured": measured.value,
        "interval": [measured.low, measured.high], "level": claim.level, "unit": claim.unit, "seeds": measured.seeds,
        "scale": scale, "scope": claim.scope, "verdict": verdict(claim, measured), "remark": measured.remark,
    }  # fmt: skip


def false_verdicts_by_chance(claims: Iterable[Claim]) -> float:
    """At most how many verdicts are false by chance, on average: each interval misses the truth with 1 - level."""
    return sum(1 - claim.level for claim in claims)
