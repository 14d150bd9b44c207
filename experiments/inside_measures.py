"""What `jaxgpt anatomy` measures of one checkpoint: two compiled passes over the windows, and the rows made of them.

Letters as in jaxgpt/model.py; W windows; x_0 ... x_L the residual stream before the blocks, and behind each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from jaxgpt.config import ModelConfig

if TYPE_CHECKING:
    import numpy
    import pandas
    from flax import nnx
    from jax import Array

MOST_NUMBERS = 2**24  # of an attention pattern, of the windows that are looked at together
COLUMNS: dict[str, str] = {
    "run_id": "the run, or the folder of Hugging Face weights",
    "step": "training step; 0: the initial parameters",
    "part": "embedding, layer, output, or model for all together",
    "layer": "number of the block, from 0",
    "windows": "validation windows that were looked at",
    "tokens": "tokens in them, which every rate is counted on",
    "parameters": "how many",
    "non_finite": "parameters that are NaN or infinite",
    "weight_norm": "Euclidean norm of the parameters",
    "moved": "|w - w0| / |w0|, w0 the initial parameters",
    "stream_norm": "mean over tokens of |x|, x the residual stream behind this part",
    "growth": "mean over tokens of |x - before| / |before|: what the block adds, as a share of the stream",
    "cosine": "mean cosine between the stream before and behind the block",
    "kurtosis": "mean over tokens of the kurtosis of x's dimensions (Elhage et al. 2023); Gaussian: 3 (D - 1)/(D + 1)",
    "max_median_ratio": "mean over tokens of max |x| / median |x| over dimensions (He et al. 2024)",
    "largest": "largest |x| on all tokens",
    "massive": "values of x above 100 and 1000 times the window's median (Sun et al. 2024)",
    "outlier_dims": "dimensions of what attention reads with |x| >= 6 at 6 % of the positions or more; of the model "
                    "those that meet LLM.int8's criterion, in 25 % of the layers (Dettmers et al. 2022)",
    "sink": "mean attention of later queries to the first position (Xiao et al. 2023)",
    "attention_entropy": "mean over heads and later queries, nats",
    "units": "of the MLP",
    "never_active": "share of units whose pre-activation is above 0 on none of the tokens",
    "never_bound": "95 % bound of how often such a unit can be active, as a share of tokens (rule of three; at least)",
    "effectively_dead": "share of units that never add more than .001 of the stream's mean norm",
    "active": "share of (token, unit) pairs with a pre-activation above 0 (Li et al. 2023)",
    "top_weight": "weight of largest |w| max|input| in the layer: matrix[row, column] (after Yu et al. 2024)",
    "top_weight_score": "its |w| max|input|",
    "top_weight_times_median": "its score over the median of its matrix",
    "loss": "of the whole model, nats per token",
    "loss_added": "by setting to 0 what the block adds, nats per token",
    "loss_added_sem": "its standard error over windows",
}  # fmt: skip
WHOLE = ("step", "layer", "windows", "tokens", "parameters", "non_finite", "massive", "outlier_dims", "units")


# --- the compiled passes -------------------------------------------------------------------------------------------


def _graph(c: ModelConfig, state: nnx.State) -> Any:
    from flax import nnx

    from jaxgpt import build

    return nnx.merge(build.graphdef(c), state)


def _block(c: ModelConfig, model: Any, i: int) -> Any:
    """The i-th block of a model, of a scanned one too."""
    import jax
    from flax import nnx

    if not (c.scan_layers and c.architecture == "transformer"):
        return model.layers[i]
    graphdef, state = nnx.split(model.layers)
    return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[i], state))


def _run(c: ModelConfig, state: nnx.State, separator: int | None, window_T1: Array, **how: Any) -> tuple[Array, dict]:
    """(loss of the tokens [T], nats; intermediates without the axis of batch, float32)."""
    import jax.numpy as jnp
    import optax

    token_1xT = window_T1[None, :-1]
    segment_1xT = None if separator is None else jnp.cumsum(token_1xT == separator, axis=1)
    logits_1xTxV, seen = _graph(c, state).inspect(token_1xT, segment_BxT=segment_1xT, **how)
    loss_T = optax.softmax_cross_entropy_with_integer_labels(logits_1xTxV[0].astype(jnp.float32), window_T1[1:])
    return loss_T, {name: value[0].astype(jnp.float32) for name, value in seen.items()}


def _batch(c: ModelConfig) -> int:
    return max(1, min(8, MOST_NUMBERS // (c.n_heads * c.context**2)))


@cache
def seen_in(c: ModelConfig, separator: int | None) -> Callable[[nnx.State, Any], dict[str, Array]]:
    """A compiled function of parameters and windows [W, T + 1]: for each window what the rows are made of, [W, ...].

    separator: the token that opens a document that sees itself alone; None: all see all.
    """
    import jax

    def of(state: nnx.State, window_WxT1: Array) -> dict[str, Array]:
        return jax.lax.map(partial(_window, c, state, separator), window_WxT1, batch_size=_batch(c))

    return jax.jit(of)


def _window(c: ModelConfig, state: nnx.State, separator: int | None, window_T1: Array) -> dict[str, Array]:
    import jax.numpy as jnp

    from analysis import anatomy as measure
    from jaxgpt.taps import intermediates

    loss_T, seen = _run(c, state, separator, window_T1, keep=[n for n in intermediates(c) if n != "embedding"])

    def layers(name: str) -> Any:
        values = [seen[full] for i in range(c.n_layers) if (full := f"layers.{i}.{name}") in seen]
        return jnp.stack(values) if values else None

    model = _graph(c, state)
    blocks = [_block(c, model, i) for i in range(c.n_layers)]
    x_L1xTxD = jnp.concatenate([layers("residual"), _last(c, seen)[None]])
    reads_LxTxD = jnp.stack([_read(c, block, x_TxD) for block, x_TxD in zip(blocks, x_L1xTxD[:-1], strict=True)])
    found = {
        "loss": loss_T.mean(),
        "stream_norm": jnp.linalg.norm(x_L1xTxD, axis=-1).mean(axis=-1),
        "kurtosis": measure.kurtosis(x_L1xTxD).mean(axis=-1),
        "max_median_ratio": measure.max_median_ratio(x_L1xTxD).mean(axis=-1),
        "largest": abs(x_L1xTxD).max(axis=(-2, -1)),
        "massive": measure.massive(x_L1xTxD).sum(axis=(-2, -1)),
        "growth": measure.growth(x_L1xTxD[:-1], x_L1xTxD[1:]).mean(axis=-1),
        "cosine": measure.cosine(x_L1xTxD[:-1], x_L1xTxD[1:]).mean(axis=-1),
        "large": measure.large(reads_LxTxD),
        "read.first": abs(reads_LxTxD).max(axis=-2),
    }
    if c.architecture != "transformer":
        found["read.state"] = abs(layers("out")).max(axis=-2)
        return found
    pattern_LxHxTxS, heads_LxTxHxK = layers("attention.pattern"), layers("attention.heads")
    found["read.heads"] = abs(heads_LxTxHxK).max(axis=1).reshape(c.n_layers, -1)
    if c.attention == "softmax" and c.context > 1:
        found["sink"] = measure.sinks(pattern_LxHxTxS).mean(axis=-1)
        found["attention_entropy"] = measure.attention_entropy(pattern_LxHxTxS).mean(axis=-1)
    pre_LxTxF = layers("mlp.pre")
    if pre_LxTxF is not None:
        middle = x_L1xTxD[:-1] if c.norm_placement == "parallel" else layers("residual_mid")
        normed = [x if c.norm_placement == "post" else b.mlp_norm(x) for b, x in zip(blocks, middle, strict=True)]
        found |= {
            "read.mlp": abs(jnp.stack(normed).astype(jnp.float32)).max(axis=-2),
            "read.hidden": abs(layers("mlp.hidden")).max(axis=-2),
            "pre": pre_LxTxF.max(axis=-2),
            "active": measure.active_fraction(pre_LxTxF),
            "middle_norm": jnp.linalg.norm(middle, axis=-1).mean(axis=-1),
        }
    return found


def _read(c: ModelConfig, block: Any, x_TxD: Array) -> Array:
    """What the block's first linear maps read of the stream before it."""
    import jax.numpy as jnp

    if c.architecture != "transformer":
        return block.norm(x_TxD).astype(jnp.float32)
    return x_TxD if c.norm_placement == "post" else block.attention_norm(x_TxD).astype(jnp.float32)


def _last(c: ModelConfig, seen: Mapping[str, Array]) -> Array:
    """The stream behind the last block, before the last norm, [T, D]."""
    last = {name.removeprefix(f"layers.{c.n_layers - 1}."): value for name, value in seen.items()}
    if c.architecture != "transformer":
        return last["residual"] + last["out"]
    if c.norm_placement == "post":
        return seen["final"]
    added = last.get("mlp.out", 0.0)
    if c.norm_placement == "parallel":
        return last["residual"] + last["attention.out"] + added
    return last["residual_mid"] + added


@cache
def without(c: ModelConfig, separator: int | None) -> Callable[[nnx.State, Any, Any], Array]:
    """A compiled function of parameters, windows [W, T + 1] and blocks to keep [K, L], bool: mean loss of each window
    where what the other blocks add is 0, [K, W], nats per token. Of a post-norm block the norms stay.
    """
    import jax
    import jax.numpy as jnp

    names = ("out",) if c.architecture != "transformer" else ("attention.out", *["mlp.out"] * (c.mlp != "none"))

    def of(state: nnx.State, window_WxT1: Array, keep_KxL: Array) -> Array:
        def one(keep_L: Array, window_T1: Array) -> Array:
            def kept(value: Array, i: int) -> Array:
                return jnp.where(keep_L[i], value, 0)

            replace = {f"layers.{i}.{name}": partial(kept, i=i) for i in range(c.n_layers) for name in names}
            return _run(c, state, separator, window_T1, replace=replace)[0].mean()

        def windows(keep_L: Array) -> Array:
            return jax.lax.map(partial(one, keep_L), window_WxT1, batch_size=_batch(c))

        return jax.lax.map(windows, keep_KxL)

    return jax.jit(of)


# --- rows -------------------------------------------------------------------------------------------------------------


def parameters(state: nnx.State) -> dict[str, numpy.ndarray]:
    """Parameters by their dotted names; of a scanned model those of each layer apart: layers.0.mlp.up.kernel."""
    import jax
    import numpy as np

    from jaxgpt.build import param_name

    named = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name, value = param_name(path), np.asarray(leaf, np.float32)
        head, _, rest = name.partition(".")
        if head == "layers" and not rest[0].isdecimal():
            named |= {f"layers.{i}.{rest}": value[i] for i in range(len(value))}
        else:
            named[name] = value
    return named


def not_finite(leaves: Mapping[str, numpy.ndarray]) -> list[str]:
    """A line for each parameter that holds values which are NaN or infinite."""
    from analysis import anatomy

    return [f"{name}: {count:,} of {leaves[name].size:,} values are not finite"
            for name, count in anatomy.non_finite(leaves).items()]  # fmt: skip


def measure(c: ModelConfig, state: nnx.State, window_WxT1: Any, separator: int | None) -> dict[str, numpy.ndarray]:
    """What `seen_in` and `without` say, over all windows: means; maxima of what is a maximum; sums of counts."""
    import numpy as np

    keep_KxL = np.concatenate([np.ones((1, c.n_layers), bool), ~np.eye(c.n_layers, dtype=bool)])
    seen = {name: np.asarray(value_W) for name, value_W in seen_in(c, separator)(state, window_WxT1).items()}
    loss_KxW = np.asarray(without(c, separator)(state, window_WxT1, keep_KxL), np.float64)
    found = {}
    for name, value_W in seen.items():
        if name in ("largest", "pre") or name.startswith("read."):
            found[name] = value_W.max(axis=0)
        else:
            found[name] = value_W.sum(axis=0) if name == "massive" else value_W.mean(axis=0, dtype=np.float64)
    with np.errstate(invalid="ignore"):  # infinite losses
        added_LxW = loss_KxW[1:] - loss_KxW[0]
        found["loss_added"] = added_LxW.mean(axis=1)
        count = added_LxW.shape[1]
        if count > 1:
            found["loss_added_sem"] = added_LxW.std(axis=1, ddof=1) / math.sqrt(count)
    return found


def table(
    c: ModelConfig,
    step: int | None,
    leaves: Mapping[str, numpy.ndarray],
    initial: Mapping[str, numpy.ndarray] | None,
    found: Mapping[str, numpy.ndarray],
    tokens: int,
) -> list[dict[str, Any]]:
    """The rows of a checkpoint: embedding, layers, output, model."""
    from analysis import anatomy

    def row(part: str, layer: int | None, mine: Mapping[str, numpy.ndarray], **more: Any) -> dict[str, Any]:
        return {
            "step": step, "part": part, "layer": layer, "tokens": tokens,
            "parameters": sum(leaf.size for leaf in mine.values()),
            "non_finite": sum(anatomy.non_finite(mine).values()), "weight_norm": anatomy.norm(mine.values()),
            "moved": None if initial is None else anatomy.update(mine, initial), **more,
        }  # fmt: skip

    def at(place: int, *names: str) -> dict[str, Any]:
        return {name: found[name][place] for name in names if name in found}

    parts = {where: {} for where in ("embedding", *range(c.n_layers), "output")}
    for name, leaf in leaves.items():
        parts[_part(name)][name] = leaf
    stream = ("stream_norm", "kurtosis", "max_median_ratio", "largest", "massive")
    layer = ("growth", "cosine", "sink", "attention_entropy", "active", "loss_added", "loss_added_sem")
    rows = [row("embedding", None, parts["embedding"], **at(0, *stream))]
    for i in range(c.n_layers):
        dims = {"outlier_dims": int((found["large"][i] >= anatomy.INT8["positions"]).sum())}
        rows.append(row("layer", i, parts[i], **at(i + 1, *stream), **at(i, *layer), **dims,
                        **_units(found, parts[i], i, tokens), **_top(found, parts[i], i)))  # fmt: skip
    whole = {name: sum(one[name] for one in rows[1:]) / c.n_layers for name in
             ("never_active", "effectively_dead", "active") if name in rows[1]}  # fmt: skip
    if whole:
        whole |= {"units": sum(one["units"] for one in rows[1:]), "never_bound": rows[1]["never_bound"]}
    whole |= {"loss": float(found["loss"]), "outlier_dims": int(anatomy.int8_dimensions(found["large"]).sum())}
    return [*rows, row("output", None, parts["output"]), row("model", None, leaves, **whole)]


def tidy(run_id: str, windows: int, rows: list[dict[str, Any]]) -> pandas.DataFrame:
    """Rows of any number of checkpoints with all COLUMNS, empty where they do not apply; counts are whole numbers."""
    import pandas

    frame = pandas.DataFrame([{"run_id": run_id, "windows": windows} | row for row in rows])
    frame = frame.reindex(columns=list(COLUMNS))
    for name in WHOLE:
        frame[name] = frame[name].astype("Int64")
    return frame


def _part(name: str) -> str | int:
    head, _, rest = name.partition(".")
    if head == "layers":
        return int(rest.partition(".")[0])
    return "embedding" if head in ("embed", "position", "read_in") else "output"


def _units(
    found: Mapping[str, numpy.ndarray], leaves: Mapping[str, numpy.ndarray], i: int, tokens: int
) -> dict[str, Any]:  # fmt: skip
    """How many units of the MLP are dead, of a layer that has one MLP."""
    from analysis import anatomy

    if "pre" not in found:
        return {}
    out_FxD, largest_F = leaves[f"layers.{i}.mlp.down.kernel"], found["read.hidden"][i]
    silent_F = anatomy.effectively_dead(largest_F, out_FxD, found["middle_norm"][i])
    return {
        "units": len(largest_F), "never_active": float(anatomy.dead(found["pre"][i]).mean()),
        "never_bound": anatomy.never_bound(tokens), "effectively_dead": float(silent_F.mean()),
    }  # fmt: skip


READS = {  # linear maps of a layer, and what they read
    "read.first": ("attention.query", "attention.key", "attention.value", "cell.dense_i"),
    "read.state": ("cell.dense_h",),
    "read.heads": ("attention.out",),
    "read.mlp": ("mlp.up", "mlp.gate"),
    "read.hidden": ("mlp.down",),
}


def _top(found: Mapping[str, numpy.ndarray], leaves: Mapping[str, numpy.ndarray], i: int) -> dict[str, Any]:
    """The layer's weight of largest |w| max|input|."""
    from analysis.anatomy import top_weight

    tops = {
        name: top_weight(leaves[kernel], found[read][i])
        for read, names in READS.items() if read in found
        for name in names if (kernel := f"layers.{i}.{name}.kernel") in leaves
    }  # fmt: skip
    name, top = max(tops.items(), key=lambda item: item[1].score)
    return {
        "top_weight": f"{name}[{top.row}, {top.column}]", "top_weight_score": top.score,
        "top_weight_times_median": top.times_median,
    }  # fmt: skip


def missing(c: ModelConfig, unknown_start: bool) -> list[str]:
    """What does not apply to a model, one line each."""
    lines = []
    if c.architecture != "transformer":
        lines.append(f"model.architecture={c.architecture} has no attention and no MLP: their columns are empty")
    else:
        if c.attention != "softmax":
            lines.append(f"model.attention={c.attention} has no softmax: sink and attention_entropy are empty")
        if c.n_experts is not None:
            lines.append(f"model.n_experts={c.n_experts}: units belong to experts that see some tokens only; their "
                         "columns are empty, and top_weight is of attention alone")  # fmt: skip
        elif c.mlp == "none":
            lines.append("model.mlp=none: the columns of units are empty")
        elif c.mlp not in ("relu", "relu2"):
            lines.append(f"model.mlp={c.mlp} is not 0 below 0: never_active counts units that stay there and still add "
                         "a little; effectively_dead counts those that add next to nothing")  # fmt: skip
    if unknown_start:
        lines.append("the initial parameters of a folder of weights are not known: moved is empty")
    return lines
