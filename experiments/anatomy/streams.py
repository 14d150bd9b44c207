"""What `jaxgpt reproduce outliers` measures in a model: the residual stream, what attention writes, tables of vectors.

Letters as in model.py; W windows, N tokens. Streams are numbered from 0, the embedding, to L, behind the last block.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy
    from flax import nnx

    from jaxgpt.config import ModelConfig

TOP = 3  # largest magnitudes of a window, as Sun et al. 2024 plot them


@cache
def rotation(width: int) -> numpy.ndarray:
    """A random orthogonal matrix [D, D], uniform, always the same one: the stream in a basis that nothing prefers."""
    import numpy as np

    q_DxD, r_DxD = np.linalg.qr(np.random.default_rng(0).standard_normal((width, width)))
    return (q_DxD * np.sign(np.diag(r_DxD))).astype(np.float32)


@cache
def activity(c: ModelConfig) -> Callable[[nnx.State, Any, Any], dict[str, Any]]:
    """A compiled function of parameters, windows [W, T + 1] and a basis [D, D]; means over windows unless said.

    By stream, [L + 1]: top (mean of the TOP largest |x| of a window), median (|x| of a window), kurtosis (mean over
    tokens of each vector's), turned (the same in the given basis), dimension_kurtosis, massive (how many in all), and
    largest_D (largest |x| of each dimension over all tokens), mean_D. By what attention and MLPs read, [2 L, D]: large.
    By layer and head, [L, H]: sink, and leaves (`leaves`, the largest over tokens), gain (largest |output| over largest
    |value|, the largest over windows).
    """
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from analysis import anatomy
    from jaxgpt import build

    layers = range(c.n_layers)
    taps = ("residual", "attention.pattern", "attention.heads", "residual_mid", "mlp.out")
    most = ("largest_D", "leaves", "gain")

    def one(state: nnx.State, tokens_T: Any, basis_DxD: Any) -> dict[str, Any]:
        model: Any = nnx.merge(build.graphdef(c), state)
        seen = model.inspect(tokens_T[None], keep=[f"layers.{i}.{tap}" for i in layers for tap in taps])[1]
        resid, pattern, heads, mid, out = ([seen[f"layers.{i}.{tap}"][0] for i in layers] for tap in taps)
        stream_LxTxD = jnp.stack([*resid, mid[-1] + out[-1]])
        reads = [block.attention_norm(x_TxD) for block, x_TxD in zip(model.layers, resid, strict=True)]
        thinks = [block.mlp_norm(x_TxD) for block, x_TxD in zip(model.layers, mid, strict=True)]
        values_LxTxHxK = jnp.stack([
            block.attention.value(x_TxD).reshape(len(tokens_T), c.kv_heads, c.head_width)
            for block, x_TxD in zip(model.layers, reads, strict=True)
        ])  # fmt: skip
        heads_LxTxHxK = jnp.stack(heads)
        largest_of = [abs(x).max(axis=(1, 3)) for x in (heads_LxTxHxK, values_LxTxHxK)]
        size_LxN = jnp.sort(abs(stream_LxTxD).reshape(len(stream_LxTxD), -1), axis=-1)
        values = size_LxN.shape[1]
        return {
            "top": size_LxN[:, -TOP:].mean(axis=-1),
            "median": (size_LxN[:, (values - 1) // 2] + size_LxN[:, values // 2]) / 2,
            "kurtosis": anatomy.kurtosis(stream_LxTxD).mean(axis=-1),
            "turned": anatomy.kurtosis(stream_LxTxD @ basis_DxD).mean(axis=-1),
            "dimension_kurtosis": anatomy.dimension_kurtosis(stream_LxTxD),
            "massive": anatomy.massive(stream_LxTxD).sum(axis=(-2, -1)),
            "largest_D": abs(stream_LxTxD).max(axis=1),
            "mean_D": stream_LxTxD.mean(axis=1),
            "large": anatomy.large(jnp.stack([*reads, *thinks])),
            "sink": anatomy.sinks(jnp.stack(pattern)),
            "leaves": jax.vmap(leaves)(heads_LxTxHxK, values_LxTxHxK),
            "gain": largest_of[0] / largest_of[1],
        }

    def of(state: nnx.State, window_WxT1: Any, basis_DxD: Any) -> dict[str, Any]:
        each = jax.lax.map(lambda window_T1: one(state, window_T1[:-1], basis_DxD), window_WxT1)
        found = {name: x_Wx.max(axis=0) if name in most else x_Wx.mean(axis=0) for name, x_Wx in each.items()}
        return found | {"massive": each["massive"].sum(axis=0)}

    return jax.jit(of)


def leaves(z_TxHxK: Any, v_TxHxK: Any) -> Any:
    """How far the outputs of causal heads leave the range of the values that they see, [H]: the most over positions and
    channels, as a share of the largest |value| of the head. 0 but for rounding if weights are at least 0 and sum to 1.
    """
    import jax
    import jax.numpy as jnp

    high_TxHxK, low_TxHxK = jax.lax.cummax(v_TxHxK, axis=0), jax.lax.cummin(v_TxHxK, axis=0)
    beyond_TxHxK = jnp.maximum(z_TxHxK - high_TxHxK, low_TxHxK - z_TxHxK)
    return jnp.maximum(beyond_TxHxK.max(axis=(0, 2)), 0) / abs(v_TxHxK).max(axis=(0, 2))


@cache
def ablated(c: ModelConfig, layer: int) -> Callable[[nnx.State, Any, Any, Any], Any]:
    """A compiled function of parameters, windows [W, T + 1], a mask [D] and values [D]: the mean loss, nats, with the
    dimensions under the mask set to these values in the stream that block `layer` gets, at all tokens.
    """
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    from jaxgpt import build

    def of(state: nnx.State, window_WxT1: Any, mask_D: Any, value_D: Any) -> Any:
        def one(window_T1: Any) -> Any:
            model: Any = nnx.merge(build.graphdef(c), state)
            put = {f"layers.{layer}.residual": lambda x_BxTxD: jnp.where(mask_D, value_D, x_BxTxD)}
            logits_1xTxV = model.inspect(window_T1[None, :-1], replace=put)[0]
            of_tokens = optax.softmax_cross_entropy_with_integer_labels
            return of_tokens(logits_1xTxV[0].astype(jnp.float32), window_T1[1:]).mean()

        return jax.lax.map(one, window_WxT1, batch_size=8).mean()

    return jax.jit(of)


def at_loss(loss_E: numpy.ndarray, value_E: numpy.ndarray, loss: float) -> float:
    """A curve's value where its loss falls to this one for the first time, by straight lines; NaN where it starts below
    it or does not come there.
    """
    import numpy as np

    there = np.flatnonzero(loss_E <= loss)
    if not len(there):
        return math.nan
    at = there[0]
    if at == 0:
        return float(value_E[0]) if loss_E[0] == loss else math.nan
    share = (loss_E[at - 1] - loss) / (loss_E[at - 1] - loss_E[at])
    return float(value_E[at - 1] + share * (value_E[at] - value_E[at - 1]))


def norms(vectors_VxD: numpy.ndarray, count_V: numpy.ndarray) -> tuple[float, float]:
    """(Spearman correlation of a token's count and its vector's length, length of the rarest quarter over that of the
    most frequent one), over tokens that occur; NaN where all lengths are equal.
    """
    import numpy as np
    from scipy.stats import spearmanr

    occurs = count_V > 0
    length_V, count_V = np.linalg.norm(vectors_VxD[occurs], axis=1), count_V[occurs]
    ordered_V = length_V[np.argsort(count_V, kind="stable")]
    quarter = max(1, len(ordered_V) // 4)
    same = np.ptp(length_V) == 0
    rho = math.nan if same else float(np.asarray(spearmanr(count_V, length_V))[0])
    return rho, float(ordered_V[:quarter].mean() / ordered_V[-quarter:].mean())
