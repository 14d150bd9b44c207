"""One bad number in a trained model: which predictions it takes with it, and which ones theory says it takes.

A parameter's entry is set to NaN, +inf, -inf or 0, and the model reads one window. A position is lost where its
probabilities are no numbers: where a logit is NaN or +inf (a logit of -inf only forbids a token). Theory, from the
arithmetic of IEEE 754 and the signs of the undisturbed activations:

- what multiplies or adds to every position's stream hits every position, also where the other factor is 0: 0 x inf is
  NaN. A row of a table hits the positions that read it. relu(-inf) is 0, so that there an infinite weight into a
  hidden unit hits where the sign of its input makes it +inf, and -inf in a bias nowhere; gelu(-inf) is -inf x 0 = NaN.
- a query or key entry of +-inf makes scores of +-inf. One +inf that a query sees is NaN after the softmax; -inf alone
  counts as hidden, unless the row has no hidden key to take its place (in blocks it needs none).
- norms and matrices carry a hit through a position. Attention carries it to others: a hidden key has weight 0 and not
  no weight, and 0 x NaN is NaN, so that earlier positions are hit too: all of them where the whole matrix of weights
  multiplies the values, and those of the same block on where the queries are taken in blocks (jaxgpt's way on a CPU).

Letters as in model.py.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from experiments.anatomy.family import arrays_of, with_arrays

if TYPE_CHECKING:
    import numpy
    from flax import nnx

    from jaxgpt.config import ModelConfig

VALUES = {"NaN": math.nan, "+inf": math.inf, "-inf": -math.inf, "0": 0.0}
TABLES = ("row of a token not there", "row of a token", "row of a position")
IN_BLOCK = tuple(
    f"{part}.{leaf}"
    for parts, leaves in (
        (("attention_norm", "mlp_norm"), ("scale", "bias")),
        (("attention.query", "attention.key", "attention.value", "attention.out", "mlp.up", "mlp.down"),
         ("kernel", "bias")),
    )
    for part in parts
    for leaf in leaves
)  # fmt: skip
AT_END = ("final_norm.scale", "final_norm.bias", "unembed.kernel", "unembed.bias")


@dataclass(frozen=True)
class Site:
    """An entry of a parameter. kind: its row of tables. block: where it is, None outside of the blocks."""

    kind: str
    name: str
    index: tuple[int, ...]
    block: int | None = None


@dataclass(frozen=True)
class Clean:
    """The undisturbed activations that theory asks for, by block: what attention and MLP read (normed streams), queries
    and keys [T, H K]; and the last normed stream.
    """

    tokens_T: numpy.ndarray
    reads: tuple[numpy.ndarray, ...]
    thinks: tuple[numpy.ndarray, ...]
    queries: tuple[numpy.ndarray, ...]
    keys: tuple[numpy.ndarray, ...]
    final_TxD: numpy.ndarray


def new_token(tokens_T: numpy.ndarray) -> int:
    """The place nearest three quarters of the window, and not its first, whose token does not occur before it."""
    import numpy as np

    first = np.sort(np.unique(tokens_T, return_index=True)[1])
    first = first[first > 0]
    return int(first[np.argmin(np.abs(first - 3 * len(tokens_T) / 4))])


def sites(tokens_T: numpy.ndarray, arrays: dict[str, numpy.ndarray], seed: int) -> list[Site]:
    """One drawn entry of each kind of parameter, those of blocks in the first and the last one."""
    import numpy as np

    draw, place = np.random.default_rng(seed), new_token(tokens_T)
    vocabulary, width = arrays["embed.embedding"].shape
    absent = int(draw.choice(np.setdiff1d(np.arange(vocabulary), tokens_T)))
    rows = zip(TABLES, ("embed", "embed", "position"), (absent, int(tokens_T[place]), place), strict=True)
    found = [Site(kind, f"{table}.embedding", (row, int(draw.integers(width)))) for kind, table, row in rows]
    last = max(int(name.split(".")[1]) for name in arrays if name.startswith("layers."))
    inside = [(kind, f"layers.{block}.{kind}", block) for block in sorted({0, last}) for kind in IN_BLOCK]
    for kind, name, block in [*inside, *((kind, kind, None) for kind in AT_END)]:
        found.append(Site(kind, name, tuple(int(draw.integers(n)) for n in arrays[name].shape), block))
    return found


# --- theory ----------------------------------------------------------------------------------------------------------


def lost(site: Site, value: float, clean: Clean, c: ModelConfig, span: int) -> numpy.ndarray:
    """The positions that theory says are lost, [T] bool. span: queries of a block of attention; T: no blocks."""
    import numpy as np

    hit_T = _hit(site, value, clean, c, span)
    inside = site.block if site.block is not None else -1 if site.name.endswith("embedding") else c.n_layers
    if hit_T.any() and inside < c.n_layers - 1:  # attention follows
        hit_T = np.arange(len(hit_T)) >= np.argmax(hit_T) // span * span
    return hit_T


def _hit(site: Site, value: float, clean: Clean, c: ModelConfig, span: int) -> numpy.ndarray:
    """The positions whose stream, or logits, the entry itself makes non-finite, [T] bool."""
    import numpy as np

    length, sign = len(clean.tokens_T), np.sign(value)
    everywhere, nowhere, row = np.ones(length, bool), np.zeros(length, bool), site.index[0]
    if value == 0:
        return nowhere
    if site.name == "embed.embedding":
        return clean.tokens_T == row
    if site.name == "position.embedding":
        return np.arange(length) == row
    if math.isnan(value):
        return everywhere
    if site.kind == "unembed.kernel":
        return sign * clean.final_TxD[:, row] > 0
    if site.kind == "unembed.bias" or (site.kind == "mlp.up.bias" and c.mlp == "relu"):
        return everywhere if sign > 0 else nowhere
    if site.block is None:
        return everywhere
    if site.kind == "mlp.up.kernel" and c.mlp == "relu":
        return sign * clean.thinks[site.block][:, row] > 0
    if site.kind.startswith(("attention.query", "attention.key")):
        own_T = np.ones(length) if len(site.index) == 1 else clean.reads[site.block][:, row]
        query, key = (group[site.block][:, site.index[-1]] for group in (clean.queries, clean.keys))
        query_T, key_S = (own_T, key) if "query" in site.kind else (query, own_T)
        infinite_TxS = np.tril(sign * query_T[:, None] * key_S[None] > 0)
        # The one query that has no hidden key; attention in blocks gives 0 to it as to any whose scores are all -inf.
        sees_all_T = (np.arange(length) == length - 1) & (span == length)
        return infinite_TxS.any(axis=1) | sees_all_T
    return everywhere


@cache
def _undisturbed(c: ModelConfig) -> Any:
    import jax
    from flax import nnx

    from jaxgpt import build

    def of(state: nnx.State, tokens_T: Any) -> tuple[Any, ...]:
        model = nnx.merge(build.graphdef(c), state)
        streams = [f"layers.{i}.{name}" for i in range(c.n_layers) for name in ("residual", "residual_mid")]
        seen = model.inspect(tokens_T[None], keep=[*streams, "final"])[1]
        blocks = list(enumerate(model.layers))
        reads = [block.attention_norm(seen[f"layers.{i}.residual"][0]) for i, block in blocks]
        thinks = [block.mlp_norm(seen[f"layers.{i}.residual_mid"][0]) for i, block in blocks]
        queries, keys = ([getattr(block.attention, of)(reads[i]) for i, block in blocks] for of in ("query", "key"))
        return reads, thinks, queries, keys, seen["final"][0]

    return jax.jit(of)


def undisturbed(state: nnx.State, c: ModelConfig, tokens_T: numpy.ndarray) -> Clean:
    """What theory asks for, of one window."""
    import numpy as np

    *groups, final_TxD = _undisturbed(c)(state, tokens_T)
    reads, thinks, queries, keys = (tuple(np.asarray(x) for x in group) for group in groups)
    return Clean(tokens_T, reads, thinks, queries, keys, np.asarray(final_TxD))


# --- measurement -----------------------------------------------------------------------------------------------------


def poisoned(state: nnx.State, arrays: dict[str, numpy.ndarray], site: Site, value: float) -> nnx.State:
    """The parameters with this value at that entry. arrays: of `arrays_of`."""
    new = arrays[site.name].copy()
    new[site.index] = value
    return with_arrays(state, {site.name: new})


@cache
def outputs(c: ModelConfig) -> Any:
    """A compiled function of parameters and tokens [T]: logits [T, V]."""
    import jax
    from flax import nnx

    from jaxgpt import build

    return jax.jit(lambda state, tokens_T: nnx.merge(build.graphdef(c), state)(tokens_T[None])[0])


def no_numbers(logits_TxV: numpy.ndarray) -> numpy.ndarray:
    """Where probabilities are no numbers, [T] bool."""
    import numpy as np

    return np.asarray((np.isnan(logits_TxV) | np.isposinf(logits_TxV)).any(axis=-1))


def ways(c: ModelConfig) -> dict[str, tuple[ModelConfig, int]]:
    """Ways of attention that theory speaks of, by name: (config, queries of a block)."""
    import jax

    from jaxgpt import blockwise

    plain = dataclasses.replace(c, attention_kernel="plain", compute_dtype="float32")
    whole = {"whole": (plain, c.context)}
    blocks = blockwise.blocks(c.context)
    if jax.default_backend() != "cpu" or blocks == 1:
        return whole
    return whole | {"in blocks": (dataclasses.replace(plain, attention_kernel="auto"), c.context // blocks)}


def matrix(
    state: nnx.State, model: ModelConfig, tokens_T: numpy.ndarray, seed: int, activations: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """A line per activation, way of attention, entry and value: shares lost, of all positions and of those before the
    token or position of the row, by measurement and by theory; share of logits that are not finite; and whether the
    positions lost are exactly those of theory. A GELU model here has the ReLU model's weights.
    """
    import numpy as np

    arrays = arrays_of(state)
    chosen, place = sites(tokens_T, arrays, seed), new_token(tokens_T)
    for activation in activations:
        which = ways(dataclasses.replace(model, mlp=activation))
        clean = undisturbed(state, which["whole"][0], tokens_T)
        for way, (c, span) in which.items():
            for site in chosen:
                for word, value in VALUES.items():
                    logits_TxV = np.asarray(outputs(c)(poisoned(state, arrays, site, value), tokens_T))
                    lost_T, said_T = no_numbers(logits_TxV), lost(site, value, clean, c, span)
                    yield {
                        "seed": seed, "activation": activation, "way": way, "kind": site.kind, "value": word,
                        "block": "" if site.block is None else "first" if site.block == 0 else "last",
                        "lost": lost_T.mean(), "theory": said_T.mean(), "agrees": bool((lost_T == said_T).all()),
                        "earlier": lost_T[:place].mean(), "logits": 1 - np.isfinite(logits_TxV).mean(),
                    }  # fmt: skip
