"""Variable projection: the Chinchilla law with its three linear coefficients eliminated.

For given exponents (alpha, beta) the loss is linear in E, A and B, so the best non-negative three follow exactly from
normal equations (Golub & Pereyra 1973 for the idea), and only a search over two exponents is left. The objective is the
summed squared relative error of the loss: to first order that of the log loss.
"""

import itertools

import numpy as np

SUBSETS = [s for r in (3, 2, 1) for s in itertools.combinations(range(3), r)]
BOUNDS = (0.01, 3.0)  # of both exponents
COARSE, FINE, ROUNDS = 14, 5, 40
CHUNK = 64  # resamples at once: what they need then stays in the cache


def project(n, d, loss, counts_BxM=None) -> dict[str, np.ndarray]:
    """Parameters E, A, B, alpha, beta of the law, each of shape (B,), and `objective`: the least squared error.

    n, d (tokens), loss: shape (M,). counts_BxM: how often each point counts; once unless given. All resamples are
    searched together: a grid over log alpha and log beta, then a window around the best that halves each time the best
    is inside it and moves when it is not.
    """
    n, d, loss = (np.asarray(v, dtype=np.float64) for v in (n, d, loss))
    counts_BxM = np.ones((1, len(n))) if counts_BxM is None else np.asarray(counts_BxM, dtype=np.float64)
    parts = [_search(n, d, loss, counts_BxM[i : i + CHUNK]) for i in range(0, len(counts_BxM), CHUNK)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _search(n_M, d_M, loss_M, counts_BxM) -> dict[str, np.ndarray]:
    # Centred at the geometric means the three columns are of one size, whatever the units.
    log_n, log_d = np.log(n_M).mean(), np.log(d_M).mean()
    x_M, y_M = np.log(n_M) - log_n, np.log(d_M) - log_d
    low, high = np.log(BOUNDS)
    grid_G = np.linspace(low, high, COARSE)
    rows = len(counts_BxM)
    centre_Bx2 = np.zeros((rows, 2))
    step_B = np.full(rows, grid_G[1] - grid_G[0])
    best_B, coefficient_Bx3 = np.full(rows, np.inf), np.zeros((rows, 3))
    offsets_F = np.linspace(-1, 1, FINE)
    for turn in range(ROUNDS):
        if turn == 0:
            alpha_BxF = beta_BxF = np.tile(grid_G, (rows, 1))
        else:
            alpha_BxF, beta_BxF = (
                np.clip(centre_Bx2[:, i, None] + step_B[:, None] * offsets_F, low, high) for i in (0, 1)
            )
        objective_BxFxF, found = _linear(np.exp(alpha_BxF), np.exp(beta_BxF), x_M, y_M, loss_M, counts_BxM)
        flat_B = objective_BxFxF.reshape(rows, -1).argmin(axis=1)
        i_B, j_B = np.unravel_index(flat_B, objective_BxFxF.shape[1:])
        row_B = np.arange(rows)
        value_B = objective_BxFxF[row_B, i_B, j_B]
        better_B = value_B < best_B
        best_B = np.where(better_B, value_B, best_B)
        coefficient_Bx3 = np.where(better_B[:, None], found[row_B, i_B, j_B], coefficient_Bx3)
        there_Bx2 = np.stack([alpha_BxF[row_B, i_B], beta_BxF[row_B, j_B]], axis=1)
        centre_Bx2 = np.where(better_B[:, None], there_Bx2, centre_Bx2)
        size = len(offsets_F) - 1
        at_edge_B = better_B & (turn > 0) & ((i_B == 0) | (i_B == size) | (j_B == 0) | (j_B == size))
        step_B = np.where(at_edge_B, step_B, step_B / (1 if turn == 0 else 2))
    alpha_B, beta_B = np.exp(centre_Bx2).T
    e_B, a_B, b_B = coefficient_Bx3.T
    return {"E": e_B, "A": a_B * np.exp(alpha_B * log_n), "B": b_B * np.exp(beta_B * log_d), "alpha": alpha_B,
            "beta": beta_B, "objective": best_B}  # fmt: skip


def _linear(alpha_BxF, beta_BxF, x_M, y_M, loss_M, counts_BxM) -> tuple[np.ndarray, np.ndarray]:
    """Least squared relative error (B, F, F) over non-negative E, A, B, and those (B, F, F, 3)."""
    inverse_M = 1 / loss_M
    of_a_BxFxM = np.exp(-alpha_BxF[:, :, None] * x_M) * inverse_M
    of_b_BxFxM = np.exp(-beta_BxF[:, :, None] * y_M) * inverse_M
    weighted_a, weighted_b = of_a_BxFxM * counts_BxM[:, None], of_b_BxFxM * counts_BxM[:, None]
    rows, fine = alpha_BxF.shape
    gram = np.empty((rows, fine, fine, 3, 3))
    gram[..., 0, 0] = (counts_BxM @ inverse_M**2)[:, None, None]
    gram[..., 0, 1] = gram[..., 1, 0] = (weighted_a @ inverse_M)[:, :, None]
    gram[..., 0, 2] = gram[..., 2, 0] = (weighted_b @ inverse_M)[:, None, :]
    gram[..., 1, 1] = (weighted_a * of_a_BxFxM).sum(axis=2)[:, :, None]
    gram[..., 2, 2] = (weighted_b * of_b_BxFxM).sum(axis=2)[:, None, :]
    gram[..., 1, 2] = gram[..., 2, 1] = weighted_a @ of_b_BxFxM.transpose(0, 2, 1)
    right = np.stack(
        np.broadcast_arrays(
            (counts_BxM @ inverse_M)[:, None, None], weighted_a.sum(axis=2)[:, :, None], weighted_b.sum(axis=2)[:, None]
        ),
        axis=-1,
    )
    return non_negative(gram, right, counts_BxM.sum(axis=1)[:, None, None])


def non_negative(gram, right, square) -> tuple[np.ndarray, np.ndarray]:
    """min over c >= 0 of c' gram c - 2 right' c + square, and the minimiser, for many 3 x 3 problems (..., 3, 3).

    The minimum over a face of the octant is an unconstrained one in fewer variables, so all seven faces are solved and
    the lowest admissible one is it.
    """
    value, best = np.full(right.shape[:-1], np.inf), np.zeros(right.shape)
    scale = np.sqrt(np.diagonal(gram, axis1=-2, axis2=-1))
    even, even_right = gram / (scale[..., :, None] * scale[..., None, :]), right / scale
    for face in SUBSETS:
        used = np.asarray(face)
        inside = even[..., used[:, None], used]
        regular = np.linalg.det(inside) > 1e-14
        safe = np.where(regular[..., None, None], inside, np.eye(len(used)))
        found = np.linalg.solve(safe, even_right[..., used, None])[..., 0]
        left = square - (found * even_right[..., used]).sum(axis=-1)
        better = regular & (found >= 0).all(axis=-1) & (left < value)
        value = np.where(better, left, value)
        full = np.zeros(right.shape)
        full[..., used] = found
        best = np.where(better[..., None], full / scale, best)
    return np.maximum(value, 0.0), best
