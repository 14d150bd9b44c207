"""Chinchilla's third approach, fitted again: the law of the 240 published points, and why the first report cannot hold.

Nothing is trained: the data are the points that Besiroglu et al. 2024 read off a figure of Hoffmann et al. 2022. The
same law, Huber loss and grid of starts, each start refined until the gradient vanishes, and pairs bootstraps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.chinchilla_points import BESIROGLU, HOFFMANN, HUBER_DELTA, points
from experiments.claims import Claim, Measured
from experiments.registry import Job, Outcome, Paper

if TYPE_CHECKING:
    import numpy
    import pandas

    from analysis.fit import Fit

SOURCE = "Besiroglu et al. 2024"
LEVEL = 0.9
REPORTED_WIDTH = 0.001  # of the 80 % interval of a, .454 to .455: Hoffmann et al. 2022, table 2, approach 3
REPORTED_LEVEL = 0.8


def _claim(id: str, statement: str, source: str, expected: float, margin: float, **more: Any) -> Claim:
    return Claim(id, statement, source, expected, margin, unit=more.pop("unit", "1"), scope="same_regime", level=LEVEL,
                 row=2)  # fmt: skip


# Margins of the parameters are two of the standard errors that the paper gives; of a, the distance to Hoffmann's .454.
CLAIMS = (
    _claim("E", "refit: the floor", f"{SOURCE}, table 1", 1.8172, 0.06, unit="nats per token"),
    _claim("A", "refit: factor of the size term", f"{SOURCE}, table 1", 482.01, 249.0),
    _claim("B", "refit: factor of the data term", f"{SOURCE}, table 1", 2085.43, 2586.0),
    _claim("alpha", "refit: loss falls with size as N^-alpha", f"{SOURCE}, table 1", 0.3478, 0.04),
    _claim("beta", "refit: loss falls with data as D^-beta", f"{SOURCE}, table 1", 0.3658, 0.04),
    _claim("a", "refit: compute-optimal size grows as C^a", f"{SOURCE}, table 1", 0.5126, 0.0586),
    _claim("optimum", "refit: some parameters that round to the printed ones minimise the objective: excess over the "
           "minimum, in thousandths of it", f"{SOURCE}, table 1", 0.0, 0.1),
    _claim("points_needed", "points that an interval of a as narrow as reported needs, log10", f"{SOURCE}, abstract",
           math.log10(6e5), math.log10(2)),
    _claim("bias", "the first report's law describes the points without bias: mean of log predicted - log measured",
           "Hoffmann et al. 2022, appendix D.3", 0.0, 0.002),
)  # fmt: skip


@dataclass(frozen=True)
class Size:
    """How many bootstraps, every so many of the published starts, and half-samples for the error of a width."""

    bootstraps: int
    grid: int
    halves: int
    half_bootstraps: int


SIZES = {
    "smoke": Size(bootstraps=120, grid=90, halves=6, half_bootstraps=40),
    "laptop": Size(bootstraps=4000, grid=1, halves=40, half_bootstraps=400),
}


def starts(every: int = 1) -> dict[str, numpy.ndarray]:
    """Hoffmann's grid of 4500 starting points (appendix D.3), or every so many of it; name -> (S,)."""
    import numpy as np

    alpha, beta, log_e, log_a, log_b = np.meshgrid(
        np.arange(0, 2.5, 0.5), np.arange(0, 2.5, 0.5), np.arange(-1, 1.5, 0.5), np.arange(0, 30, 5.0),
        np.arange(0, 30, 5.0), indexing="ij",
    )  # fmt: skip
    grid = {"E": np.exp(log_e), "A": np.exp(log_a), "B": np.exp(log_b), "alpha": alpha, "beta": beta}
    return {name: values.ravel()[::every] for name, values in grid.items()}


def residuals(parameters: Mapping, table: pandas.DataFrame) -> numpy.ndarray:
    """Log predicted - log measured loss of each point."""
    import numpy as np

    from analysis.laws import CHINCHILLA

    return np.log(CHINCHILLA.predict(parameters, {name: table[name] for name in ("N", "D")}) / table["loss"].to_numpy())


def objective(residual_M: numpy.ndarray) -> float:
    """Summed Huber loss of residuals of the log loss."""
    import numpy as np

    size_M = np.abs(residual_M)
    small_M = np.minimum(size_M, HUBER_DELTA)
    return float((small_M * (size_M - small_M / 2)).sum())


def _fit(table: pandas.DataFrame, first: Mapping | int, bootstraps: int, seed: int = 0) -> Fit:
    from analysis.fit import fit
    from analysis.laws import CHINCHILLA

    columns = {name: table[name].to_numpy() for name in ("N", "D")}
    return fit(CHINCHILLA, columns, table["loss"].to_numpy(), delta=HUBER_DELTA, starts=first, bootstraps=bootstraps,
               seed=seed, level=LEVEL)  # fmt: skip


def measure(table: pandas.DataFrame, fitted: Fit, size: Size) -> tuple[dict[str, Measured], dict[str, Any]]:
    """Each claim's value with its interval, and more numbers."""
    estimates = fitted.parameters | fitted.derived
    measured = {
        name: Measured(estimates[name].value, *estimates[name].interval, 1, estimates[name].remark)
        for name in ("E", "A", "B", "alpha", "beta", "a")
    }
    ours, theirs, first = (residuals(p, table) for p in (fitted.best, BESIROGLU, HOFFMANN))
    at_best, at_printed = (value / objective(ours) for value in (_unrounded(table), objective(theirs)))
    excess = [1000 * (ratio - 1) for ratio in (at_best, at_printed)]
    measured["optimum"] = Measured(excess[0], excess[0], excess[1], 1)
    measured["points_needed"] = _points_needed(table, fitted, size)
    measured["bias"] = Measured(*_mean(first), 1)
    far, inside = _distance(fitted)
    numbers = {
        "objective": objective(ours),
        "objective_of_the_printed_refit": objective(theirs),
        "objective_of_the_first_report": objective(first),
        "least_objective_that_rounds_to_the_printed_refit": at_best * objective(ours),
        "mean_residual_of_the_refit": float(ours.mean()),
        "mean_residual_of_the_first_report": float(first.mean()),
        "share_of_points_below_the_first_report": float((first > 0).mean()),
        "distance_of_the_first_exponents": far,
        "share_of_bootstraps_further_than_that": inside,
    }
    return measured, numbers


def _mean(residual_M: numpy.ndarray) -> tuple[float, float, float]:
    """Mean over points and its bootstrap interval."""
    import numpy as np

    drawn = np.random.default_rng(0).integers(len(residual_M), size=(2000, len(residual_M)))
    low, high = np.quantile(residual_M[drawn].mean(axis=1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(residual_M.mean()), float(low), float(high)


def _width(fitted: Fit) -> float:
    """Of the interval of a at the level that Hoffmann et al. reported theirs."""
    import numpy as np

    from analysis.laws import exponents

    low, high = np.quantile(exponents(fitted.sample)[0], [(1 - REPORTED_LEVEL) / 2, (1 + REPORTED_LEVEL) / 2])
    return float(high - low)


def _points_needed(table: pandas.DataFrame, fitted: Fit, size: Size) -> Measured:
    """log10 of the points at which the interval would be as narrow as reported: widths go as points^-1/2.

    The interval is that of the width: over half-samples without replacement its logarithm scatters as over new tables
    of full size (delete-half jackknife).
    """
    import numpy as np
    from scipy.special import ndtri

    rng, logs = np.random.default_rng(0), []
    for seed in range(size.halves):
        half = table.iloc[rng.permutation(len(table))[: len(table) // 2]]
        logs.append(math.log10(_width(_fit(half, 20, size.half_bootstraps, seed))))
    value = math.log10(len(table)) + 2 * math.log10(_width(fitted) / REPORTED_WIDTH)
    half_width = 2 * float(np.std(logs, ddof=1)) * float(ndtri((1 + LEVEL) / 2))
    return Measured(value, value - half_width, value + half_width, 1)


def _distance(fitted: Fit) -> tuple[float, float]:
    """Mahalanobis distance of the first report's exponents from ours, and the share of bootstraps further out."""
    import numpy as np

    sample_Bx2 = np.stack([fitted.sample["alpha"], fitted.sample["beta"]], axis=1)
    inverse = np.linalg.inv(np.cov(sample_Bx2.T))
    centre = np.asarray([fitted.best["alpha"], fitted.best["beta"]])

    def squared(x):
        return ((x - centre) @ inverse * (x - centre)).sum(axis=-1)

    there = squared(np.asarray([HOFFMANN["alpha"], HOFFMANN["beta"]]))
    return float(np.sqrt(there)), float((squared(sample_Bx2) > there).mean())


def _unrounded(table: pandas.DataFrame) -> float:
    """The least objective of any parameters that round to the printed refit, sought from its middle and best corner."""
    import itertools

    import numpy as np
    from scipy.optimize import minimize

    half = {"E": 5e-5, "A": 5e-3, "B": 5e-3, "alpha": 5e-5, "beta": 5e-5}

    def scaled(offset_p):  # the solver's stopping rules are absolute
        moved = {name: BESIROGLU[name] + x * half[name] for x, name in zip(offset_p, half, strict=True)}
        return 1e6 * objective(residuals(moved, table))

    corner = min(map(np.asarray, itertools.product((-1.0, 1.0), repeat=len(half))), key=scaled)
    bounds = [(-1, 1)] * len(half)
    return min(minimize(scaled, at, method="L-BFGS-B", bounds=bounds).fun for at in (np.zeros(len(half)), corner)) / 1e6


def run(job: Job) -> Outcome:
    """Fits, measures, draws."""
    import pandas

    from analysis.fit import to_json

    size, table = SIZES[job.scale], points()
    fitted = _fit(table, starts(size.grid), size.bootstraps)
    measured, numbers = measure(table, fitted, size)
    summary = table.assign(
        residual=residuals(fitted.best, table),
        residual_first_report=residuals(HOFFMANN, table),
    )
    laws = {"Hoffmann et al. 2022": HOFFMANN, "Besiroglu et al. 2024": BESIROGLU, "here": fitted.best}
    rows = [
        {"law": name, **{key: f"{p[key]:.5g}" for key in ("E", "A", "B", "alpha", "beta")},
         "a": f"{p['beta'] / (p['alpha'] + p['beta']):.4f}", "objective": f"{objective(residuals(p, table)):.7e}",
         "mean residual": f"{residuals(p, table).mean():+.4f}"}
        for name, p in laws.items()
    ]  # fmt: skip
    return Outcome(
        measured=measured,
        summary=summary,
        figures=tuple(draw(table, fitted, job.figure)),
        tables=((f"Three laws on the {len(table)} points: summed Huber loss of log loss, delta {HUBER_DELTA:g}; "
                 f"{fitted.starts} starts, {fitted.share_at_optimum:.1%} at the optimum", pandas.DataFrame(rows)),),
        numbers=numbers | {"fit": to_json(fitted)},
        device="cpu",
    )  # fmt: skip


# --- the figure ----------------------------------------------------------------------------------------------------

NOW, THEN = "#1f5a8f", "#c2571a"
SHOWN = (-3.2, 2.8)  # % of the loss; what lies lower is drawn at the edge and counted


def draw(table: pandas.DataFrame, fitted: Fit, path_stem: Path) -> list[Path]:
    """The exponents' confidence region with both reports, residuals over compute, bootstraps of a; PNG and SVG."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from analysis import plots

    with mpl.rc_context(plots.STYLE):
        figure = Figure(figsize=(12, 4.8), layout="constrained")
        left, middle, right = figure.subplots(1, 3)
        _draw_exponents(left, fitted)
        _draw_residuals(middle, table, fitted)
        _draw_a(right, fitted)
        handles, names = left.get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=len(names), handlelength=1.8)
        return plots.save(figure, path_stem)


def _draw_exponents(axes: Any, fitted: Fit) -> None:
    import numpy as np

    alpha, beta = fitted.sample["alpha"], fitted.sample["beta"]
    axes.plot(alpha, beta, ".", ms=3.5, color=NOW, alpha=0.3, mec="none", rasterized=True)
    centre = np.asarray([fitted.best["alpha"], fitted.best["beta"]])
    value, basis = np.linalg.eigh(np.cov(alpha, beta))
    turn = np.linspace(0, 2 * np.pi, 200)
    for level, dashes in ((0.9, "-"), (0.99, (0, (3, 2)))):
        # A bivariate normal is outside this ellipse with probability 1 - level.
        radius = np.sqrt(-2 * np.log(1 - level))
        x, y = centre[:, None] + radius * (basis * np.sqrt(value)) @ np.stack([np.cos(turn), np.sin(turn)])
        axes.plot(x, y, color="0.15", lw=1.1, ls=dashes, label=f"{level:.0%} region of the bootstraps")
    marks = {"ls": "", "mew": 1.2}
    axes.plot(*_exponents(fitted.best), marker="o", ms=7, color=NOW, mec="white", label="optimum here", **marks)
    axes.plot(*_exponents(BESIROGLU), marker="D", ms=6, mfc="none", mec="0.15", label="Besiroglu et al. 2024", **marks)
    axes.plot(*_exponents(HOFFMANN), marker="X", ms=9, color=THEN, mec="white", label="Hoffmann et al. 2022", **marks)
    axes.set_xlabel("alpha (exponent of size)")
    axes.set_ylabel("beta (exponent of data)")
    axes.set_title("Where the exponents can be")


def _draw_residuals(axes: Any, table: pandas.DataFrame, fitted: Fit) -> None:
    import numpy as np

    for parameters, colour, look in (
        (HOFFMANN, THEN, {"marker": "X", "ms": 4.5, "mec": "white", "mew": 0.3}),
        (fitted.best, NOW, {"marker": "o", "ms": 4, "mec": "white", "mew": 0.4}),
    ):
        residual = 100 * residuals(parameters, table)
        axes.plot(table["C"], np.clip(residual, SHOWN[0] + 0.1, None), ls="", color=colour, alpha=0.75, **look)
        axes.axhline(residual.mean(), color=colour, lw=1.4, ls=(0, (4, 1.5)))
        words = f"mean {residual.mean():+.2f} %, {(residual < SHOWN[0]).sum()} points below the panel"
        at = 0.98 if parameters is HOFFMANN else 0.92
        axes.text(0.02, at, words, transform=axes.transAxes, ha="left", va="top", fontsize=8, color=colour)
    axes.axhline(0, color="0.2", lw=0.8)
    axes.set_xscale("log")
    axes.set_ylim(*SHOWN)
    axes.set_xlabel("training compute C (FLOPs)")
    axes.set_ylabel("predicted above measured loss (%)")
    axes.set_title("What each law says of the points")


def _draw_a(axes: Any, fitted: Fit) -> None:
    import numpy as np

    from analysis.laws import exponents

    a = exponents(fitted.sample)[0]
    low, high = np.quantile(a, [(1 - REPORTED_LEVEL) / 2, (1 + REPORTED_LEVEL) / 2])
    axes.hist(a, bins=40, color=NOW, alpha=0.55)
    top = axes.get_ylim()[1]
    axes.plot([low, high], [1.04 * top] * 2, color=NOW, lw=3, solid_capstyle="butt")
    axes.text((low + high) / 2, 1.07 * top, f"80 %: {low:.3f} to {high:.3f}", ha="center", fontsize=8, color=NOW)
    axes.axvspan(0.454, 0.454 + REPORTED_WIDTH, color=THEN, lw=0)
    axes.text(0.4525, 0.55 * top, "Hoffmann et al. 2022\n80 %: 0.454 to 0.455", ha="right", va="center", fontsize=8,
              color=THEN, rotation=90, linespacing=1.4)  # fmt: skip
    axes.set_xlim(0.435, None)
    axes.set_ylim(0, 1.18 * top)
    axes.set_yticks([])
    axes.set_xlabel("a: compute-optimal size grows as C^a")
    axes.set_title(f"How well a is known: {fitted.bootstraps} bootstraps")


def _exponents(parameters: Mapping[str, float]) -> tuple[float, float]:
    return parameters["alpha"], parameters["beta"]


PAPER = Paper(
    name="besiroglu2024",
    title="Chinchilla's third approach, fitted again: the optimum, its intervals, and why the first report cannot hold",
    source="Besiroglu et al. 2024, Chinchilla Scaling: A replication attempt",
    claims=CLAIMS,
    takes={"smoke": "seconds", "laptop": "about a minute on 2 CPU cores"},
    run=run,
)
