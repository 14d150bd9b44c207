"""An IsoFLOP sweep on real text that several papers look at: which runs it has, where they lie, how well they agree.

Sizes x budgets C = 6 N D, N counting all parameters. The models differ in width only. Under WSD the runs of a size and
a seed share a trunk, so one trunk gives the losses of several budgets, and its own curve those without a decay.

The learning rate goes as width^-1/2 (`rate`). So it went in scans with one seed, 2.5e11 FLOPs and batches of 8: best at
.014, .011 and .007 for widths 16, 32 and 64. With batches of 4 and 4e11 FLOPs widths 12 and 64 were best at .75 and .9
times the rule; `scan_configs` looks again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.registry import Job, check_complete
from jaxgpt import flops
from jaxgpt.config import BadInput, RunConfig, override

if TYPE_CHECKING:
    import numpy

    from analysis.fit import Fit

Table = Any  # a pandas table or column: pandas' own types do not follow its columns
LEVEL = 0.9
DECAY = 0.2  # share of a run in which its rate falls: a trunk ends at 1 - DECAY of its longest run
SCAN = (0.25, 0.5, 1.0, 2.0, 4.0)  # times the rule's rate
VARIED = (0.5, 2.0)  # the whole sweep is repeated at so many times the rule's rate
RATE_AT_32 = 0.0075


@dataclass(frozen=True)
class Size:
    """The sweep of a scale.

    budgets: FLOPs, each twice the one before. models: (width, first budget, last budget), the budgets by number.
    d_head: about. seeds: at the rule's rate. other_seeds: of runs whose warm-up or rate is another paper's.
    warmup: steps, the same for all, so that the runs of a trunk have it in common. long_warmup: too many of them.
    """

    budgets: tuple[float, ...]
    models: tuple[tuple[int, int, int], ...]
    d_head: int
    seeds: int
    other_seeds: int
    warmup: int
    long_warmup: int
    settings: Mapping[str, int]
    starts: int = 500
    bootstraps: int = 1000


SIZES = {
    "smoke": Size(
        budgets=(5e7, 1e8, 2e8),
        models=((4, 0, 2), (8, 0, 2), (12, 0, 2), (20, 0, 2)),
        d_head=4,
        seeds=2,
        other_seeds=1,
        warmup=4,
        long_warmup=20,
        settings={"model.n_layers": 1, "model.context": 16, "train.batch_size": 2, "train.eval_windows": 32},
        starts=4,
        bootstraps=6,
    ),
    "laptop": Size(
        budgets=(5e10, 1e11, 2e11, 4e11),
        models=(
            (8, 0, 1),
            (12, 0, 2),
            (16, 0, 2),
            (20, 0, 2),
            (24, 0, 3),
            (32, 0, 3),
            (40, 0, 3),
            (48, 1, 3),
            (64, 2, 3),
        ),
        d_head=16,
        seeds=4,
        other_seeds=2,
        warmup=50,
        long_warmup=500,
        settings={"model.n_layers": 3, "model.context": 128, "train.batch_size": 4, "train.eval_windows": 256},
    ),
    # As large as the corpus allows: the smallest model's longest run reads its 9.4 MB 4 times, and more would be a law
    # of repeated data (Muennighoff et al. 2023).
    "paper": Size(
        budgets=(4e12, 8e12, 1.6e13, 3.2e13, 6.4e13),
        models=((48, 0, 2), (64, 0, 3), (80, 0, 4), (96, 0, 4), (128, 0, 4), (160, 0, 4), (192, 1, 4), (256, 3, 4)),
        d_head=16,
        seeds=4,
        other_seeds=2,
        warmup=50,
        long_warmup=600,
        settings={"model.n_layers": 4, "model.context": 256, "train.batch_size": 16, "train.eval_windows": 1024},
    ),
}


# --- the runs ------------------------------------------------------------------------------------------------------


def rate(width: int) -> float:
    """The rule's peak learning rate."""
    return RATE_AT_32 * math.sqrt(32 / width)


def config(
    size: Size, width: int, budget: int, seed: int, peak: float, settings: Mapping[str, Any] | None = None
) -> RunConfig:
    """The run of a width at a budget (by number), with this peak rate."""
    model = {"model.d_model": width, "model.n_heads": max(1, width // size.d_head)}
    made = override(RunConfig(), {
        **model, **size.settings, "train.seed": seed, "optimizer.learning_rate": peak, "optimizer.schedule": "wsd",
        "optimizer.decay_fraction": DECAY, "optimizer.warmup_steps": size.warmup,
    })  # fmt: skip
    per_step = flops.flops_6nd(flops.parameters(made.model).total, made.train.batch_size * made.model.context)
    first = next(a for w, a, _ in size.models if w == width)
    # Validated twice before the first decay, and as often in what follows: there the trunk's curve can be read.
    every = max(1, round((1 - DECAY) / 2 * size.budgets[first] / per_step))
    steps = {"train.steps": round(size.budgets[budget] / per_step), "train.eval_every": every}
    return override(made, {**steps, **(settings or {})})


def grid(size: Size, *, factor: float = 1.0, seeds: Iterable[int] = (0,)) -> list[RunConfig]:
    """Every size at each of its budgets, at `factor` times the rule's rate."""
    return [
        config(size, width, budget, seed, factor * rate(width))
        for seed in seeds
        for width, first, last in size.models
        for budget in range(first, last + 1)
    ]


def scan_configs(size: Size) -> list[RunConfig]:
    """The smallest size at its largest budget and the largest at its smallest, at five rates; the sweeps have three."""
    (small, _, last), (large, first, _) = size.models[0], size.models[-1]
    return [
        config(size, width, budget, 0, factor * rate(width))
        for width, budget in ((small, last), (large, first))
        for factor in SCAN
    ]


SUMMARY = [
    *("run_id", "model.d_model", "params_total", "params_non_embedding", "tokens", "flops_6nd", "flops_exact"),
    *("final_loss", "final_loss_sem", "optimizer.learning_rate", "optimizer.warmup_steps", "train.seed", "train.steps"),
    *("wall_seconds", "code_version"),
]


def folder(job: Job) -> Path:
    """Where the shared runs of a scale lie: beside the paper's own."""
    return job.raw.parents[1] / "isoflop" / job.scale


def train(job: Job, configs: Sequence[RunConfig]) -> Table:
    """The finished runs, one row each, as `labelled` gives them. Raises Unfinished when the time was up, BadInput where
    a run diverged, unless at a rate that is of the scan only.
    """
    from jaxgpt import sweep

    wanted = list(dict.fromkeys(configs))
    runs = sweep(wanted, folder(job), max_minutes=job.max_minutes)
    check_complete(runs, wanted)
    refuse_diverged(runs)
    return labelled(runs, SIZES[job.scale])


def refuse_diverged(runs: Table) -> None:
    """Exponents without the runs that diverged would look as certain as with them."""
    factor = runs["optimizer.learning_rate"] / runs["model.d_model"].map(rate)
    bad = runs.loc[(runs["status"] != "done") & (factor <= max(VARIED) * (1 + 1e-6)), "run_id"]
    if len(bad):
        raise BadInput(f"{len(bad)} of {len(runs)} runs diverged, without which none is fitted: {', '.join(bad)}")


def labelled(runs: Table, size: Size) -> Table:
    """The runs that ended well, small models first, with more columns.

    N, D, C: all parameters, tokens, 6 N D. loss: nats per token. budget: its number. factor: the peak rate over the
    rule's. trunk: the same for runs of one size, seed, rate and warm-up.
    """
    import numpy as np

    done = runs.query("status == 'done'").copy()
    done["N"], done["D"], done["C"] = done["params_total"], done["tokens"], done["flops_6nd"]
    done["loss"] = done["final_loss"]
    off_MxK = np.abs(np.log(done["C"].to_numpy(float))[:, None] - np.log(size.budgets))
    done["budget"] = off_MxK.argmin(axis=1)
    done["factor"] = done["optimizer.learning_rate"] / done["model.d_model"].map(rate)
    names = ("model.d_model", "train.seed", "optimizer.learning_rate", "optimizer.warmup_steps")
    done["trunk"] = done[list(names)].astype(str).agg("/".join, axis=1)
    return done.sort_values(["N", "train.seed", "factor", "D"], kind="stable", ignore_index=True)


# --- how well runs agree -------------------------------------------------------------------------------------------


def scatter(runs: Table) -> Table:
    """By budget, the standard deviation of the log loss between seeds, pooled over the sizes; empty for one seed."""
    import numpy as np

    logs = np.log(runs["loss"]).groupby([runs["budget"], runs["N"]])
    squares = logs.var(ddof=1) * (logs.count() - 1)
    seen, free = squares.groupby("budget").sum(), (logs.count() - 1).groupby("budget").sum()
    return np.sqrt(seen[free > 0] / free[free > 0])


def weights(runs: Table, noise: Table) -> numpy.ndarray:
    """(M,) of a fit of log losses: one over the squared standard error that `scatter` gave; their mean is 1."""
    import numpy as np

    if noise.empty:
        return np.ones(len(runs))
    weight_M = runs["budget"].map(1 / noise**2).fillna(1 / float((noise**2).mean())).to_numpy(float)
    return weight_M / weight_M.mean()


# --- losses at equal compute ---------------------------------------------------------------------------------------


def at_equal_compute(points: Table, budgets: int, smallest: int = 6, largest: int = 5) -> Table:
    """Losses of each trunk at common compute: `budgets` levels, evenly apart in the logarithm, from where so many of
    the smallest sizes all have begun to where so many of the largest all still go on.

    points: trunk, N, D, per_token (FLOPs of a token, as one wants to count them), loss. Between a trunk's points the
    log loss is interpolated over log D (PCHIP); beyond them it has none. Gives trunk, N, D, C, loss, budget; no line
    where the sizes have no compute in common.
    """
    import numpy as np
    import pandas
    from scipy.interpolate import PchipInterpolator

    points = points.assign(C=points["per_token"] * points["D"]).sort_values(["N", "D"])
    reach = points.groupby("N")["C"].agg(["min", "max"])
    low, top = reach["min"].iloc[:smallest].max(), reach["max"].iloc[-largest:].min()
    levels_K = np.geomspace(low, top, budgets if low < top else 0)
    rows = []
    for trunk, mine in points.groupby("trunk", sort=False):
        x, n = np.log(mine["C"].to_numpy(float)), float(mine["N"].iloc[0])
        if len(x) < 2:
            continue
        # A level that is an end of the curve may lie a rounding error beyond it.
        within_K = (levels_K > np.exp(x[0]) * (1 - 1e-9)) & (levels_K < np.exp(x[-1]) * (1 + 1e-9))
        loss_K = np.exp(PchipInterpolator(x, np.log(mine["loss"].to_numpy(float)))(np.log(levels_K)))
        rows += [
            (trunk, n, level / float(mine["per_token"].iloc[0]), level, loss, k)
            for k, (level, loss) in enumerate(zip(levels_K, loss_K, strict=True))
            if within_K[k]
        ]
    return pandas.DataFrame(rows, columns=["trunk", "N", "D", "C", "loss", "budget"])


def ends(runs: Table) -> Table:
    """Curves for approach 1: of each trunk the ends of its cooldowns, as the curve of its longest run.

    So each point of a curve is a finished training, as the envelope takes it to be.
    """
    longest = runs.loc[runs.groupby("trunk")["D"].idxmax()].set_index("trunk")["run_id"]
    return runs.assign(run_id=runs["trunk"].map(longest))[["run_id", "C", "D", "loss"]]


# --- exponents by every approach -----------------------------------------------------------------------------------

CONVENTIONS = {"all parameters": "params_total", "without embeddings": "params_non_embedding"}


@dataclass(frozen=True)
class Exponents:
    """table: one line per approach, as `side_by_side` gives them. optima: C, N, D of approach 2, by name. law: of the
    same runs, weighted; None where they do not allow it.
    """

    table: Table
    optima: Mapping[str, Table]
    law: Fit | None


def exponents(runs: Table, size: Size, noise: Table, counted: str, bootstraps: int) -> Exponents:
    """Exponents a and b by every approach, from runs of one rate factor.

    counted: the column that N is, and C = 6 N D with it. Without embeddings the runs of a budget do not cost the same:
    approach 2 then looks at losses interpolated to equal compute. The law is fitted with the weights that `noise`
    gives. Resampled are trunks, whose runs share most of their training.
    """
    from analysis.approaches import approaches, side_by_side
    from analysis.fit import FitError, fit
    from analysis.laws import CHINCHILLA

    runs = runs.assign(N=runs[counted], C=6.0 * runs[counted] * runs["D"])
    how: dict[str, Any] = {"flops": size.budgets[-1], "groups": "trunk", "bootstraps": bootstraps, "level": LEVEL}
    if counted == "params_total":
        found = approaches(runs, ends(runs), starts=size.starts, **how)
    else:
        level = at_equal_compute(runs.assign(per_token=6.0 * runs["N"]), len(size.budgets))
        found = approaches(runs.assign(budget=math.nan), ends(runs), starts=size.starts, **how)
        with suppress(FitError):  # too few losses at equal compute: then approach 2 has none, and says so
            found |= {name: one for name, one in approaches(level, **how).items() if name in ("parabola", "akima")}
    table = side_by_side(found).set_index("approach")
    optima = {name: found[name].optima for name in ("parabola", "akima")}
    try:
        law = fit(
            CHINCHILLA, {"N": runs["N"], "D": runs["D"]}, runs["loss"], weights=weights(runs, noise),
            groups=runs["trunk"].to_numpy(), starts=size.starts, bootstraps=bootstraps, level=LEVEL,
        )  # fmt: skip
    except FitError as error:
        table.loc["parametric", "remark"] = str(error)
        return Exponents(table.reset_index(), optima, None)
    for key in ("a", "b"):
        e = law.derived[key]
        table.loc["parametric", [key, f"{key}_low", f"{key}_high"]] = [e.value, *e.interval]
    table.loc["parametric", "remark"] = law.derived["a"].remark
    return Exponents(table.reset_index(), optima, law)
