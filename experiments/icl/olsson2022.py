"""Do induction heads make in-context learning, and appear when it does?

An induction head looks, from a token, at what followed its earlier occurrences, and says that it comes again:
[A][B] ... [A] -> [B]. It takes two layers: a head of the first writes into each place which token stands before it (a
previous-token head), and one of the second finds by it the place behind an earlier [A]. Olsson et al. 2022 see such
heads form in all language models of two layers or more, within a short stretch of training in which the models also
learn most of what the context tells them.

Here small attention-only models learn sequences of random tokens that repeat with a period of their own each, and are
scored at every validation:

- prefix-matching score of a head: how much of its attention is on tokens that followed the present one, one or more
  whole periods back (a token that chance has put twice into a period is not counted); previous-token score: how much
  is on the token before.
- repeat score, which stands for the paper's in-context score: loss of repeated tokens minus that of first ones. A model
  that knows no more than which tokens have been there gains something too: with one layer there is that and no more.
- ablation: heads are made to say the same in every sequence, and the share of the repeat score that is lost with them
  shows whether they cause it.

The paper trains on text, and `paper` scale does; there induction heads take billions of tokens. Two-layer models of
laptop size had none after 8 million words of text, so that `laptop` shows the mechanism where the data ask for it at
once. All scores are on repeated random tokens, whatever a model was trained on, as in the paper.

`laptop` was changed once after a verdict had been seen: with 4 seeds of 1200 steps the claim `circuit` was
inconclusive, so that it now has 8 seeds, of 800 steps to take no longer. Those seeds are others, used in no trial.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.claims import Claim, Measured, of_those_that_have
from experiments.registry import Job, Outcome, Paper, check_complete
from jaxgpt.config import RunConfig, override

if TYPE_CHECKING:
    import numpy
    import pandas

    from jaxgpt.run import Source

OLSSON = "Olsson et al. 2022"
LEVEL = 0.9
FOUND = 0.3  # a head with at least this score is an induction head, or a previous-token head
ABLATION_KEY = 1  # of the sequences on which heads are ablated
DEPTH = 2  # of the models that the claims are about, beside those of one layer

CLAIMS = (
    Claim("two_layers", "two layers form induction heads: largest prefix-matching score of a head",
          OLSSON, 1.0, 0.5, "1", "toy_analogue", LEVEL, row=29),
    Claim("one_layer", "one layer forms none: its largest prefix-matching score",
          OLSSON, 0.0, 0.15, "1", "toy_analogue", LEVEL, row=29),
    Claim("one_layer_gain", "one layer gains little from repetition: its repeat score as a share of two layers'",
          OLSSON, 0.0, 0.4, "1", "toy_analogue", LEVEL, row=29),
    Claim("together", "heads and in-context learning come at once: log2 of the ratio of the steps at half their change",
          OLSSON, 0.0, 0.5, "1", "toy_analogue", LEVEL, row=29),
    # Expected one doubling is our reading of the short stretch in the paper's curves; margin: a jump to two doublings.
    Claim("abrupt", "it is abrupt: log2 of the training from 10 to 90 % of the repeat score's change",
          OLSSON, 1.0, 1.0, "1", "toy_analogue", LEVEL, row=29),
    Claim("cause", "induction heads cause it: share of the repeat score lost without them",
          OLSSON, 1.0, 0.5, "1", "toy_analogue", LEVEL, row=29),
    Claim("circuit", "they need the previous-token heads: share of the repeat score lost without these",
          OLSSON, 1.0, 0.5, "1", "toy_analogue", LEVEL, row=29),
    Claim("others", "the other heads do little: share of the repeat score lost without all of them",
          OLSSON, 0.0, 0.25, "1", "toy_analogue", LEVEL, row=29),
)  # fmt: skip


@dataclass(frozen=True)
class Size:
    """What a scale does. layers: depths of the models. evaluations: points of each curve. shortest, longest: periods
    of the sequences. settings: of each run. text: trained on the words of a text, not on repeated tokens. first: the
    lowest seed.
    """

    layers: tuple[int, ...]
    steps: int
    seeds: int
    evaluations: int
    shortest: int
    longest: int
    settings: dict[str, Any]
    text: bool = False
    first: int = 0


SMALL = {"model.d_model": 64, "model.n_heads": 4, "model.context": 64, "model.vocab_size": 64, "train.batch_size": 32,
         "train.eval_windows": 128, "optimizer.learning_rate": 5e-3}  # fmt: skip
SIZES = {
    "smoke": Size((1, 2), 8, 2, 4, 4, 8, {**SMALL, "model.d_model": 16, "model.n_heads": 2, "model.context": 16,
                                          "train.batch_size": 4, "train.eval_windows": 8}),
    "laptop": Size((1, 2), 800, 8, 50, 16, 32, SMALL, first=100),
    "paper": Size((1, 2, 3, 4, 5, 6), 100_000, 4, 200, 25, 128, {
        "model.d_model": 768, "model.n_heads": 12, "model.context": 512, "model.vocab_size": 8192,
        "train.batch_size": 256, "train.eval_windows": 128, "optimizer.learning_rate": 3e-4}, text=True),
}  # fmt: skip


def configs(size: Size) -> list[RunConfig]:
    """Depths x seeds: attention without MLPs, at a constant rate, so that no step is special by the schedule."""
    return [
        override(RunConfig(), {
            "model.n_layers": layers, "model.mlp": "none", "train.steps": size.steps, "train.seed": seed,
            "train.eval_every": max(1, size.steps // size.evaluations), "train.log_every": size.steps,
            "optimizer.schedule": "constant", **size.settings,
        })
        for layers in size.layers
        for seed in range(size.first, size.first + size.seeds)
    ]  # fmt: skip


KEPT = ("run_id", "model.n_layers", "train.seed", "status", "wall_seconds", "code_version")
SCORES = ("matching", "previous", "first", "again", "repeat_score")


# --- what the heads do ---------------------------------------------------------------------------------------------


def groups(matching_LxH: numpy.ndarray, previous_LxH: numpy.ndarray) -> dict[str, numpy.ndarray]:
    """Which heads are induction heads, which previous-token heads, and which are neither, [L, H] bool each."""
    induction_LxH, previous_LxH = matching_LxH >= FOUND, previous_LxH >= FOUND
    return {"cause": induction_LxH, "circuit": previous_LxH & ~induction_LxH, "others": ~(induction_LxH | previous_LxH)}


def ablated(trained: Any, task: Any, data: Any, which: dict[str, numpy.ndarray]) -> dict[str, float]:
    """The share of the repeat score that a trained model loses without each group of heads, and how many they are.

    On other sequences than those that the groups were told by. NaN for a group without heads.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from jaxgpt.tasks import recall

    probe = task.repeated(data, jax.random.key(ABLATION_KEY), task.probes)
    off_MxLxH = jnp.asarray(np.stack([np.zeros_like(which["cause"]), *which.values()]))
    params = nnx.split(trained.model)[1]
    loss_MxWxT = recall.losses_without(trained.config.model, params, probe.token_BxT1, off_MxLxH)
    first_MxW, again_MxW = jax.vmap(lambda loss_WxT: recall.first_and_again(loss_WxT, probe.period_B))(loss_MxWxT)
    score_M = np.asarray((again_MxW - first_MxW).mean(axis=1))
    lost = {f"lost_{name}": float(1 - score / score_M[0]) if mask_LxH.any() else math.nan
            for (name, mask_LxH), score in zip(which.items(), score_M[1:], strict=True)}  # fmt: skip
    return lost | {f"heads_{name}": int(mask_LxH.sum()) for name, mask_LxH in which.items()}


def crossing(steps_E: numpy.ndarray, values_E: numpy.ndarray, share: float) -> float:
    """The step at which a curve has first made so much of its way from its first value to its last; interpolated.

    NaN where these are equal.
    """
    import numpy as np

    if values_E[-1] == values_E[0]:
        return math.nan
    done_E = (values_E - values_E[0]) / (values_E[-1] - values_E[0])
    i = int(np.argmax(done_E >= share))
    return float(np.interp(share, done_E[i - 1 : i + 1], steps_E[i - 1 : i + 1]))


def looked_at(runs: Any, curves: Any, folder: Path, source: Source) -> Any:
    """One row per finished run: scores at the end, when they changed, what ablation costs models of DEPTH layers.

    source: of any run of DEPTH layers; all have the same data.
    """
    import pandas

    from jaxgpt.trained import load_model

    rows, data = [], source.data()
    for run in runs[runs["status"] == "done"].to_dict("records"):
        curve = curves[curves["run_id"] == run["run_id"]].dropna(subset=["validation_matching"]).sort_values("step")
        steps_E = curve["step"].to_numpy(float)
        matching_E, score_E = (curve[f"validation_{name}"].to_numpy(float) for name in ("matching", "repeat_score"))
        row = {name: run[name] for name in KEPT}
        row |= {name: curve[f"validation_{name}"].iloc[-1] for name in SCORES}
        row |= {"half_matching": crossing(steps_E, matching_E, 0.5)}
        row |= {f"at_{share:g}": crossing(steps_E, score_E, share) for share in (0.1, 0.5, 0.9)}
        if run["model.n_layers"] == DEPTH:
            which = groups(*(_by_head(curve.iloc[-1], name, run) for name in ("matching", "previous")))
            row |= ablated(load_model(f"{folder}/{run['run_id']}"), source.task, data, which)
        rows.append(row)
    return pandas.DataFrame(rows)


def _by_head(point: Any, name: str, run: Any) -> numpy.ndarray:
    """The heads' scores at a point of the curve, [L, H]."""
    import numpy as np

    layers, heads = range(run["model.n_layers"]), range(run["model.n_heads"])
    return np.asarray([[point[f"validation_{name}_{i}_{h}"] for h in heads] for i in layers])


def measure(table: Any, seeds: int) -> dict[str, Measured]:
    """Each claim's value and its interval over seeds, of which there should be so many.

    Where some have none, a remark leaves the claim open: the seeds that are left are not drawn at random.
    """
    import numpy as np

    one, two = (table[table["model.n_layers"] == n].set_index("train.seed") for n in (1, DEPTH))

    def of_runs(values_S: Any, why: str = "") -> Measured:
        return of_those_that_have(values_S, seeds, why + "the run was not done", LEVEL)

    flat = "a curve is flat, or "
    return {
        "two_layers": of_runs(two["matching"]),
        "one_layer": of_runs(one["matching"]),
        "one_layer_gain": of_runs(one["repeat_score"] / two["repeat_score"]),
        "together": of_runs(np.log2(two["half_matching"] / two["at_0.5"]), flat),
        "abrupt": of_runs(np.log2(two["at_0.9"] / two["at_0.1"]), flat),
        "cause": of_runs(two["lost_cause"], "no induction heads were found, or "),
        "circuit": of_runs(two["lost_circuit"], "no previous-token heads were found, or "),
        "others": of_runs(two["lost_others"], "there are no other heads, or "),
    }


# --- from the runs to the figure -----------------------------------------------------------------------------------


def run(job: Job) -> Outcome:
    """Trains, looks at the heads, ablates them, draws."""
    from jaxgpt import load, sweep

    size = SIZES[job.scale]
    wanted, setup = configs(size), _setup(size)
    runs = sweep(wanted, job.raw, setup=setup, max_minutes=job.max_minutes)
    check_complete(runs, wanted)
    curves = load(job.raw)[1]
    deep = next(config for config in wanted if config.model.n_layers == DEPTH)
    table = looked_at(runs, curves, job.raw, setup(deep))
    return Outcome(
        measured=measure(table, size.seeds),
        summary=table,
        tables=((f"After {size.steps:,} steps: means over {size.seeds} seeds", _depth_table(table)),
                ("Without some heads of two layers: means over seeds", _ablation_table(table))),
        figures=tuple(draw(table, curves, job.figure)),
        seconds_training=sum(runs["wall_seconds"]),
        device=runs["device"].iloc[0],
    )  # fmt: skip


def _setup(size: Size) -> Callable[[RunConfig], Source]:
    from jaxgpt import corpus
    from jaxgpt.tasks import recall

    if not size.text:
        return lambda config: recall.repeats_source(config, size.shortest, size.longest)
    first = configs(size)[0]
    text = corpus.load(first.data.corpus, first.data.validation_fraction, first.model.context)
    return lambda config: recall.words_source(config, text, size.shortest, size.longest)


GROUPS = {"cause": "induction heads", "circuit": "previous-token heads", "others": "all other heads"}


def _depth_table(table: Any) -> pandas.DataFrame:
    import pandas

    return pandas.DataFrame(
        {"layers": layers, "largest prefix matching": f"{rows['matching'].mean():.2f}",
         "largest previous-token": f"{rows['previous'].mean():.2f}",
         "loss of first tokens": f"{rows['first'].mean():.2f}",
         "of repeated ones": f"{rows['again'].mean():.2f}", "repeat score": f"{rows['repeat_score'].mean():.2f}",
         "step of half its change": f"{rows['at_0.5'].mean():.0f}"}
        for layers, rows in table.groupby("model.n_layers")
    )  # fmt: skip


def _ablation_table(table: Any) -> pandas.DataFrame:
    import pandas

    two = table[table["model.n_layers"] == DEPTH]
    return pandas.DataFrame(
        {"without": words, "heads": f"{two[f'heads_{name}'].mean():.1f}",
         "share of the repeat score lost": f"{two[f'lost_{name}'].mean():.2f}"}
        for name, words in GROUPS.items()
    )  # fmt: skip


def draw(table: Any, curves: Any, path_stem: Path) -> list[Path]:
    """Scores of the heads and of the models over training, and what ablation costs; writes PNG and SVG."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from analysis import plots

    with mpl.rc_context(plots.STYLE):
        figure = Figure(figsize=(11.5, 4.6), layout="constrained")
        panels = figure.subplots(1, 3, width_ratios=(1.2, 1.2, 1))
        seen = curves.dropna(subset=["validation_matching"]).merge(table[["run_id", "model.n_layers"]], on="run_id")
        _draw_curves(panels[0], seen, "matching", "prefix-matching score", "The best head of each model")
        _draw_curves(
            panels[1], seen, "repeat_score", "loss of repeated minus first tokens (nats)", "In-context learning"
        )
        _draw_ablations(panels[2], table)
        return plots.save(figure, path_stem)


def _draw_curves(axes: Any, seen: Any, name: str, label: str, title: str) -> None:
    """One line per run, coloured by depth."""
    from analysis import plots

    for layers, (colour, _) in plots.size_styles(seen["model.n_layers"].unique()).items():
        mine = seen[seen["model.n_layers"] == layers].sort_values("step")
        for i, (_, curve) in enumerate(mine.groupby("run_id")):
            words = f"{layers} layer{'s' if layers > 1 else ''}" if i == 0 else None
            axes.plot(curve["step"], curve[f"validation_{name}"], color=colour, lw=1.3, label=words)
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.set_title(title)
    axes.legend()


def _draw_ablations(axes: Any, table: Any) -> None:
    """One point per seed and group."""
    two: Any = table[table["model.n_layers"] == DEPTH]
    for i, name in enumerate(GROUPS):
        lost_S = two[f"lost_{name}"].dropna()
        axes.plot(_spread(i, lost_S), lost_S, "o", color="#1f5a8f", ms=6, mec="white", mew=0.6)
    axes.axhline(0, color="0.5", lw=0.8)
    axes.set_xticks(range(len(GROUPS)), [words.replace(" ", "\n", 1) for words in GROUPS.values()])
    axes.set_xlim(-0.5, len(GROUPS) - 0.5)
    axes.set_ylabel("share of the repeat score lost")
    axes.set_title("Two layers without some heads")


def _spread(centre: float, values: Sequence[float]) -> numpy.ndarray:
    import numpy as np

    return centre + 0.06 * (np.arange(len(values)) - (len(values) - 1) / 2)


PAPER = Paper(
    name="olsson2022",
    title="Induction heads appear when in-context learning does, and cause it",
    source=OLSSON,
    claims=CLAIMS,
    takes={
        "smoke": "a quarter of a minute",
        "laptop": "about 2 minutes on 2 CPU cores",
        "paper": "for a GPU; not yet run",
    },
    run=run,
)
