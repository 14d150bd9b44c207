"""Which hidden units of a language model never fire, do they come back, and what kills them?

One hears that dead units are far rarer than a thousandth of a percent, that they stay frozen once dead, that a few do
no harm, that bad biases, high rates and weight decay kill, and that GELU and SiLU avoid it all. (And that a layer has
millions of them: GPT-3's have 4 x 12,288 = 49,152.) A ReLU unit is dead on a set of tokens if its pre-activation is
above 0 on none of them; the number of tokens belongs to the number of dead units, since a rare unit looks dead on few.

- census: dead units and the share of active ones by block, width, step and number of tokens, in the family of small
  models (family.py), against Voita et al. 2024 (OPT: more than 70 % dead in some early layers of the largest, more with
  scale) and Li et al. 2023 (trained T5: 3.0 % of units active on a token).
- fate: of the units dead at a checkpoint, how many are alive at the end. A unit that is 0 on every token gets no
  gradient, but what it reads moves. So units that came back are also given their old weights in the last model: do they
  fire on its stream?
- removal: units dead on most of the held-out text are taken out, and the loss is taken on the rest of it; and as many
  living units of the same blocks.
- causes: small models, all combinations of two initial biases, learning rates, weight decays and three activations. A
  GELU or SiLU unit is never exactly 0; it is called idle where it never adds a thousandth of the stream's norm
  (max |act| |w_out| <= .001 |stream|), which also counts the dead ones of ReLU.

The family has seeds 0 to 3. Levels of the factorial were tried on seed 100 (biases from -3, rates .003 and .03, decays
0 and 1, 300 steps; none was changed), and it was run on seeds 0 to 3. Biases and tables are not decayed, as in jaxgpt's
optimizer. Effects are on units dead at the end; a bias of -3 leaves many dead from the start, which the table tells.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from experiments.anatomy import factorial, family
from experiments.anatomy.dead_figure import draw
from experiments.anatomy.factorial import ACTIVATIONS, Levels
from experiments.claims import Claim, Measured, of_those_that_have, spoken
from experiments.registry import Job, Outcome, Paper

if TYPE_CHECKING:
    import numpy
    import pandas

LEVEL = 0.9
SHARE = (0.0, 1.0)
VOITA = "Voita et al. 2024, Neurons in Large Language Models, abstract"
LI = "Li et al. 2023, The Lazy Neuron Phenomenon"
COMMON = "as commonly said"
FEWEST = 10  # dead units that a share of them needs


def _claim(
    id: str, row: int, statement: str, source: str, expected: float, margin: float, unit: str = "1",
    possible: tuple[float, float] = SHARE,
) -> Claim:  # fmt: skip
    return Claim(id, statement, source, expected, margin, unit, "toy_analogue", LEVEL, row, possible)


ANY = (-math.inf, math.inf)
CHANGE = (-1.0, 1.0)
CLAIMS = (
    _claim("common_rate", 69, "dead units are less than a thousandth of a percent: their share in the widest models",
           COMMON, 5e-6, 5e-6),
    _claim("worst_layer", 69, "more than 70% of a layer's units are dead: the worst layer of the widest models", VOITA,
           0.85, 0.15),
    _claim("more_with_width", 69, "more units die with scale: dead share of the widest minus of the narrowest models",
           VOITA, 0.3, 0.29, possible=CHANGE),
    _claim("early", 69, "the dead units are in the early part: share of them in the first half of the blocks", VOITA,
           0.85, 0.15),
    _claim("tokens", 69, "few tokens overcount: dead on all held-out tokens over dead on the fewest", "ours", 0.5, 0.4),
    _claim("frozen", 68, "dead units stay dead: share of those ever dead that are alive at the end", COMMON, 0, 0.05),
    _claim("upstream", 68, "what came back did so because the stream moved: share that fire with their old weights",
           "a zero gradient's consequence; ours", 0.75, 0.25),
    _claim("removed_dead", 70, "taking dead units out does no harm: rise in loss on tokens they were not judged on",
           COMMON, 0, 0.001, "nats", ANY),
    _claim("removed_alive", 70, "as many living units are not redundant: rise in loss without them", "ours", 0.5, 0.49,
           "nats", ANY),
    _claim("lazy", 76, "share of units that a token activates, at the end (T5-Base)", LI, 0.03, 0.03),
    _claim("falls", 76, "it falls from one half at the start: at the end over at the start", LI, 0.3, 0.3,
           possible=(0, math.inf)),
    _claim("wider_lazier", 76, "and further in wider models: share in the narrowest minus in the widest", LI,
           0.2, 0.19, possible=CHANGE),
    _claim("bias_kills", 67, "negative biases at the start kill ReLU units: change in the dead share", COMMON,
           0.5, 0.49, possible=CHANGE),
    _claim("rate_kills", 67, "ten times the learning rate kills ReLU units: change in the dead share", COMMON,
           0.5, 0.49, possible=CHANGE),
    _claim("decay_kills", 67, "weight decay kills ReLU units: change in the dead share", COMMON,
           0.5, 0.49, possible=CHANGE),
    _claim("decay_pushes", 67, "it shrinks weights and does not push units down: change in the mean bias", "ours",
           0, 0.1, possible=ANY),
    *(_claim(f"{kind}_avoids", 71, f"{words} units do not die: their idle share where ReLU units die", COMMON, 0, 0.02)
      for kind, words in list(ACTIVATIONS.items())[1:]),
)  # fmt: skip


@dataclass(frozen=True)
class Size:
    """What a scale does beyond the family. followed: windows that units are watched on at every checkpoint. counts:
    of windows in the census of the last one. tested: further windows, for the loss. draws: of living units. The rest is
    the factorial.
    """

    followed: int
    counts: tuple[int, ...]
    tested: int
    draws: int
    levels: Levels
    seeds: int
    settings: Mapping[str, Any]


LEVELS = Levels(shift=(0.0, -3.0), rate=(3e-3, 3e-2), decay=(0.0, 1.0))
SMALL = {"model.d_model": 32, "model.n_layers": 2, "model.n_heads": 2, "model.context": 64, "model.bias": True,
         "model.positions": "learned", "train.batch_size": 8, "train.steps": 300, "train.eval_windows": 64,
         "optimizer.warmup_steps": 20}  # fmt: skip
SIZES = {
    "smoke": Size(4, (1, 4, 12), 4, 1, LEVELS, 2, {
        **SMALL, "model.d_model": 8, "model.n_layers": 1, "model.context": 16, "train.steps": 10,
        "train.batch_size": 2, "train.eval_windows": 4, "optimizer.warmup_steps": 2}),
    "laptop": Size(64, (8, 32, 128, 448), 64, 3, LEVELS, 4, SMALL),
    "paper": Size(64, (8, 32, 128, 192), 64, 3, LEVELS, 4, {**SMALL, "model.d_model": 256, "model.n_layers": 4,
                  "model.n_heads": 4, "model.context": 256, "train.batch_size": 32, "train.steps": 3000,
                  "optimizer.warmup_steps": 200}),
}  # fmt: skip


# --- the family ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Watched:
    """A member's units over training: dead on the followed windows, and share of tokens on which each is active; and at
    the end dead on each count of windows, [N, L, F].
    """

    member: family.Member
    dead_SxLxF: numpy.ndarray
    active_SxLxF: numpy.ndarray
    dead_NxLxF: numpy.ndarray

    @property
    def ever_LxF(self) -> numpy.ndarray:
        """Units that were dead at a checkpoint before the last."""
        import numpy as np

        return np.asarray(self.dead_SxLxF[:-1].any(axis=0))


def watched(member: family.Member, windows: numpy.ndarray, size: Size) -> Watched:
    """All checkpoints on the followed windows, the last on all that are counted on."""
    import numpy as np

    from analysis.anatomy import dead
    from experiments.anatomy import units

    few = windows[: size.followed]
    seen = [units.watch(member.model, family.params(member, step), few) for step in member.steps]
    last = units.watch(member.model, family.params(member), windows[: size.counts[-1]]).largest_WxLxF
    return Watched(
        member,
        np.stack([dead(each.largest_WxLxF.max(axis=0)) for each in seen]),
        np.stack([each.active_LxF for each in seen]),
        np.stack([dead(last[:n].max(axis=0)) for n in size.counts]),
    )


def census(all_watched: Sequence[Watched]) -> pandas.DataFrame:
    """A line per member, step and block: shares of its units dead and active, and, of those dead then, alive later."""
    import pandas

    return pandas.DataFrame(
        {"width": w.member.width, "seed": w.member.seed, "step": step, "block": block, "units": dead_F.size,
         "dead": dead_F.mean(), "active": w.active_SxLxF[s, block].mean(), "dead units": int(dead_F.sum()),
         "revived": int((dead_F & ~w.dead_SxLxF[-1, block]).sum())}
        for w in all_watched
        for s, step in enumerate(w.member.steps)
        for block, dead_F in enumerate(w.dead_SxLxF[s])
    )  # fmt: skip


def ends(all_watched: Sequence[Watched], windows: numpy.ndarray, size: Size) -> pandas.DataFrame:
    """A line per member: fates, the old weights' test, removals. NaN where fewer than FEWEST units are concerned."""
    import pandas

    rows = []
    for w in all_watched:
        ever, last = w.ever_LxF, w.dead_SxLxF[-1]
        counted = w.dead_NxLxF.mean(axis=(1, 2))
        row = {"width": w.member.width, "seed": w.member.seed, "ever": int(ever.sum()), "at the end": int(last.sum()),
               "revived": (~last)[ever].mean() if ever.sum() >= FEWEST else math.nan,
               "fewer": counted[-1] / counted[0] if w.dead_NxLxF[0].sum() >= FEWEST else math.nan}  # fmt: skip
        row |= {f"dead on {n}": share for n, share in zip(size.counts, counted, strict=True)}
        half = len(last) // 2
        row["early"] = last[:half].sum() / last.sum() if last.sum() >= FEWEST else math.nan
        row["worst"] = w.dead_NxLxF[-1].mean(axis=1).max()
        rows.append(row | _old_weights(w, windows, size) | _removed(w, windows, size))
    return pandas.DataFrame(rows)


def _old_weights(w: Watched, windows: numpy.ndarray, size: Size) -> dict[str, float]:
    """Of the units dead at the checkpoint with the most dead ones and alive at the end: the share that fire in the last
    model with the incoming weights and biases of back then, block by block, so that the stream below is the last one's.
    """
    import numpy as np

    from experiments.anatomy import units
    from experiments.anatomy.family import arrays_of, with_arrays

    then = int(w.dead_SxLxF[:-1].sum(axis=(1, 2)).argmax())
    back_LxF = w.dead_SxLxF[then] & ~w.dead_SxLxF[-1]
    if back_LxF.sum() < FEWEST:
        return {"came back": int(back_LxF.sum()), "fires with old weights": math.nan}
    state, old = family.params(w.member), arrays_of(family.params(w.member, w.member.steps[then]))
    new, fires = arrays_of(state), 0
    for block in np.flatnonzero(back_LxF.any(axis=1)):
        names = [f"layers.{block}.mlp.up.{leaf}" for leaf in ("kernel", "bias")]
        mixed = {name: np.where(back_LxF[block], old[name], new[name]) for name in names}
        largest = units.watch(w.member.model, with_arrays(state, mixed), windows[: size.followed]).largest_WxLxF
        fires += int((largest[:, block].max(axis=0) > 0)[back_LxF[block]].sum())
    return {"came back": int(back_LxF.sum()), "fires with old weights": fires / int(back_LxF.sum())}


def _removed(w: Watched, windows: numpy.ndarray, size: Size) -> dict[str, float]:
    """Rises in loss on the tested windows without the units dead on all others, and without as many living ones; and
    the largest change of a logit on a window that they were judged on.
    """
    import numpy as np

    from experiments.anatomy import units
    from experiments.anatomy.injection import outputs

    state, c, taken_LxF = family.params(w.member), w.member.model, w.dead_NxLxF[-1]
    if taken_LxF.sum() < FEWEST:
        return {"without dead": math.nan, "without living": math.nan, "logit": math.nan}
    draw, losses, tested = np.random.default_rng(w.member.seed), family.losses(c), windows[-size.tested :]

    def loss(taken: Any) -> float:
        return float(np.asarray(losses(units.without_units(state, taken), tested), float).mean())

    whole = float(np.asarray(losses(state, tested), float).mean())
    living = [loss(units.as_many(taken_LxF, draw)) - whole for _ in range(size.draws)]
    both = [outputs(c)(s, windows[0, :-1]) for s in (state, units.without_units(state, taken_LxF))]
    return {"without dead": loss(taken_LxF) - whole, "without living": float(np.mean(living)),
            "logit": float(abs(np.asarray(both[0]) - np.asarray(both[1])).max())}  # fmt: skip


# --- what they say ---------------------------------------------------------------------------------------------------


def measure(lines: Any, table: Any, cells: Any, size: Size, seeds: int) -> dict[str, Measured]:
    """Each claim's value and its interval over seeds. lines: of `census`; table: of `ends`; cells: of the factorial;
    seeds: of the family, also those of which a model diverged.
    """
    widths, last = sorted(lines["width"].unique()), lines[lines["step"] == lines["step"].max()]
    widest = table[table["width"] == widths[-1]].set_index("seed")
    most = f"dead on {size.counts[-1]}"
    by_width = table.pivot_table(index="seed", columns="width", values=most)
    active = last.pivot_table(index="seed", columns="width", values="active")
    first = lines[lines["step"] == 0].pivot_table(index="seed", columns="width", values="active")
    # Of seeds that have all widths: the mean of others would be that of another family.
    active_S, first_S = (by_seed.mean(axis=1, skipna=False) for by_seed in (active, first))
    few = f"fewer than {FEWEST} units are concerned"

    def those(column: str) -> Measured:
        return of_those_that_have(widest[column], seeds, f"{few}, or it diverged", LEVEL)

    def each(value_S: Any) -> Measured:
        return of_those_that_have(value_S, seeds, "a model of the family diverged", LEVEL)

    relu = cells[cells["activation"] == "relu"]
    found = {
        "common_rate": each(widest[most]),
        "worst_layer": each(widest["worst"]),
        "more_with_width": each(by_width[widths[-1]] - by_width[widths[0]]),
        "early": those("early"), "tokens": those("fewer"), "frozen": those("revived"),
        "upstream": those("fires with old weights"), "removed_dead": those("without dead"),
        "removed_alive": those("without living"),
        "lazy": each(active_S),
        "falls": each(active_S / first_S),
        "wider_lazier": each(active[widths[0]] - active[widths[-1]]),
    }  # fmt: skip
    for factor, name in (("shift", "bias"), ("rate", "rate"), ("decay", "decay")):
        effect = factorial.effect(relu, factor, "silent", size.levels)
        found[f"{name}_kills"] = of_those_that_have(effect.to_numpy(), size.seeds, "a training diverged", LEVEL)
    pushes = factorial.effect(relu, "decay", "bias", size.levels).to_numpy()
    found["decay_pushes"] = of_those_that_have(pushes, size.seeds, "a training diverged", LEVEL)
    none = "ReLU units die in no training, or one diverged"
    for kind in list(ACTIVATIONS)[1:]:
        idle_S = factorial.idle_where_deadly(cells, kind, size.levels)
        found[f"{kind}_avoids"] = of_those_that_have(idle_S.to_numpy(), size.seeds, none, LEVEL)
    return found


def run(job: Job) -> Outcome:
    """Finds or trains the family, watches its units, trains the factorial, draws."""
    import pandas

    began, size = time.monotonic(), SIZES[job.scale]
    # Before anything is trained: there may be too little text.
    windows, other = _windows(family.configs(family.SIZES[job.scale])[0], size)
    runs, members = family.train(job)
    own = factorial.train(job, size.levels, range(size.seeds), dict(size.settings), job.minutes_left(began))
    all_watched = [watched(member, windows, size) for member in members]
    lines, table = census(all_watched), ends(all_watched, windows, size)
    cells = factorial.looked_at(job, own, other)
    tokens = [n * members[0].model.context for n in size.counts]
    many, tested = size.followed * members[0].model.context, size.tested * members[0].model.context
    return Outcome(
        measured=measure(lines, table, cells, size, family.SIZES[job.scale].seeds),
        summary=pandas.concat([runs, own], ignore_index=True).reindex(columns=SUMMARY),
        tables=(
            ("Dead units at the end (% of the block's units; mean of seeds) on so many tokens of held-out text; "
             f"blocks: on {many:,}. Active: share of units that a token activates, at the start and at the end",
             _census_table(lines, table, tokens)),
            (f"Fates and removals, mean (90% interval) over seeds with at least {FEWEST} such units. Old weights: of "
             "units that came back, share that fire with the incoming weights they had when dead. Rises in loss on "
             f"{tested:,} tokens that they were not judged on", _end_table(table)),
            ("Trainings at two initial biases, rates and decays: % of ReLU units dead; of the others idle (never "
             "adding a thousandth of the stream), in brackets never above 0. Of ReLU also: dead at the start, size of "
             "incoming weights w (1: at the start), mean bias b, loss. Means of seeds", _cell_table(cells)),
            ("Slope of the activation in float32", _slope_table()),
        ),
        figures=tuple(draw(lines, cells, size.levels, job.figure)),
        numbers={"census": lines.to_dict("records"), "cells": cells.to_dict("records")},
        seconds_training=sum(runs["wall_seconds"]) + sum(own["wall_seconds"]),
        device=runs["device"].iloc[0],
        corpus_sha256=runs["corpus_sha256"].iloc[0],
    )  # fmt: skip


def _windows(config: Any, size: Size) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Of the family, counted and tested ones; and of the factorial's context, as many as are followed."""
    from experiments.anatomy import units
    from jaxgpt.config import RunConfig, override

    other = override(RunConfig(), dict(size.settings))
    return units.windows(config, size.counts[-1] + size.tested), units.windows(other, size.followed)


SUMMARY = ["run_id", "model.mlp", "model.d_model", "optimizer.learning_rate", "optimizer.weight_decay", "shift",
           "train.seed", "params_total", "train.steps", "status", "final_loss", "wall_seconds",
           "code_version"]  # fmt: skip


# --- tables ----------------------------------------------------------------------------------------------------------


def _census_table(lines: Any, table: Any, tokens: list[int]) -> pandas.DataFrame:
    import pandas

    steps = sorted(lines["step"].unique())

    def row(width: int, rows: Any) -> dict[str, str]:
        last, of_width = rows[rows["step"] == steps[-1]], table[table["width"] == width]
        start = rows.loc[rows["step"] == steps[0], "active"].mean()
        counts = [name for name in table if name.startswith("dead on ")]
        return {
            "width": str(width), "units in a block": str(rows["units"].iloc[0]),
            **{f"block {block + 1}": f"{100 * each['dead'].mean():.3g}" for block, each in last.groupby("block")},
            **{f"all, {n:,} tokens": f"{100 * of_width[name].mean():.3g}"
               for n, name in zip(tokens, counts, strict=True)},
            "active": f"{start:.0%} to {last['active'].mean():.0%}",
        }  # fmt: skip

    return pandas.DataFrame(row(width, rows) for width, rows in lines.groupby("width"))


def _end_table(table: Any) -> pandas.DataFrame:
    import pandas

    def said(values: Any, form: str, possible: tuple[float, float] = ANY) -> str:
        there = values.dropna().to_numpy()
        return spoken(there, LEVEL, form, possible) if len(there) > 1 else f"{there[0]:{form}}" if len(there) else "–"

    return pandas.DataFrame(
        {"width": str(width), "ever dead": f"{rows['ever'].mean():.3g}",
         "at the end": f"{rows['at the end'].mean():.3g}", "alive again": said(rows["revived"], ".0%", SHARE),
         "old weights": said(rows["fires with old weights"], ".0%", SHARE),
         "rise without dead (nats)": said(rows["without dead"], ".2g"),
         "rise without as many living": said(rows["without living"], ".2g"),
         "largest change of a logit where judged": said(rows["logit"], ".2g", (0, math.inf))}
        for width, rows in table.groupby("width")
    )  # fmt: skip


def _cell_table(cells: Any) -> pandas.DataFrame:
    import pandas

    unit = cells.loc[cells["activation"] == "relu", "incoming at the start"].mean()

    def row(factors: tuple[float, ...], each: Any) -> dict[str, str]:
        relu, gelu, silu = (each[each["activation"] == kind] for kind in ACTIVATIONS)
        told = dict(zip(("initial bias", "rate", "decay"), (f"{x:g}" for x in factors), strict=True))
        told |= {"ReLU": _mean(relu["silent"], ".1%"), "at the start": _mean(relu["silent at the start"], ".1%"),
                 "w": _mean(relu["incoming"] / unit, ".2f"), "b": _mean(relu["bias"], ".2f"),
                 "loss": _mean(relu["loss"], ".2f")}  # fmt: skip
        return told | {words: f"{_mean(rows['idle'], '.1%')} ({_mean(rows['silent'], '.1%')})"
                       for words, rows in (("GELU", gelu), ("SiLU", silu))}  # fmt: skip

    groups = cells.groupby(list(factorial.FACTORS), sort=False)
    return pandas.DataFrame(row(factors, each) for factors, each in groups)


def _mean(values: Any, form: str) -> str:
    return f"{values.mean():{form}}" if len(values) else "–"


def _slope_table() -> pandas.DataFrame:
    """Of the activations at a few pre-activations below 0: exactly 0 is what kills."""
    import jax
    import pandas

    from jaxgpt import parts

    kinds = {"ReLU": "relu", "GELU, tanh form": "gelu", "GELU, exact": "gelu_exact", "SiLU": "swiglu"}
    return pandas.DataFrame(
        {"activation": words, **{f"at {x:g}": f"{float(jax.grad(parts.activation(kind))(x)):.2g}"
                                 for x in (-1.0, -3.0, -6.0, -14.0)}}
        for words, kind in kinds.items()
    )  # fmt: skip


PAPER = Paper(
    name="dead",
    title="Dead and lazy units: how many, which come back, whether they matter, and what kills them",
    source="common statements on dead ReLU units; Voita et al. 2024; Li et al. 2023",
    claims=CLAIMS,
    takes={
        "smoke": "half a minute",
        "laptop": "about a minute and a half on 2 CPU cores, plus 5, once, for the models that 8 commands share",
        "paper": "for a GPU; not yet run",
    },
    run=run,
)
