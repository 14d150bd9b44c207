"""Causal softmax attention in blocks of queries, for the CPU: what lies above the diagonal is not computed, and no
pattern is kept for the backward pass, which computes it again (Dao et al. 2022, FlashAttention, section 3.1).

At T 256 on CPU forward and backward took 0.65 of the plain product's time and a step's memory shrank by a third: there
XLA works through every [T, T] intermediate by itself, so that fewer and smaller ones count for more than arithmetic.

Letters as in model.py; N: batch times heads, Q: queries of a block.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array

SHORTEST = 64  # queries of a block; shorter ones gain nothing over what their number costs
MOST = 8  # blocks: each is compiled by itself


def blocks(length: int) -> int:
    """Into how many blocks so many queries are cut: equal ones."""
    return next(n for n in range(min(MOST, max(1, length // SHORTEST)), 0, -1) if length % n == 0)


def causal(q_BxTxHxK: Array, k_BxTxHxK: Array, v_BxTxHxK: Array, scale: float, precision: Any) -> Array:
    """softmax(scale q . k) v over the keys up to each query, [B, T, H, K]; the softmax in float32 or wider.

    Has no forward-mode derivative (jax.jvp, jax.linearize); gradients of gradients are fine.
    """
    return cast("Array", _causal(q_BxTxHxK, k_BxTxHxK, v_BxTxHxK, scale, precision))


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _causal(q_BxTxHxK: Array, k_BxTxHxK: Array, v_BxTxHxK: Array, scale: float, precision: Any) -> Array:
    return _forward(q_BxTxHxK, k_BxTxHxK, v_BxTxHxK, scale, precision)[0]


def _spans(length: int) -> list[tuple[slice, slice]]:
    """Each block's queries, and the keys that any of them sees."""
    size = length // blocks(length)
    return [(slice(end - size, end), slice(0, end)) for end in range(size, length + 1, size)]


def _scores(q_NxQxK: Array, k_NxSxK: Array, first: int, scale: float, precision: Any) -> Array:
    """[N, Q, S]; hidden ones -inf. `first`: the position of the first query."""
    scores_NxQxS = jnp.einsum("NQK,NSK->NQS", q_NxQxK, k_NxSxK, precision=precision)
    scores_NxQxS = scores_NxQxS.astype(jnp.promote_types(scores_NxQxS.dtype, jnp.float32)) * scale
    seen_QxS = jnp.arange(k_NxSxK.shape[1])[None] <= first + jnp.arange(q_NxQxK.shape[1])[:, None]
    return jnp.where(seen_QxS, scores_NxQxS, -jnp.inf)


def _rows(x_BxTxHxK: Array) -> Array:
    return rearrange(x_BxTxHxK, "B T H K -> (B H) T K")


def _heads(x_NxTxK: Array, n_heads: int) -> Array:
    return rearrange(x_NxTxK, "(B H) T K -> B T H K", H=n_heads)


def _forward(
    q_BxTxHxK: Array, k_BxTxHxK: Array, v_BxTxHxK: Array, scale: float, precision: Any
) -> tuple[Array, tuple[Array, ...]]:
    q_NxTxK, k_NxTxK, v_NxTxK = (_rows(x) for x in (q_BxTxHxK, k_BxTxHxK, v_BxTxHxK))
    outs, logs = [], []
    for queries, keys in _spans(q_NxTxK.shape[1]):
        scores_NxQxS = _scores(q_NxTxK[:, queries], k_NxTxK[:, keys], queries.start, scale, precision)
        # A query whose own scores are all -inf has only weights of 0, then: it reads nothing, least of all from later.
        highest_NxQ = jnp.maximum(scores_NxQxS.max(axis=-1), jnp.finfo(scores_NxQxS.dtype).min)
        weights_NxQxS = jnp.exp(scores_NxQxS - highest_NxQ[..., None])
        sum_NxQ = weights_NxQxS.sum(axis=-1)
        sum_NxQ = jnp.where(sum_NxQ > 0, sum_NxQ, 1)
        z_NxQxK = jnp.einsum("NQS,NSK->NQK", weights_NxQxS.astype(v_NxTxK.dtype), v_NxTxK[:, keys], precision=precision)
        outs.append((z_NxQxK / sum_NxQ[..., None]).astype(v_NxTxK.dtype))
        logs.append(highest_NxQ + jnp.log(sum_NxQ))
    z_NxTxK, log_NxT = jnp.concatenate(outs, axis=1), jnp.concatenate(logs, axis=1)
    return _heads(z_NxTxK, q_BxTxHxK.shape[2]), (q_NxTxK, k_NxTxK, v_NxTxK, z_NxTxK, log_NxT)


def _backward(scale: float, precision: Any, kept: tuple[Array, ...], dz_BxTxHxK: Array) -> tuple[Array, ...]:
    q_NxTxK, k_NxTxK, v_NxTxK, z_NxTxK, log_NxT = kept
    dz_NxTxK = _rows(dz_BxTxHxK)
    # What softmax's gradient takes from each score: the mean of the weights' gradients, sum_s p_s dp_s = dz . z.
    mean_NxT = (dz_NxTxK.astype(log_NxT.dtype) * z_NxTxK).sum(axis=-1)
    product = partial(jnp.einsum, precision=precision, preferred_element_type=log_NxT.dtype)
    dq, dk_NxTxK, dv_NxTxK = [], jnp.zeros(k_NxTxK.shape, log_NxT.dtype), jnp.zeros(v_NxTxK.shape, log_NxT.dtype)
    for queries, keys in _spans(q_NxTxK.shape[1]):
        q_NxQxK, dz_NxQxK = q_NxTxK[:, queries], dz_NxTxK[:, queries]
        scores_NxQxS = _scores(q_NxQxK, k_NxTxK[:, keys], queries.start, scale, precision)
        weights_NxQxS = jnp.exp(scores_NxQxS - log_NxT[:, queries, None])
        dweights_NxQxS = product("NQK,NSK->NQS", dz_NxQxK, v_NxTxK[:, keys])
        dscores_NxQxS = (scale * weights_NxQxS * (dweights_NxQxS - mean_NxT[:, queries, None])).astype(q_NxTxK.dtype)
        dv_NxTxK = dv_NxTxK.at[:, keys].add(product("NQS,NQK->NSK", weights_NxQxS.astype(q_NxTxK.dtype), dz_NxQxK))
        dk_NxTxK = dk_NxTxK.at[:, keys].add(product("NQS,NQK->NSK", dscores_NxQxS, q_NxQxK))
        dq.append(product("NQS,NSK->NQK", dscores_NxQxS, k_NxTxK[:, keys]))
    gradients = (jnp.concatenate(dq, axis=1), dk_NxTxK, dv_NxTxK)
    return tuple(_heads(d.astype(q_NxTxK.dtype), dz_BxTxHxK.shape[2]) for d in gradients)


_causal.defvjp(_forward, _backward)
