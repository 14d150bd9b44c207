"""Language modelling on a corpus of bytes that lives on the device; a step samples its windows by key."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from jaxgpt import build, corpus, parts
from jaxgpt.config import BadInput, ModelConfig, RunConfig
from jaxgpt.corpus import Corpus
from jaxgpt.train import Source

BYTE_VALUES = 256


def reader() -> Callable[[RunConfig], Source]:
    """Tells what a run trains on: next-byte prediction on its `data.corpus`. Each corpus is read once per reader."""
    load = cache(corpus.load)
    said = cache(logging.getLogger("jaxgpt").warning)  # once for each corpus, not once for each run

    def source(config: RunConfig) -> Source:
        """Raises BadInput for a corpus or a model that does not do."""
        text = load(config.data.corpus, config.data.validation_fraction, config.model.context)
        if text.skipped and config.data.corpus != "stdlib":
            said(f"data.corpus={config.data.corpus}: {text.skipped}")
        task = TextTask(config.model, config.train.batch_size, config.train.eval_windows)
        return Source(task, partial(task.data, text), text.sha256)

    return source


class TextData(NamedTuple):
    """What a step and an evaluation read."""

    train_n: Array  # uint8
    validation_WxT1: Array  # uint8, windows of T + 1 tokens that do not overlap


@dataclass(frozen=True)
class TextTask:
    """Next-byte prediction. Frozen and hashable, so that one compiled program serves all runs with an equal task."""

    model: ModelConfig
    batch_size: int
    eval_windows: int

    def __post_init__(self) -> None:
        if not self.model.causal:
            raise BadInput("model.causal=false would see the bytes it has to predict; text needs model.causal=true")
        if self.model.d_input is not None or self.model.d_output is not None:
            raise BadInput("model.d_input and model.d_output are for vectors; text needs both null")
        if self.model.vocab_size < BYTE_VALUES:
            raise BadInput(
                f"model.vocab_size={self.model.vocab_size} is too small for bytes; it must be at least {BYTE_VALUES}"
            )
        parts.dtypes(self.model)  # refuses float64 where JAX runs without x64; `graphdef` would ask only once

    def data(self, text: Corpus) -> TextData:
        """The corpus on the device. Validation windows stand evenly over the held-out text and do not overlap."""
        length = self.model.context + 1
        if len(text.train) > np.iinfo(np.int32).max:
            raise BadInput(
                f"data.corpus={text.name} has {len(text.train):,} bytes; a corpus on the device has at most 2^31 - 1"
            )
        windows = min(self.eval_windows, len(text.validation) // length)
        starts_W = np.linspace(0, len(text.validation) - length, windows).astype(np.int64)
        return TextData(jnp.asarray(text.train), jnp.asarray(text.validation[starts_W[:, None] + np.arange(length)]))

    def init(self, seed: int) -> nnx.State:
        """Initial parameters."""
        return build.init_params(self.model, seed)

    def sample(self, data: TextData, key: Array) -> Array:
        """A batch of windows, [B, T + 1] int32, uniformly from all positions of the training text."""
        length = self.model.context + 1
        start_B = jax.random.randint(key, (self.batch_size,), 0, data.train_n.shape[0] - length + 1)
        return data.train_n[start_B[:, None] + jnp.arange(length)].astype(jnp.int32)

    def loss(self, params: nnx.State, batch: Array, key: Array) -> tuple[Array, Array]:
        """Summed cross-entropy in nats of windows [B, T + 1], and how many tokens were predicted. float32 or wider."""
        loss_BxT = self._losses(params, batch)
        return loss_BxT.sum(), jnp.asarray(loss_BxT.size, loss_BxT.dtype)

    def evaluate(self, params: nnx.State, data: TextData) -> Array:
        """Mean loss of each validation window, [W], nats per token."""
        # A batch at a time, so that evaluation needs no more memory than training.
        return jax.lax.map(
            lambda window_T1: self._losses(params, window_T1[None]).mean(),
            data.validation_WxT1.astype(jnp.int32),
            batch_size=self.batch_size,
        )

    def summarise(self, loss_W: np.ndarray) -> dict[str, float]:
        """Validation loss in nats per token and bits per byte, with its standard error over windows."""
        mean, n = float(np.mean(loss_W)), len(loss_W)
        sem = float(np.std(loss_W, ddof=1) / math.sqrt(n)) if n > 1 else math.nan
        return {
            "validation_loss": mean,
            "validation_loss_sem": sem,
            "validation_bits_per_byte": mean / math.log(2),
        }

    def _losses(self, params: Any, window_BxT1: Array) -> Array:
        logits_BxTxV = nnx.merge(build.graphdef(self.model), params)(window_BxT1[:, :-1])
        logits_BxTxV = logits_BxTxV.astype(jnp.promote_types(logits_BxTxV.dtype, jnp.float32))
        return optax.softmax_cross_entropy_with_integer_labels(logits_BxTxV, window_BxT1[:, 1:])
