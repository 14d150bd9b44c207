"""How does a Transformer know where its tokens stand, and how far does that carry?

Attention without positions and without a mask treats a sequence as a set. It is often said to be permutation
*invariant*; it is *equivariant*: with the inputs in another order, P x, the outputs are the same ones in that order,
f(P x) = P f(x). Only a pooled output, their mean say, is invariant. And a causal mask breaks the symmetry: a token sees
those before it and not those behind. So causal models need no positions to learn order (Haviv et al. 2022), while
without mask and positions no question of order can be answered better than by chance. Both are measured: the symmetry
on models with random weights, the learning on a task of order (jaxgpt/tasks/order.py). Its models have two layers: in
the first, what a query sees is a bag of tokens whatever the mask, and only there can a token learn its place.

Sinusoidal encodings (Vaswani et al. 2017) are in print in several forms. The right one has pairs of a sine and a cosine
of p / 10000^(2i/D). The sine alone is half of it; and a misprint swaps base and width, D^(2c/10000), so that all
frequencies are nearly 1 and the encoding comes round every 6.3 positions. What the right one is chosen for: each shift
is one matrix, PE(p + k) = PE(p) M_k; and what one expects: neighbours are alike. Measured: what the best M_k leaves
over tens of thousands of positions (over a few hundred, 64 sines and cosines of nearly one frequency can be mixed into
almost anything, and even the misprint has its matrix), whether the nearest encoding is that of a neighbour, and what
models of text lose that are trained with the misprint or with sines alone.

Beyond the trained length: language models with five kinds of positions are trained on short windows and then read
windows of 2 and 4 times that length. Press et al. 2022 find that ALiBi holds, and that sinusoidal and, later, rotary
positions fail; a learned table ends where it ends and is refused. The same tokens are scored throughout, the last ones
of each window, with ever more text in front of them: 0 says that the additional text does no harm, and below 0 it is of
use. All kinds have the same weights otherwise, data, rate and steps.

The rates were tried on seed 100; reported are seeds 0 to 3.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.architecture import encodings
from experiments.claims import Claim, Measured, from_0, of_those_that_have, over_seeds, spoken
from experiments.registry import Job, Outcome, Paper, check_complete
from jaxgpt.config import BadInput, ModelConfig, RunConfig, override

if TYPE_CHECKING:
    import numpy
    import pandas

    from jaxgpt.run import Source

VASWANI, PRESS, HAVIV = "Vaswani et al. 2017", "Press et al. 2022", "Haviv et al. 2022"
SAID, PRINTED = "as commonly said", "as sometimes printed"
LEVEL = 0.9
KINDS = {"sinusoidal": "sinusoidal", "learned": "learned", "rope": "RoPE", "alibi": "ALiBi", "none": "none"}
TIMES = (1, 2, 4)  # the trained length
SHIFTS = (1, 8, 64)
NEAR = 512  # positions among which the nearest encoding is sought: more than columns, so that no matrix fits them all

ORDERS = {"causal": "causal, no positions", "bag": "no mask, no positions", "placed": "no mask, sinusoidal positions"}


def _claim(id: str, row: int, statement: str, source: str, expected: float, margin: float, unit: str = "1",
           exact: bool = False, possible: tuple[float, float] = (-math.inf, math.inf)) -> Claim:  # fmt: skip
    scope = "same_regime" if exact else "toy_analogue"
    return Claim(id, statement, source, expected, margin, unit, scope, LEVEL, row, possible)


SHARE = (0.0, 1.0)
SIZE_OF = (0.0, math.inf)
BAG, MISPRINT = "attention without positions and mask", "the misprint D^(2c/10000)"
LEAVES, ALIKE = "what the best one leaves, at most", "share of positions whose nearest encoding is a neighbour's"
GROWS = "loss of the same tokens minus that at the trained length"
CLAIMS = (
    _claim("equivariant", 33, f"{BAG} is equivariant: f(P x) minus P f(x), by its size", "exact", 0.0, 1e-4,
           exact=True, possible=SIZE_OF),
    _claim("invariant", 33, f"{BAG} is invariant: f(P x) minus f(x), by its size", SAID, 0.0, 0.01, exact=True,
           possible=SIZE_OF),
    _claim("pooled", 33, f"{BAG}: the mean of its outputs is invariant: difference by size", "exact", 0.0, 1e-4,
           exact=True, possible=SIZE_OF),
    _claim("masked", 33, "without positions it is equivariant under a causal mask too: f(P x) minus P f(x), by its "
           "size", SAID, 0.0, 0.01, exact=True, possible=SIZE_OF),
    _claim("order_bag", 33, f"{BAG} answers a question of order no better than by chance: share of right answers",
           "exact", 0.5, 0.05, exact=True, possible=SHARE),
    _claim("order_causal", 33, "a causal model without positions learns a question of order: share of right answers",
           HAVIV, 1.0, 0.1, possible=SHARE),
    _claim("order_placed", 33, "without mask but with positions a question of order is learned: share of right answers",
           SAID, 1.0, 0.1, possible=SHARE),
    *(_claim(f"none_{kind}", 33, f"causal models of text lose little without positions: loss minus that with {words}",
             HAVIV, 0.0, 0.05, "nats")
      for kind, words in (("learned", "learned ones"), ("sinusoidal", "sinusoidal ones"), ("alibi", "ALiBi"))),
    _claim("shift_right", 34, f"sinusoidal encodings: each shift is one matrix: {LEAVES}", VASWANI, 0.0, 1e-9,
           exact=True, possible=SIZE_OF),
    _claim("near_right", 34, f"sinusoidal encodings: neighbours are most alike: {ALIKE}", SAID, 1.0, 0.01, exact=True,
           possible=SHARE),
    _claim("shift_wrong", 35, f"{MISPRINT}: each shift is one matrix: {LEAVES}", PRINTED, 0.0, 0.01, exact=True,
           possible=SIZE_OF),
    _claim("near_wrong", 35, f"{MISPRINT}: neighbours are most alike: {ALIKE}", PRINTED, 1.0, 0.01, exact=True,
           possible=SHARE),
    _claim("shift_sine", 36, f"sines alone: each shift is one matrix: {LEAVES}", PRINTED, 0.0, 0.01, exact=True,
           possible=SIZE_OF),
    *(
        _claim(f"text_{kind}", row, f"{words}: a model of text trains as well as with the right encoding: loss minus "
               "that with it", PRINTED, 0.0, 0.05, "nats")
        for kind, row, words in (("wrong", 35, MISPRINT), ("sine", 36, "sines alone"))
    ),
    _claim("alibi_2", 36, f"ALiBi holds at twice the trained length: {GROWS}, 0 if it falls", PRESS, 0.0, 0.05, "nats",
           possible=SIZE_OF),
    _claim("alibi_4", 49, f"the trained length is no bound, with ALiBi at 4 times: {GROWS}, 0 if it falls", PRESS, 0.0,
           0.05, "nats", possible=SIZE_OF),
    # By .1 at least, and by less than any model of text could.
    *(_claim(id, row, f"{words} positions fail at {times} the trained length (.1 nats or more): {GROWS}", PRESS, 10.0,
             9.9, "nats")
      for id, row, words, times in (("sinusoidal_2", 36, "sinusoidal", "twice"),
                                    ("sinusoidal_4", 36, "sinusoidal", "4 times"),
                                    ("rope_4", 49, "rotary", "4 times"))),
)  # fmt: skip


@dataclass(frozen=True)
class Size:
    """What a scale does. order, text: settings of the trained models. windows: of held-out text, 4 times as long as the
    trained ones. far: positions over which shifts are fitted. width: of the encodings.
    """

    seeds: int
    order: Mapping[str, Any]
    text: Mapping[str, Any]
    windows: int
    far: int
    width: int = 64


SIZES = {
    "smoke": Size(2, {"model.d_model": 8, "model.n_heads": 2, "model.n_layers": 2, "model.context": 5,
                      "model.vocab_size": 9, "train.steps": 20, "train.batch_size": 16, "train.eval_windows": 64},
                  {"model.d_model": 8, "model.n_heads": 2, "model.n_layers": 1, "model.context": 8, "train.steps": 10,
                   "train.batch_size": 4, "train.eval_windows": 8}, 8, 8192),
    "laptop": Size(4, {"model.d_model": 32, "model.n_layers": 2, "model.context": 9, "model.vocab_size": 17,
                       "train.steps": 3000, "train.batch_size": 64, "train.eval_windows": 2048,
                       "optimizer.learning_rate": 3e-3},
                   {"model.d_model": 64, "model.n_layers": 2, "model.context": 64, "train.steps": 800,
                    "train.batch_size": 8, "train.eval_windows": 256}, 128, 32_768),
    "paper": Size(4, {"model.d_model": 128, "model.n_heads": 8, "model.n_layers": 4, "model.context": 17,
                      "model.vocab_size": 65, "train.steps": 20_000, "train.batch_size": 256,
                      "train.eval_windows": 8192, "optimizer.learning_rate": 1e-3},
                  {"model.d_model": 1024, "model.n_heads": 8, "model.n_layers": 16, "model.context": 512,
                   "model.vocab_size": 8192, "data.tokenizer": "bpe", "train.steps": 50_000, "train.batch_size": 64,
                   "train.eval_windows": 512, "optimizer.learning_rate": 3e-4}, 256, 32_768, 256),
}  # fmt: skip


# --- exactly ---------------------------------------------------------------------------------------------------------


def symmetry(model: ModelConfig, seed: int) -> dict[str, float]:
    """What reordering the inputs does to the outputs of a model with random weights, by their Frobenius norm:
    `equivariant` |f(P x) - P f(x)|, `invariant` |f(P x) - f(x)|, `pooled` that of their means.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxgpt import build

    rng = np.random.default_rng([1, seed])
    token_BxT = rng.integers(model.vocab_size, size=(8, model.context))
    # One cycle through all places: no token stays where it was.
    order_T = rng.permutation(model.context)
    place_T = np.empty_like(order_T)
    place_T[order_T] = np.roll(order_T, 1)
    f = jax.jit(build.create(model, seed).__call__)
    out_BxTxV, moved_BxTxV = (np.asarray(f(jnp.asarray(x)), float) for x in (token_BxT, token_BxT[:, place_T]))

    def far(a: numpy.ndarray, b: numpy.ndarray) -> float:
        return float(np.linalg.norm(a - b) / np.linalg.norm(b))

    return {
        "equivariant": far(moved_BxTxV, out_BxTxV[:, place_T]),
        "invariant": far(moved_BxTxV, out_BxTxV),
        "pooled": far(moved_BxTxV.mean(axis=1), out_BxTxV.mean(axis=1)),
    }


def symmetries(size: Size) -> dict[tuple[str, str], numpy.ndarray]:
    """By (kind of ORDERS, quantity of `symmetry`), one number for each seed."""
    import numpy as np

    config = override(RunConfig(), dict(size.order))
    found = {
        kind: [symmetry(ordered(config, kind).model, seed) for seed in range(size.seeds)] for kind in ORDERS
    }  # fmt: skip
    return {(kind, name): np.asarray([each[name] for each in rows]) for kind, rows in found.items() for name in rows[0]}


def ordered(config: RunConfig, kind: str) -> RunConfig:
    """The config with the mask and the positions of one of ORDERS."""
    positions = "sinusoidal" if kind == "placed" else "none"
    return override(config, {"model.causal": kind == "causal", "model.positions": positions})


@dataclass(frozen=True)
class Encoded:
    """What is exactly known of a kind of encoding: what the best matrix leaves by shift, over NEAR positions and over
    `far`; how many positions away the nearest encoding is.
    """

    near: dict[int, float]
    far: dict[int, float]
    nearest_P: numpy.ndarray


def encoded(size: Size) -> dict[str, Encoded]:
    """By kind of encoding."""
    found = {}
    for kind in encodings.KINDS:
        near_PxD, far_PxD = (encodings.encoding(kind, count, size.width) for count in (NEAR, size.far))
        near, far = ({k: encodings.shift_residual(x_PxD, k) for k in SHIFTS} for x_PxD in (near_PxD, far_PxD))
        found[kind] = Encoded(near, far, encodings.nearest(near_PxD))
    return found


# --- trained ---------------------------------------------------------------------------------------------------------


def order_configs(size: Size) -> list[RunConfig]:
    """Kinds times seeds."""
    base = override(RunConfig(), {"optimizer.weight_decay": 0.0, **size.order})
    return [override(ordered(base, kind), {"train.seed": seed}) for kind in ORDERS for seed in range(size.seeds)]


def text_configs(size: Size) -> list[RunConfig]:
    """Kinds of positions times seeds."""
    return [
        override(RunConfig(), {**size.text, "model.positions": kind, "train.seed": seed})
        for kind in KINDS
        for seed in range(size.seeds)
    ]


def train(job: Job, size: Size) -> tuple[pandas.DataFrame, pandas.DataFrame]:
    """Runs of the order task and runs on text, with `kind`. Raises Unfinished."""
    import numpy as np
    import pandas

    from jaxgpt import sweep
    from jaxgpt.tasks import order, placed, text

    began, read, tables = time.monotonic(), text.reader(), []
    given = [config for config in text_configs(size) if config.model.positions == "none"]
    model = given[0].model

    def tabled(config: RunConfig, kind: str) -> Source:
        return placed.source(read(config), encodings.encoding(kind, model.context, model.d_model), kind)

    for name, wanted, setup in (
        ("order", order_configs(size), order.source),
        ("text", text_configs(size), read),
        *((kind, given, partial(tabled, kind=kind)) for kind in ("wrong", "sine")),
    ):
        runs = sweep(wanted, job.raw / name, setup=setup, max_minutes=job.minutes_left(began))
        check_complete(runs, wanted)
        tables.append(runs)
    asked, texts, *others = tables
    kinds = np.where(asked["model.causal"], "causal", np.where(asked["model.positions"] == "none", "bag", "placed"))
    texts = [texts.assign(kind=texts["model.positions"])]
    texts += [runs.assign(kind=kind) for kind, runs in zip(("wrong", "sine"), others, strict=True)]
    return asked.assign(kind=kinds), pandas.concat(texts, ignore_index=True)


@dataclass(frozen=True)
class Beyond:
    """Losses of text beyond the trained length T, nats, by seed. same: of the last T/2 tokens of each window, with so
    many times T tokens read; NaN where the run diverged; none where the model refuses the length. by_place_SxT: of
    each position of the longest windows that are read.
    """

    same: dict[int, numpy.ndarray]
    by_place_SxT: numpy.ndarray


def beyond(texts: Any, size: Size, folder: Path) -> dict[str, Beyond]:
    """By kind of positions."""
    import numpy as np
    from flax import nnx

    from experiments.anatomy import family
    from jaxgpt import load_model
    from jaxgpt.tasks import text

    config = text_configs(size)[0]
    trained = config.model.context
    longer = override(config, {"model.context": max(TIMES) * trained, "train.eval_windows": size.windows})
    window_WxT1 = np.asarray(text.reader()(longer).data().validation_WxT1).astype(np.int32)

    def of(row: dict[str, Any], read_WxT1: numpy.ndarray) -> numpy.ndarray:
        """Loss of each token [W, T]; NaN of a run that diverged."""
        if row["status"] != "done":
            return np.full((len(read_WxT1), read_WxT1.shape[1] - 1), math.nan)
        model = load_model(f"{folder}/{row['run_id']}").model
        return np.asarray(family.losses(model.config)(nnx.split(model)[1], read_WxT1), float)

    found = {}
    for kind in KINDS:
        rows = texts[texts["kind"] == kind].sort_values("train.seed").to_dict("records")
        losses: dict[int, list[numpy.ndarray]] = {}
        for times in TIMES:
            try:
                losses[times] = [of(row, window_WxT1[:, -times * trained - 1 :]) for row in rows]
            except BadInput:  # a learned table ends where it ends
                break
        same = {n: np.asarray([x_WxT[:, -trained // 2 :].mean() for x_WxT in each]) for n, each in losses.items()}
        longest = max(losses)
        whole = (
            losses[longest]
            if longest == max(TIMES)
            else [of(row, window_WxT1[:, : longest * trained + 1]) for row in rows]
        )
        found[kind] = Beyond(same, np.asarray([x_WxT.mean(axis=0) for x_WxT in whole]))
    return found


# --- what they say -------------------------------------------------------------------------------------------------


def by_kind(runs: Any, column: str) -> dict[str, numpy.ndarray]:
    """A column of the table of runs by their kind, one number for each seed; NaN of those that diverged."""
    good = runs.assign(value=runs[column].where(runs["status"] == "done")).sort_values("train.seed")
    return {str(kind): rows["value"].to_numpy(float) for kind, rows in good.groupby("kind")}


def measure(symmetry: dict, encoded: dict[str, Encoded], right: dict, loss: dict, beyond: dict[str, Beyond],
            seeds: int) -> dict[str, Measured]:  # fmt: skip
    """Each claim's value and its interval over seeds; what has no chance in it has no width.

    right: shares of right answers by kind of ORDERS, loss: on text by kind of positions, one number for each seed.
    """
    import numpy as np

    def exact(value: float) -> Measured:
        return Measured(float(value), float(value), float(value), 1)

    grown = {(kind, n): each.same[n] - each.same[1] for kind, each in beyond.items() for n in each.same}
    trained = {
        **{f"order_{kind}": right[kind] for kind in ORDERS},
        **{f"none_{kind}": loss["none"] - loss[kind] for kind in ("learned", "sinusoidal", "alibi")},
        **{f"text_{kind}": loss[kind] - loss["sinusoidal"] for kind in ("wrong", "sine")},
        **{f"sinusoidal_{n}": grown["sinusoidal", n] for n in (2, 4)},
        "rope_4": grown["rope", 4],
    }
    return {
        **{name: over_seeds(symmetry["bag", name], LEVEL) for name in ("equivariant", "invariant", "pooled")},
        "masked": over_seeds(symmetry["causal", "equivariant"], LEVEL),
        **{f"shift_{kind}": exact(max(each.far.values())) for kind, each in encoded.items()},
        **{f"near_{kind}": exact(np.mean(encoded[kind].nearest_P == 1)) for kind in ("right", "wrong")},
        **{name: of_those_that_have(value_S, seeds, "it diverged", LEVEL) for name, value_S in trained.items()},
        **{f"alibi_{n}": from_0(of_those_that_have(grown["alibi", n], seeds, "it diverged", LEVEL)) for n in (2, 4)},
    }


# --- to tables and figure --------------------------------------------------------------------------------------------


def run(job: Job) -> Outcome:
    """Computes, trains, reads longer texts, draws."""
    import pandas

    from experiments.architecture.positions_figure import draw

    size = SIZES[job.scale]
    asked, texts = train(job, size)
    symmetry, known = symmetries(size), encoded(size)
    longer = beyond(texts, size, job.raw / "text")
    right, loss = by_kind(asked, "final_accuracy"), by_kind(texts, "final_loss")
    runs: Any = pandas.concat([asked.assign(task="order"), texts.assign(task="text")], ignore_index=True)
    n, trained = asked["model.context"].iloc[0] - 1, texts["model.context"].iloc[0]
    seeds = f"means over {size.seeds} seeds with {LEVEL:.0%} interval"
    return Outcome(
        measured=measure(symmetry, known, right, loss, longer, size.seeds),
        summary=runs.reindex(columns=SUMMARY),
        tables=(
            (f"Reordered inputs, random weights: how far outputs move, by their size (f(P x): outputs of the reordered "
             f"inputs; P f(x): the outputs, reordered); and the share of right answers whether the first of {n} "
             f"letters comes before the last in the alphabet (chance: .5); {seeds}", _order_table(symmetry, right)),
            (f"Encodings of width {size.width}: what the best matrix for a shift by k leaves over {NEAR} and over "
             f"{size.far:,} positions, and how far away the nearest encoding is among {NEAR}",
             _encoding_table(known, size.far)),
            (f"Text: held-out loss at the trained length of {trained} tokens; and loss of the same tokens, the last "
             f"{trained // 2} of each window, when more is read before them, minus that at the trained length; nats "
             f"per token, {seeds}", _text_table(loss, longer, int(trained))),
        ),
        figures=tuple(draw(size.width, right, longer, int(trained), job.figure)),
        seconds_training=sum(runs["wall_seconds"]),
        device=runs["device"].iloc[0],
        corpus_sha256=texts["corpus_sha256"].iloc[0],
    )  # fmt: skip


SUMMARY = ["run_id", "task", "kind", "train.seed", "status", "params_total", "steps_done", "final_loss",
           "final_loss_sem", "final_accuracy", "wall_seconds", "code_version"]  # fmt: skip


def _order_table(symmetry: dict, right: dict) -> pandas.DataFrame:
    import pandas

    def far(kind: str, name: str) -> str:
        value = symmetry[kind, name].mean()
        return f"{value:.1g}" if value < 1e-3 else f"{value:.2f}"

    return pandas.DataFrame(
        {"model": words, "f(P x) from P f(x)": far(kind, "equivariant"), "f(P x) from f(x)": far(kind, "invariant"),
         "their means": far(kind, "pooled"), "right answers": spoken(right[kind], LEVEL, ".2f", SHARE)}
        for kind, words in ORDERS.items()
    )  # fmt: skip


def _encoding_table(known: dict[str, Encoded], far: int) -> pandas.DataFrame:
    import numpy as np
    import pandas

    def left(found: dict[int, float]) -> str:
        return ", ".join(f"{value:.2f}" if value > 1e-3 else f"{value:.0e}" for value in found.values())

    shifts = f"k = {', '.join(map(str, SHIFTS))}"
    return pandas.DataFrame(
        {"encoding": encodings.KINDS[kind], f"left over {NEAR}, {shifts}": left(each.near),
         f"over {far:,}": left(each.far), "nearest is (positions away)": ", ".join(map(str, np.unique(each.nearest_P)))}
        for kind, each in known.items()
    )  # fmt: skip


def _text_table(loss: dict, longer: dict[str, Beyond], trained: int) -> pandas.DataFrame:
    import pandas

    def grown(each: Beyond, n: int) -> str:
        return spoken(each.same[n] - each.same[1], LEVEL, "+.2f") if n in each.same else "refused: its table ends"

    others = {"sine": "sines alone", "wrong": MISPRINT}
    return pandas.DataFrame(
        {"positions": words, f"loss at {trained}": spoken(loss[kind], LEVEL, ".2f")}
        | {f"at {n * trained}": grown(longer[kind], n) if kind in longer else "not read" for n in TIMES[1:]}
        for kind, words in (KINDS | others).items()
    )


PAPER = Paper(
    name="positions",
    title="Positions: what attention is without them, the formula and its misprint, and lengths beyond training",
    source=f"{VASWANI}; {HAVIV}; {PRESS}",
    claims=CLAIMS,
    takes={
        "smoke": "half a minute",
        "laptop": "about 3 minutes on 2 CPU cores",
        "paper": "for a GPU; not yet run",
    },
    run=run,
)
