"""Are sudden abilities phase transitions? Then they sharpen with the size of the system, in a way that one can measure.

In physics a transition is told from a mere steep rise by what happens as the system grows: the range of the control
parameter in which it takes place shrinks as a power of the system's size, and near it runs are of two kinds, so that
their variance (the susceptibility) grows to the largest possible. Here the control parameter is training time t, and
the width of a rise is ln(t90 / t10), from 10 to 90 % of the way. Two families, whose systems have a size:

- chain: exact match of L answers (jaxgpt.tasks.chains: bijections of 32 symbols, one model for all L). Size: L. This is
  a product of skills by the metric. If each is learnt at a constant rate, 1 - exp(-lambda t), the width is known in
  closed form (analysis.sizes.product_width): it falls, first quickly and then ever more slowly, as 1 / ln L in the end.
  If errors fall as a power of t it does not fall at all.
- parity: the parity of 3 of n bits (jaxgpt.tasks.parities), online. Size: n. Nothing can be known before the three bits
  are found. If what is known of them grows as its own square, dx/dt ~ x^2, from x ~ n^-1/2 at first, then the last
  stretch takes a share ~ n^-1/2 of the whole time. Runs begin at x that differ by a factor, so that ln t50 scatters
  over them by an amount that does not depend on n.
- planted, to see that the measures tell the two apart: noisy runs of the product's closed form, and of a transition
  whose width and whose scatter over runs both shrink as size^-1/2, with as many runs and samples.

What the rise looks like within a run, in the mean of all runs, and how runs scatter are told apart: a mean of sharp
rises at different times is a broad one. `modes` says whether the scores at the time of the largest variance are one
group or two.

Size in the sense of parameters has no such trend to be tested here: `schaeffer2023` has chains over widths. Number of
bits k in the parity is no good size: odd and even ones are learnt in different ways, and there are too few. Settings
were chosen on seeds 100 to 102; claims are about seeds 0 and up. Changed after a review that had seen the numbers (s of
the scatter came out at -.04): the scatter was expected to fall as n^-1/2, without a source and against the law above,
and the chain's width for a single answer was added as a claim, with more frequent measurements of the chain: three of
16 runs had been past 10 % at the first one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.claims import Claim, Measured, of_those_that_have, spoken
from experiments.registry import Job, Outcome, Paper, check_complete
from jaxgpt.config import RunConfig, override

if TYPE_CHECKING:
    import numpy
    import pandas

    from analysis.sizes import Crossing
    from jaxgpt.run import Source

LEVEL = 0.9
K_BITS = 3
FAMILIES = {
    "chain": "chain: all of L answers right",
    "parity": "parity of 3 of n bits",
    "planted product": "planted: product of L skills",
    "planted transition": "planted: width ~ size^-1/2",
}
COLOURS = {"chain": "#1f5a8f", "parity": "#c0562b", "planted product": "#5aa9c9", "planted transition": "#dda15e"}
PHASE = "common statement: abilities are phase transitions"
PRODUCT = "closed form of a product of L skills, each 1 - exp(-lambda t)"


def _claim(
    id: str, statement: str, source: str, expected: float, margin: float, possible: tuple[float, float]
) -> Claim:
    return Claim(id, statement, source, expected, margin, "1", "toy_analogue", LEVEL, 15, possible)


ANY, SHARE = (-math.inf, math.inf), (0.0, 1.0)
CLAIMS = (
    # product_width gives .29 between 8 and 32 and .53 between 1 and 4; a power of L gives the same for both.
    _claim("chain_late", "chain: s of width ~ L^-s from L = 8 to 32", PRODUCT, 0.29, 0.15, ANY),
    _claim("chain_slows", "chain: s from L = 1 to 4 minus s from 8 to 32 (0 for a power of L)", PRODUCT, 0.24, 0.2,
           ANY),
    _claim("chain_width", "chain: width of the rise of a single answer, L = 1", PRODUCT, 3.08, 0.5, ANY),
    _claim("chain_variance", "chain, longest: largest variance over runs as a share of the largest possible",
           "a score that is a metric's product has no two kinds of runs", 0.0, 0.25, SHARE),
    # dx/dt ~ x^2 from n^-1/2, as the module says; what the planted transition does to the scatter, s = 1/2, is outside.
    _claim("parity_width", "parity: s of width within a run ~ n^-s", PHASE, 0.5, 0.4, ANY),
    _claim("parity_scatter", "parity: s of scatter of ln t50 over runs ~ n^-s (0: runs stay as different)",
           "dx/dt ~ x^2 from x ~ n^-1/2 times a factor of the run", 0.0, 0.25, ANY),
    _claim("parity_variance", "parity, most bits: largest variance over runs as a share of the largest possible", PHASE,
           1.0, 0.5, SHARE),
)  # fmt: skip


@dataclass(frozen=True)
class Size:
    """What a scale does. lengths: L, up to the links of a chain at test. bits: n and the steps of each. points: of a
    curve of parities, every: steps between those of the chain's. chains, inputs: at test. bijections, width, steps: of
    the chain's model; hidden: width of the parity's.
    """

    seeds: int
    lengths: tuple[int, ...]
    bits: Mapping[int, int]
    points: int
    chains: int
    inputs: int
    bijections: int
    width: int
    steps: int
    every: int
    hidden: int
    batch: int = 128


SIZES = {
    "smoke": Size(3, (1, 2, 4, 8, 16, 32), {6: 200, 8: 200}, 20, 64, 256, 1, 16, 200, 10, 64),
    "laptop": Size(16, (1, 2, 4, 8, 16, 32), {8: 500, 16: 1000, 32: 2000, 64: 4000, 128: 12_000}, 100, 256, 2048, 16,
                   48, 1500, 5, 128),
    "paper": Size(64, (1, 2, 4, 8, 16, 32, 64, 128), {8: 500, 16: 1000, 32: 2000, 64: 4000, 128: 12_000, 256: 40_000,
                  512: 160_000}, 400, 2048, 16_384, 256, 256, 40_000, 20, 1024),
}  # fmt: skip


def configs(size: Size) -> list[RunConfig]:
    """Chains, and parities by number of bits (in model.context, which they do not use otherwise), x seeds. At constant
    rates, so that no step is special by the schedule.
    """
    from jaxgpt.tasks.chains import SYMBOLS

    chain = {
        "model.d_model": size.width, "model.n_layers": 1, "model.n_heads": 1, "model.context": 2,
        "model.vocab_size": SYMBOLS + size.bijections, "model.d_output": SYMBOLS, "model.positions": "none",
        "train.eval_windows": size.chains, "train.steps": size.steps, "train.eval_every": size.every,
        "optimizer.learning_rate": 3e-3,
    }  # fmt: skip
    parity = [
        {"model.d_model": size.hidden, "model.context": bits, "train.steps": steps, "optimizer.learning_rate": 1e-3,
         "train.eval_every": max(1, steps // size.points)}
        for bits, steps in size.bits.items()
    ]  # fmt: skip
    return [
        override(RunConfig(), {
            "train.batch_size": size.batch, "optimizer.schedule": "constant", "optimizer.warmup_steps": 0,
            "train.log_every": its["train.steps"], "train.seed": seed, **its,
        })
        for its in (chain, *parity)
        for seed in range(size.seeds)
    ]  # fmt: skip


def source(config: RunConfig, size: Size) -> Source:
    """What a run trains on; each seed has its own bijections or bits."""
    from jaxgpt.tasks import chains, parities

    seed = config.train.seed
    if config.model.d_output is not None:
        return chains.source(config, max(size.lengths), seed)
    setting = parities.Setting(1, config.model.context, K_BITS, size.seeds, size.inputs)
    return parities.source(config, setting, 0.0, seed)


# --- what the curves say -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curves:
    """Scores of all runs of a system: its size, t, scores, samples behind each score, what guessing scores, ids."""

    size: int
    t_E: numpy.ndarray
    score_SxE: numpy.ndarray
    samples: int
    chance: float
    run_ids: tuple[str, ...] = ()


def systems(runs: Any, curves: Any, size: Size) -> dict[str, list[Curves]]:
    """By family, sizes rising, one row per seed. Runs that are not done have NaN."""
    from jaxgpt.tasks.chains import SYMBOLS

    done = runs[runs["status"] == "done"]
    seen = curves.dropna(subset=["validation_loss"]).merge(
        done[["run_id", "train.seed", "model.d_output", "model.context"]], on="run_id"
    )

    def one(which: Any, column: str, length: int, samples: int, chance: float) -> Curves:
        ids = tuple(runs[which(runs)].sort_values("train.seed")["run_id"])
        by_step = seen[which(seen)].pivot_table(index="run_id", columns="step", values=column).reindex(ids)
        return Curves(length, by_step.columns.to_numpy(float), by_step.to_numpy(), samples, chance, ids)

    def parity(n: int) -> Any:
        return lambda table: table["model.d_output"].isna() & (table["model.context"] == n)

    return {
        "chain": [one(lambda table: table["model.d_output"].notna(), f"validation_exact_{length}", length, size.chains,
                      SYMBOLS**-length) for length in size.lengths],
        "parity": [one(parity(n), "validation_accuracy", n, size.inputs, 0.5) for n in size.bits],
    }  # fmt: skip


def planted(size: Size) -> dict[str, list[Curves]]:
    """Runs of which it is known what they do: a product of smooth skills, and a transition."""
    import numpy as np

    t_E, rng = np.geomspace(0.005, 500, 2 * size.points), np.random.default_rng(0)
    product, transition = [], []
    for length in size.lengths:
        rate_Sx1 = np.exp(0.05 * rng.standard_normal((size.seeds, 1)))
        rising_SxE = (1 - np.exp(-rate_Sx1 * t_E)) ** length
        half_Sx1 = 2 * rng.standard_normal((size.seeds, 1)) / math.sqrt(length)
        sharp_SxE = 1 / (1 + np.exp(-(np.log(t_E / 2) - half_Sx1) * 2 * math.sqrt(length)))
        for found, share_SxE in ((product, rising_SxE), (transition, sharp_SxE)):
            score_SxE = rng.binomial(size.chains, share_SxE) / size.chains
            found.append(Curves(length, t_E, score_SxE, size.chains, 0.0))
    return {"planted product": product, "planted transition": transition}


def crossings(curves: list[Curves]) -> list[Crossing]:
    """Of each system."""
    from analysis.sizes import crossing

    return [crossing(one.t_E, one.score_SxE, chance=one.chance) for one in curves]


def measure(found: dict[str, list[Curves]], size: Size) -> dict[str, Measured]:
    """Each claim's value and its interval over seeds (of variances and scatter: by the jackknife)."""
    import numpy as np

    from analysis.sizes import exponents

    crossed = {family: crossings(found[family]) for family in ("chain", "parity")}

    def slopes(family: str, first: int, last: int) -> numpy.ndarray:
        chosen = [(c.size, x.width_S) for c, x in zip(found[family], crossed[family], strict=True)
                  if first <= c.size <= last]  # fmt: skip
        return exponents([n for n, _ in chosen], np.stack([width_S for _, width_S in chosen]))

    def of_seeds(values_S: numpy.ndarray) -> Measured:
        why = "it does not get from 10 to 90 % at some size, or was not done"
        return of_those_that_have(values_S, size.seeds, why, LEVEL)

    late_S, early_S = slopes("chain", 8, 32), slopes("chain", 1, 4)
    bits = sorted(size.bits)
    half_KxS = np.stack([x.half_S for x in crossed["parity"]])
    return {
        "chain_late": of_seeds(late_S),
        "chain_slows": of_seeds(early_S - late_S),
        "chain_width": of_seeds(crossed["chain"][0].width_S),
        "chain_variance": jackknife(lambda keep_S: _peak(found["chain"][-1], keep_S), size.seeds),
        "parity_width": of_seeds(slopes("parity", bits[0], bits[-1])),
        "parity_scatter": jackknife(
            lambda keep_S: float(exponents(bits, half_KxS[:, keep_S].std(axis=1, ddof=1)[:, None])[0]), size.seeds
        ),
        "parity_variance": jackknife(lambda keep_S: _peak(found["parity"][-1], keep_S), size.seeds),
    }


def _peak(curves: Curves, keep_S: numpy.ndarray) -> float:
    """NaN where a run is missing."""
    import numpy as np

    from analysis.sizes import crossing

    if not np.isfinite(curves.score_SxE).all():
        return math.nan
    return crossing(curves.t_E, curves.score_SxE[keep_S], chance=curves.chance).peak


def jackknife(statistic: Callable[[numpy.ndarray], float], seeds: int) -> Measured:
    """A statistic of all runs, given the numbers of those to take, with Student's interval from leaving out one at a
    time. A remark where it is not defined, or some run is missing.
    """
    import numpy as np
    from scipy.special import stdtrit

    all_S = np.arange(seeds)
    value, left_S = statistic(all_S), np.asarray([statistic(np.delete(all_S, s)) for s in all_S])
    if not (math.isfinite(value) and np.isfinite(left_S).all()):
        return Measured(math.nan, math.nan, math.nan, 0, "some run does not get halfway, or was not done")
    error = math.sqrt((seeds - 1) / seeds * ((left_S - left_S.mean()) ** 2).sum())
    half = float(stdtrit(seeds - 1, (1 + LEVEL) / 2)) * error
    return Measured(value, value - half, value + half, seeds)


# --- from the runs to the figure -----------------------------------------------------------------------------------


def run(job: Job) -> Outcome:
    """Trains, measures widths and variances beside planted ones, draws."""
    from jaxgpt import load, sweep

    size = SIZES[job.scale]
    wanted = configs(size)
    runs = sweep(wanted, job.raw, setup=lambda config: source(config, size), max_minutes=job.max_minutes)
    check_complete(runs, wanted)
    found = systems(runs, load(job.raw)[1], size) | planted(size)
    summary = _summary(runs, found)
    return Outcome(
        measured=measure(found, size),
        summary=summary,
        tables=(
            (f"Rises over training time t (planted: over a parameter t); {size.seeds} runs each. Width: ln(t90 / t10). "
             "Variance: the largest over runs at one t, share of the largest possible, and groups of runs there",
             _rise_table(found)),
            ("Widths within a run against three laws, each with a free height: root mean square error of ln width, and "
             "share of runs that it fits best", _law_table(found)),
        ),
        figures=tuple(draw(found, job.figure)),
        seconds_training=sum(runs["wall_seconds"]),
        device=runs["device"].iloc[0],
    )  # fmt: skip


def _summary(runs: Any, found: dict[str, list[Curves]]) -> pandas.DataFrame:
    """One line per run and size: ln t50 and width."""
    import pandas

    measured = pandas.DataFrame(
        {"run_id": run_id, "family": family, "size": curves.size, "ln_t50": half, "ln_width": width}
        for family in ("chain", "parity")
        for curves, crossed in zip(found[family], crossings(found[family]), strict=True)
        for run_id, half, width in zip(curves.run_ids, crossed.half_S, crossed.width_S, strict=True)
    )
    return measured.merge(runs[["run_id", "train.seed", "train.steps", "wall_seconds", "code_version"]], on="run_id")


def _there(values_S: numpy.ndarray, form: str = ".2f") -> str:
    """Mean and interval over the runs that have a value, and how many have none."""
    import numpy as np

    there_S = values_S[np.isfinite(values_S)]
    none = f"; {len(values_S) - len(there_S)} have none" if len(there_S) < len(values_S) else ""
    if len(there_S) < 2:
        return "too few runs get there"
    return spoken(there_S, LEVEL, form) + none


def _rise_table(found: dict[str, list[Curves]]) -> pandas.DataFrame:
    import numpy as np
    import pandas

    from analysis.modes import modes

    lines = []
    for family, systems_ in found.items():
        for curves, crossed in zip(systems_, crossings(systems_), strict=True):
            at_S = curves.score_SxE[:, int(np.flatnonzero(curves.t_E == crossed.at)[0])]
            groups = modes(at_S[np.isfinite(at_S)], curves.samples).groups
            half_S = crossed.half_S[np.isfinite(crossed.half_S)]
            lines.append({
                "family": FAMILIES[family], "size": str(curves.size),
                "t50": f"{math.exp(half_S.mean()):.3g}" if len(half_S) else "not reached",
                "width in a run": _there(crossed.width_S),
                "width of the mean": f"{crossed.width:.2f}" if math.isfinite(crossed.width) else "not reached",
                "scatter of ln t50": f"{crossed.scatter:.2g}" if math.isfinite(crossed.scatter) else "not reached",
                "variance": f"{crossed.peak:.2f}", "groups": "undecided" if groups is None else str(groups),
            })  # fmt: skip
    return pandas.DataFrame(lines)


def _law_table(found: dict[str, list[Curves]]) -> pandas.DataFrame:
    import numpy as np
    import pandas

    from analysis.sizes import LAWS, laws
    from analysis.table import FitError

    lines = []
    for family, systems_ in found.items():
        try:
            said = laws([c.size for c in systems_], np.stack([x.width_S for x in crossings(systems_)]))
            cells = {name: f"{law.error:.2f} (best for {law.best:.0%})" for name, law in said.items()}
        except FitError:
            cells = dict.fromkeys(LAWS, "no run has all widths")
        lines.append({"family": FAMILIES[family]} | cells)
    return pandas.DataFrame(lines)


def draw(found: dict[str, list[Curves]], path_stem: Path) -> list[Path]:
    """Rises of both families, widths and variances against size; writes PNG and SVG."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from analysis import plots

    with mpl.rc_context(plots.STYLE):
        figure = Figure(figsize=(11, 7.6), layout="constrained")
        panels = figure.subplots(2, 2)
        _draw_rises(panels[0, 0], found["chain"], "L", "share of chains that are all right", FAMILIES["chain"])
        _draw_rises(panels[0, 1], found["parity"], "n", "accuracy", FAMILIES["parity"])
        _draw_widths(panels[1, 0], found)
        _draw_variances(panels[1, 1], found)
        return plots.save(figure, path_stem)


def _draw_rises(axes: Any, systems_: list[Curves], letter: str, label: str, title: str) -> None:
    import numpy as np

    from analysis import plots

    styles = plots.size_styles([curves.size for curves in systems_])
    for curves in systems_:
        colour = styles[curves.size][0]
        axes.plot(curves.t_E, curves.score_SxE.T, color=colour, lw=0.4, alpha=0.4)
        mean_E = np.nanmean(curves.score_SxE, axis=0)
        axes.plot(curves.t_E, mean_E, color=colour, lw=1.8, label=f"{letter} = {curves.size}")
    axes.set_xscale("log")
    axes.set_xlabel("training step t")
    axes.set_ylabel(label)
    axes.set_title(title)
    axes.legend()


def _draw_widths(axes: Any, found: dict[str, list[Curves]]) -> None:
    """Medians over runs, with all runs small, and the two laws from the first size of the chain on."""
    import numpy as np
    from matplotlib.ticker import NullFormatter

    from analysis.sizes import product_width

    for family, systems_ in found.items():
        size_K = [curves.size for curves in systems_]
        width_KxS = np.stack([crossed.width_S for crossed in crossings(systems_)])
        middle_K = [np.median(row[np.isfinite(row)]) if np.isfinite(row).any() else math.nan for row in width_KxS]
        planted_ = family.startswith("planted")
        if not planted_:
            axes.plot(size_K, width_KxS, ".", color=COLOURS[family], ms=3, alpha=0.4)
        axes.plot(size_K, middle_K, "s--" if planted_ else "o-", color=COLOURS[family], ms=5, mec="white", mew=0.6,
                  lw=1 if planted_ else 1.6, label=FAMILIES[family])  # fmt: skip
    size_G = np.geomspace(1, max(curves.size for curves in found["chain"]), 50)
    axes.plot(size_G, product_width(size_G), color="0.3", lw=1, ls=":", label="product, closed form")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(_plain)
        axis.set_minor_formatter(NullFormatter())
    axes.set_yticks([tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10) if axes.get_ylim()[0] <= tick <= axes.get_ylim()[1]])
    axes.set_xlabel("system size, L or n")
    axes.set_ylabel("width ln(t90 / t10) within a run")
    axes.set_title("Width against size")
    axes.legend()


def _plain(value: float, _: int) -> str:
    return f"{value:g}"


def _draw_variances(axes: Any, found: dict[str, list[Curves]]) -> None:
    for family, systems_ in found.items():
        peak_K = [crossed.peak for crossed in crossings(systems_)]
        style = "s--" if family.startswith("planted") else "o-"
        axes.plot([curves.size for curves in systems_], peak_K, style, color=COLOURS[family], ms=5, mec="white",
                  mew=0.6, label=FAMILIES[family])  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(_plain)
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("system size, L or n")
    axes.set_ylabel("share of the largest possible")
    axes.set_title("Largest variance over runs at one time")


PAPER = Paper(
    name="transition",
    title="Phase transition or not: width and variance of a rise against the size of the system",
    source="as commonly stated: emergence is a phase transition",
    claims=CLAIMS,
    takes={
        "smoke": "half a minute",
        "laptop": "about 3 minutes on 2 CPU cores",
        "paper": "for a GPU; not yet run",
    },
    run=run,
)
