"""Porian et al. 2024: what takes Kaplan's exponent to Hoffmann's, corrected one by one on the shared sweep.

Kaplan et al. 2020 counted N and C without the last layer, warmed all models up for the same long time and trained them
at one learning rate, without a decay that ends with the budget. Each of these is undone in turn, and the exponent a of
the best N ~ C^a measured by IsoFLOP parabolas. (They use Akima's interpolation: on losses as scattered as those of our
few and small models that would quadruple the error of a.) Losses without a decay are read from the curves of the trunks
of isoflop.py. Their compute spans more than three decades, ours one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from experiments.claims import Claim, Measured
from experiments.registry import Job, Outcome, Paper
from experiments.scaling import isoflop
from experiments.scaling.isoflop import DECAY, LEVEL, Size, Table

if TYPE_CHECKING:
    from pathlib import Path

    import numpy

    from jaxgpt.config import RunConfig

PORIAN = "Porian et al. 2024"
LEAST = 3  # budgets with a lowest loss between the smallest and the largest size
LOST = 0.2  # more bootstraps with fewer, and the others are too good a choice


@dataclass(frozen=True)
class Step:
    """One way to measure a: which runs, whether at the end of their decay, and what counts as N and C.

    printed: the paper's a on RefinedWeb and on OpenWebText2, or none.
    """

    label: str
    runs: str  # long: long warm-up, one rate; fixed: one rate; tuned: a rate for each size
    decayed: bool
    counted: str  # kaplan: no embeddings, no last layer; head: with the last layer; exact: and C with attention
    printed: tuple[float, float] | None = None


# The paper's table 1. Its step `decay` is a cosine cut to each budget; before it stands a cosine far longer than any.
STEPS = {
    "kaplan": Step("as Kaplan et al.", "long", False, "kaplan", (0.835, 0.864)),
    "head": Step("count the last layer", "long", False, "head", (0.706, 0.699)),
    "warmup": Step("short warm-up", "fixed", False, "head", (0.602, 0.603)),
    "decay": Step("decay to each budget", "fixed", True, "head", (0.571, 0.574)),
    "tuned": Step("a rate for each size, no decay", "tuned", False, "head", (0.497, 0.518)),
    "both": Step("a rate for each size, decay", "tuned", True, "head"),
    "exact": Step("the same, C with attention", "tuned", True, "exact"),
}
CHANGES = {"head": "kaplan", "warmup": "head", "decay": "warmup", "tuned": "warmup"}  # step -> the one before it


def _printed(step: str) -> float:
    """The mean of the paper's two corpora."""
    return sum(STEPS[step].printed or ()) / 2


def _change(step: str, statement: str, margin: float | None = None) -> Claim:
    expected = round(_printed(step) - _printed(CHANGES[step]), 3)
    # So the sign is claimed, and the size within a factor of about 2.
    margin = round(abs(expected) / 2, 3) if margin is None else margin
    source = f"{PORIAN}, table 1"
    return Claim(f"change_{step}", statement, source, expected, margin, "1", "toy_analogue", LEVEL, 4)


CLAIMS = (
    Claim("a_kaplan", "counted, warmed up and rated as by Kaplan et al., the best size grows as C^a",
          f"{PORIAN}, table 1", _printed("kaplan"), 0.1, "1", "toy_analogue", LEVEL, 4),
    _change("head", "counting the last layer in N and C lowers a: change"),
    _change("warmup", "a short warm-up instead of a long one lowers a: change"),
    _change("decay", "a decay that ends with each budget hardly changes a: change", 0.05),
    _change("tuned", "a learning rate for each size instead of one for all lowers a: change"),
    Claim("a_tuned", "with all corrections and no decay the best size grows as C^a", f"{PORIAN}, table 1",
          _printed("tuned"), 0.1, "1", "toy_analogue", LEVEL, 3),
)  # fmt: skip


# --- the runs ------------------------------------------------------------------------------------------------------


def fixed_rate(size: Size) -> float:
    """One rate for all sizes: the rule's for the largest, as the paper's suits its largest models."""
    return isoflop.rate(size.models[-1][0])


def fixed_configs(size: Size) -> list[RunConfig]:
    """Every size at each of its budgets, at one rate."""
    return [
        isoflop.config(size, width, budget, seed, fixed_rate(size))
        for seed in range(size.other_seeds)
        for width, first, last in size.models
        for budget in range(first, last + 1)
    ]


def long_configs(size: Size) -> list[RunConfig]:
    """Every size, at one rate after a long warm-up, without a decay: as long as the trunk of its longest run."""
    found = []
    for width, _, last in size.models:
        steps = round((1 - DECAY) * isoflop.config(size, width, last, 0, 1.0).train.steps)
        changed = {
            "train.steps": steps,
            "optimizer.final_fraction": 1.0,
            "optimizer.warmup_steps": size.long_warmup,
        }
        found += [
            isoflop.config(size, width, last, seed, fixed_rate(size), changed) for seed in range(size.other_seeds)
        ]
    return found


def sweeps(runs: Table, size: Size) -> dict[str, Table]:
    """The runs by what `Step.runs` calls them."""
    import numpy as np

    constant = runs["optimizer.final_fraction"] == 1.0
    tuned = np.isclose(runs["factor"], 1.0)
    one_rate = np.isclose(runs["optimizer.learning_rate"], fixed_rate(size))
    return {
        "long": runs[constant].reset_index(drop=True),
        "fixed": runs[one_rate & ~constant & (runs["train.seed"] < size.other_seeds)].reset_index(drop=True),
        "tuned": runs[tuned & ~constant].reset_index(drop=True),
    }


# --- losses at equal compute ---------------------------------------------------------------------------------------


def counts(runs: Table, counted: str) -> tuple[Table, Table]:
    """N of each run, and the FLOPs of a token, in a way of counting that `Step.counted` names."""
    n = runs["params_non_embedding"].astype(float)
    if counted != "kaplan":
        n = n + runs["model.vocab_size"] * runs["model.d_model"]
    return n, runs["flops_exact"] / runs["tokens"] if counted == "exact" else 6.0 * n


COLUMNS = ["trunk", "model.d_model", "train.seed", "N", "per_token", "D", "loss"]


def points(runs: Table, curves: Table, step: Step) -> Table:
    """COLUMNS of the losses that a step looks at: ends of decays, or what a trunk's longest run had before its own."""
    n, per_token = counts(runs, step.counted)
    runs = runs.assign(N=n, per_token=per_token)
    if step.decayed:
        return runs[COLUMNS]
    longest = runs.loc[runs.groupby("trunk")["D"].idxmax()].drop(columns=["D", "loss"])
    seen = curves.dropna(subset=["validation_loss"])[["run_id", "step", "validation_loss"]]
    joined = longest.merge(seen, on="run_id").rename(columns={"validation_loss": "loss"})
    decays = joined["optimizer.final_fraction"] < 1
    # From where the shortest run would begin its decay: before that all models are best as small as can be.
    inside = joined["step"] >= 2 * joined["train.eval_every"]
    joined = joined[inside & (~decays | (joined["step"] <= (1 - DECAY) * joined["train.steps"]))]
    return joined.assign(D=joined["step"] * joined["train.batch_size"] * joined["model.context"])[COLUMNS]


# --- the exponent and its error ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """A step's optima C (FLOPs) and N, each of shape (K,), its exponent a, and bootstraps of it, of shape (B,)."""

    c: numpy.ndarray
    n: numpy.ndarray
    a: float
    sample: numpy.ndarray
    remark: str


def optima(table: Table, loss_M: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
    """C and N, each of shape (K,), of the budgets with a lowest loss between the smallest and the largest size.

    table: N, C, budget of each loss (M,). Seeds are averaged.
    """
    import numpy as np

    from analysis.approaches import parabola_minimum
    from analysis.fit import FitError

    found = []
    log_n_M, c_M, budget_M = np.log(table["N"].to_numpy(float)), table["C"].to_numpy(float), table["budget"].to_numpy()
    for budget in np.unique(budget_M):
        mine_M = budget_M == budget
        try:
            best = parabola_minimum(log_n_M[mine_M], loss_M[mine_M], np.ones(mine_M.sum()))
        except FitError:
            continue
        found.append((c_M[mine_M][0], np.exp(best)))
    c_K, n_K = np.asarray(found).reshape(-1, 2).T
    return c_K, n_K


def slope(c_K: numpy.ndarray, n_K: numpy.ndarray) -> float:
    """a of N ~ C^a; NaN for fewer than 2 optima."""
    import numpy as np

    return float(np.polyfit(np.log(c_K), np.log(n_K), 1)[0]) if len(c_K) > 1 else math.nan


def residuals(table: Table, budgets: int) -> numpy.ndarray:
    """(R, K) log losses of each trunk minus the mean over the seeds of its size, made as large as single runs scatter.

    Beyond a trunk's own budgets its nearest residual stands. Empty where no size has two seeds.
    """
    import numpy as np

    table = table.assign(log=np.log(table["loss"]))
    found = []
    for _, mine in table.groupby("N"):
        by_seed = mine.pivot_table(index="trunk", columns="budget", values="log").dropna(axis=1)
        seeds = len(by_seed)
        if seeds < 2 or not by_seed.shape[1]:
            continue
        apart = (by_seed - by_seed.mean()) * math.sqrt(seeds / (seeds - 1))
        at = by_seed.columns.to_numpy(float)
        found += [np.interp(np.arange(budgets), at, row) for row in apart.to_numpy()]
    return np.asarray(found).reshape(-1, budgets)


def measure(runs: Mapping[str, Table], curves: Table, size: Size) -> dict[str, Found]:
    """a of every step, with bootstraps.

    A bootstrap adds to the losses of each trunk the residuals of a random one of the tuned sweep, with a random sign:
    losses that share a trunk err together. Steps that look at the same runs are given the residuals of the same trunks,
    so that what they share does not count in their difference.
    """
    import numpy as np

    def losses(kind: str, step: Step) -> Table:
        return isoflop.at_equal_compute(points(runs[kind], curves, step), len(size.budgets))

    drawn, found = {}, {}
    for i, (kind, table) in enumerate(runs.items()):
        rng, shape = np.random.default_rng([0, i]), (size.bootstraps, table["trunk"].nunique())
        drawn[kind] = rng.random(shape), rng.choice([-1.0, 1.0], shape)
    for name, step in STEPS.items():
        table, noise_RxK = losses(step.runs, step), residuals(losses("tuned", step), len(size.budgets))
        loss_M, budget_M = table["loss"].to_numpy(float), table["budget"].to_numpy()
        trunk_M = table["trunk"].map({t: j for j, t in enumerate(runs[step.runs]["trunk"].unique())}).to_numpy()
        c_K, n_K = optima(table, loss_M)
        sample = []
        for which_T, sign_T in zip(*drawn[step.runs], strict=True) if len(noise_RxK) else ():
            donor_M = (which_T * len(noise_RxK)).astype(int)[trunk_M]
            again = optima(table, loss_M * np.exp(sign_T[trunk_M] * noise_RxK[donor_M, budget_M]))
            sample.append(slope(*again) if len(again[0]) >= LEAST else math.nan)
        found[name] = Found(c_K, n_K, slope(c_K, n_K), np.asarray(sample), _remark(len(c_K), np.isnan(sample)))
    return found


def _remark(budgets: int, lost_B: numpy.ndarray) -> str:
    if budgets < LEAST:
        return f"only {budgets} budgets have their lowest loss inside the range of sizes; {LEAST} are needed"
    if not len(lost_B):
        return "one seed tells no scatter"
    return f"{lost_B.mean():.0%} of the bootstraps have fewer than {LEAST} budgets" if lost_B.mean() > LOST else ""


def interval(sample_B: numpy.ndarray) -> tuple[float, float]:
    """Ends of the central interval of the bootstraps that have a number."""
    import numpy as np

    kept = sample_B[np.isfinite(sample_B)]
    low, high = np.quantile(kept, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if len(kept) else (math.nan, math.nan)
    return float(low), float(high)


def claims_of(found: Mapping[str, Found], seeds: int) -> dict[str, Measured]:
    """Each claim's value, and its interval over bootstraps."""
    ends = {
        f"a_{name}": Measured(found[name].a, *interval(found[name].sample), seeds, found[name].remark)
        for name in ("kaplan", "tuned")
    }
    changes = {
        f"change_{name}": Measured(
            found[name].a - found[before].a,
            *interval(found[name].sample - found[before].sample),
            seeds,
            found[name].remark or found[before].remark,
        )
        for name, before in CHANGES.items()
    }
    return ends | changes


# --- from the runs to the figure -----------------------------------------------------------------------------------


def run(job: Job) -> Outcome:
    """Trains, corrects step by step, draws."""
    from jaxgpt import load

    size = isoflop.SIZES[job.scale]
    wanted = [*isoflop.grid(size, seeds=range(size.seeds)), *fixed_configs(size), *long_configs(size)]
    runs = isoflop.train(job, wanted)
    found = measure(sweeps(runs, size), load(isoflop.folder(job))[1], size)
    return Outcome(
        measured=claims_of(found, size.other_seeds),
        summary=runs.reindex(columns=[*isoflop.SUMMARY, "optimizer.final_fraction"]),
        tables=(
            (f"a of best N ~ C^a after each correction, {LEVEL:.0%} interval, and in {PORIAN}", step_table(found)),
        ),
        figures=tuple(draw(found, job.figure)),
        numbers={"steps": {name: {"a": one.a, "interval": interval(one.sample), "C": one.c.tolist(),
                                  "N": one.n.tolist()} for name, one in found.items()}},
        seconds_training=sum(runs["wall_seconds"]),
        device=runs["device"].iloc[0],
        corpus_sha256=runs["corpus_sha256"].iloc[0],
    )  # fmt: skip


def step_table(found: Mapping[str, Found]) -> Table:
    """What each step gives, as text."""
    import pandas

    def cells(name: str, one: Found) -> dict[str, str]:
        low, high = interval(one.sample)
        printed = STEPS[name].printed
        return {
            "step": STEPS[name].label,
            "a": "–" if math.isnan(one.a) else f"{one.a:.3f}" + f" ({low:.3f} to {high:.3f})" * math.isfinite(low),
            "RefinedWeb": f"{printed[0]:.3f}" if printed else "–",
            "OpenWebText2": f"{printed[1]:.3f}" if printed else "–",
            "budgets": str(len(one.c)),
            "remark": one.remark,
        }

    return pandas.DataFrame(cells(name, one) for name, one in found.items())


# --- the figure ----------------------------------------------------------------------------------------------------


def draw(found: Mapping[str, Found], path_stem: Path) -> list[Path]:
    """Best N over compute at each step, and the exponents beside the paper's; writes PNG and SVG."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from analysis import plots

    with mpl.rc_context(plots.STYLE):
        figure = Figure(figsize=(11.5, 4.6), layout="constrained")
        lines, ladder = figure.subplots(1, 2, width_ratios=(1, 1.15))
        _draw_optima(lines, found)
        _draw_ladder(ladder, found)
        return plots.save(figure, path_stem)


def _draw_optima(axes: Any, found: Mapping[str, Found]) -> None:
    """The best size of each budget and the straight line through them, by step."""
    import numpy as np
    from matplotlib.ticker import NullFormatter

    from analysis import plots

    styles = plots.size_styles(range(len(STEPS)))
    for (name, one), (colour, marker) in zip(found.items(), styles.values(), strict=True):
        label = f"{STEPS[name].label}: a = {one.a:.2f}"
        axes.plot(one.c, one.n, ls="", marker=marker, color=colour, ms=6, mec="white", mew=0.6, label=label)
        if len(one.c) > 1:
            axes.plot(one.c, np.exp(np.polyval(np.polyfit(np.log(one.c), np.log(one.n), 1), np.log(one.c))),
                      color=colour, lw=1.2)  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: plots.short(value))
    axes.yaxis.set_minor_formatter(lambda value, _: plots.short(value) if str(value)[0] in "25" else "")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("training compute C, as each step counts it (FLOPs)")
    axes.set_ylabel("best N, as each step counts it")
    axes.set_title("The best size at equal compute")
    axes.legend(fontsize=7.5)


def _draw_ladder(axes: Any, found: Mapping[str, Found]) -> None:
    """a by step, with its interval, beside the paper's two."""
    names = list(found)[::-1]
    for y, name in enumerate(names):
        one, printed = found[name], STEPS[name].printed
        low, high = interval(one.sample)
        if math.isfinite(one.a) and math.isfinite(low):
            axes.plot([low, high], [y, y], color="#1f5a8f", lw=1.6)
        axes.plot(one.a, y, marker="o", color="#1f5a8f", ms=6, ls="", label="ours" if not y else None)
        for value, marker, corpus in zip(printed or (), "Ds", ("RefinedWeb", "OpenWebText2"), strict=False):
            label = f"{PORIAN}, {corpus}" if name == "kaplan" else None
            axes.plot(value, y + 0.2, marker=marker, color="#c2571a", ms=5, mfc="none", ls="", label=label)
    axes.set_yticks(range(len(names)), [STEPS[name].label for name in names])
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.set_xlabel("a, in best N ~ C^a")
    axes.set_title("Exponent after each correction")
    axes.legend(loc="lower right", fontsize=7.5)


PAPER = Paper(
    name="porian2024",
    title="From Kaplan's exponent to Chinchilla's: last layer, warm-up, decay, learning rate",
    source=PORIAN,
    claims=CLAIMS,
    takes={
        "smoke": "half a minute",
        "laptop": "about 10 minutes on 2 CPU cores; 4 after hoffmann2022, which trains half of its runs",
        "paper": "for a GPU; not yet run",
    },
    run=run,
)
