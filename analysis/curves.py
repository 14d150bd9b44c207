"""Laws of whole training curves: what a falling learning rate takes off the loss, and curves that collapse onto one.

Both laws are linear but for one exponent, so they are fitted by variable projection: for each exponent the best
coefficients follow by (non-negative) least squares, and one dimension is left to search.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from analysis.fit import FitError

EXPONENTS = (0.02, 3.0)  # searched
GRID = 40  # exponents looked at before the best one is refined


# --- a power law above a floor, with linear terms beside it ---------------------------------------------------------


@dataclass(frozen=True)
class PowerFit:
    """loss = floor + scale x^-exponent - sum_k drop_k column_k; all coefficients at least 0.

    scatter: root mean square of predicted / measured - 1. at_bound: the exponent is an end of EXPONENTS, or the floor
    is 0: the points do not tell them.
    """

    floor: float
    scale: float
    exponent: float
    drop_K: np.ndarray
    scatter: float

    @property
    def at_bound(self) -> bool:
        """Whether the points leave floor or exponent open."""
        low, high = EXPONENTS
        return self.floor <= 0 or not low * 1.001 < self.exponent < high / 1.001

    def predict(self, x, columns_KxM=None) -> np.ndarray:
        """Loss at x (M,) with the columns (K, M), in the unit of the losses that were fitted."""
        loss_M = self.floor + self.scale * np.asarray(x, float) ** -self.exponent
        return loss_M if columns_KxM is None else loss_M - self.drop_K @ np.asarray(columns_KxM, float)


def fit_power(x, loss, columns_KxM=None) -> PowerFit:
    """Least squares of the relative error over points x (M,), loss (M,) and columns (K, M). Raises FitError."""
    x_M, loss_M = np.asarray(x, float), np.asarray(loss, float)
    columns = np.empty((0, len(x_M))) if columns_KxM is None else np.atleast_2d(np.asarray(columns_KxM, float))
    for name, values in (("x", x_M), ("loss", loss_M)):
        bad = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
        if len(bad):
            raise FitError(f"{name} holds {values[bad[0]]:g} (row {bad[0]}); only positive finite numbers fit")
    if len(np.unique(x_M)) < 3 + len(columns):
        raise FitError(f"{len(np.unique(x_M))} different x are too few: the law needs at least {3 + len(columns)}")
    from scipy.optimize import minimize_scalar, nnls

    log_x_M, middle = np.log(x_M), float(np.log(x_M).mean())

    def best(exponent: float) -> tuple[np.ndarray, float]:
        basis_MxP = np.column_stack([np.ones_like(x_M), np.exp(-exponent * (log_x_M - middle)), *(-columns)])
        scaled = basis_MxP / loss_M[:, None]
        size_P = np.maximum(np.linalg.norm(scaled, axis=0), 1e-300)
        found_P, error = nnls(scaled / size_P, np.ones_like(x_M))
        return found_P / size_P, error

    grid = np.geomspace(*EXPONENTS, GRID)
    i = int(np.argmin([best(exponent)[1] for exponent in grid]))
    around = (math.log(grid[max(i - 1, 0)]), math.log(grid[min(i + 1, GRID - 1)]))
    finest: Any = minimize_scalar(lambda log: best(math.exp(log))[1], bounds=around, method="bounded",
                             options={"xatol": 1e-9})  # fmt: skip
    exponent = math.exp(finest.x) if finest.fun <= best(grid[i])[1] else float(grid[i])
    (floor, height, *drop), error = best(exponent)
    return PowerFit(
        floor=float(floor),
        scale=float(height * math.exp(exponent * middle)),
        exponent=exponent,
        drop_K=np.asarray(drop),
        scatter=error / math.sqrt(len(x_M)),
    )


# --- learning-rate annealing ---------------------------------------------------------------------------------------


def areas(rate_S, memory: float, first: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(S1, S2) after each step of a schedule, (S,) each; Tissue et al. 2024, eq. 1.

    S1 is the sum of the learning rates. S2 is the sum of the annealing momentum m_i = memory m_(i-1) + r_(i-1) - r_i:
    how far the rate has fallen, remembered for about 1 / (1 - memory) steps. `first`: the step from which a change of
    the rate counts, that is the end of warm-up, whose rise is no annealing.
    """
    rate_S = np.asarray(rate_S, float)
    if not 0 <= memory < 1:
        raise FitError(f"memory={memory} must be at least 0 and below 1")
    fall_S = -np.diff(rate_S, prepend=rate_S[:1])
    fall_S[: first + 1] = 0.0
    momentum, momenta_S = 0.0, np.empty_like(fall_S)
    for i, fall in enumerate(fall_S):
        momentum = memory * momentum + fall
        momenta_S[i] = momentum
    return np.cumsum(rate_S), np.cumsum(momenta_S)


# --- collapse ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Collapse:
    """How well normalised curves agree, at each fraction of the training; after Qiu et al. 2025.

    curves_MxSxX  reducible loss over the run's own final reducible loss, of model m and seed s
    deviation_X   relative standard deviation of the normalised curves over all models and seeds
    noise_X       relative standard deviation of the reducible loss over seeds: root mean square over the models
    """

    curves_MxSxX: np.ndarray
    deviation_X: np.ndarray
    noise_X: np.ndarray

    def ratio(self, window_X) -> float:
        """Geometric mean of deviation / noise over a window, (X,) bool: below 1, curves differ less than seeds do."""
        return float(np.exp(np.mean(np.log(self.deviation_X[window_X] / self.noise_X[window_X]))))


def collapse(loss_MxSxX, floor: float) -> Collapse:
    """Normalises curves, taken at the same fractions of each training, by a floor that lies below all of them."""
    loss = np.asarray(loss_MxSxX, float)
    if not floor < loss.min():
        raise FitError(f"floor={floor:g} must lie below every loss; the smallest is {loss.min():g}")
    if loss.shape[1] < 2:
        raise FitError(f"{loss.shape[1]} seeds have no spread; a collapse needs at least 2")
    above = loss - floor
    curves = above / above[:, :, -1:]
    flat = curves.reshape(-1, curves.shape[-1])
    noise_MxX = above.std(axis=1, ddof=1) / above.mean(axis=1)
    return Collapse(curves, flat.std(axis=0, ddof=1) / flat.mean(axis=0), np.sqrt((noise_MxX**2).mean(axis=0)))
