"""Hoffmann et al. 2022 (Chinchilla): the compute-optimal size by three approaches, on our sweep and on their points.

Our sweep (isoflop.py) is small, so its claims are of a toy analogue. Its statistical error comes from resampling
trunks; its systematic error from repeating everything at half and twice the learning rate (that widens the intervals
that the claims are held against) and with N counted without embeddings (shown beside them: their N is all parameters).
The published points are the paper's own, read off its figure 4 by Besiroglu et al. 2024.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from experiments.claims import Claim, Measured
from experiments.registry import Job, Outcome, Paper
from experiments.scaling import isoflop
from experiments.scaling.isoflop import CONVENTIONS, LEVEL, VARIED, Exponents, Size, Table

if TYPE_CHECKING:
    from pathlib import Path

    import numpy

    from analysis.fit import Fit

HOFFMANN = "Hoffmann et al. 2022"
GOPHER = 5.76e23  # FLOPs, the budget for which they recommend a model of 70B parameters and 1.4T tokens


def _claim(id: str, row: int | None, statement: str, source: str, expected: float, margin: float, scope: Any) -> Claim:
    return Claim(id, statement, source, expected, margin, unit="1", scope=scope, level=LEVEL, row=row)


# On our sweep the margins are the demo's. On the published points they are those of the digits that are printed, twice
# over; the intervals that the paper gives for a are a tenth of that.
CLAIMS = (
    _claim("a_envelope", 3, "our sweep, approach 1: compute-optimal size grows as C^a", f"{HOFFMANN}, table 2",
           0.50, 0.1, "toy_analogue"),
    _claim("a_isoflop", 3, "our sweep, approach 2: compute-optimal size grows as C^a", f"{HOFFMANN}, table 2",
           0.49, 0.1, "toy_analogue"),
    _claim("a_parametric", 3, "our sweep, approach 3: compute-optimal size grows as C^a", f"{HOFFMANN}, table 2",
           0.46, 0.1, "toy_analogue"),
    _claim("agreement", 3, "our sweep: a of approach 2 minus the a that the fitted law implies", f"{HOFFMANN}, table 2",
           0.0, 0.05, "toy_analogue"),
    _claim("rate", None, "our sweep: log2 of the best learning rate over the rule's, smallest and largest size", "ours",
           0.0, 1.0, "same_regime"),
    _claim("points_a", 3, "their points, approach 3: compute-optimal size grows as C^a", f"{HOFFMANN}, table 2",
           0.46, 0.02, "same_regime"),
    _claim("points_alpha", 2, "their points: loss falls with size as N^-alpha above a floor",
           f"{HOFFMANN}, appendix D.3", 0.34, 0.02, "same_regime"),
    _claim("points_beta", 2, "their points: loss falls with data as D^-beta above a floor",
           f"{HOFFMANN}, appendix D.3", 0.28, 0.02, "same_regime"),
    _claim("points_floor", 2, "their points: the floor E in nats per token", f"{HOFFMANN}, appendix D.3",
           1.69, 0.05, "same_regime"),
    _claim("points_tokens", 3, "their points: best tokens per parameter at Gopher's compute",
           f"{HOFFMANN}, table 1 (Chinchilla: 1.4T tokens, 70B parameters)", 20.0, 10.0, "same_regime"),
)  # fmt: skip
APPROACHES = {"envelope": "1, envelope", "parabola": "2, parabola", "akima": "2, Akima",
              "parametric": "3, law", "projection": "3, projection"}  # fmt: skip
PRINTED = {"envelope": 0.50, "parabola": 0.49, "parametric": 0.46}  # their table 2


# --- our sweep -----------------------------------------------------------------------------------------------------


def configs(size: Size) -> list:
    """The sweep with all its seeds, once more at each of the other rates, and the scan of rates."""
    varied = [config for factor in VARIED for config in isoflop.grid(size, factor=factor)]
    return [*isoflop.grid(size, seeds=range(size.seeds)), *varied, *isoflop.scan_configs(size)]


def of_rate(runs: Table, factor: float) -> Table:
    """The runs at `factor` times the rule's rate, those of the scan at its own budget among them."""
    import numpy as np

    return runs[np.isclose(runs["factor"], factor)].reset_index(drop=True)


@dataclass(frozen=True)
class Sweep:
    """What the sweep says. central: at the rule's rate, all parameters counted. every: one line per rate factor, way of
    counting and approach.
    """

    runs: Table
    noise: Table
    central: Exponents
    every: Table


def look(runs: Table, size: Size) -> Sweep:
    """Exponents by every approach, at each rate and with each way of counting N."""
    import pandas

    main = of_rate(runs, 1.0)
    noise, found, tables = isoflop.scatter(main), {}, []
    for factor in (1.0, *VARIED):
        for counting, column in CONVENTIONS.items():
            # What is only varied needs no fine interval.
            bootstraps = size.bootstraps if (factor, column) == (1.0, "params_total") else size.bootstraps // 5
            found[factor, column] = isoflop.exponents(of_rate(runs, factor), size, noise, column, bootstraps)
            tables.append(found[factor, column].table.assign(factor=factor, counting=counting))
    return Sweep(main, noise, found[1.0, "params_total"], pandas.concat(tables, ignore_index=True))


def spread(every: Table, approach: str, *, conventions: bool) -> tuple[float, float]:
    """Lowest and highest a of an approach over the rates, and, with `conventions`, over ways of counting N as well."""
    mine = every[every["approach"] == approach]
    if not conventions:
        mine = mine[mine["counting"] == next(iter(CONVENTIONS))]
    return float(mine["a"].min()), float(mine["a"].max())


def exponent(sweep: Sweep, approach: str) -> Measured:
    """a with the statistical interval at the rule's rate, widened in quadrature to reach the a of the other rates."""
    row = sweep.central.table.set_index("approach").loc[approach]
    least, most = spread(sweep.every, approach, conventions=False)
    low = row["a"] - math.hypot(row["a"] - row["a_low"], row["a"] - least)
    high = row["a"] + math.hypot(row["a_high"] - row["a"], most - row["a"])
    mine = sweep.every[(sweep.every["approach"] == approach) & (sweep.every["counting"] == next(iter(CONVENTIONS)))]
    lost = ", ".join(f"x {factor:g}" for factor in mine.loc[mine["a"].isna(), "factor"])
    remark = row["remark"] or (f"it gives no a at the rates {lost}: the systematic error is not known" if lost else "")
    return Measured(float(row["a"]), float(low), float(high), sweep.runs["train.seed"].nunique(), remark)


def agreement(sweep: Sweep) -> Measured:
    """a of the parabolas minus that of the law. Both come from the same runs; their errors are taken as independent,
    which makes the interval rather too wide.
    """
    rows = sweep.central.table.set_index("approach")
    isoflop_, law = rows.loc["parabola"], rows.loc["parametric"]
    value = float(isoflop_["a"] - law["a"])
    low = value - math.hypot(isoflop_["a"] - isoflop_["a_low"], law["a_high"] - law["a"])
    high = value + math.hypot(isoflop_["a_high"] - isoflop_["a"], law["a"] - law["a_low"])
    remark = isoflop_["remark"] or law["remark"]
    return Measured(value, float(low), float(high), sweep.runs["train.seed"].nunique(), remark)


def best_factors(runs: Table, size: Size, noise: Table) -> Table:
    """One line for the smallest and the largest size: log2 of the best rate over the rule's, its interval, `held`.

    The interval is that of losses redrawn with the scatter between seeds; held: the scan has higher rates and lower
    ones.
    """
    import numpy as np
    import pandas

    from experiments.scaling.mup import best_rate

    (small, _, last), (large, first, _), rows = size.models[0], size.models[-1], []
    for width, budget in ((small, last), (large, first)):
        mine = runs[(runs["model.d_model"] == width) & (runs["budget"] == budget) & (runs["train.seed"] == 0)]
        mine, spread_of = mine.sort_values("factor"), float(noise.get(budget, noise.mean()))
        x, loss = np.log2(mine["factor"].to_numpy(float)), mine["loss"].to_numpy(float)
        best, held = best_rate(x, loss)
        noise_BxK = np.random.default_rng(0).standard_normal((size.bootstraps, len(x)))
        drawn_B = [best_rate(x, loss * np.exp(spread_of * noise_K))[0] for noise_K in noise_BxK]
        low, high = np.quantile(drawn_B, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        rows.append((width, best, float(low), float(high), held))
    return pandas.DataFrame(rows, columns=["width", "best", "low", "high", "held"])


def rate_rule(best: Table) -> Measured:
    """The worse of the two sizes, with an interval that holds both of theirs."""
    worse = best.loc[best["best"].abs().idxmax()]
    outside = ", ".join(str(width) for width in best.loc[~best["held"], "width"])
    remark = f"the best rate at width {outside} is not inside the scan" if outside else ""
    return Measured(float(worse["best"]), float(best["low"].min()), float(best["high"].max()), 1, remark)


# --- their points --------------------------------------------------------------------------------------------------


def published(size: Size) -> Fit:
    """Approach 3, as the paper does it, on the paper's own points."""
    from analysis.fit import fit
    from analysis.laws import CHINCHILLA
    from experiments.chinchilla_points import points

    table = points()
    at = {"N": table["N"], "D": table["D"]}
    return fit(CHINCHILLA, at, table["loss"], delta=1e-3, starts=size.starts, bootstraps=size.bootstraps, level=LEVEL)


def of_points(law: Fit) -> dict[str, Measured]:
    """Each claim about the published points; `seeds` is 1, as no size was trained twice with another seed."""
    import numpy as np

    from analysis.fit import with_interval
    from analysis.laws import frontier

    def ratio(parameters: Mapping) -> numpy.ndarray:
        n, d, _ = frontier(parameters, np.asarray([GOPHER]))
        return d / n

    estimates = {"a": law.derived["a"], **law.parameters}
    names = {"points_a": "a", "points_alpha": "alpha", "points_beta": "beta", "points_floor": "E"}
    found = {
        claim: Measured(estimates[name].value, *estimates[name].interval, 1, estimates[name].remark)
        for claim, name in names.items()
    }
    value, low, high = (float(number[0]) for number in with_interval(law, ratio))
    return found | {"points_tokens": Measured(value, low, high, 1)}


# --- from the runs to the figure -----------------------------------------------------------------------------------


def run(job: Job) -> Outcome:
    """Sweeps, fits by every approach, refits the published points, draws."""
    from analysis.fit import to_json

    size = isoflop.SIZES[job.scale]
    runs = isoflop.train(job, configs(size))
    sweep, points = look(runs, size), published(size)
    best = best_factors(runs, size, sweep.noise)
    law = {} if sweep.central.law is None else {"fit": to_json(sweep.central.law)}
    return Outcome(
        measured={
            "a_envelope": exponent(sweep, "envelope"),
            "a_isoflop": exponent(sweep, "parabola"),
            "a_parametric": exponent(sweep, "parametric"),
            "agreement": agreement(sweep),
            "rate": rate_rule(best),
            **of_points(points),
        },
        summary=runs.reindex(columns=isoflop.SUMMARY),
        tables=(
            ("Exponents by approach, way of counting N, and rate over the rule's", exponent_table(sweep.every)),
            (f"Errors of a: {LEVEL:.0%} interval over trunks; range over rates; over rates and ways of counting N",
             error_table(sweep)),
            ("Best learning rate over the rule's, in a scan of five rates", rate_table(best)),
            ("Scatter of the loss between seeds, by budget", scatter_table(sweep.noise, size)),
        ),
        figures=tuple(draw(sweep, job.figure)),
        numbers={**law, "points": to_json(points), "exponents": sweep.every.to_dict("records")},
        seconds_training=sum(runs["wall_seconds"]),
        device=runs["device"].iloc[0],
        corpus_sha256=runs["corpus_sha256"].iloc[0],
    )  # fmt: skip


def _cell(row: Any, name: str) -> str:
    """ "0.52 (0.48 to 0.57)", or a dash."""
    value, low, high = (float(getattr(row, name + end)) for end in ("", "_low", "_high"))
    if not math.isfinite(value):
        return "–"
    return f"{value:.3g}" + (f" ({low:.3g} to {high:.3g})" if math.isfinite(low) else "")


def exponent_table(every: Table) -> Table:
    """What each approach gives, as text."""
    import pandas

    return pandas.DataFrame(
        {
            "approach": APPROACHES[row.approach],
            "N counts": row.counting,
            "rate": f"x {row.factor:g}",
            "a": _cell(row, "a"),
            "b": _cell(row, "b"),
            "tokens per parameter": _cell(row, "tokens_per_parameter"),
            "bias of a": f"{row.bias:+.3f}" if math.isfinite(row.bias) else "–",
            "remark": row.remark or row.refused,
        }
        for row in every.itertuples()
    )


def error_table(sweep: Sweep) -> Table:
    """Statistical beside systematic errors, as text."""
    import pandas

    rows = sweep.central.table.set_index("approach")
    words = []
    for name, label in APPROACHES.items():
        by_rate, by_all = (spread(sweep.every, name, conventions=both) for both in (False, True))
        words.append({
            "approach": label,
            "a (statistical)": _cell(rows.loc[name], "a"),
            "rates": f"{by_rate[0]:.3g} to {by_rate[1]:.3g}",
            "rates and counting": f"{by_all[0]:.3g} to {by_all[1]:.3g}",
        })  # fmt: skip
    return pandas.DataFrame(words)


def rate_table(best: Table) -> Table:
    """The scan's outcome, as text."""
    import pandas

    return pandas.DataFrame(
        {"width": row.width, "log2(best / rule)": f"{row.best:+.2f} ({row.low:+.2f} to {row.high:+.2f})",
         "inside the scan": "yes" if row.held else "no"}
        for row in best.itertuples()
    )  # fmt: skip


def scatter_table(noise: Table, size: Size) -> Table:
    """Standard deviations of the log loss, as text."""
    import pandas

    return pandas.DataFrame(
        {"budget (FLOPs)": f"{size.budgets[k]:.3g}", "scatter": f"{value:.2%}"} for k, value in noise.items()
    )


# --- the figure ----------------------------------------------------------------------------------------------------


def draw(sweep: Sweep, path_stem: Path) -> list[Path]:
    """IsoFLOP curves, the best N and D over compute, exponents as a forest plot; writes PNG and SVG."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from analysis import plots

    with mpl.rc_context(plots.STYLE):
        figure = Figure(figsize=(13.5, 4.9), layout="constrained")
        curves, optima, forest = figure.subplots(1, 3, width_ratios=(1.15, 1, 1.15))
        _draw_curves(curves, sweep)
        _draw_optima(optima, sweep)
        _draw_forest(forest, sweep)
        return plots.save(figure, path_stem)


def _draw_curves(axes: Any, sweep: Sweep) -> None:
    """Losses over N at each budget, all seeds, with the parabola through them and both minima."""
    import numpy as np

    from analysis import plots

    runs, optima = sweep.runs, sweep.central.optima
    styles = plots.size_styles(sorted(set(runs["budget"])))
    for budget, (colour, marker) in styles.items():
        mine = runs[runs["budget"] == budget]
        n, loss = mine["N"].to_numpy(float), mine["loss"].to_numpy(float)
        axes.plot(n, loss, ls="", marker=marker, color=colour, ms=5, mec="white", mew=0.5,
                  label=f"C = {mine['C'].median():.2g}")  # fmt: skip
        middle = np.log(n).mean()
        parabola = np.polyfit(np.log(n) - middle, loss, 2)
        grid_G = np.geomspace(n.min(), n.max(), 80)
        axes.plot(grid_G, np.polyval(parabola, np.log(grid_G) - middle), color=colour, lw=1.1)
        for name, look in (("parabola", {"marker": "v", "mfc": "white"}), ("akima", {"marker": "o", "mfc": "none"})):
            there = optima[name]
            near = there.loc[np.abs(np.log(there["C"] / mine["C"].median())) < 0.1, "N"]
            height = np.polyval(parabola, np.log(near) - middle)
            axes.plot(near, height, ls="", mec=colour, ms=8, mew=1.3, zorder=5, **look)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: plots.short(value))
    axes.set_xlabel("parameters N (all)")
    axes.set_ylabel("validation loss (nats per byte)")
    axes.set_title("Loss at equal compute")
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom, top + 0.22 * (top - bottom))  # room for the legend
    axes.legend(title="FLOPs; minimum: ▽ parabola, ○ Akima", ncols=2, loc="upper center")


def _draw_optima(axes: Any, sweep: Sweep) -> None:
    """Best N and D over compute: of the parabolas and Akima's interpolation, and of the law with its band."""
    import numpy as np
    from matplotlib.ticker import NullFormatter

    from analysis.fit import with_interval
    from analysis.laws import frontier

    rows = sweep.central.table.set_index("approach")
    reach = np.geomspace(sweep.runs["C"].min() / 1.5, sweep.runs["C"].max() * 1.5, 60)
    for i, (symbol, colour, power) in enumerate((("N", "#1f5a8f", "a"), ("D", "#c2571a", "b"))):
        law = sweep.central.law
        if law is not None:
            line, low, high = with_interval(law, lambda p, i=i: frontier(p, reach)[i])
            axes.fill_between(reach, low, high, color=colour, alpha=0.2, lw=0)
            axes.plot(reach, line, color=colour, lw=1.5, label=f"{symbol}, law: C^{law.derived[power].value:.2f}")
        for name, marker in (("parabola", "v"), ("akima", "o")):
            there = sweep.central.optima[name]
            label = f"{symbol}, {APPROACHES[name][3:]}: C^{rows.loc[name, power]:.2f}"
            axes.plot(there["C"], there[symbol], ls="", marker=marker, color=colour, ms=6, mfc="white", mew=1.3,
                      label=label)  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("training compute C = 6ND (FLOPs)")
    axes.set_ylabel("parameters N, tokens D")
    axes.set_title("Compute-optimal size and data")
    axes.legend(fontsize=7.5)


def _draw_forest(axes: Any, sweep: Sweep) -> None:
    """a by approach: statistical interval, range over rates, range over rates and ways of counting; the paper's own."""
    from matplotlib.lines import Line2D

    rows = sweep.central.table.set_index("approach")
    for y, name in enumerate(reversed(APPROACHES)):
        row = rows.loc[name]
        for both, colour, shift in ((True, "0.75", -0.22), (False, "#7fa7c9", -0.22)):
            low, high = spread(sweep.every, name, conventions=both)
            axes.plot([low, high], [y + shift] * 2, color=colour, lw=5 if both else 3, solid_capstyle="butt")
        axes.errorbar(row["a"], y, xerr=[[row["a"] - row["a_low"]], [row["a_high"] - row["a"]]], fmt="o",
                      color="#1f5a8f", ms=6, elinewidth=1.6, capsize=3)  # fmt: skip
        if name in PRINTED:
            axes.plot(PRINTED[name], y + 0.22, marker="D", color="#c2571a", ms=6, ls="")
    axes.set_yticks(range(len(APPROACHES)), list(reversed(APPROACHES.values())))
    axes.set_ylim(-0.6, len(APPROACHES) - 0.4)
    axes.set_xlabel("a, in best N ~ C^a")
    axes.set_title("Exponent by approach")
    handles = [
        Line2D([], [], color="#1f5a8f", marker="o", lw=1.6),
        Line2D([], [], color="#7fa7c9", lw=3),
        Line2D([], [], color="0.75", lw=5),
        Line2D([], [], color="#c2571a", marker="D", ls=""),
    ]
    names = [f"ours, {LEVEL:.0%} interval over trunks", "ours, rate x ½ to x 2", "and N without embeddings", HOFFMANN]
    axes.legend(handles, names, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, fontsize=7.5)


PAPER = Paper(
    name="hoffmann2022",
    title="Chinchilla: size and data grow alike with compute, by three approaches",
    source=HOFFMANN,
    claims=CLAIMS,
    takes={
        "smoke": "half a minute",
        "laptop": "about 8 minutes on 2 CPU cores",
        "paper": "for a GPU; not yet run",
    },
    run=run,
)
