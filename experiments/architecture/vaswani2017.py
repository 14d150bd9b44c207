"""Why are attention's scores divided by the square root of the head's width?

Attention weighs values by softmax(q . k / sqrt(d)). With queries and keys of independent entries of variance 1, q . k
is a sum of d such products and has variance d; divided by sqrt(d) it has variance 1 at any width. Vaswani et al. 2017
(section 3.2.1) suspect that without the scale softmax saturates, where its gradients are extremely small. Measured
here on attention layers of this library as they are initialised, for heads of 4 to 64 units, on random inputs of
variance 1, without a mask:

- the variance over keys of what softmax is given (from the logarithms of the weights, which differ from the scores by
  a constant of each query), with the scale and without it;
- the entropy of the weights: for normal scores of variance 1 over many keys about ln S - 1/2, S the number of keys; and
  the largest weight of a query, which goes to 1 without the scale;
- gradients: softmax's Jacobian, J = diag(p) - p p^T, by which a gradient passes from the weights to the scores. How
  large it is depends on how one asks: its trace, 1 - sum p^2, is what all directions together pass; its Frobenius norm
  weighs strong directions more. Softmax over many keys that are alike passes little in each of very many directions
  (trace near 1, norm about 1 / sqrt(S)), saturated weights between two or three keys much in one. So there is a claim
  for each. Beside them stands the gradient by the query matrix of a random direction of the layer's output, through
  which 1 / sqrt(d) passes once more.

These are exact facts at initialisation; claims are about heads of 64, as the paper's, on seeds 0 to 7. Wider heads were
left out after a first run, whose smallest weights float32 had rounded to 0; and the claim on the trace was added, with
the same expected value, when that on the norm had come out against the paper.

Letters as in model.py: B batch, T = S positions, H heads, K head width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.claims import Claim, Measured, over_seeds, spoken
from experiments.registry import Job, Outcome, Paper
from jaxgpt.config import ModelConfig

if TYPE_CHECKING:
    import numpy
    import pandas

VASWANI = "Vaswani et al. 2017, section 3.2.1"
LEVEL = 0.9
KINDS = {"scaled": "q . k / sqrt(d)", "plain": "q . k"}


def _claim(id: str, statement: str, expected: float, margin: float, unit: str = "1", source: str = VASWANI,
           possible: tuple[float, float] = (0.0, math.inf)) -> Claim:  # fmt: skip
    return Claim(id, statement, source, expected, margin, unit, "same_regime", LEVEL, 39, possible)


CLAIMS = (
    _claim("variance_scaled", "divided by sqrt(d), scores have variance", 1.0, 0.1),
    _claim("variance_plain", "without the scale their variance is d: variance by d", 1.0, 0.1),
    _claim("power_plain", "without the scale the variance grows as d, heads of 4 to the widest: exponent", 1.0, 0.05),
    _claim("entropy_scaled", "with it weights are spread: their entropy below that of equal ones, ln S", 0.5, 0.1,
           "nats", "arithmetic: half the variance"),
    _claim("largest_plain", "without it softmax saturates: largest weight of a query", 1.0, 0.5, possible=(0.0, 1.0)),
    # Extremely small: by a factor of 2 at the least.
    *(_claim(f"jacobian_{which}", f"and gradients are far smaller: log2 of the Jacobian's {words} without by that with "
             "the scale", -5.0, 4.0, possible=(-math.inf, math.inf))
      for which, words in (("norm", "Frobenius norm"), ("trace", "trace"))),
)  # fmt: skip


@dataclass(frozen=True)
class Size:
    """What a scale does. widths: of heads; at: the width that claims are about. keys: S."""

    seeds: int
    widths: tuple[int, ...]
    at: int
    d_model: int
    heads: int
    keys: int
    batch: int


# Wider heads without the scale would have weights below the smallest number of float32, which have no logarithm.
SIZES = {
    "smoke": Size(2, (4, 16, 64), 64, 32, 2, 16, 2),
    "laptop": Size(8, (4, 8, 16, 32, 64), 64, 256, 4, 64, 4),
    "paper": Size(8, (4, 8, 16, 32, 64), 64, 512, 8, 256, 16),
}


def layer(size: Size, width: int, seed: int, scaled: bool) -> dict[str, float]:
    """What softmax gets and gives in an attention layer at the start; without the scale its queries are sqrt(K) larger.

    variance: of scores over keys. entropy, largest: of a query's weights. norm, trace: of softmax's Jacobian. All means
    over queries. gradient: norm of that by the query matrix of the layer as it is without the factor.
    """
    import numpy as np

    from jaxgpt import build

    c = ModelConfig(d_model=size.d_model, n_heads=size.heads, d_head=width, n_layers=1, mlp="none", norm="none",
                    positions="none", causal=False, context=size.keys, d_input=size.d_model, d_output=1)  # fmt: skip
    random = np.random.default_rng(seed)
    x_BxTxD, direction_BxTxD = random.standard_normal((2, size.batch, size.keys, size.d_model)).astype(np.float32)
    gradient_DxHK, pattern_BxHxTxS = _looker(c)(
        build.init_params(c, seed), x_BxTxD, direction_BxTxD, 1.0 if scaled else width**0.5
    )
    return numbers(np.asarray(pattern_BxHxTxS, float)) | {"gradient": float(np.linalg.norm(gradient_DxHK))}


@cache
def _looker(c: ModelConfig) -> Any:
    """A compiled function of parameters, inputs, a direction and a factor of the queries: gradient and weights."""
    import jax
    from flax import nnx

    from jaxgpt import build

    queries = "layers.0.attention.query.kernel"

    def along(params: Any, x_BxTxD: Any, direction_BxTxD: Any, factor: Any) -> tuple[Any, Any]:
        params = jax.tree_util.tree_map_with_path(
            lambda path, leaf: factor * leaf if build.param_name(path) == queries else leaf, params
        )
        # Put past the read-in: the layer sees inputs of variance 1 as they are.
        _, seen = nnx.merge(build.graphdef(c), params).inspect(
            x_BxTxD, replace={"embedding": x_BxTxD}, keep=["layers.0.attention.pattern", "layers.0.attention.out"]
        )
        return (seen["layers.0.attention.out"] * direction_BxTxD).sum(), seen["layers.0.attention.pattern"]

    def of(params: Any, x_BxTxD: Any, direction_BxTxD: Any, factor: Any) -> tuple[Any, Any]:
        gradient, pattern_BxHxTxS = jax.grad(along, has_aux=True)(params, x_BxTxD, direction_BxTxD, factor)
        return gradient["layers"][0]["attention"]["query"]["kernel"][...], pattern_BxHxTxS

    return jax.jit(of)


def numbers(pattern_BxHxTxS: numpy.ndarray) -> dict[str, float]:
    """Variance of scores, entropy, largest weight, norm and trace of the Jacobian, of weights above 0; query means."""
    import numpy as np
    from scipy.special import entr

    p = pattern_BxHxTxS
    variance = np.log(p).var(axis=-1, ddof=1).mean()
    # |diag(p) - p p^T|^2 = sum p^2 - 2 sum p^3 + (sum p^2)^2
    square = (p**2).sum(axis=-1)
    norm = np.sqrt(np.maximum(square - 2 * (p**3).sum(axis=-1) + square**2, 0))
    return {"variance": float(variance), "entropy": float(entr(p).sum(axis=-1).mean()),
            "largest": float(p.max(axis=-1).mean()), "norm": float(norm.mean()),
            "trace": float((1 - square).mean())}  # fmt: skip


def look(size: Size) -> Any:
    """One row per head width, scale or none, and seed."""
    import pandas

    return pandas.DataFrame(
        {"width": width, "kind": kind, "seed": seed, **layer(size, width, seed, kind == "scaled")}
        for width in size.widths
        for kind in KINDS
        for seed in range(size.seeds)
    )


def measure(table: Any, size: Size) -> dict[str, Measured]:
    """Each claim's value and its interval over seeds, of heads of `size.at`."""
    import numpy as np

    scaled, plain = (table[(table["kind"] == kind) & (table["width"] == size.at)].set_index("seed") for kind in KINDS)
    growth = table[table["kind"] == "plain"]
    powers = [np.polyfit(np.log(rows["width"]), np.log(rows["variance"]), 1)[0] for _, rows in growth.groupby("seed")]
    values = {
        "variance_scaled": scaled["variance"],
        "variance_plain": plain["variance"] / size.at,
        "power_plain": powers,
        "entropy_scaled": math.log(size.keys) - scaled["entropy"],
        "largest_plain": plain["largest"],
        **{f"jacobian_{which}": np.log2(plain[which] / scaled[which]) for which in ("norm", "trace")},
    }
    return {name: over_seeds(np.asarray(values_S, float), LEVEL) for name, values_S in values.items()}


def run(job: Job) -> Outcome:
    """Initialises, looks, draws."""
    import jax

    size = SIZES[job.scale]
    table = look(size)
    return Outcome(
        measured=measure(table, size),
        summary=table,
        tables=((f"Attention at the start over {size.keys} keys (equal weights: entropy {math.log(size.keys):.2f} "
                 f"nats, Jacobian's norm {math.sqrt(size.keys - 1) / size.keys:.2f}); means over {size.seeds} seeds "
                 f"with {LEVEL:.0%} interval", _table(table)),),
        figures=tuple(draw(table, size, job.figure)),
        device=jax.devices()[0].device_kind,
    )  # fmt: skip


def _table(table: Any) -> pandas.DataFrame:
    import pandas

    return pandas.DataFrame(
        {"head width d": width, "scores": KINDS[kind], "variance": spoken(rows["variance"], LEVEL, ".3g"),
         "entropy (nats)": spoken(rows["entropy"], LEVEL, ".2f"),
         "largest weight": spoken(rows["largest"], LEVEL, ".2f", (0, 1)),
         "Jacobian's norm": spoken(rows["norm"], LEVEL, ".3f"), "trace": spoken(rows["trace"], LEVEL, ".3f"),
         "gradient by the query matrix": spoken(rows["gradient"], LEVEL, ",.0f")}
        for (width, kind), rows in table.groupby(["width", "kind"], sort=False)
    )  # fmt: skip


COLOURS = {"scaled": "#1f5a8f", "plain": "#c0562b"}


def draw(table: Any, size: Size, path_stem: Path) -> list[Path]:
    """Variance, entropy and the Jacobian's norm and trace over the head's width; writes PNG and SVG."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from analysis import plots

    with mpl.rc_context(plots.STYLE):
        figure = Figure(figsize=(13, 3.7), layout="constrained")
        panels = figure.subplots(1, 4)
        for axes, (name, label, title) in zip(panels, (
            ("variance", "variance of scores over keys", "What softmax is given"),
            ("entropy", "entropy of a query's weights (nats)", "What it makes of it"),
            ("norm", "Frobenius norm", "Jacobian of softmax: norm"),
            ("trace", "trace, 1 - sum p^2", "Jacobian of softmax: trace"),
        ), strict=True):  # fmt: skip
            _draw_one(axes, table, size, name)
            axes.set_ylabel(label)
            axes.set_title(title)
        panels[0].set_yscale("log")
        panels[1].axhline(math.log(size.keys), color="0.4", lw=1, ls=(0, (1, 2)), label="equal weights, ln S")
        for axes, alike in zip(panels[2:], (math.sqrt(size.keys - 1) / size.keys, 1 - 1 / size.keys), strict=True):
            axes.axhline(alike, color="0.4", lw=1, ls=(0, (1, 2)), label="equal weights")
        for axes in panels[1:]:
            axes.set_ylim(0, 1.35 * axes.get_ylim()[1])  # room for the legend
        for axes in panels:
            axes.legend(loc="upper left")
        return plots.save(figure, path_stem)


def _draw_one(axes: Any, table: Any, size: Size, name: str) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    for (kind, words), marker in zip(KINDS.items(), "os", strict=True):
        rows = table[table["kind"] == kind]
        mean = rows.groupby("width")[name].mean()
        axes.plot(
            mean.index, mean, marker=marker, ms=5.5, mec="white", mew=0.6, lw=1.5, color=COLOURS[kind], label=words
        )
        axes.plot(rows["width"], rows[name], ".", ms=2.5, alpha=0.5, color=COLOURS[kind])
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(list(size.widths)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("head width d")


PAPER = Paper(
    name="vaswani2017",
    title="The scale 1/sqrt(d) of attention: variance, entropy and gradients with it and without",
    source=VASWANI,
    claims=CLAIMS,
    takes={
        "smoke": "seconds",
        "laptop": "a quarter of a minute on 2 CPU cores",
        "paper": "the same in minutes; not yet run",
    },
    run=run,
)
