"""How large a batch is worth it: the trade-off between steps and examples, and the gradient noise scale."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from analysis.fit import FitError


@dataclass(frozen=True)
class Tradeoff:
    """(S / S_min - 1) (E / E_min - 1) = 1 with E = B S (McCandlish et al. 2018, eq. 2.11): S = S_min + E_min / B.

    least_steps: S_min, of a batch without end. least_examples: E_min, of a batch of one, in the unit of the batches.
    scatter: root mean square of log S predicted / measured.
    """

    least_steps: float
    least_examples: float
    scatter: float

    @property
    def critical_batch(self) -> float:
        """E_min / S_min, where steps and examples are both twice their least; in the unit of the batches."""
        return self.least_examples / self.least_steps

    def steps(self, batch) -> np.ndarray:
        """Steps that a batch size needs."""
        return self.least_steps + self.least_examples / np.asarray(batch, float)


def fit_tradeoff(batch_B, steps_B) -> Tradeoff:
    """Least squares of log steps over batch sizes (B,) and the steps (B,) they took to the same loss. Raises FitError.

    Batches that never got there are NaN and left out.
    """
    from scipy.optimize import least_squares

    batch, steps = np.asarray(batch_B, float), np.asarray(steps_B, float)
    got_there = np.isfinite(steps)
    batch, steps = batch[got_there], steps[got_there]
    if len(np.unique(batch)) < 3:
        raise FitError(f"{len(np.unique(batch))} batch sizes reached the loss; the trade-off needs at least 3")
    if not ((batch > 0).all() and (steps > 0).all()):
        raise FitError(f"batches and steps must be positive; the smallest are {batch.min():g} and {steps.min():g}")

    def residual_B(logs: np.ndarray) -> np.ndarray:
        return np.logaddexp(logs[0], logs[1] - np.log(batch)) - np.log(steps)

    start = np.log([steps.min(), (steps * batch).min()])
    found = least_squares(residual_B, start, xtol=1e-14, ftol=1e-14, gtol=1e-14)
    least_steps, least_examples = np.exp(found.x)
    return Tradeoff(float(least_steps), float(least_examples), math.sqrt(np.mean(found.fun**2)))


@dataclass(frozen=True)
class NoiseScale:
    """B_simple = tr(Sigma) / |G|^2, McCandlish et al. 2018, eq. 2.9; noise is tr(Sigma) of one example."""

    noise: float
    gradient2: float

    @property
    def batch(self) -> float:
        """The noise scale as a batch size, in examples; NaN where |G|^2 came out as nothing but noise."""
        return self.noise / self.gradient2 if self.gradient2 > 0 else math.nan


def noise_scale(small_norm2, big_norm2, small: int, big: int) -> NoiseScale:
    """From the squared norms of gradients at two batch sizes, any number of each (their appendix A.1).

    The expectation of |G_B|^2 is |G|^2 + tr(Sigma) / B: two sizes give both terms without bias. Their ratio is taken
    of means, since a mean of ratios would be biased.
    """
    if not 0 < small < big:
        raise FitError(f"small={small} must be above 0 and below big={big}")
    of_small, of_big = float(np.mean(small_norm2)), float(np.mean(big_norm2))
    return NoiseScale(
        noise=(of_small - of_big) / (1 / small - 1 / big), gradient2=(big * of_big - small * of_small) / (big - small)
    )
