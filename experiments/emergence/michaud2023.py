"""Do many small jumps add up to a smooth power law? Multitask sparse parity (Michaud et al. 2023).

A network learns T tasks that share nothing; task t is asked for with probability p_t ~ t^-(1 + alpha). Suppose that a
task is learnt as a whole or not at all, the frequent ones first (the quantization hypothesis). Then the loss after n
learnt tasks is ln 2 x (p_(n+1) + ... + p_T). If each task takes its share of the network, n grows in proportion to the
parameters N; if each takes so many samples of its own, n is where D p_n is that number, so n ~ D^(1 / (1 + alpha)), and
likewise for the steps S of a training on new data. With endlessly many tasks the loss falls as
N^-alpha, D^-(alpha / (1 + alpha)), S^-(alpha / (1 + alpha)): smooth laws, made of jumps.

Ours are 40 tasks, far from endless: a straight line through the losses measures the end of the sum as much as alpha. So
each loss is turned into the number of tasks that leaves it (analysis.quanta.learnt, exact), the growth n ~ x^gamma is
fitted, and the exponent is alpha gamma. A table shows the plain power law's exponent beside it, and alpha gamma of both
halves of the scale: where these differ (D), the mean slope is no power law. In D a task that is not learnt costs more
than ln 2, since the samples are known by heart; each counts as ln 2 at most. That was changed after a review that had
seen the numbers, and lowers n's growth there (alpha .2: from .217 to about .19).

Each network has one hidden layer and Adam at a constant rate, as in the paper. N: widths, each trained for long on new
data. D: a wide network goes through the same samples again and again, and counts where its loss on new inputs is
lowest, as the paper does. S: a wide network on new data. Bits are -1 and 1 instead of 0 and 1, and there are 24 of them
instead of 100, so that minutes suffice. With 24 there are 1.7e7 inputs a task, so that "new" data repeat a little: at
alpha .8 about 23 % of the first task's validation inputs have been drawn by the end.

A task counts as learnt where its loss comes below 20 % of ln 2, and its fall from 80 % to 20 % of ln 2 has a width in
the logarithm of steps or parameters. It is a jump if that is at most a third of the width of the mean loss.

The rate (1e-2), the width, the steps and the grids were chosen on a dozen trainings of seed 100 and on other masks.
What counts as a jump, and all margins, were fixed before any of the trainings reported here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.claims import Claim, Measured, of_those_that_have, spoken
from experiments.registry import Job, Outcome, Paper, check_complete
from jaxgpt.config import BadInput, RunConfig, override

if TYPE_CHECKING:
    import numpy
    import pandas

    from jaxgpt.run import Source

MICHAUD = "Michaud et al. 2023"
LEVEL = 0.9
ALPHAS = (0.2, 0.4, 0.8)
RESOURCES = {"N": "parameters", "D": "samples", "S": "steps"}
NARROW = 1 / 3  # of the mean loss's width: as wide as a jump may be
POINTS = 24  # of a training curve that are fitted, evenly spaced in log steps


def gamma(resource: str, alpha: float) -> float:
    """The power with which the number of learnt tasks grows, by theory."""
    return 1.0 if resource == "N" else 1 / (1 + alpha)


CLAIMS = (
    *(Claim(f"{resource}_{alpha:g}", f"alpha {alpha:g}: the loss falls as {resource}^-x ({what})", MICHAUD,
            round(alpha * gamma(resource, alpha), 3), round(0.15 * alpha * gamma(resource, alpha), 3), "1",
            "toy_analogue", LEVEL, row=6)
      for resource, what in RESOURCES.items() for alpha in ALPHAS),
    Claim("time", "a task is learnt at a step that goes as its frequency to the power -1", MICHAUD, -1.0, 0.15, "1",
          "toy_analogue", LEVEL, row=6),
    Claim("order", "tasks are learnt in the order of their frequency (Goodman and Kruskal's gamma)", MICHAUD, 1.0,
          0.1, "1", "toy_analogue", LEVEL, row=6, possible=(-1.0, 1.0)),
    Claim("jump_S", "share of the learnt tasks that jump in time, under cross-entropy", MICHAUD, 1.0, 0.1, "1",
          "toy_analogue", LEVEL, row=6, possible=(0.0, 1.0)),
    Claim("jump_N", "share of the learnt tasks that jump in size, under cross-entropy", MICHAUD, 1.0, 0.1, "1",
          "toy_analogue", LEVEL, row=6, possible=(0.0, 1.0)),
)  # fmt: skip


@dataclass(frozen=True)
class Size:
    """What a scale does. widths: for N, each trained for `steps`; wide: the width for D and S. samples: (D, steps).
    each: inputs per task for validation. every: steps between validations of the runs for D and S.
    """

    tasks: int
    bits: int
    k: int
    widths: tuple[int, ...]
    wide: int
    steps: int
    samples: tuple[tuple[int, int], ...]
    batch: int
    each: int
    every: int
    seeds: int
    rate: float = 1e-2
    beta2: float = 0.95


SIZES = {
    "smoke": Size(6, 8, 2, (4, 8, 16), 32, 480, ((128, 40), (512, 80), (2048, 320)), batch=64, each=16, every=8,
                  seeds=2),
    "laptop": Size(40, 24, 3, (4, 8, 12, 16, 24, 32, 48, 64, 96), 256, 16_000, tuple(
        (512 * m, steps) for m, steps in ((16, 1200), (24, 1200), (32, 1200), (64, 2000), (128, 4000), (256, 8000))
    ), batch=512, each=128, every=40, seeds=4),
    # From one batch of samples on, where the paper has half of one.
    "paper": Size(500, 100, 3, (10, 16, 25, 40, 64, 100, 160, 250, 500), 1000, 200_000, tuple(
        (20_000 * 2**i, 200_000) for i in range(9)
    ), batch=20_000, each=1000, every=200, seeds=4, rate=1e-3, beta2=0.999),
}  # fmt: skip


# --- trainings -----------------------------------------------------------------------------------------------------

Arm = tuple[str, int, float, int, int]  # resource, width, alpha, samples (0: endless), steps


def arms(size: Size) -> list[Arm]:
    """What is trained with every seed."""
    return [
        arm
        for alpha in ALPHAS
        for arm in (
            *(("N", width, alpha, 0, size.steps) for width in size.widths),
            *(("D", size.wide, alpha, samples, steps) for samples, steps in size.samples),
            ("S", size.wide, alpha, 0, size.steps),
        )
    ]


def configs(size: Size) -> list[RunConfig]:
    """Arms x seeds: train.data_seed is arm's number x seeds + seed."""
    return [
        override(RunConfig(), {
            "model.d_model": width, "model.n_heads": 1, "model.d_head": 2, "model.context": 1,
            "train.batch_size": size.batch, "train.steps": steps, "train.seed": seed,
            "train.data_seed": number * size.seeds + seed, "train.log_every": steps,
            "train.eval_every": size.every if resource != "N" else max(1, steps // 8),
            "optimizer.schedule": "constant", "optimizer.warmup_steps": 0, "optimizer.learning_rate": size.rate,
            "optimizer.beta2": size.beta2, "optimizer.weight_decay": 0.0, "optimizer.clip": None,
        })
        for number, (resource, width, _, _, steps) in enumerate(arms(size))
        for seed in range(size.seeds)
    ]  # fmt: skip


def train(job: Job, size: Size) -> tuple[Any, Any]:
    """Runs with columns resource, alpha, samples, seed, and their curves where validated. Raises Unfinished."""
    from jaxgpt import load, sweep
    from jaxgpt.tasks import parities

    wanted, table = configs(size), arms(size)
    most = max(samples for samples, _ in size.samples)
    setting = parities.Setting(size.tasks, size.bits, size.k, size.seeds, size.each, most)

    def setup(config: RunConfig) -> Source:
        number, draw = divmod(config.train.data_seed or 0, size.seeds)
        _, _, alpha, samples, _ = table[number]
        return parities.source(config, setting, alpha, draw, samples or None)

    runs = sweep(wanted, job.raw, setup=setup, max_minutes=job.max_minutes)
    check_complete(runs, wanted)
    arm_R = [table[int(number) // size.seeds] for number in runs["train.data_seed"]]
    columns = {name: [arm[i] for arm in arm_R] for i, name in ((0, "resource"), (2, "alpha"), (3, "samples"))}
    return runs.assign(**columns, seed=runs["train.seed"]), load(job.raw)[1].dropna(subset=["validation_loss"])


# --- what they say -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Series:
    """One seed's losses over a scale: `x_M` (parameters, samples or steps), mean loss [M], those of tasks [M, T]."""

    x_M: numpy.ndarray
    loss_M: numpy.ndarray
    single_MxT: numpy.ndarray


def all_series(runs: Any, curves: Any, size: Size) -> dict[tuple[str, float, int], Series]:
    """By resource, alpha and seed, of seeds all of whose runs were done. "half" is N after half of the training, "size"
    is N with the wide network beside.
    """
    import numpy as np
    import pandas

    names = [f"validation_task_{t}" for t in range(1, size.tasks + 1)]
    by_run = {run_id: curve.sort_values("step") for run_id, curve in curves.groupby("run_id")}
    done, found = runs[~runs["seed"].isin(set(runs[runs["status"] != "done"]["seed"]))], {}
    if done.empty:
        raise BadInput("some run of every seed diverged, which leaves nothing to compare: lower the rate")

    def at(mine: Any, x_M: Any, pick: Callable[[Any], int]) -> Series:
        points = [(curve := by_run[run_id]).iloc[pick(curve)] for run_id in mine["run_id"]]
        return Series(np.asarray(x_M, float), np.asarray([p["validation_loss"] for p in points], float),
                      np.asarray([p[names] for p in points], float).reshape(-1, size.tasks))  # fmt: skip

    for (alpha, seed), mine in done.groupby(["alpha", "seed"]):
        n, d, s = (mine[mine["resource"] == resource] for resource in RESOURCES)
        n, d = n.sort_values("params_total"), d.sort_values("samples")
        sizes = pandas.concat([n, s])
        found["N", alpha, seed] = at(n, n["params_total"], lambda curve: -1)
        found["size", alpha, seed] = at(sizes, sizes["params_total"], lambda curve: -1)
        found["half", alpha, seed] = at(n, n["params_total"], lambda curve: len(curve) // 2 - 1)
        found["D", alpha, seed] = at(d, d["samples"], lambda curve: int(curve["validation_loss"].to_numpy().argmin()))
        for run_id in s["run_id"]:
            curve = by_run[run_id]
            step_M, loss_M = (curve[name].to_numpy(float) for name in ("step", "validation_loss"))
            found["S", alpha, seed] = Series(step_M, loss_M, curve[names].to_numpy(float))
    return found


def thinned(series: Series) -> Series:
    """A training curve at POINTS places, evenly spaced in log steps."""
    import numpy as np

    if len(series.x_M) <= POINTS:
        return series
    wanted = np.geomspace(series.x_M[0], series.x_M[-1], POINTS)
    i_M = np.unique(np.abs(np.log(series.x_M)[:, None] - np.log(wanted)).argmin(axis=0))
    return Series(series.x_M[i_M], series.loss_M[i_M], series.single_MxT[i_M])


def frequencies(size: Size, alpha: float) -> numpy.ndarray:
    """p_T."""
    from jaxgpt.tasks import parities

    return parities.frequencies(size.tasks, alpha)


def exponents(found: dict, size: Size, resource: str, alpha: float) -> numpy.ndarray:
    """alpha gamma of each seed; NaN where fewer than 3 losses lie within the sum."""
    import numpy as np

    from analysis import quanta

    p_T = frequencies(size, alpha)
    series_S = [thinned(series) for series in chosen(found, resource, alpha)]
    return alpha * np.asarray([quanta.growth(s.x_M, quanta.at_most_unlearnt(s.single_MxT, p_T), p_T)[0]
                               for s in series_S])  # fmt: skip


def chosen(found: dict, resource: str, alpha: float) -> list[Series]:
    """One for each seed."""
    return [series for (r, a, _), series in found.items() if (r, a) == (resource, alpha)]


@dataclass(frozen=True)
class Singles:
    """What the single tasks of one seed and alpha do on one scale.

    time_T: where each task's loss crosses half of ln 2; -inf before the first point, inf never. width_T: of its fall in
    natural logarithms of the scale, NaN where it is not learnt or began before the first point. mean_width: of the mean
    loss; where that began before the first point, at least so much.
    """

    time_T: numpy.ndarray
    width_T: numpy.ndarray
    mean_width: float

    @property
    def jumps(self) -> float:
        """The share of tasks with a width that are narrow; NaN without any, and without a width of the mean loss."""
        import numpy as np

        width_K = self.width_T[np.isfinite(self.width_T)]
        if not len(width_K) or not math.isfinite(self.mean_width):
            return math.nan
        return float((width_K <= NARROW * self.mean_width).mean())


def singles(series: Series) -> Singles:
    """The single tasks of one seed."""
    import numpy as np

    from analysis import quanta

    time_T = [quanta.crossing(series.x_M, loss_M, math.log(2) / 2) for loss_M in series.single_MxT.T]
    width_T = [quanta.width(series.x_M, loss_M) for loss_M in series.single_MxT.T]
    return Singles(np.asarray(time_T), np.asarray(width_T), quanta.width(series.x_M, series.loss_M, censored=False))


def measure(found: dict, size: Size) -> dict[str, Measured]:
    """Each claim's value and its interval over seeds, each of which has masks, data and networks of its own."""
    import numpy as np

    from analysis import quanta

    def told(value_S: Any, why: str) -> Measured:
        return of_those_that_have(value_S, size.seeds, f"a run diverged, or {why}", LEVEL)

    measured = {
        f"{resource}_{alpha:g}": told(exponents(found, size, resource, alpha), "fewer than 3 losses lie within the sum")
        for resource in RESOURCES
        for alpha in ALPHAS
    }
    time_AxS = [[singles(series) for series in chosen(found, "S", alpha)] for alpha in ALPHAS]
    size_AxS = [[singles(series) for series in chosen(found, "size", alpha)] for alpha in ALPHAS]
    power_AxS = [
        [quanta.time_exponent(each.time_T, frequencies(size, alpha)) for each in time_S]
        for alpha, time_S in zip(ALPHAS, time_AxS, strict=True)
    ]
    rank_AxS = [[quanta.rank_correlation(each.time_T) for each in time_S] for time_S in time_AxS]
    few = "too few tasks are learnt"
    return measured | {
        "time": told(np.mean(power_AxS, axis=0), few),
        "order": told(np.mean(rank_AxS, axis=0), few),
        "jump_S": told(np.mean([[each.jumps for each in time_S] for time_S in time_AxS], axis=0), few),
        "jump_N": told(np.mean([[each.jumps for each in size_S] for size_S in size_AxS], axis=0), few),
    }


# --- tables --------------------------------------------------------------------------------------------------------

SUMMARY = [
    *("run_id", "resource", "alpha", "samples", "model.d_model", "params_total", "train.steps", "seed", "status"),
    *("final_loss", "best_loss", "final_accuracy", "wall_seconds", "code_version"),
]


def run(job: Job) -> Outcome:
    """Trains, counts learnt tasks, fits, draws."""
    size = SIZES[job.scale]
    runs, curves = train(job, size)
    found = all_series(runs, curves, size)
    return Outcome(
        measured=measure(found, size),
        summary=runs.reindex(columns=SUMMARY),
        tables=(
            (f"Exponent x of loss ~ resource^-x for tasks of frequency t^-(1 + alpha): theory; alpha gamma, where the "
             f"learnt tasks grow as resource^gamma, over {size.seeds} seeds with {LEVEL:.0%} interval; the same of "
             "mean losses, first and last half of the scale; a plain power law through these "
             "losses; the task that the largest has come to; the resource of the first task",
             exponent_table(found, size)),
            (f"Single tasks: how many times the scale (steps S, parameters N) grows while the loss falls from 80 % to "
             f"20 % of ln 2 (median over the learnt tasks; at least, for the mean loss in N), means over {size.seeds} "
             "seeds", jump_table(found)),
        ),
        figures=tuple(draw(found, size, job.figure)),
        seconds_training=sum(runs["wall_seconds"]),
        device=runs["device"].iloc[0],
    )  # fmt: skip


def exponent_table(found: dict, size: Size) -> pandas.DataFrame:
    """One line per resource and alpha."""
    import numpy as np
    import pandas

    from analysis import quanta

    rows = []
    for resource, words in (*RESOURCES.items(), ("half", "parameters, half of the steps")):
        for alpha in ALPHAS:
            value_S, p_T = exponents(found, size, resource, alpha), frequencies(size, alpha)
            theory = gamma("N" if resource == "half" else resource, alpha)
            mean = mean_series(found, resource, alpha)
            first = quanta.first_scale(mean.x_M, mean.single_MxT @ p_T, p_T, theory)
            begin, end = (alpha * x for x in quanta.halves(mean.x_M, mean.single_MxT @ p_T, p_T))
            most = np.mean([quanta.learnt(quanta.at_most_unlearnt(series.single_MxT, p_T).min(), p_T)
                            for series in chosen(found, resource, alpha)])  # fmt: skip
            rows.append({
                "resource": words, "alpha": f"{alpha:g}", "theory": f"{alpha * theory:.3f}",
                "measured": spoken(value_S, LEVEL, ".3f") if np.isfinite(value_S).all() else "too few tasks learnt",
                "first half, last half": f"{_or_dash(begin, '.2f')}, {_or_dash(end, '.2f')}",
                "plain power law": _or_dash(plain_exponent(mean, p_T), ".2f"), "comes to task": f"{most:.1f}",
                "first task at": _or_dash(first, ".3g"),
            })  # fmt: skip
    return pandas.DataFrame(rows)


def mean_series(found: dict, resource: str, alpha: float) -> Series:
    """Means over seeds, of single tasks' losses as far as these are at most ln 2; of a training curve at few points."""
    import numpy as np

    each = [thinned(series) for series in chosen(found, resource, alpha)]
    single_MxT = np.mean([np.minimum(s.single_MxT, math.log(2)) for s in each], axis=0)
    return Series(each[0].x_M, np.mean([s.loss_M for s in each], axis=0), single_MxT)


def plain_exponent(series: Series, p_T: numpy.ndarray) -> float:
    """Of a power law through the losses that the sum's fit takes too; NaN for fewer than 4."""
    from analysis import quanta
    from analysis.fit import fit
    from analysis.laws import KAPLAN_N

    inside_M = quanta.inside(quanta.learnt(series.single_MxT @ p_T, p_T), p_T)
    if inside_M.sum() < 4:
        return math.nan
    return fit(KAPLAN_N, {"N": series.x_M[inside_M]}, series.loss_M[inside_M], starts=20, bootstraps=0).best["alphaN"]


def jump_table(found: dict) -> pandas.DataFrame:
    """One line per alpha."""
    import numpy as np
    import pandas

    rows = []
    for alpha in ALPHAS:
        row = {"alpha": f"{alpha:g}"}
        for resource, words in (("S", "S"), ("size", "N")):
            each = [singles(series) for series in chosen(found, resource, alpha)]
            learnt = np.mean([(series.single_MxT <= 0.2 * math.log(2)).any(0).sum()
                              for series in chosen(found, resource, alpha)])  # fmt: skip
            width_K = np.concatenate([one.width_T[np.isfinite(one.width_T)] for one in each])
            task = math.exp(np.median(width_K)) if len(width_K) else math.nan
            row |= {
                f"{words}: tasks learnt": f"{learnt:.1f}", f"{words}: one task": _or_dash(task, ".2f"),
                f"{words}: mean loss": _or_dash(math.exp(np.mean([one.mean_width for one in each])), ".0f"),
                f"{words}: jumps": _or_dash(float(np.mean([one.jumps for one in each])), ".0%"),
            }  # fmt: skip
        rows.append(row)
    return pandas.DataFrame(rows)


def _or_dash(value: float, form: str) -> str:
    return f"{value:{form}}" if math.isfinite(value) else "-"


# --- the figure ----------------------------------------------------------------------------------------------------

COLOURS = dict(zip(ALPHAS, ("#1f5a8f", "#2e8b57", "#c2571a"), strict=True))
SHOWN = 0.4  # the alpha whose single tasks are drawn: the paper's


def draw(found: dict, size: Size, path_stem: Path) -> list[Path]:
    """Above: mean losses of each alpha and the finite sums of theory. Below: single tasks of one seed, their mean."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from analysis import plots

    with mpl.rc_context(plots.STYLE):
        figure = Figure(figsize=(10.5, 6.4), layout="constrained")
        panels = figure.subplots(2, 3, sharex="col")
        labels = {"N": "parameters N", "D": "samples D, gone through many times", "S": "steps S on new data"}
        for (above, below), (resource, label) in zip(panels.T, labels.items(), strict=True):
            _draw_means(above, found, size, resource)
            _draw_singles(below, found, size, resource)
            above.set_title(f"Loss against {label.split(',')[0]}")
            below.set_xlabel(label)
        panels[0, 0].set_ylabel("mean loss (nats)")
        panels[1, 0].set_ylabel(f"loss of single tasks, alpha {SHOWN:g} (nats)")
        panels[0, 0].legend(loc="lower left")
        return plots.save(figure, path_stem)


def _draw_means(axes: Any, found: dict, size: Size, resource: str) -> None:
    """Dots: means over seeds, with every seed as a thin line; dashed: theory, the first task's scale fitted."""
    import numpy as np
    from matplotlib.ticker import NullFormatter

    from analysis import quanta

    for alpha in ALPHAS:
        colour, p_T = COLOURS[alpha], frequencies(size, alpha)
        for series in chosen(found, resource, alpha):
            axes.plot(series.x_M, series.loss_M, color=colour, lw=0.5, alpha=0.45)
        mean, power = mean_series(found, resource, alpha), gamma(resource, alpha)
        axes.plot(mean.x_M, mean.loss_M, color=colour, marker="o", ls="", ms=4.5, mec="white", mew=0.5,
                  label=f"alpha = {alpha:g}")  # fmt: skip
        first = quanta.first_scale(mean.x_M, mean.single_MxT @ p_T, p_T, power)
        x_G = np.geomspace(mean.x_M[0], mean.x_M[-1], 300)
        if math.isfinite(first):
            axes.plot(x_G, quanta.loss_after((x_G / first) ** power, p_T), color=colour, lw=1.4, ls=(0, (4, 2)))
    axes.plot([], [], color="black", lw=1.4, ls=(0, (4, 2)), label="finite sum, theory's power")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_minor_formatter(NullFormatter())
    lowest = min(series.loss_M.min() for alpha in ALPHAS for series in chosen(found, resource, alpha))
    axes.set_ylim(lowest / 1.5, 1.5)


def _draw_singles(axes: Any, found: dict, size: Size, resource: str) -> None:
    """Thin: single tasks of the first seed, the frequent ones dark; thick: the mean loss of the same network."""
    from matplotlib import colormaps

    series = next(iter(chosen(found, "size" if resource == "N" else resource, SHOWN)))
    for t, loss_M in reversed(list(enumerate(series.single_MxT.T))):
        axes.plot(series.x_M, loss_M, color=colormaps["viridis"](0.92 * t / size.tasks), lw=0.8, alpha=0.8)
    axes.plot(series.x_M, series.loss_M, color="black", lw=2.2, label="mean loss")
    for shade, words in ((0.0, "the most frequent task"), (0.92, "the rarest")):
        axes.plot([], [], color=colormaps["viridis"](shade), lw=1.6, label=words)
    axes.set_ylim(0, 1.05 * series.single_MxT.max())
    if resource == "N":
        axes.legend(loc="lower left", frameon=True, framealpha=0.85)


PAPER = Paper(
    name="michaud2023",
    title="Many jumps, one smooth law: multitask sparse parity against the finite sum over unlearnt tasks",
    source=MICHAUD,
    claims=CLAIMS,
    takes={
        "smoke": "half a minute",
        "laptop": "about 3 minutes on 2 CPU cores",
        "paper": "for a GPU; not yet run",
    },
    run=run,
)
