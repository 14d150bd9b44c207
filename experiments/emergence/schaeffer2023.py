"""Does an ability appear suddenly because models change, or because of how they are graded?

Schaeffer et al. 2023 call emergent abilities a mirage of the metric. Say that cross-entropy falls as a power of model
size, CE(N) = (N / c)^alpha with alpha < 0. Then a single token is right with p = exp(-CE), which grows smoothly; but
"all L tokens are right" has p^L, which stays near 0 for long and then leaps, and leaps later and harder the longer the
answer. Grade the same outputs by a metric that is linear in single tokens and the leap is gone. Here is a family of
models where that must hold, and one where it must not, and a rule that has to tell them apart by their scores alone.

- chain: random bijections of 32 symbols, each with a name. A model of one layer learns to apply one named bijection to
  one symbol; at test its answers are read back, 8 times. All 8 are right if each single one is, so exact match is a
  product of skills by construction. Skills grow with width, which limits how many of the facts a model holds.
- control: models of two layers apply two bijections in one go, and only the final symbol is supervised; the symbol
  between is never shown. There are two names: one leaves all symbols, the other swaps each with its partner (which name
  is which, and who is whose partner, is random). Whoever ignores one name knows the pair that the answer is of, and has
  a coin for the rest. To know the pair is a table again, which grows smoothly; to compose is to know which of the pair.
  So the control is graded within the pair: cross-entropy is -log of the right symbol's share of the probability of both
  (a coin: ln 2), accuracy whether it is the likelier of the two (a coin: 1/2). On a GPU there are circles of 4, turned
  by 0 to 3 places: then the pair is the circle, and chance 1/4.

`analysis.mirage` holds the rule: two laws of the soft metric (cross-entropy), one smooth in N, one with two levels that
a run is on either of, with as many free numbers each; whichever is likelier by a factor of 20. It calls a mirage what
is smooth where the hard metric leaps and single answers explain it, and a jump what has two levels. It is tried on the
whole family, and on each seed's own curve, which is what the claims count.

How well the macroscopic score follows from microscopic ones is put to the test where it is not so by construction: on
chains that iterate a single bijection. Frequent bijections are known and rare ones are not, so that answers of a chain
are right together; exact match then lies above the product of accuracies. That excess is dependence between answers,
not an ability of its own.

What is graded. Single answers: cross-entropy, probability, Brier score and accuracy over 32 symbols (in the chain, to
true symbols, as a teacher would ask); and grade and probability among 4 of them, the right one and 3 others. Chains, on
the model's own answers: exact match, and the edit distance (Levenshtein) to the right ones, Hamming's beside it. An
error is carried on, so that even these fall faster than answers err.

Each model is trained twice, for n steps and n / 2, both with their rate decayed to 0 (schedule wsd: they share the
first part). A threshold in size that moves with the length of training is one of compute, or of patience.

A seed of which a run diverged is left out of its family, and the claims on it are then open.

Settings were chosen on seeds from 100 on. The control is the third. A first one (one layer, rate 1e-2, seeds 0 to 4)
rose and fell again. A second (two layers, eight widths, seeds 5 to 9) was graded among all 32 symbols, where most of
the rise was that of the pairs: the rule called all seeds smooth; within the pair, 2 of 5 a jump. So it was known that a
threshold lies about width 3 when the third was made, which has each width with a thin MLP and a full one, to give a
seed's curve more points on both sides: on seeds 100 to 102 all are a coin at width 2, none at width 6, and the rule
called the three together a jump, alone undecided twice and smooth once. It is reported on seeds 10 to 14, where some
seeds know the pair's order at width 3 with a thin MLP, so that the rule calls these "already there": it asks that the
smallest third of the sizes be near chance. That no seed is called a mirage became a claim after that had been seen, and
the rule was then changed so that it can: one answer counts as a chain of one, and a hard metric has to be a fifth
steeper than the soft one. Thresholds in the MLP alone were not found: models of width 3 mostly stayed a coin with
hidden widths from 1 to 24; those of one layer and width 8 were between a coin and knowing with 1 to 48. Nor is it size
alone that decides: of two seeds of one size one knows and one has a coin, and some learn the pairs one after the other,
so that there are levels between. The rule itself is checked on planted data, where no mirage is called a jump, and no
jump a mirage. What it asks before it speaks (a hard metric near chance at the small scales and high at the large ones)
was loosened twice after the scatter of the first two controls had been seen.

Letters: S seeds, M sizes, L answers of a chain, K bijections, V symbols.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from experiments.claims import Claim, Measured, over_seeds, share_of, spoken
from experiments.emergence.skill_figure import draw
from experiments.emergence.skill_runs import (
    CHAIN,
    CONTROL,
    LONGEST,
    METRICS,
    Family,
    Size,
    grade,
    train,
    without_diverged,
)
from experiments.registry import Job, Outcome, Paper

if TYPE_CHECKING:
    import numpy
    import pandas

    from analysis.mirage import Diagnosis

SCHAEFFER = "Schaeffer et al. 2023"
LEVEL = 0.9


def _claim(
    id: str, statement: str, source: str, expected: float, margin: float, row: int, unit: str = "1", least: float = 0.0,
    most: float = 1.0,
) -> Claim:  # fmt: skip
    return Claim(id, statement, source, expected, margin, unit, "toy_analogue", LEVEL, row, (least, most))


CLAIMS = (
    _claim("mirage", "chain: the rule, given one seed's scores, calls the rise of exact match a mirage: share of seeds",
           SCHAEFFER, 1.0, 0.4, 16),
    _claim("no_mirage", "control, within the pair: the rule, given one seed's scores, calls the rise a mirage: "
           "share of seeds", "ours: not every leap is the metric's", 0.0, 0.4, 16),
    _claim("control", "control, within the pair: the rule, given one seed's scores, says that the model jumps: share "
           "of seeds", "ours: not every leap is the metric's", 1.0, 0.4, 16),
    # A leap: more than half of the way between two neighbouring sizes.
    _claim("soft", "chain under cross-entropy: largest step between two neighbouring sizes, share of the whole way "
           "(up to .5: no leap)", f"{SCHAEFFER}, section 2", 0.25, 0.25, 11),
    _claim("hard", "chain under exact match of 8: the same (from .5: a leap)", f"{SCHAEFFER}, section 2", 0.75, 0.25,
           11),
    _claim("jump", "control, cross-entropy within the pair: the same (from .5: a leap)", "ours", 0.75, 0.25, 11),
    _claim("closed_form", "chain: share of the variance of exact match over sizes that exp(-8 CE) explains (R2)",
           f"{SCHAEFFER}, section 2", 1.0, 0.1, 16, least=-math.inf),
    _claim("micro", "one bijection iterated 8 times: share of the variance of exact match over sizes that the product "
           "of single accuracies explains (R2)", "common statement: macroscopic scores follow from microscopic ones",
           1.0, 0.1, 19, least=-math.inf),
    _claim("settled_chain", "chain: by how much twice the training moves the size at which exact match is halfway",
           "common statement: a critical model size", 0.0, 0.5, 11, "log2 N", -math.inf, math.inf),
    _claim("settled_control", "control: by how much twice the training moves the size at which accuracy within the "
           "pair is halfway", "common statement: a critical model size", 0.0, 0.5, 11, "log2 N", -math.inf, math.inf),
)  # fmt: skip


WIDTHS = tuple(round(8 * 2 ** (e / 2)) for e in range(13))  # on a GPU: 8 to 512
SIZES = {
    "smoke": Size({CHAIN: Family(8, 1, None, 0.5, 1, (2, 4, 6, 8, 12), 40, 16, 1e-2),
                   CONTROL: Family(2, 2, 2, 0.0, 1, (2, 4, 6, 8, 12), 40, 16, 1e-2)}, seeds=2, chains=64),
    "laptop": Size({CHAIN: Family(64, 1, None, 0.5, 1, (3, 4, 6, 8, 11, 15, 20, 27, 36, 48), 3000, 256, 1e-2),
                    CONTROL: Family(2, 2, 2, 0.0, 2, (2, 3, 4, 6, 8), 3000, 256, 5e-3, first=10, mlps=(1, 4))},
                   seeds=5, chains=4096),
    "paper": Size({CHAIN: Family(4096, 1, None, 0.5, 1, WIDTHS, 100_000, 4096, 3e-3),
                   CONTROL: Family(4, 3, 4, 0.0, 2, WIDTHS, 100_000, 4096, 3e-3)}, seeds=16, chains=16384),
}  # fmt: skip


# --- what they say -------------------------------------------------------------------------------------------------


def diagnoses(scored: Any, family: str) -> tuple[Diagnosis, list[Diagnosis]]:
    """The rule on all runs of a family, and on each seed's own."""
    import numpy as np

    from analysis import mirage

    def one(rows: Any) -> Diagnosis:
        if family == CHAIN:
            return mirage.diagnose(rows["N"], -rows["ce"], rows["exact"], rows["product"])
        # One answer is a chain of one: what single answers predict is its probability.
        p, chance = np.exp(-rows["ce"]), 1 / rows["among"].iloc[0]
        return mirage.diagnose(rows["N"], -rows["ce"], rows["accuracy"], p, chance=chance)

    mine = scored[scored["family"] == family]
    return one(mine), [one(rows) for _, rows in mine.groupby("seed")]


def by_seed(scored: Any, family: str, column: str) -> numpy.ndarray:
    """[S, M], sizes rising."""
    mine = scored[scored["family"] == family]
    return mine.pivot_table(index="seed", columns="N", values=column).to_numpy()


def largest_step(score_SxM: numpy.ndarray) -> numpy.ndarray:
    """By seed, of the way between the worst and the best score, how much is gone between two neighbouring sizes; NaN
    where the score is the same at all.
    """
    import numpy as np

    way_S = np.ptp(score_SxM, axis=1)
    return np.diff(score_SxM, axis=1).max(axis=1) / np.where(way_S > 0, way_S, np.nan)


def halfway(size_M: numpy.ndarray, score_SxM: numpy.ndarray, chance: float) -> numpy.ndarray:
    """By seed, log2 of the size at which a logistic curve through the scores is halfway from chance to its ceiling; NaN
    where that is not within the sizes, or the best score is not even half of what is possible above chance.
    """
    import numpy as np

    from analysis.thresholds import fit_curves

    u_M = np.log(size_M)
    place_S = fit_curves(u_M, score_SxM, 1.0, chance=chance, highest=1.0).place_R
    there_S = (place_S > u_M[0]) & (place_S < u_M[-1]) & (score_SxM.max(axis=1) > chance + (1 - chance) / 2)
    return np.where(there_S, place_S / math.log(2), np.nan)


def moved(runs: Any, family: str) -> numpy.ndarray:
    """By seed, how far twice the training moves the size at which the hard metric (column `hard`, with its chance) is
    halfway, in log2 N.
    """
    import numpy as np

    mine = runs[runs["family"] == family]
    sizes = np.sort(mine["N"].unique()).astype(float)
    short_S, long_S = (
        halfway(sizes, rows.pivot_table(index="seed", columns="N", values="hard").to_numpy(), rows["chance"].iloc[0])
        for _, rows in mine.groupby("longer")
    )
    return long_S - short_S


def measure(scored: Any, runs: Any, lost: Mapping[str, int]) -> dict[str, Measured]:
    """Each claim's value and its interval over seeds. lost: by family, how many seeds are left out."""
    import numpy as np

    from analysis.mirage import r_squared

    def of_all(value_S: numpy.ndarray, what: str) -> Measured:
        flat = int(np.isnan(value_S).sum())
        if flat:
            remark = f"{what} is the same at all sizes for {flat} of {len(value_S)} seeds"
            return Measured(math.nan, -math.inf, math.inf, len(value_S), remark)
        return over_seeds(value_S, LEVEL)

    def steps(family: str, column: str, what: str, sign: float = 1.0) -> Measured:
        return of_all(largest_step(sign * by_seed(scored, family, column)), what)

    def explained(observed: str, predicted: str) -> Measured:
        pairs = zip(by_seed(scored, CHAIN, observed), by_seed(scored, CHAIN, predicted), strict=True)
        return of_all(np.asarray([r_squared(*pair) for pair in pairs]), "exact match")

    def settled(family: str) -> Measured:
        moved_S = moved(runs, family)
        known_S = moved_S[np.isfinite(moved_S)]
        remark = "" if len(known_S) == len(moved_S) else (
            f"{len(moved_S) - len(known_S)} of {len(moved_S)} seeds are halfway at none of the sizes after one of the "
            "trainings")  # fmt: skip
        if not len(known_S):
            return Measured(math.nan, -math.inf, math.inf, len(moved_S), remark)
        return over_seeds(known_S, LEVEL, remark)

    told = {family: [each.verdict for each in diagnoses(scored, family)[1]] for family in (CHAIN, CONTROL)}
    found = {
        "mirage": share_of(told[CHAIN].count("mirage"), len(told[CHAIN]), LEVEL),
        "no_mirage": share_of(told[CONTROL].count("mirage"), len(told[CONTROL]), LEVEL),
        "control": share_of(told[CONTROL].count("jump"), len(told[CONTROL]), LEVEL),
        "soft": steps(CHAIN, "ce", "cross-entropy", -1.0),
        "hard": steps(CHAIN, "exact", "exact match"),
        "jump": steps(CONTROL, "ce", "cross-entropy", -1.0),
        "closed_form": explained("exact", "closed"),
        "micro": explained("iterated_exact", "iterated_product"),
        "settled_chain": settled(CHAIN),
        "settled_control": settled(CONTROL),
    }
    family_of = {
        name: CONTROL if name in ("no_mirage", "control", "jump", "settled_control") else CHAIN for name in found
    }
    said = {
        family: f"seeds of the {family} left out: {count}, as a run diverged" for family, count in lost.items() if count
    }
    return {
        name: replace(each, remark="; ".join(filter(None, (said.get(family_of[name], ""), each.remark))))
        for name, each in found.items()
    }


SUMMARY = [
    *("run_id", "family", "N", "seed", "model.d_model", "train.steps", "status", "final_loss", "final_accuracy"),
    *("final_exact_8", "wall_seconds", "code_version"),
]


def with_hard_metric(runs: Any, graded: Any) -> pandas.DataFrame:
    """The runs with columns hard (exact match of 8; in the control accuracy within the pair) and chance."""
    import numpy as np

    by_run = graded.set_index("run_id")
    is_chain, ids = (runs["family"] == CHAIN).to_numpy(), runs["run_id"]
    within, among = (by_run[column].reindex(ids).to_numpy() for column in ("accuracy", "among"))
    return runs.assign(
        hard=np.where(is_chain, runs[f"final_exact_{LONGEST}"], within), chance=np.where(is_chain, 0.0, 1 / among)
    )


def run(job: Job) -> Outcome:
    """Trains, grades, measures, draws."""
    from jaxgpt.tasks.chains import SYMBOLS

    size = SIZES[job.scale]
    trained = train(job, size)
    runs, lost = without_diverged(trained)
    graded = grade(job, size, runs)
    runs = with_hard_metric(runs, graded)
    scored = graded[graded["longer"]]
    told = {family: diagnoses(scored, family) for family in size.families}
    extra = graded.drop(columns=["family", "N", "seed", "longer", "among"])
    pair = int(scored.loc[scored["family"] == CONTROL, "among"].iloc[0])
    left_out = "".join(f"; of the {family} {n} are left out, as a run diverged" for family, n in lost.items() if n)
    return Outcome(
        measured=measure(scored, runs, lost),
        summary=trained.reindex(columns=SUMMARY).merge(extra, on="run_id", how="left"),
        tables=(
            (f"What the rule says. {size.seeds} seeds{left_out}. evidence: log-likelihood of the smooth law minus that "
             "of two levels, nats. N90 / N10: of the smooth law, from a tenth of the way to nine tenths, beside the "
             "ratio of the two sizes around its middle. leap: how many times as steep as a straight rise the hard "
             "metric is. R2: share of exact match's variance that the product of accuracies explains",
             verdict_table(told)),
            ("Metrics on the same outputs, means over seeds; of the control within the pair. B: breakthroughness, "
             "linearity: 1 for a straight line (Srivastava et al. 2022); B of a straight line is "
             f"{size.families[CHAIN].sizes - 1} in the chain, {size.families[CONTROL].sizes - 1} in the control. "
             "largest step: between two neighbouring sizes, of the whole way", metric_table(scored)),
            (f"chain: exact match of {LONGEST} answers beside what single answers predict, {LEVEL:.0%} intervals over "
             "seeds. iterated: one bijection 8 times, where answers depend on each other; excess: of its exact match "
             "over its product of accuracies", chain_table(scored)),
            (f"control: each seed's accuracy within the pair (a guess: {1 / pair:.2f}) and cross-entropy within it (a "
             f"guess: {math.log(pair):.2f}); pair: mean cross-entropy of the pair itself (a guess: "
             f"{math.log(SYMBOLS / pair):.2f} nats)", control_table(scored)),
        ),
        figures=tuple(draw(scored, told, job.figure)),
        seconds_training=sum(trained["wall_seconds"]),
        device=trained["device"].iloc[0],
    )  # fmt: skip


# --- tables --------------------------------------------------------------------------------------------------------


def metric_table(scored: Any) -> pandas.DataFrame:
    """One line per family and metric: at the smallest size, in the middle, at the largest; how suddenly it moves."""
    import numpy as np
    import pandas

    from analysis import emergence

    lines = []
    for family in (CHAIN, CONTROL):
        sizes = np.sort(scored.loc[scored["family"] == family, "N"].unique())
        for column, sign, _, _, name in METRICS:
            if scored.loc[scored["family"] == family, column].isna().all():  # not of this family
                continue
            score_SxM = by_seed(scored, family, column)
            mean_M = score_SxM.mean(axis=0)
            b = emergence.breakthroughness(sizes, sign * mean_M).value
            step = float(largest_step(sign * score_SxM).mean())
            straight = emergence.linearity(sizes, sign * mean_M).per_step
            lines.append({
                "family": family, "metric": name, "smallest": f"{mean_M[0]:z.3f}",
                "middle": f"{mean_M[len(mean_M) // 2]:z.3f}", "largest": f"{mean_M[-1]:z.3f}",
                "B": "not usable" if b is None else f"{b:z.1f}",
                "linearity": "none" if straight is None else f"{straight:z.2f}",
                "largest step": "none" if math.isnan(step) else f"{step:.0%}",
            })  # fmt: skip
    return pandas.DataFrame(lines)


def verdict_table(told: Mapping[str, tuple[Diagnosis, list[Diagnosis]]]) -> pandas.DataFrame:
    """One line per family."""
    import pandas

    return pandas.DataFrame(
        {
            "family": family, "evidence": f"{whole.soft.evidence:z.0f}",
            "N90 / N10": f"{whole.soft.width:.1f}", "sizes there": f"{whole.soft.gap:.1f}",
            "leap": "flat" if math.isnan(whole.leap) else f"{whole.leap:z.1f}",
            "R2": "-" if family == CONTROL or math.isnan(whole.r2) else f"{whole.r2:z.2f}",
            "verdict": whole.verdict, "because": whole.reason,
            "seeds alone": ", ".join(each.verdict for each in seeds),
        }
        for family, (whole, seeds) in told.items()
    )  # fmt: skip


def chain_table(scored: Any) -> pandas.DataFrame:
    """One line per size."""
    import pandas

    def cell(rows: Any, column: str) -> str:
        return spoken(rows[column].to_numpy(), LEVEL, "z.2f", (-1, 1) if column == "iterated_gap" else (0, 1))

    return pandas.DataFrame(
        {
            "N": n, "exact match": cell(rows, "exact"), "product of accuracies": f"{rows['product'].mean():.2f}",
            "exp(-8 CE)": f"{rows['closed'].mean():.2f}", "iterated: exact match": cell(rows, "iterated_exact"),
            "product": f"{rows['iterated_product'].mean():.2f}", "excess": cell(rows, "iterated_gap"),
        }
        for n, rows in scored[scored["family"] == CHAIN].groupby("N")
    )  # fmt: skip


def control_table(scored: Any) -> pandas.DataFrame:
    """One line per size: every seed, and whether they are one group or two."""
    import pandas

    from analysis.modes import modes

    def groups(rows: Any) -> str:
        found = modes(rows["accuracy"])
        return {1: "one", 2: "two", None: "open"}[found.groups]

    return pandas.DataFrame(
        {
            "N": n, "accuracy": " ".join(f"{x:.2f}" for x in sorted(rows["accuracy"])),
            "cross-entropy": " ".join(f"{x:z.2f}" for x in sorted(rows["ce"], reverse=True)),
            "pair": f"{rows['circle_ce'].mean():z.2f}", "groups of seeds": groups(rows),
        }
        for n, rows in scored[scored["family"] == CONTROL].groupby("N")
    )  # fmt: skip


PAPER = Paper(
    name="schaeffer2023",
    title="A mirage of the metric, or a jump of the model: told apart by their scores",
    source=f"{SCHAEFFER}, Are Emergent Abilities of Large Language Models a Mirage?",
    claims=CLAIMS,
    takes={
        "smoke": "a minute, most of it compiling",
        "laptop": "about 4 minutes on 2 CPU cores",
        "paper": "for a GPU; not yet run",
    },
    run=run,
)
