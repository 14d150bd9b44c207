"""How many dimensions has a cloud of points? Estimators, each with its interval, and clouds whose answer is known.

Near a point of a d-dimensional manifold that is sampled evenly, volumes of balls grow as r^d, so the ratios of its
distances to its neighbours tell d without the density. All of it rests on that: with few points in many dimensions
nothing is near, most points lie at the rim, and the estimates fall short of d (`MANIFOLDS` shows by how much).

A result's interval takes ratios of different points as independent. They are not quite (neighbours share neighbours,
the more so the larger k), so it is too narrow for Gride with large k; over seeds is safer. Two points in the same place
have a distance of 0 and no ratio: estimators refuse them, `distinct` drops them. All in float64.

Letters: N points, D coordinates, K neighbours, d the dimension. Sources: TwoNN, Facco et al. 2017; Gride, Denti et al.
2022; the participation ratio of covariance eigenvalues is a linear measure, and counts the directions that a cloud
fills, whether or not it is curved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

Points = np.ndarray
SPARE = 8  # candidates beyond the K that are asked for, against rounding in how they are found


@dataclass(frozen=True)
class Dimension:
    """An estimate with its interval, from so many points."""

    value: float
    low: float
    high: float
    points: int


def distinct(x_NxD: Points) -> Points:
    """The points without repetitions, [M, D], in the order in which each comes first."""
    _, first_M = np.unique(x_NxD, axis=0, return_index=True)
    return x_NxD[np.sort(first_M)]


def neighbours(x_NxD: Points, count: int) -> NDArray[np.float64]:
    """Distances of each point to its `count` nearest others, rising, [N, K].

    Candidates come from a product of matrices, a block of points at a time, and their distances from differences: the
    product alone loses the small ones. Raises ValueError for too few points, values that are not finite, and points in
    the same place.
    """
    x_NxD = np.asarray(x_NxD, np.float64)
    if x_NxD.ndim != 2 or not 1 <= count < len(x_NxD):
        raise ValueError(f"points {x_NxD.shape} must be [N, D] with more than count={count} of them, count at least 1")
    if not np.isfinite(x_NxD).all():
        raise ValueError("points must be finite")
    x_NxD = x_NxD - x_NxD.mean(axis=0)
    square_N = (x_NxD**2).sum(axis=1)
    taken = min(count + SPARE, len(x_NxD) - 1)
    blocks = []
    for start in range(0, len(x_NxD), 512):
        block_BxD = x_NxD[start : start + 512]
        far_BxN = square_N - 2 * block_BxD @ x_NxD.T
        far_BxN[np.arange(len(block_BxD)), start + np.arange(len(block_BxD))] = np.inf
        near_BxC = np.argpartition(far_BxN, taken - 1, axis=1)[:, :taken]
        r_BxC = np.sqrt(((x_NxD[near_BxC] - block_BxD[:, None]) ** 2).sum(axis=2))
        blocks.append(np.sort(r_BxC, axis=1)[:, :count])
    r_NxK = np.concatenate(blocks)
    if not r_NxK[:, 0].all():
        raise ValueError(f"{(r_NxK[:, 0] == 0).sum()} points have another in the same place: take distinct(points)")
    return r_NxK


def twonn(r_NxK: NDArray[np.float64], level: float = 0.9) -> Dimension:
    """TwoNN by maximum likelihood, (N - 1) / sum log(r2 / r1), without bias on Pareto ratios; its interval is exact for
    them: d times the sum has a Gamma distribution of shape N. Raises ValueError if all ratios are 1.
    """
    from scipy.special import gammaincinv

    n, total = len(r_NxK), float(np.log(r_NxK[:, 1] / r_NxK[:, 0]).sum())
    if not total > 0:
        raise ValueError("all first and second neighbours are equally far: the points lie on a lattice")
    low, high = (float(gammaincinv(n, q)) / total for q in ((1 - level) / 2, (1 + level) / 2))
    return Dimension((n - 1) / total, low, high, n)


def twonn_fit(
    r_NxK: NDArray[np.float64], keep: float = 0.9, level: float = 0.9, draws: int = 200, seed: int = 0
) -> Dimension:
    """TwoNN as published: the slope through the origin of -log(1 - F) on log(r2 / r1), F the share of ratios up to this
    one, over the smallest `keep` of them; its interval by bootstrap of the ratios.
    """
    log_N = np.log(r_NxK[:, 1] / r_NxK[:, 0])
    kept = int(len(log_N) * keep)
    if not 2 <= kept < len(log_N):
        raise ValueError(f"keep={keep} of {len(log_N)} points must leave at least 2, and leave some out")
    y_M = -np.log1p(-np.arange(1, kept + 1) / len(log_N))

    def slope(log_xN: NDArray[np.float64]) -> NDArray[np.float64]:
        x_xM = np.sort(log_xN, axis=-1)[..., :kept]
        return (x_xM * y_M).sum(axis=-1) / (x_xM**2).sum(axis=-1)

    draw = np.random.default_rng(seed)
    again_B = slope(log_N[draw.integers(0, len(log_N), (draws, len(log_N)))])
    low, high = np.quantile(again_B, [(1 - level) / 2, (1 + level) / 2])
    return Dimension(float(slope(log_N)), float(low), float(high), len(log_N))


def gride(r_NxK: NDArray[np.float64], k: int, level: float = 0.9) -> Dimension:
    """Gride: d from the ratios of distances to the 2k-th and the k-th neighbour; larger k looks at larger scales.

    Maximum likelihood of Denti et al.'s density with N - 1 in place of N, which makes it `twonn` at k = 1; its interval
    is asymptotic, from the observed information. Raises ValueError for too few neighbours and for ratios of 1.
    """
    from scipy.optimize import root_scalar
    from scipy.special import ndtri

    if not 1 <= k <= r_NxK.shape[1] // 2:
        raise ValueError(f"k={k} must be at least 1 and needs {2 * k} neighbours; there are {r_NxK.shape[1]}")
    s_N = np.log(r_NxK[:, 2 * k - 1] / r_NxK[:, k - 1])
    if not s_N.any() or (k > 1 and not s_N.all()):
        raise ValueError(f"neighbours {k} and {2 * k} of a point are equally far: the points lie on a lattice")
    n, total = len(s_N), float(s_N.sum())

    def score(d: float) -> float:
        crowd = (k - 1) * float((s_N / -np.expm1(-d * s_N)).sum()) if k > 1 else 0.0
        return (n - 1) / d + crowd - (2 * k - 1) * total

    high = (n - 1) / total
    while score(high) > 0:
        high *= 2
    low = high / 2
    while score(low) < 0:
        low /= 2
    d = float(root_scalar(score, bracket=(low, high), method="brentq", xtol=1e-12 * high, rtol=1e-12).root)
    crowd = (k - 1) * float((s_N**2 * np.exp(-d * s_N) / np.expm1(-d * s_N) ** 2).sum()) if k > 1 else 0.0
    half = float(ndtri((1 + level) / 2)) / math.sqrt((n - 1) / d**2 + crowd)
    return Dimension(d, d - half, d + half, n)


def participation_ratio(x_NxD: Points, level: float = 0.9, draws: int = 100, seed: int = 0) -> Dimension:
    """(sum lambda)^2 / sum lambda^2 of the covariance's eigenvalues lambda: 1 for a line, D for a round cloud; its
    interval by bootstrap of the points (NaN where draws is 0). Raises ValueError where all points are one.
    """
    x_NxD = np.asarray(x_NxD, np.float64) - np.mean(x_NxD, axis=0, dtype=np.float64)
    if not x_NxD.any():
        raise ValueError("all points are in the same place")

    def ratio(weight_N: NDArray[np.float64]) -> float:
        share_N = weight_N / weight_N.sum()
        mean_D = share_N @ x_NxD
        covariance_DxD = (share_N[:, None] * x_NxD).T @ x_NxD - np.outer(mean_D, mean_D)
        return float(np.trace(covariance_DxD) ** 2 / (covariance_DxD**2).sum())

    n, draw = len(x_NxD), np.random.default_rng(seed)
    again_B = [ratio(draw.multinomial(n, np.full(n, 1 / n)).astype(np.float64)) for _ in range(draws)]
    low, high = np.quantile(again_B, [(1 - level) / 2, (1 + level) / 2]) if draws else (math.nan, math.nan)
    return Dimension(ratio(np.ones(n)), float(low), float(high), n)


def by_sample_size(x_NxD: Points, sizes: Sequence[int], seed: int, parts: int = 4) -> list[float]:
    """`twonn` of random samples of each size: the mean over as many disjoint ones as there are, at most `parts`.

    Thinning a cloud moves neighbours apart: it looks at the same cloud at a larger scale. Raises ValueError for a size
    that is larger than the number of points.
    """
    order_N = np.random.default_rng(seed).permutation(len(x_NxD))
    found = []
    for size in sizes:
        if size > len(x_NxD):
            raise ValueError(f"size={size} is more than the {len(x_NxD)} points")
        samples = [order_N[i * size : (i + 1) * size] for i in range(min(parts, len(x_NxD) // size))]
        found.append(float(np.mean([twonn(neighbours(x_NxD[sample], 2)).value for sample in samples])))
    return found


def gaussian_like(x_NxD: Points, seed: int) -> NDArray[np.float64]:
    """A null: as many points of a Gaussian of the same mean and covariance: the same directions, but no curve."""
    x_NxD = np.asarray(x_NxD, np.float64)
    mean_D = x_NxD.mean(axis=0)
    # Mixing centred points by independent normal numbers has their covariance, of whatever rank it is.
    _, s_D, axes_DxD = np.linalg.svd(x_NxD - mean_D, full_matrices=False)
    draw = np.random.default_rng(seed).standard_normal((len(x_NxD), len(s_D)))
    return mean_D + (draw * (s_D / math.sqrt(len(x_NxD)))) @ axes_DxD


# --- clouds whose dimension is known ---------------------------------------------------------------------------------


def cube(draw: np.random.Generator, points: int, d: int) -> NDArray[np.float64]:
    """Even over the unit cube, [N, d]."""
    return draw.random((points, d))


def ball(draw: np.random.Generator, points: int, d: int) -> NDArray[np.float64]:
    """Even over the unit ball, [N, d]."""
    x_Nxd = draw.standard_normal((points, d))
    return x_Nxd / np.linalg.norm(x_Nxd, axis=1, keepdims=True) * draw.random((points, 1)) ** (1 / d)


def sphere(draw: np.random.Generator, points: int, d: int) -> NDArray[np.float64]:
    """Even over the unit sphere of dimension d, [N, d + 1]."""
    x_NxD = draw.standard_normal((points, d + 1))
    return x_NxD / np.linalg.norm(x_NxD, axis=1, keepdims=True)


def gaussian(draw: np.random.Generator, points: int, d: int) -> NDArray[np.float64]:
    """Standard normal, [N, d]."""
    return draw.standard_normal((points, d))


def roll(draw: np.random.Generator, points: int, d: int) -> NDArray[np.float64]:
    """A sheet rolled up, with d - 1 straight sides, [N, d + 1]: the Swiss roll for d = 2. Not quite even along its
    spiral, as usual.
    """
    angle_N = 1.5 * math.pi * (1 + 2 * draw.random(points))
    curve_Nx2 = angle_N[:, None] * np.stack([np.cos(angle_N), np.sin(angle_N)], axis=1)
    return np.concatenate([curve_Nx2, 20 * draw.random((points, d - 1))], axis=1)


MANIFOLDS: dict[str, Callable[[np.random.Generator, int, int], NDArray[np.float64]]] = {
    "cube": cube, "ball": ball, "sphere": sphere, "Gaussian": gaussian, "Swiss roll": roll,
}  # fmt: skip


def cloud(name: str, d: int, points: int, coordinates: int, noise: float, seed: int) -> NDArray[np.float64]:
    """A cloud of `MANIFOLDS` turned at random into so many coordinates, [N, D]; noise: standard deviation of what is
    added to every coordinate, as a share of the cloud's root mean square distance from its mean. Raises ValueError for
    too few coordinates.
    """
    draw = np.random.default_rng(seed)
    flat_Nxd = MANIFOLDS[name](draw, points, d)
    if flat_Nxd.shape[1] > coordinates:
        raise ValueError(f"coordinates={coordinates} must be at least {flat_Nxd.shape[1]} for {name} of dimension {d}")
    turn_DxD = np.linalg.qr(draw.standard_normal((coordinates, coordinates)))[0]
    size = math.sqrt(float(flat_Nxd.var(axis=0).sum()))
    spread_NxD = noise * size * draw.standard_normal((points, coordinates))
    return flat_Nxd @ turn_DxD[: flat_Nxd.shape[1]] + spread_NxD
