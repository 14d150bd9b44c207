"""Do the loss curves of compute-optimally trained models collapse onto one, more tightly than seeds agree?

Models of several widths, each trained for about its compute-optimal time, once with the rate falling to zero as a
cosine and once with a constant rate. A curve is normalised to end at (1, 1): compute over the training's compute,
reducible loss over the run's own final reducible loss. Compared at each fraction x of the training (Qiu et al. 2025):

  deviation(x)  relative standard deviation of the normalised curves over all models and seeds
  noise(x)      relative standard deviation of the reducible loss over seeds, before normalising

"Supercollapse" is deviation < noise. All rests on the floor that is subtracted, and a few sizes tell it badly: an error
of the floor looks like shapes that differ. So it is taken in two ways: from a power law of the final losses, as in the
paper, and as the one that makes the collapse tightest, which asks whether there is any floor at which curves collapse.
Both are found anew for each leave-one-seed-out sample, so that their uncertainty is in the intervals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.claims import Claim, Measured
from experiments.registry import Job, Outcome, Paper
from experiments.scaling import curves

if TYPE_CHECKING:
    import numpy
    import pandas

    from analysis.curves import Collapse, PowerFit

QIU = "Qiu et al. 2025"
LEVEL = 0.9
GRID = 50  # floors looked at before the best one is refined
FRACTIONS, WINDOW = 91, (0.25, 0.9)  # of the training: looked at (from .1 to 1), and held against the claims

CLAIMS = (
    Claim("supercollapse", "with learning-rate decay normalised curves differ less than seeds: deviation / noise",
          f"{QIU}, abstract", 0.5, 0.5, "1", "toy_analogue", LEVEL),
    Claim("tightest", "the same at the floor that makes the collapse tightest",
          f"{QIU}, abstract; the choice of floor: ours", 0.5, 0.5, "1", "toy_analogue", LEVEL),
    Claim("decay", "decay makes the collapse tighter: deviation / noise with decay over that at a constant rate, each "
          "at its tightest", f"{QIU}, abstract", 0.5, 0.5, "1", "toy_analogue", LEVEL),
    Claim("suboptimal", "and scaling the length suboptimally breaks it: deviation at the optimal lengths over that at "
          "one length for all (constant rate, each at its tightest)", f"{QIU}, abstract", 0.5, 0.5, "1",
          "toy_analogue", LEVEL),
)  # fmt: skip


# --- the runs ------------------------------------------------------------------------------------------------------


def decayed(size: curves.Size) -> list:
    """The runs whose rate falls to zero: widths x seeds, each as long as is compute-optimal."""
    return [
        curves.config(size, width, seed, curves.optimal_steps(size, width), curves.TO_ZERO)
        for width in size.widths
        for seed in range(size.seeds)
    ]


@dataclass(frozen=True)
class Family:
    """Curves at the same fractions x of each training, loss in nats per byte; compute of each model's training."""

    loss_MxSxX: numpy.ndarray
    flops_M: numpy.ndarray

    def without(self, seed: int | None) -> Family:
        """The family without one seed of each model."""
        import numpy as np

        return self if seed is None else Family(np.delete(self.loss_MxSxX, seed, axis=1), self.flops_M)

    def floor(self) -> PowerFit:
        """The power law of the final losses in compute; its floor is what is subtracted."""
        import numpy as np

        from analysis.curves import fit_power

        final_MxS = self.loss_MxSxX[:, :, -1]
        return fit_power(np.repeat(self.flops_M, final_MxS.shape[1]), final_MxS.ravel())

    def floored(self) -> bool:
        """Whether the law's floor lies below every loss, so that it can be subtracted."""
        return self.floor().floor < float(self.loss_MxSxX.min())

    def why_no_floor(self) -> str:
        """In words why the final losses do not tell the floor; "" where they do."""
        if not self.floored():
            return "the fitted floor lies above some losses"
        return "the final losses do not tell the floor or the exponent" if self.floor().at_bound else ""

    def by_law(self) -> Collapse:
        """The curves normalised with the law's floor, or with 0 where that cannot be subtracted."""
        from analysis.curves import collapse

        return collapse(self.loss_MxSxX, self.floor().floor if self.floored() else 0.0)

    def tightest(self) -> tuple[Collapse, float]:
        """The curves normalised with the floor at which they deviate least in the window; and this floor."""
        from scipy.optimize import minimize_scalar

        from analysis.curves import collapse

        most = float(self.loss_MxSxX.min())

        def deviation(share: float) -> float:
            return log_deviation(collapse(self.loss_MxSxX, share * most))

        # The deviation may have more than one lowest point: the best of a grid is refined.
        grid = [i / GRID for i in range(GRID)]
        i = min(range(GRID), key=lambda i: deviation(grid[i]))
        bounds = (max(i - 1, 0) / GRID, min(i + 1, GRID - 0.1) / GRID)
        refined = minimize_scalar(deviation, bounds=bounds, method="bounded")
        share = float(refined.x) if refined.fun < deviation(grid[i]) else grid[i]
        return collapse(self.loss_MxSxX, share * most), share * most


def fractions() -> numpy.ndarray:
    """The fractions of the training that are looked at, (X,)."""
    import numpy as np

    return np.linspace(0.1, 1, FRACTIONS)


def family(seen: Any, size: curves.Size, final_fraction: float, length: Callable[[int], int]) -> Family:
    """The curves of all widths and seeds, by where their rate ends, cut at `length(width)` steps."""
    import numpy as np

    rows, compute, x_X = [], [], fractions()
    for width in size.widths:
        mine = seen[(seen["model.d_model"] == width) & (seen["optimizer.final_fraction"] == final_fraction)]
        runs = [run for _, run in mine.groupby("train.seed")]
        rows.append([np.interp(x_X * length(width), run["step"], run["validation_loss"]) for run in runs])
        last = runs[0].iloc[-1]
        compute.append(last["flops_6nd"] * length(width) / last["step"])
    return Family(np.asarray(rows), np.asarray(compute))


# --- what they say -------------------------------------------------------------------------------------------------


def in_window() -> numpy.ndarray:
    """Which fractions are held against the claims, (X,) bool."""
    x_X = fractions()
    return (x_X >= WINDOW[0]) & (x_X <= WINDOW[1])


def log_deviation(found: Collapse) -> float:
    """The mean in the window of the logarithm of the deviation."""
    import numpy as np

    return float(np.log(found.deviation_X[in_window()]).mean())


def log_ratios(families: Mapping[str, Family], seed: int | None = None) -> numpy.ndarray:
    """Logarithms of the claims' ratios, (4,), with all seeds or without one."""
    import numpy as np

    some = {name: each.without(seed) for name, each in families.items()}
    tight = {name: each.tightest()[0] for name, each in some.items()}
    by_law = math.log(some["decayed"].by_law().ratio(in_window()))
    ratio = {name: math.log(each.ratio(in_window())) for name, each in tight.items()}
    suboptimal = log_deviation(tight["constant"]) - log_deviation(tight["one length"])
    return np.asarray([by_law, ratio["decayed"], ratio["decayed"] - ratio["constant"], suboptimal])


def measure(families: Mapping[str, Family]) -> dict[str, Measured]:
    """The ratios with jackknife intervals over seeds (Student's t on the logarithms)."""
    import numpy as np
    from scipy.special import stdtrit

    seeds, value_C = families["decayed"].loss_MxSxX.shape[1], log_ratios(families)
    half_C = np.full(len(value_C), math.inf)
    if seeds > 2:  # of two seeds one is left, which has no spread
        left_SxC = np.asarray([log_ratios(families, seed) for seed in range(seeds)])
        error_C = np.sqrt((seeds - 1) / seeds * ((left_SxC - left_SxC.mean(axis=0)) ** 2).sum(axis=0))
        half_C = float(stdtrit(seeds - 1, (1 + LEVEL) / 2)) * error_C
    remarks = {"supercollapse": families["decayed"].why_no_floor()}
    return {
        claim.id: Measured(math.exp(v), math.exp(v - half), math.exp(v + half), seeds, remarks.get(claim.id, ""))
        for claim, v, half in zip(CLAIMS, value_C, half_C, strict=True)
    }


def run(job: Job) -> Outcome:
    """Trains, normalises, compares, draws."""
    size = curves.SIZES[job.scale]
    runs, seen = curves.train(job, decayed(size) + curves.constants(size))
    lengths = {width: curves.optimal_steps(size, width) for width in size.widths}
    middle = sorted(lengths.values())[len(lengths) // 2]
    families = {
        "decayed": family(seen, size, 0.0, lengths.__getitem__),
        "constant": family(seen, size, 1.0, lengths.__getitem__),
        "one length": family(seen, size, 1.0, lambda _: middle),
    }
    sizes = [int(runs.loc[runs["model.d_model"] == width, "params_total"].iloc[0]) for width in size.widths]
    return Outcome(
        measured=measure(families),
        summary=runs.reindex(columns=curves.SUMMARY),
        tables=(("Final losses (nats per byte, mean over seeds), and the floors",
                 floor_table(families, sizes)),),
        figures=tuple(draw(families, sizes, job.figure)),
        numbers={name: {"floor": each.floor().floor, "exponent": each.floor().exponent,
                        "tightest_floor": each.tightest()[1]}
                 for name, each in families.items()},
        seconds_training=sum(runs["wall_seconds"]),
        device=runs["device"].iloc[0],
        corpus_sha256=runs["corpus_sha256"].iloc[0],
    )  # fmt: skip


FAMILIES = {
    "decayed": "rate falls to zero, optimal lengths",
    "constant": "constant rate, optimal lengths",
    "one length": "constant rate, one length",
}


def floor_table(families: Mapping[str, Family], sizes: list[int]) -> pandas.DataFrame:
    """One line per family."""
    import pandas

    rows = []
    for name, each in families.items():
        power, final_M = each.floor(), each.loss_MxSxX[:, :, -1].mean(axis=1)
        said = f"{power.floor:.3f}" + " (at a bound)" * power.at_bound
        found, tight = each.tightest()
        rows.append(
            {"runs": FAMILIES[name], **{f"N = {n:,}": f"{v:.3f}" for n, v in zip(sizes, final_M, strict=True)},
             "floor of the law": said, "its exponent in C": f"{power.exponent:.3f}",
             "tightest floor": f"{tight:.3f}", "deviation / noise": f"{found.ratio(in_window()):.2f}"}
        )  # fmt: skip
    return pandas.DataFrame(rows)


# --- the figure ----------------------------------------------------------------------------------------------------


def draw(families: Mapping[str, Family], sizes: list[int], path_stem: Path) -> list[Path]:
    """Curves as they are, normalised at their tightest with and without decay, and deviation beside noise; PNG, SVG."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from analysis import plots

    styles = plots.size_styles(sizes)
    colours = [styles[n][0] for n in sizes]
    with mpl.rc_context(plots.STYLE):
        figure = Figure(figsize=(13.5, 4.2), layout="constrained")
        raw, with_decay, without, right = figure.subplots(1, 4, width_ratios=(1, 1, 1, 1.1))
        lines = _draw_raw(raw, families["decayed"], colours)
        _draw_collapse(with_decay, families["decayed"].tightest()[0], colours, "Normalised, rate falls to zero")
        _draw_collapse(without, families["constant"].tightest()[0], colours, "Normalised, constant rate")
        ends = [axes.get_ylim() for axes in (with_decay, without)]
        for axes in (with_decay, without):
            axes.set_ylim(min(low for low, _ in ends), max(high for _, high in ends))
        with_decay.set_ylabel("reducible loss / its final value")
        shown = _draw_tightness(right, families)
        names = [f"N = {plots.short(n)}" for n in sizes]
        figure.legend(lines, names, loc="outside lower left", ncols=len(names))
        figure.legend(*shown, loc="outside lower right", ncols=5)
        return plots.save(figure, path_stem)


def _draw_raw(axes: Any, each: Family, colours: list) -> list:
    """Loss over compute of all runs, and the fitted law of their ends."""
    import numpy as np

    power, lines, x_X = each.floor(), [], fractions()
    for loss_SxX, flops, colour in zip(each.loss_MxSxX, each.flops_M, colours, strict=True):
        for loss_X in loss_SxX:
            (line,) = axes.plot(x_X * flops, loss_X, color=colour, lw=0.8, alpha=0.8)
        lines.append(line)
        axes.plot([flops] * len(loss_SxX), loss_SxX[:, -1], ls="", marker="o", ms=4, color=colour, mec="white", mew=0.5)
    flops_G = np.geomspace(each.flops_M.min() / 1.5, each.flops_M.max() * 1.5, 60)
    axes.plot(flops_G, power.predict(flops_G), color="black", lw=1.2, ls=(0, (4, 2)))
    axes.set_xscale("log")
    axes.set_xlabel("training compute C = 6ND (FLOPs)")
    axes.set_ylabel("validation loss (nats per byte)")
    axes.set_title("Compute-optimal runs, all seeds")
    said = f"dashed: {power.floor:.2f} + a C$^{{-{power.exponent:.2f}}}$"
    axes.text(0.96, 0.95, said, transform=axes.transAxes, fontsize=8, color="0.2", ha="right", va="top")
    return lines


def _draw_collapse(axes: Any, found: Collapse, colours: list, title: str) -> None:
    x_X = fractions()
    for curves_SxX, colour in zip(found.curves_MxSxX, colours, strict=True):
        for curve_X in curves_SxX:
            axes.plot(x_X, curve_X, color=colour, lw=0.7, alpha=0.8)
    axes.set_xlabel("fraction of the training's compute")
    axes.set_title(title)


def _draw_tightness(axes: Any, families: Mapping[str, Family]) -> tuple[list, list]:
    from matplotlib.lines import Line2D

    x_X = fractions()
    axes.axvspan(*WINDOW, color="0.95", lw=0)
    looks = {"decayed": "#1f5a8f", "constant": "#c2571a"}
    for name, colour in looks.items():
        found = families[name].tightest()[0]
        axes.plot(x_X[:-1], 100 * found.deviation_X[:-1], color=colour, lw=1.6)
        axes.plot(x_X[:-1], 100 * found.noise_X[:-1], color=colour, lw=1.1, ls=(0, (4, 2)))
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("fraction of the training's compute")
    axes.set_ylabel("relative standard deviation (%)")
    axes.set_title("Curves against seeds")
    handles = [Line2D([], [], color=colour, lw=1.6) for colour in looks.values()]
    handles += [Line2D([], [], color="0.3", lw=1.6), Line2D([], [], color="0.3", lw=1.1, ls=(0, (4, 2)))]
    return handles, ["rate falls to zero", "constant rate", "deviation of normalised curves", "noise: seeds"]


PAPER = Paper(
    name="qiu2025",
    title="Loss curves of compute-optimal models collapse onto one",
    source=QIU,
    claims=CLAIMS,
    takes={
        "smoke": "half a minute",
        "laptop": "about 5 minutes on 2 CPU cores, with runs that tissue2024 and caballero2023 use too",
        "paper": "for a GPU; not yet run",
    },
    run=run,
)
