"""The optimiser: thousands of small bounded problems of one law and one table, in float64, all refined to convergence.

A problem's rows differ in their weights of the points and in where they start. Sums of power laws have closed-form
derivatives in NumPy, which need no compilation; for other laws JAX derives and compiles the law's curve.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal

import numpy as np

from analysis.laws import Law

Objective = Literal["huber", "squared_log", "squared"]
OBJECTIVE_NAMES: tuple[Objective, ...] = ("huber", "squared_log", "squared")
FAR = 10.0  # mean |residual| in deltas, beyond which a row is far from its optimum
MAJORISER_FAR, MAJORISER_NEAR, MAJORISER_RETRY, MOST_STEPS = 20, 3, 4, 1000
SHARPER = 10.0  # delta's next value, when a step promises less than ROUGH of the objective
ROUGH = 1e-2
STRANDS = 2  # parts that threads work on, whatever the machine's cores: more of them wait for Python's lock
ELEMENTS = 48_000  # rows x points at once: few calls, and still in the cache
PADDED = 32  # points are padded to a multiple of it, and JAX's rows come in this number, so that few programs compile
LONGEST = 2.0  # of one coordinate's step


@dataclass(frozen=True, eq=False)
class Problem:
    """What is minimised: the weighted sum over points of a loss of the centred log loss, inside the law's bounds.

    logs (V, M): centred log variables. y (M,): centred log loss. centre (V+1,): what was subtracted.

    objective    loss of one point, with r = log L_predicted - log L_measured
    huber        r^2 / 2 up to |r| = delta, delta (|r| - delta / 2) beyond (Huber 1964)
    squared_log  r^2 / 2
    squared      (L_predicted - L_measured)^2 / 2, in nats^2
    """

    law: Law
    logs_VxM: np.ndarray
    y_M: np.ndarray
    centre: np.ndarray
    objective: Objective = "huber"
    delta: float = 1e-3

    @cached_property
    def bounds(self) -> np.ndarray:
        """(p, 2) lowest and highest coordinates."""
        return self.law.box("bounds", self.logs_VxM)

    @cached_property
    def evaluate(self) -> Callable[..., tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Objective (S,), gradient (S, p) and curvature (S, p, p); arguments below.

        The curvature is the Hessian where `newton`, elsewhere the Gauss-Newton matrix, whose weights make it for Huber
        the matrix of the weighted least-squares problem that touches the objective from above: always positive, good
        far from the optimum. Arguments: theta (S, p), weights (S, M), newton (S,), and the Huber loss's delta (S,).
        """
        return _compiled(self) if self.law.curve is not None else _power_sums(self)

    def losses(self, theta_Sxp: np.ndarray) -> np.ndarray:
        """Centred log losses (S, M)."""
        at = {name: theta_Sxp[:, i : i + 1] for i, name in enumerate(self.law.names)}
        variables = self.law.variables
        middle = dict(zip(variables, self.centre, strict=False))
        return self.law.log_loss(at, dict(zip(variables, self.logs_VxM, strict=True)), middle)


def point_losses(objective: Objective, delta: Any, log_loss: Any, y: Any, level: Any, xp: Any) -> tuple[Any, ...]:
    """Loss of each point, its first and second derivative by the log loss, and its Gauss-Newton weight.

    `level` is the log loss at the centre; `xp` NumPy or jax.numpy.
    """
    if objective == "squared":
        loss = xp.exp(log_loss + level)
        error = loss - xp.exp(y + level)
        return error**2 / 2, error * loss, loss**2 + error * loss, loss**2
    residual = log_loss - y
    if objective == "squared_log":
        one = xp.ones_like(residual)
        return residual**2 / 2, residual, one, one
    psi = xp.clip(residual, -delta, delta)
    weight = xp.minimum(1.0, delta / xp.maximum(abs(residual), 1e-300))
    return psi * (residual - psi / 2), psi, 1.0 * (abs(residual) < delta), weight


def _power_sums(problem: Problem) -> Callable[..., tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Closed form. The log of a sum of terms with logs t_k @ theta has slope sum_k s_k t_k, s_k the terms' shares, and
    Hessian sum_k s_k t_k t_k' less the slope's outer product."""
    design_KxMxp = problem.law.design(problem.logs_VxM)
    points, parameters = design_KxMxp.shape[1:]
    used = [np.flatnonzero(term_Mxp.any(axis=0)) for term_Mxp in design_KxMxp]
    terms = [np.ascontiguousarray(term[:, u]) for term, u in zip(design_KxMxp, used, strict=True)]
    pairs = [
        (k, j, np.ascontiguousarray((terms[k][:, :, None] * terms[j][:, None, :]).reshape(points, -1)))
        for k in range(len(terms))
        for j in range(k + 1)
    ]

    def evaluate(theta_Sxp, weights_SxM, newton_S, delta_S):
        logs = [theta_Sxp[:, u] @ term.T for u, term in zip(used, terms, strict=True)]
        top_SxM = logs[0]
        for log_SxM in logs[1:]:
            top_SxM = np.maximum(top_SxM, log_SxM)
        shares = []
        total_SxM = np.zeros_like(top_SxM)
        for log_SxM in logs:
            share_SxM = np.exp(log_SxM - top_SxM)
            total_SxM += share_SxM
            shares.append(share_SxM)
        inverse_SxM = 1.0 / total_SxM
        for share_SxM in shares:
            share_SxM *= inverse_SxM
        top_SxM = top_SxM + np.log(total_SxM)
        loss_SxM, pull_SxM, bend_SxM, weight_SxM = point_losses(
            problem.objective, delta_S[:, None], top_SxM, problem.y_M, problem.centre[-1], np
        )
        value_S = np.einsum("sm,sm->s", loss_SxM, weights_SxM)
        pull_SxM = pull_SxM * weights_SxM
        newton_Sx1 = newton_S[:, None]
        # curvature = sum of outer_SxM * slope slope' + own_SxM * sum_k s_k t_k t_k'
        own_SxM = np.where(newton_Sx1, pull_SxM, 0.0)
        outer_SxM = np.where(newton_Sx1, bend_SxM, weight_SxM) * weights_SxM - own_SxM
        gradient_Sxp = np.zeros_like(theta_Sxp)
        for u, share_SxM, term in zip(used, shares, terms, strict=True):
            gradient_Sxp[:, u] += (pull_SxM * share_SxM) @ term
        curvature_Sxpxp = np.zeros((len(theta_Sxp), parameters, parameters))
        scaled = [outer_SxM * share_SxM for share_SxM in shares]
        for k, j, pair in pairs:
            product_SxM = scaled[k] * shares[j]
            if k == j:
                product_SxM += own_SxM * shares[k]
            block = (product_SxM @ pair).reshape(-1, len(used[k]), len(used[j]))
            curvature_Sxpxp[:, used[k][:, None], used[j]] += block
            if k != j:
                curvature_Sxpxp[:, used[j][:, None], used[k]] += block.transpose(0, 2, 1)
        return value_S, gradient_Sxp, curvature_Sxpxp

    return evaluate


@lru_cache(maxsize=32)
def _program(law: Law, objective: Objective) -> Callable[..., Any]:
    """A law's compiled derivatives: (theta, weights, newton, delta, logs, y, centre) -> as `Problem.evaluate`."""
    import jax
    import jax.numpy as jnp

    def log_loss(theta_p, logs_VxM, centre):
        at = dict(zip(law.names, theta_p, strict=True))
        middle = dict(zip(law.variables, centre, strict=False))
        return law.log_loss(at, dict(zip(law.variables, logs_VxM, strict=True)), middle, jnp)

    def one(theta_p, weights_M, newton, delta, logs_VxM, y_M, centre):
        of_theta = lambda theta_p: log_loss(theta_p, logs_VxM, centre)  # noqa: E731
        predicted_M, slope_pxM = of_theta(theta_p), jax.jacfwd(of_theta)(theta_p).T
        loss_M, pull_M, bend_M, weight_M = point_losses(objective, delta, predicted_M, y_M, centre[-1], jnp)
        pull_M = pull_M * weights_M
        outer_M = jnp.where(newton, bend_M, weight_M) * weights_M
        bent_pxp = jax.hessian(lambda theta_p: pull_M @ of_theta(theta_p))(theta_p)
        curvature_pxp = (slope_pxM * outer_M) @ slope_pxM.T + jnp.where(newton, bent_pxp, 0.0)
        return weights_M @ loss_M, slope_pxM @ pull_M, curvature_pxp

    return jax.jit(jax.vmap(one, in_axes=(0, 0, 0, 0, None, None, None)))


def _compiled(problem: Problem) -> Callable[..., tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """`_program` at this problem's points. Padding repeats the first point and the first row, at weight zero."""
    import jax

    program, points = _program(problem.law, problem.objective), len(problem.y_M)
    extra = -points % PADDED
    logs_VxM = np.pad(problem.logs_VxM, ((0, 0), (0, extra)), "edge")
    rest = (logs_VxM, np.pad(problem.y_M, (0, extra), "edge"), problem.centre)

    def evaluate(theta_Sxp, weights_SxM, newton_S, delta_S):
        ends = np.zeros(len(theta_Sxp)), np.zeros_like(theta_Sxp), np.zeros((*theta_Sxp.shape, theta_Sxp.shape[1]))
        for i in range(0, len(theta_Sxp), PADDED):
            now = slice(i, i + PADDED)
            rows = len(theta_Sxp[now])
            each = ((0, PADDED - rows),)
            with jax.enable_x64(True):
                found = program(
                    np.pad(theta_Sxp[now], (*each, (0, 0)), "edge"),
                    np.pad(weights_SxM[now], (*each, (0, extra))),
                    np.pad(newton_S[now], each),
                    np.pad(delta_S[now], each, "edge"),
                    *rest,
                )
            for end, value in zip(ends, found, strict=True):
                end[now] = np.asarray(value)[:rows]
        return ends

    return evaluate


def spread_starts(problem: Problem, number: int) -> np.ndarray:
    """(number, p) points that fill the start box evenly for any number: an additive recurrence.

    Step sizes are powers of 1 / g with g^(p+1) = g + 1, the generalised golden ratio (Roberts 2018, R_d sequence).
    """
    low_p, high_p = problem.law.box("start", problem.logs_VxM).T
    golden = 2.0
    for _ in range(60):
        golden = (1 + golden) ** (1 / (len(low_p) + 1))
    steps_p = golden ** -np.arange(1.0, len(low_p) + 1)
    return low_p + (high_p - low_p) * np.mod(0.5 + np.arange(1, number + 1)[:, None] * steps_p, 1.0)


# --- descent --------------------------------------------------------------------------------------------------------


def minimise(
    problem: Problem, weights_SxM: np.ndarray, theta_Sxp: np.ndarray, hold_Sxp: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Minimise every row's objective inside the law's bounds: theta (S, p), objective (S,), gradient norm (S,).

    `weights` multiply the points' losses: a bootstrap resample is a row of counts. With `hold`, the sum of
    hold * theta of each row stays what it is at its start, which must lie inside the bounds. The gradient norm is the
    largest |derivative| along what may move.
    """
    low_p, high_p = problem.bounds.T
    if hold_Sxp is None:
        theta_Sxp = np.clip(theta_Sxp, low_p, high_p)
    ends = theta_Sxp.copy(), np.empty(len(theta_Sxp)), np.empty(len(theta_Sxp))
    problem.evaluate  # noqa: B018  made once, not by each thread

    # depends on the problem alone, and so do the numbers; a small problem is not worth the threads
    strands = min(STRANDS, max(1, len(theta_Sxp) * len(problem.y_M) // ELEMENTS)) if len(theta_Sxp) else 0

    def strand(first: int) -> None:
        for row, *end in _descend(problem, weights_SxM, theta_Sxp, hold_Sxp, range(first, len(theta_Sxp), strands)):
            for kept, value in zip(ends, end, strict=True):
                kept[row] = value

    with ThreadPoolExecutor(max(1, min(strands, os.cpu_count() or 1))) as pool:
        list(pool.map(strand, range(strands)))
    return ends


@dataclass
class _Rows:
    """The rows that one strand works on, as arrays over them."""

    row: np.ndarray
    weights: np.ndarray
    theta: np.ndarray
    hold: np.ndarray
    delta: np.ndarray  # of the Huber loss now, down to the problem's
    value: np.ndarray
    gradient: np.ndarray
    curvature: np.ndarray
    damping: np.ndarray
    majoriser_left: np.ndarray  # steps on the majoriser still to take before Newton's
    steps: np.ndarray
    ended: np.ndarray

    def of(self, chosen: np.ndarray) -> _Rows:
        return _Rows(**{name: value[chosen] for name, value in vars(self).items()})

    def join(self, other: _Rows) -> _Rows:
        return _Rows(**{name: np.concatenate([value, getattr(other, name)]) for name, value in vars(self).items()})


def _descend(problem, weights_SxM, theta_Sxp, hold_Sxp, rows: range) -> Iterator[tuple[np.ndarray, ...]]:
    """Yields (rows, theta, objective, gradient norm) of what has converged; those that wait then take their place.

    Damped steps on the majoriser first, then on the exact Hessian. Far from the optimum the Huber loss is one of
    absolute values, which both follow slowly: there delta begins at the size of the residuals, and sharpens whenever
    the smoother problem is roughly solved. A row that Newton cannot improve (the Huber loss has kinks in its slope)
    returns to the majoriser for a few steps. A row ends after a barely damped Newton step that promised nothing above
    rounding, or when no step however small improves it.
    """
    low_p, high_p = problem.bounds.T
    most = waiting = max(1, ELEMENTS // len(problem.y_M))
    now = _begin(problem, weights_SxM, theta_Sxp, hold_Sxp, np.array(rows[:most], dtype=int))
    while len(now.row):
        move_Sxp, along_Sxp = _step(problem, now, hold_Sxp is not None)
        promised_S = (along_Sxp * -move_Sxp).sum(axis=1)
        trial_Sxp = now.theta + move_Sxp
        if hold_Sxp is None:
            trial_Sxp = np.clip(trial_Sxp, low_p, high_p)
        newton_S = now.majoriser_left == 0
        last_S = newton_S & (now.damping < 0.1) & (promised_S <= 1e-14 * now.value)
        value_S, gradient_Sxp, curvature = problem.evaluate(trial_Sxp, now.weights, now.majoriser_left <= 1, now.delta)
        # the last step changes the objective by rounding only, and takes the gradient to zero
        better_S = (value_S < now.value) | (last_S & (value_S <= now.value * (1 + 4e-15)))
        now.theta[better_S], now.value[better_S] = trial_Sxp[better_S], value_S[better_S]
        now.gradient[better_S], now.curvature[better_S] = gradient_Sxp[better_S], curvature[better_S]
        now.steps += 1
        smooth_S = now.delta > problem.delta
        now.ended = (~smooth_S & (last_S | (~better_S & (now.damping > 1e6)))) | (now.steps >= MOST_STEPS)
        sharper_S = smooth_S & ((promised_S <= ROUGH * now.value) | (~better_S & (now.damping > 1e2)))
        back_S = ~better_S & newton_S & (now.damping > 0.1) & ~now.ended & ~sharper_S
        now.majoriser_left = np.where(back_S, MAJORISER_RETRY, np.maximum(now.majoriser_left - better_S, 0))
        now.damping = np.where(better_S, np.maximum(now.damping / 10, 1e-12), now.damping * 8)
        now.delta[sharper_S] = np.maximum(now.delta[sharper_S] / SHARPER, problem.delta)
        now.majoriser_left[sharper_S], now.damping[sharper_S] = 0, 1e-3
        _refresh(problem, now, back_S | sharper_S)
        if now.ended.any():
            done = now.of(now.ended)
            along_Sxp = _along(done, *_movable(problem, done, hold_Sxp is not None))
            yield done.row, done.theta, done.value, np.abs(along_Sxp).max(axis=1)
            now = now.of(~now.ended)
        if waiting < len(rows) and len(now.row) <= 0.8 * most:
            row_S = np.array(rows[waiting : waiting + most - len(now.row)], dtype=int)
            waiting += len(row_S)
            now = now.join(_begin(problem, weights_SxM, theta_Sxp, hold_Sxp, row_S))


def _begin(problem: Problem, weights_SxM, theta_Sxp, hold_Sxp, row_S: np.ndarray) -> _Rows:
    number, weights, theta = len(row_S), weights_SxM[row_S], theta_Sxp[row_S]
    delta_S = np.full(number, problem.delta)
    if problem.objective == "huber":
        misfit_S = (weights * np.abs(problem.losses(theta) - problem.y_M)).sum(axis=1) / weights.sum(axis=1)
        delta_S = np.where(misfit_S > FAR * problem.delta, np.minimum(misfit_S, 1.0), problem.delta)
    now = _Rows(
        row_S,
        weights,
        theta,
        np.zeros_like(theta) if hold_Sxp is None else hold_Sxp[row_S],
        delta_S,
        value=np.empty(number),
        gradient=np.empty_like(theta),
        curvature=np.empty((*theta.shape, theta.shape[1])),
        damping=np.full(number, 1e-2),
        majoriser_left=np.where(delta_S > problem.delta, MAJORISER_FAR, MAJORISER_NEAR),
        steps=np.zeros(number, dtype=int),
        ended=np.zeros(number, dtype=bool),
    )
    _refresh(problem, now, np.ones(number, dtype=bool))
    now.value[~np.isfinite(now.value)] = np.inf
    return now


def _refresh(problem: Problem, now: _Rows, changed_S: np.ndarray) -> None:
    """Evaluates the rows anew that changed their delta or what they take for curvature."""
    if changed_S.any():
        newton_S = now.majoriser_left[changed_S] == 0
        found = problem.evaluate(now.theta[changed_S], now.weights[changed_S], newton_S, now.delta[changed_S])
        now.value[changed_S], now.gradient[changed_S], now.curvature[changed_S] = found


def _movable(problem: Problem, now: _Rows, held: bool) -> tuple[np.ndarray, np.ndarray]:
    """Which coordinates (S, p) a descent step may move, and the unit vectors (S, p) along which it may not.

    A coordinate at its bound that the descent direction pushes outwards stays; a held combination may free or push
    others when one stays, so that this is repeated.
    """
    low_p, high_p = problem.bounds.T
    at_low_Sxp, at_high_Sxp = now.theta <= low_p + 1e-12 * held, now.theta >= high_p - 1e-12 * held
    free_Sxp = np.ones_like(now.theta, dtype=bool)
    unit_Sxp = np.zeros_like(now.theta)
    for _ in range(len(low_p) if held else 1):
        if held:
            unit_Sxp = now.hold * free_Sxp
            unit_Sxp /= np.maximum(np.linalg.norm(unit_Sxp, axis=1, keepdims=True), 1e-300)
        slope_Sxp = _along(now, free_Sxp, unit_Sxp)
        free_Sxp &= ~((at_low_Sxp & (slope_Sxp > 0)) | (at_high_Sxp & (slope_Sxp < 0)))
    if held:
        unit_Sxp = now.hold * free_Sxp
        unit_Sxp /= np.maximum(np.linalg.norm(unit_Sxp, axis=1, keepdims=True), 1e-300)
    return free_Sxp, unit_Sxp


def _along(now: _Rows, free_Sxp: np.ndarray, unit_Sxp: np.ndarray) -> np.ndarray:
    """The gradient (S, p) along what may move."""
    slope_Sxp = now.gradient * free_Sxp
    return slope_Sxp - unit_Sxp * (unit_Sxp * slope_Sxp).sum(axis=1, keepdims=True)


def _step(problem: Problem, now: _Rows, held: bool) -> tuple[np.ndarray, np.ndarray]:
    """The damped step (S, p) on the curvature, and the gradient along what may move."""
    free_Sxp, unit_Sxp = _movable(problem, now, held)
    along_Sxp = _along(now, free_Sxp, unit_Sxp)
    curvature = now.curvature * (free_Sxp[:, :, None] & free_Sxp[:, None])
    if held:
        cross_Sxp = (curvature @ unit_Sxp[:, :, None])[:, :, 0]
        middle_S = (cross_Sxp * unit_Sxp).sum(axis=1)
        outer = unit_Sxp[:, :, None] * (cross_Sxp - unit_Sxp * middle_S[:, None] / 2)[:, None]
        curvature = curvature - outer - outer.transpose(0, 2, 1)
    columns = np.arange(along_Sxp.shape[1])
    size_S = np.maximum(np.abs(curvature[:, columns, columns]).max(axis=1), 1e-300)
    curvature[:, columns, columns] += np.where(free_Sxp, (now.damping * size_S)[:, None], size_S[:, None])
    if held:
        curvature = curvature + size_S[:, None, None] * unit_Sxp[:, :, None] * unit_Sxp[:, None]
    move_Sxp = -_solve(curvature, along_Sxp)
    move_Sxp -= unit_Sxp * (unit_Sxp * move_Sxp).sum(axis=1, keepdims=True)
    move_Sxp /= np.maximum(1.0, np.abs(move_Sxp).max(axis=1, keepdims=True) / LONGEST)
    if held:
        low_p, high_p = problem.bounds.T
        room_Sxp = np.where(move_Sxp > 0, high_p - now.theta, now.theta - low_p)
        part_Sxp = np.maximum(room_Sxp, 0) / np.maximum(np.abs(move_Sxp), 1e-300)
        move_Sxp *= np.minimum(1.0, np.where(np.abs(move_Sxp) > 0, part_Sxp, 1.0).min(axis=1, keepdims=True))
    return move_Sxp, along_Sxp


def _solve(matrix_Sxpxp: np.ndarray, right_Sxp: np.ndarray) -> np.ndarray:
    """Solves with L |D| L' where L D L' is the matrix: a descent direction also where it is not positive definite.

    Over all rows at once: LAPACK would be called once per row, and these matrices are small.
    """
    rest = np.ascontiguousarray(matrix_Sxpxp.transpose(1, 2, 0))
    x = np.ascontiguousarray(right_Sxp.T)
    size = len(x)
    floor_S = 1e-14 * np.abs(rest[np.arange(size), np.arange(size)]).max(axis=0)
    lower, pivots = [], []
    for j in range(size):
        pivot_S = rest[j, j]
        pivot_S = np.where(np.abs(pivot_S) < floor_S, floor_S, pivot_S)
        column = rest[j + 1 :, j] / pivot_S
        rest[j + 1 :, j + 1 :] -= column[:, None] * rest[j + 1 :, j][None]
        x[j + 1 :] -= column * x[j]
        lower.append(column)
        pivots.append(np.abs(pivot_S))
    for j in reversed(range(size)):
        x[j] = x[j] / pivots[j] - (lower[j] * x[j + 1 :]).sum(axis=0)
    return x.T
