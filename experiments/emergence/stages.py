"""Through which stages does a language model pass, and does it get better in jumps?

One hears that models learn in stages at fixed numbers of steps (random text, then co-occurrence, grammar, algebra after
a million steps), and that abilities jump at regular amounts of training. Here a small model learns text and is measured
often:

- stages: its distance from uni-, bi- and trigram predictors, KL(n-gram || model) in nats per token on held-out text:
  what the model would lose on text that the predictor had written, beyond what the predictor itself loses. n-grams are
  counted in the training text, with interpolated Witten-Bell smoothing (jaxgpt.tasks.ngrams). A stage is passed where
  this distance has a minimum. That minima follow one another says little alone: a path from knowing nothing to knowing
  much comes by the coarse predictors first. So each minimum is held against the nearest approach of two straight paths
  from the first predictions to the last ones, by mixing probabilities and by turning up log-probabilities: below 1 of
  the nearer one, the model comes closer to the predictor than it would have to on its way. These paths end at the last
  model, so that the share depends on when training stops: little for predictors far behind, much for the trigram, which
  is therefore in the table only and no claim.
- induction: what it gains on random tokens (as frequent as in the text) when they come again, before and after that.
- numbers of steps: the same at half the learning rate. If stages came at fixed steps, these would not move.
- jumps: dense curves of held-out loss, and of the in-context score (loss of the last quarter of a window minus that of
  its 9th to 16th token, of 128), are searched for one sudden step (analysis.jumps: a smooth spline in log step, noise
  with memory, and a null of permuted innovations), and for comparison with a test that takes points as independent
  (analysis.thresholds.change_point). The test says also how small a step it would have found.

Settings were tried on seed 100 (rates .001 to .004, windows of 64 and 128 bytes, 300 to 3000 steps), then seeds 0 to 3
were run: 1500 steps, and the step in the in-context score as a share of its change. The trigram's share was .986 (.962
to 1.01) and the step 2.93 of the change, both undecided; after that steps became 2000 and the step was judged in nats.
So claims are about seeds 4 to 7, which nothing was chosen on. As the in-context score hardly changes at laptop scale,
less than a step would have to be to count, the claim on its steps is open there; its p values are in the table.
What laptop scale leaves out: two-layer models of bytes had no induction after 6 million tokens there, so that "then
induction" can hardly be seen; grammar and algebra are not measured at all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.claims import Claim, Measured, over_seeds
from experiments.registry import Job, Outcome, Paper, check_complete
from jaxgpt.config import RunConfig, override

if TYPE_CHECKING:
    import numpy
    import pandas

    from jaxgpt.run import Source

LEVEL = 0.9
GRAMS = {1: "unigram", 2: "bigram", 3: "trigram"}
COLOURS = {1: "#1f5a8f", 2: "#c0562b", 3: "#4d8a4a"}
CURVES = {"loss": "held-out loss", "in_context": "in-context score"}
ALPHA = 0.05
SOME = 0.05  # of the change of a curve: a step of this share would be a jump
FEW = 0.1  # nats, ours: a sudden gain of so much would be a jump; who gains less in all cannot show one
INDUCTION = 0.5  # nats: less is none yet
FIRST_SEED = 4  # settings were changed after seeds 0 to 3
NEAR = 0.4  # natural log of the step: how far around a minimum its place is fitted


STATED = {20: "abilities come in jumps", 21: "models learn in fixed stages"}


def _claim(
    id: str, row: int, statement: str, expected: float, margin: float, unit: str = "1", least: float = -math.inf,
    against: bool = False,
) -> Claim:  # fmt: skip
    source = f"against what is commonly stated: {STATED[row]}" if against else f"as commonly stated: {STATED[row]}"
    return Claim(id, statement, source, expected, margin, unit, "toy_analogue", LEVEL, row, (least, math.inf))


# Of the order: not before, and at most 16 times later; of an approach: closer than a straight path has to come.
CLAIMS = (
    _claim("bigram_after", 21, "nearest the bigram predictor after the unigram one: log2 of the ratio of steps",
           2.0, 2.0),
    _claim("trigram_after", 21, "nearest the trigram predictor after the bigram one: log2 of the ratio of steps",
           2.0, 2.0),
    *(_claim(f"{name}_stage", 21, f"nearest distance from the {name} predictor as a share of a straight path's",
             0.5, 0.5, least=0.0) for name in ("unigram", "bigram")),
    _claim("steps_move", 21, "half the rate, twice the steps: log2 of how much later the three minima come, mean",
           1.0, 0.5, against=True),
    _claim("no_induction_yet", 21, "n-grams first: gain on repeated tokens when nearest the trigram predictor",
           0.0, 0.1, "nats"),
    # Half a nat or more; copying all of a random byte of this text would gain about three.
    _claim("then_induction", 21, "then induction: gain on repeated tokens at the end", 2.0, 1.5, "nats"),
    _claim("loss_steps", 20, "no jump in held-out loss: its largest sudden step as a share of its change", 0.0, SOME,
           least=0.0, against=True),
    _claim("in_context_steps", 20, "no jump in the in-context score: its largest sudden step",
           0.0, FEW, "nats", 0.0, against=True),
)  # fmt: skip


@dataclass(frozen=True)
class Size:
    """What a scale does. every: steps between points. tested: curves are searched for jumps from this point on, with so
    many knots (`knots`: about one per doubling). probes: sequences of repeated tokens. settings: of each run.
    """

    steps: int
    seeds: int
    rates: tuple[float, float]
    every: int
    tested: int
    knots: int
    draws: int
    probes: int
    settings: dict[str, Any]


SMALL = {"model.d_model": 64, "model.n_layers": 2, "model.context": 128, "train.batch_size": 8,
         "train.eval_windows": 32, "optimizer.warmup_steps": 10}  # fmt: skip
SIZES = {
    "smoke": Size(60, 2, (1e-2, 5e-3), 2, 4, 4, 39, 4, {**SMALL, "model.d_model": 16, "model.n_layers": 1,
                  "model.context": 32, "train.eval_windows": 8, "optimizer.warmup_steps": 2}),
    "laptop": Size(2000, 4, (2e-3, 1e-3), 5, 16, 6, 199, 16, SMALL),
    # 100 million tokens, some 30 times the 11 MB of text that there are: more would be learning by heart.
    "paper": Size(3000, 4, (6e-4, 3e-4), 5, 16, 6, 999, 64, {
        "model.d_model": 768, "model.n_layers": 12, "model.n_heads": 12, "model.context": 512,
        "model.vocab_size": 8192, "data.tokenizer": "bpe", "train.batch_size": 64, "train.eval_windows": 16,
        "optimizer.warmup_steps": 50}),
}  # fmt: skip


def configs(size: Size) -> list[RunConfig]:
    """Rates x seeds, at constant rates, so that no step is special by the schedule."""
    return [
        override(RunConfig(), {
            "train.steps": size.steps, "train.seed": seed, "train.eval_every": size.every,
            "train.log_every": size.every, "optimizer.learning_rate": rate, "optimizer.schedule": "constant",
            **size.settings,
        })
        for rate in size.rates
        for seed in range(FIRST_SEED, FIRST_SEED + size.seeds)
    ]  # fmt: skip


# --- what the curves say -------------------------------------------------------------------------------------------


def lowest(step_E: numpy.ndarray, value_E: numpy.ndarray) -> tuple[float, float]:
    """(step, value) of a curve's minimum, by a parabola in log step through the points NEAR the lowest one.

    The step is NaN where the lowest point is the first or the last: then nothing says that the curve turns.
    """
    import numpy as np

    at = int(np.argmin(value_E))
    if at in (0, len(value_E) - 1):
        return math.nan, float(value_E[at])
    u_E = np.log(step_E / step_E[at])
    # Two points on either side at least.
    near_E = (np.abs(u_E) <= NEAR) | (np.abs(np.arange(len(u_E)) - at) <= 2)
    square, slope, height = np.polyfit(u_E[near_E], value_E[near_E], 2)
    vertex = -slope / (2 * square) if square > 0 else math.inf
    if not u_E[near_E][0] <= vertex <= u_E[near_E][-1]:
        return float(step_E[at]), float(value_E[at])
    return float(step_E[at] * math.exp(vertex)), float(height + slope * vertex + square * vertex**2)


def looked_at(runs: Any, curves: Any, size: Size, folder: Path, source: Source) -> Any:
    """One row per finished run: minima of the distances, approaches of the paths, gains, steps in the curves."""
    import numpy as np
    import pandas

    from analysis.jumps import jump
    from analysis.thresholds import change_point

    rows, data = [], source.data()
    for run in runs[runs["status"] == "done"].to_dict("records"):
        curve = curves[curves["run_id"] == run["run_id"]].dropna(subset=["validation_loss"]).sort_values("step")
        step_E = curve["step"].to_numpy(float)
        row = {name: run[name] for name in KEPT}
        for n in GRAMS:
            for way in ("from", "to"):
                step, value = lowest(step_E, curve[f"validation_{way}_{n}"].to_numpy(float))
                row |= {f"{way}_{n}_step": step, f"{way}_{n}_nats": value}
        gain_E = -curve["validation_repeat_score"].to_numpy(float)
        around_E = np.abs(np.log(step_E / row["from_3_step"])) <= NEAR / 2
        row["gain_at_trigram"] = float(gain_E[around_E].mean()) if around_E.any() else math.nan
        row["gain_at_end"] = float(gain_E[step_E >= 0.9 * step_E[-1]].mean())
        for name in CURVES:
            y_E = curve[f"validation_{name}"].to_numpy(float)[size.tested :]
            x_E = step_E[size.tested :]
            found = jump(x_E, y_E, knots=size.knots, draws=size.draws, seed=run["train.seed"])
            change = abs(y_E[-len(y_E) // 10 :].mean() - y_E[: len(y_E) // 10].mean())
            row |= {f"{name}_step": abs(found.size), f"{name}_step_at": found.x, f"{name}_p": found.p,
                    f"{name}_rho": found.rho, f"{name}_findable": found.findable, f"{name}_change": change,
                    f"{name}_independent_p": change_point(np.log(x_E), y_E, size.draws, trend=1).p}  # fmt: skip
        rows.append(row | _paths(run, row, folder, source.task, data))
    return pandas.DataFrame(rows)


KEPT = ("run_id", "optimizer.learning_rate", "train.seed", "status", "params_total", "tokens", "final_loss",
        "wall_seconds", "code_version")  # fmt: skip


def _paths(run: Any, row: dict[str, Any], folder: Path, task: Any, data: Any) -> dict[str, float]:
    """The nearest approach of the straight paths to each predictor, and the model's as a share of the nearer one."""
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from jaxgpt.tasks import ngrams
    from jaxgpt.trained import load_model

    last = nnx.split(load_model(f"{folder}/{run['run_id']}").model)[1]
    share_M = jnp.asarray(np.concatenate([np.geomspace(0.01, 0.3, 12), np.linspace(0.35, 0.999, 12)]), jnp.float32)
    path_2xMxO = np.asarray(ngrams.nearest_of_paths(task, task.init(run["train.seed"]), last, data, share_M))
    nearest_O = path_2xMxO.min(axis=(0, 1))
    return {f"path_{n}_nats": float(nearest_O[n - 1]) for n in GRAMS} | {
        f"approach_{n}": row[f"from_{n}_nats"] / float(nearest_O[n - 1]) for n in GRAMS
    }


def measure(table: Any, size: Size) -> dict[str, Measured]:
    """Each claim's value and its interval over seeds. Stages are those of the first rate; jumps of both, by seed."""
    import numpy as np

    first, second = (table[table["optimizer.learning_rate"] == rate].set_index("train.seed") for rate in size.rates)

    def of_seeds(values_S: Any, why: str) -> Measured:
        values_S = np.asarray(values_S, float)
        there_S = values_S[np.isfinite(values_S)]
        lacks = size.seeds - len(there_S)
        remark = f"{lacks} of {size.seeds} seeds have no value: {why}" if lacks else ""
        if not len(there_S):
            return Measured(math.nan, math.nan, math.nan, 0, remark)
        return over_seeds(there_S, LEVEL, remark)

    turns = "a distance had no minimum within the run, or the run was not done"
    later = [np.log2(second[f"from_{n}_step"] / first[f"from_{n}_step"]) for n in GRAMS]
    found = {
        "bigram_after": of_seeds(np.log2(first["from_2_step"] / first["from_1_step"]), turns),
        "trigram_after": of_seeds(np.log2(first["from_3_step"] / first["from_2_step"]), turns),
        "steps_move": of_seeds(sum(later) / len(later), turns),
        "no_induction_yet": of_seeds(first["gain_at_trigram"], turns),
        "then_induction": of_seeds(first["gain_at_end"], "the run was not done"),
    }
    if not found["then_induction"].low > INDUCTION:
        remark = f"induction does not come: {found['then_induction'].value:.2g} nats at the end, so that none is early"
        found["no_induction_yet"] = replace(found["no_induction_yet"], remark=remark)
    for n, name in ((1, "unigram"), (2, "bigram")):
        # Without a minimum there is no stage: the end of the run is no approach.
        approach_S = first[f"approach_{n}"].where(first[f"from_{n}_step"].notna())
        found[f"{name}_stage"] = of_seeds(approach_S, turns)
    # The in-context score may stay where it is, so that its step is no share of its change.
    units = {"loss": (SOME, table["loss_change"], ".0%"), "in_context": (FEW, 1.0, ".2g")}
    for name, (most, unit, form) in units.items():
        step_M, findable_M = (table[f"{name}_{what}"] / unit for what in ("step", "findable"))
        measured = of_seeds(step_M.groupby(table["train.seed"]).mean(), "the run was not done")
        if findable_M.median() > most:
            remark = f"only steps of {findable_M.median():{form}} or more are told from noise at half of the places"
            measured = replace(measured, remark=remark)
        found[f"{name}_steps"] = measured
    change_M = table["in_context_change"]
    if change_M.median() < FEW:
        remark = (f"the whole change of the in-context score is {change_M.median():.2g} nats (median of the curves), "
                  f"less than the {FEW:g} of a jump; p < {ALPHA:g} in {(table['in_context_p'] < ALPHA).sum()} of "
                  f"{len(table)} curves")  # fmt: skip
        found["in_context_steps"] = replace(found["in_context_steps"], remark=remark)
    return found


# --- from the runs to the figure -----------------------------------------------------------------------------------


def run(job: Job) -> Outcome:
    """Trains, finds minima and steps, walks the paths, draws."""
    from jaxgpt import load, sweep
    from jaxgpt.tasks import ngrams

    size = SIZES[job.scale]
    wanted, setup = configs(size), ngrams.setup(len(GRAMS), size.probes)
    runs = sweep(wanted, job.raw, setup=setup, max_minutes=job.max_minutes)
    check_complete(runs, wanted)
    curves, source = load(job.raw)[1], setup(wanted[0])
    table = looked_at(runs, curves, size, job.raw, source)
    gram_losses = ngrams.gram_losses(source.data())
    return Outcome(
        measured=measure(table, size),
        summary=table,
        tables=(
            (f"Nearest to each n-gram predictor, KL(n-gram || model) on held-out text; means over {size.seeds} seeds. "
             "Loss: of the predictor itself. Share: of a straight path's nearest distance",
             _stage_table(table, gram_losses)),
            ("The largest sudden step, up or down, in each curve, and how small a one would be found at half of the "
             f"places; means over the curves of {len(table)} runs", _jump_table(table)),
        ),
        figures=tuple(draw(table, curves, gram_losses, size, job.figure)),
        seconds_training=sum(runs["wall_seconds"]),
        device=runs["device"].iloc[0],
        corpus_sha256=runs["corpus_sha256"].iloc[0],
    )  # fmt: skip


def _number(values: Any, form: str = ".3g") -> str:
    """Mean over runs that have one."""
    there = values.dropna()
    none = "" if len(there) == len(values) else f" ({len(values) - len(there)} of {len(values)} have none)"
    return (f"{there.mean():{form}}" if len(there) else "none") + none * bool(len(there))


def _stage_table(table: Any, gram_losses: numpy.ndarray) -> pandas.DataFrame:
    import pandas

    return pandas.DataFrame(
        {"learning rate": f"{rate:g}", "predictor": name, "loss (nats)": f"{gram_losses[n - 1]:.2f}",
         "nearest at step": _number(rows[f"from_{n}_step"], ".0f"), "distance (nats)": _number(rows[f"from_{n}_nats"]),
         "share": _number(rows[f"approach_{n}"], ".2f"),
         "at step, by KL(model || n-gram)": _number(rows[f"to_{n}_step"], ".0f")}
        for rate, rows in table.groupby("optimizer.learning_rate", sort=False)
        for n, name in GRAMS.items()
    )  # fmt: skip


def _jump_table(table: Any) -> pandas.DataFrame:
    import pandas

    return pandas.DataFrame(
        {"curve": words, "its change (nats)": _number(table[f"{name}_change"], ".2g"),
         "largest step (nats)": _number(table[f"{name}_step"], ".2g"),
         "found from (nats)": _number(table[f"{name}_findable"], ".2g"),
         f"p < {ALPHA:g}": f"{(table[f'{name}_p'] < ALPHA).sum()} of {len(table)}",
         "by luck": f"{ALPHA * len(table):.1g}",
         f"p < {ALPHA:g} if points were independent":
             f"{(table[f'{name}_independent_p'] < ALPHA).sum()} of {len(table)}"}
        for name, words in CURVES.items()
    )  # fmt: skip


def draw(table: Any, curves: Any, gram_losses: numpy.ndarray, size: Size, path_stem: Path) -> list[Path]:
    """Distances over steps at the first rate, the two searched curves, and largest steps; writes PNG and SVG."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from analysis import plots

    mine = table[table["optimizer.learning_rate"] == size.rates[0]]
    seen = curves[curves["run_id"].isin(mine["run_id"])].dropna(subset=["validation_loss"])
    with mpl.rc_context(plots.STYLE):
        figure = Figure(figsize=(12.5, 4.4), layout="constrained")
        panels = figure.subplots(1, 3, width_ratios=(1.25, 1.1, 0.9))
        _draw_distances(panels[0], seen, mine)
        _draw_loss(panels[1], seen, gram_losses, size)
        _draw_steps(panels[2], table)
        return plots.save(figure, path_stem)


def _draw_distances(axes: Any, seen: Any, mine: Any) -> None:
    for n, name in GRAMS.items():
        by_step = seen.pivot_table(index="step", columns="run_id", values=f"validation_from_{n}")
        axes.plot(by_step.index, by_step.to_numpy(), color=COLOURS[n], lw=0.6, alpha=0.5)
        axes.plot(by_step.index, by_step.mean(axis=1), color=COLOURS[n], lw=1.8, label=name)
        axes.plot(mine[f"from_{n}_step"], mine[f"from_{n}_nats"], "v", color=COLOURS[n], ms=7, mec="white", mew=0.8)
        axes.axhline(mine[f"path_{n}_nats"].mean(), color=COLOURS[n], lw=1, ls=(0, (4, 2)))
    _step_axis(axes)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("training step")
    axes.set_ylabel("KL(n-gram || model), nats per token")
    axes.set_title("Distance from n-gram predictors")
    axes.legend(title="dashed: nearest on a straight path", title_fontsize=8)


def _draw_loss(axes: Any, seen: Any, gram_losses: numpy.ndarray, size: Size) -> None:
    for name, colour, words in (
        ("loss", "#333333", "held-out loss"),
        ("repeat_score", "#8a4f9e", "repeated minus first tokens"),
        ("in_context", "#2a9d8f", "in-context score"),
    ):
        by_step = seen.pivot_table(index="step", columns="run_id", values=f"validation_{name}")
        axes.plot(by_step.index, by_step.to_numpy(), color=colour, lw=0.6, alpha=0.5)
        axes.plot(by_step.index, by_step.mean(axis=1), color=colour, lw=1.6, label=words)
    for n, name in GRAMS.items():
        axes.axhline(gram_losses[n - 1], color=COLOURS[n], lw=1, ls=(0, (4, 2)))
        axes.annotate(name, (1, gram_losses[n - 1]), (-2, 2), xycoords=("axes fraction", "data"),
                      textcoords="offset points", ha="right", fontsize=8, color=COLOURS[n])  # fmt: skip
    axes.axvspan(size.every * (size.tested + 1), size.steps, color="0.96", zorder=0)
    _step_axis(axes)
    axes.set_xlabel("training step (grey: searched for jumps)")
    axes.set_ylabel("nats per token")
    axes.set_title("Loss and what the context gives")
    axes.legend(loc="center left", bbox_to_anchor=(0, 0.25))


def _step_axis(axes: Any) -> None:
    """Logarithmic, with few plain numbers at any scale."""
    from matplotlib.ticker import LogLocator, NullFormatter

    from analysis import plots

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.xaxis.set_major_formatter(lambda value, _: plots.short(value))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _draw_steps(axes: Any, table: Any) -> None:
    """One point per curve: its largest step, and the smallest that would be found."""
    import numpy as np

    for i, name in enumerate(CURVES):
        across = i + 0.24 * (np.linspace(0, 1, len(table)) - 0.5)
        for what, face in (("findable", "white"), ("step", "#1f5a8f")):
            label = {"findable": "smallest that is found", "step": "largest step"}[what] if i == 0 else None
            axes.plot(across, table[f"{name}_{what}"], "o", ms=5.5, mfc=face, mec="#1f5a8f", mew=0.9, label=label)
    axes.set_xticks(range(len(CURVES)), CURVES.values())
    axes.set_xlim(-0.5, len(CURVES) - 0.5)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("nats")
    axes.set_title("Sudden steps in dense curves")
    axes.legend()


PAPER = Paper(
    name="stages",
    title="Stages of learning text: uni-, bi- and trigrams in turn, and no jumps in between",
    source="as commonly stated: models learn in fixed stages; abilities come in jumps",
    claims=CLAIMS,
    takes={
        "smoke": "half a minute",
        "laptop": "about 4 minutes on 2 CPU cores",
        "paper": "for a GPU; not yet run",
    },
    run=run,
)
