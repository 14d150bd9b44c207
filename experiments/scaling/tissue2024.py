"""A law of whole curves with learning-rate annealing: fitted to two schedules, does it predict the others?

L(s) = L0 + A S1^-alpha - C S2 (Tissue et al. 2024, eq. 1): S1 is the sum of the learning rates so far, S2 the annealed
area, in which a fall of the rate counts on for about 1 / (1 - lambda) steps. Fitted for each seed to a constant and a
cosine curve, and held against other shapes and twice the length. lambda is the one of MEMORIES that fits the two
curves best; what each of them would have predicted stands in a table. Points after warm-up count; so do the falls.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.claims import Claim, Measured, mean_and_interval
from experiments.registry import Job, Outcome, Paper
from experiments.scaling import curves

if TYPE_CHECKING:
    import numpy
    import pandas

    from analysis.curves import PowerFit

TISSUE = "Tissue et al. 2024"
LEVEL = 0.9
MEMORIES = (0.99, 0.995, 0.998, 0.999)  # lambda: from where the paper's usual range begins to where it ends

CLAIMS = (
    Claim("final", "fitted to a constant and a cosine curve it predicts other schedules: mean |relative error| of the "
          "final loss", f"{TISSUE}, abstract; how accurate is accurate: ours", 0.0, 0.01, "1", "toy_analogue", LEVEL),
    Claim("curve", "and their whole curves, from where no fitted curve has the same training: mean |relative error|",
          f"{TISSUE}, abstract; how accurate is accurate: ours", 0.0, 0.01, "1", "toy_analogue", LEVEL),
    Claim("annealing", "the annealing term is needed: error of the final loss over that of L0 + A S1^-alpha",
          f"{TISSUE}, eq. 1; at most half: ours", 0.25, 0.25, "1", "toy_analogue", LEVEL),
)  # fmt: skip


@dataclass(frozen=True)
class Schedule:
    """A schedule: fields of the optimizer, and whether it has the longer of the two lengths."""

    name: str
    optimizer: Mapping[str, float | str]
    long: bool = False


COSINE = {"schedule": "cosine", "final_fraction": 0.1}
FITTED = (Schedule("constant", curves.CONSTANT), Schedule("cosine", COSINE))
HELD_OUT = (
    Schedule("WSD, last fifth", {"schedule": "wsd", "decay_fraction": 0.2}),
    Schedule("linear", {"schedule": "wsd", "decay_fraction": 1.0}),
    Schedule("cosine, 2 x longer", COSINE, long=True),
    Schedule("WSD, last tenth, 2 x longer", {"schedule": "wsd", "decay_fraction": 0.1}, long=True),
    Schedule("constant, 2 x longer", curves.CONSTANT, long=True),
)


@dataclass(frozen=True)
class Curve:
    """Points of one run after warm-up: step and loss in nats per byte, both (P,), and the rates of all steps (S,)."""

    step_P: numpy.ndarray
    loss_P: numpy.ndarray
    rate_S: numpy.ndarray
    warmup: int

    def variables(self, memory: float) -> tuple[numpy.ndarray, numpy.ndarray]:
        """S1 and S2 at the points."""
        from analysis.curves import areas

        s1_S, s2_S = areas(self.rate_S, memory, self.warmup)
        return s1_S[self.step_P - 1], s2_S[self.step_P - 1]


# --- the runs ------------------------------------------------------------------------------------------------------


def config(size: curves.Size, schedule: Schedule, seed: int) -> Any:
    """The run of a schedule. Constant rates are those of the shared sweep, which are long enough for both lengths."""
    constant = schedule.optimizer == curves.CONSTANT
    steps = size.constant_steps if constant else size.annealed_steps[schedule.long]
    return curves.config(size, size.annealed_width, seed, steps, schedule.optimizer)


def configs(size: curves.Size) -> list:
    """The runs: schedules x seeds, a constant-rate run once."""
    wanted = [config(size, s, seed) for s in (*FITTED, *HELD_OUT) for seed in range(size.annealed_seeds)]
    return list(dict.fromkeys(wanted))


def curve(size: curves.Size, seen: Any, run_ids: Mapping[Any, str], schedule: Schedule, seed: int) -> Curve:
    """A run's points after warm-up, cut at the schedule's length."""
    import numpy as np

    made = config(size, schedule, seed)
    mine = seen[seen["run_id"] == run_ids[made]]
    mine = mine[(mine["step"] > 2 * made.warmup_steps) & (mine["step"] <= size.annealed_steps[schedule.long])]
    step_P = mine["step"].to_numpy(int)
    return Curve(step_P, mine["validation_loss"].to_numpy(float), np.asarray(curves.rates(made)), made.warmup_steps)


def unseen(of: Curve, fitted: list[Curve]) -> Curve:
    """The curve without the points that a fitted curve of the seed has too: while rates are equal, so is training."""
    import numpy as np

    seen = 0
    for other in fitted:
        steps = min(len(of.rate_S), len(other.rate_S))
        apart = np.flatnonzero(~np.isclose(of.rate_S[:steps], other.rate_S[:steps], rtol=1e-5, atol=0))
        seen = max(seen, min(int(apart[0]) if len(apart) else steps, int(other.step_P[-1])))
    new_P = of.step_P > seen
    return replace(of, step_P=of.step_P[new_P], loss_P=of.loss_P[new_P])


# --- what they say -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Law:
    """The law fitted to some curves; without `annealing` its last term is left out."""

    power: PowerFit
    memory: float
    annealing: bool

    def predict(self, of: Curve) -> numpy.ndarray:
        """Loss at the curve's points, (P,) nats per byte."""
        s1_P, s2_P = of.variables(self.memory)
        return self.power.predict(s1_P, s2_P[None] if self.annealing else None)


def fit_law(fitted: list[Curve], memory: float, annealing: bool = True) -> Law:
    """Least squares of the relative error over all points of some curves."""
    import numpy as np

    from analysis.curves import fit_power

    s1, s2 = (np.concatenate(column) for column in zip(*(c.variables(memory) for c in fitted), strict=True))
    loss = np.concatenate([c.loss_P for c in fitted])
    return Law(fit_power(s1, loss, s2[None] if annealing else None), memory, annealing)


def best_law(fitted: list[Curve]) -> Law:
    """The law with the one of MEMORIES that fits best."""
    return min((fit_law(fitted, memory) for memory in MEMORIES), key=lambda law: law.power.scatter)


def errors(law: Law, held_out: list[Curve]) -> tuple[numpy.ndarray, numpy.ndarray]:
    """(predicted / measured - 1 of each final loss (H,), mean of its absolute value over each whole curve (H,))."""
    import numpy as np

    relative = [law.predict(c) / c.loss_P - 1 for c in held_out]
    return np.asarray([e[-1] for e in relative]), np.asarray([np.abs(e).mean() for e in relative])


def measure(
    laws: list[Law], plain: list[Law], fitted: list[list[Curve]], held_out: list[list[Curve]]
) -> dict[str, Measured]:
    """The claims from the laws of each seed, with and without annealing, on what is new of its held-out curves."""
    import numpy as np

    held_out = [[unseen(c, seen) for c in of] for of, seen in zip(held_out, fitted, strict=True)]
    both = [errors(law, of) for law, of in zip(laws, held_out, strict=True)]
    final_S = np.asarray([np.abs(final).mean() for final, _ in both])
    whole_S = np.asarray([whole.mean() for _, whole in both])
    without_S = np.asarray([np.abs(errors(law, of)[0]).mean() for law, of in zip(plain, held_out, strict=True)])
    values = {"final": final_S, "curve": whole_S, "annealing": final_S / without_S}
    return {name: Measured(*mean_and_interval(each), len(each)) for name, each in values.items()}


def run(job: Job) -> Outcome:
    """Trains, fits for each seed, predicts, draws."""
    size = curves.SIZES[job.scale]
    wanted = configs(size)
    runs, seen = curves.train(job, wanted)
    ids = dict(zip(wanted, runs["run_id"], strict=True))
    seeds = range(size.annealed_seeds)
    fitted = [[curve(size, seen, ids, s, seed) for s in FITTED] for seed in seeds]
    held_out = [[curve(size, seen, ids, s, seed) for s in HELD_OUT] for seed in seeds]
    laws = [best_law(of) for of in fitted]
    plain = [fit_law(of, MEMORIES[0], annealing=False) for of in fitted]
    return Outcome(
        measured=measure(laws, plain, fitted, held_out),
        summary=runs.reindex(columns=curves.SUMMARY),
        tables=(
            ("The law of each seed: L0 + A S1^-alpha - C S2, S1 in units of the peak rate x steps", law_table(laws)),
            ("Predicted / measured final loss - 1: mean over seeds (standard deviation)",
             error_table(laws, plain, fitted, held_out)),
        ),
        figures=tuple(draw(laws, plain, fitted, held_out, job.figure)),
        seconds_training=sum(runs["wall_seconds"]),
        device=runs["device"].iloc[0],
        corpus_sha256=runs["corpus_sha256"].iloc[0],
    )  # fmt: skip


def law_table(laws: list[Law]) -> pandas.DataFrame:
    """One line per seed."""
    import pandas

    return pandas.DataFrame(
        {
            "seed": str(seed),
            "L0": f"{law.power.floor:.3f}",
            "A": f"{law.power.scale:.3g}",
            "alpha": f"{law.power.exponent:.3f}",
            "C": f"{law.power.drop_K[0]:.3g}",
            "lambda": f"{law.memory:g}",
            "scatter": f"{law.power.scatter:.2%}",
        }
        for seed, law in enumerate(laws)
    )


def error_table(
    laws: list[Law], plain: list[Law], fitted: list[list[Curve]], held_out: list[list[Curve]]
) -> pandas.DataFrame:
    """One line per held-out schedule; columns: the law, the law at each lambda, the law without annealing."""
    import numpy as np
    import pandas

    kinds = {"the law": laws}
    kinds |= {f"lambda = {memory:g}": [fit_law(of, memory) for of in fitted] for memory in MEMORIES}
    kinds["without S2"] = plain
    cells: dict[str, list[str]] = {"held-out schedule": [s.name for s in HELD_OUT]}
    for name, each in kinds.items():
        final_SxH = np.asarray([errors(law, of)[0] for law, of in zip(each, held_out, strict=True)])
        cells[name] = [f"{e.mean():+.2%} ({e.std(ddof=1):.2%})" for e in final_SxH.T]
    return pandas.DataFrame(cells)


# --- the figure ----------------------------------------------------------------------------------------------------

COLOURS = ("#1f5a8f", "#c2571a", "#2e7d4f", "#7a3b8f", "#8a6d1a")
POINT = {"ms": 5, "mec": "white", "mew": 0.5}


def draw(
    laws: list[Law], plain: list[Law], fitted: list[list[Curve]], held_out: list[list[Curve]], path_stem: Path
) -> list[Path]:
    """The first seed's curves with the law, and the errors of all seeds; writes PNG and SVG."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from analysis import plots

    with mpl.rc_context(plots.STYLE):
        figure = Figure(figsize=(12.5, 4.4), layout="constrained")
        left, middle, right = figure.subplots(1, 3, width_ratios=(0.8, 1.2, 1))
        names = [s.name for s in FITTED]
        _draw_curves(left, laws[0], fitted[0], names, ("0.45", "black"))
        left.set_title("Fitted")
        left.set_ylabel("validation loss (nats per byte)")
        names = [s.name for s in HELD_OUT]
        _draw_curves(middle, laws[0], held_out[0], names, COLOURS)
        middle.set_title("Predicted, one seed: points measured, lines the law")
        for axes in (left, middle):
            axes.set_ylim(middle.get_ylim())
        _draw_errors(right, laws, plain, held_out)
        return plots.save(figure, path_stem)


def _draw_curves(axes: Any, law: Law, some: list[Curve], names: list[str], colours: tuple[str, ...]) -> None:
    for one, name, colour in zip(some, names, colours, strict=True):
        thin = slice(None, None, max(1, len(one.step_P) // 40))
        axes.plot(one.step_P[thin], one.loss_P[thin], ls="", marker="o", ms=3, color=colour, alpha=0.55, mew=0)
        axes.plot(one.step_P, law.predict(one), color=colour, lw=1.3, label=name)
    low, high = (min(c.loss_P.min() for c in some), max(c.loss_P[0] for c in some))
    axes.set_ylim(low - 0.06 * (high - low), high)
    axes.set_xlabel("training steps")
    axes.legend(loc="upper right")


def _draw_errors(axes: Any, laws: list[Law], plain: list[Law], held_out: list[list[Curve]]) -> None:
    """Relative error of each final loss: one point per seed."""
    axes.axvspan(-100 * CLAIMS[0].margin, 100 * CLAIMS[0].margin, color="0.93", lw=0)
    axes.axvline(0, color="0.5", lw=0.8)
    for each, marker, colour, shift, name in ((laws, "o", "#1f5a8f", 0.12, "the law"),
                                              (plain, "s", "0.55", -0.12, "without the annealing term")):  # fmt: skip
        for law, of in zip(each, held_out, strict=True):
            final_H = 100 * errors(law, of)[0]
            (points,) = axes.plot(final_H, [-i + shift for i in range(len(of))], ls="", marker=marker, color=colour,
                                  **POINT)  # fmt: skip
        points.set_label(name)
    axes.set_yticks([-i for i in range(len(HELD_OUT))], [s.name for s in HELD_OUT])
    axes.set_ylim(-len(HELD_OUT) + 0.4, 0.9)
    axes.set_xlabel("predicted / measured final loss - 1 (%)")
    axes.set_title("Error of the final loss, each seed")
    axes.legend(loc="upper right", ncols=2)


PAPER = Paper(
    name="tissue2024",
    title="A law of whole loss curves under any learning-rate schedule",
    source=TISSUE,
    claims=CLAIMS,
    takes={
        "smoke": "half a minute",
        "laptop": "about 3 minutes on 2 CPU cores, with runs that qiu2025 and caballero2023 use too",
        "paper": "for a GPU; not yet run",
    },
    run=run,
)
