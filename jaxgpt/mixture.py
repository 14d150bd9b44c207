"""A mixture of experts in place of the MLP: a router sends each token through k of E MLPs.

Token-choice routing without capacity (dropless): what comes out for a token depends on that token alone, so that
causality holds and cached decoding equals the full pass. Shazeer et al. 2017; Jiang et al. 2024 (Mixtral).

Letters as in model.py: E experts, N tokens of the batch. Assignments are the N k pairs of a token and its expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange, reduce, repeat
from flax import nnx
from jax import Array

from jaxgpt import parts
from jaxgpt.config import ModelConfig
from jaxgpt.parallel import each_group
from jaxgpt.taps import Tap


class Blocks(NamedTuple):
    """Rows for the assignments, sorted by expert: `count` blocks of `size` rows; a block has one expert's tokens."""

    count: int
    size: int


def blocks(c: ModelConfig, n_tokens: int) -> Blocks:
    """As many blocks as any routing of that many tokens can need: the last block of each expert may be part empty.

    Smaller blocks leave fewer rows empty, but every block takes a copy of its expert's weights. A size of at most the
    mean load N k / E keeps the rows below about twice the assignments, and one of about d_model keeps the copies
    at the size of the hidden activations.
    """
    assert c.n_experts is not None, "a mixture has experts"
    assignments = n_tokens * c.experts_per_token
    size = 1
    while 2 * size <= min(c.d_model, assignments // c.n_experts):
        size *= 2
    begun = min(c.n_experts, assignments)  # experts that can have a part-empty block
    return Blocks((assignments + begun * (size - 1)) // size, size)


class Experts(nnx.Module):
    """One linear map per expert: weights [E, d_in, d_out] and, if the config has biases, [E, d_out]."""

    def __init__(self, c: ModelConfig, d_in: int, d_out: int):
        assert c.n_experts is not None, "a mixture has experts"
        dtypes = parts.dtypes(c)
        self.dtype, self.precision = dtypes["dtype"], c.matmul_precision
        self.kernel = nnx.Param(jnp.zeros((c.n_experts, d_in, d_out), dtypes["param_dtype"]))
        self.bias = nnx.Param(jnp.zeros((c.n_experts, d_out), dtypes["param_dtype"])) if c.bias else None

    def __call__(self, x_NxRxI: Array, expert_N: Array) -> Array:
        """Blocks of R rows, each through its own expert."""
        kernel_NxIxO = self.kernel[...].astype(self.dtype)[expert_N]
        y_NxRxO = jnp.einsum("NRI,NIO->NRO", x_NxRxI.astype(self.dtype), kernel_NxIxO, precision=self.precision)
        return y_NxRxO if self.bias is None else y_NxRxO + self.bias[...].astype(self.dtype)[expert_N][:, None]


class Mixture(nnx.Module):
    """sum_e w_e MLP_e(x) over the k experts of largest probability; w is their probabilities, scaled to sum to 1.

    With one expert per token the weight is its probability itself (Fedus et al. 2021, eq. 2): scaled it would always
    be 1, and the router would learn nothing from the loss.

    Only what is chosen is computed, up to rows left empty: see `blocks`. On 2 CPU cores, forward and backward of 1024
    tokens at D = 64, F = 256, E = 8, k = 2 (float32, gelu) took 4 ms with 64 rows per block; 9 ms as a loop over
    experts that each see all tokens, 40 ms as one product over all experts, and 29 ms by jax.lax.ragged_dot, which JAX
    0.10 lowers on CPU to all experts, masked (47 MiB of scratch space against 16). One MLP on k times the tokens
    takes 3 ms.
    """

    def __init__(self, c: ModelConfig):
        assert c.n_experts is not None, "a mixture has experts"
        self.config = c
        dtypes = parts.dtypes(c)
        # In float32 or wider: in bfloat16 near ties would be decided by rounding (Fedus et al. 2021, section 2.4).
        wide = jnp.promote_types(dtypes["dtype"], jnp.float32)
        self.router = nnx.Linear(
            c.d_model,
            c.n_experts,
            use_bias=False,
            precision="highest",
            rngs=parts.NO_KEYS,
            kernel_init=nnx.initializers.zeros,
            dtype=wide,
            param_dtype=dtypes["param_dtype"],
        )
        self.up = Experts(c, c.d_model, c.mlp_width)
        self.gate = Experts(c, c.d_model, c.mlp_width) if c.mlp == "swiglu" else None
        self.down = Experts(c, c.mlp_width, c.d_model)

    def __call__(self, x_BxTxD: Array, tap: Tap) -> Array:
        """What the mixture adds to the stream."""
        c = self.config
        p_BxTxE = tap("mlp.router", jax.nn.softmax(self.router(x_BxTxD), axis=-1))
        weight_BxTxk, expert_BxTxk = jax.lax.top_k(p_BxTxE, c.experts_per_token)
        if c.experts_per_token > 1:
            weight_BxTxk /= weight_BxTxk.sum(axis=-1, keepdims=True)
        return tap("mlp.out", each_group(self._sum_of_chosen, x_BxTxD, weight_BxTxk, expert_BxTxk))

    def _sum_of_chosen(self, x_BxTxD: Array, weight_BxTxk: Array, expert_BxTxk: Array) -> Array:
        c = self.config
        row_A, owner_N, shape = self._places(rearrange(expert_BxTxk, "B T k -> (B T k)"))
        x_AxD = repeat(x_BxTxD, "B T D -> (B T k) D", k=c.experts_per_token)
        rows_RxD = jnp.zeros((shape.count * shape.size, c.d_model), x_AxD.dtype)
        rows_RxD = rows_RxD.at[row_A].set(x_AxD, unique_indices=True, mode="promise_in_bounds")
        y_NxRxD = self._mlp(rearrange(rows_RxD, "(N R) D -> N R D", R=shape.size), owner_N)
        y_RxD = rearrange(y_NxRxD, "N R D -> (N R) D")
        y_AxD = y_RxD.at[row_A].get(unique_indices=True, mode="promise_in_bounds")
        y_AxD *= rearrange(weight_BxTxk, "B T k -> (B T k) 1").astype(y_AxD.dtype)
        batch, length, _ = x_BxTxD.shape
        return reduce(y_AxD, "(B T k) D -> B T D", "sum", B=batch, T=length)

    def _places(self, expert_A: Array) -> tuple[Array, Array, Blocks]:
        """Each assignment's row, each block's expert, and the blocks."""
        c = self.config
        assert c.n_experts is not None, "a mixture has experts"
        shape = blocks(c, len(expert_A) // c.experts_per_token)
        order_A = jnp.argsort(expert_A)
        load_E = jnp.zeros(c.n_experts, jnp.int32).at[expert_A].add(1)
        blocks_E = -(-load_E // shape.size)
        end_E = jnp.cumsum(blocks_E)
        # From the place among all sorted assignments to that among the rows: past the empty rows of earlier experts.
        skipped_E = (end_E - blocks_E) * shape.size - (jnp.cumsum(load_E) - load_E)
        sorted_A = jnp.arange(len(expert_A)) + skipped_E[expert_A[order_A]]
        row_A = jnp.zeros_like(sorted_A).at[order_A].set(sorted_A, unique_indices=True)
        owner_N = jnp.searchsorted(end_E, jnp.arange(shape.count), side="right")
        return row_A, jnp.minimum(owner_N, c.n_experts - 1), shape  # blocks behind the last are empty: any expert

    def _mlp(self, x_NxRxD: Array, owner_N: Array) -> Array:
        act = parts.activation(self.config.mlp)
        h_NxRxF = self.up(x_NxRxD, owner_N)
        h_NxRxF = act(h_NxRxF) if self.gate is None else act(self.gate(x_NxRxD, owner_N)) * h_NxRxF
        return self.down(h_NxRxF, owner_N)


# --- how evenly the tokens spread ----------------------------------------------------------------------------------


def router_names(c: ModelConfig) -> list[str]:
    """The intermediates that `statistics` needs: the router's probabilities in each layer; none without experts."""
    mixed = c.n_experts is not None and c.architecture == "transformer"
    return [f"layers.{i}.mlp.router" for i in range(c.n_layers)] if mixed else []


def statistics(c: ModelConfig, seen: Mapping[str, Array]) -> dict[str, Array]:
    """Scalars, means over the layers, from the intermediates named by `router_names`, each [B, T, E]. float32.
    Of a model with at least one of them.

    With f_e the share of the assignments that expert e got and P_e its mean probability over all tokens:
    load_balance: E sum_e f_e P_e, the loss of Fedus et al. 2021, eq. 4, without its weight: 1 when balanced, E / k at
    worst. They add it up over layers; the mean is L times smaller, and means the same at any depth. Its gradient flows
    through P alone, as f counts.
    router_entropy: the mean over tokens of the entropy of a token's probabilities, in nats: ln E when undecided.
    expert_load_max: E max_e f_e: how many times the balanced load the busiest expert has.
    experts_idle: share of the experts that got no token.
    """
    assert c.n_experts is not None, "a mixture has experts"
    p_LxNxE = jnp.stack([rearrange(seen[name], "B T E -> (B T) E") for name in router_names(c)])
    chosen_LxNxk = jax.lax.top_k(p_LxNxE, c.experts_per_token)[1]
    got_LxNxkxE = jax.nn.one_hot(chosen_LxNxk, c.n_experts, dtype=p_LxNxE.dtype)
    f_LxE = reduce(got_LxNxkxE, "L N k E -> L E", "mean")
    p_LxE = reduce(p_LxNxE, "L N E -> L E", "mean")
    return {
        "load_balance": c.n_experts * (f_LxE * p_LxE).sum(axis=-1).mean(),
        "router_entropy": jax.scipy.special.entr(p_LxNxE).sum(axis=-1).mean(),
        "expert_load_max": c.n_experts * f_LxE.max(axis=-1).mean(),
        "experts_idle": (f_LxE == 0).mean(dtype=p_LxE.dtype),
    }
