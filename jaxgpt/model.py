"""The transformer, top to bottom, in Flax NNX.

Inputs are token ids, or real vectors through a linear read-in; outputs are logits, or a linear read-out.
`ModelConfig` chooses positions, attention, norm and its place, MLP, biases, tying, dtypes.

Shapes live in names: B batch, T positions (queries), S positions (keys), D d_model, H heads, K head width,
F MLP width, L layers, V output width. `x_BxTxD` is the residual stream.

Inside a trained model one can look and change by name:

    logits, seen = model.inspect(tokens_BxT, keep=["layers.0.attention.pattern"])
    ablated, _ = model.inspect(tokens_BxT, replace={"layers.1.attention.heads": lambda z_BxTxHxK: 0 * z_BxTxHxK})
"""

from __future__ import annotations

import difflib
import math
import zlib
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax import Array

from jaxgpt.config import BadInput, ModelConfig

NORM_EPSILON = 1e-5  # GPT-2's
ROPE_BASE = 10_000.0  # Su et al. 2021; also the base of the sinusoidal table (Vaswani et al. 2017)

Tap = Callable[[str, Array], Array]  # sees a named value on its way and returns it, or another in its place
Replacement = Array | np.ndarray | Callable[[Array], Array]


# --- positions -----------------------------------------------------------------------------------------------------


def sinusoidal_TxD(length: int, d_model: int) -> Array:
    """Vaswani et al. 2017, section 3.5: sin(t / 10000^(2i/D)) at 2i and the cosine at 2i + 1. float32."""
    angle_TxD2 = _angles(jnp.arange(length), d_model)
    return rearrange(jnp.stack([jnp.sin(angle_TxD2), jnp.cos(angle_TxD2)], axis=-1), "T i two -> T (i two)")


def rotate(x_BxTxHxK: Array) -> Array:
    """RoPE (Su et al. 2021), in GPT-NeoX's layout: dimension i turns with dimension i + K/2 by t / 10000^(2i/K)."""
    angle_TxK2 = _angles(jnp.arange(x_BxTxHxK.shape[1]), x_BxTxHxK.shape[-1])
    cos, sin = jnp.cos(angle_TxK2)[None, :, None], jnp.sin(angle_TxK2)[None, :, None]
    a, b = jnp.split(x_BxTxHxK.astype(angle_TxK2.dtype), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BxTxHxK.dtype)


def alibi_HxTxT(n_heads: int, length: int) -> Array:
    """ALiBi (Press et al. 2022): -slope_h |t - s|, added to scores. float32. Slopes are 2^(-8h/H) for a power of two
    H; otherwise those of the next lower power of two, then every other one of twice that power, as in the paper's code.
    """
    power = 2 ** math.floor(math.log2(n_heads))
    slopes = [2 ** (-8 * h / power) for h in range(1, power + 1)]
    slopes += [2 ** (-4 * h / power) for h in range(1, 2 * (n_heads - power), 2)]
    distance_TxT = jnp.abs(jnp.arange(length)[:, None] - jnp.arange(length)[None, :])
    return -jnp.asarray(slopes)[:, None, None] * distance_TxT[None]


def _angles(position_T: Array, width: int) -> Array:
    """t / base^(2i/width), [T, width/2]. float64 only where JAX runs in it."""
    frequency = ROPE_BASE ** (-jnp.arange(0, width, 2) / width)
    return position_T[:, None] * frequency[None, :]


# --- parts ---------------------------------------------------------------------------------------------------------


def _dtypes(c: ModelConfig) -> dict[str, Any]:
    """Dtypes of arithmetic and of parameters, as Flax layers take them."""
    if "float64" in (c.param_dtype, c.compute_dtype) and not jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]
        which = "param_dtype" if c.param_dtype == "float64" else "compute_dtype"
        raise BadInput(f"model.{which}=float64 needs JAX_ENABLE_X64=1 in the environment; without it use float32")
    return {"dtype": jnp.dtype(compute_dtype(c)), "param_dtype": jnp.dtype(c.param_dtype)}


def compute_dtype(c: ModelConfig) -> str:
    """The dtype of the arithmetic on this machine."""
    auto = c.param_dtype if jax.default_backend() == "cpu" else "bfloat16"
    return auto if c.compute_dtype == "auto" else c.compute_dtype


def _linear(c: ModelConfig, d_in: int, d_out: int) -> nnx.Linear:
    # Zeros, because `init_params` is the one place where parameters get their values.
    return nnx.Linear(
        d_in,
        d_out,
        use_bias=c.bias,
        precision=c.matmul_precision,
        rngs=nnx.Rngs(0),
        kernel_init=nnx.initializers.zeros,
        **_dtypes(c),
    )


def _table(c: ModelConfig, rows: int) -> nnx.Embed:
    return nnx.Embed(rows, c.d_model, rngs=nnx.Rngs(0), embedding_init=nnx.initializers.zeros, **_dtypes(c))


def _norm(c: ModelConfig) -> Callable[[Array], Array]:
    if c.norm == "none":
        return _identity
    if c.norm == "rmsnorm":
        return nnx.RMSNorm(c.d_model, epsilon=NORM_EPSILON, rngs=nnx.Rngs(0), **_dtypes(c))
    # The two-pass variance: the fast one, E[x^2] - E[x]^2, cancels when the mean is large.
    return nnx.LayerNorm(
        c.d_model, epsilon=NORM_EPSILON, use_bias=c.bias, use_fast_variance=False, rngs=nnx.Rngs(0), **_dtypes(c)
    )


def _identity(x: Array) -> Array:
    return x


class Mask(NamedTuple):
    """Which keys each query sees."""

    visible_BxTxS: Array  # bool, batch of 1 where all sequences are alike; causality and hidden keys together
    keys_BxS: Array | None  # bool; the caller's, None: no key is hidden


class Attention(nnx.Module):
    """Multi-head attention, softmax or linear. Linear: the mean of (q . k) v over the visible keys, without softmax."""

    def __init__(self, c: ModelConfig):
        self.config = c
        width = c.n_heads * c.head_width
        self.query = _linear(c, c.d_model, width)
        self.key = _linear(c, c.d_model, width)
        self.value = _linear(c, c.d_model, width)
        self.out = _linear(c, width, c.d_model)

    def __call__(self, x_BxTxD: Array, mask: Mask, tap: Tap, tapped: Callable[[str], bool]) -> Array:
        c = self.config
        q_BxTxHxK, k_BxSxHxK, v_BxSxHxK = (
            rearrange(project(x_BxTxD), "B T (H K) -> B T H K", H=c.n_heads)
            for project in (self.query, self.key, self.value)
        )
        if c.positions == "rope":
            q_BxTxHxK, k_BxSxHxK = rotate(q_BxTxHxK), rotate(k_BxSxHxK)
        if c.attention == "softmax" and self._fused() and not tapped("attention.pattern"):
            z_BxTxHxK = self._fused_heads(q_BxTxHxK, k_BxSxHxK, v_BxSxHxK, mask)
        else:
            pattern_BxHxTxS = tap("attention.pattern", self.pattern(q_BxTxHxK, k_BxSxHxK, mask.visible_BxTxS))
            z_BxTxHxK = jnp.einsum("BHTS,BSHK->BTHK", pattern_BxHxTxS, v_BxSxHxK, precision=c.matmul_precision)
        z_BxTxHxK = tap("attention.heads", z_BxTxHxK)
        return tap("attention.out", self.out(rearrange(z_BxTxHxK, "B T H K -> B T (H K)")))

    def pattern(self, q_BxTxHxK: Array, k_BxSxHxK: Array, visible_BxTxS: Array) -> Array:
        """Weights [B, H, T, S] of the values; 0 where a key is hidden, all 0 where a query sees no key."""
        c, visible_Bx1xTxS = self.config, visible_BxTxS[:, None]
        scores_BxHxTxS = jnp.einsum("BTHK,BSHK->BHTS", q_BxTxHxK, k_BxSxHxK, precision=c.matmul_precision)
        if c.attention == "linear":
            count_Bx1xTx1 = jnp.maximum(visible_Bx1xTxS.sum(axis=-1, keepdims=True), 1)
            return jnp.where(visible_Bx1xTxS, scores_BxHxTxS, 0) / count_Bx1xTx1.astype(scores_BxHxTxS.dtype)
        # Softmax in float32 or wider whatever the compute dtype: bfloat16 has 8 bits for the sum over keys.
        scores_BxHxTxS = scores_BxHxTxS.astype(jnp.promote_types(scores_BxHxTxS.dtype, jnp.float32))
        scores_BxHxTxS = scores_BxHxTxS / math.sqrt(c.head_width)
        if c.positions == "alibi":
            scores_BxHxTxS += alibi_HxTxT(c.n_heads, scores_BxHxTxS.shape[-1])[None]
        hidden = jnp.finfo(scores_BxHxTxS.dtype).min  # finite, so that a query without keys gives 0 and not NaN
        weights_BxHxTxS = jax.nn.softmax(jnp.where(visible_Bx1xTxS, scores_BxHxTxS, hidden), axis=-1)
        weights_BxHxTxS = jnp.where(visible_Bx1xTxS, weights_BxHxTxS, 0)
        return weights_BxHxTxS.astype(q_BxTxHxK.dtype)

    def _fused(self) -> bool:
        kernel = self.config.attention_kernel
        # On CPU it was 11 % slower than the plain product.
        if self.config.matmul_precision != "default":  # the fused product has no such choice
            return False
        return kernel == "fused" or (kernel == "auto" and jax.default_backend() == "gpu")

    def _fused_heads(self, q_BxTxHxK: Array, k_BxSxHxK: Array, v_BxSxHxK: Array, mask: Mask) -> Array:
        c = self.config
        # cuDNN's flash attention: half precision, heads of at most 128 in steps of 8, and here no bias. Else XLA's own.
        half = q_BxTxHxK.dtype in (jnp.bfloat16, jnp.float16) and c.positions != "alibi"
        flash = jax.default_backend() == "gpu" and half and c.head_width <= 128 and c.head_width % 8 == 0
        z_BxTxHxK = jax.nn.dot_product_attention(
            q_BxTxHxK,
            k_BxSxHxK,
            v_BxSxHxK,
            bias=alibi_HxTxT(c.n_heads, k_BxSxHxK.shape[1])[None] if c.positions == "alibi" else None,
            mask=None if mask.keys_BxS is None else mask.visible_BxTxS[:, None],  # cuDNN wants all of [B, 1, T, S]
            is_causal=c.causal,  # said apart from the mask, so that the kernel can leave out what is above the diagonal
            implementation="cudnn" if flash else "xla",
        )
        if mask.keys_BxS is None:
            return z_BxTxHxK
        return jnp.where(mask.visible_BxTxS.any(axis=-1)[..., None, None], z_BxTxHxK, 0)


class MLP(nnx.Module):
    """down(act(up x)), or for swiglu (Shazeer 2020) down(silu(gate x) * up x). GELU is GPT-2's tanh form."""

    def __init__(self, c: ModelConfig):
        self.kind = c.mlp
        self.up = _linear(c, c.d_model, c.mlp_width)
        self.gate = _linear(c, c.d_model, c.mlp_width) if c.mlp == "swiglu" else None
        self.down = _linear(c, c.mlp_width, c.d_model)

    def __call__(self, x_BxTxD: Array, tap: Tap) -> Array:
        if self.gate is not None:
            h_BxTxF = jax.nn.silu(tap("mlp.pre", self.gate(x_BxTxD))) * self.up(x_BxTxD)
        else:
            act = jax.nn.relu if self.kind == "relu" else jax.nn.gelu
            h_BxTxF = act(tap("mlp.pre", self.up(x_BxTxD)))
        return tap("mlp.out", self.down(tap("mlp.hidden", h_BxTxF)))


class Block(nnx.Module):
    """Attention and MLP around the residual stream, normed before (GPT-2), after (Vaswani 2017), or in parallel.

    Parallel has a norm for each branch, as GPT-NeoX; GPT-J's single norm is the case of equal ones.
    """

    def __init__(self, c: ModelConfig):
        self.placement = c.norm_placement
        self.attention_norm = _norm(c)
        self.attention = Attention(c)
        self.mlp_norm = _norm(c) if c.mlp != "none" else _identity
        self.mlp = MLP(c) if c.mlp != "none" else None

    def __call__(self, x_BxTxD: Array, mask: Mask, tap: Tap, tapped: Callable[[str], bool]) -> Array:
        def attend(x_BxTxD: Array) -> Array:
            return self.attention(x_BxTxD, mask, tap, tapped)

        def think(x_BxTxD: Array) -> Array:
            return self.mlp(x_BxTxD, tap) if self.mlp is not None else jnp.zeros_like(x_BxTxD)

        x_BxTxD = tap("residual", x_BxTxD)
        if self.placement == "parallel":
            return x_BxTxD + attend(self.attention_norm(x_BxTxD)) + think(self.mlp_norm(x_BxTxD))
        if self.placement == "post":
            x_BxTxD = tap("residual_mid", self.attention_norm(x_BxTxD + attend(x_BxTxD)))
            return self.mlp_norm(x_BxTxD + think(x_BxTxD))
        x_BxTxD = tap("residual_mid", x_BxTxD + attend(self.attention_norm(x_BxTxD)))
        return x_BxTxD + think(self.mlp_norm(x_BxTxD))


# --- the model -----------------------------------------------------------------------------------------------------


class Transformer(nnx.Module):
    """The whole model. `Transformer(config)` has all weights 0 and norm scales 1; `create(config, seed)` draws them."""

    def __init__(self, c: ModelConfig):
        self.config = c
        self.embed = _table(c, c.vocab_size) if c.d_input is None else None
        self.read_in = _linear(c, c.d_input, c.d_model) if c.d_input is not None else None
        self.position = _table(c, c.context) if c.positions == "learned" else None
        self.layers = _stack(Block(c), c.n_layers) if c.scan_layers else nnx.List([Block(c) for _ in range(c.n_layers)])
        self.final_norm = _identity if c.norm_placement == "post" else _norm(c)
        self.unembed = _linear(c, c.d_model, c.vocab_size) if c.d_output is None and not c.tie_output else None
        self.read_out = _linear(c, c.d_model, c.d_output) if c.d_output is not None else None

    def __call__(self, inputs: Array, key_mask_BxS: Array | None = None) -> Array:
        """Outputs [B, T, V] for token ids [B, T] or vectors [B, T, d_input], in the compute dtype.

        `key_mask_BxS`, bool: positions where it is False are seen by no query (padding, or the query token of an
        in-context regression). Raises BadInput for a sequence longer than a learned position table.
        """
        return self.inspect(inputs, key_mask_BxS)[0]

    def inspect(
        self,
        inputs: Array,
        key_mask_BxS: Array | None = None,
        *,
        keep: Iterable[str] = (),
        replace: Mapping[str, Replacement] | None = None,
    ) -> tuple[Array, dict[str, Array]]:
        """Outputs and the intermediates named in `keep`; those named in `replace` take the caller's value first.

        Names: see `intermediates`. A replacement is an array of the same shape, or a function of the value.
        What is not asked for is not computed: under jit it costs nothing. Raises BadInput for an unknown name.
        """
        c = self.config
        taps = _Taps(c, frozenset(keep), dict(replace or {}))
        kept: dict[str, Array] = {}
        x_BxTxD = taps.at("embedding", kept, self._embed(inputs))
        mask = Mask(self._visible(x_BxTxD, key_mask_BxS), key_mask_BxS)
        x_BxTxD = self._blocks(x_BxTxD, mask, taps, kept)
        x_BxTxD = taps.at("final", kept, self.final_norm(x_BxTxD))
        if self.read_out is not None:
            return self.read_out(x_BxTxD), kept
        if self.unembed is not None:
            return self.unembed(x_BxTxD), kept
        assert self.embed is not None, "ModelConfig ties the output only to a token embedding"
        table_VxD = self.embed.embedding[...].astype(x_BxTxD.dtype)
        return jnp.einsum("BTD,VD->BTV", x_BxTxD, table_VxD, precision=c.matmul_precision), kept

    def _embed(self, inputs: Array) -> Array:
        c, length = self.config, inputs.shape[1]
        (read,) = (layer for layer in (self.embed, self.read_in) if layer is not None)
        x_BxTxD = read(inputs)
        if self.position is not None:
            if length > c.context:
                raise BadInput(
                    f"a sequence of {length} positions is longer than model.context={c.context}, "
                    "the size of the learned position table"
                )
            x_BxTxD += self.position(jnp.arange(length))[None]
        if c.positions == "sinusoidal":
            x_BxTxD += sinusoidal_TxD(length, c.d_model).astype(x_BxTxD.dtype)[None]
        return x_BxTxD

    def _visible(self, x_BxTxD: Array, key_mask_BxS: Array | None) -> Array:
        """Which keys each query sees, [B or 1, T, S], bool."""
        batch, length, _ = x_BxTxD.shape
        visible_1xTxS = jnp.ones((1, length, length), bool)
        if self.config.causal:
            visible_1xTxS = jnp.tril(visible_1xTxS)
        if key_mask_BxS is None:
            return visible_1xTxS
        return jnp.broadcast_to(visible_1xTxS & key_mask_BxS[:, None, :], (batch, length, length))

    def _blocks(self, x_BxTxD: Array, mask: Mask, taps: _Taps, kept: dict[str, Array]) -> Array:
        c = self.config
        if not c.n_layers:
            return x_BxTxD

        def run(
            graphdef: nnx.GraphDef, index: int | Array, state: nnx.State, x_BxTxD: Array
        ) -> tuple[Array, dict[str, Array]]:
            seen: dict[str, Array] = {}
            block = nnx.merge(graphdef, state)
            tap = partial(taps.in_layer, index, seen)
            return block(x_BxTxD, mask, tap, taps.wants), seen

        def maybe_remat(function: Callable) -> Callable:
            return jax.checkpoint(function) if c.remat else function

        if c.scan_layers:
            graphdef, state = nnx.split(self.layers)
            run_layer = maybe_remat(partial(run, graphdef))
            layers = (jnp.arange(c.n_layers), state)
            x_BxTxD, seen = jax.lax.scan(lambda x, layer: run_layer(*layer, x), x_BxTxD, layers)
            seen = {f"layers.{i}.{name}": value_Lx[i] for name, value_Lx in seen.items() for i in range(c.n_layers)}
            kept |= {name: value for name, value in seen.items() if name in taps.keep}
            return x_BxTxD
        assert isinstance(self.layers, nnx.List)
        for i, block in enumerate(self.layers):
            # Each layer's own graph, so that a layer edited by hand (without its MLP, say) runs as it now is.
            graphdef, state = nnx.split(block)
            x_BxTxD, seen = maybe_remat(partial(run, graphdef, i))(state, x_BxTxD)
            kept |= {f"layers.{i}.{name}": value for name, value in seen.items()}
        return x_BxTxD


def _stack(block: Block, n_layers: int) -> Block:
    """One block whose every parameter has a leading axis of layers."""
    graphdef, state = nnx.split(block)
    return nnx.merge(graphdef, jax.tree.map(lambda p: jnp.broadcast_to(p, (n_layers, *p.shape)), state))


# --- looking inside ------------------------------------------------------------------------------------------------


def intermediates(c: ModelConfig) -> list[str]:
    """The names that `Transformer.inspect` knows for this config, in order of computation.

    embedding, final: [B, T, D]. In layers.i: residual and residual_mid (the stream before the block, and between
    attention and MLP), attention.out, mlp.out (what each adds): [B, T, D]; attention.pattern: [B, H, T, S];
    attention.heads (before the output matrix): [B, T, H, K]; mlp.pre (pre-activations; the gate's for swiglu) and
    mlp.hidden: [B, T, F].
    """
    layer = ["residual", "attention.pattern", "attention.heads", "attention.out"]
    if c.norm_placement != "parallel":
        layer.append("residual_mid")
    if c.mlp != "none":
        layer += ["mlp.pre", "mlp.hidden", "mlp.out"]
    return ["embedding", *(f"layers.{i}.{name}" for i in range(c.n_layers) for name in layer), "final"]


class _Taps:
    """What a caller wants to keep and to replace. Python at trace time only: nothing asked, nothing traced."""

    def __init__(self, c: ModelConfig, keep: frozenset[str], replace: Mapping[str, Replacement]):
        known = intermediates(c)
        for name in [*keep, *replace]:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                raise BadInput(
                    f"{name!r} is not an intermediate of this model"
                    f"{f'; did you mean {near[0]!r}?' if near else ''} (see jaxgpt.model.intermediates)"
                )
        self.keep, self.replace = keep, replace

    def wants(self, name: str) -> bool:
        """Whether any layer's value of this name is kept or replaced."""
        return any(full.endswith("." + name) for full in [*self.keep, *self.replace])

    def at(self, name: str, kept: dict[str, Array], value: Array) -> Array:
        """A value outside the layers."""
        if name in self.replace:
            value = _replaced(value, self.replace[name], name)
        if name in self.keep:
            kept[name] = value
        return value

    def in_layer(self, index: int | Array, seen: dict[str, Array], name: str, value: Array) -> Array:
        """A value inside a layer. A scanned layer's number is traced: there all layers compute, and one chooses."""
        scanned = not isinstance(index, int)
        for full, new in self.replace.items():
            layer, _, local = full.removeprefix("layers.").partition(".")
            if local == name and (scanned or int(layer) == index):
                value = (
                    jnp.where(index == int(layer), _replaced(value, new, full), value)
                    if scanned
                    else _replaced(value, new, full)
                )
        if any(full.endswith("." + name) for full in self.keep) if scanned else f"layers.{index}.{name}" in self.keep:
            seen[name] = value
        return value


def _replaced(value: Array, new: Replacement, name: str) -> Array:
    new = jnp.asarray(new(value) if callable(new) else new, value.dtype)
    if new.shape != value.shape:
        raise BadInput(f"the replacement of {name!r} has shape {new.shape}; it must be {value.shape}")
    return new


# --- initialisation ------------------------------------------------------------------------------------------------

# Standard deviation of the normal distribution that a parameter starts from, by the end of its name.
# fan_in is the number of rows of a matrix. Norm scales start at 1, biases at 0.
INIT_STD: dict[str, Callable[[ModelConfig, int], float]] = {
    # Order 1, as what the blocks add: from GPT-2's .02, which only a tied output needs (its logits would be of order
    # sqrt(D)), tokens hardly show in the stream at first, and a model of width 64 was .2 nats behind after 300 steps.
    "embed.embedding": lambda c, fan_in: 0.02 if c.tie_output else 1.0,
    "position.embedding": lambda c, fan_in: 0.02 if c.tie_output else 1.0,
    "read_in.kernel": lambda c, fan_in: fan_in**-0.5,
    "query.kernel": lambda c, fan_in: fan_in**-0.5,  # keeps the variance of its input (LeCun)
    "key.kernel": lambda c, fan_in: fan_in**-0.5,
    "value.kernel": lambda c, fan_in: fan_in**-0.5,
    "up.kernel": lambda c, fan_in: fan_in**-0.5,
    "gate.kernel": lambda c, fan_in: fan_in**-0.5,
    # What writes to the residual stream, so that 2 L such additions leave its variance at order 1 (GPT-2).
    "attention.out.kernel": lambda c, fan_in: fan_in**-0.5 * (2 * c.n_layers) ** -0.5,
    "down.kernel": lambda c, fan_in: fan_in**-0.5 * (2 * c.n_layers) ** -0.5,
    "unembed.kernel": lambda c, fan_in: 0.02,  # small logits: the first loss is close to ln V
    "read_out.kernel": lambda c, fan_in: fan_in**-0.5,
}


def init_params(c: ModelConfig, seed: int) -> nnx.State:
    """Initial parameters by INIT_STD, as the state that `nnx.merge(graphdef(c), params)` takes.

    Each tensor of each layer has its own stream, so a tensor's values depend on its name, shape and seed only, and a
    scanned model starts from the same values as an unrolled one. NumPy: JAX would compile as long as for a step.
    """

    def leaf(path: tuple, shape_dtype: jax.ShapeDtypeStruct) -> np.ndarray:
        name = param_name(path)
        if c.scan_layers and name.startswith("layers."):
            rest, shape = name.removeprefix("layers."), shape_dtype.shape[1:]
            drawn = [_draw(c, seed, f"layers.{i}.{rest}", shape) for i in range(c.n_layers)]
            return np.asarray(drawn, shape_dtype.dtype).reshape(shape_dtype.shape)
        return _draw(c, seed, name, shape_dtype.shape).astype(shape_dtype.dtype)

    return jax.tree_util.tree_map_with_path(leaf, _abstract(c)[1])


def param_name(path: tuple) -> str:
    """A parameter's dotted name from its pytree path: layers.0.attention.query.kernel."""
    # The last key is NNX's own: the `.value` of a variable.
    return ".".join(str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey))


def _draw(c: ModelConfig, seed: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name.endswith(".bias"):
        return np.zeros(shape)
    if name.endswith(".scale"):
        return np.ones(shape)
    (std,) = (rule(c, shape[0]) for end, rule in INIT_STD.items() if name.endswith(end))
    return std * np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(shape, np.float32)


@cache  # half a second for a deep model
def _abstract(c: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: Transformer(c)))


def graphdef(c: ModelConfig) -> nnx.GraphDef:
    """The model without its parameters: static, hashable; `nnx.merge(graphdef(c), params)` is the model again."""
    return _abstract(c)[0]


def create(c: ModelConfig, seed: int = 0) -> Transformer:
    """An initialised model."""
    return nnx.merge(graphdef(c), jax.tree.map(jnp.asarray, init_params(c, seed)))
