"""Text for models whose positions are a table that the caller gives, added to the embedded tokens.

The model has no positions of its own (model.positions=none); the table is added where Transformer adds the sinusoidal
one. All else is the task on text: windows, order of the data, losses.

Letters as in model.py; W validation windows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from jaxgpt import build
from jaxgpt.config import BadInput
from jaxgpt.run import Source
from jaxgpt.step import Loss
from jaxgpt.tasks.text import TextTask


@dataclass(frozen=True)
class Placed:
    """The task on text with a table of positions. Its data are those of the text and the table [T, D]."""

    unit: ClassVar[str] = "nats/token"
    text: TextTask

    def init(self, seed: int) -> Any:
        """Initial parameters."""
        return self.text.init(seed)

    def sample(self, data: Any, key: Array, step: Array) -> Any:
        """A batch of windows [B, T + 1], and the table with each of them [B, T, D]."""
        window_BxT1 = self.text.sample(data[0], key, step)
        return window_BxT1, jnp.broadcast_to(data[1], (len(window_BxT1), *data[1].shape))

    def nats(self, params: Any, window_BxT1: Array, table_BxTxD: Array) -> Array:
        """Cross-entropy of the next tokens, [B, T]."""
        token_BxT1 = window_BxT1.astype(jnp.int32)
        net = nnx.merge(build.graphdef(self.text.model), params)
        put = {"embedding": lambda x_BxTxD: x_BxTxD + table_BxTxD.astype(x_BxTxD.dtype)}
        logits_BxTxV = net.inspect(token_BxT1[:, :-1], replace=put)[0].astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits_BxTxV, token_BxT1[:, 1:])

    def loss(self, params: Any, batch: Any, key: Array) -> Loss:  # noqa: ARG002
        """Summed cross-entropy in nats."""
        nats_BxT = self.nats(params, *batch)
        return Loss(nats_BxT.sum(), jnp.asarray(float(nats_BxT.size)))

    def evaluate(self, params: Any, data: Any) -> Array:
        """Mean loss of each validation window, [W]."""
        text, table_TxD = data

        def one(window_T1: Array) -> Array:
            return self.nats(params, window_T1[None], table_TxD[None]).mean()

        return jax.lax.map(one, text.validation_WxT1, batch_size=self.text.batch_size)

    def summarise(self, held_out: Any) -> dict[str, float]:
        """Validation loss in nats per token with its standard error over windows."""
        return {"validation_loss": float(held_out.mean()),
                "validation_loss_sem": float(held_out.std(ddof=1) / len(held_out) ** 0.5)}  # fmt: skip


def source(of_text: Source, table_TxD: np.ndarray, name: str) -> Source:
    """What a run of such a model trains on: `of_text` with this table, which `name` says in the run's id. Raises
    BadInput where they do not fit together.
    """
    task: Any = of_text.task
    c = task.model
    if table_TxD.shape != (c.context, c.d_model):
        raise BadInput(f"the table of positions has shape {table_TxD.shape}; it must be (model.context, model.d_model) "
                       f"= {(c.context, c.d_model)}")  # fmt: skip
    if c.architecture != "transformer" or c.positions != "none":
        raise BadInput(f"model.architecture={c.architecture} with model.positions={c.positions} has positions of its "
                       "own; a table needs transformer and none")  # fmt: skip

    def data() -> Any:
        return of_text.data(), jnp.asarray(table_TxD, jnp.float32)

    return Source(Placed(task), data, f"{of_text.identity} with positions {name}, version 1")
