"""The figure of `schaeffer2023`: all metrics of the chain and of the control against model size.

Letters: G points of a curve, R runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.emergence.skill_runs import CHAIN, CONTROL, LENGTHS, LONGEST, METRICS

if TYPE_CHECKING:
    import numpy

    from analysis.mirage import Diagnosis

SAID = {
    "mirage": "the metric leaps, the model does not: a mirage", "jump": "the model itself jumps",
    "smooth": "the model grows, smoothly",
    "undecided": "the rule cannot tell", "nothing emerges": "no rise from chance",
    "already there": "some of the smallest third know it already",
}  # fmt: skip
SOFT = {"ce": ("#b3451f", "s"), "brier": ("#d98f2b", "D"), "probability": ("#8a6d3b", "^")}
SHOWN = {
    CHAIN: (*(f"exact_{n}" for n in LENGTHS), "edit", "ce", "brier", "probability"),
    CONTROL: ("accuracy", "ce", "circle_ce"),
}
WORDS = {
    "ce": "cross-entropy", "brier": "Brier score", "probability": "probability", "edit": "edit distance of 8",
    "accuracy": "accuracy within the pair", "circle_ce": "cross-entropy of the pair",
    **{f"exact_{n}": f"exact match of {n}" for n in LENGTHS},
}  # fmt: skip


def draw(scored: Any, told: Mapping[str, tuple[Diagnosis, list[Diagnosis]]], path_stem: Path) -> list[Path]:
    """All metrics on one axis, 0 a guess and 1 perfect, against model size: the chain, and the control."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from analysis import plots

    titles = {
        CHAIN: f"chain, skills one after the other:\n{SAID[told[CHAIN][0].verdict]}",
        CONTROL: f"control, two skills in one go, within the pair:\n{SAID[told[CONTROL][0].verdict]}",
    }
    with mpl.rc_context(plots.STYLE):
        figure = Figure(figsize=(11.5, 5.0), layout="constrained")
        for axes, family in zip(figure.subplots(1, 2), (CHAIN, CONTROL), strict=True):
            for column in SHOWN[family]:
                _draw_metric(axes, scored, family, column)
            if family == CHAIN:
                _draw_closed_form(axes, scored)
            axes.set_xscale("log")
            _size_axis(axes, scored[scored["family"] == family]["N"])
            lowest = min(line.get_ydata().min() for line in axes.get_lines())
            axes.set_ylim(min(-0.06, lowest - 0.04), 1.06)
            axes.set_xlabel("parameters N (faint: single seeds; bold: their mean)")
            axes.set_ylabel("score: 0 is a guess, 1 is perfect")
            axes.set_title(titles[family])
            axes.legend(loc="upper left" if family == CHAIN else "center right", fontsize=7.5)
        return plots.save(figure, path_stem)


def _style(column: str) -> tuple[Any, str, Any]:
    """Colour, marker, dash: exact match in shades of blue, the longer the darker."""
    from analysis import plots

    if column in SOFT:
        return *SOFT[column], "-"
    if column in ("edit", "circle_ce"):
        return "0.45", "v", (0, (4, 1.5))
    length = 1 if column == "accuracy" else int(column.rpartition("_")[2])
    colour, _ = plots.size_styles(LENGTHS)[length]
    return (plots.size_styles(LENGTHS)[LONGEST][0] if column == "accuracy" else colour), "o", "-"


def _scaled(column: str, among: int, value: Any) -> Any:
    """A score as a share of the way from a guess among so many to perfect."""
    if column == "exact_1":
        column = "accuracy"
    guess, best = next((guess(among), best) for name, _, guess, best, _ in METRICS if name == column)
    return (value - guess) / (best - guess)


def _draw_metric(axes: Any, scored: Any, family: str, column: str) -> None:
    """Means over seeds, and each seed under exact match and cross-entropy (in the control with a line of its own):
    means of two groups are nobody's score.
    """
    mine = scored[scored["family"] == family]
    among = int(mine["among"].iloc[0])
    colour, marker, dash = _style(column)
    mean = mine.groupby("N")[column].mean()
    axes.plot(mean.index, _scaled(column, among, mean), color=colour, ls=dash, marker=marker, ms=4,
              lw=2.0 if family == CONTROL else 1.6, mec="white", mew=0.5,
              label=WORDS[column] + " within the pair" * (family == CONTROL and column == "ce"))  # fmt: skip
    if column in ("ce", "accuracy", f"exact_{LONGEST}"):
        for _, rows in mine.sort_values("N").groupby("seed"):
            axes.plot(rows["N"], _scaled(column, among, rows[column]), color=colour, lw=0.7, marker=marker, ms=4,
                      ls="-" if family == CONTROL else "none", alpha=0.4, mew=0)  # fmt: skip


def power_law(size_R: numpy.ndarray, ce_R: numpy.ndarray, guess: float) -> tuple[float, float]:
    """c and alpha of CE(N) = (N / c)^alpha, a line through the logarithms of runs that are below 90 % of a guess's."""
    import numpy as np

    known_R = ce_R < 0.9 * guess
    if known_R.sum() < 3 or len(np.unique(size_R[known_R])) < 2:
        return math.nan, math.nan
    alpha, offset = np.polyfit(np.log(size_R[known_R]), np.log(ce_R[known_R]), 1)
    return math.exp(-offset / alpha), float(alpha)


def _draw_closed_form(axes: Any, scored: Any) -> None:
    """Exact match of the fitted power law of cross-entropy, exp(-L CE(N)), and that power law."""
    import numpy as np

    from analysis import scores
    from jaxgpt.tasks.chains import SYMBOLS

    mine = scored[scored["family"] == CHAIN]
    c, alpha = power_law(mine["N"].to_numpy(float), mine["ce"].to_numpy(), math.log(SYMBOLS))
    if not alpha < 0:
        return
    size_G = np.geomspace(mine["N"].min(), mine["N"].max(), 80)
    ce_G = scores.power_loss(size_G, c, alpha)
    for length in LENGTHS[1:]:
        name = f"exp(-L CE), CE ~ N^{alpha:.2f}" if length == LONGEST else None
        axes.plot(size_G, scores.exact_match_of_loss(ce_G, length), color=_style(f"exact_{length}")[0], lw=1,
                  ls=(0, (1, 1.2)), label=name)  # fmt: skip


def _size_axis(axes: Any, size: Any) -> None:
    """A label for every second size or so, as they are no powers of ten."""
    from matplotlib.ticker import NullLocator

    from analysis import plots

    sizes = sorted(size.unique())
    shown = sizes[:: max(1, round(len(sizes) / 5))]
    axes.set_xticks(shown, [plots.short(n) for n in shown])
    axes.xaxis.set_minor_locator(NullLocator())
