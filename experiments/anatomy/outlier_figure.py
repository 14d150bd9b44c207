"""The figure of `jaxgpt reproduce outliers`: streams, optimizers, ablations, lengths of vectors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from experiments.anatomy.outliers import Found

COLOURS = {"Adam": "#1f5a8f", "SGD": "#c0562b", "token table": "#1f5a8f", "output matrix": "#c0562b", "zero": "#333333",
           "mean": "#2a9d8f"}  # fmt: skip


def draw(found: Found, kurtoses: Any, path_stem: Path) -> list[Path]:
    """Writes PNG and SVG. kurtoses: of `outliers.kurtoses`, a row per model and checkpoint."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from analysis import plots

    with mpl.rc_context(plots.STYLE):
        figure = Figure(figsize=(14.5, 4.2), layout="constrained")
        panels = figure.subplots(1, 4, width_ratios=(1, 1.1, 0.9, 1))
        _draw_streams(panels[0], found.last)
        _draw_optimizers(panels[1], kurtoses)
        _draw_ablations(panels[2], found.ablations)
        _draw_lengths(panels[3], found.tokens)
        return plots.save(figure, path_stem)


def _draw_streams(axes: Any, last: Any) -> None:
    """Top over median by stream, a line per model."""
    from analysis import plots

    styles = plots.size_styles(last["width"].unique())
    for width, rows in last.groupby("width"):
        colour, marker = styles[width]
        by_model = rows.pivot_table(index="stream", columns="seed", values="ratio")
        axes.plot(by_model.index, by_model.to_numpy(), color=colour, lw=0.6, alpha=0.6)
        mean = by_model.mean(axis=1)
        axes.plot(by_model.index, mean, color=colour, marker=marker, lw=1.8, ms=5, label=f"width {width}")
    streams = sorted(last["stream"].unique())
    axes.set_xticks(streams, ["embedding", *(f"{i - 1}" for i in streams[1:])])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("stream behind block")
    axes.set_ylabel("top 3 |x| over median |x|")
    axes.set_title("Large values by layer")
    axes.legend()


def _draw_optimizers(axes: Any, kurtoses: Any) -> None:
    """Kurtosis against loss over training, of models of one width by each optimizer, and in a random basis."""
    both = kurtoses.loc[kurtoses["optimizer"] == "SGD", "width"]
    mine = kurtoses[kurtoses["width"].isin(both)].dropna().sort_values("step")
    for name, of_one in mine.groupby("optimizer"):
        for i, (_, run) in enumerate(of_one.groupby("seed")):
            label = (str(name), f"{name}, in a random basis") if i == 0 else (None, None)
            axes.plot(run["loss"], run["kurtosis"], "o-", color=COLOURS[name], lw=1, ms=3.5, label=label[0])
            axes.plot(run["loss"], run["turned"], "--", color=COLOURS[name], lw=0.8, alpha=0.6, label=label[1])
    axes.axhline(3, color="0.4", lw=1, ls=":", label="Gaussian")
    axes.invert_xaxis()
    axes.set_xlabel("held-out loss (nats per token), training to the right")
    axes.set_ylabel("kurtosis of stream vectors")
    axes.set_title(f"Who makes them: width {mine['width'].min()}")
    axes.legend()


def _draw_ablations(axes: Any, ablations: Any) -> None:
    """Nats added without one dimension, a point per model; pairs of a model are joined."""
    one = ablations[ablations["dimensions"] == 1]
    places = {("top", "zero"): 0, ("top", "mean"): 1, ("random", "zero"): 2, ("random", "mean"): 3}
    for choice in ("top", "random"):
        by_model = one[one["choice"] == choice].pivot_table(index=["width", "seed"], columns="value", values="nats")
        x = [places[choice, value] for value in ("zero", "mean")]
        axes.plot(x, by_model[["zero", "mean"]].to_numpy().T, color="0.75", lw=0.7, zorder=1)
        for value, at in zip(("zero", "mean"), x, strict=True):
            label = {"zero": "set to 0", "mean": "set to its mean"}[value] if choice == "top" else None
            axes.plot([at] * len(by_model), by_model[value], "o", color=COLOURS[value], mec="white", label=label)
    axes.axhline(0, color="0.4", lw=0.8)
    axes.set_xticks([0.5, 2.5], ["largest", "random other"])
    axes.set_xlim(-0.6, 3.6)
    axes.set_ylabel("loss added (nats per token)")
    axes.set_title("Without one dimension")
    axes.legend()


def _draw_lengths(axes: Any, tokens: Any) -> None:
    """Length of vectors against counts, for the widest model of the first seed; lengths over their median."""
    import numpy as np

    mine = tokens[(tokens["optimizer"] == "Adam") & (tokens["width"] == tokens["width"].max())]
    mine = mine[(mine["seed"] == mine["seed"].min()) & (mine["count"] > 0)]
    for matrix, rows in mine.groupby("matrix", sort=False):
        share = rows["length"] / np.median(rows["length"])
        axes.plot(rows["count"], share, "o", ms=3.5, color=COLOURS[matrix], mec="white", mew=0.3, label=matrix)
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("times that a token comes in the training text")
    axes.set_ylabel("length of its vector over the median")
    axes.set_title(f"Rare tokens: width {mine['width'].min()}, seed {mine['seed'].min()}")
    axes.legend()
