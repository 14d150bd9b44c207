"""One symbol to hold: it comes, then noise for so many steps, then a question mark, and the answer is the symbol.

A sequence is noise throughout but for one symbol and the mark at its end. The lag is the number of positions from the
symbol to the mark; it is drawn for each sequence, uniformly from the shortest to the longest. With a shortest one of 1
the short lags, which are easy, come first in learning and can carry the long ones. All sequences are equally long.
Symbols and noise are different tokens: there is no doubt what to hold, only whether it is still there (the latching
problem of Bengio et al. 1994).

Letters: B batch, T = longest lag + 1 tokens, W held-out sequences of each lag, L lags; V = S + N + 1 tokens: symbols,
then noise, then the mark.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from jaxgpt import build
from jaxgpt.config import BadInput, ModelConfig, RunConfig
from jaxgpt.run import Source
from jaxgpt.step import Loss

HELD_OUT = 2**32 - 1  # key of the held-out sequences


class Sequences(NamedTuple):
    """Tokens, and the symbol that each sequence holds; int32."""

    token_BxT: Array
    symbol_B: Array


def draw(key: Array, lag_B: Array, length: int, symbols: int, noise: int) -> Sequences:
    """Sequences of so many tokens with their symbol `lag` positions before the mark at the end."""
    symbol_key, noise_key = jax.random.split(key)
    batch = len(lag_B)
    symbol_B = jax.random.randint(symbol_key, (batch,), 0, symbols)
    token_BxT = jax.random.randint(noise_key, (batch, length), symbols, symbols + noise)
    token_BxT = token_BxT.at[:, -1].set(symbols + noise)
    return Sequences(token_BxT.at[jnp.arange(batch), length - 1 - lag_B].set(symbol_B), symbol_B)


@dataclass(frozen=True)
class Latch:
    """The task. lags: those that are measured, apart from each other. The number `shortest` is that of training."""

    model: ModelConfig
    symbols: int
    lags: tuple[int, ...]
    batch_size: int
    eval_sequences: int

    def init(self, seed: int) -> Any:
        """Initial parameters."""
        return build.init_params(self.model, seed)

    def sample(self, data: Any, key: Array, step: Array) -> Sequences:  # noqa: ARG002
        """A batch, each sequence with a lag of its own."""
        lag_key, key = jax.random.split(key)
        shortest = data[1]["shortest"].astype(jnp.int32)
        return self.drawn(key, jax.random.randint(lag_key, (self.batch_size,), shortest, self.model.context))

    def drawn(self, key: Array, lag_B: Array) -> Sequences:
        """Sequences of these lags."""
        return draw(key, lag_B, self.model.context, self.symbols, self.model.vocab_size - self.symbols - 1)

    def loss(self, params: Any, batch: Sequences, key: Array) -> Loss:  # noqa: ARG002
        """Cross-entropy of the answers in nats."""
        nats_B, _ = self.answered(params, batch)
        return Loss(nats_B.sum(), jnp.asarray(float(len(nats_B))))

    def evaluate(self, params: Any, data: Any) -> tuple[Array, Array]:  # noqa: ARG002
        """Of held-out sequences, the same in all runs: (cross-entropy, whether the answer is right), [L, W] each."""
        keys_L = jax.random.split(jax.random.key(HELD_OUT), len(self.lags))

        def one(its: tuple[Array, Array]) -> tuple[Array, Array]:
            key, lag = its
            return self.answered(params, self.drawn(key, jnp.full(self.eval_sequences, lag)))

        return jax.lax.map(one, (keys_L, jnp.asarray(self.lags)))

    def summarise(self, held_out: Any) -> dict[str, float]:
        """validation_loss: mean over the lags, with its standard error over sequences. validation_recall_n: share of
        right answers at lag n.
        """
        nats_LxW, right_LxW = (np.asarray(x, float) for x in held_out)
        sem = (nats_LxW.var(axis=1, ddof=1) / nats_LxW.shape[1]).sum() ** 0.5 / len(self.lags)
        return {"validation_loss": float(nats_LxW.mean()), "validation_loss_sem": float(sem)} | {
            f"validation_recall_{n}": float(right) for n, right in zip(self.lags, right_LxW.mean(axis=1), strict=True)
        }

    def answered(self, params: Any, batch: Sequences) -> tuple[Array, Array]:
        """(cross-entropy in nats, whether the likeliest symbol is right), [B] each."""
        logits_BxTxV = nnx.merge(build.graphdef(self.model), params)(batch.token_BxT)
        logits_BxS = logits_BxTxV[:, -1, : self.symbols].astype(jnp.float32)
        nats_B = optax.softmax_cross_entropy_with_integer_labels(logits_BxS, batch.symbol_B)
        return nats_B, logits_BxS.argmax(axis=-1) == batch.symbol_B


def source(config: RunConfig, symbols: int, lags: tuple[int, ...], shortest: int = 1) -> Source:
    """What a run trains on: lags from `shortest` to model.context - 1, measured at `lags`, with train.eval_windows
    sequences each. Raises BadInput for what does not fit together.
    """
    c = config.model
    if not 2 <= symbols <= c.vocab_size - 2:
        raise BadInput(f"symbols={symbols} is not allowed; it must be from 2 to model.vocab_size - 2 = "
                       f"{c.vocab_size - 2}: noise and the mark are tokens too")  # fmt: skip
    for lag in (shortest, *lags):
        if not 1 <= lag < c.context:
            raise BadInput(f"a lag of {lag} is not allowed; it must be from 1 to model.context - 1 = {c.context - 1}")
    if c.d_input is not None or c.d_output is not None or not c.causal:
        raise BadInput("sequences need token ids, logits and a model that reads from left to right: leave "
                       "model.d_input and model.d_output null and model.causal true")  # fmt: skip
    task = Latch(c, symbols, tuple(lags), config.train.batch_size, config.train.eval_windows)
    name = f"a symbol to hold, version 1, {symbols} symbols, lags {tuple(lags)}"
    return Source(task, lambda: jnp.zeros(()), name, numbers={"shortest": shortest})
