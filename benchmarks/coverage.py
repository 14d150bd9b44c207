"""How often 90 % intervals of a fit hold the planted value: python -m benchmarks.coverage

Tables are drawn from a planted Chinchilla law with three kinds of noise, each is fitted by `analysis.fit.fit`, and the
share of intervals that hold the planted value is counted, for every parameter and the exponent a. Nothing here is
timed. Fits begin at the planted law: that the best optimum is found from anywhere is another question.
"""

from __future__ import annotations

import math
import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np

from analysis import solve
from analysis.fit import Fit, fit
from analysis.laws import CHINCHILLA
from analysis.profile import profile_p
from analysis.solve import Objective
from benchmarks import harness

TRUTH = {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658}  # the published refit's numbers
PLANTED = TRUTH | {"a": TRUTH["beta"] / (TRUTH["alpha"] + TRUTH["beta"])}
SIZES, BUDGETS, TRUNKS, BRANCHES = 6, 8, 3, 4  # grid of independent runs; trunks per size, and their branches
NOISE = 0.01  # standard deviation of log loss; of the trunk where points share one, each point then adds half of it
LEVEL, LEAST, MOST = 0.9, 86.0, 95.0  # percent
CHUNK = 25  # repetitions handed to a process at once


@dataclass(frozen=True)
class Case:
    """One kind of noise, and how its tables are fitted."""

    name: str
    noise: str  # "gaussian", "heavy" or "clustered"
    objective: Objective
    grouped: bool = False
    target: bool = True


CASES = (
    Case("independent Gaussian, Huber", "gaussian", "huber"),
    Case("independent Gaussian, squared log", "gaussian", "squared_log"),
    Case("heavy-tailed (t, 3 df), Huber", "heavy", "huber"),
    Case("heavy-tailed (t, 3 df), squared log", "heavy", "squared_log"),
    Case("18 trunks of 4 points, Huber", "clustered", "huber", grouped=True),
    Case("18 trunks of 4 points, squared log", "clustered", "squared_log", grouped=True),
    Case("18 trunks taken for independent points, squared log", "clustered", "squared_log", target=False),
)


def table(noise: str, generator: np.random.Generator) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """One table: {"N", "D"}, loss (nats per token) and the trunk of each point."""
    if noise == "clustered":
        n_M = np.repeat(np.geomspace(1e6, 1e8, SIZES), TRUNKS * BRANCHES)
        d_M = np.tile(np.geomspace(1e8, 1e10, BRANCHES), SIZES * TRUNKS)
        trunk_M = np.repeat(np.arange(SIZES * TRUNKS), BRANCHES)
        error_M = generator.normal(size=SIZES * TRUNKS)[trunk_M] + generator.normal(size=len(n_M)) / 2
    else:
        n_M = np.repeat(np.geomspace(1e6, 1e8, SIZES), BUDGETS)
        d_M = np.tile(np.geomspace(1e8, 1e10, BUDGETS), SIZES)
        trunk_M = np.arange(len(n_M))
        heavy = noise == "heavy"
        error_M = generator.standard_t(3, len(n_M)) / math.sqrt(3) if heavy else generator.normal(size=len(n_M))
    at = {"N": n_M, "D": d_M}
    return at, CHINCHILLA.predict(TRUTH, at) * np.exp(NOISE * error_M), trunk_M


def held(fitted: Fit) -> list[bool]:
    """Whether each interval holds its planted value."""
    found = {name: (fitted.parameters | fitted.derived)[name].interval for name in PLANTED}
    return [bool(low <= PLANTED[name] <= high) for name, (low, high) in found.items()]


def repeat(work: tuple[int, int, int, int]) -> tuple[int, list[list[bool]], list[list[bool]]]:
    """One chunk, (case, first, last repetition, bootstraps): the case, and what its bootstraps and profiles held."""
    which, first, last, bootstraps = work
    case, bootstrap, profile = CASES[which], [], []
    for repetition in range(first, last):
        at, loss_M, trunk_M = table(case.noise, np.random.default_rng([which, repetition]))
        fitted = fit(
            CHINCHILLA, at, loss_M, objective=case.objective, groups=trunk_M if case.grouped else None, level=LEVEL,
            starts={name: np.array([value]) for name, value in TRUTH.items()}, bootstraps=bootstraps, seed=repetition,
        )  # fmt: skip
        bootstrap.append(held(fitted))
        if not case.grouped:
            profile.append([bool(p > 1 - LEVEL) for p in profile_p(fitted, PLANTED).values()])
    return which, bootstrap, profile


def _alone() -> None:
    """In each process: the processes share the cores already, so the optimiser's threads would be in the way."""
    solve.STRANDS = 1


def chunks(repetitions: int, bootstraps: int) -> Iterator[tuple[int, int, int, int]]:
    """Work for `repeat`."""
    for which in range(len(CASES)):
        for first in range(0, repetitions, CHUNK):
            yield which, first, min(first + CHUNK, repetitions), bootstraps


def shares(held: list[list[bool]]) -> dict[str, harness.Measure]:
    """Percent of the repetitions in which each interval held, with one standard error either way."""
    found = {}
    for name, share in zip(PLANTED, np.mean(held, axis=0).tolist(), strict=True):
        error = 100 * math.sqrt(share * (1 - share) / len(held))
        found[name] = harness.Measure(100 * share, 100 * share - error, 100 * share + error)
    return found


def rows(what: str, covered: dict[str, harness.Measure], target: bool) -> list[harness.Row]:
    """Two lines of the table: the quantity that is covered least and the one that is covered most."""
    ordered = sorted(covered, key=lambda name: covered[name].value)
    few, many = ordered[0], ordered[-1]
    unit = "%"
    return [
        harness.Row(f"{what}: {few} is covered least", covered[few], unit, "more", LEAST if target else None),
        harness.Row(f"{what}: {many} is covered most", covered[many], unit, "less", MOST if target else None),
    ]


def main() -> None:
    """Counts and writes coverage.json."""
    args = harness.arguments(__doc__, repetitions=2000, bootstraps=200, processes=2)
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # before the processes start: products here are too small for threads
    bootstrap, profile = {which: [] for which in range(len(CASES))}, {which: [] for which in range(len(CASES))}
    with multiprocessing.get_context("spawn").Pool(args.processes, _alone) as pool:
        for which, held_by_bootstrap, held_by_profile in pool.imap_unordered(
            repeat, chunks(args.repetitions, args.bootstraps)
        ):
            bootstrap[which] += held_by_bootstrap
            profile[which] += held_by_profile
            if len(bootstrap[which]) == args.repetitions:
                harness.say(CASES[which].name)
    lines, notes, figures = [], [], {}
    for which, case in enumerate(CASES):
        for way, found in (("bootstrap", bootstrap[which]), ("profile", profile[which])):
            if not found:
                continue
            covered, what = shares(found), f"{case.name}, {way}"
            lines += rows(what, covered, case.target)
            error = max(m.high - m.value for m in covered.values())
            numbers = ", ".join(f"{name} {m.value:.1f}" for name, m in covered.items())
            notes.append(f"{what}: {numbers}; standard errors up to {error:.1f}.")
            figures[what] = {name: asdict(m) for name, m in covered.items()}
    title = f"Coverage of {LEVEL:.0%} intervals, {args.repetitions} repetitions each (in brackets one standard error)"
    harness.write("coverage", title, lines, figures, notes=notes, results=args.out)


if __name__ == "__main__":
    main()
