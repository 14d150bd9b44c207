"""Where norms stand in a block: the three right placements, from the library, and two formulas that are often printed.

    post       y = LN(x + Attn(x)),  then LN(y + FFN(y))           Vaswani et al. 2017
    pre        y = x + Attn(LN x),   then y + FFN(LN y)            GPT-2
    parallel   x + Attn(LN x) + FFN(LN' x)                         GPT-J, GPT-NeoX
    sum        LN(x + Attn(x) + FFN(x))                            printed as the Transformer's layer; it is not
    branch     x + LN(Attn(x) + FFN(x))                            printed as the parallel block; it is not

All have the same weights; the last two leave the second norm of a block unused. Those whose stream is not normed at
its end (pre, parallel, branch) have one more norm before the logits.

It stands here and not in a group, whose modules `jaxgpt list` imports: this one imports JAX when it is imported.

Letters as in model.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from jaxgpt import build, parts
from jaxgpt.config import ModelConfig, RunConfig
from jaxgpt.model import Block, View
from jaxgpt.run import Source
from jaxgpt.step import Loss
from jaxgpt.tasks.text import HeldOut, TextTask

STANDS_FOR = {"sum": "post", "branch": "pre"}  # which library model has the parts of each printed formula


def config_of(c: ModelConfig, placement: str) -> ModelConfig:
    """The library's config with this placement's parts, its layers stacked."""
    return replace(c, norm_placement=STANDS_FOR.get(placement, placement), scan_layers=True)


def init_params(c: ModelConfig, seed: int) -> nnx.State:
    """Initial parameters that keep variance, as Xiong et al.'s do: not GPT-2's, whose blocks add 1 / sqrt(2 L)."""
    return write_scaled(build.init_params(c, seed), (2 * c.n_layers) ** 0.5)


def write_scaled(params: nnx.State, factor: Array | float) -> nnx.State:
    """Parameters whose matrices that write to the stream are multiplied by a factor."""

    def leaf(path: tuple, value: Any) -> Any:
        writes = build.param_name(path).endswith(("attention.out.kernel", "mlp.down.kernel"))
        return value * factor if writes else value

    return jax.tree_util.tree_map_with_path(leaf, params)


def outputs(c: ModelConfig, placement: str, params: nnx.State, token_BxT: Array, depth: Array | int) -> Array:
    """Logits [B, T, V] of the first `depth` layers, which may be traced; c: of `config_of`."""
    model = nnx.merge(build.graphdef(c), params)
    place_T = jnp.arange(token_BxT.shape[1])
    view = View((place_T[None, None, :] <= place_T[None, :, None]), place_T, place_T, masked=False)
    graphdef, state_L = nnx.split(model.layers)

    def layer(x_BxTxD: Array, each: tuple[Array, nnx.State]) -> tuple[Array, None]:
        index, state = each
        return jnp.where(index < depth, after(placement, nnx.merge(graphdef, state), x_BxTxD, view), x_BxTxD), None

    x_BxTxD, _ = jax.lax.scan(layer, model.embed(token_BxT), (jnp.arange(c.n_layers), state_L))
    return parts.write(c, model.embed, model.unembed, model.read_out, model.final_norm(x_BxTxD))


def after(placement: str, block: Block, x_BxTxD: Array, view: View) -> Array:
    """The stream after a block; the right placements are the library's own."""

    def tap(_: str, value: Array) -> Array:
        return value

    if placement not in STANDS_FOR:
        return block(x_BxTxD, view, tap)[0]
    assert block.mlp is not None
    added_BxTxD = block.attention(x_BxTxD, view, tap)[0] + block.mlp(x_BxTxD, tap)
    if placement == "sum":
        return block.attention_norm(x_BxTxD + added_BxTxD)
    return x_BxTxD + block.attention_norm(added_BxTxD)


@dataclass(frozen=True)
class Placed:
    """The task: text, by a model of any placement. Data, batches and the summary are those of `text`."""

    placement: str
    text: TextTask

    def init(self, seed: int) -> Any:
        """Initial parameters, which keep variance."""
        return init_params(self.text.model, seed)

    def sample(self, data: Any, key: Array, step: Array) -> Array:
        """A batch of windows [B, T + 1]."""
        return self.text.sample(data, key, step)

    def nats(self, params: Any, window_BxT1: Array) -> Array:
        """Cross-entropy [B, T] of each next token."""
        window_BxT1, c = window_BxT1.astype(jnp.int32), self.text.model
        logits_BxTxV = outputs(c, self.placement, params, window_BxT1[:, :-1], c.n_layers)
        return optax.softmax_cross_entropy_with_integer_labels(logits_BxTxV.astype(jnp.float32), window_BxT1[:, 1:])

    def loss(self, params: Any, batch: Array, key: Array) -> Loss:  # noqa: ARG002
        """Summed cross-entropy of windows."""
        nats_BxT = self.nats(params, batch)
        return Loss(nats_BxT.sum(), jnp.asarray(nats_BxT.size, nats_BxT.dtype))

    def evaluate(self, params: Any, data: Any) -> HeldOut:
        """The loss of each validation window."""
        return HeldOut(self.nats(params, data.validation_WxT1).mean(axis=1), data.bytes_W)

    def summarise(self, held_out: HeldOut) -> dict[str, float]:
        """Validation loss."""
        return self.text.summarise(held_out)


def source(config: RunConfig, placement: str, of_text: Source) -> Source:
    """What a run trains on: the text of `of_text`, by a model of this placement."""
    assert isinstance(of_text.task, TextTask)
    task = Placed(placement, replace(of_text.task, model=config_of(config.model, placement)))
    return replace(of_text, task=task, identity=f"{of_text.identity}, norms {placement}, version 1")


def unigram_loss(train_n: Array, window_WxT1: Array) -> float:
    """Loss of the predictor that knows how often each token occurs, on the tokens that windows ask for; nats."""
    tokens_n, target_n = np.asarray(train_n), np.asarray(window_WxT1)[:, 1:].reshape(-1)
    count_V = np.bincount(tokens_n, minlength=int(target_n.max()) + 1) + 1.0  # none is impossible
    return float(-np.log(count_V / count_V.sum())[target_n].mean())


def gradient_norms(
    c: ModelConfig, placement: str, params: nnx.State, window_BxT1: Array, depth: Array, factor: Array | float
) -> tuple[Array, Array]:
    """Frobenius norms [L] of the loss's gradient by each layer's second MLP matrix, 0 behind `depth`; and the logits.

    factor: what matrices that write to the stream are multiplied by first (the gradient is by what they are then).
    """

    def loss(params: nnx.State) -> tuple[Array, Array]:
        logits_BxTxV = outputs(c, placement, params, window_BxT1[:, :-1], depth)
        nats_BxT = optax.softmax_cross_entropy_with_integer_labels(logits_BxTxV, window_BxT1[:, 1:])
        return nats_BxT.mean(), logits_BxTxV

    gradient, logits_BxTxV = jax.grad(loss, has_aux=True)(write_scaled(params, factor))
    (down_LxFxD,) = (
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradient)
        if build.param_name(path).endswith("mlp.down.kernel")
    )
    return jnp.sqrt((down_LxFxD**2).sum(axis=(1, 2))), logits_BxTxV
