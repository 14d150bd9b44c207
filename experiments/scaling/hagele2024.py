"""One training gives losses at many lengths: a trunk at a constant rate, and a cooldown that branches off at each.

Under a cosine schedule the loss at D tokens is that of a run whose schedule ends there, so L(D) takes a run for every
D. Hägele et al. 2024 keep the rate constant after the warm-up (WSD) and let it fall linearly over the last fifth: all
lengths share what comes before, and the losses are those of the cosine. Here both schedules have the same peak rate,
the same warm-up, and end at a tenth of the peak, so that only the shape between differs; with each seed come the same
first parameters and batches. `sweep` trains what WSD runs share once (jaxgpt/prefix.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.claims import Claim, Measured, mean_and_interval
from experiments.registry import Job, Outcome, Paper, check_complete
from jaxgpt.config import RunConfig, override

if TYPE_CHECKING:
    import pandas

Frame = Any  # a pandas.DataFrame, whose own types do not follow its columns
HAGELE = "Hägele et al. 2024"
LEVEL = 0.9
SCHEDULES = {"cosine": "cosine, a run for each length", "wsd": "constant with cooldowns, one trunk"}
DECAY = 0.2  # share of a run that is cooldown; in binary exact enough that a run parts at 4/5 of its steps

CLAIMS = (
    Claim("match", "constant with cooldown ends where a cosine of that length ends: difference of the losses at the "
          "worst length, in standard deviations between seeds", f"{HAGELE}, section 3", 0.0, 1.0, "seed SD",
          "toy_analogue", LEVEL),
    Claim("closed", "the cooldown closes the gap between the constant rate and the cosine: share",
          f"{HAGELE}, section 3", 1.0, 0.25, "1", "toy_analogue", LEVEL),
)  # fmt: skip


@dataclass(frozen=True)
class Size:
    """What a scale trains. lengths: in steps, ascending; eval_every divides them all."""

    width: int
    lengths: tuple[int, ...]
    seeds: int
    eval_every: int
    settings: dict[str, int]


SIZES = {
    "smoke": Size(
        width=8,
        lengths=(20, 40),
        seeds=2,
        eval_every=10,
        settings={"model.n_layers": 1, "model.n_heads": 1, "model.context": 16, "train.batch_size": 2,
                  "train.eval_windows": 16, "optimizer.warmup_steps": 4},
    ),
    "laptop": Size(
        width=32,
        lengths=(500, 1000, 2000, 4000),
        seeds=4,
        eval_every=100,
        settings={"model.n_layers": 3, "model.n_heads": 2, "model.context": 128, "train.batch_size": 8,
                  "train.eval_windows": 256, "optimizer.warmup_steps": 100},
    ),
    # At most 4 epochs of the corpus's 9.4 MB: more would compare the schedules on repeated data.
    "paper": Size(
        width=256,
        lengths=(300, 600, 1200, 2300),
        seeds=4,
        eval_every=50,
        settings={"model.n_layers": 6, "model.n_heads": 8, "model.context": 256, "train.batch_size": 64,
                  "train.eval_windows": 1024, "optimizer.warmup_steps": 100},
    ),
}  # fmt: skip


def configs(size: Size) -> list[RunConfig]:
    """schedules x lengths x seeds."""
    return [
        override(
            RunConfig(),
            {
                "model.d_model": size.width,
                "optimizer.learning_rate": 0.5 / size.width,  # the demo's rule, found under cosine; not tuned for WSD
                "optimizer.schedule": schedule,
                # Under cosine it does nothing, and another value than the default would only name another run.
                **({"optimizer.decay_fraction": DECAY} if schedule == "wsd" else {}),
                "optimizer.final_fraction": 0.1,
                "train.steps": steps,
                "train.seed": seed,
                "train.eval_every": size.eval_every,
                **size.settings,
            },
        )
        for schedule in SCHEDULES
        for steps in size.lengths
        for seed in range(size.seeds)
    ]


# --- what they say -------------------------------------------------------------------------------------------------


def losses(runs: Frame) -> Frame:
    """Final losses, one row per seed, columns (schedule, steps)."""
    return runs.pivot_table(index="train.seed", columns=["optimizer.schedule", "train.steps"], values="final_loss")


def without_cooldown(runs: Frame, curves: Frame) -> Frame:
    """The trunk's losses at the shorter lengths, still at the peak rate: one row per seed, columns steps."""
    trunk = runs[(runs["optimizer.schedule"] == "wsd") & (runs["train.steps"] == runs["train.steps"].max())]
    points = curves.merge(trunk[["run_id", "train.seed"]], on="run_id").rename(columns={"step": "train.steps"})
    lengths = [n for n in sorted(set(runs["train.steps"])) if n <= (1 - DECAY) * runs["train.steps"].max()]
    points = points[points["train.steps"].isin(lengths)]
    return points.pivot_table(index="train.seed", columns="train.steps", values="validation_loss")


def measure(runs: Frame, curves: Frame) -> dict[str, Measured]:
    """Each claim's value and interval over seeds.

    match: differences at one seed, relative to the loss, in units of the standard deviation between seeds of the
    cosine's losses (relative, pooled over lengths): the worst length's mean, with an interval that holds those of all
    lengths, since a mean over lengths would hide differences of opposite sign. closed: (trunk - cooldown) /
    (trunk - cosine), each summed over the lengths at which the trunk is still at its peak.
    """
    import numpy as np

    final, trunk = losses(runs), without_cooldown(runs, curves)
    cosine, wsd = final["cosine"], final["wsd"]
    scatter = float(np.sqrt((cosine.std() / cosine.mean()).pow(2).mean()))
    apart_SxL = ((wsd - cosine) / cosine.mean()).to_numpy() / scatter
    mean_L, low_L, high_L = zip(*(mean_and_interval(apart_S, LEVEL) for apart_S in apart_SxL.T), strict=True)
    gap_S, closed_S = ((trunk - other[trunk.columns]).sum(axis=1).to_numpy() for other in (cosine, wsd))
    # A ratio of means: at a single seed the gap may be near nothing. Its scatter is that of what is left over.
    share = float(closed_S.mean() / gap_S.mean())
    _, low, high = mean_and_interval((closed_S - share * gap_S) / gap_S.mean(), LEVEL)
    _, least, _ = mean_and_interval(gap_S, LEVEL)
    remark = "" if least > 0 else "the constant rate is not worse than the cosine by more than seeds scatter"
    return {
        "match": Measured(max(mean_L, key=abs), min(low_L), max(high_L), len(apart_SxL)),
        "closed": Measured(share, share + low, share + high, len(gap_S), remark),
    }


def cost(runs: Frame) -> dict[str, int]:
    """Steps trained under each schedule, those that several runs share counted once."""
    own = (runs["train.steps"] - runs["shared_steps"]).groupby(runs["optimizer.schedule"]).sum()
    return {schedule: int(own[schedule]) for schedule in SCHEDULES}


# --- from the runs to the figure -----------------------------------------------------------------------------------

SUMMARY = [
    *("run_id", "optimizer.schedule", "train.steps", "tokens", "train.seed", "status", "final_loss", "final_loss_sem"),
    *("shared_steps", "wall_seconds", "code_version"),
]


def run(job: Job) -> Outcome:
    """Trains under both schedules, compares, draws."""
    from jaxgpt import load, sweep

    wanted = configs(SIZES[job.scale])
    runs = sweep(wanted, job.raw, max_minutes=job.max_minutes)
    check_complete(runs, wanted)
    curves = load(job.raw)[1]
    steps = cost(runs)
    return Outcome(
        measured=measure(runs, curves),
        summary=runs.reindex(columns=SUMMARY),
        tables=(
            ("Final validation loss in nats per byte, mean ± standard deviation over seeds", _loss_table(runs)),
            (f"What the losses at all lengths cost: WSD saves {1 - steps['wsd'] / steps['cosine']:.0%} of the steps",
             _cost_table(runs)),
        ),
        figures=tuple(draw(runs, curves, job.figure)),
        numbers={"steps_trained": steps},
        seconds_training=sum(runs["wall_seconds"]),
        device=runs["device"].iloc[0],
        corpus_sha256=runs["corpus_sha256"].iloc[0],
    )  # fmt: skip


def _loss_table(runs: Frame) -> pandas.DataFrame:
    import pandas

    found = losses(runs)
    mean, scatter = found.mean(), found.std()
    return pandas.DataFrame(
        {
            "steps": f"{n:,}",
            **{words: f"{mean[name, n]:.4f} ± {scatter[name, n]:.4f}" for name, words in SCHEDULES.items()},
            "difference": f"{mean['wsd', n] - mean['cosine', n]:+.4f}",
        }
        for n in sorted(set(runs["train.steps"]))
    )


def _cost_table(runs: Frame) -> pandas.DataFrame:
    import pandas

    steps, seconds = cost(runs), runs.groupby("optimizer.schedule")["wall_seconds"].sum()
    return pandas.DataFrame(
        {"schedule": words, "steps trained": f"{steps[name]:,}", "seconds": f"{seconds[name]:,.0f}"}
        for name, words in SCHEDULES.items()
    )


COLOURS = {"cosine": "#c1432b", "wsd": "#1f5a96"}
MARKS = {"cosine": "s", "wsd": "o"}


def draw(runs: Frame, curves: Frame, path_stem: Path) -> list[Path]:
    """Left: loss against data for both schedules, every seed. Right: the curves of the first seed."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator

    from analysis.plots import STYLE, save, short

    per_step, lengths = int(runs["tokens"].iloc[0] // runs["train.steps"].iloc[0]), sorted(set(runs["train.steps"]))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10.5, 4.6), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.35))
        _draw_lengths(left, runs)
        left.set_title(f"Loss at each length: {runs['train.seed'].nunique()} seeds and their mean")
        _draw_curves(right, runs, curves, per_step)
        right.set_title("Curves of one seed: cooldowns branch off the trunk")
        for axes in (left, right):
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(FixedLocator([n * per_step for n in lengths]))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(lambda value, _: short(value))
            axes.set_xlabel("training data D (tokens)")
            axes.set_ylabel("validation loss (nats per byte)")
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2)
        return save(figure, path_stem)


def _draw_lengths(axes: Any, runs: Frame) -> None:
    for name, words in SCHEDULES.items():
        mine = runs[runs["optimizer.schedule"] == name]
        mean = mine.groupby("tokens")["final_loss"].mean()
        aside = 1.03 if name == "wsd" else 1 / 1.03  # so that points of equal loss do not hide each other
        axes.plot(mean.index, mean, color=COLOURS[name], marker=MARKS[name], ls="-" if name == "wsd" else (0, (4, 2)),
                  lw=1.4, ms=6, mec="white", mew=0.6, label=words)  # fmt: skip
        axes.plot(mine["tokens"] * aside, mine["final_loss"], MARKS[name], color=COLOURS[name], ms=3, alpha=0.6, mew=0)


def _draw_curves(axes: Any, runs: Frame, curves: Frame, per_step: int) -> None:
    """A branch is drawn from its last validation before it parts: up to there it is the trunk."""
    first, longest = runs[runs["train.seed"] == runs["train.seed"].min()], runs["train.steps"].max()
    ends = first["final_loss"]
    for _, row in first.iterrows():
        name, steps = row["optimizer.schedule"], row["train.steps"]
        curve = curves[(curves["run_id"] == row["run_id"])].dropna(subset=["validation_loss"])
        if name == "wsd" and steps < longest:
            curve = curve[curve["step"] >= curve["step"][curve["step"] <= (1 - DECAY) * steps].max()]
        axes.plot(curve["step"] * per_step, curve["validation_loss"], color=COLOURS[name],
                  lw=1.4 if name == "wsd" else 0.9, ls="-" if name == "wsd" else (0, (4, 2)))  # fmt: skip
        axes.plot(row["tokens"], row["final_loss"], MARKS[name], color=COLOURS[name], ms=5.5, mec="white", mew=0.6)
    axes.set_ylim(ends.min() - 0.15 * (ends.max() - ends.min()), ends.max() + 0.45 * (ends.max() - ends.min()))
    axes.set_xlim(0.6 * first["tokens"].min(), 1.15 * first["tokens"].max())


PAPER = Paper(
    name="hagele2024",
    title="Scaling without fixed lengths: one trunk with cooldowns instead of a cosine run for every length",
    source=HAGELE,
    claims=CLAIMS,
    takes={
        "smoke": "half a minute",
        "laptop": "about 4 minutes on 2 CPU cores",
        "paper": "for a GPU; not yet run",
    },
    run=run,
)
