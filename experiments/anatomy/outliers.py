"""Which dimensions of a language model are outliers, when do they come, who makes them, and what are they good for?

In large language models a few of the thousands of dimensions of the residual stream are far larger than the others.
One hears that softmax makes them explode, that they grow layer by layer, carry key semantics and are inevitable, and
that rare words have huge embeddings. Here, on the family of small models, at all of its checkpoints:

- convex: what a head of softmax attention writes is a mean of the values that it sees, with weights that are not
  negative and sum to 1, so that no channel of it can leave their range. We measure by how much it does, in our code.
- who makes them: Adam scales each coordinate of a gradient by itself and so knows the basis, SGD does not (the
  hypothesis of Elhage, Lasenby & Olah 2023). The models of the family's middle width are trained again by SGD with
  momentum, from the same initial parameters on the same data, and compared at the same held-out loss, by the
  kurtosis of a token's stream vector over its dimensions (3: Gaussian), mean over tokens and streams behind blocks.
  Rotated into a random basis the same vectors show what the kurtosis is without outlier dimensions. Where Adam's is no
  higher than that, there is nothing to compare: so it was at width 32, where this was tried first (seeds 0 to 3: 2.88
  against 2.80, SGD's 2.87). Therefore it is done at the middle width, on which the family's rate was chosen.
- how large: massive activations (|x| > 100, and 1000 times the median; Sun et al. 2024), LLM.int8's outlier dimensions
  (|x| >= 6 in a quarter of the layers and 6 % of positions; Dettmers et al. 2022; here of what the linear maps read,
  behind the norms), the top 3 over the median magnitude of a window, and attention sinks.
- where: top 3 over median in each stream, from the embedding on. Sun et al. see it jump within the first layers and
  stay until the last.
- what for: the dimension with the largest |x| on training text, in the stream that the middle block gets, is set to 0,
  or to its mean on that text; other dimensions, drawn at random, are the control. If an outlier is a bias, its mean
  will do as well.
- rare words: rank correlation of how often a token comes in training and the length of its vector, in the token table
  and in the output matrix (weight decay acts on the latter only), beside the untrained ones.

Rates: the family's for Adam (tried on seed 100: .001, .003, .006); SGD's on seed 100 at the same width for 500 steps,
with momentum .95 and as much weight decay per step as Adam has: held-out loss 2.54 at .1, 2.51 at .3, 2.53 at 1. At
`paper` scale SGD's rate is not tuned. Intervals are over seeds, each the mean over widths where there are several.
How many have massive activations was at first a share of models, 1 with a margin of .25; a share of seeds, .75 with
.25, has an interval of its own where all agree. That was changed after the result, none, was known; it is none by both.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.anatomy import family
from experiments.anatomy.family import by_seed
from experiments.claims import Claim, Measured, of_those_that_have, over_seeds, share_of, spoken
from experiments.registry import Job, Outcome, Paper, check_complete
from jaxgpt.config import RunConfig, override

if TYPE_CHECKING:
    import numpy
    import pandas
    from flax import nnx

LEVEL = 0.9
BELIEF = "a common belief"
DETTMERS, SUN, ELHAGE = "Dettmers et al. 2022", "Sun et al. 2024", "hypothesis of Elhage, Lasenby & Olah 2023"
SINK = 0.3  # attention to the first position that makes a head a sink (Gu et al. 2024)
SGD_RATE = 0.3
SHRINK = 5e-4  # of decayed weights per step at the peak: Adam's rate times its weight decay
MATRICES = {"embed.embedding": "token table", "unembed.kernel": "output matrix"}
ADAM, SGD = "Adam", "SGD"
SHUFFLED = -1

CLAIMS = (
    Claim("convex", "softmax attention enlarges nothing: how far outputs leave the range of values, as a share",
          "a convex combination, exact", 0.0, 1e-5, "1", "same_regime", LEVEL, row=75, possible=(0.0, math.inf)),
    Claim("adam", "Adam makes outlier dimensions: kurtosis of SGD's stream over Adam's, at the same loss",
          ELHAGE, 0.5, 0.4, "1", "toy_analogue", LEVEL, row=75, possible=(0.0, math.inf)),
    Claim("massive", "language models have massive activations: share of seeds of which a model has one, most of them",
          SUN, 0.75, 0.25, "1", "toy_analogue", LEVEL, row=77, possible=(0.0, 1.0)),
    Claim("layer_by_layer", "outliers grow layer by layer: share of blocks behind which top over median is larger",
          BELIEF, 1.0, 0.2, "1", "toy_analogue", LEVEL, row=77, possible=(0.0, 1.0)),
    Claim("constant", "they appear early and stay: log2 of top over median, before the last block to behind the first",
          SUN, 0.0, 0.5, "1", "toy_analogue", LEVEL, row=77),
    # 600 to 1000 % of perplexity against almost nothing: from twice to 128 times is our reading.
    Claim("matter", "without the top dimension more is lost than without another: log2 of the ratio of losses added",
          DETTMERS, 4.0, 3.0, "1", "toy_analogue", LEVEL, row=79),
    Claim("bias", "the top dimension is a bias: loss added with its mean in its place, as a share of that with 0",
          SUN, 0.0, 0.1, "1", "toy_analogue", LEVEL, row=79),
    *(Claim(f"rare_{name.split()[0]}", f"rare tokens have huge vectors: rank correlation of count and length, {name}",
            BELIEF, -0.6, 0.4, "1", "toy_analogue", LEVEL, row=78, possible=(-1.0, 1.0)) for name in MATRICES.values()),
)  # fmt: skip


@dataclass(frozen=True)
class Size:
    """What a scale looks at. windows: of held-out and of training text for activations. tops: how many of the largest
    dimensions are ablated. draws: of other ones.
    """

    windows: int
    tops: tuple[int, ...]
    draws: int


SIZES = {"smoke": Size(2, (1, 3), 2), "laptop": Size(8, (1, 3), 6), "paper": Size(32, (1, 3), 16)}


def configs(scale: str) -> list[RunConfig]:
    """The family's models of the middle width, by SGD: the same initial parameters and data, one per seed."""
    size = family.SIZES[scale]
    mine = [config for config in family.configs(size) if config.model.d_model == size.widths[len(size.widths) // 2]]
    return [override(config, {
        "optimizer.name": "sgd", "optimizer.learning_rate": SGD_RATE, "optimizer.weight_decay": SHRINK / SGD_RATE,
    }) for config in mine]  # fmt: skip


def _members(runs: Any, wanted: list[RunConfig], folder: Path) -> list[family.Member]:
    """The runs by SGD that did not diverge."""
    by_seed = {config.train.seed: config for config in wanted}
    done = runs[runs["status"] == "done"].sort_values("train.seed")
    return [
        family.Member(run_id, config, folder, tuple(range(0, config.train.steps + 1, config.train.keep_every)))
        for run_id, config in zip(done["run_id"], done["train.seed"].map(by_seed), strict=True)
    ]


# --- what is seen in the models ------------------------------------------------------------------------------------


def watched(members: list[family.Member], optimizer: str, curves: Any, windows: Any) -> Any:
    """A row per model, checkpoint and stream; step SHUFFLED: the last one with each tensor's numbers shuffled."""
    import pandas

    rows = []
    for member in members:
        curve = curves[curves["run_id"] == member.run_id].dropna(subset=["validation_loss"])
        loss = dict(zip(curve["step"], curve["validation_loss"], strict=True))
        states = [(step, family.params(member, step)) for step in member.steps]
        states.append((SHUFFLED, family.shuffled(states[-1][1], member.seed)))
        for step, state in states:
            known = {"run_id": member.run_id, "optimizer": optimizer, "width": member.width, "seed": member.seed,
                     "step": step, "last": step == member.steps[-1], "loss": loss.get(step, math.nan)}  # fmt: skip
            rows += [known | row for row in _streams(member, state, windows)]
    return pandas.DataFrame(rows)


def _streams(member: family.Member, state: nnx.State, windows: Any) -> list[dict[str, float]]:
    """A row per stream; what is of the whole model stands in each."""
    import numpy as np

    from analysis.anatomy import int8_dimensions
    from experiments.anatomy.streams import activity, rotation

    seen = {name: np.asarray(x) for name, x in activity(member.model)(state, windows, rotation(member.width)).items()}
    whole = {"int8": float(int8_dimensions(seen["large"]).sum()), "sinks": float((seen["sink"] > SINK).mean()),
             "leaves": float(seen["leaves"].max()), "gain": float(seen["gain"].max()),
             "massive": float(seen["massive"].sum())}  # fmt: skip
    return [
        whole | {"stream": i, "top": float(top), "median": float(seen["median"][i]),
                 "ratio": float(top / seen["median"][i]),
                 **{name: float(seen[name][i]) for name in ("kurtosis", "turned", "dimension_kurtosis")}}
        for i, top in enumerate(seen["top"])
    ]  # fmt: skip


def without(members: list[family.Member], size: Size, windows: Any, calibration: Any) -> Any:
    """A row per model, number of dimensions, choice ("top" or "random", these the mean of several draws) and value
    ("zero" or "mean") that they are set to, with the nats that it adds to the held-out loss.
    """
    import numpy as np
    import pandas

    from experiments.anatomy.streams import ablated, activity, rotation

    rows = []
    for member in members:
        state, layer, width = family.params(member), member.model.n_layers // 2, member.width
        seen = activity(member.model)(state, calibration, rotation(width))
        largest_D, mean_D = (np.asarray(seen[name][layer]) for name in ("largest_D", "mean_D"))
        order_D, draw = np.argsort(-largest_D), np.random.default_rng([width, member.seed])
        values = {"zero": np.zeros_like(mean_D), "mean": mean_D}
        run, none = ablated(member.model, layer), np.zeros(width, bool)
        plain = float(run(state, windows, none, mean_D))
        for top in size.tops:
            others = [draw.choice(order_D[max(size.tops) :], top, replace=False) for _ in range(size.draws)]
            for choice, sets in (("top", [order_D[:top]]), ("random", others)):
                masks = [np.isin(np.arange(width), some) for some in sets]
                for value, value_D in values.items():
                    added = np.mean([float(run(state, windows, mask_D, value_D)) - plain for mask_D in masks])
                    rows.append({"run_id": member.run_id, "width": width, "seed": member.seed, "dimensions": top,
                                 "choice": choice, "value": value, "nats": float(added),
                                 "squared_mean": float((mean_D[order_D[:top]] ** 2).sum())})  # fmt: skip
    return pandas.DataFrame(rows)


def lengths(members: list[family.Member], optimizer: str, count_V: numpy.ndarray) -> tuple[Any, Any]:
    """(A row per model, matrix and whether it is trained, with rank correlation and the rarest quarter's length over
    that of the most frequent; a row per token of the last model of each width, with its count and lengths).
    """
    import numpy as np
    import pandas

    from experiments.anatomy.family import arrays_of
    from experiments.anatomy.streams import norms

    rows, tokens = [], []
    for member in members:
        for trained, state in ((False, family.params(member, 0)), (True, family.params(member))):
            arrays = arrays_of(state)
            known = {"run_id": member.run_id, "optimizer": optimizer, "width": member.width, "seed": member.seed}
            for name, words in MATRICES.items():
                vectors_VxD = arrays[name].T if name == "unembed.kernel" else arrays[name]
                count = np.pad(count_V, (0, len(vectors_VxD) - len(count_V)))
                rho, rarest = norms(vectors_VxD, count)
                rows.append(known | {"matrix": words, "trained": trained, "rho": rho, "rarest": rarest})
                if trained:
                    length_V = np.linalg.norm(vectors_VxD, axis=1)
                    tokens.append(pandas.DataFrame(known | {"matrix": words, "count": count, "length": length_V}))
    return pandas.DataFrame(rows), pandas.concat(tokens)


# --- what it says --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """The tables of `watched` (of both optimizers), `without` and `lengths`."""

    seen: Any
    ablations: Any
    matrices: Any
    tokens: Any

    @property
    def last(self) -> Any:
        """`seen` of the family's last checkpoints."""
        return self.seen[self.seen["last"] & (self.seen["optimizer"] == ADAM)]


def kurtoses(seen: Any) -> Any:
    """A row per model and checkpoint: step, loss, kurtosis and turned, means over the streams behind blocks."""
    keys = ["optimizer", "width", "seed", "step", "loss"]
    return seen[seen["stream"] > 0].groupby(keys, dropna=False)[["kurtosis", "turned"]].mean().reset_index()


def matched(seen: Any) -> Any:
    """A row per seed: the loss that both optimizers' models of one width come to, and the kurtosis of each there."""
    import pandas

    from experiments.anatomy.streams import at_loss

    curves, rows = kurtoses(seen).dropna(), []
    curves = curves[curves["width"].isin(seen.loc[seen["optimizer"] == SGD, "width"])].sort_values("step")
    for seed, mine in curves.groupby("seed"):
        each = dict(iter(mine.groupby("optimizer")))
        if set(each) == {ADAM, SGD}:
            loss = max(float(runs["loss"].iloc[-1]) for runs in each.values())
            rows.append({"seed": seed, "loss": loss} | {
                f"{name} {column}": at_loss(runs["loss"].to_numpy(), runs[column].to_numpy(), loss)
                for name, runs in each.items() for column in ("step", "kurtosis", "turned")
            })  # fmt: skip
    return pandas.DataFrame(rows)


def growths(last: Any) -> Any:
    """A row per model: grows (share of blocks behind which top over median is larger) and later (log2 of it before the
    last block to that behind the first).
    """
    import numpy as np

    by_model = last.pivot_table(index=["seed", "width"], columns="stream", values="ratio")
    ratio_MxS = by_model.to_numpy()
    return by_model.index.to_frame(index=False).assign(
        grows=(np.diff(ratio_MxS) > 0).mean(axis=1), later=np.log2(ratio_MxS[:, -2] / ratio_MxS[:, 1])
    )


def measure(found: Found, seeds: int) -> dict[str, Measured]:
    """Each claim's value and its interval over seeds."""
    import numpy as np

    last, both, grown = found.last, matched(found.seen), growths(found.last)
    trained = found.matrices[found.matrices["trained"] & (found.matrices["optimizer"] == ADAM)]

    def added(choice: str, value: str) -> numpy.ndarray:
        a = found.ablations
        return by_seed(a[(a["dimensions"] == 1) & (a["choice"] == choice) & (a["value"] == value)], "nats")

    def quotient(above_S: Any, below_S: Any) -> numpy.ndarray:
        none = np.full(len(above_S), math.nan)
        return np.divide(above_S, below_S, out=none, where=below_S > 0)

    def log2(ratio_S: numpy.ndarray) -> numpy.ndarray:
        return np.log2(ratio_S, out=np.full(len(ratio_S), math.nan), where=ratio_S > 0)

    def ratio(value_S: numpy.ndarray) -> Measured:
        why = "an ablation did no harm, which leaves no ratio, or a model diverged"
        return of_those_that_have(value_S, seeds, why, LEVEL)

    top = added("top", "zero")

    def of_family(value_S: Any) -> Measured:
        return of_those_that_have(value_S, seeds, "a model of the family diverged", LEVEL)

    def if_any(kind: str, measured: Measured) -> Measured:
        if last[kind].any():
            return measured
        words = {"massive": "a massive activation", "int8": "an outlier dimension by the criterion of LLM.int8"}
        return replace(measured, remark=f"no model has {words[kind]}, which is what the paper looked at")

    has_S = last.groupby("seed")["massive"].any()
    massive = replace(share_of(int(has_S.sum()), len(has_S), LEVEL), remark=of_family(has_S).remark)
    loss = "a run diverged, or one optimizer was below the other's loss at its first checkpoint"
    share_S = both["SGD kurtosis"] / both["Adam kurtosis"] if len(both) else []
    adam = of_those_that_have(share_S, seeds, loss, LEVEL)
    above_S = np.log(both["Adam kurtosis"] / both["Adam turned"]).dropna() if len(both) else []
    if len(above_S) and not over_seeds(above_S, LEVEL).low > 0:
        adam = replace(adam, remark="Adam's own streams have no more kurtosis than in a random basis")
    return {
        "convex": of_family(last.groupby("seed")["leaves"].max()),
        "adam": adam,
        "massive": massive,
        "layer_by_layer": of_family(by_seed(grown, "grows")),
        "constant": if_any("massive", of_family(by_seed(grown, "later"))),
        "matter": if_any("int8", ratio(log2(quotient(top, added("random", "zero"))))),
        "bias": if_any("massive", ratio(quotient(added("top", "mean"), top))),
        **{f"rare_{name.split()[0]}": of_family(by_seed(trained[trained["matrix"] == name], "rho"))
           for name in MATRICES.values()},
    }  # fmt: skip


# --- tables --------------------------------------------------------------------------------------------------------


def _mean(rows: Any, column: str, form: str = ".3g") -> str:
    return f"{by_seed(rows, column).mean():{form}}" if len(rows) else "–"


def _stream_table(found: Found) -> pandas.DataFrame:
    """Streams of the widest models, beside those of untrained and of shuffled weights."""
    import pandas

    wide = found.seen[found.seen["width"] == found.seen["width"].max()]
    untrained, shuffled, last = wide[wide["step"] == 0], wide[wide["step"] == SHUFFLED], wide[wide["last"]]
    names = {0: "embedding"} | {i: f"behind block {i - 1}" for i in range(1, last["stream"].max() + 1)}
    return pandas.DataFrame(
        {"stream": names[i], "median |x|": _mean(rows, "median"), "top 3 |x|": _mean(rows, "top"),
         "top / median": spoken(by_seed(rows, "ratio"), LEVEL), "kurtosis": spoken(by_seed(rows, "kurtosis"), LEVEL),
         "in a random basis": _mean(rows, "turned"),
         "untrained": _mean(untrained[untrained["stream"] == i], "kurtosis"),
         "weights shuffled": _mean(shuffled[shuffled["stream"] == i], "kurtosis"),
         "of dimensions": _mean(rows, "dimension_kurtosis")}
        for i, rows in last.groupby("stream")
    )  # fmt: skip


def _time_table(found: Found) -> pandas.DataFrame:
    """What changes in training, at four of the checkpoints."""
    import numpy as np
    import pandas

    mine = found.seen[(found.seen["optimizer"] == ADAM) & (found.seen["step"] != SHUFFLED)]
    steps = np.sort(mine["step"].unique())
    told = steps[sorted({0, 1, len(steps) // 2, len(steps) - 1})]
    return pandas.DataFrame(
        {"width": width, "step": step, "kurtosis": _mean(rows[rows["stream"] > 0], "kurtosis"),
         "in a random basis": _mean(rows[rows["stream"] > 0], "turned"),
         "top / median": _mean(rows, "ratio"), "LLM.int8 dimensions": _mean(rows, "int8"),
         "massive activations": _mean(rows, "massive"), "sink heads": _mean(rows, "sinks", ".0%"),
         "leaves the range by": f"{rows['leaves'].max():.0e}", "max |out| / max |v|": f"{rows['gain'].max():.3f}"}
        for (width, step), rows in mine[mine["step"].isin(told)].groupby(["width", "step"])
    )  # fmt: skip


def _optimizer_table(found: Found) -> pandas.DataFrame:
    import pandas

    both, theirs = matched(found.seen), found.seen.loc[found.seen["optimizer"] == SGD, "width"]
    last = found.seen[found.seen["last"] & found.seen["width"].isin(theirs)]

    def row(name: str) -> dict[str, str]:
        mine = last[last["optimizer"] == name]
        known = {"optimizer": name, "last loss": _mean(mine, "loss", ".3f"),
                 "kurtosis at the end": _mean(mine[mine["stream"] > 0], "kurtosis"),
                 "LLM.int8 dimensions": _mean(mine, "int8")}  # fmt: skip
        there = both.dropna() if len(both) else both
        if not len(there):
            return known | dict.fromkeys(("same loss", "at step", "kurtosis there", "in a random basis"), "–")
        return known | {"same loss": f"{there['loss'].mean():.3f}", "at step": f"{there[f'{name} step'].mean():.0f}",
                        "kurtosis there": spoken(there[f"{name} kurtosis"], LEVEL),
                        "in a random basis": f"{there[f'{name} turned'].mean():.3g}"}  # fmt: skip

    return pandas.DataFrame(row(name) for name in (ADAM, SGD))


def _ablation_table(found: Found) -> pandas.DataFrame:
    import pandas

    def cell(rows: Any, choice: str) -> str:
        return spoken(by_seed(rows[rows["choice"] == choice], "nats"), LEVEL, ".4f")

    return pandas.DataFrame(
        {"dimensions": count, "set to": value, "the largest: nats added": cell(rows, "top"),
         "random others: nats added": cell(rows, "random")}
        for (count, value), rows in found.ablations.groupby(["dimensions", "value"], sort=False)
    )  # fmt: skip


def _length_table(found: Found) -> pandas.DataFrame:
    import pandas

    return pandas.DataFrame(
        {"optimizer": name, "vectors of the": matrix, "trained": "yes" if trained else "no",
         "rank correlation": spoken(by_seed(rows, "rho"), LEVEL, ".2f", (-1, 1)),
         "rare / frequent": spoken(by_seed(rows, "rarest"), LEVEL, ".2f", (0, math.inf))}
        for (name, matrix, trained), rows in found.matrices.groupby(["optimizer", "matrix", "trained"])
        if trained or name == ADAM
    )  # fmt: skip


def _tables(found: Found) -> tuple[tuple[str, pandas.DataFrame], ...]:
    last = found.last
    over = f"{LEVEL:.0%} intervals over {last['seed'].nunique()} seeds"
    return (
        ("Kurtosis: of a token's vector over its dimensions, mean over tokens (3: Gaussian). Of dimensions: of their "
         f"root mean squares (1: all alike). Streams of the last checkpoint, width {last['width'].max()}; {over}",
         _stream_table(found)),
        ("In training, means over seeds and over streams. LLM.int8 dimensions: how many are outliers by its criterion. "
         f"Sink heads: share that pay more than {SINK:g} of attention to the first position. Leaves the range by: the "
         "most by which a head's output leaves the range of the values it sees, as a share of the largest",
         _time_table(found)),
        (f"Models of the middle width by two optimizers, compared where both have the same held-out loss; {over}",
         _optimizer_table(found)),
        (f"Dimensions of the stream that the middle block gets, set to 0 or to their mean; {over}",
         _ablation_table(found)),
        ("Rank correlation of a token's count in training and its vector's length; rare / frequent: mean length of the "
         f"rarest quarter of tokens over that of the most frequent; {over}", _length_table(found)),
    )  # fmt: skip


def _summary(runs: Any, found: Found) -> pandas.DataFrame:
    """A line per run: measures of its last checkpoint, the nats of ablations, rank correlations."""
    last = found.seen[found.seen["last"]]
    whole = last.groupby("run_id")[["int8", "sinks", "leaves", "massive"]].first()
    by_stream = last.pivot_table(index="run_id", columns="stream", values=["kurtosis", "turned", "ratio", "median"])
    by_stream.columns = [f"{name}_{stream}" for name, stream in by_stream.columns]
    nats = found.ablations.pivot_table(index="run_id", columns=["dimensions", "choice", "value"], values="nats")
    nats.columns = [f"without_{count}_{choice}_{value}" for count, choice, value in nats.columns]
    trained = found.matrices[found.matrices["trained"]]
    rho = trained.pivot_table(index="run_id", columns="matrix", values="rho").add_prefix("rho of ")
    kept = ["run_id", "optimizer.name", "model.d_model", "train.seed", "params_total", "final_loss", "code_version"]
    return runs[kept].set_index("run_id").join([whole, by_stream, nats, rho]).reset_index()


# --- from the family to the tables ---------------------------------------------------------------------------------


def run(job: Job) -> Outcome:
    """Takes the family, trains by SGD, looks at all checkpoints, ablates, measures, draws."""
    import numpy as np
    import pandas

    from experiments.anatomy import outlier_figure
    from experiments.anatomy.corpus import training_text, training_windows
    from jaxgpt import load, sweep
    from jaxgpt.tasks import text

    began, size = time.monotonic(), SIZES[job.scale]
    runs, members = family.train(job)
    wanted = configs(job.scale)
    sgd = sweep(wanted, job.raw, setup=text.reader(), max_minutes=job.minutes_left(began))
    check_complete(sgd, wanted)
    theirs = _members(sgd, wanted, job.raw)
    held_out = family.held_out(job.scale)
    some = held_out[np.linspace(0, len(held_out) - 1, min(size.windows, len(held_out))).astype(int)]
    count_V = np.bincount(training_text(job.scale))
    each = [
        (watched(models, name, load(models[0].folder)[1], some), *lengths(models, name, count_V))
        for models, name in ((members, ADAM), (theirs, SGD))
    ]
    seen, matrices, tokens = (pandas.concat(frames) for frames in zip(*each, strict=True))
    ablations = without(members, size, held_out, training_windows(job.scale, size.windows))
    found = Found(seen, ablations, matrices, tokens)
    both = pandas.concat([runs, sgd])
    return Outcome(
        measured=measure(found, family.SIZES[job.scale].seeds),
        summary=_summary(both, found),
        tables=_tables(found),
        figures=tuple(outlier_figure.draw(found, kurtoses(found.seen), job.figure)),
        seconds_training=sum(both["wall_seconds"]),
        device=runs["device"].iloc[0],
        corpus_sha256=runs["corpus_sha256"].iloc[0],
    )


PAPER = Paper(
    name="outliers",
    title="Outlier dimensions: when they come, who makes them, what they are good for",
    source="common beliefs; Dettmers et al. 2022; Sun et al. 2024; Elhage, Lasenby & Olah 2023",
    claims=CLAIMS,
    takes={
        "smoke": "half a minute",
        "laptop": "4 minutes on 2 CPU cores, plus 5, once, for the models that 8 commands share",
        "paper": "for a GPU; not yet run",
    },
    run=run,
)
