"""What is left of emergence on BIG-bench when luck, noise and smooth curves stand beside it?

An ability is called emergent when small models are at chance and larger ones suddenly are not (Wei et al. 2022; "small"
and "large", not "sudden", is their definition). BIG-bench (Srivastava et al. 2022) measures suddenness by
breakthroughness B, the range of a score over sizes divided by its median step. Nothing is trained here: the data are
the published scores of 12 BIG-G models, 2 million to 137 billion parameters outside embeddings, on 89 multiple-choice
tasks, as an audit collected them with the tasks' number of questions, their chance level and whether papers cite them
as emergent (18 are). Four questions:

* Does B tell jumps, as it is used to? A straight line over 12 sizes has B = 11 and a smooth logistic curve 25, a
  jump more. But noise makes the median step larger and B smaller: with 100 questions a smooth logistic curve comes out
  at 12 and a three times steeper one at 15. So each task has a null of its own, a smooth logistic curve from chance
  to its best score under its own noise, and it is computed first in how many tasks B could tell a step from that.
* How many tasks would be called emergent by luck? Scores were computed on at most 1,024 questions, often on far fewer
  (as few as 8), and one looks at 12 sizes of 89 tasks. Guessing is binomial: how many tasks it flags follows, and what
  survives the correction for looking everywhere (Šidák over sizes, Holm over tasks, together 5 %). With few questions
  hardly anything can survive it: the table says where a score of .1 above chance at one size would not.
* Is guessing binomial around 1 / choices at all? That can be checked where no ability is at work: below chance. Models
  that prefer one answer to all questions are far above or far below chance on whole tasks without knowing anything.
  Whatever the mirrored rule finds below chance, the rule itself finds above it without any ability.
* Is there one threshold, "about 1e11 parameters" as is often said? Each task has its own curve (analysis/thresholds.py:
  logistic over log size, from chance to a free ceiling) with an interval over questions. Tasks whose curve is not
  half-way up at the largest size have one beyond it, and those that are more than that at the smallest one before it:
  in the median they count as above, and below, all others.

Questions. Accuracies are published with four digits, so that most tell how many questions they are shares of. Where
that is not the table's number (at most 1,024), the largest smaller one that all 12 sizes fit is taken, and where
none fits the table's, and the table says so.

What this cannot say. These are multiple-choice tasks with graded choices, one model family and one measurement per
size; tasks that are scored by exact match, where most published jumps are, are not in the table. Questions are taken to
be independent and, for chance, sizes too. Papers cite tasks for models of other families and up to 540 billion
parameters too, so the claims on cited tasks are analogues. Sizes lie a factor of 1.7 to 8 apart, which B does not see.
That a B is not beyond smooth curves does not make its curve smooth where there is little power to tell. Expectations of
claims are the statements as they are commonly made and theory. How many tasks survive correction had been counted once
before the margins were set, and `resolves` took the place of a first claim (cited tasks have a B above 25: none has)
when simulations showed that noise alone keeps B below that, jump or not. Claims on luck took the place of two on
survival, in which few questions and no ability came out alike, after these had been seen, and changed their formula
once more, after a review found that the first one (luck over what is seen: .53 and .44) could not come out reproduced.
They take ability to have nothing to do with how easily luck lifts a task, and guesses to be binomial: where `below`
is contradicted luck lifts more than that.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.claims import Claim, Measured, share_of
from experiments.registry import Job, Outcome, Paper

if TYPE_CHECKING:
    import numpy
    import pandas

    from experiments.abilities import Scores

FILE = "bigg_audit_table.json"
MOST_QUESTIONS = 1024  # that a score was computed on
DIGITS = 4  # of the published accuracies
LEVEL = 0.9
RESOLVES = 0.8  # power of B against a smooth curve
# How analysis.thresholds begins what it says of thresholds before and beyond the table.
BEFORE, BEYOND = "no threshold: more than half of the way", "no threshold within the scales"
ABOVE, EARLY = 0.1, 0.05  # the audit's rule: chance + .1 at some size, at most chance + .05 at one of the smaller half
DELTAS = (0.05, 0.1, 0.2)
WEI = "Wei et al. 2022"
COMMON = "as commonly stated"
USE = "breakthroughness as it is commonly used"


def _claim(id: str, row: int, statement: str, source: str, expected: float, margin: float, **more: Any) -> Claim:
    return Claim(id, statement, source, expected, margin, "1", more.pop("scope", "same_regime"), LEVEL, row, **more)


SHARE = (0.0, 1.0)
CLAIMS = (
    _claim("resolves", 11, "B finds jumps in such tables: of the tasks that are above chance at all, share in which a "
           "step from chance to the best score would have, in 8 of 10 cases, a B beyond 95 % of smooth logistic curves",
           USE, 1.0, 0.5, possible=SHARE),
    _claim("tells", 11, "B tells cited tasks from others: chance that of a pair the cited one has the larger B (one "
           "half: it tells nothing)", USE, 1.0, 0.3, scope="toy_analogue", possible=SHARE),
    _claim("cited_able", 11, "tasks that papers cite as emergent are above chance at all: share that is able, as the "
           "number that lies .1 above chance at some size, beyond what guessing lifts so far, tells", WEI, 1.0, 0.25,
           scope="toy_analogue", possible=SHARE),
    _claim("lucky", 11, "what lies .1 above chance at some size is no luck: share of such tasks that have no "
           "ability, if guesses are lifted as often as theory says", COMMON, 0.0, 0.25, possible=SHARE),
    # The least margin that 89 tasks of which none survives can stay within.
    _claim("below", 11, "guessing is binomial around 1 / choices: share of tasks that survive the mirrored rule and "
           "correction, .1 below chance", "theory of independent guesses", 0.0, 0.025, possible=SHARE),
    _claim("place", 12, "abilities set in at 1e11 parameters: median threshold over tasks that have one, log10; "
           "outside the table counts as below or above all", COMMON, 11.0, 0.5),
    _claim("one", 12, "there is one threshold for all tasks: share of pairs of tasks whose intervals of the threshold "
           "do not touch", COMMON, 0.0, 0.1, possible=SHARE),
)  # fmt: skip


@dataclass(frozen=True)
class Size:
    """Resamples behind the interval of each task, and of a number over tasks."""

    resamples: int
    over_tasks: int


SIZES = {
    "smoke": Size(resamples=40, over_tasks=200),
    "laptop": Size(resamples=1000, over_tasks=4000),
}


def scores() -> tuple[list[Scores], numpy.ndarray]:
    """The 89 tasks, and (T,) whether papers cite them. From JAXGPT_DATA or the publisher; raises BadInput."""
    import numpy as np

    from jaxgpt.datafiles import fetch

    tasks = json.loads(fetch(FILE).read_text())["mc_tasks"]
    return [scores_of(t["task"], t["params_by_scale"], t["acc_by_scale"], t["N"], t["chance_p"]) for t in tasks], (
        np.asarray([t["cited_emergent"] for t in tasks], bool)
    )


def scores_of(task: str, params: list[float], accuracy: list[float], questions: int, chance: float) -> Scores:
    """A task as `jaxgpt emergence` takes it: one score a size, on so many questions as `asked` finds."""
    import numpy as np

    from experiments.abilities import Scores

    scale_M, score_M = np.asarray(params, float), np.asarray(accuracy, float)
    n_M = np.full(len(scale_M), asked(score_M, min(questions, MOST_QUESTIONS)) or min(questions, MOST_QUESTIONS))
    rows = {"scale": scale_M, "score": score_M, "n": n_M, "seed": None}
    return Scores(task, scale_M, [score_M[m : m + 1] for m in range(len(scale_M))], n_M, chance, rows)


def asked(accuracy_M: numpy.ndarray, most: int) -> int | None:
    """The largest number of questions, at most so many, of which all accuracies are shares, as far as their digits say;
    None where there is none. Half of it and more, lest a few round accuracies fit a handful.
    """
    import numpy as np

    for n in range(most, most // 2, -1):
        right_M = accuracy_M * n
        if (np.abs(right_M - np.rint(right_M)) <= n * 10.0**-DIGITS / 2 + 1e-6).all():
            return n
    return None


# --- measures ------------------------------------------------------------------------------------------------------


def measure(tasks: list[Scores], cited_T: numpy.ndarray, size: Size) -> tuple[dict[str, Measured], pandas.DataFrame]:
    """Each claim's value with its interval, and a row per task."""
    import numpy as np
    import pandas

    from analysis.emergence import chance_flags, survivors
    from experiments.abilities import ALPHA, measure

    told: Any = pandas.DataFrame([measure(task, "logistic", LEVEL, size.resamples) for task in tasks])
    score_TxM, chance_T, n_T = _arrays(tasks)
    up, down = (survivors(score_TxM, chance_T, n_T, below=below) for below in (False, True))
    above_T = np.asarray((score_TxM >= chance_T[:, None] + ABOVE - 1e-9).any(axis=1))
    early_T = (score_TxM[:, : score_TxM.shape[1] // 2] <= chance_T[:, None] + EARLY + 1e-9).any(axis=1)
    below_T = (score_TxM <= chance_T[:, None] - ABOVE + 1e-9).any(axis=1)
    luck_T = chance_flags(chance_T, n_T, score_TxM.shape[1], ABOVE).task_T
    # As if all were so far above chance at one size: what then survives could; that asks for Bonferroni's level.
    could = survivors(np.rint((chance_T + ABOVE) * n_T)[:, None] / n_T[:, None], chance_T, n_T)
    could_T = -np.expm1(score_TxM.shape[1] * np.log1p(-could.single_T)) * len(tasks) <= ALPHA
    told = told.assign(
        questions=n_T, whole=[asked(task.mean_M, int(n)) is not None for task, n in zip(tasks, n_T, strict=True)],
        can_survive=could_T, falls=told["fall_p"] <= ALPHA, cited=cited_T, above=above_T,
        flagged=above_T & early_T, p_family=up.family_T, survives=above_T & (up.family_T <= ALPHA), below=below_T,
        below_survives=below_T & (down.family_T <= ALPHA),
    )  # fmt: skip
    b_T = told["breakthroughness"].to_numpy(float)
    told["beyond_smooth"] = b_T > told["smooth_95"].fillna(np.inf)
    measured = {
        "resolves": share(told.loc[told["survives"] & ~told["falls"], "power"].to_numpy() >= RESOLVES),
        "tells": _tells(b_T, cited_T, size.over_tasks),
        "cited_able": able(luck_T[cited_T], int(above_T[cited_T].sum()))[0],
        "lucky": able(luck_T, int(above_T.sum()))[1],
        "below": share(told["below_survives"].to_numpy()),
        **_thresholds(told, size.over_tasks),
    }
    told = told.assign(
        flags=["; ".join(flags) for flags in told["flags"]],
        scores=[" ".join(map(str, row)) for row in np.round(score_TxM, 4).tolist()],
    )
    return measured, told.drop(columns=["scales", "modes"])


def _arrays(tasks: list[Scores]) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    import numpy as np

    return (
        np.stack([task.mean_M for task in tasks]), np.asarray([task.chance for task in tasks], float),
        np.asarray([task.rows["n"][0] for task in tasks]),
    )  # fmt: skip


def share(yes_T: numpy.ndarray) -> Measured:
    """A share of tasks with its interval; it leaves a claim open if there are fewer than 3."""
    if len(yes_T) < 3:
        return Measured(math.nan, -math.inf, math.inf, 1, f"only {len(yes_T)} tasks are of this kind")
    return replace(share_of(int(yes_T.sum()), len(yes_T), LEVEL), seeds=1)


def able(luck_T: numpy.ndarray, seen: int) -> tuple[Measured, Measured]:
    """(share of these tasks with an ability, share of the seen that have none), if all that have one are seen, and the
    others as often as guessing is lifted: able = (seen - luck) / (all - luck). luck_T: probabilities, taken to say
    nothing of ability. Intervals: all numbers of able tasks with which luck may well have lifted the rest of the seen.
    """
    import numpy as np

    from analysis.emergence import number_of

    tasks, luck = len(luck_T), float(luck_T.sum())
    if not seen:
        none = Measured(math.nan, -math.inf, math.inf, 1, "no task lies so far above chance")
        return none, none
    share = min(1.0, max(0.0, (seen - luck) / (tasks - luck)))
    ends_A = [number_of(luck_T * (1 - count / tasks), LEVEL) for count in range(seen + 1)]
    kept = [count for count, (low, high) in enumerate(ends_A) if low <= seen - count <= high]
    few, many = (min(kept), max(kept)) if kept else (0, 0)  # fewer than guesses lift
    ends = np.array([min(few / tasks, share), max(many / tasks, share)])
    low, high = np.clip((seen - ends[::-1] * tasks) / seen, 0, 1)
    return Measured(share, float(ends[0]), float(ends[1]), 1), Measured(
        1 - share * tasks / seen, float(low), float(high), 1
    )


def _tells(b_T: numpy.ndarray, cited_T: numpy.ndarray, resamples: int) -> Measured:
    """Area under the curve of B as a test for being cited, its interval over tasks of both kinds; ties count half."""
    import numpy as np

    usable_T = np.isfinite(b_T)
    if usable_T.sum() < len(b_T):  # a flat score does not jump
        b_T = np.where(usable_T, b_T, -np.inf)
    yes, no = b_T[cited_T], b_T[~cited_T]
    wins = (yes[:, None] > no) + 0.5 * (yes[:, None] == no)
    rng = np.random.default_rng(0)
    drawn = [
        wins[rng.integers(len(yes), size=len(yes))][:, rng.integers(len(no), size=len(no))].mean()
        for _ in range(resamples)
    ]
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Measured(float(wins.mean()), float(low), float(high), 1)


def _thresholds(told: Any, resamples: int) -> dict[str, Measured]:
    """The median threshold, with those beyond either end of the table as endless, and the share of pairs of those
    within that do not touch; intervals over tasks.
    """
    import numpy as np

    found, why = told[told["threshold"].notna()], told["threshold_remark"].fillna("")
    before, beyond = (int(why.str.startswith(words).sum()) for words in (BEFORE, BEYOND))
    if len(found) < 5:
        few = Measured(math.nan, -math.inf, math.inf, 1, f"{len(found)} tasks have a threshold, 5 are needed")
        return {"place": few, "one": few}
    place_T = np.log10(found["threshold"].to_numpy(float))
    low_T, high_T = np.asarray([[_end(low, 0.0), _end(high, math.inf)] for low, high in found["threshold_interval"]]).T
    apart_TxT = (low_T[:, None] > high_T) | (high_T[:, None] < low_T)
    all_T = np.concatenate([np.full(before, -np.inf), place_T, np.full(beyond, np.inf)])
    rng, medians, shares = np.random.default_rng(0), [], []
    for _ in range(resamples):
        # The lower middle one: between a place and infinity there is no middle.
        medians.append(np.sort(rng.choice(all_T, size=len(all_T)))[(len(all_T) - 1) // 2])
        drawn = rng.integers(len(found), size=len(found))
        other = drawn[:, None] != drawn  # a task drawn twice is no pair
        shares.append(apart_TxT[np.ix_(drawn, drawn)][other].mean())
    pairs = ~np.eye(len(found), dtype=bool)
    both = {}
    middle = np.sort(all_T)[(len(all_T) - 1) // 2]
    for name, value, drawn in (("place", middle, medians), ("one", apart_TxT[pairs].mean(), shares)):
        low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="nearest")
        both[name] = Measured(float(value), float(low), float(high), 1)
    return both


def _end(value: float | None, open_end: float) -> float:
    return open_end if value is None else value


def luck(tasks: list[Scores]) -> pandas.DataFrame:
    """How many tasks lie so far above or below chance at some size, and how many guessing alone gives."""
    import pandas

    from analysis.emergence import chance_flags

    score_TxM, chance_T, n_T = _arrays(tasks)
    rows = []
    for delta in DELTAS:
        sizes = score_TxM.shape[1]
        up = chance_flags(chance_T, n_T, sizes, delta, level=LEVEL)
        down = chance_flags(1 - chance_T, n_T, sizes, delta, level=LEVEL)  # so many more wrong answers
        rows.append({
            "delta": delta,
            "above": int((score_TxM >= chance_T[:, None] + delta - 1e-9).any(axis=1).sum()),
            "above_by_luck": up.expected, "above_low": up.low, "above_high": up.high,
            "below": int((score_TxM <= chance_T[:, None] - delta + 1e-9).any(axis=1).sum()),
            "below_by_luck": down.expected, "below_low": down.low, "below_high": down.high,
        })  # fmt: skip
    return pandas.DataFrame(rows)


def run(job: Job) -> Outcome:
    """Measures and draws."""
    tasks, cited_T = scores()
    measured, frame = measure(tasks, cited_T, SIZES[job.scale])
    table: Any = frame
    by_luck = luck(tasks)
    found = table[table["threshold"].notna()]
    return Outcome(
        measured=measured,
        summary=table,
        figures=tuple(draw(table, by_luck, job.figure)),
        tables=(
            (f"Tasks that papers cite as emergent, and the {OTHERS} others of the largest B. B: breakthroughness with "
             f"its {LEVEL:.0%} interval over questions (without noise a line has 11, a smooth logistic 25); smooth: "
             "what 95 % of smooth curves stay below with so many questions; power: share of steps beyond it; p: share "
             "of random orders of the sizes with a B as large; linearity / step: 1 of a line; above chance: whether "
             f"some size is by .1; by luck?: not after correction; *: .1 could not survive it (in "
             f"{int(table['can_survive'].sum())} tasks it would); †: the scores fit no number of whole answers. In "
             f"all {int(table['beyond_smooth'].sum())} of {len(table)} tasks are beyond smooth curves; luck gives "
             f"{0.05 * len(table):.1f}", _task_rows(table)),
            ("How many of the 89 tasks lie so far from chance at some size; in brackets how many independent guesses "
             f"give, with {LEVEL:.0%} of its distribution", _luck_rows(by_luck)),
            ("What the tasks' curves say of a threshold", _remark_rows(table)),
        ),
        numbers={
            "luck": by_luck.to_dict("records"),
            "beyond_smooth": int(table["beyond_smooth"].sum()),
            "beyond_smooth_by_luck": 0.05 * len(table),
            "flagged": int(table["flagged"].sum()),
            "survive": int(table["survives"].sum()),
            "survive_but_fall": int((table["survives"] & table["falls"]).sum()),
            "can_survive": int(table["can_survive"].sum()),
            "no_shares_of_whole_answers": table.loc[~table["whole"], "task"].tolist(),
            "survive_and_flagged": int((table["survives"] & table["flagged"]).sum()),
            "below_survive": int(table["below_survives"].sum()),
            "largest_breakthroughness": float(table["breakthroughness"].max()),
            "thresholds": {t: float(x) for t, x in zip(found["task"], found["threshold"], strict=True)},
        },
    )  # fmt: skip


# --- tables and figure ---------------------------------------------------------------------------------------------


def _named(table: Any) -> Any:
    """The cited tasks and the five others with the largest B, by B."""
    import pandas

    cited, others = table[table["cited"]], table[~table["cited"]]
    return pandas.concat([cited, others.nlargest(OTHERS, "breakthroughness")]).sort_values(
        "breakthroughness", ascending=False
    )


def _task_rows(table: Any) -> pandas.DataFrame:
    import pandas

    rows = []
    for one in _named(table).to_dict("records"):
        ends = one["breakthroughness_interval"]
        sure = "yes" if one["survives"] else "no" if not one["above"] else "by luck?"
        sure += ", falls" * (one["survives"] and one["falls"])
        sure += "*" * (not one["survives"] and not one["can_survive"])
        rows.append({
            "task": one["task"].replace("_", " "), "cited": "yes" if one["cited"] else "",
            "questions": f"{one['questions']:,}" + "†" * (not one["whole"]),
            "B": f"{one['breakthroughness']:.1f}" + (f" ({ends[0]:.1f} to {ends[1]:.1f})" if ends else ""),
            "smooth": f"{one['smooth_95']:.1f}", "power": f"{one['power']:.2f}", "p": f"{one['p']:.2g}",
            "linearity / step": f"{one['linearity_per_step']:.2f}", "above chance": sure,
        })  # fmt: skip
    return pandas.DataFrame(rows)


def _luck_rows(by_luck: pandas.DataFrame) -> pandas.DataFrame:
    import pandas

    return pandas.DataFrame([
        {"distance": f"{one['delta']:g}"} | {
            f"{side} chance": "{} ({:.1f}; {} to {})".format(*(one[side + of] for of in COUNTED))
            for side in ("above", "below")
        }
        for one in by_luck.to_dict("records")
    ])  # fmt: skip


def _remark_rows(table: pandas.DataFrame) -> pandas.DataFrame:
    """Tasks by what was found; numbers in a remark differ from task to task and are left out."""
    import pandas

    kinds = [
        "a threshold" if found == found else remark.partition(" (")[0].partition(" by ")[0]
        for found, remark in zip(table["threshold"], table["threshold_remark"], strict=True)
    ]
    counted = pandas.Series(kinds).value_counts()
    return pandas.DataFrame({"what": counted.index, "tasks": [str(n) for n in counted]})


OTHERS = 5  # tasks that are not cited, in the table
COUNTED = ("", "_by_luck", "_low", "_high")
CITED, OTHER, LUCK = "#b3402a", "0.55", "#3b6ea5"


def draw(table: Any, by_luck: pandas.DataFrame, path: Path) -> list[Path]:
    """B of all tasks beside its nulls; tasks far from chance beside luck; the thresholds that were found."""
    import matplotlib.pyplot as plt

    from analysis.plots import STYLE, save

    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(13.5, 4.6), width_ratios=[1.15, 0.85, 1.1], layout="constrained")
        _draw_b(axes[0], table)
        _draw_luck(axes[1], by_luck)
        _draw_thresholds(axes[2], table[table["threshold"].notna()])
        saved = save(figure, path)
        plt.close(figure)
    return saved


def _draw_b(axes: Any, table: Any) -> None:
    import numpy as np

    table = table[table["breakthroughness"].notna()].sort_values("breakthroughness")
    rank_T, cited_T = np.arange(len(table)), table["cited"].to_numpy()
    smooth_T, b_T = table["smooth_95"].to_numpy(), table["breakthroughness"].to_numpy()
    axes.plot(rank_T, smooth_T, "_", ms=5, mew=1.1, color=LUCK, label="95 % of smooth curves are below")
    for kind, colour, words in ((~cited_T, OTHER, "other tasks"), (cited_T, CITED, "cited as emergent")):
        ends = [one or (b, b) for one, b in zip(table["breakthroughness_interval"], b_T, strict=True)]
        low_T, high_T = np.asarray(ends, float).T
        axes.vlines(rank_T[kind], low_T[kind], high_T[kind], color=colour, lw=1, alpha=0.45)
        axes.plot(rank_T[kind], b_T[kind], "o", ms=4, mec="white", mew=0.4, color=colour, label=words)
    axes.axhline(0, color="0.35", lw=0.8)
    axes.set_xticks([])
    axes.set_xlabel(f"the {len(table)} tasks, by B")
    axes.set_ylabel("breakthroughness B")
    axes.legend(loc="upper left")
    axes.set_title(f"{int(table['beyond_smooth'].sum())} of {len(table)} tasks are beyond smooth curves")


def _draw_luck(axes: Any, by_luck: pandas.DataFrame) -> None:
    import numpy as np

    place_D = np.arange(len(by_luck))
    for side, shift, colour in (("above", -0.2, CITED), ("below", 0.2, OTHER)):
        seen = by_luck[side].to_numpy()
        bars = axes.bar(place_D + shift, seen, 0.36, color=colour, alpha=0.85, label=f"{side} chance")
        axes.bar_label(bars, fontsize=8, padding=2)
        expected, low, high = (by_luck[f"{side}{of}"].to_numpy() for of in COUNTED[1:])
        away = np.clip([expected - low, high - expected], 0, None)
        axes.errorbar(place_D + shift - 0.12, expected, away, fmt="D", ms=4, color=LUCK, mec="white", mew=0.5,
                      elinewidth=1.4, capsize=3, label="by luck" if side == "above" else None)  # fmt: skip
    axes.set_xticks(place_D, [f"{delta:g}" for delta in by_luck["delta"]])
    axes.set_xlabel("distance from chance, at some size")
    axes.set_ylabel("tasks of 89")
    axes.legend()
    axes.grid(False, axis="x")
    axes.set_title("How many tasks luck would flag")


def _draw_thresholds(axes: Any, found: Any) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    from analysis.plots import short

    found = found.sort_values("threshold")
    low_x, high_x = 1e6, 1e12
    for at, one in enumerate(found.to_dict("records")):
        low, high = (_end(one["threshold_interval"][0], 0.0), _end(one["threshold_interval"][1], math.inf))
        colour = CITED if one["cited"] else "0.35"
        axes.plot([max(low, low_x), min(high, high_x)], [at, at], color=colour, lw=1.2, alpha=0.6)
        axes.plot(one["threshold"], at, "o", ms=5, mec="white", mew=0.5, color=colour)
    axes.axvline(1e11, color=LUCK, lw=1.2, ls=(0, (4, 1.5)))
    axes.text(1.15e11, -0.2, "1e11", color=LUCK, fontsize=8, va="bottom")
    axes.set_yticks(range(len(found)), [task.replace("_", " ") for task in found["task"]], fontsize=7)
    axes.set_xscale("log")
    axes.set_xlim(low_x, high_x)
    axes.xaxis.set_major_locator(LogLocator(numticks=7))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: short(value))
    axes.set_xlabel("parameters outside embeddings")
    axes.set_title("Thresholds of the tasks that have one")


PAPER = Paper(
    name="srivastava2022",
    title="BIG-bench's breakthroughs beside luck, noise and smooth curves, and where thresholds lie",
    source="Srivastava et al. 2022, Beyond the Imitation Game",
    claims=CLAIMS,
    takes={"smoke": "seconds", "laptop": "seconds"},
    run=run,
)
