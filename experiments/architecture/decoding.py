"""What comes out of a decoder-only Transformer, and how text is drawn from it: statements that can be checked exactly.

- One output per position: the model turns T tokens into T distributions, the one at a position made from the stream at
  that position, which holds what the model needs of the tokens up to there. It is not a sum over positions: what the
  last block writes is changed at one position, and the positions whose logits move are counted.
- Sizes: the models of a paper are built (their shapes only, no memory is taken), and their parameters counted leaf by
  leaf, beside the published number. A context of 32,768 learned positions, as GPT-3 is said to have now and then, would
  show in the count; that its 96 layers have 384 heads in all, and not 96 each, would not, but heads of 128, as
  published, would then fill no more than 4 x 128 of its 12,288 units. The table has the heads of all models.
- The loss: the cross-entropy at a position is that of the token that comes next (shifted by one). It is computed here a
  second time, in float64, from the model's logits. A model that knows nothing yet loses about ln V.
- Causality: no prediction depends on what comes later, d logit_t / d x_s = 0 for s > t, by gradients; with
  causal=false, as in an encoder, they do. And embeddings are learnt with the rest, not made elsewhere and kept.
- Temperature, top-k, top-p: exact cases of jaxgpt.sample. softmax of the logits 11, 22, 44, 55 is 0.99998 on the last,
  not 0.1, 0.1, 0.1, 0.7 as a widespread text has it. Of equal logits the token of lower id counts as larger, so that
  exactly k stay. With temperature T the entropy H of softmax(z / T) rises with T:
  dH/dT = Var_p(z) / T^3, the variance of the logits under the distribution itself, so that it is never negative.

Expected values come from arithmetic or from what is printed; the measured ones from this library's code, so that an
error in it would contradict them. Trained models are those of the shared family (experiments/anatomy/family.py), the
widest; nothing was tuned. After a review, with results known, a claim on the outputs' shape, which no model could fail,
became one on which logits move; that GPT-3 has its published size is one line of the recount and no longer a claim
besides; its heads, which are no measurement, went to the table.

Letters: V tokens, W windows, T positions, S positions that are asked for their influence, D width of the stream.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.claims import Claim, Measured, over_seeds
from experiments.registry import Job, Outcome, Paper
from jaxgpt.config import ModelConfig

if TYPE_CHECKING:
    import numpy
    import pandas

    from experiments.anatomy.family import Member

LEVEL = 0.9
ARITHMETIC, PRINTED = "arithmetic", "as often printed"
LOGITS = (11.0, 22.0, 44.0, 55.0)
PROBABILITIES = (0.1, 0.1, 0.1, 0.7)
SHARPER = 0.7**2 / (0.7**2 + 3 * 0.1**2)  # of the last one at temperature 1/2: squares, scaled to sum to 1
TEMPERATURES = (0.1, 0.2, 0.5, 0.8, 1.0, 1.5, 2.0, 5.0, 20.0)
POSITIONS = ("rope", "learned", "sinusoidal", "alibi", "none")
PLACEMENTS = ("pre", "post", "parallel")


def _claim(id: str, row: int, statement: str, expected: float, margin: float, unit: str = "1",
           source: str = ARITHMETIC, possible: tuple[float, float] = (-math.inf, math.inf)) -> Claim:  # fmt: skip
    return Claim(id, statement, source, expected, margin, unit, "same_regime", LEVEL, row, possible)


SHARE, POSITIVE = (0.0, 1.0), (0.0, math.inf)
BROWN = "Brown et al. 2020"
CLAIMS = (
    _claim("outputs", 40, "an output is made from the stream at its position: positions whose logits move where what "
           "the last block adds is changed at one", 1.0, 1e-6, source="Vaswani et al. 2017"),
    _claim("summed", 40, "the sum over all positions is the representation that predicts: loss by the sum so far, "
           "minus the model's", 0.0, 0.05, "nats", PRINTED),
    _claim("recount", 41, "counted leaf by leaf, models have as many parameters as published: worst difference, in "
           "units of the published number's rounding", 0.0, 1.0, source="the models' papers, released weights",
           possible=POSITIVE),
    _claim("gpt3_context", 41, "GPT-3's context is 32,768: parameters above the published 174.6 billion",
           0.0, 0.05, "billion", f"{PRINTED}, against {BROWN}"),
    _claim("by_hand", 46, "the loss is the cross-entropy of the next token, shifted by one: largest difference from "
           "float64", 0.0, 1e-4, "nats", possible=POSITIVE),
    _claim("at_start", 46, "before training the loss is near ln V: loss minus it", 0.0, 0.1, "nats"),
    _claim("clipped", 46, "clipping at 1.0 scales a gradient of norm 5 to norm", 1.0, 1e-5),
    _claim("softmax", 48, "softmax of 11, 22, 44, 55: probability of 44",
           math.exp(LOGITS[2]) / sum(map(math.exp, LOGITS)), 1e-9),
    _claim("softmax_printed", 48, "softmax of 11, 22, 44, 55 is .1, .1, .1, .7: probability of 44",
           PROBABILITIES[2], 0.05, source=PRINTED),
    _claim("sharper", 48, ".1, .1, .1, .7 at temperature 1/2: probability of the last", SHARPER, 1e-5),
    _claim("entropy", 48, "entropy rises with the temperature as Var(z) / T^3 says: slope measured by calculated, "
           "the worst case", 1.0, 0.01),
    _claim("support", 48, "top-k and top-p leave the smallest sets that they should: share of random cases", 1.0, 1e-6,
           possible=SHARE),
    _claim("drawn", 48, "tokens are drawn from exactly this distribution: chi-squared per degree of freedom",
           1.0, 0.5, possible=POSITIVE),
    _claim("causal", 50, "no logit depends on later inputs: largest gradient by a later one, by that of an earlier",
           0.0, 1e-9, possible=POSITIVE),
    _claim("encoder", 50, "without the causal mask they depend on later inputs as on earlier ones: root mean squares, "
           "later by earlier", 1.0, 0.5, possible=POSITIVE),
    _claim("embeddings", 50, "embeddings are made elsewhere and kept: their change in training, by their norm",
           0.0, 0.01, source=PRINTED, possible=POSITIVE),
)  # fmt: skip


@dataclass(frozen=True)
class Size:
    """What a scale does. seeds: of random logits and models. draws: of tokens, of each seed. cases: random logits of
    each seed. tokens: V of these. small: the models whose gradients are taken.
    """

    seeds: int
    draws: int
    cases: int
    tokens: int
    small: ModelConfig


SMALL = ModelConfig(d_model=16, n_layers=2, n_heads=2, context=8, vocab_size=11)
SIZES = {
    "smoke": Size(2, 1000, 4, 12, SMALL),
    "laptop": Size(8, 20_000, 32, 50, SMALL),
    "paper": Size(8, 1_000_000, 256, 50_257, replace(SMALL, d_model=256, n_layers=12, n_heads=4, context=64)),
}


# --- looking into models ---------------------------------------------------------------------------------------------


def influence(c: ModelConfig, seed: int) -> numpy.ndarray:
    """Norms [T, S] of the gradient of a random direction of the logits at t by the input vector at s, at the start."""
    import numpy as np

    from jaxgpt import build

    random = np.random.default_rng(seed)
    token_T = random.integers(0, c.vocab_size, c.context).astype(np.int32)
    direction_V = random.standard_normal(c.output_width).astype(np.float32)
    return np.asarray(_influence(c)(build.init_params(c, seed), token_T, direction_V))


@cache
def _influence(c: ModelConfig) -> Any:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from jaxgpt import build

    def of(params: Any, token_T: Any, direction_V: Any) -> Any:
        model: Any = nnx.merge(build.graphdef(c), params)

        def outputs(embedding_1xTxD: Any) -> Any:
            return model.inspect(token_T[None], replace={"embedding": embedding_1xTxD})[0][0] @ direction_V

        gradient_Tx1xSxD = jax.jacrev(outputs)(model.inspect(token_T[None], keep=["embedding"])[1]["embedding"])
        return jnp.linalg.norm(gradient_Tx1xSxD[:, 0], axis=-1)

    return jax.jit(of)


def later_by_earlier(influence_TxS: numpy.ndarray) -> tuple[float, float]:
    """Influence of later inputs (s > t) by that of earlier ones (s < t): the largest ones, and root mean squares."""
    import numpy as np

    place_T = np.arange(len(influence_TxS))
    later, earlier = influence_TxS[place_T[:, None] < place_T], influence_TxS[place_T[:, None] > place_T]
    return float(later.max() / earlier.max()), float(np.sqrt((later**2).mean() / (earlier**2).mean()))


def causality(size: Size) -> Any:
    """One row per kind of positions, placement of norms, mask and seed: influence of later inputs by earlier ones."""
    import pandas

    kinds = [(positions, "pre") for positions in POSITIONS] + [("rope", placement) for placement in PLACEMENTS[1:]]
    rows = []
    for positions, placement in kinds:
        for causal in (True, False):
            c = replace(size.small, positions=positions, norm_placement=placement, causal=causal)
            for seed in range(size.seeds):
                largest, mean_square = later_by_earlier(influence(c, seed))
                rows.append({"positions": positions, "norms": placement, "causal": causal, "seed": seed,
                             "largest": largest, "mean_square": mean_square})  # fmt: skip
    return pandas.DataFrame(rows)


def sizes() -> Any:
    """The known models: what they are, the published number of parameters and that of the leaves of the built model."""
    import pandas

    from jaxgpt.known_models import KNOWN_MODELS

    return pandas.DataFrame(
        {"name": name, "layers": known.config.n_layers, "heads": known.config.n_heads,
         "head_width": known.config.head_width, "width": known.config.d_model, "context": known.config.context,
         "published": known.published, "rounding": known.rounding, "counted": counted(known.config),
         "source": known.source}
        for name, known in KNOWN_MODELS.items()
    )  # fmt: skip


def counted(c: ModelConfig) -> int:
    """Parameters of the model that this library would build, leaf by leaf."""
    import jax

    from jaxgpt import build

    # Stacked layers: as many numbers, and built in a moment.
    return sum(leaf.size for leaf in jax.tree.leaves(build.abstract_params(replace(c, scan_layers=True))))


def of_member(member: Member, window_WxT1: numpy.ndarray) -> dict[str, float]:
    """What a trained model of the family says: outputs that move, its loss by three ways, its embeddings' change.

    All of them in float32, also where the model would compute in less. by_hand: the largest difference of a token's
    loss from the float64 cross-entropy of its logits. summed: the loss where the last streams up to each position are
    added before the final norm. unshifted: that of the token itself. outputs: of `moved`.
    """
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx
    from scipy.special import log_softmax

    from experiments.anatomy import family
    from jaxgpt import build

    first, state = family.params(member, 0), family.params(member)
    c = replace(member.model, compute_dtype="float32", matmul_precision="highest")
    loss_WxT = np.asarray(family.losses(c)(state, window_WxT1), float)
    few_WxT1 = window_WxT1[:8]
    model: Any = nnx.merge(build.graphdef(c), state)
    last = f"layers.{c.n_layers - 1}."
    logits_WxTxV, seen = model.inspect(few_WxT1[:, :-1], keep=[f"{last}residual_mid", f"{last}mlp.out"])
    # Before the final norm, so that a sum of many is as large as one to what reads it.
    stream_WxTxD = seen[f"{last}residual_mid"] + seen[f"{last}mlp.out"]
    summed_WxTxV = model.unembed(model.final_norm(jnp.cumsum(stream_WxTxD, axis=1)))

    def nats_WxT(logits_WxTxV: Any, target_WxT: numpy.ndarray) -> numpy.ndarray:
        log_p_WxTxV = log_softmax(np.asarray(logits_WxTxV, float), axis=-1)
        return -np.take_along_axis(log_p_WxTxV, target_WxT[..., None], axis=-1)[..., 0]

    next_WxT, tables = few_WxT1[:, 1:], [np.asarray(params["embed"]["embedding"][...]) for params in (first, state)]
    by_hand_WxT = nats_WxT(logits_WxTxV, next_WxT)
    return {
        "seed": member.seed,
        "outputs": moved(model, few_WxT1[:, :-1], member.seed),
        "loss": loss_WxT.mean(),
        "by_hand": np.abs(by_hand_WxT - loss_WxT[:8]).max(),
        "unshifted": nats_WxT(logits_WxTxV, few_WxT1[:, :-1]).mean() - by_hand_WxT.mean(),
        "summed": nats_WxT(summed_WxTxV, next_WxT).mean() - by_hand_WxT.mean(),
        "start": float(family.losses(c)(first, window_WxT1).mean()) - math.log(c.vocab_size),
        "embeddings": float(np.linalg.norm(tables[1] - tables[0]) / np.linalg.norm(tables[0])),
    }


def moved(model: Any, token_WxT: numpy.ndarray, seed: int) -> float:
    """At how many positions logits change where what the last block's MLP adds is changed at the middle one; mean.

    A position has moved where a logit changes by more than 1e-3 of the largest change in the window.
    """
    import numpy as np

    width, middle = model.config.d_model, token_WxT.shape[1] // 2
    change_D = np.random.default_rng(seed).standard_normal(width).astype(np.float32)
    change_WxTxD = np.zeros((*token_WxT.shape, width), np.float32)
    change_WxTxD[:, middle] = change_D
    out = f"layers.{model.config.n_layers - 1}.mlp.out"
    before_WxTxV, after_WxTxV = (
        np.asarray(model.inspect(token_WxT, replace={out: lambda x, part=part: x + part})[0], float)
        for part in (0 * change_WxTxD, change_WxTxD)
    )
    far_WxT = np.abs(after_WxTxV - before_WxTxV).max(axis=-1)
    return float((far_WxT > 1e-3 * far_WxT.max(axis=1, keepdims=True)).sum(axis=1).mean())


# --- to the claims ---------------------------------------------------------------------------------------------------


def exactly(value: float) -> Measured:
    """A number without chance in it: its interval is a point, and there is one of it."""
    return Measured(value, value, value, 1)


def measure(size: Size, members: Any, known: Any, causal: Any) -> dict[str, Measured]:
    """Each claim's value; over seeds where chance is in it."""
    import jax.numpy as jnp
    import numpy as np

    from experiments.drawing import chi_squared, supports_right, worst_slope
    from jaxgpt.known_models import KNOWN_MODELS
    from jaxgpt.optimizer import clip_by_norm
    from jaxgpt.sample import distribution

    gpt3, published, seeds = KNOWN_MODELS["gpt3"].config, KNOWN_MODELS["gpt3"].published, range(size.seeds)
    # A number published with every digit must be met to the digit.
    off = (known["counted"] - known["published"]).abs() / known["rounding"].clip(lower=0.5)
    given_V, sharper_V = (
        np.asarray(distribution(jnp.asarray(logits, jnp.float32), temperature), float)
        for logits, temperature in ((LOGITS, 1.0), (np.log(PROBABILITIES), 0.5))
    )
    clipped = clip_by_norm({"a": jnp.asarray([3.0, 0.0]), "b": jnp.asarray([4.0])}, jnp.float32(1.0))

    largest_S: Any = causal[causal["causal"]].groupby("seed")["largest"].max()
    mean_square_S: Any = causal[~causal["causal"]].groupby("seed")["mean_square"].mean()
    return {
        **{name: over_seeds(members[name], LEVEL) for name in ("outputs", "summed", "by_hand", "embeddings")},
        "at_start": over_seeds(members["start"], LEVEL),
        "recount": exactly(float(off.max())),
        "gpt3_context": exactly((counted(replace(gpt3, context=32_768)) - published) / 1e9),
        "clipped": exactly(math.hypot(*(float(x) for leaf in clipped.values() for x in leaf))),
        "softmax": exactly(float(given_V[2])),
        "softmax_printed": exactly(float(given_V[2])),
        "sharper": exactly(float(sharper_V[-1])),
        "entropy": over_seeds([worst_slope(seed, size.tokens, TEMPERATURES) for seed in seeds], LEVEL),
        "support": over_seeds([supports_right(seed, size.tokens, size.cases) for seed in seeds], LEVEL),
        "drawn": over_seeds([chi_squared(seed, size.tokens, size.draws) for seed in seeds], LEVEL),
        "causal": over_seeds(largest_S, LEVEL),
        "encoder": over_seeds(mean_square_S, LEVEL),
    }


def run(job: Job) -> Outcome:
    """Builds, counts, differentiates, draws tokens and the figure."""
    import pandas

    from experiments.anatomy import family

    size = SIZES[job.scale]
    runs, every = family.train(job)
    window_WxT1, widest = family.held_out(job.scale), max(member.width for member in every)
    mine = [member for member in every if member.width == widest]
    members: Any = pandas.DataFrame([{"run_id": m.run_id, **of_member(m, window_WxT1)} for m in mine])
    known, causal = sizes(), causality(size)
    return Outcome(
        measured=measure(size, members, known, causal),
        summary=members.merge(runs[["run_id", "code_version"]], on="run_id"),
        tables=(
            ("Known models (heads: of a layer x units of each, and of all layers together; GPT-3 with 384 heads of 128 "
             "in its 96 layers would fill 4 x 128 of its width)", _size_table(known)),
            ("The distribution that a token is drawn from (p of the four logits 11, 22, 44, 55, or of the "
             "probabilities .1, .1, .1, .7), by jaxgpt.sample; of equal logits the token of lower id counts as larger, "
             "so that top-k and top-p keep the first of them; below 1e-38 float32 has 0", _draw_table()),
            (f"Loss of the family's models of width {widest}, V = {mine[0].model.vocab_size:,} tokens, nats per token; "
             f"means over {len(mine)} seeds with {LEVEL:.0%} interval", _loss_table(members)),
        ),
        figures=tuple(draw_figure(size, job.figure)),
        seconds_training=sum(runs["wall_seconds"]),
        device=runs["device"].iloc[0],
        corpus_sha256=runs["corpus_sha256"].iloc[0],
    )  # fmt: skip


def _size_table(known: Any) -> pandas.DataFrame:
    import pandas

    return pandas.DataFrame(
        {"model": row["name"], "layers": row["layers"], "heads": f"{row['heads']} x {row['head_width']}",
         "of all layers": f"{row['layers'] * row['heads']:,}", "width": f"{row['width']:,}",
         "context": f"{row['context']:,}", "published": f"{row['published']:,}",
         "counted": f"{row['counted']:,}",
         "agree": "to the digit" if row["counted"] == row["published"] else "to the published digits"
                  if abs(row["counted"] - row["published"]) <= row["rounding"] else "no"}
        for row in known.to_dict("records")
    )  # fmt: skip


def _draw_table() -> pandas.DataFrame:
    import jax.numpy as jnp
    import numpy as np
    import pandas

    from experiments.drawing import entropy
    from jaxgpt.sample import distribution

    settings = ((1.0, None, None), (0.5, None, None), (10.0, None, None), (10.0, 2, None), (1.0, None, 0.75))
    lines = []
    for name, logits in (("11, 22, 44, 55", np.asarray(LOGITS)), (".1, .1, .1, .7", np.log(PROBABILITIES))):
        for temperature, top_k, top_p in settings:
            p_V = np.asarray(distribution(jnp.asarray(logits, jnp.float32), temperature, top_k, top_p), float)
            lines.append({
                "case": name, "temperature": f"{temperature:g}", "top-k": str(top_k or "all"),
                "top-p": f"{top_p:g}" if top_p else "all", "p": ", ".join(f"{p:.3g}" for p in p_V),
                "tokens left": str((p_V > 0).sum()), "entropy (nats)": f"{entropy(p_V):.2g}",
            })  # fmt: skip
    return pandas.DataFrame(lines)


def _loss_table(members: Any) -> pandas.DataFrame:
    import pandas

    from experiments.claims import spoken

    said = {"loss": "loss on held-out text", "start": "loss before training, minus ln V",
            "by_hand": "largest difference of a token's loss from float64",
            "unshifted": "loss on the token just read instead of the next one, minus the loss",
            "summed": "loss predicting from the sum of all positions so far, minus the loss"}  # fmt: skip
    return pandas.DataFrame(
        {"what": words, "nats": spoken(members[name], LEVEL, ".3g")} for name, words in said.items()
    )


# --- the figure ------------------------------------------------------------------------------------------------------


def draw_figure(size: Size, path_stem: Path) -> list[Path]:
    """Softmax at several temperatures, entropy over temperature, and who depends on whom with and without the mask."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from analysis import plots

    with mpl.rc_context(plots.STYLE):
        figure = Figure(figsize=(13, 3.9), layout="constrained")
        panels = figure.subplots(1, 4, width_ratios=(1.1, 1, 0.95, 0.95))
        _draw_softmax(panels[0])
        _draw_entropy(panels[1], size)
        for axes, causal in zip(panels[2:], (True, False), strict=True):
            influence_TxS = influence(replace(size.small, causal=causal), 0)
            image = axes.imshow(influence_TxS / influence_TxS.max(), cmap="viridis", vmin=0, vmax=1)
            axes.grid(visible=False)
            axes.set_xlabel("input position s")
            axes.set_ylabel("output position t")
            axes.set_title("causal: none from later inputs" if causal else "causal=false: from all")
        figure.colorbar(image, ax=panels[3], label="|d logit(t) / d x(s)|, by the largest", shrink=0.85)
        return plots.save(figure, path_stem)


def _draw_softmax(axes: Any) -> None:
    import jax.numpy as jnp
    import numpy as np

    from jaxgpt.sample import distribution

    place = np.arange(len(LOGITS))
    bars: list[tuple[str, Any, str]] = [("as often printed", PROBABILITIES, "0.75")]
    for temperature, colour in ((1.0, "#1f5a8f"), (10.0, "#2a9d8f"), (50.0, "#9a7d0a")):
        p_V = np.asarray(distribution(jnp.asarray(LOGITS, jnp.float32), temperature))
        bars.append((f"softmax, T = {temperature:g}", p_V, colour))
    for i, (words, p_V, colour) in enumerate(bars):
        axes.bar(place + 0.2 * (i - 1.5), p_V, 0.19, color=colour, label=words)
    axes.set_xticks(place, [f"{z:g}" for z in LOGITS])
    axes.set_xlabel("logit")
    axes.set_ylabel("probability")
    axes.set_title("softmax of 11, 22, 44, 55")
    axes.legend(loc="upper left")


def _draw_entropy(axes: Any, size: Size) -> None:
    import jax.numpy as jnp
    import numpy as np

    from experiments.drawing import entropy
    from jaxgpt.sample import distribution

    random_V = 2 * np.random.default_rng(0).standard_normal(size.tokens)
    cases = [("11, 22, 44, 55", np.asarray(LOGITS), "#1f5a8f", "o"),
             (".1, .1, .1, .7", np.log(PROBABILITIES), "#c0562b", "s"),
             (f"{size.tokens} random logits", random_V, "0.4", "D")]  # fmt: skip
    for words, logits_V, colour, marker in cases:
        height = [entropy(np.asarray(distribution(jnp.asarray(logits_V, jnp.float32), t))) for t in TEMPERATURES]
        axes.plot(TEMPERATURES, np.asarray(height) / math.log(len(logits_V)), marker=marker, ms=5, mec="white", mew=0.6,
                  color=colour, lw=1.4, label=words)  # fmt: skip
    axes.set_xscale("log")
    axes.set_ylim(0, 1.42)  # room for the legend
    axes.set_yticks(np.linspace(0, 1, 6))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("temperature T")
    axes.set_ylabel("entropy by that of all tokens alike")
    axes.set_title("Entropy rises with temperature")
    axes.legend(loc="upper left")


PAPER = Paper(
    name="decoding",
    title="Outputs, sizes, loss, causality and sampling: what can be checked exactly",
    source="textbook statements",
    claims=CLAIMS,
    takes={
        "smoke": "half a minute",
        "laptop": "half a minute on 2 CPU cores, plus 5, once, for the models that 8 commands share",
        "paper": "for a GPU; not yet run",
    },
    run=run,
)
