"""Bootstrap percentile intervals that cover as often as they say, also from few points and from few clusters.

Plain percentiles of a pairs bootstrap cover too rarely in small tables: resampled residuals are those of a fit that
followed the noise, and a normal quantile stands where one of Student's t belongs. With points that share a run the
number that counts is that of the runs. For a linear model the honest width is known: the cluster standard error, freed
of the bias that it has under a working model of the noise, times a quantile of t whose degrees of freedom follow from
the design (after Bell & McCaffrey 2002 and Imbens & Kolesar 2016, Review of Economics and Statistics 98). So the
bootstrap gives the shape of an interval, and the fit's linear approximation says how far out its percentiles are read:
by the ratio of the honest width to that of the same bootstrap of the linear approximation.

Percentiles are read around the estimate's own rank, so the interval is the estimate +- a number of standard errors on
whatever scale makes the bootstrap distribution normal. `benchmarks/coverage.py` measures what this covers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

LEAST_FREEDOM = 4.0  # with fewer (8 clusters or less, say) an interval rests on the working model more than on the data
STEP = 1e-5  # of central differences


@dataclass(frozen=True)
class Linear:
    """A fit's linear approximation at its optimum, for G clusters of points (G = M where runs are independent).

    slope      (M, p) derivative of the log loss by the fit's coordinates, times the square root of the point's weight
    residual   (M,) log predicted - log measured loss, weighted alike
    group      (M,) the cluster of each point, 0 to G - 1
    shift      (B, p) how far each bootstrap resample moves the linear approximation's coordinates
    inside     share of the points that the objective treats by their squared residual; 1 for squared errors. Far below
               1 (Huber with a delta below the noise: nearly least absolute deviations) the bootstrap's own spread is
               too wide by at least what the small sample makes it too narrow, so the correction fades with this share.
    """

    slope: np.ndarray
    residual: np.ndarray
    group: np.ndarray
    shift: np.ndarray
    inside: float


@dataclass(frozen=True)
class Reach:
    """How far out an interval's percentiles are read: `factor` (Q,) times the normal quantile; `freedom` (Q,) of t."""

    factor: np.ndarray
    freedom: np.ndarray


def linear(slope_Mxp, residual_M, group_M, weight_M, counts_BxM, inside: float = 1.0) -> Linear:
    """The linear approximation of a fit and of its resamples, from unweighted slopes and residuals at the optimum."""
    root_M = np.sqrt(weight_M)
    slope_Mxp, residual_M = slope_Mxp * root_M[:, None], residual_M * root_M
    residual_M = residual_M - slope_Mxp @ (np.linalg.pinv(slope_Mxp) @ residual_M)
    clusters, first_G = np.unique(group_M, return_index=True)
    outer_GxPP = sums(slope_Mxp[:, :, None] * slope_Mxp[:, None], group_M).reshape(len(clusters), -1)
    p = slope_Mxp.shape[1]
    if not len(counts_BxM):
        return Linear(slope_Mxp, residual_M, group_M, np.empty((0, p)), inside)
    counts_BxG = counts_BxM[:, first_G]
    gram_Bxpxp = (counts_BxG @ outer_GxPP).reshape(-1, p, p)
    pull_Bxp = counts_BxG @ sums(slope_Mxp * residual_M[:, None], group_M)
    shift_Bxp = -(np.linalg.pinv(gram_Bxpxp, rcond=1e-12, hermitian=True) @ pull_Bxp[:, :, None])[:, :, 0]
    return Linear(slope_Mxp, residual_M, group_M, shift_Bxp, inside)


def reach(at: Linear, jacobian_Qxp: np.ndarray, level: float, noise: float = 1e-9) -> Reach:
    """How far out to read the percentiles of Q quantities, given their derivatives by the fit's coordinates.

    The factor is at least 1; it is 1 without bootstraps and where no residual exceeds `noise`, the size of rounding.
    The working model of the noise has one variance and one correlation within clusters, estimated from the residuals.
    """
    from scipy.stats import norm, t

    # neither result depends on the quantity's unit, and squares of a constant such as Nc would be beyond any number
    jacobian_Qxp = jacobian_Qxp / np.maximum(np.abs(jacobian_Qxp).max(axis=1, keepdims=True), 1e-300)
    gram = np.linalg.pinv(at.slope.T @ at.slope, rcond=1e-12, hermitian=True)
    lever_QxM = jacobian_Qxp @ gram @ at.slope.T
    trace_Q, square_Q, truth_Q = _moments(at, gram, lever_QxM)
    with np.errstate(divide="ignore", invalid="ignore"):
        freedom_Q = trace_Q**2 / square_Q
        variance_Q = (sums((lever_QxM * at.residual).T, at.group) ** 2).sum(axis=0) * truth_Q / trace_Q
        honest_Q = np.sqrt(variance_Q) * t.ppf((1 + level) / 2, freedom_Q)
        if len(at.shift):
            low_Q, high_Q = np.quantile(at.shift @ jacobian_Qxp.T, [(1 - level) / 2, (1 + level) / 2], axis=0)
            factor_Q = honest_Q / ((high_Q - low_Q) / 2)
        else:
            factor_Q = np.ones(len(jacobian_Qxp))
    noisy = np.abs(at.residual).max(initial=0.0) > noise
    factor_Q = np.where(np.isfinite(factor_Q) & noisy, np.maximum(factor_Q, 1.0), 1.0) ** at.inside
    tail = norm.ppf((1 + level) / 2)
    return Reach(np.minimum(factor_Q, 6 / tail), np.where(np.isfinite(freedom_Q), freedom_Q, 0.0))


def ends(value_Q: np.ndarray, sample_BxQ: np.ndarray, level: float, factor_Q) -> tuple[np.ndarray, np.ndarray]:
    """Low and high (Q,): percentiles of the bootstrap sample around the estimate's rank; NaN without a sample.

    `factor_Q` stretches the distance in normal quantiles; a scalar is the same for all.
    """
    from scipy.special import ndtr, ndtri

    number = len(sample_BxQ)
    if not number:
        return np.full(sample_BxQ.shape[1:], np.nan), np.full(sample_BxQ.shape[1:], np.nan)
    slack_Q = np.where(np.isfinite(value_Q), 1e-9 * np.abs(value_Q), 0.0)  # a constant such as Nc may be infinite
    below_Q = (sample_BxQ < value_Q - slack_Q).sum(axis=0)
    equal_Q = ((sample_BxQ >= value_Q - slack_Q) & (sample_BxQ <= value_Q + slack_Q)).sum(axis=0)
    centre_Q = ndtri((below_Q + equal_Q / 2 + 0.5) / (number + 1))
    sorted_BxQ = np.sort(sample_BxQ, axis=0)

    def percentile(normal_Q):
        place_Q = ndtr(normal_Q) * (number - 1)
        left_Q = np.minimum(place_Q.astype(int), max(number - 2, 0))
        at = np.arange(len(left_Q))
        lower, upper = sorted_BxQ[left_Q, at], sorted_BxQ[np.minimum(left_Q + 1, number - 1), at]
        with np.errstate(invalid="ignore"):
            return np.where(np.isfinite(upper), lower + (place_Q - left_Q) * (upper - lower), upper)

    out_Q = ndtri((1 + level) / 2) * np.broadcast_to(factor_Q, centre_Q.shape)
    low_Q, high_Q = percentile(centre_Q - out_Q), percentile(centre_Q + out_Q)
    return np.minimum(low_Q, value_Q), np.maximum(high_Q, value_Q)


def jacobian(quantity: Callable[[np.ndarray], np.ndarray], theta_p: np.ndarray) -> np.ndarray:
    """(Q, p) derivatives at `theta_p` of a function from coordinates (S, p) to quantities (S, Q), by differences."""
    steps_pxp = STEP * np.eye(len(theta_p))
    return ((quantity(theta_p + steps_pxp) - quantity(theta_p - steps_pxp)) / (2 * STEP)).T


def caution(freedom: Mapping[str, float], clusters: int, clustered: bool) -> str:
    """In words, when too few points or clusters stand behind some interval to trust it; "" when enough do."""
    thin = {name: value for name, value in freedom.items() if value < LEAST_FREEDOM}
    if not thin:
        return ""
    worst = min(thin, key=lambda name: thin[name])
    what = "groups" if clustered else "points"
    return (
        f"{clusters} {what} leave {thin[worst]:.1f} degrees of freedom for {worst} (at least {LEAST_FREEDOM:g} are "
        f"needed): the intervals of {', '.join(thin)} are not to be trusted"
    )


def _moments(at: Linear, gram_pxp, lever_QxM):
    """Under the working model of the noise (variance 1), for each quantity: trace of K, trace of K K, true variance.

    K (G, G) is the covariance of the clusters' contributions to the quantity, made with the fit's residuals; its trace
    is the expectation of the plain cluster variance, and trace^2 / trace(K K) the degrees of freedom. It is a diagonal
    matrix plus one of rank 2p, so nothing here is larger than G x p.
    """
    rho = within(at)
    clusters_GxP = sums(at.slope, at.group)  # Q = Z'X
    inner_pxp = clusters_GxP.T @ clusters_GxP
    p = at.slope.shape[1]
    trace, square, truth = np.empty((3, len(lever_QxM)))
    for q, lever_M in enumerate(lever_QxM):
        one_G, two_G = sums(np.stack([lever_M, lever_M**2], axis=-1), at.group).T
        pull_GxP = sums(lever_M[:, None] * at.slope, at.group)
        diagonal_G = (1 - rho) * two_G + rho * one_G**2
        factor_Gx2p = np.concatenate([pull_GxP, one_G[:, None] * clusters_GxP], axis=1)
        core = np.zeros((2 * p, 2 * p))
        core[:p, :p] = rho * gram_pxp @ inner_pxp @ gram_pxp - (1 - rho) * gram_pxp
        core[:p, p:] = core[p:, :p] = -rho * gram_pxp
        product = core @ (factor_Gx2p.T @ factor_Gx2p)
        trace[q] = diagonal_G.sum() + np.trace(product)
        cross = core @ (factor_Gx2p.T @ (diagonal_G[:, None] * factor_Gx2p))
        square[q] = (diagonal_G**2).sum() + 2 * np.trace(cross) + np.trace(product @ product)
        truth[q] = diagonal_G.sum()
    return trace, square, truth


def within(at: Linear) -> float:
    """The correlation of two residuals of one cluster, between 0 and 0.99; 0 where every cluster is one point."""
    size_G = np.bincount(at.group)
    pairs = (size_G**2 - size_G).sum()
    variance = np.mean(at.residual**2)
    if not pairs or not variance > 0:
        return 0.0
    products = (np.bincount(at.group, at.residual) ** 2).sum() - (at.residual**2).sum()
    return float(np.clip(products / pairs / variance, 0.0, 0.99))


def sums(values_Mx: np.ndarray, group_M: np.ndarray) -> np.ndarray:
    """Sums over the points of each cluster: (M, ...) to (G, ...)."""
    sums = np.zeros((int(group_M.max()) + 1, *values_Mx.shape[1:]))
    np.add.at(sums, group_M, values_Mx)
    return sums
