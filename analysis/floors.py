"""The figure of laws with and without a floor, of exponents by convention and of counted FLOPs."""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from analysis import plots


def draw(worlds, found, counted, quantities: Mapping, printed: Mapping, source: str, path_stem) -> list[Path]:
    """L(N) above the entropy with both laws; exponents by convention; counts of FLOPs. Writes PNG and SVG.

    worlds       each with n_M, loss_M, entropy and the fits `floor` and `plain` in N
    found        convention -> quantity -> an exponent with value, low and high; `quantities` in words, and `printed`
                 as the `source` prints them
    counted      by width: FLOPs per token `all` (6 N), `without` (embeddings), `causal`, `dense`, `xla`
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(plots.STYLE):
        figure = Figure(figsize=(11.5, 4.4), layout="constrained")
        chains, exponents_, flops_ = figure.subplots(1, 3, width_ratios=(1.5, 1, 0.9))
        _draw_chains(chains, worlds)
        _draw_exponents(exponents_, found, quantities, printed, source)
        _draw_counts(flops_, counted)
        return plots.save(figure, path_stem)


COLOURS, MARKERS = ("#1f5a8f", "#c2571a", "#4a7c3a", "#7a4a8c"), "osD^"


def _draw_chains(axes, worlds) -> None:
    """Over the entropy, so that all chains share it: 0 is what no model goes below."""
    for i, w in enumerate(worlds):
        colour = COLOURS[i % len(COLOURS)]
        n_G = np.geomspace(w.n_M[0], 100 * w.n_M[-1], 200)
        axes.plot(w.n_M, w.loss_M - w.entropy, ls="", marker=MARKERS[i % 4], ms=5, mec="white", mew=0.5, color=colour,
                  label=f"chain {i}")  # fmt: skip
        for fit, dashes in ((w.floor, "-"), (w.plain, (0, (4, 1.5)))):
            axes.plot(n_G, fit.law.predict(fit.best, {"N": n_G}) - w.entropy, color=colour, lw=1.2, ls=dashes)
    most = max(float((w.loss_M - w.entropy).max()) for w in worlds)
    axes.axhline(0, color="black", lw=1.2)
    axes.annotate("entropy: no model goes below", (0.02, 0), xycoords=("axes fraction", "data"), xytext=(0, -4),
                  textcoords="offset points", va="top", fontsize=8)  # fmt: skip
    axes.set_xscale("log")
    axes.set_ylim(-0.35 * most, 1.1 * most)
    axes.set_xlabel("parameters N without embeddings")
    axes.set_ylabel("loss minus entropy (nats per token)")
    axes.set_title("Markov chains; solid: law with a floor, dashed: without")
    axes.legend(loc="upper right")


def _draw_exponents(axes, found, quantities, printed, source) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    for i, (name, one) in enumerate(found.items()):
        for j, key in enumerate(quantities):
            m = one[key]
            if math.isfinite(m.value):
                place = j + 0.16 * (i - (len(found) - 1) / 2)
                axes.plot([m.low, m.high], [place, place], color=COLOURS[i], lw=1.2)
                axes.plot(m.value, place, ls="", marker=MARKERS[i], ms=6, mec="white", mew=0.6, color=COLOURS[i],
                          label=name if j == 0 else None)  # fmt: skip
    for j, key in enumerate(quantities):
        axes.plot([printed[key]] * 2, [j - 0.25, j + 0.25], color="black", lw=1.2,
                  label=source if j == 0 else None)  # fmt: skip
    axes.set_yticks(range(len(quantities)), list(quantities.values()))
    axes.set_ylim(len(quantities) - 0.3, -1.7)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator([0.02, 0.05, 0.1, 0.2, 0.5, 1.0]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("exponent")
    axes.set_title("Text: exponents by convention")
    axes.legend(loc="upper left")


def _draw_counts(axes, counted) -> None:
    names = {
        "xla": "XLA",
        "dense": "exact, dense attention",
        "causal": "exact, causal",
        "without": "6 N, no embeddings",
    }
    for i, (name, words) in enumerate(names.items()):
        axes.plot(counted["width"], counted[name] / counted["all"], color=COLOURS[i], marker=MARKERS[i], ms=5,
                  mec="white", mew=0.5, lw=1.2, label=words)  # fmt: skip
    axes.axhline(1, color="black", lw=1.2)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_ylim(0)
    axes.set_xlabel("width d")
    axes.set_ylabel("FLOPs per token over 6 N, N all parameters")
    axes.set_title("Is C = 6 N D?")
    axes.legend(loc="lower right")
