"""Can a model with a NaN or an infinity in it be useful, and what keeps them out?

One hears that no released model holds a NaN or an infinity, that one with any is useless, that clipping the gradient
keeps them out, that half precision needs a scaled loss and float32 master weights, that weights reach 1e10, and that a
single weight does not matter. Here, on the family of small models (family.py):

- audit: how many numbers of all checkpoints are not finite (a table and no claim: runs that diverged leave none, and
  the others were guarded), and how large the largest is.
- injection: one entry of one parameter becomes NaN, +inf, -inf or 0, and positions are counted whose predictions are no
  numbers. injection.py says beforehand, from floating-point arithmetic alone, which ones these are: in most places all
  of them, also those before the token concerned, as attention gives hidden keys the weight 0 and 0 x NaN is NaN. But
  the row of a token that does not occur harms nothing, nor does -inf in the bias of a ReLU unit, which then is silent.
- guards: a real gradient with one bad entry is clipped by its global norm, as optax does it: the norm is inf, so that
  every other entry becomes 0 and the bad one inf / inf = NaN; with a NaN all become NaN. optax.apply_if_finite lets the
  NaN in after a number of bad updates. jaxgpt's step looks first, and leaves weights and moments as they were.
- half precision: gradients that float16 makes 0, with and without a scaled loss, and updates that are lost when weights
  are kept in 16 bits: from the last weights on, at the rate of the end, with Adam started anew.
- single weights: the weights of largest |w| max|x| are set to 0, against the largest by size and random ones of the
  same matrices (after Yu et al. 2024, who see one "super weight" decide over a model of billions).

Seeds are those of the family. GELU models are its ReLU models with the other activation: which positions a NaN hits
does not depend on what was learnt. Expectations are from arithmetic (same regime) or from the literature (toy
analogue). The share of injections in which theory names exactly the positions that are lost is a claim of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.anatomy import family
from experiments.anatomy.injection import TABLES
from experiments.claims import Claim, Measured, of_those_that_have, spoken
from experiments.registry import Job, Outcome, Paper

if TYPE_CHECKING:
    import pandas

LEVEL = 0.9
SHARE = (0.0, 1.0)
FLOAT = "IEEE 754 arithmetic"
BELIEF = "as commonly said"
YU = "Yu et al. 2024, The Super Weight in Large Language Models, abstract"
MICIKEVICIUS = "after Micikevicius et al. 2018, Mixed Precision Training"
ABSENT, *ABOUT_A_PLACE = TABLES
MANY = 100  # weights taken out together where rankings are compared


def _claim(
    id: str, row: int, statement: str, source: str, expected: float, margin: float, unit: str = "1",
    possible: tuple[float, float] = SHARE, toy: bool = False,
) -> Claim:  # fmt: skip
    scope = "toy_analogue" if toy else "same_regime"
    return Claim(id, statement, source, expected, margin, unit, scope, LEVEL, row, possible)


ANY = (-math.inf, math.inf)
CLAIMS = (
    _claim("absent_token", 63, "NaN or infinity in the row of a token that does not occur: positions lost", FLOAT,
           0, 0.001),
    _claim("used", 63, "NaN in any other parameter: positions lost, the smallest share over kinds", FLOAT, 1, 0.001),
    _claim("earlier", 63, "NaN in the row of a token: positions before its first occurrence that are lost, attention "
           "as one product of matrices", FLOAT, 1, 0.001),
    _claim("silent_relu", 63, "-inf in the bias of a ReLU unit: positions lost", FLOAT, 0, 0.001),
    _claim("silent_gelu", 63, "-inf in the bias of a GELU unit: positions lost", FLOAT, 1, 0.001),
    _claim("theory", 63, "injections in which exactly the positions are lost that arithmetic names beforehand", FLOAT,
           1, 0.01),
    _claim("clip_one", 64, "clipping does not prevent it: NaNs in a clipped gradient that held one infinity", FLOAT,
           1, 0.1, "entries", (0, math.inf)),
    _claim("clip_rest", 64, "share of the other entries that clipping then leaves at more than 0", FLOAT, 0, 0.001),
    _claim("clip_nan", 64, "share of a clipped gradient that is NaN where one entry was", FLOAT, 1, 0.001),
    _claim("unguarded", 64, "positions lost after one such step, clipped, with Adam", FLOAT, 1, 0.001),
    _claim("gives_up", 64, "NaN gradients in a row until apply_if_finite, told to ignore 5, lets one in",
           "optax's documentation", 6, 0.1, "updates", (0, math.inf)),
    _claim("guard", 65, "share of weights and moments that jaxgpt's step leaves bit-identical on a bad batch",
           "jaxgpt's promise", 1, 1e-6),
    _claim("underflow", 65, "float16 without a loss scale: a sizeable share of non-zero gradients of activations is 0",
           MICIKEVICIUS, 0.5, 0.45, toy=True),
    _claim("scaled", 65, "float16 with a loss scale of 2^16: share of non-zero gradients that is 0 or infinite",
           MICIKEVICIUS, 0, 0.01, toy=True),
    _claim("master", 65, "weights kept in bfloat16: a sizeable share of updates at the final rate, behind a restart "
           "of the optimizer, is lost in rounding", MICIKEVICIUS, 0.5, 0.45, toy=True),
    _claim("largest", 66, "weights reach 1e10: log10 of the largest number in any checkpoint", BELIEF, 10, 1,
           possible=ANY, toy=True),
    _claim("super", 66, "the one weight of largest |w| max|x| set to 0 makes perplexity a thousandfold: log10 of how "
           "many times larger it is then", YU, 3, 1, possible=ANY, toy=True),
    _claim("random_share", 66, f"rise without {MANY} random weights over that without the {MANY} of largest |w| max|x|",
           "after Yu et al. 2024; ours", 0, 0.2, possible=ANY, toy=True),
    _claim("magnitude_share", 66, f"rise without the {MANY} largest weights over that without the {MANY} of largest "
           "|w| max|x|", "after Yu et al. 2024; ours", 0, 0.5, possible=ANY, toy=True),
)  # fmt: skip


@dataclass(frozen=True)
class Size:
    """What a scale does beyond the family. windows: of held-out text that single weights are judged on. counts: of
    weights taken out together. draws: of random ones.
    """

    windows: int
    counts: tuple[int, ...]
    draws: int


SIZES = {"smoke": Size(4, (1, MANY), 1), "laptop": Size(16, (1, 10, MANY), 3), "paper": Size(32, (1, 10, MANY), 3)}


# --- measuring -------------------------------------------------------------------------------------------------------


def audited(members: Sequence[family.Member]) -> pandas.DataFrame:
    """A line per member and checkpoint: how many numbers, how many of them are not finite, the largest, and where."""
    import numpy as np
    import pandas

    from analysis.anatomy import non_finite
    from experiments.anatomy.family import arrays_of

    rows = []
    for member in members:
        for step in member.steps:
            arrays = arrays_of(family.params(member, step))
            sizes = {name: float(np.abs(x).max()) for name, x in arrays.items()}
            where = max(sizes, key=lambda name: sizes[name])
            rows.append({"width": member.width, "seed": member.seed, "step": step, "arrays": len(arrays),
                         "numbers": sum(x.size for x in arrays.values()),
                         "not finite": sum(non_finite(arrays).values()),
                         "largest": sizes[where], "where": where})  # fmt: skip
    return pandas.DataFrame(rows)


def injected(members: Sequence[family.Member], windows: Any) -> pandas.DataFrame:
    """The lines of `injection.matrix`: each member has the window in which a new token comes nearest three quarters of
    it, the next one the next such window.
    """
    import numpy as np
    import pandas

    from experiments.anatomy import injection

    tokens_WxT = windows[:, :-1]
    off_W = [abs(injection.new_token(tokens_T) - 3 * len(tokens_T) / 4) for tokens_T in tokens_WxT]
    order_W = np.argsort(off_W, kind="stable")
    return pandas.DataFrame(
        line
        for i, member in enumerate(members)
        for line in injection.matrix(family.params(member), member.model, tokens_WxT[order_W[i % len(order_W)]],
                                     member.seed, ("relu", "gelu"))
    )  # fmt: skip


def stepped(members: Sequence[family.Member], windows: Any) -> tuple[pandas.DataFrame, pandas.DataFrame]:
    """(guards and clipping, half precision), a line per member: single steps from its last parameters."""
    import numpy as np
    import pandas

    from experiments.anatomy import nonfinite as nf
    from experiments.anatomy.injection import no_numbers, outputs

    guards, halves = [], []
    for member in members:
        steps = nf.Stepped(member.config, family.params(member))
        before, after = nf.warmed(steps)
        by_params, by_stream = nf.gradients(steps, after)
        spikes = nf.guarded(steps, after)
        one, new = nf.clipped(by_params, after.params, math.inf)
        every = nf.clipped(by_params, after.params, math.nan)[0]
        lost_T = no_numbers(np.asarray(outputs(member.model)(new, windows[0, :-1])))
        guards.append({"seed": member.seed, "one": one, "every": every, "lost": lost_T.mean(),
                       "gives up": nf.gives_up(by_stream[0]), "spikes": spikes})  # fmt: skip
        grads = {"weights": nf.flat(by_params), "activations": by_stream.reshape(-1)}
        halves.append(
            {"seed": member.seed}
            | {(of, k): nf.lost_in_half(g, k) for of, g in grads.items() for k in nf.SCALES}
            | {dtype: nf.lost_updates(before.params, after.params, dtype) for dtype in ("float16", "bfloat16")}
        )
    return pandas.DataFrame(guards), pandas.DataFrame(halves)


def weighed(members: Sequence[family.Member], windows: Any, size: Size) -> pandas.DataFrame:
    """A line per member, ranking and count: the rise in loss."""
    import pandas

    from experiments.anatomy import heaviest

    few = windows[:: max(1, len(windows) // size.windows)][: size.windows]
    return pandas.DataFrame(
        {"width": member.width, "seed": member.seed, "ranking": way, "count": count, "rise": rise}
        for member in members
        for (way, count), rise in heaviest.rises(
            family.params(member), member.model, few, size.counts, size.draws, member.seed
        ).items()
    )


def measure(audit: Any, lines: Any, guards: Any, halves: Any, weights: Any) -> dict[str, Measured]:
    """Each claim's value and its interval over seeds; of a claim on weights, each the mean over widths."""
    import numpy as np

    bad, whole = lines[lines["value"] != "0"], lines[(lines["value"] == "NaN") & (lines["way"] == "whole")]
    there, nowhere = whole[whole["kind"] != ABSENT], bad[bad["kind"] == ABSENT]
    silent = bad[(bad["value"] == "-inf") & (bad["kind"] == "mlp.up.bias")].groupby(["activation", "seed"])["lost"]
    sizes = weights.pivot_table(index="seed", columns=["width", "ranking", "count"], values="rise")
    rise = sizes.T.groupby(level=["ranking", "count"]).agg(lambda x: x.mean(skipna=False)).T
    spikes = [np.mean([spike["identical"] for spike in each.values()]) for each in guards["spikes"]]

    def seeds(values: Any) -> Measured:
        values_S = np.asarray(values, float)
        return of_those_that_have(values_S, len(values_S), "a training of theirs diverged", LEVEL)

    def share(way: str) -> Measured:
        most_S = rise["carries", MANY]
        if most_S.isna().any():
            return seeds(most_S)
        if not most_S.min() > 0:
            why = "taking out the weights of largest |w| max|x| does not raise the loss of every seed"
            return Measured(math.nan, math.nan, math.nan, len(rise), why)
        return seeds(rise[way, MANY] / most_S)

    return {
        "absent_token": seeds(nowhere.groupby("seed")["lost"].max()),
        "used": seeds(there.groupby("seed")["lost"].min()),
        "earlier": seeds(whole[whole["kind"] == "row of a token"].groupby("seed")["earlier"].mean()),
        "silent_relu": seeds(silent.max()["relu"]),
        "silent_gelu": seeds(silent.min()["gelu"]),
        "theory": seeds(lines.groupby("seed")["agrees"].mean()),
        "clip_one": seeds([one["nan"] for one in guards["one"]]),
        "clip_rest": seeds([one["others not 0"] for one in guards["one"]]),
        "clip_nan": seeds([every["nan share"] for every in guards["every"]]),
        "unguarded": seeds(guards["lost"]),
        "gives_up": seeds(guards["gives up"]),
        "guard": seeds(spikes),
        "underflow": seeds([lost for lost, _ in halves["activations", 0]]),
        "scaled": seeds([sum(both) for both in halves["activations", 16]]),
        "master": seeds(halves["bfloat16"]),
        "largest": seeds(np.log10(audit.groupby("seed")["largest"].max())),
        "super": seeds(rise["carries", 1] / math.log(10)),
        "random_share": share("random"),
        "magnitude_share": share("size"),
    }


def run(job: Job) -> Outcome:
    """Finds or trains the family, audits, injects, steps, takes weights out, draws."""
    size = SIZES[job.scale]
    runs, members = family.train(job)
    windows = family.held_out(job.scale)
    widths = sorted({member.width for member in members})
    middle = [member for member in members if member.width == widths[len(widths) // 2]]
    audit, lines = audited(members), injected(middle, windows)
    guards, halves = stepped(middle, windows)
    weights = weighed(members, windows, size)
    return Outcome(
        measured=measure(audit, lines, guards, halves, weights),
        summary=runs.reindex(columns=SUMMARY),
        tables=(
            (f"Audit of {len(audit)} checkpoints, initial ones included, of {len(members)} runs that came to their end "
             f"({len(runs) - len(members)} diverged). Bad updates are held back, so that none should hold a bad number",
             _audit_table(audit)),
            ("Positions lost, of a window, when one entry becomes the value at the top (means of "
             f"{len(middle)} seeds, width {widths[len(widths) // 2]}; 0 loses none anywhere; first, last: block). In "
             "blocks: NaN, with queries taken in blocks. Earlier: of the positions before the token, NaN. "
             f"{lines['agrees'].sum():,} of {len(lines):,} injections lose exactly the positions that theory names",
             _injection_table(lines)),
            ("A bad step: one entry of a gradient, or a whole batch's loss", _guard_table(guards)),
            ("Share of non-zero gradients that float16 makes 0 (too large for it: in brackets), and of updates, at "
             "the final rate behind a restart of the optimizer, that are lost when weights are kept in 16 bits",
             _half_table(halves)),
            ("Rise in held-out loss (millinats per token) without the first weights of a ranking; mean (90% interval) "
             "over seeds. x: the inputs that a weight meets", _weight_table(weights)),
        ),
        figures=tuple(draw(lines, weights, job.figure)),
        numbers={"injections": lines.to_dict("records"), "weights": weights.to_dict("records")},
        seconds_training=sum(runs["wall_seconds"]),
        device=runs["device"].iloc[0],
        corpus_sha256=runs["corpus_sha256"].iloc[0],
    )  # fmt: skip


SUMMARY = ["run_id", "model.d_model", "train.seed", "params_total", "train.steps", "status", "final_loss",
           "wall_seconds", "code_version"]  # fmt: skip


# --- tables ----------------------------------------------------------------------------------------------------------


def _audit_table(audit: Any) -> pandas.DataFrame:
    import pandas

    return pandas.DataFrame(
        {"width": str(width), "checkpoints": str(len(rows)), "arrays in each": str(rows["arrays"].iloc[0]),
         "numbers in all": f"{rows['numbers'].sum():,}", "not finite": str(rows["not finite"].sum()),
         "largest": f"{rows['largest'].max():.3g}", "in": rows.loc[rows["largest"].idxmax(), "where"]}
        for width, rows in audit.groupby("width")
    )  # fmt: skip


def _injection_table(lines: Any) -> pandas.DataFrame:
    """Entries with the same cells share a row."""
    import pandas

    def said(rows: Any, column: str = "lost") -> str:
        return f"{rows[column].mean():.0%}" if len(rows) else "–"

    def cells(rows: Any) -> dict[str, str]:
        relu, gelu = (rows[(rows["activation"] == each) & (rows["way"] == "whole")] for each in ("relu", "gelu"))
        blocks = rows[(rows["way"] == "in blocks") & (rows["value"] == "NaN")]
        earlier = rows["kind"].iloc[0] in ABOUT_A_PLACE
        return {
            **{f"ReLU, {value}": said(relu[relu["value"] == value]) for value in ("NaN", "+inf", "-inf")},
            **{f"GELU, {value}": said(gelu[gelu["value"] == value]) for value in ("+inf", "-inf")},
            "in blocks": said(blocks),
            "earlier": said(relu[relu["value"] == "NaN"], "earlier") if earlier else "",
            "earlier, in blocks": said(blocks, "earlier") if earlier else "",
        }

    grouped: dict[tuple, list[str]] = {}
    for (kind, block), rows in lines.groupby(["kind", "block"], sort=False):
        grouped.setdefault(tuple(cells(rows).items()), []).append(f"{kind} ({block})" if block else str(kind))
    return pandas.DataFrame({"entry of": _listed(names), **dict(row)} for row, names in grouped.items())


def _listed(names: list[str]) -> str:
    """Names, of which those that stand there for both blocks lose theirs."""
    bare = [name.removesuffix(" (first)").removesuffix(" (last)") for name in names]
    return ", ".join(dict.fromkeys(b if bare.count(b) > 1 else name for b, name in zip(bare, names, strict=True)))


def _guard_table(guards: Any) -> pandas.DataFrame:
    import numpy as np
    import pandas

    from experiments.anatomy.nonfinite import LIMIT, SPIKES

    one, every = (pandas.DataFrame(list(guards[name])) for name in ("one", "every"))
    rows = [("one inf in a gradient, clipped by its norm (optax)", f"{one['nan'].mean():.3g} entry NaN, "
             f"{one['others not 0'].mean():.0%} of the others not 0"),
            ("  after a step of Adam, without a guard", f"{guards['lost'].mean():.0%} of positions lost"),
            ("one NaN in a gradient, clipped by its norm", f"{every['nan share'].mean():.0%} of entries NaN"),
            (f"NaN gradients in a row, apply_if_finite told to ignore {LIMIT}",
             f"let in at number {guards['gives up'].mean():.3g}")]  # fmt: skip
    for spike in SPIKES:
        told = pandas.DataFrame([each[spike] for each in guards["spikes"]])
        same, on = np.mean(told["identical"]), np.mean(told["moves on"])
        does = f"{same:.0%} of weights and moments bit-identical; the next step moves {on:.0%} of the arrays"
        rows.append((f"a batch's loss times {spike}, jaxgpt's step", does))
    return pandas.DataFrame(rows, columns=["what comes", "what it does"])


def _half_table(halves: Any) -> pandas.DataFrame:
    import numpy as np
    import pandas

    from experiments.anatomy.nonfinite import SCALES

    def both(cells: Any) -> str:
        small, large = np.mean(list(cells), axis=0)
        return f"{small:.2%} ({large:.2%})"

    rows = [{"what": f"gradients by {of}", **{f"loss times 2^{k}" if k else "no scale": both(halves[of, k])
                                              for k in SCALES}} for of in ("weights", "activations")]  # fmt: skip
    kept = {f"weights in {dtype}": spoken(halves[dtype], LEVEL, ".1%", SHARE) for dtype in ("float16", "bfloat16")}
    rows += [{"what": f"updates lost, {name}", "no scale": value} for name, value in kept.items()]
    return pandas.DataFrame(rows).fillna("")


WAYS = {"carries": "|w| max|x|", "size": "|w|", "random": "random, same matrices"}


def _weight_table(weights: Any) -> pandas.DataFrame:
    import pandas

    return pandas.DataFrame(
        {"width": str(width), "weights": str(count)}
        | {words: spoken(1e3 * rows.loc[rows["ranking"] == way, "rise"].to_numpy(), LEVEL, ".3g")
           for way, words in WAYS.items()}
        for (width, count), rows in weights.groupby(["width", "count"])
    )  # fmt: skip


# --- the figure ------------------------------------------------------------------------------------------------------


def draw(lines: Any, weights: Any, path_stem: Path) -> list[Path]:
    """Shares lost by entry and value as a map, and rises without weights by ranking; writes PNG and SVG."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from analysis import plots

    with mpl.rc_context(plots.STYLE):
        figure = Figure(figsize=(11, 7.2), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
        _draw_map(left, lines)
        _draw_rises(right, weights)
        return plots.save(figure, path_stem)


def _draw_map(axes: Any, lines: Any) -> None:
    """Rows: entries; columns: activation, way and value; cells: the share lost."""
    import numpy as np

    shown = lines[lines["value"] != "0"]
    named = shown.assign(row=shown["kind"] + shown["block"].map(lambda block: f", {block}" if block else ""))
    table = named.pivot_table(index="row", columns=["activation", "way", "value"], values="lost", sort=False)
    cells = table.to_numpy()
    axes.imshow(cells, cmap="cividis_r", vmin=0, vmax=1, aspect="auto")
    for (i, j), share in np.ndenumerate(cells):
        axes.text(j, i, f"{100 * share:.0f}", ha="center", va="center", fontsize=6,
                  color="white" if share > 0.5 else "black")  # fmt: skip
    axes.set_yticks(range(len(table)), table.index, fontsize=6.5)
    axes.set_xticks(range(cells.shape[1]), [value for _, _, value in table.columns], fontsize=7.5)
    groups = list(dict.fromkeys((activation, way) for activation, way, _ in table.columns))
    for i, (activation, way) in enumerate(groups):
        words = f"{activation.upper().replace('RELU', 'ReLU')}\nattention {way}"
        axes.text(3 * i + 1, -0.7, words, ha="center", va="bottom", fontsize=7.5)
        if i:
            axes.axvline(3 * i - 0.5, color="white", lw=2.5)
    axes.grid(False)
    axes.set_title("Positions lost (%) when one entry becomes the value below", pad=32)


def _draw_rises(axes: Any, weights: Any) -> None:
    """Rises by ranking and width over the count of weights, one point per seed."""
    from analysis import plots

    colours = {"carries": ("#1f5a8f", "o"), "size": ("#b5531c", "s"), "random": ("#777777", "^")}
    widths, counts = sorted(weights["width"].unique()), sorted(weights["count"].unique())
    for j, (way, (colour, marker)) in enumerate(colours.items()):
        for i, width in enumerate(widths):
            rows = weights[(weights["ranking"] == way) & (weights["width"] == width)]
            off = 0.24 * (i - (len(widths) - 1) / 2) + 0.06 * (j - 1)
            across = [counts.index(count) + off for count in rows["count"]]
            axes.plot(across, 1e3 * rows["rise"], marker, color=colour, ms=3.5 + 1.5 * i, mec="white", mew=0.5,
                      label=WAYS[way] if i == len(widths) - 1 else None)  # fmt: skip
    axes.set_yscale("symlog", linthresh=0.1)
    axes.axhline(0, color="0.35", lw=0.8)
    axes.set_xticks(range(len(counts)), [plots.short(count) for count in counts])
    axes.set_xlabel(f"weights set to 0 (left to right: widths {', '.join(map(str, widths))})")
    axes.set_ylabel("rise in held-out loss (millinats per token)")
    axes.set_title("Single weights, by ranking")
    axes.legend(loc="upper left")


PAPER = Paper(
    name="health",
    title="NaN and infinity in a model: how far one bad number reaches, what guards do, and single weights that matter",
    source="common statements on numerical health; Micikevicius et al. 2018; Yu et al. 2024",
    claims=CLAIMS,
    takes={
        "smoke": "half a minute",
        "laptop": "about a minute on 2 CPU cores, plus 5, once, for the models that 8 commands share",
        "paper": "for a GPU; not yet run",
    },
    run=run,
)
