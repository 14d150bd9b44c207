"""What a step does with numbers that float32, or float16, cannot hold: guard, clipping, loss scales, rounded weights.

Letters as in model.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from jaxgpt.config import RunConfig, override

if TYPE_CHECKING:
    import numpy
    from flax import nnx
    from jax import Array

    from jaxgpt.step import Loss, Program, Task, TrainState

WARM = 8  # good steps before anything is looked at, in which Adam's moments come to their size
# What the loss of one batch is multiplied by. 1e34 leaves loss and gradient finite in float32, but not the squares in
# the gradient's norm, nor in Adam's second moment.
SPIKES = {"NaN": math.nan, "inf": math.inf, "1e34": 1e34}
SPOILT = "layers.0.mlp.up.kernel"  # of which a gradient's entry is
LIMIT = 5  # bad updates in a row that apply_if_finite is told to ignore
SCALES = (0, 8, 16)  # log2 of loss scales; 16 is where dynamic ones usually begin


@dataclass(frozen=True)
class Spiked:
    """A task of which each batch says by how much its loss is multiplied: (batch, factor)."""

    task: Task

    def loss(self, params: Any, batch: tuple[Any, Array], key: Array) -> Loss:
        """The task's, times the factor."""
        loss = self.task.loss(params, batch[0], key)
        return loss._replace(total=loss.total * batch[1])


def at_the_end(config: RunConfig) -> RunConfig:
    """The run's config with the rate that its schedule ends at, from the first step on."""
    o = config.optimizer
    return override(config, {"optimizer.schedule": "constant", "optimizer.warmup_steps": 0,
                             "optimizer.learning_rate": o.learning_rate * o.final_fraction})  # fmt: skip


def bits(tree: Any) -> list[bytes]:
    """Of every array, so that NaNs and signed zeros count as what they are."""
    import jax
    import numpy as np

    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


class Stepped:
    """Single steps of a run from given parameters: `jaxgpt.step.train_step`, compiled."""

    def __init__(self, config: RunConfig, params: nnx.State):
        import jax

        from jaxgpt import step
        from jaxgpt.optimizer import hparams
        from jaxgpt.tasks import text

        source, config = text.reader()(config), at_the_end(config)
        self.h, self.data, self.task = hparams(config), source.data(), source.task
        self.program: Program = step.program(config, Spiked(source.task))  # pyright: ignore[reportArgumentType]
        self.sample = jax.jit(source.task.sample)
        self.compiled = jax.jit(step.train_step, static_argnums=0)
        self.first = step.first_state(self.program, self.h, params)
        self.key_of = partial(step.data_key, self.h)

    def batch(self, state: TrainState) -> Any:
        """The batch that this state's step sees."""
        return self.sample(self.data, self.key_of(state.step, state.retry), state.step)

    def go(self, state: TrainState, factor: float = 1.0) -> tuple[TrainState, dict[str, Any]]:
        """One step, with the loss times this factor."""
        import jax.numpy as jnp

        key = self.key_of(state.step, state.retry)
        return self.compiled(self.program, state, (self.batch(state), jnp.float32(factor)), key, self.h)


def warmed(steps: Stepped) -> tuple[TrainState, TrainState]:
    """The states before and after the last of WARM good steps."""
    before = after = steps.first
    for _ in range(WARM):
        before, after = after, steps.go(after)[0]
    return before, after


def guarded(steps: Stepped, state: TrainState) -> dict[str, dict[str, float]]:
    """By spike: the share of arrays (parameters, moments) that are bit-identical behind it, whether the gradient's norm
    was finite, and the share of arrays that the next, good step changes.
    """
    told = {}
    for word, factor in SPIKES.items():
        behind, metrics = steps.go(state, factor)
        later, _ = steps.go(behind)
        kept = [a == b for a, b in zip(bits(_moved(state)), bits(_moved(behind)), strict=True)]
        on = [a != b for a, b in zip(bits(behind.params), bits(later.params), strict=True)]
        told[word] = {"identical": sum(kept) / len(kept), "moves on": sum(on) / len(on),
                      "norm finite": math.isfinite(metrics["grad_norm"])}  # fmt: skip
    return told


def _moved(state: TrainState) -> Any:
    return state.params, state.opt_state


# --- without the guard -----------------------------------------------------------------------------------------------


def spoilt(gradient: Any, name: str, value: float) -> Any:
    """A gradient with this value at the first entry of the array of this name."""
    import jax

    from jaxgpt.build import param_name

    def leaf(path: tuple, g: Array) -> Array:
        return g.at[(0,) * g.ndim].set(value) if param_name(path) == name else g

    return jax.tree_util.tree_map_with_path(leaf, gradient)


def flat(tree: Any) -> numpy.ndarray:
    """All numbers of a tree of arrays, one behind the other."""
    import jax
    import numpy as np

    return np.concatenate([np.asarray(leaf).reshape(-1) for leaf in jax.tree.leaves(tree)])


def clipped(gradient: Any, params: Any, value: float) -> tuple[dict[str, float], Any]:
    """One entry of a real gradient spoilt, then clipped by its global norm, by optax: how many entries are NaN, and the
    share of the others that is not 0. And the parameters after clipping and one step of Adam, without a guard.
    """
    import numpy as np

    clip, step = _without_guard()
    bad = spoilt(gradient, SPOILT, value)
    out, new = flat(clip(bad)), step(bad, params)
    numbers = out[~np.isnan(out)]
    told = {"nan": int(np.isnan(out).sum()), "nan share": float(np.isnan(out).mean()),
            "others not 0": float((numbers != 0).mean()) if len(numbers) else math.nan,
            "parameters nan": float(np.isnan(flat(new)).mean())}  # fmt: skip
    return told, new


@cache
def _without_guard() -> tuple[Any, Any]:
    """(clips a gradient, parameters after clipping and a step of Adam), compiled."""
    import jax
    import optax

    clip = optax.clip_by_global_norm(1.0)
    chain = optax.chain(clip, optax.adam(1e-3))

    def step(gradient: Any, params: Any) -> Any:
        return optax.apply_updates(params, chain.update(gradient, chain.init(params), params)[0])

    return jax.jit(lambda gradient: clip.update(gradient, clip.init(gradient))[0]), jax.jit(step)


def gives_up(gradient: numpy.ndarray) -> int:
    """How many times in a row a gradient, spoilt by one NaN, has to come until optax.apply_if_finite, told to ignore
    LIMIT, lets it in; 0: ten times as many were not enough.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    bad = jnp.asarray(gradient).reshape(-1).at[0].set(math.nan)
    guard = optax.apply_if_finite(optax.adam(1e-3), LIMIT)
    state, update = guard.init(bad), jax.jit(guard.update)
    for n in range(1, 10 * LIMIT):
        updates, state = update(bad, state)
        if np.isnan(updates).any():
            return n
    return 0


# --- half precision --------------------------------------------------------------------------------------------------


def gradients(steps: Stepped, state: TrainState) -> tuple[Any, numpy.ndarray]:
    """Of one batch's mean loss, float32: by the parameters, and by the stream before every block, [L, B, T, D]."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from flax import nnx

    from jaxgpt import build

    model = steps.task.model  # pyright: ignore[reportAttributeAccessIssue]
    window_BxT1 = jnp.asarray(steps.batch(state), jnp.int32)

    def mean(params: nnx.State, push_LxBxTxD: Array) -> Array:
        push = {f"layers.{i}.residual": lambda x, i=i: x + push_LxBxTxD[i] for i in range(model.n_layers)}
        logits = nnx.merge(build.graphdef(model), params).inspect(window_BxT1[:, :-1], replace=push)[0]
        return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), window_BxT1[:, 1:]).mean()

    batch, length = window_BxT1.shape
    nothing = jnp.zeros((model.n_layers, batch, length - 1, model.d_model), jnp.float32)
    by_params, by_stream = jax.jit(jax.grad(mean, argnums=(0, 1)))(state.params, nothing)
    return by_params, np.asarray(by_stream)


def lost_in_half(x: numpy.ndarray, log2_scale: int) -> tuple[float, float]:
    """Shares of the non-zero entries that float16 makes 0, and that it makes infinite, behind this loss scale."""
    import numpy as np

    there = np.asarray(x, np.float32).reshape(-1)
    there = there[there != 0]
    with np.errstate(over="ignore"):
        half = (there * np.float32(2.0**log2_scale)).astype(np.float16)
    return float((half == 0).mean()), float(np.isinf(half).mean())


def lost_updates(before: Any, after: Any, dtype: str) -> float:
    """The share of a step's non-zero float32 updates that change nothing when weights are kept in this dtype."""
    import jax.numpy as jnp
    import numpy as np

    old, new = flat(before), flat(after)
    update = new - old
    kept = np.asarray(jnp.asarray(old, dtype))
    moved = np.asarray(jnp.asarray(kept.astype(np.float32) + update, dtype))
    return float((moved == kept)[update != 0].mean())
