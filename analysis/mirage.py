"""Is an ability that appears suddenly with scale made by its metric, or does the model itself jump?

A hard metric (all L answers of a chain right) can leap where each single answer improves smoothly: p^L of a smooth p
(Schaeffer et al. 2023). Then nothing but the metric jumps. If a soft metric of the same outputs (cross-entropy, the
probability of the right answer) leaps too, the ability does. And where the hard one does not leap there is no mirage,
but an ability that grows under any metric: a leap is a logistic curve through it that is at its middle at least twice
as steep as a straight line in ln(scale) over the same scales, and a fifth steeper than that through the soft metric
(p^8 of a logistic p is a third narrower than p). Which it is, `diagnose` reads off runs over scales and
seeds, by two laws of the soft metric with as many free numbers each:

    smooth   y = a + (b - a) g(u) + noise         every run lies near one curve
    jump     y = a + noise or y = b + noise       every run is on one of two levels, on the upper with probability g(u)

g is the logistic curve in u = ln(scale) with a place and a width, the noise normal; a, b, place, width and the noise's
standard deviation are free: 5 numbers, so that the larger likelihood needs no penalty. Where all runs of a scale jump
together both laws say the same; then the width decides, against the distance of the scales: a curve that goes from
one level to the other between two neighbouring scales is a jump as far as this table can tell. What neither shows is
`undecided`.

Letters: R runs, G cells of a search grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from analysis.thresholds import rise

Verdict = Literal["mirage", "jump", "smooth", "undecided", "nothing emerges", "already there"]

DECISIVE = math.log(20)  # likelihood ratio, in nats, from which on one law is better than the other
NEAR_CHANCE, HIGH = 0.1, 0.5  # shares of the way from chance to 1: the ability has not begun, and is there
LEAP = 2.0  # times as steep as a straight rise
SHARPER = 1.2  # times as steep as the soft metric
PREDICTED = 0.9  # share of the hard metric's variance that must follow from single answers
LEAST_NOISE = 0.01  # standard deviation, in ranges of the soft metric: what is below is no evidence
PLACES, WIDTHS, ROUNDS = 55, 28, 40


@dataclass(frozen=True)
class Laws:
    """Both laws of one soft metric.

    evidence  log-likelihood of smooth minus that of jump, in nats: positive for smooth
    width     of the smooth law: N90 / N10, how many times larger a model is at 90 % of the way than at 10 %
    gap       ratio of the two neighbouring scales around its middle
    between   how many scales lie between its 10 % and its 90 %
    levels    a and b of the jump law
    """

    evidence: float
    width: float
    gap: float
    between: int
    levels: tuple[float, float]

    @property
    def shape(self) -> Literal["smooth", "jump", "undecided"]:
        """Which law it is."""
        if self.evidence <= -DECISIVE or (self.width <= self.gap and self.between == 0):
            return "jump"
        return "smooth" if self.evidence >= DECISIVE else "undecided"


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` finds.

    verdict   in a word; `reason` in a sentence
    soft      both laws of the soft metric
    leap      how many times as steep as a straight rise the hard metric is at its steepest; NaN where it is flat
    soft_leap the same of the soft metric
    r2        share of the hard metric's variance over runs that its prediction from single answers explains
    excess    mean of hard metric minus prediction: dependence between answers, not an ability of its own
    """

    verdict: Verdict
    reason: str
    soft: Laws
    leap: float
    soft_leap: float
    r2: float
    excess: float


def diagnose(
    scale_R: ArrayLike, soft_R: ArrayLike, hard_R: ArrayLike, predicted_R: ArrayLike, chance: float = 0.0
) -> Diagnosis:
    """Whether what appears in the hard metric is its own making. One row a run: a scale may have several seeds.

    soft_R: better when larger, e.g. minus the cross-entropy. hard_R: shares in [0, 1] with this chance; predicted_R:
    the same from single answers, e.g. the product of their accuracies or their probabilities. Raises ValueError for
    fewer than 5 scales, and for what is not finite.
    """
    scale, soft, hard, predicted = (np.asarray(x, np.float64) for x in (scale_R, soft_R, hard_R, predicted_R))
    laws = two_laws(scale, soft)
    leap, soft_leap = steepness(scale, hard), steepness(scale, soft)
    r2, excess = r_squared(hard, predicted), float(np.mean(hard - predicted))
    mean_K = np.asarray([hard[scale == one].mean() for one in np.unique(scale)]) - chance

    def found(verdict: Verdict, reason: str) -> Diagnosis:
        return Diagnosis(verdict, reason, laws, leap, soft_leap, r2, excess)

    # A jump may come early by luck at one small scale of a single seed, or be missing at one large one.
    low, high = np.median(mean_K[: len(mean_K) // 3 + 1]), mean_K[-2:].max()
    if high < HIGH * (1 - chance):
        return found("nothing emerges", "the hard metric is at neither of the largest two scales more than halfway "
                     "above chance")  # fmt: skip
    if low > NEAR_CHANCE * (1 - chance):
        return found("already there", "the hard metric is above chance at the smallest third of the scales already")
    if laws.shape == "jump":
        return found("jump", "the soft metric has two levels and runs that are on either")
    if laws.shape == "undecided":
        return found("undecided", "a smooth curve and two levels fit the soft metric alike")
    if not leap >= LEAP:
        return found("smooth", f"the soft metric is smooth, and the hard one does not leap: {leap:.1f} times as steep "
                     "as a straight rise")  # fmt: skip
    if not leap >= SHARPER * soft_leap:
        return found("smooth", f"the soft metric is smooth, and the hard one hardly steeper: {leap / soft_leap:.1f} "
                     "times")  # fmt: skip
    if not r2 >= PREDICTED:
        return found("undecided", f"the soft metric is smooth, but single answers explain only {max(r2, 0):.0%} of the "
                     "hard one")  # fmt: skip
    return found("mirage", f"the soft metric is smooth, and single answers explain {r2:.0%} of the hard one")


def r_squared(observed_R: ArrayLike, predicted_R: ArrayLike) -> float:
    """1 - sum of squared errors / sum of squared deviations from the mean; nothing is fitted, so it can be negative.
    NaN where the observed ones are all equal.
    """
    observed, predicted = np.asarray(observed_R, np.float64), np.asarray(predicted_R, np.float64)
    spread = float(((observed - observed.mean()) ** 2).sum())
    return 1 - float(((observed - predicted) ** 2).sum()) / spread if spread > 0 else math.nan


def steepness(scale_R: ArrayLike, score_R: ArrayLike) -> float:
    """Slope in ln(scale) of the best logistic curve at its middle, over that of a straight line from the worst score to
    the best over the same scales: about 1 for a straight line, more the more suddenly a score rises, 0 where it falls.
    NaN where all scores are equal.
    """
    u_R, score = np.log(np.asarray(scale_R, np.float64)), np.asarray(score_R, np.float64)
    if np.ptp(score) == 0:
        return math.nan
    y_R = (score - score.min()) / np.ptp(score)
    place_G, width_G = _grid(np.unique(u_R))
    likelihood_G, height_G = _smooth(rise(u_R, place_G[:, None], width_G[:, None], 1.0), y_R)
    best = int(likelihood_G.argmax())
    return float(height_G[best] * np.ptp(u_R) * math.log(9) / (2 * width_G[best]))


def two_laws(scale_R: ArrayLike, soft_R: ArrayLike) -> Laws:
    """The best smooth law and the best jump of a soft metric over runs."""
    scale, soft = np.asarray(scale_R, np.float64), np.asarray(soft_R, np.float64)
    if scale.ndim != 1 or scale.shape != soft.shape or not (np.isfinite(soft).all() and (scale > 0).all()):
        raise ValueError(
            f"scale has shape {scale.shape}, soft {soft.shape}; both must be (R,), finite, scales positive"
        )
    u_K = np.unique(np.log(scale))
    if len(u_K) < 5 or np.ptp(soft) == 0:
        raise ValueError(
            f"{len(u_K)} scales and {len(np.unique(soft))} values; it takes 5 scales and 2 values at least"
        )
    u_R, y_R = np.log(scale), (soft - soft.min()) / np.ptp(soft)
    place_G, width_G = _grid(u_K)
    g_GxR = rise(u_R, place_G[:, None], width_G[:, None], 1.0)
    smooth_G, _ = _smooth(g_GxR, y_R)
    jump_G, low_G, high_G = _jump(g_GxR, y_R)
    best, other = int(smooth_G.argmax()), int(jump_G.argmax())
    place, width = place_G[best], width_G[best]
    after = int(np.clip(np.searchsorted(u_K, place), 1, len(u_K) - 1))
    levels = soft.min() + np.ptp(soft) * np.asarray([low_G[other], high_G[other]])
    return Laws(
        float(smooth_G[best] - jump_G[other]),
        math.exp(width),
        math.exp(u_K[after] - u_K[after - 1]),
        int((np.abs(u_K - place) < width / 2).sum()),
        (float(levels[0]), float(levels[1])),
    )


def _grid(u_K: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places between the scales and widths from a tenth of their smallest distance to two spans, of all cells."""
    place = np.linspace(u_K[0], u_K[-1], PLACES)
    width = np.geomspace(0.1 * np.diff(u_K).min(), 2 * np.ptp(u_K), WIDTHS)
    place_PxW, width_PxW = np.meshgrid(place, width, indexing="ij")
    return place_PxW.ravel(), width_PxW.ravel()


def _smooth(g_GxR: np.ndarray, y_R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(G,) log-likelihoods with the best a, b and noise, and these b - a."""
    deviation_GxR = g_GxR - g_GxR.mean(axis=1, keepdims=True)
    slope_G = (deviation_GxR @ y_R) / np.maximum((deviation_GxR**2).sum(axis=1), 1e-12)
    height_G = np.maximum(slope_G, 0.0)
    left_GxR = y_R - y_R.mean() - height_G[:, None] * deviation_GxR
    noise_G = np.maximum(np.sqrt((left_GxR**2).mean(axis=1)), LEAST_NOISE)
    return _normal(left_GxR, noise_G).sum(axis=1), height_G


def _jump(g_GxR: np.ndarray, y_R: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(G,) log-likelihoods with the best a, b and noise, and these a and b; by expectation maximisation."""
    tiny = 1e-12
    below_GxR, above_GxR = np.log(np.maximum(1 - g_GxR, tiny)), np.log(np.maximum(g_GxR, tiny))
    low_G, high_G = np.full(len(g_GxR), np.quantile(y_R, 0.1)), np.full(len(g_GxR), np.quantile(y_R, 0.9))
    noise_G = np.full(len(g_GxR), 0.25)

    def both() -> tuple[np.ndarray, np.ndarray]:
        return (
            below_GxR + _normal(y_R - low_G[:, None], noise_G),
            above_GxR + _normal(y_R - high_G[:, None], noise_G),
        )

    for _ in range(ROUNDS):
        on_low_GxR, on_high_GxR = both()
        upper_GxR = 1 / (1 + np.exp(np.clip(on_low_GxR - on_high_GxR, -500, 500)))
        low_G = ((1 - upper_GxR) @ y_R) / np.maximum((1 - upper_GxR).sum(axis=1), tiny)
        high_G = (upper_GxR @ y_R) / np.maximum(upper_GxR.sum(axis=1), tiny)
        square_GxR = (1 - upper_GxR) * (y_R - low_G[:, None]) ** 2 + upper_GxR * (y_R - high_G[:, None]) ** 2
        noise_G = np.maximum(np.sqrt(square_GxR.mean(axis=1)), LEAST_NOISE)
    return np.logaddexp(*both()).sum(axis=1), low_G, high_G


def _normal(left_GxR: np.ndarray, noise_G: np.ndarray) -> np.ndarray:
    """Log-densities."""
    return -0.5 * (left_GxR / noise_G[:, None]) ** 2 - np.log(noise_G[:, None]) - 0.5 * math.log(2 * math.pi)
