"""The Chinchilla law of the 240 points, fitted by us and by a loop over scipy's minimisers: python -m benchmarks.fits

Huber loss of log loss, delta 1e-3, summed; the 4500 starts of Hoffmann et al. 2022 and 4000 bootstraps of single
points. A turn of ours is the whole fit. A turn of scipy's is a random part of the same starts (L-BFGS-B) and of such
resamples (BFGS from the optimum), and its time is scaled up to all of them; --full does all. scipy in two ways: with
finite differences, as L-BFGS-B and BFGS do when they are given the objective alone, and with its exact gradient.
"""

from __future__ import annotations

import sys
import time
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks import harness

STARTS, BOOTSTRAPS, DELTA = 4500, 4000, 1e-3
LOWEST = 1.0182741e-3  # the lowest objective that we know, rounded up
HIGHER = 1e-9  # relative; a lower objective of scipy's than by this counts


def table() -> tuple[dict[str, np.ndarray], np.ndarray]:
    """({"N", "D"}, loss) of the 240 points."""
    from experiments.chinchilla_points import points

    found = points()
    return {name: found[name].to_numpy() for name in ("N", "D")}, found["loss"].to_numpy()


def ours() -> Any:
    """The whole fit."""
    from analysis.fit import fit
    from analysis.laws import CHINCHILLA
    from experiments.scaling.besiroglu2024 import starts

    return fit(CHINCHILLA, *table(), delta=DELTA, starts=starts(), bootstraps=BOOTSTRAPS)


@dataclass(frozen=True)
class Peer:
    """The objective in the coordinates that the papers use: a = log A, b = log B, e = log E, alpha, beta."""

    exact: bool
    n_M: np.ndarray
    d_M: np.ndarray
    y_M: np.ndarray
    starts_Sxp: np.ndarray

    def of(self, theta_p: np.ndarray, weights_M: np.ndarray) -> Any:
        """The objective, with its gradient where that is exact."""
        a, b, e, alpha, beta = theta_p
        terms_3xM = np.stack([a - alpha * self.n_M, b - beta * self.d_M, np.broadcast_to(e, self.n_M.shape)])
        top_M = terms_3xM.max(axis=0)
        shares_3xM = np.exp(terms_3xM - top_M)
        total_M = shares_3xM.sum(axis=0)
        residual_M = top_M + np.log(total_M) - self.y_M
        psi_M = np.clip(residual_M, -DELTA, DELTA)
        value = weights_M @ (psi_M * (residual_M - psi_M / 2))
        if not self.exact:
            return value
        pull_3xM = weights_M * psi_M * shares_3xM / total_M
        slope_3 = pull_3xM.sum(axis=1)
        return value, np.array([*slope_3, -(pull_3xM[0] @ self.n_M), -(pull_3xM[1] @ self.d_M)])

    def minimise(self, method: str, theta_Sxp: np.ndarray, weights_SxM: np.ndarray) -> np.ndarray:
        """Lowest objectives (S,), one scipy call after the other."""
        from scipy.optimize import minimize

        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            each = zip(theta_Sxp, weights_SxM, strict=True)
            return np.array([minimize(self.of, t, (w,), method=method, jac=self.exact or None).fun for t, w in each])


def make_peer(exact: bool) -> Peer:
    """With the logarithms of the points, and the grid of starts."""
    from experiments.scaling.besiroglu2024 import starts

    (columns, loss), at = table(), starts()
    starts_Sxp = np.stack([np.log(at["A"]), np.log(at["B"]), np.log(at["E"]), at["alpha"], at["beta"]], axis=1)
    return Peer(exact, np.log(columns["N"]), np.log(columns["D"]), np.log(loss), starts_Sxp)


def scipy_turn(peer: Peer, best_p: np.ndarray, starts: int, resamples: int, rng: Any) -> dict[str, Any]:
    """Seconds of all starts and resamples by a part of them, the objectives that it reached, and the resamples."""
    points = len(peer.y_M)
    part = rng.permutation(len(peer.starts_Sxp))[:starts]
    counts_BxM = rng.multinomial(points, np.full(points, 1 / points), size=resamples).astype(float)
    began = time.process_time()
    of_starts = peer.minimise("L-BFGS-B", peer.starts_Sxp[part], np.ones((starts, points)))
    middle = time.process_time()
    of_resamples = peer.minimise("BFGS", np.tile(best_p, (resamples, 1)), counts_BxM)
    ended = time.process_time()
    return {
        "starts": (middle - began) * STARTS / starts,
        "bootstraps": (ended - middle) * BOOTSTRAPS / resamples,
        "objectives": of_starts,
        "resampled": of_resamples,
        "counts": counts_BxM,
    }


def compare(fitted: Any, found: dict[str, Any]) -> np.ndarray:
    """Our objective over scipy's, less one, for the same resamples."""
    from analysis.solve import minimise

    counts_BxM = found["counts"]
    objective_B = minimise(fitted.problem, counts_BxM, np.tile(fitted.theta, (len(counts_BxM), 1)))[1]
    return objective_B / found["resampled"] - 1


def main() -> None:
    """Measures and writes fits.json."""
    if sys.argv[1:2] == ["once"]:
        ours()
        return
    args = harness.arguments(__doc__, turns=3, part=150, full=False)
    starts, resamples = (STARTS, BOOTSTRAPS) if args.full else (args.part, args.part)
    fitted, rng = ours(), np.random.default_rng(0)
    best = {name: np.log(v) if name in "ABE" else v for name, v in fitted.best.items()}
    best_p = np.array([best[name] for name in ("A", "B", "E", "alpha", "beta")])
    peers = {"scipy": make_peer(exact=False), "scipy with exact gradients": make_peer(exact=True)}
    sides: dict[str, Any] = {"ours": lambda: harness.timed(ours)}
    for name, peer in peers.items():
        sides[name] = lambda peer=peer: scipy_turn(peer, best_p, starts, resamples, rng)
    sides["cold"] = lambda: harness.command([sys.executable, "-m", "benchmarks.fits", "once"])
    turns = harness.alternate(sides, args.turns)

    wall = [one["wall"] for one in turns["ours"]]
    lines = [
        harness.Row("4500 starts and 4000 bootstraps on 240 points", harness.median(wall), "s", "less", 5.0),
        harness.Row("the same as a command", harness.median(one["wall"] for one in turns["cold"]), "s", "less", 15.0),
        harness.Row(
            f"objective above {LOWEST}", harness.median([1e6 * (fitted.objective / LOWEST - 1)]), "ppm", "less", 0.0
        ),
        harness.Row("starts at the optimum", harness.median([100 * fitted.share_at_optimum]), "%", "more"),
    ]
    notes, figures = [], {"ours": turns["ours"], "cold": turns["cold"], "objective": fitted.objective}
    for name in peers:
        seconds = [one["starts"] + one["bootstraps"] for one in turns[name]]
        goal = 100.0 if name == "scipy" else None
        lines.append(harness.Row(f"{name} over ours", harness.ratio(seconds, wall), "times the time", "more", goal))
        above = np.concatenate([compare(fitted, one) for one in turns[name]])
        higher = harness.median([100 * float(np.mean(above > HIGHER))])
        lines.append(harness.Row(f"resamples that {name} fits lower than we do", higher, "%", "less", 0.0))
        reached = np.concatenate([one["objectives"] for one in turns[name]])
        share = np.mean(reached <= fitted.objective * (1 + 1e-6))
        notes.append(
            f"{name}: {harness.median(seconds).value:.0f} s for all, {'' if args.full else 'scaled up '}from {starts} "
            f"starts and {resamples} resamples a turn; lowest objective {reached.min():.7e}; {share:.0%} of its starts "
            f"within 1e-6; of {len(above)} resamples, {np.mean(above < -1e-6):.0%} end over 1e-6 above ours."
        )
        figures[name] = [{key: one[key] for key in ("starts", "bootstraps")} for one in turns[name]]
    distinct = len(np.unique(np.clip(_grid(fitted), *fitted.problem.bounds.T), axis=0))
    notes.append(
        f"Of ours, {distinct} starts are different ones inside the law's bounds, which the grid reaches beyond."
    )
    notes.append("Ours in wall-clock seconds on all cores, scipy's in seconds of its one core's time.")
    title = "Fitting the Chinchilla law of 240 points, and scipy's minimisers in a loop"
    harness.write("fits", title, lines, figures, notes=notes, results=args.out)


def _grid(fitted: Any) -> np.ndarray:
    from experiments.scaling.besiroglu2024 import starts

    return fitted.law.internal(starts(), fitted.problem.centre)


if __name__ == "__main__":
    main()
