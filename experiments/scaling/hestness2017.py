"""How does the best loss that one can reach fall with the amount of text? Hestness et al. 2017 on our own L(m).

For each part of the corpus, of m distinct tokens: models of several sizes, trained for equally many epochs, each at its
best validation loss; the best size counts. Windows are drawn anew each time: one epoch has seen 63 % of its set. One
architecture beside another: does a better model change the exponent?
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from experiments.claims import Claim, Measured
from experiments.registry import Job, Outcome, Paper, check_complete
from jaxgpt.config import RunConfig, override

if TYPE_CHECKING:
    from pathlib import Path

    from analysis.fit import Fit

SOURCE = "Hestness et al. 2017"
LEVEL = 0.9

CLAIMS = (
    Claim("exponent", "character language models: the best loss falls with the training set as m^-alpha, no floor",
          f"{SOURCE}, section 4.2", 0.094, 0.03, "1", "toy_analogue", LEVEL, 5),
    Claim("architecture", "a better architecture shifts the learning curve but leaves its exponent: LSTM's minus the "
          "transformer's", f"{SOURCE}, abstract", 0.0, 0.03, "1", "toy_analogue", LEVEL, 5),
    Claim("extrapolation", "the power law of the smaller training sets predicts the largest quarter: mean relative "
          "error", "ours", 0.0, 0.03, "1", "toy_analogue", LEVEL, 5),
)  # fmt: skip


@dataclass(frozen=True)
class Size:
    """What a scale does. models: (architecture, width, layers). unique: training sets, in tokens. epochs: of each."""

    models: tuple[tuple[str, int, int], ...]
    unique: tuple[int, ...]
    epochs: int
    seeds: int
    settings: dict[str, Any]
    starts: int = 200
    bootstraps: int = 1000


# Times 1 / width: the demo's rule; for the LSTM the best of .12, .24, .48 and .96 (300 steps, width 48, one seed).
RATE = {"transformer": 0.5, "lstm": 0.96}
# Validations are what the best loss is taken from: sixteen of them in each run.
VALIDATIONS = 16
SIZES = {
    "smoke": Size(
        models=(("transformer", 8, 1), ("lstm", 8, 1)),
        unique=(2**9, 2**10, 2**11, 2**12),
        epochs=2,
        seeds=2,
        settings={"model.n_heads": 2, "model.context": 16, "train.batch_size": 4, "train.eval_windows": 32},
        starts=30,
        bootstraps=50,
    ),
    "laptop": Size(
        models=(("transformer", 16, 2), ("transformer", 32, 3), ("lstm", 48, 1)),
        unique=tuple(2**k for k in range(13, 20)),
        epochs=8,
        seeds=2,
        settings={"model.n_heads": 2, "model.context": 128, "train.batch_size": 8, "train.eval_windows": 256},
    ),
    "paper": Size(
        models=(("transformer", 128, 4), ("transformer", 256, 6), ("transformer", 512, 8), ("lstm", 512, 2)),
        unique=tuple(2**k for k in range(14, 24)),
        epochs=16,
        seeds=3,
        settings={"model.n_heads": 8, "model.context": 256, "train.batch_size": 64, "train.eval_windows": 2048},
    ),
}


def configs(size: Size) -> list[RunConfig]:
    """The runs: models x training sets x seeds."""
    per_step = size.settings["train.batch_size"] * size.settings["model.context"]
    found = []
    for architecture, width, layers in size.models:
        for unique in size.unique:
            steps = unique * size.epochs // per_step
            for seed in range(size.seeds):
                found.append(override(RunConfig(), {
                    "model.architecture": architecture, "model.d_model": width, "model.n_layers": layers,
                    "optimizer.learning_rate": RATE[architecture] / width, **size.settings,
                    "data.training_tokens": unique, "train.steps": steps,
                    "train.eval_every": max(1, steps // VALIDATIONS), "train.seed": seed,
                }))  # fmt: skip
    return found


# --- what they say -------------------------------------------------------------------------------------------------


def best(runs: Any) -> Any:
    """One row per architecture, training set and seed: m (tokens), the best loss of any model (nats per token)."""
    table = runs.assign(m=runs["data.training_tokens"].astype(float), loss=runs["best_loss"].astype(float))
    by = ["model.architecture", "m", "train.seed"]
    lowest = table.loc[table.groupby(by)["loss"].idxmin()]
    return lowest.sort_values(by).reset_index(drop=True)


def fitted(points: Any, size: Size, floor: bool = False) -> Fit:
    """The power law of the best losses, or with a floor. Training sets are drawn whole in the bootstrap: a training
    set that lies off the law does so for all seeds.
    """
    from analysis.fit import fit
    from analysis.laws import POWER, SATURATING

    return fit(SATURATING if floor else POWER, {"x": points["m"].to_numpy()}, points["loss"].to_numpy(),
               objective="squared_log", groups=points["m"].to_numpy(), starts=size.starts,
               bootstraps=size.bootstraps, level=LEVEL)  # fmt: skip


def measure(points: Any, size: Size) -> dict[str, Measured]:
    """Each claim's value and interval."""
    mine, theirs = (points[points["model.architecture"] == name] for name in ("transformer", "lstm"))
    ours, baseline = fitted(mine, size), fitted(theirs, size)
    alpha = ours.parameters["alpha"]
    return {
        "exponent": Measured(alpha.value, *alpha.interval, size.seeds, alpha.remark),
        "architecture": Measured(*_difference(baseline, ours), size.seeds),
        "extrapolation": Measured(*_held_out(mine, size), size.seeds),
    }


def _difference(first: Fit, second: Fit) -> tuple[float, float, float]:
    """The first's exponent minus the second's; the bootstraps are independent."""
    import numpy as np

    draws_B = first.sample["alpha"] - second.sample["alpha"]
    low, high = np.quantile(draws_B, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return first.best["alpha"] - second.best["alpha"], float(low), float(high)


def _held_out(points: Any, size: Size) -> tuple[float, float, float]:
    """Mean relative error of the losses on the largest quarter of the training sets, as the power law of the others
    predicts them. With each bootstrap of the law goes a resample of the held-out runs.
    """
    import numpy as np

    sets = sorted(set(points["m"]))
    cut = sets[len(sets) - max(1, len(sets) // 4)]
    law, larger = fitted(points[points["m"] < cut], size), points[points["m"] >= cut]
    m_G, loss_G = larger["m"].to_numpy(), larger["loss"].to_numpy()
    error_G = law.law.predict(law.best, {"x": m_G}) / loss_G - 1
    error_BxG = (
        law.law.predict({name: draws_B[:, None] for name, draws_B in law.sample.items()}, {"x": m_G}) / loss_G - 1
    )
    drawn_BxG = np.random.default_rng(0).integers(len(m_G), size=error_BxG.shape)
    low, high = np.quantile(
        np.take_along_axis(error_BxG, drawn_BxG, axis=1).mean(axis=1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    )
    return float(error_G.mean()), float(low), float(high)


# --- from the runs to the figure -----------------------------------------------------------------------------------

SUMMARY = [
    *("run_id", "model.architecture", "model.d_model", "model.n_layers", "params_total", "data.training_tokens"),
    *("tokens", "train.seed", "status", "best_loss", "final_loss", "wall_seconds", "code_version"),
]


def run(job: Job) -> Outcome:
    """Trains, fits, draws."""
    import pandas

    from jaxgpt import sweep

    size = SIZES[job.scale]
    wanted = configs(size)
    runs = sweep(wanted, job.raw, max_minutes=job.max_minutes)
    check_complete(runs, wanted)
    points = best(runs[runs["status"] == "done"])
    cells = points.groupby(["model.architecture", "m"], as_index=False)[["loss", "params_total"]].mean()
    table = pandas.DataFrame(
        {"architecture": row["model.architecture"], "training set m": f"{int(row['m']):,}",
         "best loss": f"{row['loss']:.3f}", "N of the best model": f"{row['params_total']:,.0f}"}
        for row in cells.to_dict("records")
    )  # fmt: skip
    return Outcome(
        measured=measure(points, size),
        summary=runs.reindex(columns=SUMMARY),
        tables=((f"Best validation loss in nats per byte and its model's size, means of {size.seeds} seeds", table),),
        figures=tuple(draw(runs, points, size, job.figure)),
        seconds_training=sum(runs["wall_seconds"]),
        device=runs["device"].iloc[0],
        corpus_sha256=runs["corpus_sha256"].iloc[0],
    )


LOOKS = {"transformer": ("#1f5a8f", "o"), "lstm": ("#c2571a", "s")}


def draw(runs: Any, points: Any, size: Size, path_stem: Path) -> list[Path]:
    """Best loss against training set with both laws, and each model's curve behind them; writes PNG and SVG."""
    import matplotlib as mpl
    import numpy as np
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, NullLocator

    from analysis import plots
    from analysis.fit import predict

    with mpl.rc_context(plots.STYLE):
        figure = Figure(figsize=(7.2, 4.8), layout="constrained")
        axes = figure.subplots()
        m_G = np.geomspace(points["m"].min() / 1.2, points["m"].max() * 1.2, 80)
        by = ["model.architecture", "model.d_model", "data.training_tokens"]
        means = runs.groupby(by, as_index=False)["best_loss"].mean()
        for (architecture, width), each in means.groupby(by[:2]):
            axes.plot(each["data.training_tokens"], each["best_loss"], color=LOOKS[architecture][0], lw=0.8, alpha=0.45)
            axes.annotate(f"width {width}", (each["data.training_tokens"].iloc[-1], each["best_loss"].iloc[-1]),
                          xytext=(5, 0), textcoords="offset points", fontsize=7, color="0.35", va="center")  # fmt: skip
        for architecture, (colour, marker) in LOOKS.items():
            mine = points[points["model.architecture"] == architecture]
            for floor, dashes in ((False, "-"), (True, (0, (4, 1.5)))):
                law = fitted(mine, size, floor)
                loss_G, low_G, high_G = predict(law, x=m_G)
                words = f"E + A / m^{law.best['alpha']:.2f}" if floor else f"A / m^{law.best['alpha']:.3f}"
                axes.plot(m_G, loss_G, color=colour, ls=dashes, lw=1.3, label=f"{architecture}: {words}")
                if not floor:
                    axes.fill_between(m_G, low_G, high_G, color=colour, alpha=0.15, lw=0)
            axes.plot(mine["m"], mine["loss"], ls="", marker=marker, ms=5.5, mec="white", mew=0.6, color=colour)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_ylim(points["loss"].min() * 0.93, points["loss"].max() * 1.08)
        axes.yaxis.set_major_locator(MaxNLocator(8))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
        axes.xaxis.set_major_formatter(lambda value, _: plots.short(value))
        axes.set_xlabel("training set m (distinct tokens)")
        axes.set_ylabel("best validation loss (nats per byte)")
        axes.set_title("Learning curves: the best loss of any model size, each seed")
        axes.legend(loc="lower left")
        return plots.save(figure, path_stem)


PAPER = Paper(
    name="hestness2017",
    title="Learning curves: does the best loss fall as a power of the training set?",
    source=SOURCE,
    claims=CLAIMS,
    takes={
        "smoke": "half a minute",
        "laptop": "about 5 minutes on 2 CPU cores",
        "paper": "for a GPU; not yet run",
    },
    run=run,
)
