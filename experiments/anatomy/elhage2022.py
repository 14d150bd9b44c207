"""Can a model hold more features than it has dimensions? The toy model of superposition (Elhage et al. 2022).

Units of a language model often answer to several unrelated things. One reason may be that features are sparse: where
few are there at a time, a model can give two of them directions that are not orthogonal, and the ReLU hides most of the
interference. The toy model shows it: n features, each absent with probability S (the sparsity), go through m < n
dimensions and back with the same matrix, x' = relu(W^T W x + b), and the error of each counts by its importance.

What Elhage et al. state, and what is known exactly beside it:

- dense features: the model represents as many as it has dimensions, the most important ones, as the linear model does;
- sparse ones: it represents more, first in antipodal pairs that share a dimension. The paper measures features per
  dimension by |W|_F^2 / m, since a feature that is represented has a column of length about 1. Of very sparse features
  the columns grow longer (on seed 100, |W|_F^2 / m came to 5.7, and only 4 features per dimension exist), so that there
  the claims count the columns of squared length above .5; the table has both. (Dense features of equal importance are
  all alike to the loss: any m directions among them are as good, and few columns are long.)
- without the ReLU it never does. The optimum is exact: the m most important features, and the loss is the variance of
  the others. This is the control;
- in between there is a phase change: with two features and one dimension, the second feature is not represented at all
  or shares the dimension, and the best model changes from one to the other at once. Where, and by how much, follows
  from the exact loss, which is minimised numerically (`pair_optimum`); the claims hold its numbers.

Each run holds several models that start elsewhere, and the best of them on test data (of two features: by the exact
loss) speaks for it, since this loss has poor local minima. Our 20 features and 5 dimensions with importance .7^i are
those of the paper's first figures; features of equal importance show how many fit. The rate, the steps, the batch and
the number of models were chosen on seeds 100 and 101; expected values and margins were fixed before any run, the
measure of claims 3 and 4 after those of seed 100.

Letters: n features, m dimensions, R models of a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.claims import Claim, Measured, of_those_that_have, spoken
from experiments.registry import Job, Outcome, Paper, check_complete
from jaxgpt.config import RunConfig, override

if TYPE_CHECKING:
    import numpy
    import pandas

    from jaxgpt.run import Source

ELHAGE = "Elhage et al. 2022"
EXACT = f"{ELHAGE}; exact loss, minimised"
LEVEL = 0.9
RANKED, LINEAR, EQUAL, PAIR = "ranked", "linear", "equal", "pair"  # kinds of runs
DECAY = {RANKED: 0.7, LINEAR: 0.7, EQUAL: 1.0, PAIR: 0.5}  # of the importance from feature to feature
# Of the pair's best model, by the exact loss: where it changes, and the largest fall between neighbours in PAIRS.
CHANGE, DROP = 0.485, 0.772

CLAIMS = (
    Claim("linear", "without the ReLU, the loss is that of keeping the m most important features: ratio to it, at the "
          "worst density", f"{ELHAGE}; Eckart & Young 1936", 1.0, 0.05, "1", "same_regime", LEVEL, row=85),
    Claim("dense", "dense features: the ReLU model represents as many as it has dimensions (|W|^2 / m is 1)", ELHAGE,
          1.0, 0.1, "features per dimension", "same_regime", LEVEL, row=85),
    Claim("more", "sparse features of unequal importance: it represents more than it has dimensions, 1.2 per dimension "
          "or more of the 4 that there are", ELHAGE, 2.6, 1.4, "features per dimension", "same_regime", LEVEL, row=85,
          possible=(0.0, 4.0)),
    Claim("pairs", "sparse features of equal importance share dimensions at least in pairs, 2 per dimension or more of "
          "4", ELHAGE, 3.0, 1.0, "features per dimension", "same_regime", LEVEL, row=85, possible=(0.0, 4.0)),
    Claim("change", "two features in one dimension: the density at which the best model gives up the less important "
          "one (between two of those tried, which are the interval's ends)", EXACT, CHANGE, 0.03, "density",
          "same_regime", LEVEL, row=85),
    Claim("jump", "it gives it up at once: the largest drop of its column's length, over the other's, between "
          "neighbouring densities", EXACT, DROP, 0.05, "1", "same_regime", LEVEL, row=85, possible=(0.0, 1.2)),
)  # fmt: skip


@dataclass(frozen=True)
class Size:
    """What a scale does. densities: 1 - S, of the larger models; pair_densities: of two features in one dimension.
    models, pair_models: of a run, from starts of their own.
    """

    features: int
    dims: int
    densities: tuple[float, ...]
    pair_densities: tuple[float, ...]
    seeds: int
    steps: int
    batch: int
    models: int
    pair_models: int
    points: int = 4096


PAIRS = (0.25, 0.3, 0.35, 0.4, 0.44, 0.47, 0.5, 0.53, 0.56, 0.6, 0.7)
SIZES = {
    "smoke": Size(6, 2, (1.0, 0.1, 0.03), (0.3, 0.5, 0.7), seeds=3, steps=200, batch=64, models=2, pair_models=2,
                  points=256),
    "laptop": Size(20, 5, (1.0, 0.5, 0.3, 0.1, 0.03, 0.01), PAIRS, seeds=4, steps=3000, batch=256, models=4,
                   pair_models=32),
    "paper": Size(20, 5, (1.0, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05, 0.03, 0.02, 0.01, 0.003, 0.001), PAIRS, seeds=8,
                  steps=10_000, batch=1024, models=16, pair_models=64),
}  # fmt: skip


def arms(size: Size) -> list[tuple[str, float]]:
    """(kind, density) of the runs of a seed."""
    large = [(kind, density) for kind in (RANKED, LINEAR, EQUAL) for density in size.densities]
    return large + [(PAIR, density) for density in size.pair_densities]


def configs(size: Size, seeds: Sequence[int] | None = None) -> list[RunConfig]:
    """Arms x seeds; data_seed says which arm and seed. Adam, its rate falling to 0 on a cosine."""
    return [
        override(RunConfig(), {
            "model.n_heads": 1, "model.context": 1, "train.batch_size": size.batch, "train.steps": size.steps,
            "train.seed": seed, "train.data_seed": 1000 * number + seed, "train.log_every": size.steps,
            "optimizer.learning_rate": 5e-3, "optimizer.beta2": 0.99, "optimizer.weight_decay": 0.0,
            "optimizer.clip": None, "optimizer.final_fraction": 0.0, "train.eval_every": size.steps,
        })
        for number in range(len(arms(size)))
        for seed in (range(size.seeds) if seeds is None else seeds)
    ]  # fmt: skip


def train(job: Job, size: Size) -> Any:
    """The runs as a table with columns kind, density and seed. Raises Unfinished."""
    from jaxgpt import sweep
    from jaxgpt.tasks import superposition

    wanted, table = configs(size), arms(size)

    def setup(config: RunConfig) -> Source:
        kind, density = table[(config.train.data_seed or 0) // 1000]
        n, m, models = (2, 1, size.pair_models) if kind == PAIR else (size.features, size.dims, size.models)
        return superposition.source(config, n, m, models, kind != LINEAR, density, DECAY[kind], size.points)

    runs = sweep(wanted, job.raw, setup=setup, max_minutes=job.max_minutes)
    check_complete(runs, wanted)
    of_R = [table[int(number) // 1000] for number in runs["train.data_seed"]]
    return runs.assign(kind=[arm[0] for arm in of_R], density=[arm[1] for arm in of_R], seed=runs["train.seed"])


# --- what the models hold ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Toy:
    """The best model of a run: weight [m, n] and bias [n]."""

    weight_mxn: numpy.ndarray
    bias_n: numpy.ndarray

    @property
    def per_dimension(self) -> float:
        """|W|_F^2 / m."""
        return float((self.weight_mxn**2).sum() / len(self.weight_mxn))

    @property
    def represented(self) -> int:
        """Features whose column has more than half the squared length of one that is represented."""
        return int(((self.weight_mxn**2).sum(axis=0) > 0.5).sum())

    @property
    def share(self) -> float:
        """Of two features in one dimension: the shorter column's length over the longer one's."""
        import numpy as np

        shorter, longer = np.sort(np.abs(self.weight_mxn[0]))
        return float(shorter / longer)


Toys = dict[tuple[str, float, int], Toy]  # by kind, density and seed


def toys(job: Job, runs: Any) -> Toys:
    """The best model of each run that is done."""
    import numpy as np

    from jaxgpt import checkpoint
    from jaxgpt.tasks.superposition import pair_loss

    found = {}
    for row in runs[runs["status"] == "done"].to_dict("records"):
        state = checkpoint.restore_latest(job.raw / "checkpoints" / row["run_id"])
        assert state is not None, f"{row['run_id']} is done and has no checkpoint"
        params = {name: np.asarray(leaf, float) for name, leaf in state[0]["params"].items()}
        best = int(row["final_best"])
        if row["kind"] == PAIR:
            importance_2 = DECAY[PAIR] ** np.arange(2)
            best = int(np.argmin([
                pair_loss(weight[0], bias, row["density"], importance_2)
                for weight, bias in zip(params["weight"], params["bias"], strict=True)
            ]))  # fmt: skip
        found[row["kind"], row["density"], int(row["seed"])] = Toy(params["weight"][best], params["bias"][best])
    return found


@cache
def pair_optimum(density: float) -> tuple[float, float]:
    """(|c| / |a|, loss) of the best model W = (a, c) of two features in one dimension: the exact loss, minimised from
    the antipodal pair and, in closed form, from the first feature alone.
    """
    import numpy as np
    from scipy.optimize import minimize

    from jaxgpt.tasks.superposition import pair_loss, variance

    importance_2 = DECAY[PAIR] ** np.arange(2)
    found = minimize(lambda v: pair_loss(v[:2], v[2:], density, importance_2), [1.0, -0.8, 0.05, 0.15],
                     method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-11, "maxiter": 2000})  # fmt: skip
    alone = float(importance_2[1] * variance(density))
    if found.fun >= alone:
        return 0.0, alone
    return float(abs(found.x[1] / found.x[0])), float(found.fun)


def linear_ratio(toy: Toy, density: float) -> float:
    """The exact loss of a linear model over the least there is."""
    import numpy as np

    from jaxgpt.tasks.superposition import linear_loss, linear_optimum

    importance_n = DECAY[LINEAR] ** np.arange(len(toy.bias_n))
    least = linear_optimum(density, importance_n, len(toy.weight_mxn))
    return linear_loss(toy.weight_mxn, toy.bias_n, density, importance_n) / least


def change(found: Toys, densities: Sequence[float], seed: int) -> tuple[float, float, float]:
    """The neighbouring densities between which the second feature's share falls most, and its fall. NaN where a run is
    missing.
    """
    import numpy as np

    share_D = [found[PAIR, d, seed].share if (PAIR, d, seed) in found else np.nan for d in densities]
    fall_D = -np.diff(share_D)
    if not np.isfinite(fall_D).all():
        return np.nan, np.nan, np.nan
    at = int(fall_D.argmax())
    return densities[at], densities[at + 1], float(fall_D[at])


def measure(found: Toys, size: Size) -> dict[str, Measured]:
    """Each claim's value and interval over seeds, each of which has models and data of its own."""
    import numpy as np

    seeds, sparsest, why = range(size.seeds), min(size.densities), "a run diverged"

    def counted(density: float, kind: str) -> list[float]:
        its = [found.get((kind, density, seed)) for seed in seeds]
        return [toy.represented / size.dims if toy else np.nan for toy in its]

    def worst(seed: int) -> float:
        there = [linear_ratio(toy, d) if (toy := found.get((LINEAR, d, seed))) else np.nan for d in size.densities]
        return float(np.max(there))  # NaN if one is

    dense_S = [toy.per_dimension if (toy := found.get((RANKED, 1.0, seed))) else np.nan for seed in seeds]
    below_S, above_S, drop_S = zip(*(change(found, size.pair_densities, seed) for seed in seeds), strict=True)
    values = {"linear": [worst(seed) for seed in seeds], "dense": dense_S, "more": counted(sparsest, RANKED),
              "pairs": counted(sparsest, EQUAL), "jump": drop_S}  # fmt: skip
    measured = {name: of_those_that_have(value_S, size.seeds, why, LEVEL) for name, value_S in values.items()}
    # It lies somewhere between its neighbours on the grid, which all seeds share.
    below, above = (of_those_that_have(side_S, size.seeds, why, LEVEL) for side_S in (below_S, above_S))
    middle = (below.value + above.value) / 2
    return measured | {"change": Measured(middle, below.low, above.high, below.seeds, below.remark)}


# --- tables --------------------------------------------------------------------------------------------------------

SAID = {RANKED: "importance falls", LINEAR: "importance falls, no ReLU", EQUAL: "equal importance"}


def feature_table(found: Toys, size: Size) -> pandas.DataFrame:
    """One line per density: features per dimension, and how many features are represented, by kind."""
    import pandas

    def cell(kind: str, density: float) -> str:
        its = [found[kind, density, seed] for seed in range(size.seeds) if (kind, density, seed) in found]
        if not its:
            return "diverged"
        return f"{_mean(t.per_dimension for t in its):.2f} ({_mean(t.represented for t in its):.3g})"

    return pandas.DataFrame(
        {"sparsity": f"{1 - density:g}"} | {name: cell(kind, density) for kind, name in SAID.items()}
        for density in size.densities
    )


def pair_table(found: Toys, size: Size) -> pandas.DataFrame:
    """One line per density of two features in one dimension: the second one's share, measured and exact."""
    import pandas

    def cell(density: float) -> str:
        share_S = [found[PAIR, density, s].share for s in range(size.seeds) if (PAIR, density, s) in found]
        return spoken(share_S, LEVEL, ".2f", (0.0, 1.0)) if share_S else "diverged"

    return pandas.DataFrame(
        {
            "density": f"{density:g}",
            "measured": cell(density),
            "of the exact optimum": f"{pair_optimum(density)[0]:.2f}",
        }
        for density in size.pair_densities
    )


def _mean(values: Any) -> float:
    there = list(values)
    return sum(there) / len(there)


SUMMARY = [*("run_id", "kind", "density", "seed", "status", "per_dimension", "represented", "share"),
           *("final_loss", "final_loss_sem", "train.steps", "wall_seconds", "code_version")]  # fmt: skip


def run(job: Job) -> Outcome:
    """Trains, measures, draws."""
    size = SIZES[job.scale]
    runs = train(job, size)
    found = toys(job, runs)
    of_R = [found.get((row.kind, row.density, int(row.seed))) for row in runs.itertuples()]
    summary = runs.assign(
        per_dimension=[toy and toy.per_dimension for toy in of_R],
        represented=[toy and toy.represented for toy in of_R],
        share=[toy and toy.share if kind == PAIR else None for toy, kind in zip(of_R, runs["kind"], strict=True)],
    )
    n, m = size.features, size.dims
    return Outcome(
        measured=measure(found, size),
        summary=summary.reindex(columns=SUMMARY),
        tables=(
            (f"{n} features in m = {m} dimensions: |W|^2 / m, and in brackets how many have a column longer than .71; "
             f"means over {size.seeds} seeds", feature_table(found, size)),
            (f"Two features in one dimension, the second half as important: length of its column over the first's, "
             f"{size.seeds} seeds with {LEVEL:.0%} interval", pair_table(found, size)),
        ),
        figures=tuple(draw(found, size, job.figure)),
        seconds_training=sum(runs["wall_seconds"]),
        device=runs["device"].iloc[0],
    )  # fmt: skip


# --- the figure ----------------------------------------------------------------------------------------------------

LOOKS = {RANKED: ("#1f5a8f", "o"), LINEAR: ("0.55", "s"), EQUAL: ("#c8641e", "^")}


def draw(found: Toys, size: Size, path_stem: Path) -> list[Path]:
    """Features per dimension against sparsity, W^T W of a dense and a sparse model, and the phase change."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from analysis import plots

    with mpl.rc_context(plots.STYLE):
        figure = Figure(figsize=(11.5, 4.2), layout="constrained")
        panels: Any = figure.subfigures(1, 3, width_ratios=(1.15, 0.75, 1))
        _draw_features(panels[0].subplots(), found, size)
        _draw_matrices(panels[1], found, size)
        _draw_change(panels[2].subplots(), found, size)
        return plots.save(figure, path_stem)


def _draw_features(axes: Any, found: Toys, size: Size) -> None:
    import numpy as np

    inverse_D = 1 / np.asarray(size.densities)
    for kind, (colour, marker) in LOOKS.items():
        for seed in range(size.seeds):
            its_D = [found.get((kind, d, seed)) for d in size.densities]
            y_D = [toy.represented / size.dims if toy else np.nan for toy in its_D]
            axes.plot(inverse_D, y_D, color=colour, marker=marker, ms=5, mec="white", mew=0.6, lw=1, alpha=0.8,
                      label=SAID[kind] if seed == 0 else None)  # fmt: skip
    for level, words in ((1, "one each"), (2, "pairs"), (size.features / size.dims, "all features")):
        axes.axhline(level, color="0.6", lw=0.8, ls=(0, (2, 2)), zorder=1)
        axes.annotate(words, (1.01, level), xycoords=("axes fraction", "data"), fontsize=7.5, color="0.3", va="center")
    axes.set_xscale("log")
    axes.set_ylim(0, 1.4 * size.features / size.dims)
    axes.set_xlabel("1 / (1 - sparsity)")
    axes.set_ylabel("features with |column of W| > .71, by dimensions")
    axes.set_title("Sparse features share dimensions (a line per seed)")
    axes.legend(loc="upper left")


def _draw_matrices(figure: Any, found: Toys, size: Size) -> None:
    """W^T W of the first seed's models whose features fall in importance."""
    shown = [(d, toy) for d in (max(size.densities), min(size.densities)) if (toy := found.get((RANKED, d, 0)))]
    for axes, (density, toy) in zip(figure.subplots(len(shown), 1, squeeze=False)[:, 0], shown, strict=True):
        image = axes.imshow(toy.weight_mxn.T @ toy.weight_mxn, cmap="RdBu_r", vmin=-1, vmax=1)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.grid(visible=False)
        axes.set_title(f"W$^T$W, sparsity {1 - density:g}")
        axes.set_xlabel("feature, by importance")
        axes.set_ylabel("feature")
        figure.colorbar(image, ax=axes, shrink=0.9, ticks=(-1, 0, 1))


def _draw_change(axes: Any, found: Toys, size: Size) -> None:
    import numpy as np

    low, high = min(size.pair_densities), max(size.pair_densities)
    grid_D = np.linspace(low, high, 46)
    axes.plot(grid_D, [pair_optimum(float(d))[0] for d in grid_D], color="black", lw=1.2, ls=(0, (4, 2)),
              label="exact optimum")  # fmt: skip
    share_by = {d: [found[PAIR, d, s].share for s in range(size.seeds) if (PAIR, d, s) in found]
                for d in size.pair_densities}  # fmt: skip
    points = [(d, share) for d, shares in share_by.items() for share in shares]
    axes.plot(*zip(*points, strict=True), color="#1f5a8f", ls="", marker="o", ms=5, mec="white", mew=0.6,
              label="trained, by seed")  # fmt: skip
    axes.set_ylim(-0.05, 1.25)
    axes.set_xlabel("density, 1 - sparsity")
    axes.set_ylabel("length of the second column / first")
    axes.set_title("Two features, one dimension")
    axes.legend(loc="upper right")


PAPER = Paper(
    name="elhage2022",
    title="More features than dimensions: the toy model of superposition",
    source=ELHAGE,
    claims=CLAIMS,
    takes={
        "smoke": "a quarter of a minute",
        "laptop": "about a minute on 2 CPU cores",
        "paper": "for a GPU; not yet run",
    },
    run=run,
)
