"""How much of a trained language model could go? It depends on which part, on who chooses it, and what comes instead.

One hears that 60 % of the weights can be pruned and 90 % of the performance stays, that new random values in 20 % of
them have no effect, and that most parameters are redundant, the model's "dark matter". None says how the weights are
chosen or what stays of what. Here, on the last checkpoints of the family of small models, without more training:

- gain kept: (L_init - L) / (L_init - L_0) of held-out losses L in nats per token: 1 as trained, 0 as before training.
  The measure is mild: from log-losses near 10.4 (32,000 tokens, untrained) to 1.6 (perplexity 5), a perplexity three
  times as high is 1.1 nats and still keeps 87 %. Tables therefore have nats beside it.
- pruning: the matrices of the blocks (queries, keys, values, out, up, down; neither tables nor the output matrix, as in
  the literature), a share of the weights set to 0: at random; the smallest of each matrix; the smallest of all; or by
  Wanda, the smallest |w| times the norm of its input on training text, for each output (Sun et al. 2023; the norms are
  the unpruned model's, where theirs follow the pruning from layer to layer). The smallest of each output tell, of what
  sets Wanda apart, the score from the comparison; they were added to the table after the others had been seen.
- changing: a random share of the same weights is rewound to initial values, set to other random ones of the initial
  distribution, to 0, or permuted among themselves; the same weights for all four. To second order a small random change
  costs as its squares: permuting adds w' - w where zeroing adds -w, twice the squares, and so costs twice as much if a
  weight's size says nothing on how much the loss depends on it; less, if large weights are those that matter.
- modules: the same four changes to a whole block, to a kind of matrix (with its biases) in all blocks, to a table. A
  block of zeros adds nothing to the stream: it is dropped. Blocks are also swapped with the next one, and compared with
  the angle by which the stream turns from input to output (Gromov et al. 2025 drop layers where it is least).

Nothing was tuned: shares and margins stood before any model was looked at. Intervals are over seeds, each the mean over
widths.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.anatomy import family
from experiments.anatomy.changes import METHODS, tried
from experiments.anatomy.family import by_seed
from experiments.claims import Claim, Measured, of_those_that_have, spoken
from experiments.registry import Job, Outcome, Paper

if TYPE_CHECKING:
    import numpy
    import pandas

LEVEL = 0.9
BELIEF = "a common belief"
COLOURS = {"random": "#8a8a8a", "magnitude": "#1f5a8f", "global": "#2a9d8f", "wanda": "#c0562b", "output": "#d99a6c"}
CHANGE_COLOURS = {"rewind": "#1f5a8f", "re-random": "#c0562b", "zero": "#333333", "permute": "#8a4f9e"}
CALIBRATION = 16  # windows of training text for the norms of inputs and the angles
SMALL, FIFTH = 0.05, 0.2  # shares of weights changed that claims are about
NONE = 0.01  # of the gain: less is no effect

CLAIMS = (
    *(Claim(f"prune_{name}", f"pruning 60 % of the blocks' weights keeps 90 % or more of the gain: {words}", BELIEF,
            0.95, 0.05, "1", "toy_analogue", LEVEL, row=72) for name, words in METHODS.items() if name != "output"),
    Claim("wanda_better", "pruning half by Wanda harms less than by magnitude: loss added, as a share of the other's",
          "Sun et al. 2023", 0.5, 0.5, "1", "toy_analogue", LEVEL, row=72),
    Claim("reinitialised", "new random values in 20 % of the weights have no effect: share of the gain lost", BELIEF,
          0.0, NONE, "1", "toy_analogue", LEVEL, row=73),
    Claim("second_order", "small changes cost as their squares: permuting 5 % of the weights, as a multiple of zeroing "
          "(2 for a small change, gradient and mean weight 0, and curvature that is independent of a weight's size)",
          "after second-order theory; ours", 2.0, 0.5, "times", "toy_analogue", LEVEL, row=73),
    *(Claim(f"most_{name}", f"most weights are redundant: share that can go at 1 % of the gain, {words}", BELIEF,
            0.75, 0.25, "1", "toy_analogue", LEVEL, row=74, possible=(0.0, 1.0))
      for name, words in (("random", "drawn at random"), ("wanda", "chosen by Wanda"))),
    # Some modules are critical and others are not; expected 8 times, from 1.4 to 45 times, is our reading.
    Claim("first_block", "the first block matters most: log2 of the cost of rewinding it over the other blocks' mean",
          "after Zhang, Bengio & Singer 2022", 3.0, 2.5, "1", "toy_analogue", LEVEL, row=74),
    Claim("angle", "the block across which the stream turns least is the cheapest to drop: share of models (by chance "
          "one over the number of blocks, 1/4 at laptop scale)",
          "after Gromov et al. 2025", 1.0, 0.25, "1", "toy_analogue", LEVEL, row=74, possible=(0.0, 1.0)),
)  # fmt: skip


@dataclass(frozen=True)
class Size:
    """What a scale does to each model. sparsities: rising from 0. shares: of weights changed at random."""

    sparsities: tuple[float, ...]
    shares: tuple[float, ...]


WHOLE = Size((0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95), (0.02, SMALL, 0.1, FIFTH, 0.4))
SIZES = {"smoke": Size((0.0, 0.5, 0.6, 0.9), (SMALL, FIFTH)), "laptop": WHOLE, "paper": WHOLE}


# --- what it says --------------------------------------------------------------------------------------------------


def _of(costs: Any, kind: str, what: str, share: float | None = None, where: Any = None) -> Any:
    rows = costs[(costs["kind"] == kind) & (costs["what"] == what)]
    rows = rows if share is None else rows[rows["share"] == share]
    return rows if where is None else rows[rows["where"].isin([where] if isinstance(where, str) else where)]


def can_go(costs: Any, method: str, lost: float) -> Any:
    """Per run: the share of weights that this method can set to 0 at such a loss of the gain."""
    from analysis.pruning import tolerated

    rows = _of(costs, "prune", method).sort_values("share")
    return rows.groupby(["seed", "width"])[["share", "kept"]].apply(
        lambda run: tolerated(run["share"].to_numpy(), run["kept"].to_numpy(), 1 - lost)
    ).rename("share").reset_index()  # fmt: skip


def measure(costs: Any, blocks: Any, seeds: int) -> dict[str, Measured]:
    """Each claim's value and its interval over seeds, of which there should be so many."""
    import numpy as np

    def ratio(above: Any, below: Any, log: bool = False) -> Measured:
        a_S, b_S = by_seed(above, "nats"), by_seed(below, "nats")
        value_S = np.divide(a_S, b_S, out=np.full(len(a_S), math.nan), where=(b_S > 0) & (a_S > 0))
        why = "a change that did no harm leaves no ratio, or a model diverged"
        return of_those_that_have(np.log2(value_S) if log else value_S, seeds, why, LEVEL)

    def whole(value_S: numpy.ndarray) -> Measured:
        return of_those_that_have(value_S, seeds, "a model of the family diverged", LEVEL)

    belief = {f"prune_{name}": _of(costs, "prune", name, 0.6) for name in METHODS if name != "output"}
    found = {name: whole(by_seed(rows, "kept")) for name, rows in belief.items()}
    found["wanda_better"] = ratio(*(_of(costs, "prune", name, 0.5) for name in ("wanda", "magnitude")))
    found["reinitialised"] = whole(1 - by_seed(_of(costs, "change", "re-random", FIFTH), "kept"))
    found["second_order"] = ratio(*(_of(costs, "change", name, SMALL) for name in ("permute", "zero")))
    for name in ("random", "wanda"):
        found[f"most_{name}"] = whole(by_seed(can_go(costs, name, NONE), "share"))
    others = [where for where in blocks["where"].unique() if where != "block 0"]
    found["first_block"] = ratio(*(_of(costs, "module", "rewind", where=w) for w in ("block 0", others)), log=True)
    hits = dropped(costs, blocks).groupby(["seed", "width"])[["angle", "nats"]].apply(
        lambda run: float(run["angle"].to_numpy().argmin() == run["nats"].to_numpy().argmin())
    ).rename("hit").reset_index()  # fmt: skip
    found["angle"] = whole(by_seed(hits, "hit"))
    return found


def dropped(costs: Any, blocks: Any) -> Any:
    """A row per block of each model with its angle and the nats that dropping it adds."""
    keys = ["seed", "width", "where"]
    return blocks.merge(_of(costs, "module", "zero")[[*keys, "nats", "kept"]], on=keys)


# --- tables and figure ---------------------------------------------------------------------------------------------


def _prune_table(costs: Any) -> pandas.DataFrame:
    import numpy as np
    import pandas

    def added(method: str, share: float) -> str:
        nats_S = by_seed(_of(costs, "prune", method, share), "nats")
        return f"{nats_S.mean():.2f} (x{np.exp(nats_S.mean()):.3g})"

    return pandas.DataFrame(
        {"which weights": words, **{f"{share:.0%}: nats added": added(name, share) for share in (0.5, 0.6)},
         "60%: gain kept": spoken(by_seed(_of(costs, "prune", name, 0.6), "kept"), LEVEL, ".1%"),
         "90%: gain kept": spoken(by_seed(_of(costs, "prune", name, 0.9), "kept"), LEVEL, ".0%"),
         **{f"can go at {lost:.0%}": spoken(by_seed(can_go(costs, name, lost), "share"), LEVEL, ".0%", (0, 1))
            for lost in (NONE, 0.1)}}
        for name, words in METHODS.items()
    )  # fmt: skip


def _change_table(costs: Any) -> pandas.DataFrame:
    import pandas

    from analysis.pruning import CHANGES

    def cell(how: str, share: float) -> str:
        rows, zero = _of(costs, "change", how, share), _of(costs, "change", "zero", share)
        squares = by_seed(rows, "squares").mean() / by_seed(zero, "squares").mean()
        times = by_seed(rows, "nats").mean() / by_seed(zero, "nats").mean()
        return f"{1 - by_seed(rows, 'kept').mean():.1%} (x{times:.2g}; squares x{squares:.2g})"

    shares = sorted(costs.loc[costs["kind"] == "change", "share"].unique())
    return pandas.DataFrame({"share changed": f"{s:.0%}", **{how: cell(how, s) for how in CHANGES}} for s in shares)


def _module_table(costs: Any) -> pandas.DataFrame:
    import pandas

    from analysis.pruning import CHANGES

    mine = costs[costs["kind"] == "module"]
    return pandas.DataFrame(
        {"part": where, "parameters": f"{rows['parameters'].mean():.1%}",
         **{how: spoken(1 - by_seed(_of(rows, "module", how), "kept"), LEVEL, ".1%") for how in CHANGES}}
        for where, rows in mine.groupby("where", sort=False)
    )  # fmt: skip


def _block_table(costs: Any, blocks: Any) -> pandas.DataFrame:
    import pandas

    found = dropped(costs, blocks)

    def row(where: str, rows: Any) -> dict[str, str]:
        swap = _of(costs, "swap", "swap", where=where)
        lost = spoken(1 - by_seed(swap, "kept"), LEVEL, ".1%") if len(swap) else "–"
        return {"block": where.removeprefix("block "), "angle": spoken(by_seed(rows, "angle"), LEVEL, ".3f", (0, 1)),
                "dropped": spoken(1 - by_seed(rows, "kept"), LEVEL, ".1%"), "swapped with the next": lost}  # fmt: skip

    return pandas.DataFrame(row(str(where), rows) for where, rows in found.groupby("where", sort=False))


def draw(costs: Any, blocks: Any, path_stem: Path) -> list[Path]:
    """Pruning curves, changes of random weights, modules as a heat map, blocks' angles; writes PNG and SVG."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from analysis import plots

    with mpl.rc_context(plots.STYLE):
        figure = Figure(figsize=(14.5, 4.6), layout="constrained")
        panels = figure.subplots(1, 4, width_ratios=(1.15, 1, 1.05, 0.95))
        _draw_pruning(panels[0], costs)
        _draw_changes(panels[1], costs)
        _draw_modules(panels[2], costs)
        _draw_blocks(panels[3], dropped(costs, blocks))
        return plots.save(figure, path_stem)


def _draw_pruning(axes: Any, costs: Any) -> None:
    for name, words in METHODS.items():
        rows = _of(costs, "prune", name)
        by_run = rows.pivot_table(index="share", columns=["width", "seed"], values="kept")
        axes.plot(by_run.index, by_run.to_numpy(), color=COLOURS[name], lw=0.5, alpha=0.4)
        line = "--" if name in ("global", "output") else "-"
        axes.plot(by_run.index, by_run.mean(axis=1), line, color=COLOURS[name], lw=1.8, marker="o", ms=4, label=words)
    axes.plot(0.6, 0.9, "*", ms=12, color="#d4a017", mec="0.2", mew=0.6, label="the belief: 60 %, 90 %", zorder=5)
    axes.set_ylim(max(-0.5, float(axes.get_ylim()[0])), 1.05)
    axes.set_xlabel("share of the blocks' weights set to 0")
    axes.set_ylabel("gain kept")
    axes.set_title("Pruning (thin: single models)")
    axes.legend(loc="lower left")


def _draw_changes(axes: Any, costs: Any) -> None:
    for how, colour in CHANGE_COLOURS.items():
        by_run = 1 - _of(costs, "change", how).pivot_table(index="share", columns=["width", "seed"], values="kept")
        axes.plot(by_run.index, by_run.mean(axis=1), color=colour, lw=1.6, marker="o", ms=4, label=how)
    axes.axhline(NONE, color="0.4", lw=1, ls=(0, (4, 2)), label="1 %: counts as no effect")
    axes.set_xscale("log")
    axes.set_yscale("log")
    shares = by_run.index.to_list()
    axes.set_xticks(shares, [f"{s:.0%}" for s in shares])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    axes.set_xlabel("share of the blocks' weights")
    axes.set_ylabel("share of the gain lost")
    axes.set_title("Weights changed at random")
    axes.legend()


def _draw_modules(axes: Any, costs: Any) -> None:
    from analysis.pruning import CHANGES

    mine = costs[costs["kind"] == "module"]
    places = list(mine["where"].unique())
    lost = 1 - mine.pivot_table(index="where", columns="what", values="kept").loc[places, list(CHANGES)]
    axes.imshow(lost.clip(0, 1), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for y, place in enumerate(places):
        for x, how in enumerate(CHANGES):
            value = float(lost.loc[place, how])
            axes.text(
                x, y, f"{value:.0%}", ha="center", va="center", fontsize=8, color="white" if value > 0.6 else "0.1"
            )
    axes.set_xticks(range(len(CHANGES)), CHANGES)
    axes.set_yticks(range(len(places)), places)
    axes.grid(False)
    axes.set_title("Share of the gain lost, by part")


def _draw_blocks(axes: Any, found: Any) -> None:
    from analysis import plots

    styles = plots.size_styles(found["where"].unique())
    for where, rows in found.groupby("where", sort=False):
        colour, marker = styles[where]
        axes.plot(rows["angle"], 1 - rows["kept"], marker, color=colour, ms=5.5, mec="white", mew=0.5, label=where)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("angle by which the stream turns, over pi")
    axes.set_ylabel("share of the gain lost without the block")
    axes.set_title("Blocks dropped")
    axes.legend()


# --- from the family to the figure ---------------------------------------------------------------------------------


def run(job: Job) -> Outcome:
    """Takes the family's last checkpoints, changes them in every way, measures, draws."""
    from experiments.anatomy.corpus import training_windows

    runs, members = family.train(job)
    size = SIZES[job.scale]
    costs, blocks = tried(
        members, size.sparsities, size.shares, family.held_out(job.scale), training_windows(job.scale, CALIBRATION)
    )
    wide = costs.assign(name=costs[["kind", "what", "where"]].agg(" ".join, axis=1).str.split().str.join(" ")
                        + " " + costs["share"].map("{:g}".format))  # fmt: skip
    wide = wide.pivot_table(index="run_id", columns="name", values="nats", sort=False).reset_index()
    kept = ["run_id", "model.d_model", "train.seed", "params_total", "final_loss", "code_version"]
    gain = f"Held-out loss fell by {by_seed(costs, 'gain').mean():.2f} nats in training: the gain."
    over = f"Means over {costs['width'].nunique()} widths, {LEVEL:.0%} intervals over {costs['seed'].nunique()} seeds"
    return Outcome(
        measured=measure(costs, blocks, family.SIZES[job.scale].seeds),
        summary=runs[kept].merge(wide, on="run_id"),
        tables=(
            ("Weights of the blocks set to 0; smallest: |w|, in each matrix, in all, or for each output; Wanda: |w| "
             f"times its input's norm, for each output. {gain} In brackets: how many times the perplexity. Can go at "
             f"1%: the share of weights whose removal costs 1 % of the gain. {over}",
             _prune_table(costs)),
            ("Weights of the blocks, drawn at random, changed: rewound to initial values, set to other random ones "
             "(re-random), set to 0, or permuted among themselves. Share of the gain lost (x: loss added, and sum of "
             "squares of the change, as multiples of zeroing's)", _change_table(costs)),
            (f"Whole parts changed: share of the gain lost (more than 100 %: worse than untrained). {over}",
             _module_table(costs)),
            ("Blocks: angle by which the stream turns in it, over pi (.5: orthogonal); share of the gain lost",
             _block_table(costs, blocks)),
        ),
        figures=tuple(draw(costs, blocks, job.figure)),
        seconds_training=sum(runs["wall_seconds"]),
        device=runs["device"].iloc[0],
        corpus_sha256=runs["corpus_sha256"].iloc[0],
    )  # fmt: skip


PAPER = Paper(
    name="redundancy",
    title="How much of a model could go: pruning, re-initialising, dropping, and what is left of what was learnt",
    source="common beliefs; Sun et al. 2023; Zhang, Bengio & Singer 2022; Gromov et al. 2025",
    claims=CLAIMS,
    takes={
        "smoke": "20 seconds",
        "laptop": "2 minutes on 2 CPU cores, plus 5, once, for the models that 8 commands share",
        "paper": "for a GPU; not yet run",
    },
    run=run,
)
