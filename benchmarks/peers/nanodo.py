"""nanodo's published design in Flax Linen, as a stand-in: google-deepmind/nanodo, model.py, train.py, optimizer.py.

Written from its architecture, not copied; read at commits 51573e9985183cac4f9875a10a0f1bfa3e5bb211 (model),
db1d750d7a699fc45eaadf3aaa944b13b0ae3921 (training step), 061bb9ea9e35371ccf95274ce6c6a0c7eb8d4121 (loss) and
413e7819a6063a1cf0373b5f38f0ce98e97318d8 (optimizer): learned positions, pre-norm blocks with scales only, three maps to
heads by DenseGeneral, plain softmax attention in float32, tanh GELU, no biases, logits by the embedding; Xavier-uniform
matrices and tables of variance 1 / D. One jitted step per batch from the host, its state donated, the metrics of step
t read after step t + 1 is dispatched. Its data pipeline and its sharding are left out: there is one device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training.train_state import TrainState
from jax import Array


class Block(nn.Module):
    """Attention and MLP, each behind a norm and added to the stream."""

    n_heads: int

    @nn.compact
    def __call__(self, x_BxTxD: Array) -> Array:
        """The stream after this block."""
        width, length = x_BxTxD.shape[-1], x_BxTxD.shape[1]
        head = width // self.n_heads
        xavier = nn.initializers.xavier_uniform()
        y_BxTxD = nn.LayerNorm(use_bias=False)(x_BxTxD)
        to_heads = partial(nn.DenseGeneral, (self.n_heads, head), use_bias=False, kernel_init=xavier)
        q_BxTxHxK, k_BxSxHxK, v_BxSxHxK = (to_heads(name=name)(y_BxTxD) for name in ("query", "key", "value"))
        scores_BxHxTxS = jnp.einsum("BTHK,BSHK->BHTS", q_BxTxHxK / head**0.5, k_BxSxHxK).astype(jnp.float32)
        visible_TxS = jnp.tril(jnp.ones((length, length), bool))
        pattern_BxHxTxS = jax.nn.softmax(jnp.where(visible_TxS, scores_BxHxTxS, jnp.finfo(jnp.float32).min), axis=-1)
        z_BxTxHxK = jnp.einsum("BHTS,BSHK->BTHK", pattern_BxHxTxS, v_BxSxHxK)
        out = nn.DenseGeneral(width, axis=(-2, -1), use_bias=False, kernel_init=xavier, name="out")
        x_BxTxD = x_BxTxD + out(z_BxTxHxK)
        dense = partial(nn.Dense, use_bias=False, kernel_init=xavier)
        h_BxTxF = jax.nn.gelu(dense(4 * width)(nn.LayerNorm(use_bias=False)(x_BxTxD)))
        return x_BxTxD + dense(width)(h_BxTxF)


class Decoder(nn.Module):
    """The whole model: logits [B, T, V] of tokens [B, T]."""

    d_model: int
    n_layers: int
    n_heads: int
    context: int
    vocab_size: int

    @nn.compact
    def __call__(self, token_BxT: Array) -> Array:
        """The logits, in float32."""
        rows = nn.initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0)
        embed = nn.Embed(self.vocab_size, self.d_model, embedding_init=rows)
        position = nn.Embed(self.context, self.d_model, embedding_init=rows)
        x_BxTxD = embed(token_BxT) + position(jnp.arange(token_BxT.shape[1])[None])
        for _ in range(self.n_layers):
            x_BxTxD = Block(self.n_heads)(x_BxTxD)
        return embed.attend(nn.LayerNorm(use_bias=False)(x_BxTxD))


def _loss(apply: Callable[..., Array], params: Any, window_BxT1: Array) -> Array:
    """Mean cross-entropy of windows of T + 1 tokens, nats."""
    logits_BxTxV = apply({"params": params}, window_BxT1[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits_BxTxV, window_BxT1[:, 1:]).mean()


@partial(jax.jit, donate_argnums=0)
def _step(state: TrainState, window_BxT1: Array) -> tuple[TrainState, dict[str, Array]]:
    loss, gradient = jax.value_and_grad(partial(_loss, state.apply_fn))(state.params, window_BxT1)
    metrics = {"loss": loss, "gradient_norm": optax.tree.norm(gradient)}
    return state.apply_gradients(grads=gradient), metrics


@dataclass
class Trainer:
    """A model in training; `steps(n)` does n updates and returns the last one's loss."""

    state: TrainState
    draw: Callable[[], np.ndarray]

    def steps(self, n: int) -> float:
        """Dispatches each step before it reads the metrics of the one before."""
        before, loss = None, float("nan")
        for _ in range(n):
            self.state, now = _step(self.state, self.draw())
            if before is not None:
                loss = float(before["loss"])
            before = now
        return loss if before is None else float(before["loss"])

    def held_out(self, window_WxT1: np.ndarray) -> float:
        """Mean loss of windows of T + 1 tokens."""
        loss = jax.jit(partial(_loss, self.state.apply_fn))
        parts = [window_WxT1[i : i + 16].astype(np.int32) for i in range(0, len(window_WxT1), 16)]
        return float(np.average([loss(self.state.params, part) for part in parts], weights=[len(p) for p in parts]))


def trainer(
    sizes: dict[str, int],
    train_n: np.ndarray,
    *,
    batch_size: int,
    learning_rate: float,
    warmup_steps: int = 0,
    weight_decay: float = 0.1,
    seed: int = 0,
) -> Trainer:
    """A fresh model and its batches, drawn uniformly on the host; linear warm-up, then a constant rate.

    sizes: the fields of Decoder.
    """
    model, random = Decoder(**sizes), np.random.default_rng(seed)
    rate = optax.linear_schedule(learning_rate / max(1, warmup_steps), learning_rate, max(1, warmup_steps - 1))
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=weight_decay)
    )
    params = jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, sizes["context"]), jnp.int32))["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=optimizer)
    length = sizes["context"] + 1

    def draw() -> np.ndarray:
        start_B = random.integers(0, len(train_n) - length + 1, batch_size)
        return train_n[start_B[:, None] + np.arange(length)].astype(np.int32)

    return Trainer(state, draw)
