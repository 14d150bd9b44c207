"""Optimizers, their schedules, muP and a running mean of the parameters; optax, with numbers that may be traced.

Everything that can differ between runs of one compiled program comes in as `Hparams`, a pytree of scalars; what
changes the program (which optimizer, betas, epsilon, the kind of schedule) comes from `OptimizerConfig`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jaxgpt.build import param_name
from jaxgpt.config import OptimizerConfig, RunConfig

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
    """The traced numbers of a run: float32, int32 for counts, uint32 for the seed."""
    o, t = config.optimizer, config.train
    clip = np.inf if o.clip is None else o.clip
    data_seed = t.seed if t.data_seed is None else t.data_seed
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


def optimizer(
    config: OptimizerConfig, rate: Array | float, h: Hparams, width_ratio: float = 1.0
) -> optax.GradientTransformation:
    """Clip, the optimizer's direction, muP's factors, decoupled weight decay, times the rate.

    Weight decay is decoupled for every optimizer, SGD too (Loshchilov & Hutter 2019): it shrinks by rate x decay per
    step, and neither momentum nor Adam's division multiplies it. `width_ratio`: m of MUP, and of `ModelConfig`.
    """
    return optax.chain(
        optax.stateless(lambda gradient, _: clip_by_norm(gradient, h.clip)),
        _direction(config),
        optax.stateless(lambda update, _: scale_by_width(update, config.name, width_ratio)),
        # After the factors: 1 / (rate x decay) is over how many steps AdamW averages its updates (Wang & Aitchison
        # 2024), which has to do with the length of the training and not with the model's width.
        optax.add_decayed_weights(h.weight_decay, mask=decay_mask),
        optax.scale_by_learning_rate(rate),
    )


def _direction(config: OptimizerConfig) -> optax.GradientTransformation:
    """What is subtracted, before factors, decay and rate.

    - adamw: Adam (Kingma & Ba 2015).
    - sgd: the sum of past gradients, each weighted by momentum^age (Polyak 1964; no Nesterov, no dampening).
    - lion: the sign of a mean of gradient and momentum (Chen et al. 2023, algorithm 2).
    - muon (Jordan et al. 2024): the momentum of each hidden matrix, orthogonalised; Adam for all else.
    """
    adam = optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)
    if config.name == "sgd":
        return optax.trace(config.momentum)
    if config.name == "lion":
        return optax.scale_by_lion(config.beta1, config.beta2)
    if config.name == "muon":
        return optax.partition({"hidden": _orthogonal(config), "rest": adam}, _muon_labels)
    return adam


# --- Muon ----------------------------------------------------------------------------------------------------------

MUON_RMS = 0.2  # of an update's entries, about Adam's, so that one rate and decay serve both (Liu et al. 2025, eq. 4)


def _orthogonal(config: OptimizerConfig) -> optax.GradientTransformation:
    """Nesterov momentum of which each matrix is orthogonalised by itself, with entries of RMS MUON_RMS.

    Leading axes, of layers or experts, count matrices. Singular values come out near 1 (.7 to 1.2; smaller for
    directions that the gradient hardly has), so the RMS of [fan_in, fan_out] is near max(fan_in, fan_out)^-1/2.
    """
    each_matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    return optax.chain(
        optax.contrib.scale_by_muon(
            beta=config.momentum,
            weight_dimension_numbers=lambda updates: jax.tree.map(lambda _: each_matrix, updates),
        ),
        optax.stateless(lambda update, _: jax.tree.map(lambda u: MUON_RMS * max(u.shape[-2:]) ** 0.5 * u, update)),
    )


def _muon_labels(params: Any) -> Any:
    return _map_by_name(lambda name, p: "hidden" if kind(name) == "hidden" and p.ndim >= 2 else "rest", params)


# --- muP -----------------------------------------------------------------------------------------------------------

# By which power of m, the width over the base width, each update is multiplied (Yang et al. 2022, table 8, beside
# which the model divides logits by m and attention scores by the head width). m stands for every width that grows:
# d_model, d_mlp, n_heads x d_head. So that no activation's change grows or dies out with m:
#
# Entries of activations are of order 1. The gradient by an activation is of order 1/m, as the logits are divided by m.
# - hidden [m, m]: x dW sums m terms of one sign. Adam and Lion move entries by 1: 1/m. SGD moves them by the gradient,
#   x^T (gradient by the output) ~ 1/m: nothing left to do. Muon's update has entries of .2, all singular values equal:
#   its spectral norm is .2 max(fan_in, fan_out)^1/2 ~ m^1/2, and has to be ~ (fan_out / fan_in)^1/2 ~ 1 (Yang, Simon
#   & Bernstein 2023, condition 1): m^-1/2.
# - vector (tables, a tied one too, norms, biases, the read-in): no sum over m terms. Adam: 1. SGD: the gradient is
#   ~ 1/m: m.
# - output [m, V]: m terms, divided by m. Adam: 1. SGD: the gradient, x^T (gradient by the logits) / m, is ~ 1/m: m.
# - router [m, E]: m terms, not divided; the gradient is ~ 1 by entry: 1/m for all (their table 3, output weights).
# - fixed: nothing in it grows (biases of the output and the router), or a tensor that is not the transformer's.
# Adam's epsilon stays as it is: at 1e-8 it is far below gradients of order 1/m.
MUP: dict[str, dict[str, float]] = {
    "hidden": {"adamw": -1, "lion": -1, "sgd": 0, "muon": -0.5},
    "vector": {"adamw": 0, "lion": 0, "sgd": 1, "muon": 0},
    "output": {"adamw": 0, "lion": 0, "sgd": 1, "muon": 0},
    "router": {"adamw": -1, "lion": -1, "sgd": -1, "muon": -1},
    "fixed": {"adamw": 0, "lion": 0, "sgd": 0, "muon": 0},
}


def kind(name: str) -> str:
    """The row of MUP that a parameter of this name belongs to."""
    *_, owner, last = ["", "", *name.split(".")]
    if owner == "router" and last == "kernel":
        return "router"
    if owner in ("unembed", "read_out") and last == "kernel":
        return "output"
    if owner in ("router", "unembed", "read_out"):
        return "fixed"
    if last == "kernel" and name.startswith("layers."):
        return "hidden"
    return "vector" if last in ("embedding", "scale", "bias") or owner == "read_in" else "fixed"


def scale_by_width(update: Any, optimizer_name: str, width_ratio: float) -> Any:
    """The update with muP's factors (see MUP); unchanged where width_ratio is 1."""
    return _map_by_name(lambda name, u: u * width_ratio ** MUP[kind(name)][optimizer_name], update)


# --- parts ---------------------------------------------------------------------------------------------------------


def _map_by_name(function: Callable[[str, Any], Any], tree: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, leaf: function(param_name(path), leaf), tree)


def clip_by_norm(gradient: Any, limit: Array) -> Any:
    """The gradient scaled to a global norm of at most `limit`. (optax's own refuses bfloat16 with a traced limit.)"""
    norm = optax.tree.norm(gradient)
    scale = jnp.where(norm < limit, 1.0, limit / norm)
    return jax.tree.map(lambda g: (g * scale).astype(g.dtype), gradient)


def decay_mask(params: Any) -> Any:
    """True for the leaves that weight decay acts on (see DECAYED)."""
    return _map_by_name(lambda name, _: ("." + name).endswith(DECAYED), params)


# --- a running mean of the parameters ------------------------------------------------------------------------------


def ema_init(params: Any) -> Any:
    """The running mean before the first update: the parameters, in float32 or wider. In bfloat16 it would stand still:
    its 8 bits cannot hold a step of (1 - decay) times a small difference.
    """
    return jax.tree.map(lambda p: jnp.array(p, jnp.promote_types(p.dtype, jnp.float32)), params)


def ema_update(ema: Any, params: Any, decay: Array | float, step: Array | int) -> Any:
    """The running mean after update number `step` (from 0), which gave `params`; dtypes of `ema`.

    The decay warms up, min(decay, (1 + step) / (10 + step)) (TensorFlow's ExponentialMovingAverage with num_updates):
    it is always a weighted mean of parameters that were there, and the initial ones' weight falls with the ninth power
    of time. Without it a decay of .999 would leave them e^-1 of the mean after 1000 steps.
    """
    kept = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda e, p: e + (1 - kept).astype(e.dtype) * (p.astype(e.dtype) - e), ema, params)
