"""Recurrent baselines: an LSTM or a plain RNN in the transformer's place, with the same interface.

Embedding, then in each layer x + cell(norm(x)), a last norm, and the output: what is not the cell is the transformer's.
The cells are Flax's, of width d_model. Their LSTM is Hochreiter & Schmidhuber 1997 with the forget gate of Gers et al.
2000; their RNN is Elman 1990, h_t = tanh(W x_t + U h_t-1 + b). They always have their one bias, whatever `bias` says.
Fields of attention, MLP, positions and `norm_placement` do nothing here.

Letters as in model.py. A carry is what a layer hands from one position to the next: the LSTM's c and h, the RNN's h.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxgpt import parts
from jaxgpt.config import ModelConfig
from jaxgpt.model import Cache
from jaxgpt.taps import Replacement, Tap, Taps

Carry = Any  # an array [B, D], or a tuple of two


def _cell(c: ModelConfig) -> nnx.OptimizedLSTMCell | nnx.SimpleCell:
    kind = {"lstm": nnx.OptimizedLSTMCell, "rnn": nnx.SimpleCell}[c.architecture]
    zeros = nnx.initializers.zeros  # as everywhere, `build.init_params` gives the values
    cell = kind(
        c.d_model, c.d_model, kernel_init=zeros, recurrent_kernel_init=zeros, rngs=nnx.Rngs(0), **parts.dtypes(c)
    )
    cell.dense_i.precision = cell.dense_h.precision = c.matmul_precision
    return cell


class Layer(nnx.Module):
    """What a cell makes of the normed stream, position by position: cell(norm(x))."""

    def __init__(self, c: ModelConfig):
        self.architecture = c.architecture
        self.norm = parts.norm(c)
        self.cell = _cell(c)

    def __call__(
        self, x_BxTxD: Array, carry: Carry, passes_BxT: Array | None, opens_BxT: Array | None
    ) -> tuple[Array, Carry]:
        """What the layer adds to the stream, and the carry behind the last position.

        Where `opens_BxT` is true the carry starts anew; where `passes_BxT` is false it skips that position.
        """
        start = self.empty(x_BxTxD)

        def choose(condition_B: Array, yes: Carry, no: Carry) -> Carry:
            return jax.tree.map(lambda a, b: jnp.where(condition_B[:, None], a, b), yes, no)

        def step(carry: Carry, now: tuple[Array, Array | None, Array | None]) -> tuple[Carry, Array]:
            x_BxD, passes_B, opens_B = now
            carry = carry if opens_B is None else choose(opens_B, start, carry)
            after, h_BxD = self.cell(carry, x_BxD)
            return after if passes_B is None else choose(passes_B, after, carry), h_BxD

        # One product per position for input and state: taking the input's out of the loop was not faster on CPU, and
        # unrolling took longer to compile for the same speed.
        by_time = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), (self.norm(x_BxTxD), passes_BxT, opens_BxT))
        carry, h_TxBxD = jax.lax.scan(step, carry, by_time)
        return jnp.moveaxis(h_TxBxD, 0, 1).astype(x_BxTxD.dtype), carry

    def empty(self, x_BxTxD: Array) -> Carry:
        """The carry before the first position: zeros."""
        shape = (x_BxTxD.shape[0], x_BxTxD.shape[-1])
        if self.architecture == "rnn":
            return jnp.zeros(shape, x_BxTxD.dtype)
        # The LSTM's memory is a sum over all positions: bfloat16 has 8 bits for it.
        wide = jnp.promote_types(x_BxTxD.dtype, jnp.float32)
        return jnp.zeros(shape, wide), jnp.zeros(shape, wide)


class Recurrent(nnx.Module):
    """The whole model, all weights 0 and norm scales 1; `build.create(config, seed)` draws them."""

    def __init__(self, c: ModelConfig):
        self.config = c
        self.embed = parts.table(c, c.vocab_size) if c.d_input is None else None
        self.read_in = parts.linear(c, c.d_input, c.d_model) if c.d_input is not None else None
        self.layers = nnx.List([Layer(c) for _ in range(c.n_layers)])
        self.final_norm = parts.norm(c)
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

        `key_mask_BxS`, bool: a position where it is False reads those before it, and no later one reads it.
        `segment_BxT`, int: document numbers; the carry starts anew in each. `key`: of dropout (on the embedding and on
        what each layer adds); without one nothing is dropped.
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
        Raises BadInput for an unknown name.
        """
        taps = Taps(self.config, frozenset(keep), dict(replace or {}))
        opens_BxT = None
        if segment_BxT is not None:
            opens_BxT = jnp.pad(segment_BxT[:, 1:] != segment_BxT[:, :-1], ((0, 0), (1, 0)))
        kept: dict[str, Array] = {}
        return self._outputs(inputs, taps, kept, key, key_mask_BxS, opens_BxT, None)[0], kept

    def empty_cache(self, batch: int, length: int) -> Cache:
        """What decoding starts from. A carry has the same size for any length."""
        del length  # the transformer's cache needs it
        like_Bx1xD = jnp.zeros((batch, 1, self.config.d_model), jnp.dtype(parts.compute_dtype(self.config)))
        return Cache(jnp.zeros((), jnp.int32), [layer.empty(like_Bx1xD) for layer in self.layers])

    def decode(self, inputs: Array, cache: Cache) -> tuple[Array, Cache]:
        """Outputs [B, T, V] for the next T inputs behind those that the cache has seen, and the cache with them."""
        taps = Taps(self.config, frozenset(), {})
        outputs_BxTxV, carries = self._outputs(inputs, taps, {}, None, None, None, cache.layers)
        return outputs_BxTxV, Cache(cache.length + inputs.shape[1], carries)

    def _outputs(
        self,
        inputs: Array,
        taps: Taps,
        kept: dict[str, Array],
        key: Array | None,
        passes_BxT: Array | None,
        opens_BxT: Array | None,
        carries: list[Carry] | None,
    ) -> tuple[Array, list[Carry]]:
        c, after = self.config, []
        x_BxTxD = taps.at("embedding", kept, parts.read(self.embed, self.read_in, inputs))
        x_BxTxD = parts.dropout(x_BxTxD, c.dropout, key, c.n_layers)
        for i, layer in enumerate(self.layers):
            graphdef, state = nnx.split(layer)
            seen: dict[str, Array] = {}
            tap: Tap = partial(taps.in_layer, i, seen)
            x_BxTxD = tap("residual", x_BxTxD)
            carry = layer.empty(x_BxTxD) if carries is None else carries[i]
            run = partial(_run, graphdef)
            run = jax.checkpoint(run) if c.remat else run
            added_BxTxD, carry = run(state, x_BxTxD, carry, passes_BxT, opens_BxT)
            own_key = None if key is None else jax.random.fold_in(key, i)
            x_BxTxD += parts.dropout(tap("out", added_BxTxD), c.dropout, own_key, 0)
            after.append(carry)
            kept |= {f"layers.{i}.{name}": value for name, value in seen.items()}
        x_BxTxD = taps.at("final", kept, self.final_norm(x_BxTxD))
        return parts.write(c, self.embed, self.unembed, self.read_out, x_BxTxD), after


def _run(graphdef: nnx.GraphDef, state: nnx.State, *rest: Any) -> tuple[Array, Carry]:
    return nnx.merge(graphdef, state)(*rest)
