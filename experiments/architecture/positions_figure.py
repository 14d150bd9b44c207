"""The figure of `positions`: encodings as heat maps, what they are good for, and losses beyond the trained length."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.architecture import encodings
from experiments.architecture.positions import KINDS, ORDERS, TIMES

if TYPE_CHECKING:
    from experiments.architecture.positions import Beyond

COLOURS = {"sinusoidal": "#c0562b", "learned": "#8a4f9e", "rope": "#1f5a8f", "alibi": "#2a9d8f", "none": "0.35"}
MARKERS = dict(zip(KINDS, "os^Dv", strict=True))
SHADES = {"right": "#1f5a8f", "sine": "#9a7d0a", "wrong": "#c0562b"}  # of the encodings
ANSWERS = {"causal": "#1f5a8f", "bag": "#c0562b", "placed": "#2a9d8f"}  # of the models that are asked for an order


def draw(width: int, right: dict, longer: dict[str, Beyond], trained: int, path_stem: Path) -> list[Path]:
    """Heat maps of the right encoding and of the misprint, distances between encodings; answers to the question of
    order, loss by position, and loss of the same tokens; writes PNG and SVG.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from analysis import plots

    with mpl.rc_context(plots.STYLE):
        figure = Figure(figsize=(13.5, 8.2), layout="constrained")
        top, bottom = figure.subplots(2, 3)
        for axes, kind in zip(top[:2], ("right", "wrong"), strict=True):
            image = _draw_map(axes, kind, width)
        figure.colorbar(image, ax=list(top[:2]), shrink=0.9, pad=0.02)
        _draw_distances(top[2], width)
        _draw_answers(bottom[0], right)
        _draw_places(bottom[1], longer, trained)
        _draw_same(bottom[2], longer, trained)
        handles, names = bottom[1].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=len(names))
        return plots.save(figure, path_stem)


def _draw_map(axes: Any, kind: str, width: int) -> Any:
    axes.grid(visible=False)
    titles = {"right": "The right encoding", "wrong": "The misprint: base and width swapped"}
    axes.set_title(titles[kind])
    axes.set_xlabel("column c (i: pair of columns)")
    axes.set_ylabel("position p")
    return axes.imshow(encodings.encoding(kind, 128, width), aspect="auto", cmap="RdBu", vmin=-1, vmax=1,
                       interpolation="nearest", origin="lower")  # fmt: skip


def _draw_distances(axes: Any, width: int) -> None:
    """From the encoding of position 64, by the square root of the width."""
    import numpy as np

    for kind, words in encodings.KINDS.items():
        code_PxD = encodings.encoding(kind, 129, width)
        distance_P = np.linalg.norm(code_PxD - code_PxD[64], axis=1) / math.sqrt(width)
        axes.plot(np.arange(-64, 65), distance_P, color=SHADES[kind], lw=1.2, label=words)
    axes.set_xlabel("positions away from p = 64")
    axes.set_ylabel("distance of the encodings (RMS)")
    axes.set_title("Are neighbours alike?")
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.3 * (high - low))  # room for the legend
    axes.legend(loc="upper center")


def _draw_answers(axes: Any, right: dict) -> None:
    """A point for each seed, a bar for their mean."""
    import numpy as np

    for i, kind in enumerate(ORDERS):
        x_S = i + np.linspace(-0.12, 0.12, len(right[kind]))
        axes.plot([i - 0.25, i + 0.25], [np.mean(right[kind])] * 2, color=ANSWERS[kind], lw=2)
        axes.plot(x_S, right[kind], "o", color=ANSWERS[kind], ms=5, mec="white", mew=0.6)
    axes.axhline(0.5, color="0.4", lw=1.2, ls=":", label="chance")
    axes.set_xticks(range(len(ORDERS)), [words.replace(", ", ",\n") for words in ORDERS.values()])
    axes.set_xlim(-0.5, len(ORDERS) - 0.5)
    axes.set_ylim(0.35, 1.05)
    axes.set_ylabel("share of right answers")
    axes.set_title("Does the first letter come before the last?")
    axes.legend(loc="lower right")


def _draw_places(axes: Any, longer: dict[str, Beyond], trained: int) -> None:
    """Means over seeds and over stretches of positions."""
    import numpy as np

    axes.set_ymargin(0.12)  # room for what the line says
    stretch = max(1, trained // 8)
    for kind, words in KINDS.items():
        loss_T = longer[kind].by_place_SxT.mean(axis=0)
        loss_N = loss_T[: len(loss_T) // stretch * stretch].reshape(-1, stretch).mean(axis=1)
        at_N = (np.arange(len(loss_N)) + 0.5) * stretch
        axes.plot(at_N, loss_N, color=COLOURS[kind], marker=MARKERS[kind], ms=4, mec="white", mew=0.5, lw=1.3,
                  label=words)  # fmt: skip
    axes.axvline(trained, color="0.3", lw=1.2, ls=(0, (4, 2)))
    axes.text(trained * 1.05, 0.98, "trained length", transform=axes.get_xaxis_transform(), va="top", fontsize=8)
    axes.set_xticks([0, *(n * trained for n in TIMES)])
    axes.set_xlabel("position in the window")
    axes.set_ylabel("held-out loss (nats per token)")
    axes.set_title("Loss by position")


def _draw_same(axes: Any, longer: dict[str, Beyond], trained: int) -> None:
    """Means over seeds, bars from the lowest to the highest."""
    import numpy as np

    for kind in KINDS:
        same = longer[kind].same
        value_NxS = np.asarray([same[n] - same[1] for n in same])
        mean_N = value_NxS.mean(axis=1)
        ends = np.stack([mean_N - value_NxS.min(axis=1), value_NxS.max(axis=1) - mean_N])
        axes.errorbar(list(same), mean_N, yerr=ends, color=COLOURS[kind], marker=MARKERS[kind], ms=6, mec="white",
                      mew=0.6, lw=1.3, capsize=2)  # fmt: skip
    axes.axhline(0, color="0.4", lw=1, ls=":")
    axes.set_xscale("log", base=2)
    axes.set_xticks(TIMES, [f"{n}x" for n in TIMES])
    axes.minorticks_off()
    axes.set_xlabel(f"tokens read, in trained lengths of {trained}")
    axes.set_ylabel("loss of the same tokens minus that at 1x (nats)")
    axes.set_title("More text before the same tokens")
    axes.text(0.02, 0.98, "learned: there are no positions beyond 1x", transform=axes.transAxes, va="top", fontsize=8)
