"""Figures: one look, readable in grey, the same bytes for the same table. matplotlib is imported when one is drawn."""

from pathlib import Path

import numpy as np
import pandas as pd

from analysis.fit import Fit, predict, with_interval
from analysis.laws import frontier

STYLE = {
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
    "svg.fonttype": "none",
}
MARKERS = "osD^vPX<>hp*"


def size_styles(sizes) -> dict:
    """{N: (colour, marker)}, small models light and large ones dark, so that the order survives in grey."""
    from matplotlib import colormaps

    shade = np.linspace(0.80, 0.08, max(len(sizes), 2))
    return {
        n: (colormaps["viridis"](shade[i]), MARKERS[i % len(MARKERS)]) for i, n in enumerate(sorted(sizes))
    }


def short(count: float) -> str:
    """3 significant digits with a suffix: 12300 -> "12.3k"."""
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= 0.9995 * limit:
            return f"{count / limit:.3g}{suffix}"
    return f"{count:.3g}"


def scaling_figure(runs: pd.DataFrame, curves: pd.DataFrame, fit: Fit, path_stem) -> list[Path]:
    """Loss against compute with the fitted frontier, and loss against tokens per size; writes PNG and SVG.

    runs    one row per run: run_id, params_non_embedding (N), tokens (D), flops_6nd (C), final_loss (nats per token),
            final_loss_sem
    curves  logged steps: run_id, flops_6nd, validation_loss (NaN where not evaluated)
    fit     a Chinchilla fit of final_loss on N and D
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10.5, 4.6), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.45, 1), sharey=True)
        styles = size_styles(runs["params_non_embedding"].unique())
        low, high = _loss_range(runs, curves)
        _draw_compute(left, runs, curves, fit, styles, (low, high))
        _draw_tokens(right, runs, fit, styles)
        _loss_axis(left, low, high)
        right.tick_params(axis="y", labelleft=True)
        return _save(figure, path_stem)


def _loss_range(runs, curves) -> tuple[float, float]:
    """From just under the lowest loss to where most curves have left the steep start behind."""
    losses = curves["validation_loss"].dropna()
    lowest = min(runs["final_loss"].min(), losses.min() if len(losses) else np.inf)
    highest = runs["final_loss"].max()
    return 0.95 * lowest, highest * (highest / lowest) ** 0.45 * 1.03


def _draw_compute(axes, runs, curves, fit, styles, loss_range) -> None:
    seen = curves.dropna(subset=["validation_loss"]).sort_values("flops_6nd")
    for run in runs.itertuples():
        colour, _ = styles[run.params_non_embedding]
        curve = seen[seen["run_id"] == run.run_id]
        axes.plot(curve["flops_6nd"], curve["validation_loss"], color=colour, lw=0.8, alpha=0.75)
    for n, (colour, marker) in styles.items():
        mine = runs[runs["params_non_embedding"] == n]
        axes.errorbar(
            mine["flops_6nd"], mine["final_loss"], mine["final_loss_sem"],
            fmt=marker, color=colour, mec="white", mew=0.7, ms=7, elinewidth=1, capsize=2, zorder=4, label=short(n),
        )  # fmt: skip
    flops_G = np.geomspace(runs["flops_6nd"].min() / 2, runs["flops_6nd"].max() * 2, 100)
    loss_G, low_G, high_G = with_interval(fit, lambda parameters: frontier(parameters, flops_G)[2])
    axes.fill_between(flops_G, low_G, high_G, color="0.55", alpha=0.35, lw=0, zorder=2)
    axes.plot(flops_G, loss_G, color="black", lw=1.8, ls=(0, (5, 1.5)), zorder=3)
    axes.set_xscale("log")
    axes.set_xlim(_compute_range(seen, runs, loss_range))
    axes.set_xlabel("training compute C = 6ND (FLOPs)")
    axes.set_ylabel("validation loss (nats per token)")
    axes.set_title("More compute, lower loss: every run and the best trade-off")


def _compute_range(seen, runs, loss_range) -> tuple[float, float]:
    """The part of the axis on which any curve is inside `loss_range`."""
    inside = seen.loc[seen["validation_loss"] < loss_range[1], "flops_6nd"]
    first = min(inside.min() if len(inside) else np.inf, runs["flops_6nd"].min() / 2)
    return first / 1.15, runs["flops_6nd"].max() * 2


def _draw_tokens(axes, runs, fit, styles) -> None:
    tokens_G = np.geomspace(runs["tokens"].min() / 1.4, runs["tokens"].max() * 1.4, 100)
    for n, (colour, marker) in styles.items():
        mine = runs[runs["params_non_embedding"] == n]
        loss_G, low_G, high_G = predict(fit, N=n, D=tokens_G)
        axes.fill_between(tokens_G, low_G, high_G, color=colour, alpha=0.22, lw=0)
        axes.plot(tokens_G, loss_G, color=colour, lw=1.2)
        axes.errorbar(
            mine["tokens"], mine["final_loss"], mine["final_loss_sem"],
            fmt=marker, color=colour, mec="white", mew=0.7, ms=7, elinewidth=1, capsize=2, zorder=4, label=short(n),
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel("training tokens D")
    axes.set_title("The fitted law at each model size")
