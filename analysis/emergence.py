"""How suddenly a score rises over sizes, beside what lines, smooth curves, shuffled scores and luck would give.

M is a size, T a task, B a resample. Breakthroughness is that of BIG-bench (Srivastava et al. 2022, section 3.4 and
appendix B), linearity after it (the same with the mean in place of the median; both normalisations in use are told
apart by name, since we could not check which is theirs): heuristics on the order of sizes alone, blind to how far apart
sizes lie. A smooth logistic curve of 12 sizes scores 25 where a straight line scores 11, so neither detects a jump
without the nulls beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from analysis import intervals

TINY = 1e-9  # of the range of the scores: steps below are rounding


@dataclass(frozen=True)
class Breakthrough:
    """B = I / sqrt(median of squared steps), or None where that is unusable and `flagged` says why."""

    value: float | None
    flagged: str | None


@dataclass(frozen=True)
class Linearity:
    """Two definitions in use, or None where the score never changes and `flagged` says so.

    root_mean_square  I / sqrt(mean of squared steps); n - 1 of a straight line over n sizes
    per_step          the same over n - 1: 1 of a straight line, -1 of one that falls, whatever the number of sizes
    """

    root_mean_square: float | None
    per_step: float | None
    flagged: str | None


@dataclass(frozen=True)
class Nulls:
    """Breakthroughness without a jump.

    line      of a straight line, n - 1
    logistic  of a smooth logistic curve over `half_width` logits to either side of its middle, evenly spaced
    low, high   where `level` of the B of the same scores in random order lie (symmetric about 0: every order has its
              reverse); None without scores, or where most orders are unusable
    p         share of random orders with a B at least as large as that of the scores as they stand (with the scores
              themselves counted in, so never 0); None where that B is unusable
    """

    line: float
    logistic: float
    low: float | None
    high: float | None
    p: float | None


def breakthroughness(scale_M: ArrayLike, score_M: ArrayLike) -> Breakthrough:
    """B of scores over sizes. I = sign(argmax - argmin) (max - min), each the first of its kind; steps by size.

    A median step of 0 (half of the scores repeat their neighbour) is flagged: B would be endless for a table that is
    rounded, whatever the curve. Raises ValueError for sizes that repeat (take means over seeds first) and fewer than 3.
    """
    score_M = ordered(scale_M, score_M)
    value = float(breakthroughs(score_M[None])[0])
    if math.isfinite(value):
        return Breakthrough(value, None)
    if np.ptp(score_M) == 0:
        return Breakthrough(None, "the score never changes")
    return Breakthrough(None, "half of the steps or more are 0: the median step cannot measure the others")


def linearity(scale_M: ArrayLike, score_M: ArrayLike) -> Linearity:
    """How evenly the score rises with the order of sizes, in both definitions. Raises as `breakthroughness`."""
    score_M = ordered(scale_M, score_M)
    root = float(linearities(score_M[None])[0])
    if not math.isfinite(root):
        return Linearity(None, None, "the score never changes")
    return Linearity(root, root / (len(score_M) - 1), None)


def breakthroughs(score_BxM: ArrayLike) -> np.ndarray:
    """(B,) of rows in order of size; NaN where the median step is 0."""
    score = np.asarray(score_BxM, np.float64)
    return _over(_rise(score), np.sqrt(np.median(np.diff(score, axis=1) ** 2, axis=1)))


def linearities(score_BxM: ArrayLike) -> np.ndarray:
    """(B,) I / sqrt(mean of squared steps) of rows in order of size; NaN where the score never changes."""
    score = np.asarray(score_BxM, np.float64)
    return _over(_rise(score), np.sqrt(np.mean(np.diff(score, axis=1) ** 2, axis=1)))


def nulls(
    sizes: int, score_M: ArrayLike | None = None, *, half_width: float = 6.0, permutations: int = 2000,
    level: float = 0.9, seed: int = 0,
) -> Nulls:  # fmt: skip
    """What breakthroughness is without a jump, over so many sizes; `score_M` in order of size, for random orders of it.

    A random order whose B is unusable counts as one that is at least as large: p errs to the safe side.
    """
    logistic = float(breakthroughs(1 / (1 + np.exp(-np.linspace(-half_width, half_width, sizes))[None]))[0])
    if score_M is None:
        return Nulls(sizes - 1.0, logistic, None, None, None)
    score_M = np.asarray(score_M, np.float64)
    if score_M.shape != (sizes,):
        raise ValueError(f"score_M has shape {score_M.shape}; {sizes} sizes need one score each")
    shuffled = np.random.default_rng(seed).permuted(np.broadcast_to(score_M, (permutations, sizes)), axis=1)
    here, there_B = float(breakthroughs(score_M[None])[0]), breakthroughs(shuffled)
    usable_B = there_B[np.isfinite(there_B)]
    p = None
    if math.isfinite(here):
        smaller = (usable_B < here * (1 - TINY * np.sign(here))).sum()
        p = float((permutations - smaller + 1) / (permutations + 1))
    if 2 * len(usable_B) < permutations:
        return Nulls(sizes - 1.0, logistic, None, None, p)
    low, high = (float(q) for q in np.quantile(usable_B, [(1 - level) / 2, (1 + level) / 2]))
    return Nulls(sizes - 1.0, logistic, low, high, p)


def falls(scale_R: ArrayLike, score_R: ArrayLike, *, permutations: int = 1999, seed: int = 0) -> float:
    """p of scores that do not depend on scale, against falling ones: the share of random orders of the rows (R,), which
    may share sizes, whose rank correlation (Spearman 1904) with scale is as low; 1 where one of the two never changes.
    """
    from scipy.stats import rankdata

    rank_2xR = np.stack([rankdata(one) - (np.size(one) + 1) / 2 for one in (scale_R, score_R)])
    copies_PxR = np.broadcast_to(rank_2xR[1], (permutations, rank_2xR.shape[1]))
    shuffled_PxR = np.random.default_rng(seed).permuted(copies_PxR, axis=1)
    lower_P = shuffled_PxR @ rank_2xR[0] <= rank_2xR[1] @ rank_2xR[0] + 1e-9
    return float((1 + lower_P.sum()) / (1 + permutations))


def ordered(scale_M: ArrayLike, score_M: ArrayLike) -> np.ndarray:
    """The scores in order of size, float64. Raises ValueError for sizes that repeat, fewer than 3, and NaN."""
    scale_M, score_M = np.asarray(scale_M, np.float64), np.asarray(score_M, np.float64)
    if scale_M.ndim != 1 or scale_M.shape != score_M.shape:
        raise ValueError(f"scale_M has shape {scale_M.shape}, score_M {score_M.shape}; both must be (M,)")
    if len(scale_M) < 3:
        raise ValueError(f"{len(scale_M)} sizes; steps need at least 3")
    if len(np.unique(scale_M)) < len(scale_M):
        raise ValueError("a size stands there twice; take the mean over seeds first")
    if not (np.isfinite(scale_M).all() and np.isfinite(score_M).all()):
        raise ValueError("sizes and scores must be finite")
    return score_M[np.argsort(scale_M)]


# --- luck ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChanceFlags:
    """How many of T tasks a rule flags by luck alone: some size scores `delta` or more above chance.

    single_TxM  probability that guessing gets that far, at one size
    task_T      at any of the task's sizes (sizes guess independently)
    expected    number of tasks, the sum of task_T
    low, high   of the number, at `level`: the sum of independent tasks has a Poisson-binomial distribution
    any         probability that at least one task is flagged
    """

    single_TxM: np.ndarray
    task_T: np.ndarray
    expected: float
    low: int
    high: int
    any: float


@dataclass(frozen=True)
class Survivors:
    """What is left of each task's best score once one has looked everywhere.

    single_T  probability of so many right answers or more by guessing, at the size where that is least likely
    task_T    with the sizes of the task looked through: 1 - (1 - single)^M (Šidák 1967)
    family_T  with all tasks looked through too: Holm's (1979) step-down of task_T, valid for any dependence of tasks
    """

    single_T: np.ndarray
    task_T: np.ndarray
    family_T: np.ndarray


def chance_flags(chance_T: ArrayLike, n_T: ArrayLike, sizes: int, delta: float, *, level: float = 0.9) -> ChanceFlags:
    """chance_T: probability that a guess is right, 0 to 1. n_T: questions per size, (T,) or (T, M). sizes: M.

    Guesses are independent over questions and sizes. Models that share questions, or answer all questions alike, are
    not: look at how many tasks are as far below chance before believing this (mirror the rule).
    """
    chance_T, n_TxM = _questions(chance_T, n_T, sizes)
    # the least number of right answers that counts; a product such as 0.35 * 20 is not to be rounded up beyond 7
    needed_TxM = np.ceil(n_TxM * (chance_T[:, None] + delta) - 1e-9)
    single_TxM = _at_least(needed_TxM, n_TxM, chance_T[:, None])
    task_T = _any(single_TxM, axis=1)
    low, high = number_of(task_T, level)
    return ChanceFlags(single_TxM, task_T, float(task_T.sum()), low, high, float(_any(task_T, axis=0)))


def number_of(p_T: ArrayLike, level: float = 0.9) -> tuple[int, int]:
    """Where the number of independent events with these probabilities lies: its quantiles at `level`."""
    number = np.ones(1)
    for p in np.asarray(p_T, np.float64):
        number = np.convolve(number, [1 - p, p])
    below = np.cumsum(number) + 1e-12  # rounding of sums is no event
    low, high = (int(np.searchsorted(below, q)) for q in ((1 - level) / 2, (1 + level) / 2))
    return low, high


def survivors(score_TxM: ArrayLike, chance_T: ArrayLike, n_T: ArrayLike, *, below: bool = False) -> Survivors:
    """How likely guessing is to do as well as each task's best size, before and after looking everywhere.

    score_TxM: shares of right answers. below: as badly as the worst size instead, the mirror image.
    """
    score = np.asarray(score_TxM, np.float64)
    chance_T, n_TxM = _questions(chance_T, n_T, score.shape[1])
    right_TxM = np.rint(score * n_TxM)
    if below:  # so many wrong answers or more
        right_TxM, chance_T = n_TxM - right_TxM, 1 - chance_T
    single_T = _at_least(right_TxM, n_TxM, chance_T[:, None]).min(axis=1)
    task_T = -np.expm1(score.shape[1] * np.log1p(-np.minimum(single_T, 1 - 1e-16)))
    return Survivors(single_T, task_T, holm(task_T))


def holm(p_T: ArrayLike) -> np.ndarray:
    """(T,) p-values corrected so that the chance of any false one among those at or below a level is at most it."""
    p_T = np.asarray(p_T, np.float64)
    order_T = np.argsort(p_T, kind="stable")
    stepped_T = np.maximum.accumulate(p_T[order_T] * np.arange(len(p_T), 0, -1))
    corrected_T = np.empty_like(p_T)
    corrected_T[order_T] = np.minimum(stepped_T, 1.0)
    return corrected_T


# --- noise of finite tests -----------------------------------------------------------------------------------------


def resampled(score_M: ArrayLike, n_M: ArrayLike, resamples: int, seed: int) -> np.ndarray:
    """(B, M) shares of right answers as n_M fresh questions of the same kind might give them (binomial)."""
    score_M, n_M = np.asarray(score_M, np.float64), np.asarray(n_M)
    counts = np.random.default_rng(seed).binomial(n_M.astype(np.int64), score_M, size=(resamples, len(score_M)))
    return counts / n_M


def reseeded(score_MxS: Sequence[ArrayLike], resamples: int, seed: int) -> np.ndarray:
    """(B, M) means over seeds drawn anew within each size; at least 2 seeds a size, sizes may differ in how many.

    Deviations are widened by sqrt(S / (S - 1)): they stand around a mean that was made of them.
    """
    rng, columns = np.random.default_rng(seed), []
    for score_S in (np.asarray(one, np.float64) for one in score_MxS):
        s = len(score_S)
        if s < 2:
            raise ValueError("a size has a single seed; at least 2 are needed")
        away_BxS = (score_S - score_S.mean())[rng.integers(s, size=(resamples, s))]
        columns.append(score_S.mean() + away_BxS.mean(axis=1) * math.sqrt(s / (s - 1)))
    return np.stack(columns, axis=1)


def interval(value: float, draws_B: ArrayLike, level: float) -> tuple[float, float] | None:
    """Percentiles of resamples around the value's rank (`analysis.intervals`); None where half of them or more are NaN.

    Noise widens every step, so B and linearity of noisy scores lie below those of the curve behind them, and these
    intervals, though they shift against it, do not always reach that far. Of 12 sizes and 1,000 questions 90 %
    intervals of B held the truth in 98 % of tables from a line (11) and in 65 % from a smooth logistic (25, median
    found 18); with 100 questions 97 % and 34 % (found 12); of linearity, which is largest for a line, 0 % and 88 %.
    What `unresolved_steps` says goes before an interval.
    """
    draws = np.asarray(draws_B, np.float64)
    usable = draws[np.isfinite(draws)]
    if 2 * len(usable) <= len(draws):
        return None
    low, high = intervals.ends(np.asarray([value]), usable[:, None], level, 1.0)
    return float(low[0]), float(high[0])


@dataclass(frozen=True)
class Against:
    """What breakthroughness can tell under the noise of a test.

    smooth  the B that 95 % of smooth logistic curves stay below; infinity where more than 5 % have a median step of 0
    power   share of steps, in the middle of the sizes, whose B is beyond that
    """

    smooth: float
    power: float


def against_smooth(low: float, high: float, n_M: ArrayLike, *, curves: int = 1000, seed: int = 0) -> Against:
    """Smooth logistic curves (6 logits to either side, evenly spaced) and steps, both from `low` to `high`, with the
    binomial noise of n_M questions a size. A B that is endless, since the median step is 0, counts as beyond.
    """
    n_M = np.asarray(n_M)
    if not 0 <= low <= high <= 1:
        raise ValueError(f"low={low} and high={high} must be shares, low the lower one")
    smooth_M = 1 / (1 + np.exp(-np.linspace(-6, 6, len(n_M))))
    step_M = (np.arange(len(n_M)) >= len(n_M) // 2).astype(np.float64)
    smooth_B, step_B = (
        np.nan_to_num(breakthroughs(resampled(low + (high - low) * rise_M, n_M, curves, seed + at)), nan=np.inf)
        for at, rise_M in enumerate((smooth_M, step_M))
    )
    most = float(np.quantile(smooth_B, 0.95, method="higher"))
    return Against(most, float((step_B > most).mean()))


def unresolved_steps(score_M: ArrayLike, n_M: ArrayLike) -> float:
    """Share of steps between neighbouring sizes that are within one standard error of themselves (binomial)."""
    score_M, n_M = np.asarray(score_M, np.float64), np.asarray(n_M, np.float64)
    variance_M = score_M * (1 - score_M) / n_M
    return float((np.abs(np.diff(score_M)) <= np.sqrt(variance_M[1:] + variance_M[:-1])).mean())


# --- parts ---------------------------------------------------------------------------------------------------------


def _rise(score_BxM: np.ndarray) -> np.ndarray:
    """I: how far the score goes, positive where its maximum comes after its minimum."""
    return np.sign(score_BxM.argmax(axis=1) - score_BxM.argmin(axis=1)) * np.ptp(score_BxM, axis=1)


def _over(rise_B: np.ndarray, step_B: np.ndarray) -> np.ndarray:
    usable_B = step_B > TINY * np.abs(rise_B)
    return np.where(usable_B, rise_B / np.where(usable_B, step_B, 1.0), np.nan)


def _at_least(right_TxM: np.ndarray, n_TxM: np.ndarray, p_Tx1: np.ndarray) -> np.ndarray:
    """Probability of so many successes or more: the regularised incomplete beta function, exact in the far tail."""
    from scipy.special import betainc

    inside_TxM = np.clip(right_TxM, 1, n_TxM)
    tail_TxM = betainc(inside_TxM, n_TxM - inside_TxM + 1, p_Tx1)
    return np.where(right_TxM < 1, 1.0, np.where(right_TxM > n_TxM, 0.0, tail_TxM))


def _any(p: np.ndarray, axis: int) -> np.ndarray:
    """Probability that at least one of independent events happens; exact for small ones."""
    with np.errstate(divide="ignore"):  # a sure event
        return -np.expm1(np.log1p(-p).sum(axis=axis))


def _questions(chance_T: ArrayLike, n_T: ArrayLike, sizes: int) -> tuple[np.ndarray, np.ndarray]:
    chance_T, n = np.asarray(chance_T, np.float64), np.asarray(n_T, np.float64)
    if not ((chance_T >= 0) & (chance_T < 1)).all():
        raise ValueError("chance must be at least 0 and below 1")
    if not ((n >= 1) & (n == np.rint(n))).all():
        raise ValueError("questions must be whole numbers, at least 1")
    return chance_T, np.broadcast_to(n if n.ndim == 2 else n[:, None], (len(chance_T), sizes))
