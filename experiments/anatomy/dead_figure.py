"""The figure of `dead`: dead and active units over training, their fates, and what kills them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.anatomy.factorial import ACTIVATIONS, FACTORS, Levels

if TYPE_CHECKING:
    import pandas

FEW = 3  # dead units of all seeds together that a share in the figure needs


def draw(lines: pandas.DataFrame, cells: pandas.DataFrame, levels: Levels, path_stem: Path) -> list[Path]:
    """lines: a line per member, step and block; cells: a line per training of the factorial. Writes PNG and SVG."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from analysis import plots

    with mpl.rc_context(plots.STYLE):
        figure = Figure(figsize=(12, 7), layout="constrained")
        rows: Any = figure.subfigures(2, 1)
        above, below = rows
        dead, active, blocks = above.subplots(1, 3)
        fate, causes = below.subplots(1, 2, width_ratios=(1, 2))
        styles = plots.size_styles(lines["width"].unique())
        _over_steps(dead, lines, "dead", styles)
        dead.set_ylabel("dead units (% of all)")
        dead.set_title("Dead: active on no token (thin: seeds)")
        dead.legend(loc="best")
        _over_steps(active, lines, "active", styles)
        active.set_ylabel("of all units, active on a token (%)")
        active.set_title("Lazy: few are active at a time")
        _by_block(blocks, lines, styles)
        blocks.legend(*dead.get_legend_handles_labels(), loc="best")
        _fate(fate, lines, styles)
        if fate.get_legend_handles_labels()[0]:
            fate.legend(loc="best")
        _causes(causes, cells, levels)
        return plots.save(figure, path_stem)


def _over_steps(axes: Any, lines: Any, column: str, styles: Any) -> None:
    """Thin: seeds."""
    for width, rows in lines.groupby("width"):
        colour, marker = styles[width]
        by_seed = 100 * rows.pivot_table(index="step", columns="seed", values=column)
        axes.plot(by_seed.index, by_seed, color=colour, lw=0.6, alpha=0.5)
        axes.plot(by_seed.index, by_seed.mean(axis=1), color=colour, marker=marker, ms=4.5, mec="white", mew=0.5,
                  lw=1.6, label=f"width {width}")  # fmt: skip
    _from_0(axes)
    axes.xaxis.set_major_locator(_few_ticks())
    axes.set_xlabel("training step")


def _from_0(axes: Any) -> None:
    """With room for markers at 0, and for an axis where all are."""
    top = max(axes.get_ylim()[1], 1.0)
    axes.set_ylim(-0.03 * top, top)


def _few_ticks() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(5, integer=True)


def _by_block(axes: Any, lines: Any, styles: Any) -> None:
    last = lines[lines["step"] == lines["step"].max()]
    blocks = sorted(last["block"].unique())
    for i, (width, rows) in enumerate(last.groupby("width")):
        colour, marker = styles[width]
        across = rows["block"] + 1 + 0.2 * (i - (len(styles) - 1) / 2)
        axes.plot(across, 100 * rows["dead"], marker, color=colour, ms=5.5, mec="white", mew=0.5)
    axes.set_xticks([block + 1 for block in blocks])
    axes.set_xlim(0.5, len(blocks) + 0.5)
    _from_0(axes)
    axes.set_xlabel("block")
    axes.set_ylabel("dead units (% of the block's)")
    axes.set_title("At the end, by block (one point per seed)")


def _fate(axes: Any, lines: Any, styles: Any) -> None:
    """Of the units dead at a step, alive at the end; all seeds together."""
    end = lines["step"].max()
    for width, rows in lines[lines["step"] < end].groupby("width"):
        colour, marker = styles[width]
        both = rows.groupby("step")[["revived", "dead units"]].sum()
        both = both[both["dead units"] >= FEW]
        share = 100 * both["revived"] / both["dead units"]
        if len(both):
            axes.plot(
                both.index, share, color=colour, marker=marker, ms=5, mec="white", mew=0.5, label=f"width {width}"
            )
    axes.set_xlim(0, end)
    axes.set_ylim(-3, 103)
    axes.xaxis.set_major_locator(_few_ticks())
    axes.set_xlabel("training step at which they are dead")
    axes.set_ylabel("of them alive at the end (%)")
    axes.set_title("Dead units that come back")


def _causes(axes: Any, cells: Any, levels: Levels) -> None:
    """A group per combination of factors, a column per activation, a point per seed; a dash at the mean."""
    import numpy as np

    colours = {"relu": ("#1f5a8f", "o"), "gelu": ("#b5531c", "s"), "swiglu": ("#2c7a4b", "^")}
    groups = [(shift, rate, decay) for shift in levels.shift for rate in levels.rate for decay in levels.decay]
    for j, (kind, words) in enumerate(ACTIVATIONS.items()):
        colour, marker = colours[kind]
        rows = cells[cells["activation"] == kind].set_index(list(FACTORS))
        label = f"{words}: dead" if kind == "relu" else f"{words}: idle, adds < .001 of the stream"
        for i, group in enumerate(groups):
            if group not in rows.index:
                continue
            share = 100 * rows.loc[[group], "silent" if kind == "relu" else "idle"].to_numpy()
            at = i + 0.25 * (j - 1)
            axes.plot(np.full(len(share), at), share, marker, color=colour, ms=4.5, mec="white", mew=0.4, label=label)
            axes.plot([at - 0.1, at + 0.1], [share.mean()] * 2, color=colour, lw=1.6)
            label = None
    words = [f"bias {shift:g}\nrate {rate:g}\ndecay {decay:g}" for shift, rate, decay in groups]
    axes.set_xticks(range(len(groups)), words, fontsize=7.5)
    axes.set_ylim(-3, 103)
    axes.set_ylabel("units (%)")
    axes.set_title("What kills: initial bias, learning rate, weight decay (one point per seed)")
    axes.legend(loc="upper left")
