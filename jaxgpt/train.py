"""One training step, many steps in one dispatch, and one run from its first step or its last checkpoint to its row.

A run's result depends on its config and corpus only: not on how many steps are dispatched at once, on when it was
interrupted, or on how often something is logged.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jaxgpt import checkpoint, flops, store
from jaxgpt.config import OptimizerConfig, RunConfig, TrainConfig, flatten, run_id, to_dict
from jaxgpt.optimizer import Hparams, hparams, learning_rate, optimizer

CHUNK = 128  # most steps in one dispatch: the length of the metrics buffer
SECONDS_PER_DISPATCH = 0.5  # how long Ctrl-C may have to wait


class Task(Protocol):
    """What is learnt. A frozen, hashable dataclass: equal tasks share a compiled program."""

    def init(self, seed: int) -> Any:
        """Initial parameters, any pytree of arrays."""
        ...

    def sample(self, data: Any, key: Array) -> Any:
        """A batch, a pytree with a leading batch axis; pure."""
        ...

    def loss(self, params: Any, batch: Any) -> tuple[Array, Array]:
        """Summed loss and total weight (tokens) of a batch or a part of one; pure."""
        ...

    def evaluate(self, params: Any, data: Any) -> Array:
        """Held-out losses, one per independent unit; pure."""
        ...

    def summarise(self, loss_W: np.ndarray) -> dict[str, float]:
        """Named numbers from `evaluate`'s, among them validation_loss; on the host."""
        ...


@dataclass(frozen=True)
class Program:
    """What a compiled program depends on; runs with equal programs share it."""

    task: Task
    optimizer: OptimizerConfig
    microbatches: int
    max_bad_steps: int


class TrainState(NamedTuple):
    """Everything that the next step depends on, beside the run's `Hparams` and data."""

    params: Any
    opt_state: Any
    step: Array  # int32: updates tried so far
    retry: Array  # int32: roll-backs so far; enters the data's key
    bad_in_a_row: Array  # int32: non-finite steps just before this one
    bad_steps: Array  # int32: non-finite steps so far


def program(config: RunConfig, task: Task) -> Program:
    """The program of a run: what `Hparams` carries is set to its default, so that it does not split programs."""
    o, default = config.optimizer, OptimizerConfig()
    shared = OptimizerConfig(schedule=o.schedule, beta1=o.beta1, beta2=o.beta2, epsilon=o.epsilon,
                             learning_rate=default.learning_rate)
    return Program(task, shared, config.train.microbatches, config.train.max_bad_steps)


def init_state(program: Program, h: Hparams, seed: int) -> TrainState:
    """The state before the first step."""
    params = jax.tree.map(jnp.asarray, program.task.init(seed))
    zero = jnp.zeros((), jnp.int32)
    # jit: one dispatch for all moments instead of two for each tensor.
    opt_state = jax.jit(optimizer(program.optimizer, 0.0, h).init)(params)
    return TrainState(params, opt_state, zero, zero, zero, zero)


def mean_loss_and_gradient(task: Task, params: Any, batch: Any, microbatches: int) -> tuple[Array, Any]:
    """Loss per token of a batch and its gradient, computed in parts, each weighted by its tokens.

    The sum over parts is divided by all tokens at the end: equal parts and unequal ones give what one large batch
    gives, to rounding.
    """
    def summed(params: Any, part: Any) -> tuple[Array, Array]:
        return task.loss(params, part)

    grad = jax.value_and_grad(summed, has_aux=True)
    if microbatches == 1:
        (total, weight), gradient = grad(params, batch)
    else:
        parts = jax.tree.map(lambda x: x.reshape(microbatches, -1, *x.shape[1:]), batch)
        first = jax.eval_shape(grad, params, jax.tree.map(lambda x: x[0], parts))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)
        add = partial(jax.tree.map, jnp.add)
        ((total, weight), gradient), _ = jax.lax.scan(lambda s, part: (add(s, grad(params, part)), None), zeros, parts)
    return total / weight, jax.tree.map(lambda g: g / weight.astype(g.dtype), gradient)


def train_step(program: Program, state: TrainState, batch: Any, h: Hparams) -> tuple[TrainState, dict[str, Array]]:
    """One update; pure. A non-finite loss or gradient leaves parameters and optimizer state as they were, bit for bit,
    while `step` advances. The guard stands before clipping, which would turn one inf into NaNs everywhere.
    """
    loss, gradient = mean_loss_and_gradient(program.task, state.params, batch, program.microbatches)
    norm = optax.global_norm(gradient)
    ok = jnp.isfinite(loss) & jnp.isfinite(norm)
    rate = learning_rate(program.optimizer.schedule, state.step, h)
    updates, opt_state = optimizer(program.optimizer, rate, h).update(gradient, state.opt_state, state.params)
    new = (optax.apply_updates(state.params, updates), opt_state)
    params, opt_state = jax.tree.map(partial(jnp.where, ok), new, (state.params, state.opt_state))
    bad = (~ok).astype(jnp.int32)
    state = TrainState(params, opt_state, state.step + 1, state.retry, bad * (state.bad_in_a_row + 1), state.bad_steps + bad)
    return state, {"train_loss": loss, "grad_norm": norm, "learning_rate": rate}


def data_key(h: Hparams, step: Array, retry: Array) -> Array:
    """The key of a step's batch: a function of (data seed, step, retry), so that resume is exact."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(h.data_seed), retry), step)


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def advance(program: Program, state: TrainState, n: Array, h: Hparams, data: Any) -> tuple[TrainState, dict[str, Array]]:
    """Up to n <= CHUNK steps in one dispatch, fewer if `max_bad_steps` bad ones come in a row; metrics are [CHUNK].

    n is traced, so that one compiled program serves every number of steps.
    """
    def step(carry: tuple) -> tuple:
        i, state, metrics = carry
        batch = program.task.sample(data, data_key(h, state.step, state.retry))
        state, new = train_step(program, state, batch, h)
        return i + 1, state, jax.tree.map(lambda all, one: all.at[i].set(one.astype(jnp.float32)), metrics, new)

    def more(carry: tuple) -> Array:
        i, state, _ = carry
        return (i < n) & (state.bad_in_a_row < program.max_bad_steps)

    metrics = {name: jnp.full(CHUNK, jnp.nan, jnp.float32) for name in ("train_loss", "grad_norm", "learning_rate")}
    return jax.lax.while_loop(more, step, (0, state, metrics))[1:]


@partial(jax.jit, static_argnums=0)
def evaluate(task: Task, params: Any, data: Any) -> Array:
    """Held-out losses, compiled."""
    return task.evaluate(params, data)


# --- a run ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Progress:
    """Where a run stands, for whoever shows it."""

    run_id: str
    step: int
    steps: int
    tokens_per_second: float  # of the last dispatch; nan while compiling
    train_loss: float
    note: str = ""


class Stopped(Exception):
    """The run was asked to stop; its state is on disk."""


@dataclass(frozen=True)
class Run:
    """A run and where it lives: its config, its task and data on the device, the sweep's folder."""

    config: RunConfig
    task: Task
    data: Any
    corpus_sha256: str
    folder: Path

    @property
    def id(self) -> str:
        """The run's id."""
        return run_id(self.config, self.corpus_sha256)

    @property
    def checkpoints(self) -> Path:
        """Folder of the run's checkpoints."""
        return self.folder / "checkpoints" / self.id


def train(run: Run, *, stop: Callable[[], bool] = lambda: False, held: Callable[[], bool] = lambda: True,
          report: Callable[[Progress], None] = lambda progress: None) -> dict[str, Any]:
    """Trains a run to its end, from its last checkpoint if there is one, and returns its row (also written).

    `stop()` is asked between dispatches; when true the state is saved and Stopped raised. `held()` false (another
    process took the run over) raises Stopped without writing. Raises StoreError when the disk is full.
    """
    t, began = run.config.train, time.monotonic()
    h, prog = hparams(run.config), program(run.config, run.task)
    say = partial(_say, report, run)
    state, seconds_before = _resume(run, prog, h, say)
    store.truncate_curve(run.folder, run.id, int(state.step))
    eval_every, checkpoint_every = t.eval_every or max(1, t.steps // 5), _checkpoint_every(t)
    points: list[dict[str, Any]] = []
    speed = _Speed(t.batch_size * run.config.model.context)

    def save(state: TrainState) -> None:
        if not held():
            raise Stopped
        store.append_curve(run.folder, run.id, points)
        points.clear()
        meta = {"step": int(state.step), "run_id": run.id, "seconds": seconds_before + time.monotonic() - began}
        checkpoint.save(run.checkpoints, int(state.step), state, meta)

    while (step := int(state.step)) < t.steps:
        if stop():
            if not int(state.bad_in_a_row):
                save(state)
            raise Stopped
        until = min(_next(step, eval_every), _next(step, checkpoint_every), t.steps)
        state, metrics = advance(prog, state, np.int32(min(until - step, speed.steps())), h, run.data)
        done = int(state.step) - step
        tokens_per_second = speed.measured(done)
        points += _points(run, step, {name: np.asarray(values[:done]) for name, values in metrics.items()}, state)
        report(Progress(run.id, step + done, t.steps, tokens_per_second, float(metrics["train_loss"][done - 1])))
        if int(state.bad_in_a_row) >= t.max_bad_steps:
            if int(state.retry) >= t.max_rollbacks:
                return _finish(run, state, "diverged", points, seconds_before + time.monotonic() - began, speed)
            points.clear()
            state = _roll_back(run, prog, h, state, checkpoint_every, say)
            store.truncate_curve(run.folder, run.id, int(state.step))
            save(state)
            continue
        step += done
        if step % eval_every == 0 or step == t.steps:
            points[-1] |= run.task.summarise(np.asarray(evaluate(run.task, state.params, run.data)))
            speed.pause()
        if step == t.steps or (step % checkpoint_every == 0 and not int(state.bad_in_a_row)):
            save(state)
            speed.pause()
    return _finish(run, state, "done", points, seconds_before + time.monotonic() - began, speed)
