"""Do fitted compute-optimal exponents come out as theory says, where theory is exact?

Linear regression on power-law random features by one-pass SGD (Paquette et al. 2024) has compute-optimal exponents
that are known, and differ by phase: by how fast the data's spectrum falls (alpha) and the target's weights (beta).
Here models of many sizes are trained, their curves taken to equal compute, and the exponents of the best loss and the
best size fitted, as one does with language models. Beside theory there is a second reference: the loss averaged over
all data that SGD may see, exact at any size (tasks/features.py). It tells how far from the limit our sizes are.

Compute is iterations x batch x d: six times less than the FLOPs 6 N D of the run table, which changes no exponent.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.claims import Claim, Measured, mean_and_interval
from experiments.registry import Job, Outcome, Paper, Unfinished
from jaxgpt.config import RunConfig, override

if TYPE_CHECKING:
    import numpy
    import pandas

PAQUETTE = "Paquette et al. 2024"
LEVEL = 0.9
RATIO = 4  # dimension of the data over d
BUDGETS = 31  # in the three decades up to the largest
STEEP = 1.5  # a run lasts up to the budget at which 8 times its size is best, which grows as this power or faster

# --- theory --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Phase:
    """A spectrum. optimum: rate x iterations x d over d^(1 / size exponent) where d is best, about."""

    name: str
    alpha: float
    beta: float
    optimum: float

    @property
    def theory(self) -> tuple[float, float]:
        """What `theory` says of it."""
        return theory(self.alpha, self.beta)[1:]


def theory(alpha: float, beta: float) -> tuple[str, float, float]:
    """(phase, x, y): the best loss falls as compute^-x, the best size grows as compute^y.

    They follow from a loss that is a sum of powers of iterations r and size d, with a rate as large as is stable:
    r^-(1 + beta / alpha - 1 / (2 alpha)) (target not yet learnt) + d^-(2 alpha + min(0, 2 beta - 1)) (out of the
    features' reach) + d^-1 r^-(1 - 1 / (2 alpha)) (features that mix) + r^-(2 - 1 / (2 alpha)) (noise of SGD). A test
    minimises that sum. Below 2 alpha = 1 only the phase that we train is written down.
    """
    a, b = alpha, beta
    if 2 * a > 1 and 2 * b < 1:
        return "Ia", (2 * a + 2 * b - 1) / (2 * a + 1), 1 / (2 * a + 1)
    if 2 * a > 1 and b < a:
        return "II", (2 * a + 2 * b - 1) / (2 * (a + b)), b / (a + b)
    if 2 * a > 1:
        return "III", 1 - 1 / (4 * a), 0.5
    if 2 * b > 1 and a > 1 - math.sqrt(0.5):
        return "IVa", a, 0.5
    raise ValueError(f"alpha={alpha}, beta={beta} lies in a phase whose exponents are not written down here")


PHASES = (
    Phase("Ia", alpha=0.75, beta=0.1, optimum=0.1),
    Phase("II", alpha=0.75, beta=0.6, optimum=0.15),
    Phase("III", alpha=0.75, beta=1.0, optimum=0.32),
    Phase("IVa", alpha=0.4, beta=0.8, optimum=0.29),
)


def _claims() -> Iterator[Claim]:
    for phase in PHASES:
        loss, size = phase.theory
        where = f"phase {phase.name} (alpha {phase.alpha:g}, beta {phase.beta:g})"
        what = {"loss": (f"{where}: the best loss falls as compute^-x", loss),
                "size": (f"{where}: the best size grows as compute^y", size)}  # fmt: skip
        for key, (statement, exponent) in what.items():
            yield Claim(f"{key}_{phase.name}", statement, PAQUETTE, exponent, 0.1, "1", "toy_analogue",
                        LEVEL)  # fmt: skip
    yield Claim("exact", "final loss over the exact expected loss: mean over phases and sizes", "ours", 1.0, 0.05,
                "1", "same_regime", LEVEL)  # fmt: skip


CLAIMS = tuple(_claims())

# --- the runs ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """What a scale does. sizes: d, in ratios of about sqrt 2. rates: learning rates times the expected squared length
    of the features, each with its number of draws of features and data; the last one is held against the claims.
    checked: the largest d whose final losses are compared with their expectation. exact_...: for the expectation.
    window: how many sizes on each side of the best one the parabola goes through. evaluations: points of a curve.
    """

    sizes: tuple[int, ...]
    rates: tuple[tuple[float, int], ...]
    checked: int
    exact_sizes: tuple[int, ...]
    exact_draws: int
    window: int = 3
    evaluations: int = 96
    bootstraps: int = 500

    @property
    def main(self) -> tuple[float, int]:
        """The rate that counts, and its draws."""
        return self.rates[-1]


def half_octaves(first: int, count: int) -> tuple[int, ...]:
    """Sizes in ratios of about the square root of 2."""
    return tuple(round(first * 2 ** (i / 2)) for i in range(count))


SIZES = {
    "smoke": Size(half_octaves(8, 5), ((0.6, 3),), 32, half_octaves(16, 7), 1, window=2, evaluations=12, bootstraps=30),
    "laptop": Size(half_octaves(16, 12), ((0.3, 4), (0.6, 12)), 256, half_octaves(32, 12), 2),
    "paper": Size(half_octaves(64, 12), ((0.3, 16), (0.6, 16)), 1024, half_octaves(128, 12), 4),
}


def top(phase: Phase, sizes: Sequence[int], rate: float) -> float:
    """The largest budget, iterations x d: at which about half the largest size is best."""
    return phase.optimum / rate * (sizes[-1] / 2) ** (1 / phase.theory[1])


def iterations(phase: Phase, sizes: Sequence[int], d: int, rate: float) -> int:
    """How long a model of d features is trained: up to the largest budget, or past those at which it may be best."""
    return math.ceil(top(phase, sizes, rate) / d * min(1.0, (8 * d / sizes[-1]) ** STEEP))


def learning_rate(phase: Phase, d: int, rate: float) -> float:
    """SGD's rate, from its share of what the length of the features allows."""
    from jaxgpt.tasks.features import trace

    return rate / trace(phase.alpha, RATIO * d)


def points(size: Size) -> list[tuple[int, float, int]]:
    """(d, rate, draw) of the runs of a phase."""
    return [(d, rate, draw) for d in size.sizes for rate, draws in size.rates for draw in range(draws)]


def configs(size: Size, phase: Phase) -> list[RunConfig]:
    """The runs of a phase: plain SGD with batches of one and a constant rate."""
    return [_config(size, phase, *point) for point in points(size)]


def _config(size: Size, phase: Phase, d: int, rate: float, draw: int) -> RunConfig:
    steps = iterations(phase, size.sizes, d, rate)
    settings = {
        "model.d_model": d, "model.n_heads": 1, "model.d_head": 2, "model.context": 1, "train.batch_size": 1,
        "train.steps": steps, "train.seed": draw, "train.log_every": steps,
        "train.eval_every": math.ceil(steps / size.evaluations), "optimizer.name": "sgd", "optimizer.momentum": 0.0,
        "optimizer.schedule": "constant", "optimizer.warmup_steps": 0, "optimizer.weight_decay": 0.0,
        "optimizer.clip": None, "optimizer.learning_rate": learning_rate(phase, d, rate),
    }  # fmt: skip
    return override(RunConfig(), settings)


def train(job: Job, size: Size) -> tuple[Any, Any]:  # pandas' own types do not follow its columns
    """Runs and curves of all phases, with columns phase, d, rate (its share) and draw. Raises Unfinished."""
    import pandas

    from jaxgpt import load, sweep
    from jaxgpt.tasks import features

    began, tables, draws = time.monotonic(), [], max(draws for _, draws in size.rates)
    for phase in PHASES:
        wanted = configs(size, phase)

        def setup(config: RunConfig, phase: Phase = phase) -> Any:
            return features.source(config, phase.alpha, phase.beta, RATIO * config.model.d_model, draws)

        runs = sweep(wanted, job.raw, setup=setup, max_minutes=job.minutes_left(began))
        if len(runs) < len(wanted):
            raise Unfinished(
                f"time is up: {len(runs)} of {len(wanted)} runs of phase {phase.name} are done; "
                "the same command goes on"
            )
        named = pandas.DataFrame(points(size), columns=["d", "rate", "draw"])
        tables.append(runs.assign(phase=phase.name, **named))
    runs = pandas.concat(tables, ignore_index=True)
    return runs, load(job.raw)[1].dropna(subset=["validation_loss"])


# --- from curves to exponents --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """Losses (S, D, G) of draws, sizes and budgets (iterations x d); NaN at budgets that a run has not reached."""

    sizes_D: numpy.ndarray
    budget_G: numpy.ndarray
    loss_SxDxG: numpy.ndarray
    window: int  # see Size


def budgets(phase: Phase, sizes: Sequence[int], rate: float) -> numpy.ndarray:
    """The budgets (G,) at which sizes are compared."""
    import numpy as np

    most = top(phase, sizes, rate)
    return np.geomspace(most / 1000, most, BUDGETS)


def measured_grid(runs: Any, curves: Any, phase: Phase, size: Size, rate: float) -> Grid:
    """The trained losses of a phase at one rate: straight lines between the evaluations, in the logarithms."""
    import numpy as np

    budget_G = budgets(phase, size.sizes, rate)
    loss_SxDxG = np.full((dict(size.rates)[rate], len(size.sizes), BUDGETS), np.nan)
    mine = runs[(runs["phase"] == phase.name) & (runs["rate"] == rate) & (runs["status"] == "done")]
    by_run = dict(list(curves.groupby("run_id")))
    for run in mine.itertuples():
        curve = by_run[run.run_id]
        log_loss_G = np.interp(np.log(budget_G), np.log(curve["step"] * run.d), np.log(curve["validation_loss"]),
                               left=np.nan, right=np.nan)  # fmt: skip
        loss_SxDxG[run.draw, size.sizes.index(run.d)] = np.exp(log_loss_G)
    return Grid(np.asarray(size.sizes), budget_G, loss_SxDxG, size.window)


def expected(phase: Phase, d: int, rate: float, draw: int, steps_T: numpy.ndarray) -> numpy.ndarray:
    """The loss (T,) after so many iterations, averaged over all data, for the features that are trained on."""
    from jaxgpt.tasks.features import expected_loss, mixtures

    w_VxD = mixtures(RATIO * d, d, draw)
    return expected_loss(w_VxD, phase.alpha, phase.beta, learning_rate(phase, d, rate), 1, steps_T)


def exact_grid(phase: Phase, sizes: Sequence[int], rate: float, draws: int, window: int) -> Grid:
    """The expected losses of a phase at one rate, at every budget."""
    import numpy as np

    budget_G = budgets(phase, sizes, rate)
    loss = [[expected(phase, d, rate, draw, budget_G / d) for d in sizes] for draw in range(draws)]
    return Grid(np.asarray(sizes), budget_G, np.asarray(loss), window)


def final_ratios(runs: Any, size: Size) -> numpy.ndarray:
    """Final loss over its exact expectation at the last rate: means over phases and sizes, one for each draw (S,)."""
    import numpy as np

    phases = {phase.name: phase for phase in PHASES}
    compared = runs[(runs["d"] <= size.checked) & (runs["rate"] == size.main[0])]
    exact = [
        expected(phases[run.phase], run.d, run.rate, run.draw, np.asarray([run.steps_done]))[0]
        for run in compared.itertuples()
    ]
    return (compared["final_loss"] / exact).groupby(compared["draw"]).mean().to_numpy()


@dataclass(frozen=True)
class Frontier:
    """At each budget (K,) that has one: the best size, between the sizes that there are, and the lowest loss."""

    budget_K: numpy.ndarray
    size_K: numpy.ndarray
    loss_K: numpy.ndarray

    def exponents(self) -> numpy.ndarray:
        """(x, y): loss ~ budget^-x, size ~ budget^y, as the fit engine gives them; NaN for fewer than 4 budgets."""
        import numpy as np

        from analysis.fit import fit
        from analysis.laws import KAPLAN_C

        if len(self.budget_K) < 4:
            return np.full(2, np.nan)
        how = {"objective": "squared_log", "starts": 20, "bootstraps": 0}
        falling = self.loss_K, 1 / self.size_K
        return np.asarray([fit(KAPLAN_C, {"C": self.budget_K}, y_K, **how).best["alphaC"] for y_K in falling])

    def slopes(self) -> numpy.ndarray:
        """The same in closed form, for hundreds of resamples: least squares in the logarithms."""
        import numpy as np

        if len(self.budget_K) < 4:
            return np.full(2, np.nan)
        log_y_Kx2 = np.log(np.stack([self.loss_K, self.size_K], axis=1))
        return np.polyfit(np.log(self.budget_K), log_y_Kx2, 1)[0] * (-1, 1)


def frontier(grid: Grid) -> Frontier:
    """The best size at each budget: the vertex of a parabola through the lowest mean loss and its neighbours.

    Budgets whose lowest loss is not `window` sizes away from the first and last size that reached them are left out.
    """
    import numpy as np

    from analysis.approaches import parabola_minimum
    from analysis.fit import FitError

    log_loss_DxG, found, w = np.log(grid.loss_SxDxG.mean(axis=0)), [], grid.window
    for budget, column_D in zip(grid.budget_G, log_loss_DxG.T, strict=True):
        if np.isnan(column_D).all():
            continue
        best = int(np.nanargmin(column_D))
        around = slice(best - w, best + w + 1)
        if best < w or len(column_D[around]) < 2 * w + 1 or np.isnan(column_D[around]).any():
            continue
        try:
            log_size = parabola_minimum(np.log(grid.sizes_D[around]), column_D[around], np.ones(2 * w + 1))
        except FitError:
            continue
        found.append((budget, math.exp(log_size), math.exp(column_D[best])))
    return Frontier(*np.asarray(found).reshape(-1, 3).T)


def resampled(grid: Grid, count: int) -> numpy.ndarray:
    """Exponents (B, 2) of frontiers of resampled draws: each is a cluster, whose curves and sizes stay together."""
    import numpy as np

    rng, draws = np.random.default_rng(0), len(grid.loss_SxDxG)
    return np.asarray([
        frontier(replace(grid, loss_SxDxG=grid.loss_SxDxG[rng.integers(draws, size=draws)])).slopes()
        for _ in range(count)
    ])  # fmt: skip


def measure(grids: dict[str, Grid], ratios_S: numpy.ndarray, bootstraps: int) -> dict[str, Measured]:
    """Each claim's value and interval. grids: of each phase at the last rate; ratios_S: of `final_ratios`."""
    import numpy as np

    found = {"exact": Measured(*mean_and_interval(ratios_S, LEVEL), len(ratios_S))}
    for name, grid in grids.items():
        value_2, each_Bx2 = frontier(grid).exponents(), resampled(grid, bootstraps)
        lost = np.isnan([*each_Bx2[:, 0], value_2[0]]).mean() > 1 - LEVEL
        remark = "the best size lies inside the sizes at fewer than 4 budgets" if lost else ""
        ends_2x2 = np.full((2, 2), np.nan) if lost else np.nanquantile(each_Bx2, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], 0)
        for key, value, (low, high) in zip(("loss", "size"), value_2, ends_2x2.T, strict=True):
            found[f"{key}_{name}"] = Measured(float(value), float(low), float(high), len(grid.loss_SxDxG), remark)
    return found


# --- from the runs to the figure -----------------------------------------------------------------------------------

SUMMARY = [
    *("run_id", "phase", "numbers.alpha", "numbers.beta", "d", "rate", "draw", "train.steps", "status", "params_total"),
    *("flops_6nd", "optimizer.learning_rate", "final_loss", "wall_seconds", "code_version"),
]


def run(job: Job) -> Outcome:
    """Trains, compares with the exact expected loss, fits, draws."""
    size = SIZES[job.scale]
    runs, curves = train(job, size)
    main, draws = size.main
    trained = {(p.name, rate): measured_grid(runs, curves, p, size, rate) for p in PHASES for rate, _ in size.rates}
    exact = {p.name: exact_grid(p, size.sizes, main, size.exact_draws, size.window) for p in PHASES}
    larger = {p.name: exact_grid(p, size.exact_sizes, main, size.exact_draws, size.window) for p in PHASES}
    grids = {phase.name: trained[phase.name, main] for phase in PHASES}
    measured = measure(grids, final_ratios(runs, size), size.bootstraps)
    table = exponent_table(size, trained, exact, larger, measured)
    return Outcome(
        measured=measured,
        summary=runs.reindex(columns=SUMMARY),
        tables=((f"Compute-optimal exponents of loss and size: theory, {draws} draws trained (with "
                 f"{LEVEL:.0%} interval), and the exact expected loss of the same and of larger models", table),),
        figures=tuple(draw(grids, exact, measured, job.figure)),
        numbers={"exponents": table.to_dict("records")},
        seconds_training=sum(runs["wall_seconds"]),
        device=runs["device"].iloc[0],
    )  # fmt: skip


def exponent_table(size: Size, trained: dict, exact: dict, larger: dict, measured: dict) -> pandas.DataFrame:
    """One line per phase and exponent: theory, and what the frontiers of trained and of expected losses give."""
    import pandas

    rows = []
    for phase in PHASES:
        name = phase.name
        frontiers = {f"trained, rate {r:g}": trained[name, r] for r, _ in size.rates}
        frontiers |= {"exact, same sizes": exact[name],
                      f"exact, d to {size.exact_sizes[-1]}": larger[name]}  # fmt: skip
        found = {words: frontier(grid).exponents() for words, grid in frontiers.items()}
        for i, key in enumerate(("loss", "size")):
            claimed = measured[f"{key}_{name}"]
            cells = {words: f"{x_2[i]:.3f}" for words, x_2 in found.items()}
            cells[f"trained, rate {size.main[0]:g}"] += f" ({claimed.low:.3f} to {claimed.high:.3f})"
            rows.append({"phase": name, "exponent of": key, "theory": f"{phase.theory[i]:.3f}", **cells})
    return pandas.DataFrame(rows)


# --- the figure ----------------------------------------------------------------------------------------------------


def draw(grids: dict[str, Grid], exact: dict[str, Grid], measured: dict[str, Measured], path_stem: Path) -> list[Path]:
    """Above: loss against compute at every size with its expectation and the frontier; below: the best size."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from analysis import plots

    with mpl.rc_context(plots.STYLE):
        figure = Figure(figsize=(3.3 * len(grids), 6.6), layout="constrained")
        panels = figure.subplots(2, len(grids), sharex="col", height_ratios=(1.5, 1))
        for (above, below), phase in zip(panels.T, PHASES, strict=True):
            _draw_losses(above, phase, grids[phase.name], exact[phase.name])
            _draw_sizes(below, phase, frontier(grids[phase.name]))
            for axes, i, key, sign in ((above, 0, "loss", "-"), (below, 1, "size", "")):
                m = measured[f"{key}_{phase.name}"]
                said = f"{key} ~ compute$^{{{sign}x}}$\nmeasured x = {m.value:.2f} [{m.low:.2f}, {m.high:.2f}]\n"
                axes.text(0.03, 0.03 if key == "loss" else 0.97, said + f"theory x = {phase.theory[i]:.2f}",
                          transform=axes.transAxes, va="bottom" if key == "loss" else "top", fontsize=8,
                          linespacing=1.5)  # fmt: skip
        panels[0, 0].set_ylabel("expected squared error of new data")
        panels[1, 0].set_ylabel("best size d")
        _legend(figure, next(iter(grids.values())).sizes_D)
        return plots.save(figure, path_stem)


def _draw_losses(axes: Any, phase: Phase, grid: Grid, exact: Grid) -> None:
    import numpy as np

    from analysis import plots

    mean_DxG, exact_DxG = (g.loss_SxDxG.mean(axis=0) for g in (grid, exact))
    for (colour, _), trained_G, exact_G in zip(
        plots.size_styles(grid.sizes_D).values(), mean_DxG, exact_DxG, strict=True
    ):
        axes.plot(grid.budget_G, trained_G, color=colour, lw=1.1)
        axes.plot(grid.budget_G, np.where(np.isnan(trained_G), np.nan, exact_G), color="black", lw=0.5, ls=":")
    best = frontier(grid)
    axes.plot(best.budget_K, best.loss_K, color="#c2571a", lw=2.2, zorder=3)
    _guide(axes, best.budget_K, best.loss_K, -phase.theory[0])
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_title(f"Phase {phase.name}: $\\alpha$ = {phase.alpha:g}, $\\beta$ = {phase.beta:g}")


def _draw_sizes(axes: Any, phase: Phase, best: Frontier) -> None:
    axes.plot(best.budget_K, best.size_K, color="#c2571a", ls="", marker="o", ms=4.5, mec="white", mew=0.5, zorder=3)
    _guide(axes, best.budget_K, best.size_K, phase.theory[1])
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("compute: iterations × d")


def _guide(axes: Any, x_K: numpy.ndarray, y_K: numpy.ndarray, slope: float) -> None:
    """A dashed line with theory's slope, through the middle of the points."""
    import numpy as np

    if len(x_K):
        middle = np.exp(np.log(y_K).mean() + slope * (np.log(x_K) - np.log(x_K).mean()))
        axes.plot(x_K, middle, color="black", lw=1.4, ls=(0, (4, 2)), zorder=4)


def _legend(figure: Any, sizes_D: numpy.ndarray) -> None:
    from matplotlib.lines import Line2D

    from analysis import plots

    handles = [Line2D([], [], color=colour, lw=1.6) for colour, _ in plots.size_styles(sizes_D).values()]
    names = [f"d = {d}" for d in sizes_D]
    handles += [Line2D([], [], color="black", lw=0.7, ls=":"), Line2D([], [], color="#c2571a", lw=2.2),
                Line2D([], [], color="black", lw=1.4, ls=(0, (4, 2)))]  # fmt: skip
    names += ["exact expected loss", "compute-optimal frontier", "slope of theory"]
    figure.legend(handles, names, loc="outside lower center", ncols=8, handlelength=1.8)


PAPER = Paper(
    name="paquette2024",
    title="Compute-optimal exponents that are known exactly: random features with power laws, in four phases",
    source=PAQUETTE,
    claims=CLAIMS,
    takes={
        "smoke": "a quarter of a minute",
        "laptop": "about 4 minutes on 2 CPU cores",
        "paper": "for a GPU; not yet run",
    },
    run=run,
)
