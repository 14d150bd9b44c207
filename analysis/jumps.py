"""Is there a sudden step in a dense, smooth, noisy curve? A test that knows that neighbouring points err alike.

A curve of scores over training bends without a jump, and its points are those of one drifting model: their deviations
are correlated. A test that permutes points, or residuals of a line, calls every such curve broken. Here the null is

    y = smooth(log x) + noise,    noise_i = rho noise_(i-1) + innovation_i

and the alternative adds one step between two neighbouring points. smooth: a natural cubic spline with its knots evenly
in log x, whose number sets what counts as sudden: what a spline of this resolution can follow is no jump. rho is that
of the residuals without their largest step, which would pass for correlation, freed of the bias that it has in short
series behind these fits (found by simulation). The null distribution of the largest gain over all places comes from
permuted innovations: every draw is fitted anew, rho included. Of 200 curves without a step for each rho of 0, .5 and
.9 (101 points, 5 knots) p was at most .05 in 4.5, 6 and 6 %, at most .2 in 14, 16 and 13.5 %.

Letters: M points, P columns of the smooth part, C places of a step, D draws.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from analysis.table import FitError

ALPHA = 0.05
EDGE = 5  # points that lie on either side of a step, at least
RHOS = np.linspace(-0.5, 0.98, 38)  # at which the bias of rho is simulated
SIMULATED = 200  # series for each
PLANTED = 9  # places at which steps are planted, to learn how small a one is found
MOST = 30.0  # the largest of these, in standard deviations of the innovations
HALVINGS = 8  # in the search for the smallest


@dataclass(frozen=True)
class Jump:
    """The best place for a step in a curve.

    index     first point behind it, in order of x
    x         the mean of the two x around it
    size      of the step, in the unit of y
    gain      in BIC over the smooth curve: positive where the step is worth its two parameters (size, place)
    p         share of the null's draws that gain as much
    rho       correlation of neighbouring points' noise
    noise     standard deviation of that noise, in the unit of y
    findable  the size of a step, in the unit of y, that is found at ALPHA at half of the places where it is planted
    """

    index: int
    x: float
    size: float
    gain: float
    p: float
    rho: float
    noise: float
    findable: float


@dataclass(frozen=True)
class _Test:
    """What does not depend on y: the smooth part's columns, an orthonormal basis of them, steps at all places, what the
    smooth part leaves of these (of length 1), and the expected rho of what is `left` at RHOS.
    """

    smooth_MxP: np.ndarray
    basis_MxP: np.ndarray
    step_MxC: np.ndarray
    rough_MxC: np.ndarray
    expected: np.ndarray

    def left(self, y_MxD: np.ndarray) -> np.ndarray:
        """What the smooth part and the largest step, by least squares, leave of each curve."""
        rest_MxD = y_MxD - self.basis_MxP @ (self.basis_MxP.T @ y_MxD)
        pull_CxD = self.rough_MxC.T @ rest_MxD
        best_D, all_D = np.abs(pull_CxD).argmax(axis=0), np.arange(y_MxD.shape[1])
        return rest_MxD - self.rough_MxC[:, best_D] * pull_CxD[best_D, all_D]

    def rho(self, left_MxD: np.ndarray) -> np.ndarray:
        """Correlations of neighbouring noise, freed of their bias."""
        return np.interp(_correlation(left_MxD), self.expected, RHOS)

    def gains(self, y_M: np.ndarray, rho: float) -> tuple[np.ndarray, np.ndarray]:
        """2 x the gain in log-likelihood by a step at each place, and its size; (C,) each."""
        smooth_MxP, step_MxC, white_M = (_whitened(a, rho) for a in (self.smooth_MxP, self.step_MxC, y_M[:, None]))
        basis_MxP = np.linalg.qr(smooth_MxP)[0]
        step_MxC, rest_M = (
            step_MxC - basis_MxP @ (basis_MxP.T @ step_MxC),
            white_M - basis_MxP @ (basis_MxP.T @ white_M),
        )
        pull_C, size_C = (step_MxC.T @ rest_M)[:, 0], (step_MxC**2).sum(axis=0)
        share_C = np.clip(pull_C**2 / size_C / max((rest_M**2).sum(), 1e-300), 0.0, 1 - 1e-12)
        return -len(y_M) * np.log1p(-share_C), pull_C / size_C

    def most(self, y_MxD: np.ndarray) -> np.ndarray:
        """The largest gain of each curve, rho estimated anew."""
        return self.best(y_MxD)[0]

    def best(self, y_MxD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The same, and at which place (D,)."""
        rho_D = self.rho(self.left(y_MxD))
        gain_DxC = np.asarray([self.gains(y_M, rho)[0] for y_M, rho in zip(y_MxD.T, rho_D, strict=True)])
        return gain_DxC.max(axis=1), gain_DxC.argmax(axis=1)


def jump(x_M, y_M, *, knots: int, draws: int = 500, seed: int = 0) -> Jump:
    """The most likely single step in a curve (x, y), x > 0, both of length M; see the module.

    Raises FitError for fewer than knots + 3 EDGE points or 3 knots, x that are not positive and different, numbers that
    are not finite, and a y that is smooth to rounding, which has no noise to hold a step against.
    """
    x_M, y_M = np.asarray(x_M, float).ravel(), np.asarray(y_M, float).ravel()
    least = knots + 3 * EDGE
    if knots < 3 or len(x_M) != len(y_M) or len(x_M) < least:
        raise FitError(f"{len(x_M)} x, {len(y_M)} y, {knots} knots: it takes at least {least} points and 3 knots")
    order = np.argsort(x_M)
    x_M, y_M = x_M[order], y_M[order]
    if not (np.isfinite(x_M).all() and np.isfinite(y_M).all() and x_M[0] > 0 and (np.diff(x_M) > 0).all()):
        raise FitError("x must be positive, finite and different, y finite")
    generator = np.random.default_rng(seed)
    place_C = np.arange(EDGE, len(x_M) - EDGE + 1)
    test = _prepared(spline(np.log(x_M), knots), place_C, generator)
    left_Mx1 = test.left(y_M[:, None])
    if not left_Mx1.std() > 1e-12 * max(np.abs(y_M).max(), 1e-300):
        raise FitError("y is a smooth curve to rounding: it has no noise that a step could be held against")
    rho = float(test.rho(left_Mx1)[0])
    gain_C, size_C = test.gains(y_M, rho)
    fresh_Mx1 = _whitened(left_Mx1, rho)
    # Fitted residuals are smaller than the noise by the parameters that followed it: place and size of a step too.
    fresh_Mx1 = (fresh_Mx1 - fresh_Mx1.mean()) * math.sqrt(len(x_M) / (len(x_M) - knots - 2))
    most_D = test.most(_coloured(generator.permuted(np.tile(fresh_Mx1, (1, draws)), axis=0), rho))
    enough, unit = float(np.quantile(most_D, 1 - ALPHA)), float(fresh_Mx1.std())
    best = int(gain_C.argmax())
    index, size = int(place_C[best]), float(size_C[best])
    return Jump(
        index=index,
        x=float(x_M[index - 1] + x_M[index]) / 2,
        size=size,
        gain=float(gain_C[best] - 2 * math.log(len(x_M))),
        p=float((1 + (most_D >= gain_C[best]).sum()) / (draws + 1)),
        rho=rho,
        noise=unit / math.sqrt(1 - rho**2),
        findable=_findable(test, y_M - size * test.step_MxC[:, best], enough, unit),
    )


def spline(u_M: np.ndarray, knots: int) -> np.ndarray:
    """Natural cubic splines with this many knots, evenly from the first u to the last, as columns (M, knots).

    Linear beyond the knots (Hastie, Tibshirani & Friedman 2009, eq. 5.4 and 5.5).
    """
    knot_K = np.linspace(u_M.min(), u_M.max(), knots)

    def bend(k: int) -> np.ndarray:
        cubes = np.maximum(u_M - knot_K[k], 0) ** 3 - np.maximum(u_M - knot_K[-1], 0) ** 3
        return cubes / (knot_K[-1] - knot_K[k])

    return np.stack([np.ones_like(u_M), u_M, *(bend(k) - bend(knots - 2) for k in range(knots - 2))], axis=1)


def _prepared(smooth_MxP: np.ndarray, place_C: np.ndarray, generator: np.random.Generator) -> _Test:
    points, basis_MxP = len(smooth_MxP), np.linalg.qr(smooth_MxP)[0]
    step_MxC = (np.arange(points)[:, None] >= place_C).astype(float)
    rough_MxC = step_MxC - basis_MxP @ (basis_MxP.T @ step_MxC)
    test = _Test(smooth_MxP, basis_MxP, step_MxC, rough_MxC / np.linalg.norm(rough_MxC, axis=0), RHOS)
    fresh_MxD = generator.standard_normal((points, SIMULATED))
    expected = [_correlation(test.left(_coloured(fresh_MxD, rho))).mean() for rho in RHOS]
    return replace(test, expected=np.maximum.accumulate(expected))


def _correlation(rest_MxD: np.ndarray) -> np.ndarray:
    """Of each point with the one before, (D,)."""
    return (rest_MxD[1:] * rest_MxD[:-1]).sum(axis=0) / (rest_MxD**2).sum(axis=0)


def _whitened(a_MxD: np.ndarray, rho: float) -> np.ndarray:
    """The innovations of noise with this rho; the first point counts with its own variance."""
    return np.concatenate([a_MxD[:1] * math.sqrt(1 - rho**2), a_MxD[1:] - rho * a_MxD[:-1]])


def _coloured(fresh_MxD: np.ndarray, rho: float) -> np.ndarray:
    """Noise with these innovations: the inverse of `_whitened`."""
    from scipy.signal import lfilter

    fresh_MxD = np.concatenate([fresh_MxD[:1] / math.sqrt(1 - rho**2), fresh_MxD[1:]])
    return np.asarray(lfilter([1.0], [1.0, -rho], fresh_MxD, axis=0))


def _findable(test: _Test, y_M: np.ndarray, enough: float, unit: float) -> float:
    """The median over places of the smallest step found in this curve, by halving; infinite beyond MOST units.

    Found is one whose place is told within EDGE points: another step that the curve has does not count for it.
    """
    place = np.unique(np.linspace(0, test.step_MxC.shape[1] - 1, PLANTED).astype(int))
    low_D, high_D = np.zeros(len(place)), np.full(len(place), MOST * unit)

    def found(size_D: np.ndarray) -> np.ndarray:
        gain_D, at_D = test.best(y_M[:, None] + size_D * test.step_MxC[:, place])
        return (gain_D >= enough) & (np.abs(at_D - place) <= EDGE)

    never_D = ~found(high_D)
    for _ in range(HALVINGS):
        middle_D = (low_D + high_D) / 2
        yes_D = found(middle_D)
        low_D, high_D = np.where(yes_D, low_D, middle_D), np.where(yes_D, middle_D, high_D)
    return float(np.median(np.where(never_D, math.inf, high_D)))
