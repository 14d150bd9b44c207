"""Does the exponent of loss in model size fall as 4 / d with the dimension d of the data?

A network that is piecewise linear cuts the data into pieces. With N parameters a piece has a diameter of about
N^(-1/d), the error in it is of the order of its square, and the squared error falls as N^(-4/d) (Sharma & Kaplan 2022).
Networks that place their pieces well fall faster: 4 / d is what one expects at least. Here students of several widths
learn random ReLU teachers of known input dimension, in float64, on new data at each step; each has the better of its
learning rates. A student that is not trained to its end is not limited by its size alone: the table shows the exponents
after shorter trainings too.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.claims import Claim, Measured, mean_and_interval
from experiments.registry import Job, Outcome, Paper, Unfinished
from jaxgpt.config import RunConfig, override

if TYPE_CHECKING:
    import numpy
    import pandas

SHARMA = "Sharma & Kaplan 2022"
LEVEL = 0.9

CLAIMS = (
    Claim("constant", "the exponent is 4 / d: mean over d of exponent x d / 4", SHARMA, 1.0, 0.25, "1", "toy_analogue",
          LEVEL, row=7),
    Claim("bound", "it is at least 4 / d: by how much exponent x d / 4 falls short of 1, at the worst d", SHARMA, 0.0,
          0.25, "1", "toy_analogue", LEVEL, row=7),
    Claim("power", "the exponent goes as a power of d: d^-1", SHARMA, -1.0, 0.25, "1", "toy_analogue", LEVEL, row=7),
)  # fmt: skip


@dataclass(frozen=True)
class Size:
    """What a scale does. dimensions: of the inputs. widths: of the students' hidden layers. steps: of trainings, each
    with its own schedule; the longest is held against the claims. rates: Adam's, of which each student has the better.
    """

    dimensions: tuple[int, ...]
    widths: tuple[int, ...]
    steps: tuple[int, ...]
    rates: tuple[float, ...]
    seeds: int
    teacher_width: int
    batch: int
    hidden: int = 2


SIZES = {
    "smoke": Size((3, 6), (3, 4, 6, 8), (30, 60), (1e-2,), seeds=2, teacher_width=8, batch=16,
                  hidden=1),
    "laptop": Size((3, 4, 6, 8), (4, 6, 8, 12, 16), (2000, 8000), (6e-3, 1.6e-2, 4e-2), seeds=4, teacher_width=48,
                   batch=256),
    "paper": Size((3, 4, 5, 6, 8), (8, 12, 16, 24, 32, 48, 64), (50_000, 200_000), (1e-3, 4e-3), seeds=8,
                  teacher_width=256, batch=4096),
}  # fmt: skip


def configs(size: Size) -> list[RunConfig]:
    """The students of one input dimension: widths x steps x rates x seeds, trained by Adam down to a rate of zero."""
    return [
        override(RunConfig(), {
            "model.d_model": width, "model.n_heads": 1, "model.d_head": 2, "model.context": 1,
            "train.batch_size": size.batch, "train.steps": steps, "train.seed": seed, "train.log_every": steps,
            "optimizer.learning_rate": rate, "optimizer.beta2": 0.99, "optimizer.weight_decay": 0.0,
            "optimizer.clip": None, "optimizer.final_fraction": 0.0,
        })
        for width in size.widths
        for steps in size.steps
        for rate in size.rates
        for seed in range(size.seeds)
    ]  # fmt: skip


def train(job: Job, size: Size) -> Any:
    """The runs of all dimensions as a table with a column d. Raises Unfinished."""
    import jax
    import pandas

    from jaxgpt import sweep
    from jaxgpt.tasks import teacher

    began, tables = time.monotonic(), []
    for d in size.dimensions:
        wanted = configs(size)

        def setup(config: RunConfig, d: int = d) -> Any:
            return teacher.source(config, d, size.hidden, size.teacher_width, size.seeds)

        with jax.enable_x64(True):
            runs = sweep(wanted, job.raw, setup=setup, max_minutes=job.minutes_left(began))
        if len(runs) < len(wanted):
            raise Unfinished(
                f"time is up: {len(runs)} of {len(wanted)} runs with d = {d} are done; the same command goes on"
            )
        tables.append(runs.assign(d=d))
    return pandas.concat(tables, ignore_index=True)


# --- what they say -------------------------------------------------------------------------------------------------


def best(runs: Any) -> Any:
    """One row per d, steps, seed and width: parameters N, the best rate, the loss there. Not of diverged runs."""
    done = runs[runs["status"] == "done"]
    keys = ["d", "train.steps", "train.seed", "model.d_model"]
    return done.loc[
        done.groupby(keys)["final_loss"].idxmin(), [*keys, "params_total", "final_loss", "optimizer.learning_rate"]
    ]


def exponents(runs: Any, steps: int) -> numpy.ndarray:
    """alpha of L ~ N^-alpha by dimension and seed (d, S), among trainings of so many steps."""
    import numpy as np

    from analysis.fit import fit
    from analysis.laws import KAPLAN_N

    chosen = best(runs)
    chosen = chosen[chosen["train.steps"] == steps]

    def one(rows: Any) -> float:
        n, loss = (rows[name].to_numpy(float) for name in ("params_total", "final_loss"))
        return fit(KAPLAN_N, {"N": n}, loss, starts=20, bootstraps=0).best["alphaN"]

    return np.asarray([[one(rows) for _, rows in mine.groupby("train.seed")] for _, mine in chosen.groupby("d")])


def measure(alpha_dxS: numpy.ndarray, dimensions: Sequence[int]) -> dict[str, Measured]:
    """Each claim's value and its interval over seeds, each of which has a teacher and students of its own."""
    import numpy as np

    d_d = np.asarray(dimensions, float)
    scaled_dxS, seeds = alpha_dxS * d_d[:, None] / 4, alpha_dxS.shape[1]
    power_S = np.polyfit(np.log(d_d), np.log(alpha_dxS), 1)[0]
    each_d = [mean_and_interval(scaled_S, LEVEL) for scaled_S in scaled_dxS]
    short_d = [(max(0.0, 1 - value), max(0.0, 1 - high), max(0.0, 1 - low)) for value, low, high in each_d]
    return {
        "constant": Measured(*mean_and_interval(scaled_dxS.mean(axis=0), LEVEL), seeds),
        "bound": Measured(*max(short_d), seeds),
        "power": Measured(*mean_and_interval(power_S, LEVEL), seeds),
    }


SUMMARY = [
    *("run_id", "d", "model.d_model", "params_total", "train.steps", "optimizer.learning_rate", "train.seed", "status"),
    *("final_loss", "final_loss_sem", "wall_seconds", "code_version"),
]


def run(job: Job) -> Outcome:
    """Trains, fits, draws."""
    size = SIZES[job.scale]
    runs = train(job, size)
    alphas = {steps: exponents(runs, steps) for steps in size.steps}
    return Outcome(
        measured=measure(alphas[size.steps[-1]], size.dimensions),
        summary=runs.reindex(columns=SUMMARY),
        tables=((f"Exponent of the loss in parameters, {size.seeds} seeds with {LEVEL:.0%} interval, by length of the "
                 "training", exponent_table(alphas, size)),
                ("How many students each rate served best", rate_table(runs, size))),
        figures=tuple(draw(runs, alphas, size, job.figure)),
        seconds_training=sum(runs["wall_seconds"]),
        device=runs["device"].iloc[0],
    )  # fmt: skip


def exponent_table(alphas: dict[int, numpy.ndarray], size: Size) -> pandas.DataFrame:
    """One line per dimension: 4 / d, and the exponents after each length of training."""
    import pandas

    def cell(alpha_S: numpy.ndarray) -> str:
        value, low, high = mean_and_interval(alpha_S, LEVEL)
        return f"{value:.2f} ({low:.2f} to {high:.2f})"

    return pandas.DataFrame(
        {"d": d, "4 / d": f"{4 / d:.2f}"}
        | {f"{steps:,} steps": cell(alpha_dxS[i]) for steps, alpha_dxS in alphas.items()}
        for i, d in enumerate(size.dimensions)
    )


def rate_table(runs: Any, size: Size) -> pandas.DataFrame:
    """One line per length of the training, one column per rate: a best rate at an end of the grid may lie beyond it."""
    import pandas

    served = best(runs).groupby(["train.steps", "optimizer.learning_rate"]).size()
    return pandas.DataFrame(
        {"steps": f"{steps:,}"} | {f"rate {rate:g}": str(served.get((steps, rate), 0)) for rate in size.rates}
        for steps in size.steps
    )


# --- the figure ----------------------------------------------------------------------------------------------------


def draw(runs: Any, alphas: dict[int, numpy.ndarray], size: Size, path_stem: Path) -> list[Path]:
    """Loss against parameters for each d, and exponents against 1 / d with the line 4 / d."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from analysis import plots

    with mpl.rc_context(plots.STYLE):
        figure = Figure(figsize=(9.5, 4.3), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.3, 1))
        _draw_losses(left, runs, size)
        _draw_exponents(right, alphas, size)
        return plots.save(figure, path_stem)


def _draw_losses(axes: Any, runs: Any, size: Size) -> None:
    """Geometric means over seeds after the longest training; dashed: slope -4 / d."""
    import numpy as np

    from analysis import plots

    chosen = best(runs)
    chosen = chosen[chosen["train.steps"] == size.steps[-1]].assign(log_loss=lambda t: np.log(t["final_loss"]))
    for d, (colour, marker) in plots.size_styles(size.dimensions).items():
        mean = chosen[chosen["d"] == d].groupby("params_total")["log_loss"].mean()
        n_K, loss_K = mean.index.to_numpy(float), np.exp(mean.to_numpy())
        axes.plot(n_K, loss_K, color=colour, marker=marker, ls="", ms=6, mec="white", mew=0.6, label=f"d = {d}")
        through = math.exp(mean.mean()) * (n_K / np.exp(np.log(n_K).mean())) ** (-4 / d)
        axes.plot(n_K, through, color=colour, lw=1.2, ls=(0, (4, 2)))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("parameters N")
    axes.set_ylabel("squared error / variance of the teacher")
    axes.set_title("Loss against size; dashed: slope -4 / d")
    axes.legend(loc="lower left")


def _draw_exponents(axes: Any, alphas: dict[int, numpy.ndarray], size: Size) -> None:
    import numpy as np

    inverse_d = 1 / np.asarray(size.dimensions)
    axes.plot([0, inverse_d[0]], [0, 4 * inverse_d[0]], color="black", lw=1.2, ls=(0, (4, 2)), label="4 / d")
    for i, (steps, alpha_dxS) in enumerate(alphas.items()):
        last = i == len(alphas) - 1
        each = np.asarray([mean_and_interval(alpha_S, LEVEL) for alpha_S in alpha_dxS]).T
        axes.errorbar(inverse_d, each[0], yerr=abs(each[1:] - each[0]), color="#1f5a8f" if last else "0.6", fmt="o",
                      ms=6, mec="white", mew=0.6, capsize=2, label=f"{steps:,} steps")  # fmt: skip
    axes.set_xlim(0)
    axes.set_ylim(0)
    axes.set_xlabel("1 / d")
    axes.set_ylabel("exponent of the loss in N")
    axes.set_title("Exponent against 1 / dimension")
    axes.legend(loc="upper left")


PAPER = Paper(
    name="sharma2022",
    title="The exponent of loss in model size falls with the dimension of the data",
    source=SHARMA,
    claims=CLAIMS,
    takes={
        "smoke": "a quarter of a minute",
        "laptop": "about 4 minutes on 2 CPU cores",
        "paper": "for a GPU; not yet run",
    },
    run=run,
)
