"""The transformer, top to bottom, in Flax NNX.

Inputs are token ids, or real vectors through a linear read-in; outputs are logits, or a linear read-out.
`ModelConfig` chooses positions, attention, norm and its place, MLP or experts, biases, tying, dtypes.
`build.create(config, seed)` makes a model; the recurrent baselines of recurrent.py have the same interface.

Shapes live in names: B batch, T positions (queries), S positions (keys), D d_model, H heads, G heads of keys and
values, K head width, F MLP width, E experts, L layers, V output width. `x_BxTxD` is the residual stream.

Inside a trained model one can look and change by name (taps.py):

    logits, seen = model.inspect(tokens_BxT, keep=["layers.0.attention.pattern"])
    ablated, _ = model.inspect(tokens_BxT, replace={"layers.1.attention.heads": lambda z_BxTxHxK: 0 * z_BxTxHxK})

And continue a text without computing its past again:

    logits, cache = model.decode(prompt_BxT, model.empty_cache(batch=1, length=100))
    logits, cache = model.decode(next_Bx1, cache)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax import nnx
from jax import Array

from jaxgpt import blockwise, parts
from jaxgpt.config import BadInput, ModelConfig
from jaxgpt.mixture import Mixture
from jaxgpt.parallel import over_data
from jaxgpt.parts import linear
from jaxgpt.taps import Replacement, Tap, Taps

SINUSOIDAL_BASE = 10_000.0  # Vaswani et al. 2017


# --- positions -----------------------------------------------------------------------------------------------------


def sinusoidal_TxD(position_T: Array, d_model: int) -> Array:
    """Vaswani et al. 2017, section 3.5: sin(t / 10000^(2i/D)) at 2i and the cosine at 2i + 1. float32."""
    angle_TxD2 = _angles(position_T, d_model, SINUSOIDAL_BASE)
    return rearrange(jnp.stack([jnp.sin(angle_TxD2), jnp.cos(angle_TxD2)], axis=-1), "T i two -> T (i two)")


def rotate(x_BxTxHxK: Array, position_T: Array, width: int, base: float) -> Array:
    """RoPE (Su et al. 2021), in GPT-NeoX's layout: unit i turns with unit i + width/2 by t / base^(2i/width), and the
    units behind `width` do not turn.
    """
    angle_TxR = _angles(position_T, width, base)
    cos, sin = jnp.cos(angle_TxR)[None, :, None], jnp.sin(angle_TxR)[None, :, None]
    turning, still = x_BxTxHxK[..., :width], x_BxTxHxK[..., width:]
    a, b = jnp.split(turning.astype(angle_TxR.dtype), 2, axis=-1)
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BxTxHxK.dtype)
    return jnp.concatenate([turned, still], axis=-1) if still.shape[-1] else turned


def alibi_HxTxS(n_heads: int, position_T: Array, position_S: Array) -> Array:
    """ALiBi (Press et al. 2022): -slope_h |t - s|, added to scores. float32. Slopes are 2^(-8h/H) for a power of two
    H; otherwise those of the next lower power of two, then every other one of twice that power, as in the paper's code.
    """
    power = 2 ** math.floor(math.log2(n_heads))
    slopes = [2 ** (-8 * h / power) for h in range(1, power + 1)]
    slopes += [2 ** (-4 * h / power) for h in range(1, 2 * (n_heads - power), 2)]
    distance_TxS = jnp.abs(position_T[:, None] - position_S[None, :])
    return -jnp.asarray(slopes)[:, None, None] * distance_TxS[None]


def _angles(position_T: Array, width: int, base: float) -> Array:
    """t / base^(2i/width), [T, width/2]. float64 only where JAX runs in it."""
    frequency = base ** (-jnp.arange(0, width, 2) / width)
    return position_T[:, None] * frequency[None, :]


def document_positions(segment_BxT: Array) -> Array:
    """Each token's place in its document, from 0, [B, T] int32; a document is a stretch of equal numbers."""
    place_T = jnp.arange(segment_BxT.shape[1])
    opens_BxT1 = segment_BxT[:, 1:] != segment_BxT[:, :-1]
    start_BxT = jnp.pad(jnp.where(opens_BxT1, place_T[None, 1:], 0), ((0, 0), (1, 0)))
    return place_T[None] - jax.lax.cummax(start_BxT, axis=1)


# --- parts ---------------------------------------------------------------------------------------------------------


class View(NamedTuple):
    """Where the queries and keys stand, and which keys each query sees."""

    visible_BxTxS: Array  # bool, batch of 1 where all sequences are alike
    position_T: Array  # of the queries in the sequence
    position_S: Array  # of the keys
    masked: bool  # whether anything but causality hides keys, or the queries do not begin at 0


class KeyValues(NamedTuple):
    """Keys (turned already) and values of a layer, [B, S, G, K]; what is not yet written is hidden by the View."""

    k_BxSxGxK: Array
    v_BxSxGxK: Array


class Attention(nnx.Module):
    """Multi-head attention, softmax or linear. Linear: the mean of (q . k) v over the visible keys, without softmax.

    With fewer heads of keys and values than of queries, query head h uses head h G // H (Ainslie et al. 2023).
    """

    def __init__(self, c: ModelConfig):
        self.config = c
        self.query = linear(c, c.d_model, c.n_heads * c.head_width)
        self.key = linear(c, c.d_model, c.kv_heads * c.head_width)
        self.value = linear(c, c.d_model, c.kv_heads * c.head_width)
        self.out = linear(c, c.n_heads * c.head_width, c.d_model)
        self.query_norm = parts.rms_norm(c, c.head_width) if c.qk_norm else None
        self.key_norm = parts.rms_norm(c, c.head_width) if c.qk_norm else None

    def __call__(
        self,
        x_BxTxD: Array,
        view: View,
        tap: Tap,
        tapped: Callable[[str], bool] = lambda _: False,
        key: Array | None = None,
        past: KeyValues | None = None,
    ) -> tuple[Array, KeyValues | None]:
        """What attention adds to the stream, and `past` with the keys and values of x written into it."""
        c = self.config
        q_BxTxHxK, k_BxSxGxK, v_BxSxGxK = (
            rearrange(project(x_BxTxD), "B T (H K) -> B T H K", K=c.head_width)
            for project in (self.query, self.key, self.value)
        )
        if self.query_norm is not None and self.key_norm is not None:
            q_BxTxHxK, k_BxSxGxK = self.query_norm(q_BxTxHxK), self.key_norm(k_BxSxGxK)
        if c.positions == "rope":
            turn = partial(rotate, position_T=view.position_T, width=c.rotary_width, base=c.rope_base)
            q_BxTxHxK, k_BxSxGxK = turn(q_BxTxHxK), turn(k_BxSxGxK)
        if past is not None:
            at = (0, view.position_T[0], 0, 0)
            past = KeyValues(
                jax.lax.dynamic_update_slice(past.k_BxSxGxK, k_BxSxGxK, at),
                jax.lax.dynamic_update_slice(past.v_BxSxGxK, v_BxSxGxK, at),
            )
            k_BxSxGxK, v_BxSxGxK = past
        dropped = key is not None and c.dropout > 0
        if self._fused() and past is None and not dropped and not tapped("attention.pattern"):
            z_BxTxHxK = self._fused_heads(q_BxTxHxK, k_BxSxGxK, v_BxSxGxK, view)
            return self._written(z_BxTxHxK, tap), past
        k_BxSxHxK, v_BxSxHxK = (
            repeat(x, "B S G K -> B S (G R) K", R=c.n_heads // c.kv_heads) for x in (k_BxSxGxK, v_BxSxGxK)
        )
        if self._blockwise(view) and past is None and not dropped and not tapped("attention.pattern"):
            z_BxTxHxK = blockwise.causal(q_BxTxHxK, k_BxSxHxK, v_BxSxHxK, c.score_scale, c.matmul_precision)
        else:
            pattern_BxHxTxS = tap("attention.pattern", self.pattern(q_BxTxHxK, k_BxSxHxK, view))
            pattern_BxHxTxS = parts.dropout(pattern_BxHxTxS, c.dropout, key, 0)
            z_BxTxHxK = jnp.einsum("BHTS,BSHK->BTHK", pattern_BxHxTxS, v_BxSxHxK, precision=c.matmul_precision)
        return self._written(z_BxTxHxK, tap), past

    def _written(self, z_BxTxHxK: Array, tap: Tap) -> Array:
        z_BxTxHxK = tap("attention.heads", z_BxTxHxK)
        return tap("attention.out", self.out(rearrange(z_BxTxHxK, "B T H K -> B T (H K)")))

    def pattern(self, q_BxTxHxK: Array, k_BxSxHxK: Array, view: View) -> Array:
        """Weights [B, H, T, S] of the values; 0 where a key is hidden, all 0 where a query sees no key."""
        c, visible_Bx1xTxS = self.config, view.visible_BxTxS[:, None]
        scores_BxHxTxS = jnp.einsum("BTHK,BSHK->BHTS", q_BxTxHxK, k_BxSxHxK, precision=c.matmul_precision)
        if c.attention == "linear":
            count_Bx1xTx1 = jnp.maximum(visible_Bx1xTxS.sum(axis=-1, keepdims=True), 1)
            return jnp.where(visible_Bx1xTxS, scores_BxHxTxS, 0) / count_Bx1xTx1.astype(scores_BxHxTxS.dtype)
        # Softmax in float32 or wider whatever the compute dtype: bfloat16 has 8 bits for the sum over keys.
        scores_BxHxTxS = scores_BxHxTxS.astype(jnp.promote_types(scores_BxHxTxS.dtype, jnp.float32))
        scores_BxHxTxS = scores_BxHxTxS * c.score_scale
        if c.positions == "alibi":
            scores_BxHxTxS += alibi_HxTxS(c.n_heads, view.position_T, view.position_S)[None]
        hidden = jnp.finfo(scores_BxHxTxS.dtype).min  # finite, so that a query without keys gives 0 and not NaN
        weights_BxHxTxS = jax.nn.softmax(jnp.where(visible_Bx1xTxS, scores_BxHxTxS, hidden), axis=-1)
        weights_BxHxTxS = jnp.where(visible_Bx1xTxS, weights_BxHxTxS, 0)
        return weights_BxHxTxS.astype(q_BxTxHxK.dtype)

    def _blockwise(self, view: View) -> bool:
        c = self.config
        plain = c.attention == "softmax" and c.causal and c.positions != "alibi" and not view.masked
        # Over a mesh batch and heads are divided, which blocks make one axis of.
        alone = jax.sharding.get_abstract_mesh().empty
        return plain and alone and c.attention_kernel == "auto" and jax.default_backend() == "cpu"

    def _fused(self) -> bool:
        c = self.config
        # On CPU it was 11 % slower than the plain product. It has no choice of precision.
        if c.attention != "softmax" or c.matmul_precision != "default":
            return False
        return c.attention_kernel == "fused" or (c.attention_kernel == "auto" and jax.default_backend() == "gpu")

    def _fused_heads(self, q_BxTxHxK: Array, k_BxSxGxK: Array, v_BxSxGxK: Array, view: View) -> Array:
        c = self.config
        # cuDNN's flash attention: half precision, heads of at most 128 in steps of 8, and here no bias. Else XLA's own.
        half = q_BxTxHxK.dtype in (jnp.bfloat16, jnp.float16) and c.positions != "alibi"
        flash = jax.default_backend() == "gpu" and half and c.head_width <= 128 and c.head_width % 8 == 0
        bias_HxTxS = alibi_HxTxS(c.n_heads, view.position_T, view.position_S) if c.positions == "alibi" else None
        z_BxTxHxK = jax.nn.dot_product_attention(
            q_BxTxHxK,
            k_BxSxGxK,
            v_BxSxGxK,
            bias=None if bias_HxTxS is None else bias_HxTxS[None],
            mask=view.visible_BxTxS[:, None] if view.masked else None,  # cuDNN wants all of [B, 1, T, S]
            scale=c.score_scale,
            is_causal=c.causal,  # said apart from the mask, so that the kernel can leave out what is above the diagonal
            implementation="cudnn" if flash else "xla",
        )
        if not view.masked:
            return z_BxTxHxK
        return jnp.where(view.visible_BxTxS.any(axis=-1)[..., None, None], z_BxTxHxK, 0)


class MLP(nnx.Module):
    """down(act(up x)), or for swiglu (Shazeer 2020) down(silu(gate x) * up x)."""

    def __init__(self, c: ModelConfig):
        self.kind = c.mlp
        self.up = linear(c, c.d_model, c.mlp_width)
        self.gate = linear(c, c.d_model, c.mlp_width) if c.mlp == "swiglu" else None
        self.down = linear(c, c.mlp_width, c.d_model)

    def __call__(self, x_BxTxD: Array, tap: Tap) -> Array:
        act = parts.activation(self.kind)
        if self.gate is not None:
            h_BxTxF = act(tap("mlp.pre", self.gate(x_BxTxD))) * self.up(x_BxTxD)
        else:
            h_BxTxF = act(tap("mlp.pre", self.up(x_BxTxD)))
        return tap("mlp.out", self.down(tap("mlp.hidden", h_BxTxF)))


class Block(nnx.Module):
    """Attention and MLP around the residual stream, normed before (GPT-2), after (Vaswani 2017), or in parallel.

    Parallel has a norm for each branch, as GPT-NeoX; GPT-J's single norm is the case of equal ones.
    """

    def __init__(self, c: ModelConfig):
        self.config = c
        self.attention_norm = parts.norm(c)
        self.attention = Attention(c)
        self.mlp_norm = parts.norm(c) if c.mlp != "none" else parts.identity
        self.mlp = None if c.mlp == "none" else MLP(c) if c.n_experts is None else Mixture(c)

    def __call__(
        self,
        x_BxTxD: Array,
        view: View,
        tap: Tap,
        tapped: Callable[[str], bool] = lambda _: False,
        key: Array | None = None,
        past: KeyValues | None = None,
    ) -> tuple[Array, KeyValues | None]:
        """The stream after this block, and `past` with this block's keys and values."""
        placement, rate = self.config.norm_placement, self.config.dropout
        written = past

        def attend(x_BxTxD: Array) -> Array:
            nonlocal written
            added_BxTxD, written = self.attention(x_BxTxD, view, tap, tapped, key, past)
            return parts.dropout(added_BxTxD, rate, key, 1)

        def think(x_BxTxD: Array) -> Array:
            return jnp.zeros_like(x_BxTxD) if self.mlp is None else parts.dropout(self.mlp(x_BxTxD, tap), rate, key, 2)

        x_BxTxD = tap("residual", x_BxTxD)
        if placement == "parallel":
            return x_BxTxD + attend(self.attention_norm(x_BxTxD)) + think(self.mlp_norm(x_BxTxD)), written
        if placement == "post":
            x_BxTxD = tap("residual_mid", self.attention_norm(x_BxTxD + attend(x_BxTxD)))
            return self.mlp_norm(x_BxTxD + think(x_BxTxD)), written
        x_BxTxD = tap("residual_mid", x_BxTxD + attend(self.attention_norm(x_BxTxD)))
        return x_BxTxD + think(self.mlp_norm(x_BxTxD)), written


# --- the model -----------------------------------------------------------------------------------------------------


class Cache(NamedTuple):
    """What decoding remembers: how many positions it has seen, and each layer's keys and values (a recurrent one's
    carry), stacked if scanned.
    """

    length: Array  # int32
    layers: Any


class Transformer(nnx.Module):
    """The whole model, all weights 0 and norm scales 1; `build.create(config, seed)` draws them."""

    def __init__(self, c: ModelConfig):
        self.config = c
        self.embed = parts.table(c, c.vocab_size) if c.d_input is None else None
        self.read_in = linear(c, c.d_input, c.d_model) if c.d_input is not None else None
        self.position = parts.table(c, c.context) if c.positions == "learned" else None
        self.layers = _stack(Block(c), c.n_layers) if c.scan_layers else nnx.List([Block(c) for _ in range(c.n_layers)])
        self.final_norm = parts.identity if c.norm_placement == "post" else parts.norm(c)
        self.unembed, self.read_out = parts.output(c)

    def __call__(
        self,
        inputs: Array,
        key_mask_BxS: Array | None = None,
        *,
        segment_BxT: Array | None = None,
        key: Array | None = None,
    ) -> Array:
        """Outputs [B, T, V] for token ids [B, T] or vectors [B, T, d_input], in the compute dtype.

        `key_mask_BxS`, bool: positions where it is False are seen by no query (padding, or the query token of an
        in-context regression). `segment_BxT`, int: document numbers, each one stretch of a row; a token sees its own
        document only, and learned and sinusoidal positions start anew in each. `key`: of dropout; without one nothing
        is dropped. Raises BadInput for a sequence longer than a learned position table.
        """
        return self.inspect(inputs, key_mask_BxS, segment_BxT=segment_BxT, key=key)[0]

    def inspect(
        self,
        inputs: Array,
        key_mask_BxS: Array | None = None,
        *,
        segment_BxT: Array | None = None,
        key: Array | None = None,
        keep: Iterable[str] = (),
        replace: Mapping[str, Replacement] | None = None,
    ) -> tuple[Array, dict[str, Array]]:
        """Outputs and the intermediates named in `keep`; those named in `replace` take the caller's value first.

        Names: see `taps.intermediates`. A replacement is an array of the same shape, or a function of the value.
        What is not asked for is not computed: under jit it costs nothing. Raises BadInput for an unknown name.
        """
        taps = Taps(self.config, frozenset(keep), dict(replace or {}))
        kept: dict[str, Array] = {}
        place_T = jnp.arange(inputs.shape[1])
        place_BxT = place_T[None] if segment_BxT is None else document_positions(segment_BxT)
        view = View(self._visible(place_T, place_T), place_T, place_T, masked=False)
        hides = [] if key_mask_BxS is None else [key_mask_BxS[:, None, :]]
        hides += [] if segment_BxT is None else [segment_BxT[:, :, None] == segment_BxT[:, None, :]]
        for seen_BxTxS in hides:
            visible_BxTxS = jnp.broadcast_to(view.visible_BxTxS, (inputs.shape[0], *view.visible_BxTxS.shape[1:]))
            view = view._replace(visible_BxTxS=visible_BxTxS & seen_BxTxS, masked=True)
        return self._outputs(inputs, place_BxT, view, taps, kept, key)[0], kept

    def empty_cache(self, batch: int, length: int) -> Cache:
        """Room for the keys and values of `length` positions. Raises BadInput beyond a learned position table, and for
        a model that sees the future.
        """
        c = self.config
        if not c.causal:
            raise BadInput("model.causal=false: what comes later changes what came before; decoding needs causal=true")
        self._check_length(length)
        shape = (batch, length, c.kv_heads, c.head_width)
        stack = (c.n_layers,) if c.scan_layers else ()

        def empty() -> Array:
            return jnp.zeros((*stack, *shape), jnp.dtype(parts.compute_dtype(c)))

        layer = [KeyValues(empty(), empty()) for _ in range(1 if c.scan_layers else c.n_layers)]
        return Cache(jnp.zeros((), jnp.int32), layer[0] if c.scan_layers else layer)

    def decode(self, inputs: Array, cache: Cache) -> tuple[Array, Cache]:
        """Outputs [B, T, V] for the next T inputs behind those that the cache has seen, and the cache with them.

        The caller keeps to the cache's length: what is written behind its end overwrites its last positions.
        """
        keys: KeyValues = cache.layers if self.config.scan_layers or not cache.layers else cache.layers[0]
        length = keys.k_BxSxGxK.shape[-3] if self.config.n_layers else inputs.shape[1]
        position_T, position_S = cache.length + jnp.arange(inputs.shape[1]), jnp.arange(length)
        view = View(self._visible(position_T, position_S), position_T, position_S, masked=True)
        taps = Taps(self.config, frozenset(), {})
        outputs_BxTxV, layers = self._outputs(inputs, position_T[None], view, taps, {}, None, cache.layers)
        return outputs_BxTxV, Cache(cache.length + inputs.shape[1], layers)

    def _outputs(
        self,
        inputs: Array,
        position_BxT: Array,
        view: View,
        taps: Taps,
        kept: dict[str, Array],
        key: Array | None,
        past: Any = None,
    ) -> tuple[Array, Any]:
        c = self.config
        x_BxTxD = taps.at("embedding", kept, over_data(self._embed(inputs, position_BxT)))
        x_BxTxD = parts.dropout(x_BxTxD, c.dropout, key, c.n_layers)
        x_BxTxD, past = self._blocks(x_BxTxD, view, taps, kept, key, past)
        x_BxTxD = taps.at("final", kept, self.final_norm(x_BxTxD))
        return parts.write(c, self.embed, self.unembed, self.read_out, x_BxTxD), past

    def _embed(self, inputs: Array, position_BxT: Array) -> Array:
        x_BxTxD = parts.read(self.embed, self.read_in, inputs)
        if self.position is not None:
            self._check_length(inputs.shape[1])
            x_BxTxD += self.position(position_BxT)
        if self.config.positions == "sinusoidal":
            table_BxTxD = jax.vmap(lambda position_T: sinusoidal_TxD(position_T, self.config.d_model))(position_BxT)
            x_BxTxD += table_BxTxD.astype(x_BxTxD.dtype)
        return x_BxTxD

    def _check_length(self, length: int) -> None:
        if self.config.positions == "learned" and length > self.config.context:
            raise BadInput(
                f"a sequence of {length} positions is longer than model.context={self.config.context}, "
                "the size of the learned position table"
            )

    def _visible(self, position_T: Array, position_S: Array) -> Array:
        """Which keys each query sees, [1, T, S], bool."""
        if not self.config.causal:
            return jnp.ones((1, len(position_T), len(position_S)), bool)
        return position_S[None, None, :] <= position_T[None, :, None]

    def _blocks(
        self, x_BxTxD: Array, view: View, taps: Taps, kept: dict[str, Array], key: Array | None, past: Any
    ) -> tuple[Array, Any]:
        c = self.config
        if not c.n_layers:
            return x_BxTxD, past

        def run(
            graphdef: nnx.GraphDef, index: int | Array, state: nnx.State, past: KeyValues | None, x_BxTxD: Array
        ) -> tuple[Array, tuple[dict[str, Array], KeyValues | None]]:
            seen: dict[str, Array] = {}
            block, tap = nnx.merge(graphdef, state), partial(taps.in_layer, index, seen)
            own_key = None if key is None else jax.random.fold_in(key, index)
            x_BxTxD, past = block(x_BxTxD, view, tap, taps.wants, own_key, past)
            return over_data(x_BxTxD), (seen, past)

        def maybe_remat(function: Callable) -> Callable:
            return jax.checkpoint(function) if c.remat else function

        if c.scan_layers:
            graphdef, state = nnx.split(self.layers)
            run_layer = maybe_remat(partial(run, graphdef))
            layers = (jnp.arange(c.n_layers), state, past)
            x_BxTxD, (seen, past) = jax.lax.scan(lambda x, layer: run_layer(*layer, x), x_BxTxD, layers)
            seen = {f"layers.{i}.{name}": value_Lx[i] for name, value_Lx in seen.items() for i in range(c.n_layers)}
            kept |= {name: value for name, value in seen.items() if name in taps.keep}
            return x_BxTxD, past
        assert isinstance(self.layers, nnx.List)
        pasts = list(past) if past is not None else [None] * c.n_layers
        for i, block in enumerate(self.layers):
            # Each layer's own graph, so that a layer edited by hand (without its MLP, say) runs as it now is.
            graphdef, state = nnx.split(block)
            x_BxTxD, (seen, pasts[i]) = maybe_remat(partial(run, graphdef, i))(state, pasts[i], x_BxTxD)
            kept |= {f"layers.{i}.{name}": value for name, value in seen.items()}
        return x_BxTxD, None if past is None else pasts


def _stack(block: Block, n_layers: int) -> Block:
    """One block whose every parameter has a leading axis of layers."""
    graphdef, state = nnx.split(block)
    return nnx.merge(graphdef, jax.tree.map(lambda p: jnp.broadcast_to(p, (n_layers, *p.shape)), state))
