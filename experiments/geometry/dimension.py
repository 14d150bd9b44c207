"""How many dimensions do a language model's representations fill, layer by layer? It depends on how one asks.

One hears that representations "lie on a manifold of far fewer dimensions than the model is wide", and that the number
falls from about 1000 at the input to about 50 at the output. Valeriani et al. 2023 measured another shape, a hunchback:
up to a peak in inner layers, then down again (for images from about 11 by 25 to 32 to about 11). Schulte & Ruegamer
2026 hold that such estimates do not track the true dimension at all. Here, on the family of small models of bytes:

- two clouds of points at every stage (the embedding; the stream after each block; the last one normed, which the output
  matrix reads). Windows: the mean over a window's positions, as Valeriani et al. take it. Tokens: the last position of
  each window. One point per window, so that none repeats a context, and one position, so that points do not lie in
  groups by their position. They still do by their byte, whose vector the stream carries, most of all in untrained
  models: a small d says that too, and is held against theirs. At the embedding a token is its byte: a set of so many
  points, no manifold (repetitions are dropped, and the table says how many are left). Claims on tokens leave it out.
- TwoNN by maximum likelihood (Facco et al. 2017) for d; beside it the published fit, Gride (Denti et al. 2022) at
  larger scales, and the participation ratio of the covariance, which knows no curvature.
- nulls: the untrained model; the trained one with every tensor's numbers shuffled; a Gaussian of the same mean and
  covariance, with as many points. Short of points, TwoNN makes every cloud's d small: a d far below the width says
  little unless the Gaussian's is far above it.
- a manifold has one dimension, however many points are drawn from it: d by the number of points, for the cloud and its
  Gaussian. What it would be with more points than these is not said.
- clouds whose d is known, turned at random into many coordinates, with and without noise.

Peaks are not picked by the number that is then told: a model's peak is the inner stage that is highest in the mean over
the other seeds. Nothing was tuned; margins stood before a model was looked at. After a review that had seen the results
tokens are taken at one position (they were at random ones), claims ask for what training adds (`learnt_`) and how d
goes with the width, and where estimates are to agree the larger is divided by the smaller, as ratios above and below 1
had cancelled; numbers of points are then the fewest and all. Intervals are over seeds, each the mean over widths, one
per draw for known clouds. Figures and tables: dimension_figure.py. Letters: W windows,
T tokens, D width, S stages.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from experiments.anatomy import family
from experiments.claims import Claim, Measured, of_those_that_have
from experiments.registry import Job, Outcome, Paper

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy
    import pandas

    from jaxgpt.config import ModelConfig

LEVEL = 0.9
BELIEF = "a common belief"
HUNCHBACK = "after Valeriani et al. 2023"
VIEWS = ("windows", "tokens")
LOW, HIGH, COORDINATES, NOISE = (2, 5), 20, 64, 0.01  # dimensions of known clouds that claims are about, and where

CLAIMS = (
    Claim("falls", "the dimension falls from 1000 at the input to 50 at the output: log2 of input over output, windows",
          BELIEF, 4.3, 1.0, "1", "toy_analogue", LEVEL, row=94),
    Claim("falling", "the dimension falls from stage to stage: share of steps down, windows", BELIEF,
          1.0, 0.1, "1", "toy_analogue", LEVEL, row=94, possible=(0.0, 1.0)),
    # Expected from the images' numbers, 28 over 11; the margin (1.2 to 5 times) is ours.
    *(Claim(f"peak_over_{end}", f"a hunchback: log2 of the inner peak over the {end}, windows", HUNCHBACK, 1.3, 1.0,
            "1", "toy_analogue", LEVEL, row=94) for end in ("input", "output")),
    Claim("peak_over_output_tokens", "a hunchback: log2 of the inner peak over the output, tokens", HUNCHBACK,
          1.3, 1.0, "1", "toy_analogue", LEVEL, row=94),
    Claim("learnt_peak", "training makes the peak: log2 of an inner stage over the higher end, trained minus untrained",
          "after Cheng et al. 2025", 1.3, 1.0, "1", "toy_analogue", LEVEL, row=94),
    Claim("small", "d is far below the width (a tenth at most, our reading): d over the width, mean over widths, "
          "tokens after blocks", BELIEF, 0.05, 0.05, "1", "toy_analogue", LEVEL, row=93),
    Claim("growth", "a few dimensions, however wide the model: slope of log d over log width, tokens after blocks",
          BELIEF, 0.0, 0.25, "1", "toy_analogue", LEVEL, row=93),
    Claim("below_gaussian", "d is below that of a Gaussian of the same covariance: d over its d, tokens after blocks",
          "the manifold hypothesis", 0.5, 0.4, "1", "toy_analogue", LEVEL, row=93),
    Claim("learnt_below", "training brings d below its Gaussian's: d over that one's, trained by untrained, tokens "
          "after blocks", "ours, after the manifold hypothesis", 0.5, 0.4, "1", "toy_analogue", LEVEL, row=93),
    *(Claim(id, f"{words}: the larger by the smaller, after the blocks", source, 1.0, margin, "1", "toy_analogue",
            LEVEL, row=93, possible=(1.0, math.inf)) for id, words, source, margin in (
        ("same_d", "a manifold has one dimension: d from all points and from the fewest, middle width",
         "the manifold hypothesis", 0.1),
        ("two_fits", "estimators agree: TwoNN as published and by maximum likelihood", BELIEF, 0.1),
        ("scales", "estimators agree: Gride at the largest scale and TwoNN", BELIEF, 0.25),
        ("linear", "estimators agree: participation ratio and TwoNN", BELIEF, 0.25))),
    Claim("known_low", "TwoNN finds the dimension of known clouds: its d over 2 and 5, without noise", BELIEF,
          1.0, 0.1, "1", "same_regime", LEVEL, row=93),
    Claim("known_high", "TwoNN finds the dimension of known clouds: its d over 20, without noise", BELIEF,
          1.0, 0.1, "1", "same_regime", LEVEL, row=93),
)  # fmt: skip


@dataclass(frozen=True)
class Size:
    """What a scale measures. points: of a cloud. length: of windows, tokens. more: sample sizes, rising, on one width.

    ks: of Gride. course: steps between the first and the last at which that width is looked at. known: dimensions of
    the known clouds. draws: of each.
    """

    points: int
    length: int
    more: tuple[int, ...]
    ks: tuple[int, ...]
    course: tuple[int, ...]
    known: tuple[int, ...]
    draws: int


SIZES = {
    "smoke": Size(60, 16, (20, 40, 80), (1, 2), (10,), (2, 5, 20), 2),
    "laptop": Size(2000, 64, (250, 500, 1000, 2000, 4000), (1, 4, 16), (200, 600, 1000), (1, 2, 5, 10, 20), 4),
    "paper": Size(4000, 32, (250, 500, 1000, 2000, 4000), (1, 4, 16), (1000, 5000), (1, 2, 5, 10, 20), 4),
}


# --- from models to clouds -----------------------------------------------------------------------------------------


def stages(layers: int) -> tuple[str, ...]:
    """Their names, [layers + 1]: the embedding, then the stream after each block, the last one normed."""
    return ("embedding", *(f"block {i}" for i in range(1, layers)), f"block {layers}, normed")


def windows(scale: str) -> numpy.ndarray:
    """Windows of validation text [W, length], in random order and all different; the family has not trained on it.

    Raises BadInput if the text has too few.
    """
    import numpy as np

    from analysis.dimension import distinct
    from jaxgpt.config import BadInput, override
    from jaxgpt.tasks import text

    size = SIZES[scale]
    wanted = max(size.points, *size.more)
    config = override(family.configs(family.SIZES[scale])[0], {"train.eval_windows": wanted + wanted // 20,
                                                               "model.context": size.length})  # fmt: skip
    token_WxT = distinct(np.asarray(text.reader()(config).data().validation_WxT1)[:, :-1])
    if len(token_WxT) < wanted:
        raise BadInput(
            f"data.corpus={config.data.corpus} has {len(token_WxT)} different windows of {size.length} validation "
            f"tokens; {wanted} are needed: take a longer text"
        )
    return np.random.default_rng(0).permutation(token_WxT)[:wanted].astype(np.int32)


@cache
def clouds(c: ModelConfig) -> Callable[[Any, Any], dict[str, Any]]:
    """A compiled function of parameters and windows [W, T]: both clouds of VIEWS, each [S, W, D]."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from jaxgpt import build

    keep = ["embedding", *(f"layers.{i}.residual" for i in range(1, c.n_layers)), "final"]

    def of(state: Any, token_WxT: Any) -> dict[str, Any]:
        def one(token_T: Any) -> tuple[Any, Any]:
            seen = nnx.merge(build.graphdef(c), state).inspect(token_T[None], keep=keep)[1]
            x_SxTxD = jnp.stack([seen[name][0] for name in keep])
            return x_SxTxD.mean(axis=1), x_SxTxD[:, -1]

        both = jax.lax.map(one, token_WxT, batch_size=16)
        return {view: jnp.swapaxes(x_WxSxD, 0, 1) for view, x_WxSxD in zip(VIEWS, both, strict=True)}

    return jax.jit(of)


# --- from clouds to numbers ----------------------------------------------------------------------------------------


def of_cloud(x_NxD: numpy.ndarray, ks: Sequence[int], seed: int) -> dict[str, float]:
    """All estimates of a cloud: points (different ones), d, fit, gride_<k>, participation, gaussian (its null's d)."""
    from analysis import dimension

    x_MxD = dimension.distinct(x_NxD)
    r_MxK = dimension.neighbours(x_MxD, 2 * max(ks))
    null_MxD = dimension.gaussian_like(x_MxD, seed)
    return {
        "points": len(x_MxD), "d": dimension.twonn(r_MxK).value, "fit": dimension.twonn_fit(r_MxK, draws=1).value,
        **{f"gride_{k}": dimension.gride(r_MxK, k).value for k in ks},
        "participation": dimension.participation_ratio(x_MxD, draws=0).value,
        "gaussian": dimension.twonn(dimension.neighbours(null_MxD, 2)).value,
    }  # fmt: skip


def _d(x_NxD: numpy.ndarray, seed: int) -> dict[str, float]:
    """Of `of_cloud` what is asked of nulls."""
    from analysis import dimension

    x_MxD = dimension.distinct(x_NxD)
    both = {"d": x_MxD, "gaussian": dimension.gaussian_like(x_MxD, seed)}
    found = {name: dimension.twonn(dimension.neighbours(x, 2)).value for name, x in both.items()}
    return {"points": len(x_MxD), **found}


def profiles(members: Sequence[family.Member], scale: str) -> tuple[pandas.DataFrame, pandas.DataFrame]:
    """(profiles, samples). profiles: a row per model, state (trained, untrained, shuffled, or so many `step`s of the
    middle width), view and stage. samples: d by sample size, of trained models of the middle width and of Gaussians.
    """
    import numpy as np
    import pandas

    size, token_WxT = SIZES[scale], windows(scale)
    middle, rows, samples = middle_width(members), [], []
    for member in members:
        known = {"run_id": member.run_id, "width": member.width, "seed": member.seed}
        names, largest = stages(member.model.n_layers), size.more[-1] if member.width == middle else size.points
        for state, step, parameters in _states(member, size.course if member.width == middle else ()):
            count = max(size.points, largest) if state == "trained" else size.points
            seen = clouds(member.model)(parameters, token_WxT[:count])
            for view, x_SxWxD in seen.items():
                for stage, x_WxD in enumerate(np.asarray(x_SxWxD)):
                    known_here = known | {"state": state, "step": step, "view": view, "stage": stage}
                    cloud_NxD = x_WxD[: size.points]
                    found = (
                        of_cloud(cloud_NxD, size.ks, member.seed) if state == "trained" else _d(cloud_NxD, member.seed)
                    )
                    rows.append(known_here | {"name": names[stage]} | found)
                    if state == "trained" and member.width == middle and stage in (len(names) // 2, len(names) - 1):
                        samples += [known_here | {"name": names[stage]} | each
                                    for each in _samples(x_WxD, size.more, member.seed)]  # fmt: skip
    return pandas.DataFrame(rows), pandas.DataFrame(samples)


def middle_width(members: Sequence[family.Member]) -> int:
    """The width that is looked at over training and by sample size."""
    widths = sorted({member.width for member in members})
    return widths[len(widths) // 2]


def _states(member: family.Member, course: Sequence[int]) -> Iterator[tuple[str, int, Any]]:
    trained, last = family.params(member), member.steps[-1]
    yield "trained", last, trained
    yield "untrained", 0, family.params(member, 0)
    yield "shuffled", last, family.shuffled(trained, member.seed)
    for step in course:
        yield "on the way", step, family.params(member, step)


def _samples(x_WxD: numpy.ndarray, sizes: Sequence[int], seed: int) -> Iterator[dict[str, Any]]:
    from analysis import dimension

    x_MxD = dimension.distinct(x_WxD)
    there = [size for size in sizes if size <= len(x_MxD)]
    for cloud, points_MxD in (("model", x_MxD), ("Gaussian", dimension.gaussian_like(x_MxD, seed))):
        for size, d in zip(there, dimension.by_sample_size(points_MxD, there, seed), strict=True):
            yield {"cloud": cloud, "size": size, "d": d}


def known_clouds(size: Size) -> pandas.DataFrame:
    """TwoNN and Gride at the largest k on clouds of known dimension: a row per cloud, dimension, noise and draw."""
    import pandas

    from analysis import dimension

    rows = []
    for name in dimension.MANIFOLDS:
        for true in size.known:
            for noise in (0.0, NOISE):
                for seed in range(size.draws):
                    x_NxD = dimension.cloud(name, true, size.points, COORDINATES, noise, seed)
                    r_NxK = dimension.neighbours(x_NxD, 2 * size.ks[-1])
                    rows.append({"cloud": name, "true": true, "noise": noise, "seed": seed,
                                 "d": dimension.twonn(r_NxK).value,
                                 "gride": dimension.gride(r_NxK, size.ks[-1]).value})  # fmt: skip
    return pandas.DataFrame(rows)


# --- from numbers to claims ----------------------------------------------------------------------------------------


def of(rows: Any, state: str, view: str) -> Any:
    """The profiles' rows of a state and a view."""
    return rows[(rows["state"] == state) & (rows["view"] == view)]


def table_of(rows: Any) -> Any:
    """d by model (index: seed, width) and stage (columns, from the input to the output)."""
    return rows.pivot_table(index=["seed", "width"], columns="stage", values="d")


def at_peak(d: Any) -> Any:
    """By model: d at the inner stage that is highest in the mean over the other seeds of its width."""
    import pandas

    inner = d.iloc[:, 1:-1]

    def one(seed: int, width: int) -> float:
        others = inner[
            (inner.index.get_level_values("seed") != seed) & (inner.index.get_level_values("width") == width)
        ]
        return float(inner.loc[(seed, width), others.mean().idxmax()])

    return pandas.Series([one(seed, width) for seed, width in d.index], index=d.index)


def by_seed(value: Any, seeds: int) -> Measured:
    """A number per model, or several: over seeds, each the mean over widths and all else. A seed that lacks one has
    none, as the mean of those that are left would be that of another family.
    """
    import numpy as np

    rest = [name for name in value.index.names if name not in (None, "seed")]
    table = value.rename("value").reset_index()
    table = table.pivot_table(index="seed", columns=rest or None, values="value", dropna=False)
    missing = "a run of theirs diverged, or its points are too few"
    return of_those_that_have(np.asarray(table.mean(axis=1, skipna=False), float), seeds, missing, LEVEL)


def apart(a: Any, b: Any) -> Any:
    """How many times the larger is the smaller, one by one: a mean of plain ratios would hide what cancels."""
    import numpy as np

    return np.maximum(a / b, b / a)


def measure(rows: Any, samples: Any, known: Any, seeds: int) -> dict[str, Measured]:
    """Each claim's value and its interval over so many seeds."""
    import numpy as np

    d, tokens, bare = (table_of(of(rows, *which)) for which in (("trained", "windows"), ("trained", "tokens"),
                                                                ("untrained", "windows")))  # fmt: skip
    peak, first, last = at_peak(d), d.iloc[:, 0], d.iloc[:, -1]
    hunch = [np.log2(at_peak(each) / each.iloc[:, [0, -1]].max(axis=1)) for each in (d, bare)]
    values = {
        "falls": np.log2(first / last),
        "falling": (d.diff(axis=1).iloc[:, 1:] < 0).mean(axis=1),
        "peak_over_input": np.log2(peak / first),
        "peak_over_output": np.log2(peak / last),
        "peak_over_output_tokens": np.log2(at_peak(tokens) / tokens.iloc[:, -1]),
        "learnt_peak": hunch[0] - hunch[1],
    }
    index = ["seed", "width", "stage"]
    after, untrained = (rows[(rows["state"] == state) & (rows["stage"] > 0)] for state in ("trained", "untrained"))
    of_tokens, bare_tokens = (each[each["view"] == "tokens"].set_index(index) for each in (after, untrained))
    after = after.set_index([*index, "view"])
    below = of_tokens["d"] / of_tokens["gaussian"]
    tokens_d = (
        of_tokens["d"].rename("d").reset_index().pivot_table(index="seed", columns="width", values="d", dropna=False)
    )
    widest = f"gride_{max(int(name.removeprefix('gride_')) for name in rows if name.startswith('gride_'))}"
    values |= {
        "small": of_tokens["d"] / of_tokens.index.get_level_values("width"),
        "growth": np.log(tokens_d).apply(_slope, axis=1),
        "below_gaussian": below,
        "learnt_below": below / (bare_tokens["d"] / bare_tokens["gaussian"]),
        "two_fits": apart(after["fit"], after["d"]),
        "scales": apart(after[widest], after["d"]),
        "linear": apart(after["participation"], after["d"]),
    }
    by_size = samples[samples["cloud"] == "model"].pivot_table(
        index=["seed", "view", "stage"], columns="size", values="d"
    )
    values["same_d"] = apart(by_size[by_size.columns[-1]], by_size[by_size.columns[0]])
    plain = known[known["noise"] == 0].set_index(["seed", "cloud", "true"])
    share, true = plain["d"] / plain.index.get_level_values("true"), plain.index.get_level_values("true")
    draws = {"known_low": share[true.isin(LOW)], "known_high": share[true == HIGH]}
    return {name: by_seed(value, seeds) for name, value in values.items()} | {
        name: by_seed(value, known["seed"].nunique()) for name, value in draws.items()
    }


def _slope(log_W: Any) -> float:
    """Least squares of logarithms by width over the logarithm of the width; NaN where a width has none."""
    import numpy as np

    return (
        float(np.polyfit(np.log(log_W.index.to_numpy(float)), log_W.to_numpy(), 1)[0])
        if log_W.notna().all()
        else math.nan
    )


def run(job: Job) -> Outcome:
    """Takes the family's checkpoints and their nulls, estimates, draws."""
    from experiments.geometry import dimension_figure as shown

    runs, members = family.train(job)
    rows, samples = profiles(members, job.scale)
    known = known_clouds(SIZES[job.scale])
    ends = rows[rows["state"] != "on the way"]
    wide = ends.assign(column=ends["state"] + " " + ends["view"] + " " + ends["name"])
    wide = wide.pivot_table(index="run_id", columns="column", values="d", sort=False).reset_index()
    kept = ["run_id", "model.d_model", "train.seed", "params_total", "final_loss", "code_version"]
    return Outcome(
        measured=measure(rows, samples, known, family.SIZES[job.scale].seeds),
        summary=runs[kept].merge(wide, on="run_id"),
        tables=shown.tables(rows, samples, known),
        figures=tuple(shown.draw(rows, samples, known, job.figure)),
        seconds_training=sum(runs["wall_seconds"]),
        device=runs["device"].iloc[0],
        corpus_sha256=runs["corpus_sha256"].iloc[0],
    )


PAPER = Paper(
    name="dimension",
    title="How many dimensions representations fill, layer by layer: estimators, nulls and numbers of points",
    source="common beliefs; Valeriani et al. 2023; Cheng et al. 2025; Facco et al. 2017; Denti et al. 2022",
    claims=CLAIMS,
    takes={
        "smoke": "10 seconds",
        "laptop": "2 minutes on 2 CPU cores, plus 5, once, for the models that 8 commands share",
        "paper": "for a GPU; not yet run",
    },
    run=run,
)
