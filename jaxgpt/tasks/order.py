"""A question of order: letters, all different, then a question mark; is the first letter before the last one in the
alphabet?

Whoever knows which letters there are, and not where, is right in half of all cases, exactly: of each draw, every order
is as likely. The question mark says nothing, and the answer stands there, so that no letter is marked by being the one
that answers.

Letters: B batch, n letters, T = n + 1 tokens, W held-out words, V = A + 1 tokens: an alphabet of A, then the mark.
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

HELD_OUT = 2**32 - 1  # key of the held-out words


class Words(NamedTuple):
    """Words with their mark, and whether the first letter is below the last; int32."""

    token_BxT: Array
    answer_B: Array


def draw(key: Array, count: int, letters: int, alphabet: int) -> Words:
    """So many words of different letters, uniformly."""
    order_BxA = jnp.argsort(jax.random.uniform(key, (count, alphabet)), axis=1)
    letter_Bxn = order_BxA[:, :letters].astype(jnp.int32)
    token_BxT = jnp.pad(letter_Bxn, ((0, 0), (0, 1)), constant_values=alphabet)
    return Words(token_BxT, (letter_Bxn[:, 0] < letter_Bxn[:, -1]).astype(jnp.int32))


@dataclass(frozen=True)
class Order:
    """The task. Logits of tokens 0 and 1 at the mark are the answer's."""

    model: ModelConfig
    batch_size: int
    eval_words: int

    def init(self, seed: int) -> Any:
        """Initial parameters."""
        return build.init_params(self.model, seed)

    def sample(self, data: Any, key: Array, step: Array) -> Words:  # noqa: ARG002
        """A batch."""
        return self._draw(key, self.batch_size)

    def loss(self, params: Any, batch: Words, key: Array) -> Loss:  # noqa: ARG002
        """Cross-entropy of the answers in nats."""
        nats_B, _ = self.answered(params, batch)
        return Loss(nats_B.sum(), jnp.asarray(float(len(nats_B))))

    def evaluate(self, params: Any, data: Any) -> tuple[Array, Array]:  # noqa: ARG002
        """Of held-out words, the same in all runs: (cross-entropy in nats, whether the answer is right), [W] each."""
        return self.answered(params, self._draw(jax.random.key(HELD_OUT), self.eval_words))

    def summarise(self, held_out: Any) -> dict[str, float]:
        """validation_loss with its standard error, and validation_accuracy."""
        nats_W, right_W = (np.asarray(x, float) for x in held_out)
        return {
            "validation_loss": float(nats_W.mean()),
            "validation_loss_sem": float(nats_W.std(ddof=1) / len(nats_W) ** 0.5),
            "validation_accuracy": float(right_W.mean()),
        }

    def answered(self, params: Any, words: Words) -> tuple[Array, Array]:
        """(cross-entropy in nats, whether the likelier answer is right), [B] each."""
        logits_BxTxV = nnx.merge(build.graphdef(self.model), params)(words.token_BxT)
        logits_Bx2 = logits_BxTxV[:, -1, :2].astype(jnp.float32)
        nats_B = optax.softmax_cross_entropy_with_integer_labels(logits_Bx2, words.answer_B)
        return nats_B, logits_Bx2.argmax(axis=-1) == words.answer_B

    def _draw(self, key: Array, count: int) -> Words:
        return draw(key, count, self.model.context - 1, self.model.vocab_size - 1)


def source(config: RunConfig) -> Source:
    """What a run trains on: model.context - 1 letters of an alphabet of model.vocab_size - 1; train.eval_windows
    held-out words. Raises BadInput for what does not fit together.
    """
    c = config.model
    if c.context < 3:
        raise BadInput(f"model.context={c.context} is too short; two letters and a mark need at least 3")
    if c.vocab_size < c.context:
        raise BadInput(
            f"model.vocab_size={c.vocab_size} is too small; {c.context - 1} different letters and a mark need at least "
            f"{c.context}"
        )
    if c.d_input is not None or c.d_output is not None:
        raise BadInput("model.d_input and model.d_output are for vectors; words need both null")
    return Source(Order(c, config.train.batch_size, config.train.eval_windows), lambda: jnp.zeros(()),
                  "order of the first and the last letter, version 1")  # fmt: skip
