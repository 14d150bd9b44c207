"""Figures: one look, readable in grey, the same bytes for the same table. matplotlib is imported when one is drawn."""

import html
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.fit import Fit, predict, with_interval
from analysis.laws import frontier

STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "0.35",
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.91",
    "grid.linewidth": 0.7,
    "xtick.color": "0.35",
    "ytick.color": "0.35",
    "xtick.labelcolor": "0.15",
    "ytick.labelcolor": "0.15",
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.hashsalt": "jaxgpt",  # element ids would be random otherwise
}
MARKERS = "osD^vPX<>hp*"
POINTS = "the points as JSON"  # holds the place in the SVG's description


def size_styles(sizes) -> dict:
    """{N: (colour, marker)}, small models light and large ones dark, so that the order survives in grey."""
    from matplotlib import colormaps

    shade = np.linspace(0.80, 0.08, max(len(sizes), 2))
    return {n: (colormaps["viridis"](shade[i]), MARKERS[i % len(MARKERS)]) for i, n in enumerate(sorted(sizes))}


def short(count: float) -> str:
    """3 significant digits with a suffix: 12300 -> "12.3k"."""
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= 0.9995 * limit:
            return f"{count / limit:.3g}{suffix}"
    return f"{count:.3g}"


def scaling_figure(
    runs: pd.DataFrame, curves: pd.DataFrame, fit: Fit, path_stem, *, counting: str = "all parameters"
) -> list[Path]:
    """Loss against compute with the fitted frontier, and loss against tokens per size; writes PNG and SVG.

    runs      one row per run: run_id, N (parameters), D (tokens), C = 6ND (FLOPs), final_loss (nats per token),
              final_loss_sem
    curves    logged steps: run_id, C, validation_loss (NaN where not evaluated)
    fit       a Chinchilla fit of final_loss on N and D
    counting  which parameters N counts, in words
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    seen = curves.dropna(subset=["validation_loss"]).sort_values("C")
    styles = size_styles(runs["N"].unique())
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10.5, 5.0), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.5, 1), sharey=True)
        _draw_compute(left, runs, seen, fit, styles)
        left.set_xlabel(f"training compute C = 6ND (FLOPs; N counts {counting})")
        _draw_tokens(right, runs, fit, styles)
        right.tick_params(axis="y", labelleft=True)
        return save(figure, path_stem)


def _draw_compute(axes, runs, seen, fit, styles) -> None:
    """Curves and final points of all runs above the frontier; the legend stands below both panels."""
    flops_G = np.geomspace(runs["C"].min() / 1.5, runs["C"].max() * 1.5, 100)
    loss_G, low_G, high_G = with_interval(fit, lambda parameters: frontier(parameters, flops_G)[2])
    best, worst = runs["final_loss"].min(), runs["final_loss"].max()
    bottom, top = 0.96 * max(min(best, loss_G[-1]), 0.8 * best), 1.05 * worst * (worst / best) ** 0.35
    shown = seen[seen["validation_loss"] < top]
    first = min(runs["C"].min() / 1.5, shown["C"].min() if len(shown) else np.inf)

    for run in runs.itertuples():
        curve = seen[seen["run_id"] == run.run_id]
        colour, _ = styles[run.N]
        axes.plot(curve["C"], curve["validation_loss"], color=colour, lw=0.8, alpha=0.7)
    band = axes.fill_between(flops_G, low_G, high_G, color="0.55", alpha=0.35, lw=0, zorder=2)
    (line,) = axes.plot(flops_G, loss_G, color="black", lw=1.8, ls=(0, (5, 1.5)), zorder=3)
    points = [_points(axes, "C", runs, n, style) for n, style in styles.items()]
    axes.set_xscale("log")
    axes.set_xlim(first / 1.2, flops_G[-1])
    _loss_axis(axes, bottom, top)
    axes.set_ylabel("validation loss (nats per token)")
    axes.set_title("Loss against compute: every run, and the best that the law allows")
    said = "thin lines: validation loss during training\nbars on the points: ± one standard error"
    axes.text(0.02, 0.03, said, transform=axes.transAxes, fontsize=7.5, color="0.3", linespacing=1.5)
    names = [f"compute-optimal frontier, {fit.level:.0%} interval", *(f"N = {short(n)}" for n in styles)]
    axes.figure.legend([(band, line), *points], names, loc="outside lower center", ncols=min(len(names), 7))


def _draw_tokens(axes, runs, fit, styles) -> None:
    tokens_G = np.geomspace(runs["D"].min() / 1.3, runs["D"].max() * 1.3, 100)
    for n, style in styles.items():
        loss_G, low_G, high_G = predict(fit, N=n, D=tokens_G)
        axes.fill_between(tokens_G, low_G, high_G, color=style[0], alpha=0.22, lw=0)
        axes.plot(tokens_G, loss_G, color=style[0], lw=1.2)
        _points(axes, "D", runs, n, style)
    axes.set_xscale("log")
    _count_axis(axes)
    axes.set_xlabel("training data D (tokens)")
    axes.set_title("Loss against data: the law at each size")
    axes.text(0.97, 0.97, _law_words(fit), transform=axes.transAxes, ha="right", va="top", fontsize=8, linespacing=1.6)


def _points(axes, column: str, runs, n, style):
    colour, marker = style
    mine = runs[runs["N"] == n]
    return axes.errorbar(
        mine[column], mine["final_loss"], mine["final_loss_sem"],
        fmt=marker, color=colour, mec="white", mew=0.6, ms=6.5, ecolor="0.2", elinewidth=1, zorder=4,
    )  # fmt: skip


def _law_words(fit: Fit) -> str:
    """The fitted law and its exponent a, as the figure's caption."""
    v, a = fit.best, fit.derived["a"]
    a_term, b_term = (
        f"{short(v[c])}\\,/\\,{n}^{{{v[e]:.2f}}}" for c, n, e in (("A", "N", "alpha"), ("B", "D", "beta"))
    )
    law = f"$L = {v['E']:.3g} + {a_term} + {b_term}$"
    lines = [law, f"best $N \\propto C^{{\\,a}}$,  a = {a.value:.2f} [{a.interval[0]:.2f}, {a.interval[1]:.2f}]"]
    unsure = [name for name, e in {**fit.parameters, **fit.derived}.items() if not e.identified]
    return "\n".join(lines + [f"not identified: {', '.join(unsure)}"] * bool(unsure))


def _count_axis(axes) -> None:
    """Tick labels such as 500k and 2M on a logarithmic x axis."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda value, _: short(value))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _loss_axis(axes, low: float, high: float) -> None:
    """Logarithmic, with ticks at round losses written as plain numbers (powers of ten would leave none)."""
    from matplotlib.ticker import FixedLocator, NullLocator

    step = next(s for s in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10) if (high - low) / s <= 9)
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    ticks = np.arange(np.ceil(low / step), high / step) * step
    axes.yaxis.set_major_locator(FixedLocator(ticks.tolist()))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.10g}")


def save(figure, path_stem) -> list[Path]:
    """Write PNG and SVG beside each other, each under a temporary name first; returns their paths.

    The SVG carries its points as numbers (analysis.hover), which `jaxgpt report` shows under the mouse.
    """
    from analysis.hover import described

    stem = Path(path_stem)
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = []
    for suffix, metadata in (
        (".png", {"Software": None}),
        (".svg", {"Date": None, "Creator": None, "Description": POINTS}),
    ):
        path = stem.with_name(stem.name + suffix)
        partial = path.with_name(path.name + ".partial")
        figure.savefig(partial, format=suffix[1:], dpi=200, metadata=metadata)
        if suffix == ".svg":  # where points lie is known only now: drawing lays the axes out
            points = json.dumps(described(figure), separators=(",", ":"), allow_nan=False)
            drawn = partial.read_text(encoding="utf-8")
            partial.write_text(drawn.replace(POINTS, html.escape(points, quote=False), 1), encoding="utf-8")
        partial.replace(path)
        paths.append(path)
    return paths
