"""What N and C count, and what changing that does to a compute-optimal exponent.

Kaplan et al. 2020 found N ~ C^0.73 and Hoffmann et al. 2022 N ~ C^0.5. Pearce & Song 2024 (arXiv:2406.12907) show that
most of the gap follows from one law under two conventions: without embeddings, at small scale, the embeddings are much
of the model, and leaving them out of N and of C = 6 N D bends the frontier.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from analysis.fit import FitError
from analysis.planning import Surface, best_split, flops_for_size

Counted = Literal["total", "non_embedding", "unknown"]
Compute = Literal["6nd", "exact", "unknown"]

PEARCE_OMEGA = 47_491.0  # Pearce & Song 2024: N_total = N + omega N^(1/3), fitted to the models of Hoffmann et al. 2022
SAME = 1e-5  # relative: a row of C that agrees so closely was made as 6 N D
OTHER = 1e-2  # and one that differs by more than this was not

# The run table's column names say their convention (DESIGN.md): name -> (what N counts, how C is counted).
_PARAMS: dict[str, Counted] = {"params_total": "total", "params_non_embedding": "non_embedding"}
_FLOPS: dict[str, tuple[Counted, Compute]] = {"flops_6nd": ("total", "6nd"), "flops_exact": ("total", "exact")}


@dataclass(frozen=True)
class Convention:
    """What N counts (all parameters, or those outside the embeddings) and what C is (6 N D with that N, or exact)."""

    n: Counted = "unknown"
    c: Compute = "unknown"

    def __str__(self) -> str:
        sizes = {"total": "all parameters", "non_embedding": "parameters without embeddings",
                 "unknown": "parameters as the table counts them"}  # fmt: skip
        flops = {"6nd": "C is 6 N D with that N", "exact": "C is counted exactly, not 6 N D",
                 "unknown": "how C is counted is not known"}  # fmt: skip
        return f"N counts {sizes[self.n]}; {flops[self.c]}"


@dataclass(frozen=True)
class Counting:
    """How two counts of parameters go together: N_total = N + omega N^(1/3) (Pearce & Song 2024).

    The power is that of a transformer of fixed shape: its layers grow as width^3, its embeddings as width.
    """

    omega: float = PEARCE_OMEGA

    def total(self, non_embedding):
        """All parameters of a model with so many outside the embeddings."""
        n = np.asarray(non_embedding, dtype=np.float64)
        return n + self.omega * np.cbrt(n)


def convention_of(names: Mapping[str, str], *, n=None, d=None, c=None, derives_d: bool = False) -> Convention:
    """The convention of a table, from its columns' names and, where N, D and C are all there, from their numbers.

    names: N, D, C -> the columns' names, of those that are used. n, d, c: the columns, shape (M,) each, in parameters,
    tokens and FLOPs. derives_d: D is to be made as C / (6 N). Raises FitError for mixed conventions: a C that counts
    other parameters than N does, an exact C as the source of D, and a C that is 6 N D in some rows and not in others.
    """
    counted = _PARAMS.get(names.get("N", ""), "unknown")
    of_flops, compute = _FLOPS.get(names.get("C", ""), ("unknown", "unknown"))
    if "unknown" not in (counted, of_flops) and counted != of_flops:
        raise FitError(
            f"mixed conventions: {names['N']} counts {counted.replace('_', '-')} parameters, {names['C']} is of "
            f"{of_flops} parameters; take params_{of_flops}, or give tokens instead of FLOPs"
        )
    if derives_d:
        if compute == "exact":
            raise FitError(
                f"mixed conventions: D = C / (6 N) needs C = 6 N D, and {names['C']} is counted exactly; give the "
                "tokens, or a column of 6 N D"
            )
        return Convention(counted, "6nd")
    if "C" not in names:  # what is called C then is made of N and D
        return Convention(counted, "6nd")
    if n is None or d is None or c is None or compute == "exact":  # which may be near 6 N D by chance
        return Convention(counted, compute)
    ratio_M = np.asarray(c, float) / (6 * np.asarray(n, float) * np.asarray(d, float))
    same_M, other_M = np.abs(ratio_M - 1) < SAME, np.abs(ratio_M - 1) > OTHER
    if same_M.any() and other_M.any():
        row, apart = int(np.flatnonzero(other_M)[0]), int(other_M.sum())
        raise FitError(
            f"mixed conventions: C is 6 N D in {int(same_M.sum())} rows and not in {apart} others (row {row}: "
            f"{ratio_M[row]:.3g} times 6 N D); all rows must count alike"
        )
    if compute == "6nd" and other_M.any():
        raise FitError(
            f"mixed conventions: {names['C']} is {ratio_M.min():.3g} to {ratio_M.max():.3g} times 6 N D of these N and "
            "D; both must count the same parameters"
        )
    return Convention(counted, "exact" if other_M.any() else "6nd")


def counted_surface(loss: Surface, counting: Counting) -> Surface:
    """A law of all parameters as a function of those outside the embeddings, and tokens."""
    return lambda n, d: loss(counting.total(n), d)


def local_exponent(loss: Surface, flops_range: tuple[float, float], points: int = 100) -> float:
    """The exponent a of N ~ C^a between two budgets, as a straight line through `points` optima in log-log gives it.

    `loss` is any law of N and D (see planning.surface, and `counted_surface` for N without embeddings); C = 6 N D with
    the N that it takes. Under a pure power law this is its exponent; else what a study over that range would report.
    """
    flops_G = np.geomspace(*flops_range, points)
    return float(np.polyfit(np.log(flops_G), np.log(best_split(loss, flops_G)[0]), 1)[0])


def chinchilla_exponent(parameters: Mapping, counting: Counting, non_embedding) -> np.ndarray:
    """d log N / d log C at the optimum, N without embeddings and C = 6 N D, under a Chinchilla law of all parameters.

    `non_embedding`: the sizes at which it is wanted, any shape. From the condition that L(N_total(N), C / 6 N) is
    stationary in N: beta log C = (beta - 1) log N + (alpha + 1) log N_total - log N_total' + constant. It goes from
    beta / (beta + alpha / 3) for small models to beta / (beta + alpha) for large ones.
    """
    n = np.asarray(non_embedding, dtype=np.float64)
    alpha, beta = parameters["alpha"], parameters["beta"]
    slope = 1 + counting.omega / 3 * n ** (-2 / 3)
    bend = -2 / 9 * counting.omega * n ** (-5 / 3)
    rate = (beta - 1) + (alpha + 1) * n * slope / counting.total(n) - n * bend / slope
    return beta / rate


def kaplan_gap(
    loss: Surface, non_embedding_range: tuple[float, float], counting: Counting | None = None
) -> tuple[float, float]:
    """Exponents a over one range of models by the two conventions: of all parameters, and without embeddings.

    `loss` is a law of all parameters; the range is of sizes without embeddings that are compute-optimal at its ends.
    """
    counting = counting or Counting()
    without = counted_surface(loss, counting)
    n_2 = np.asarray(non_embedding_range, dtype=np.float64)
    all_from, all_to = flops_for_size(loss, counting.total(n_2))
    without_from, without_to = flops_for_size(without, n_2)
    return local_exponent(loss, (all_from, all_to)), local_exponent(without, (without_from, without_to))
