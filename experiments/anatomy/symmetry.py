"""How far apart can two networks be that compute the same, and is there a valley between them?

Many parameters give one function. In a Transformer of ours one may, and nothing changes:

- permute the units of an MLP, with what reads them; heads of an attention layer, and the units within a head;
- permute the residual stream itself, in all that write to it and read from it (LayerNorm treats its units alike);
- scale the input of a ReLU unit by c > 0 and its output by 1/c; scale or flip a unit of the values by c and the output
  projection by 1/c; and queries by c, keys by 1/c.

So a statement such as "the same function at a distance of more than a million" says nothing: permutations keep the norm
and move a network by about sqrt(2) times its norm, and scales move it as far as one likes, at will. What may be asked
instead: how high is the barrier, by how much does the loss rise on the straight line between two networks? Between a
network and its permuted copy there is one, though they are the same; and matching the permutation removes it. Between
two seeds, Entezari et al. 2022 conjecture that wide networks have no barrier once their units are matched; Ainsworth et
al. 2023 find such permutations for wide ResNets. Here: the shared family of small language models, whose units are
matched by their weights (analysis/matching.py).

Matching knows permutations only. Scales, and the rotations that are free within a head, it leaves; and its end is a
local optimum. A barrier that stays may be due to these, too. Wider networks have lower ends, above which a barrier has
more room: the table has what is left of it as well.

A pair of seeds shares seeds with other pairs. So intervals are over seeds, by the jackknife of all pairs
(`matching.per_seed`). Nothing here was chosen on results. A barrier counts as one from .1 nats on.

Letters as in model.py; W windows, P points on a line.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.anatomy import family
from experiments.anatomy.family import arrays_of, with_arrays
from experiments.anatomy.symmetries import ALL, NONE, SYMMETRIES, Arrays, axes_of, groups_of
from experiments.claims import Claim, Measured, of_those_that_have, spoken
from experiments.registry import Job, Outcome, Paper
from jaxgpt.config import BadInput

if TYPE_CHECKING:
    import numpy
    import pandas
    from flax import nnx

    from experiments.anatomy.family import Member
    from jaxgpt.config import ModelConfig

ENTEZARI, AINSWORTH = "Entezari et al. 2022", "Ainsworth et al. 2023"
LEVEL = 0.9
SEEN = (0.1, 5.9)  # nats: what counts as a barrier; guessing bytes costs 5.5

CLAIMS = (
    Claim("same", "permutations and scales leave the function: largest change of a logit, over the logits' standard "
          "deviation, of the worst of them", "algebra; float32", 0.0, 1e-4, "1", "same_regime", LEVEL, row=87,
          possible=(0.0, math.inf)),
    Claim("distance", "a copy with all units permuted is sqrt(2) norms away, as if it were unrelated",
          "unrelated numbers of mean 0", math.sqrt(2), 0.15, "norm of the parameters", "same_regime", LEVEL, row=87,
          possible=(0.0, 2.0)),
    Claim("copy_before", "a barrier (.1 nats or more) stands between a network and its permuted copy",
          f"{ENTEZARI}; {AINSWORTH}", sum(SEEN) / 2, (SEEN[1] - SEEN[0]) / 2, "nats", "same_regime", LEVEL, row=87,
          possible=(0.0, math.inf)),
    Claim("copy_after", "matching the units removes it", AINSWORTH, 0.0, 0.01, "nats", "same_regime", LEVEL, row=87,
          possible=(0.0, math.inf)),
    Claim("seeds_before", "a barrier (.1 nats or more) stands between two seeds of the widest network",
          f"{ENTEZARI}; {AINSWORTH}", sum(SEEN) / 2, (SEEN[1] - SEEN[0]) / 2, "nats", "toy_analogue", LEVEL, row=87,
          possible=(0.0, math.inf)),
    Claim("seeds_after", "matching the units removes it: what is left of it, of the widest network",
          f"{ENTEZARI}; {AINSWORTH}", 0.0, 0.1, "barrier before", "toy_analogue", LEVEL, row=87,
          possible=(0.0, math.inf)),
    Claim("width", "the wider the networks, the lower what is left: exponent of the matched barrier in the width",
          ENTEZARI, -1.0, 1.0, "1", "toy_analogue", LEVEL, row=87),
)  # fmt: skip


@dataclass(frozen=True)
class Size:
    """windows: of held-out text for losses on a line; looked: for logits. points: of a line, with both ends."""

    windows: int
    looked: int = 4
    points: int = 11


SIZES = {"smoke": Size(4), "laptop": Size(64), "paper": Size(256)}

# --- what a change does ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moved:
    """What a change does to a network: largest change of a logit over their standard deviation; distance over norm."""

    logits: float
    distance: float


def moved(member: Member, state: nnx.State, tokens_WxT: Any) -> dict[str, Moved]:
    """Every symmetry, and what is none, applied to a network."""
    import numpy as np

    from analysis import matching

    forward = _logits(member.model)
    params, logits = arrays_of(state), np.asarray(forward(state, tokens_WxT), float)
    norm, found = matching.norm(params), {}
    for number, (name, change) in enumerate((SYMMETRIES | NONE).items()):
        other = change(params, member.model, np.random.default_rng([number, member.seed]))
        difference = np.abs(np.asarray(forward(with_arrays(state, other), tokens_WxT), float) - logits).max()
        found[name] = Moved(float(difference / logits.std()), matching.distance(params, other) / norm)
    return found


@cache
def _logits(model: ModelConfig) -> Callable[[nnx.State, Any], Any]:
    """Compiled once for each model."""
    import jax
    from flax import nnx

    from jaxgpt import build

    return jax.jit(lambda state, tokens_WxT: nnx.merge(build.graphdef(model), state)(tokens_WxT))


# --- lines ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """The loss at the points of a straight line, its barrier, and the distance of its ends over their mean norm."""

    loss_P: numpy.ndarray
    barrier: float
    distance: float


@dataclass(frozen=True)
class Lines:
    """Before and after the units of the second end were matched to the first."""

    before: Line
    after: Line


Loss = Callable[[Arrays], float]


def lines(a: Arrays, b: Arrays, c: ModelConfig, loss: Loss, ends: tuple[float, float], points: int) -> Lines:
    """Between two networks of which the losses are known."""
    from analysis import matching

    axes = axes_of(c, a)
    order = matching.matched(a, b, axes, groups_of(c))
    return Lines(*(line(a, other, loss, ends, points) for other in (b, matching.permuted(b, axes, order))))


def line(a: Arrays, b: Arrays, loss: Loss, ends: tuple[float, float], points: int) -> Line:
    """From a to b, whose own losses are `ends`."""
    import numpy as np

    from analysis import matching

    share_P = np.linspace(0, 1, points)
    inner = [loss(matching.between(a, b, float(share))) for share in share_P[1:-1]]
    loss_P = np.asarray([ends[0], *inner, ends[1]])
    norm = (matching.norm(a) + matching.norm(b)) / 2
    return Line(loss_P, matching.barrier(loss_P, share_P), matching.distance(a, b) / norm)


@dataclass(frozen=True)
class Found:
    """By width: what changes do, by seed and name; lines to a permuted copy, by seed; lines between pairs of seeds."""

    moved: Mapping[int, Mapping[int, Mapping[str, Moved]]]
    copies: Mapping[int, Mapping[int, Lines]]
    pairs: Mapping[int, Mapping[tuple[int, int], Lines]]

    @property
    def widths(self) -> list[int]:
        """From narrow to wide."""
        return sorted(self.pairs)


def look(members: Sequence[Member], size: Size, window_WxT1: numpy.ndarray) -> Found:
    """Measures everything on trained networks."""
    import numpy as np

    by_width, copied, paired = {}, {}, {}
    for width in sorted({member.width for member in members}):
        mine = [member for member in members if member.width == width]
        c, states = mine[0].model, {member.seed: family.params(member) for member in mine}
        evaluate, like = family.losses(c), states[mine[0].seed]

        def loss(params: Arrays, evaluate: Any = evaluate, like: nnx.State = like) -> float:
            return float(evaluate(with_arrays(like, params), window_WxT1[: size.windows]).mean())

        params = {seed: arrays_of(state) for seed, state in states.items()}
        own = {seed: loss(each) for seed, each in params.items()}
        tokens_WxT = window_WxT1[: size.looked, :-1]
        by_width[width] = {member.seed: moved(member, states[member.seed], tokens_WxT) for member in mine}
        copies = {seed: SYMMETRIES[ALL](each, c, np.random.default_rng([99, seed])) for seed, each in params.items()}
        copied[width] = {
            seed: lines(params[seed], copies[seed], c, loss, (own[seed], own[seed]), size.points) for seed in params
        }
        paired[width] = {
            (i, j): lines(params[i], params[j], c, loss, (own[i], own[j]), size.points)
            for i, j in itertools.combinations(sorted(params), 2)
        }
    return Found(by_width, copied, paired)


# --- what they say -------------------------------------------------------------------------------------------------


def over_pairs(values: Mapping[tuple[int, int], float], level: float = LEVEL) -> Measured:
    """One number per pair of seeds: mean over the pairs, with an interval over seeds; endless for a single pair."""
    from analysis import matching

    if not values:
        return Measured(math.nan, math.nan, math.nan, 0, "no pair of seeds has it")
    seeds = len({seed for pair in values for seed in pair})
    value_S = matching.per_seed(values) if seeds > 2 else list(values.values())
    return of_those_that_have(value_S, seeds if seeds > 2 else len(value_S), "some pair has no number", level)


def measure(found: Found) -> dict[str, Measured]:
    """Each claim's value and interval, over the seeds of the widest networks if the claim does not say otherwise."""
    widest = found.widths[-1]
    seeds = sorted(found.moved[widest])
    each_S = [
        max(found.moved[width][seed][name].logits for width in found.widths if seed in found.moved[width]
            for name in SYMMETRIES)
        for seed in seeds
    ]  # fmt: skip
    copies, pairs = found.copies[widest], found.pairs[widest]
    by_seed = {
        "same": each_S,
        "distance": [found.moved[widest][seed][ALL].distance for seed in seeds],
        "copy_before": [copies[seed].before.barrier for seed in seeds],
        "copy_after": [copies[seed].after.barrier for seed in seeds],
    }
    by_pair = {
        "seeds_before": {pair: its.before.barrier for pair, its in pairs.items()},
        "seeds_after": {pair: left(its) for pair, its in pairs.items()},
        "width": slopes(found),
    }
    measured = {name: of_those_that_have(value_S, len(seeds), "no barrier", LEVEL) for name, value_S in by_seed.items()}
    return measured | {name: over_pairs(values) for name, values in by_pair.items()}


def left(its: Lines) -> float:
    """The barrier after matching over that before; NaN where there was none."""
    return its.after.barrier / its.before.barrier if its.before.barrier > 0 else math.nan


def slopes(found: Found) -> dict[tuple[int, int], float]:
    """Of the logarithm of the matched barrier in that of the width, by pair of seeds that all widths have."""
    import numpy as np

    common = set.intersection(*(set(pairs) for pairs in found.pairs.values()))
    by_pair = {}
    for pair in sorted(common):
        barrier_W = np.asarray([found.pairs[width][pair].after.barrier for width in found.widths])
        some = bool((barrier_W > 0).all())
        by_pair[pair] = float(np.polyfit(np.log(found.widths), np.log(barrier_W), 1)[0]) if some else math.nan
    return by_pair


def symmetry_table(found: Found) -> pandas.DataFrame:
    """One line per change, of the widest networks: how far it moves them, and what it does to the logits."""
    import pandas

    mine = found.moved[found.widths[-1]]
    return pandas.DataFrame(
        {"change": name, "distance / norm": f"{max(its[name].distance for its in mine.values()):,.2f}",
         "largest change of a logit / their deviation": f"{max(its[name].logits for its in mine.values()):.1e}"}
        for name in SYMMETRIES | NONE
    )  # fmt: skip


def barrier_table(found: Found) -> pandas.DataFrame:
    """One line per width: barriers and distances, before and after matching, with intervals over seeds."""
    import pandas

    def of(measured: Measured) -> str:
        if not math.isfinite(measured.high):
            return f"{measured.value:.3g}"
        return f"{measured.value:.3g} ({max(measured.low, 0):.3g} to {measured.high:.3g})"

    def line_of(width: int) -> dict[str, str]:
        copies, pairs = found.copies[width].values(), found.pairs[width]
        row = {"width": str(width)}
        for when, get in (("before", lambda its: its.before), ("matched", lambda its: its.after)):
            row[f"copy, {when}"] = spoken([get(its).barrier for its in copies], LEVEL, ".3g", (0.0, math.inf))
            row[f"seeds, {when}"] = of(over_pairs({pair: get(its).barrier for pair, its in pairs.items()}))
            row[f"distance, {when}"] = f"{sum(get(its).distance for its in pairs.values()) / len(pairs):.3f}"
        return row | {"seeds, left": of(over_pairs({pair: left(its) for pair, its in pairs.items()}))}

    order = ["width", "copy, before", "copy, matched", "seeds, before", "seeds, matched", "seeds, left",
             "distance, before", "distance, matched"]  # fmt: skip
    return pandas.DataFrame([line_of(width) for width in found.widths], columns=order)


def summary_of(found: Found) -> pandas.DataFrame:
    """One line per straight line."""
    import pandas

    rows = []
    for width in found.widths:
        named = {("copy", seed, seed): its for seed, its in found.copies[width].items()}
        named |= {("seeds", *pair): its for pair, its in found.pairs[width].items()}
        rows += [
            {"width": width, "ends": ends, "first_seed": i, "second_seed": j, "matched": matched,
             "barrier": one.barrier, "distance_over_norm": one.distance, "middle": one.loss_P[one.loss_P.size // 2]}
            for (ends, i, j), its in named.items()
            for matched, one in ((False, its.before), (True, its.after))
        ]  # fmt: skip
    return pandas.DataFrame(rows)


def run(job: Job) -> Outcome:
    """Trains the family where it is not there yet, looks, draws."""
    from jaxgpt import store

    size = SIZES[job.scale]
    rows, members = family.train(job)
    found = look(members, size, family.held_out(job.scale))
    for width, pairs in found.pairs.items():
        if not pairs:
            raise BadInput(f"width {width} of the family has one run that did not diverge; a pair takes two")
    seeds = len(found.moved[found.widths[-1]])
    return Outcome(
        measured=measure(found),
        summary=summary_of(found).assign(code_version=store.code_version()),
        tables=(
            (f"Networks of width {found.widths[-1]} changed: the largest of {seeds} seeds", symmetry_table(found)),
            (f"Barriers in nats on the straight line to a permuted copy, and between two seeds; {seeds} seeds with "
             f"{LEVEL:.0%} interval; left: matched over before; distances between seeds over their norm",
             barrier_table(found)),
        ),
        figures=tuple(draw(found, job.figure)),
        seconds_training=sum(rows["wall_seconds"]),
        device=rows["device"].iloc[0],
        corpus_sha256=rows["corpus_sha256"].iloc[0],
    )  # fmt: skip


# --- the figure ----------------------------------------------------------------------------------------------------

BEFORE, AFTER = "#c8641e", "#1f5a8f"
NOUGHT = 1e-8  # where a logarithmic axis shows 0


def draw(found: Found, path_stem: Path) -> list[Path]:
    """What changes do to logits; the loss along lines; barriers against width."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from analysis import plots

    with mpl.rc_context(plots.STYLE):
        figure = Figure(figsize=(12.0, 4.2), layout="constrained")
        left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1.1, 1))
        _draw_changes(left, found)
        _draw_lines(middle, found)
        _draw_barriers(right, found)
        return plots.save(figure, path_stem)


def _draw_changes(axes: Any, found: Found) -> None:
    names = list(SYMMETRIES | NONE)
    for place, name in enumerate(names):
        change_S = [max(its[name].logits, NOUGHT) for its in found.moved[found.widths[-1]].values()]
        colour = AFTER if name in SYMMETRIES else BEFORE
        axes.plot(change_S, [place] * len(change_S), color=colour, ls="", marker="o", ms=5, mec="white", mew=0.6)
    axes.set_yticks(range(len(names)), [name.replace("no symmetry: ", "control: ") for name in names])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel(f"largest change of a logit / their deviation\n(0 is drawn at {NOUGHT:g})")
    axes.set_title("Same function")


def _draw_lines(axes: Any, found: Found) -> None:
    import numpy as np

    width = found.widths[-1]
    for its_all, ends, style in ((found.copies[width], "permuted copy", "--"), (found.pairs[width], "two seeds", "-")):
        for number, its in enumerate(its_all.values()):
            for one, colour, when in ((its.before, BEFORE, "before"), (its.after, AFTER, "matched")):
                axes.plot(np.linspace(0, 1, len(one.loss_P)), one.loss_P, color=colour, ls=style, lw=1, alpha=0.8,
                          label=f"{ends}, {when}" if number == 0 else None)  # fmt: skip
    axes.set_xlabel("place on the straight line")
    axes.set_ylabel("loss (nats per token)")
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.35 * (high - low))
    axes.set_title(f"Loss between networks of width {width}")
    axes.legend(loc="upper left")


def _draw_barriers(axes: Any, found: Found) -> None:
    for which, colour in (("before", BEFORE), ("after", AFTER)):
        points = [(width, getattr(its, which).barrier) for width in found.widths for its in found.pairs[width].values()]
        means = [sum(y for x, y in points if x == width) / len(found.pairs[width]) for width in found.widths]
        axes.plot(*zip(*points, strict=True), color=colour, ls="", marker="o", ms=4, mec="white", mew=0.6, alpha=0.6)
        axes.plot(found.widths, means, color=colour, lw=1.4, label="before" if which == "before" else "units matched")
    axes.set_xscale("log", base=2)
    axes.set_xticks(found.widths, [str(width) for width in found.widths])
    axes.minorticks_off()
    axes.set_ylim(0)
    axes.set_xlabel("width of the networks")
    axes.set_ylabel("barrier (nats)")
    axes.set_title("Barrier between two seeds")
    axes.legend(loc="lower left")


PAPER = Paper(
    name="symmetry",
    title="One function, many parameters: symmetries, and barriers before and after matching units",
    source=f"{ENTEZARI}; {AINSWORTH}",
    claims=CLAIMS,
    takes={
        "smoke": "a quarter of a minute",
        "laptop": "half a minute on 2 CPU cores, plus 5, once, for the models that 8 commands share",
        "paper": "for a GPU; not yet run",
    },
    run=run,
)
