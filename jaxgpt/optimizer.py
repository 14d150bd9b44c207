"""AdamW and its schedules, as optax transformations whose numbers may be traced.

Everything that can differ between runs of one compiled program comes in as `Hparams`, a pytree of scalars; what
changes the program (betas, epsilon, the kind of schedule) comes from `OptimizerConfig`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jaxgpt.config import BadInput, OptimizerConfig, RunConfig
from jaxgpt.build import param_name

# Weight decay acts on what ends in this: the matrices that multiply activations. Embedding and position tables, norm
# scales and biases are not decayed: a row of a table is moved only when its token occurs, but would shrink every step.
DECAYED = ".kernel"


class Hparams(NamedTuple):
    """What may differ between runs that share a compiled program; all scalars."""

    learning_rate: Array  # peak
    weight_decay: Array
    clip: Array  # largest global gradient norm; inf: no clipping
    warmup_steps: Array
    steps: Array  # end of the schedule
    decay_fraction: Array
    final_fraction: Array
    data_seed: Array


def hparams(config: RunConfig) -> Hparams:
    """The traced numbers of a run: float32, int32 for counts, uint32 for the seed. Raises BadInput for a larger one."""
    o, t = config.optimizer, config.train
    clip = np.inf if o.clip is None else o.clip
    name, data_seed = ("seed", t.seed) if t.data_seed is None else ("data_seed", t.data_seed)
    if data_seed >= 2**32:
        raise BadInput(f"train.{name}={data_seed} is not allowed; it must be below 2^32 = {2**32}")
    values = {
        "learning_rate": np.float32(o.learning_rate),
        "weight_decay": np.float32(o.weight_decay),
        "clip": np.float32(clip),
        "warmup_steps": np.int32(config.warmup_steps),
        "steps": np.int32(t.steps),
        "decay_fraction": np.float32(o.decay_fraction),
        "final_fraction": np.float32(o.final_fraction),
        "data_seed": np.uint32(data_seed),
    }
    return Hparams(**values)


def learning_rate(schedule: str, step: Array, h: Hparams) -> Array:
    """The rate of update number `step` (from 0), float32: linear warm-up, then the schedule's shape.

    Warm-up reaches the peak at update `warmup_steps - 1`; cosine, linear and wsd reach `final_fraction` of the peak
    at the last update. wsd (warm-up, stable, decay; Hu et al. 2024, Hägele et al. 2024) stays at the peak until the
    last `decay_fraction` of the run and then falls linearly.
    """
    done = (step + 1).astype(jnp.float32)
    warm = jnp.minimum(done / jnp.maximum(h.warmup_steps, 1), 1.0)
    # Counted from the end: a start in the middle would be rounded, and the last update would miss its exact rate.
    length = h.decay_fraction * h.steps if schedule == "wsd" else (h.steps - h.warmup_steps).astype(jnp.float32)
    tiny = jnp.finfo(jnp.float32).tiny  # a warm-up as long as the run has nothing after it, and ends at the peak
    progress = jnp.clip((length - (h.steps - done)) / jnp.maximum(length, tiny), 0.0, 1.0)
    shape = {
        "cosine": 0.5 * (1 + jnp.cos(jnp.pi * progress)),
        "linear": 1 - progress,
        "wsd": 1 - progress,
        "constant": jnp.ones_like(progress),
    }[schedule]
    return h.learning_rate * warm * (h.final_fraction + (1 - h.final_fraction) * shape)


def optimizer(config: OptimizerConfig, rate: Array | float, h: Hparams) -> optax.GradientTransformation:
    """Clip, Adam, decoupled weight decay times the rate (Loshchilov & Hutter 2019, as PyTorch's AdamW)."""
    return optax.chain(
        optax.stateless(lambda gradient, _: clip_by_norm(gradient, h.clip)),
        optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),
        optax.add_decayed_weights(h.weight_decay, mask=decay_mask),
        optax.scale_by_learning_rate(rate),
    )


def clip_by_norm(gradient: Any, limit: Array) -> Any:
    """The gradient scaled to a global norm of at most `limit`. (optax's own refuses bfloat16 with a traced limit.)"""
    norm = optax.tree.norm(gradient)
    scale = jnp.where(norm < limit, 1.0, limit / norm)
    return jax.tree.map(lambda g: (g * scale).astype(g.dtype), gradient)


def decay_mask(params: Any) -> Any:
    """True for the leaves that weight decay acts on (see DECAYED)."""
    return jax.tree_util.tree_map_with_path(lambda path, _: ("." + param_name(path)).endswith(DECAYED), params)
