"""One training step, many steps in one dispatch, and one run from its first step or its last checkpoint to its row.

A run's result depends on its config and corpus only: not on how many steps are dispatched at once, on when it was
interrupted, or on how often something is logged.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
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
from jaxgpt.parts import compute_dtype
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
    o = config.optimizer
    shared = OptimizerConfig(schedule=o.schedule, beta1=o.beta1, beta2=o.beta2, epsilon=o.epsilon)
    return Program(task, shared, config.train.microbatches, config.train.max_bad_steps)


def init_state(program: Program, h: Hparams, seed: int) -> TrainState:
    """The state before the first step."""
    return _first_state(program, h, program.task.init(seed))


def _first_state(program: Program, h: Hparams, params: Any) -> TrainState:
    # Copies, since `advance` donates its state and a task may hold on to what it returned.
    params = jax.tree.map(jnp.array, params)
    opt_state = _moments(program, h, params)
    # Four arrays, not one four times: `advance` donates its state, and a buffer can be donated once.
    return TrainState(params, opt_state, *(jnp.zeros((), jnp.int32) for _ in range(4)))


@partial(jax.jit, static_argnums=0)
def _moments(program: Program, h: Hparams, params: Any) -> Any:
    """The optimizer's first state. Jitted: one dispatch for all moments instead of two for each tensor."""
    return optimizer(program.optimizer, 0.0, h).init(params)


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
        # In float32 or wider: in bfloat16 the sum would lose what the later parts add.
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), first)
        add = partial(jax.tree.map, jnp.add)
        ((total, weight), gradient), _ = jax.lax.scan(lambda s, part: (add(s, grad(params, part)), None), zeros, parts)
    return total / weight, jax.tree.map(lambda g, p: (g / weight).astype(p.dtype), gradient, params)


def train_step(program: Program, state: TrainState, batch: Any, h: Hparams) -> tuple[TrainState, dict[str, Array]]:
    """One update; pure. A non-finite loss or gradient leaves parameters and optimizer state as they were, bit for bit,
    while `step` advances. The guard stands before clipping, which would turn one inf into NaNs everywhere.
    """
    loss, gradient = mean_loss_and_gradient(program.task, state.params, batch, program.microbatches)
    norm = optax.tree.norm(gradient)
    ok = jnp.isfinite(loss) & jnp.isfinite(norm)
    rate = learning_rate(program.optimizer.schedule, state.step, h)
    updates, opt_state = optimizer(program.optimizer, rate, h).update(gradient, state.opt_state, state.params)
    new = (optax.apply_updates(state.params, updates), opt_state)
    params, opt_state = jax.tree.map(partial(jnp.where, ok), new, (state.params, state.opt_state))
    bad = (~ok).astype(jnp.int32)
    state = TrainState(
        params, opt_state, state.step + 1, state.retry, bad * (state.bad_in_a_row + 1), state.bad_steps + bad
    )
    return state, {"train_loss": loss, "grad_norm": norm, "learning_rate": rate}


def data_key(h: Hparams, step: Array, retry: Array) -> Array:
    """The key of a step's batch: a function of (data seed, step, retry), so that resume is exact."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(h.data_seed), retry), step)


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def advance(
    program: Program, state: TrainState, n: Array, h: Hparams, data: Any
) -> tuple[TrainState, dict[str, Array]]:
    """Up to n <= CHUNK steps in one dispatch, fewer if `max_bad_steps` bad ones come in a row; metrics are [CHUNK].

    n is traced, so that one compiled program serves every number of steps.
    """

    def step(carry: tuple) -> tuple:
        i, state, metrics = carry
        batch = program.task.sample(data, data_key(h, state.step, state.retry))
        state, new = train_step(program, state, batch, h)
        return (
            i + 1,
            state,
            jax.tree.map(lambda all, one: all.at[i].set(one.astype(jnp.float32)), metrics, new),
        )

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
class Report:
    """Where a run stands, for whoever shows it; with a note, something happened that is worth a line."""

    run_id: str
    step: int
    steps: int
    tokens_per_second: float  # of the last dispatch; nan while compiling
    train_loss: float
    note: str = ""


class Stopped(Exception):
    """The run was asked to stop; its state is on disk."""


@dataclass(frozen=True)
class Source:
    """What a run trains on. `identity` names it in the run's id: the sha256 of a corpus, or a task's name and version.

    `data` is called when the run starts and puts what the task reads on the device.
    """

    task: Task
    data: Callable[[], Any]
    identity: str


@dataclass(frozen=True)
class Run:
    """A run and where it lives: its config, what it trains on, the sweep's folder."""

    config: RunConfig
    source: Source
    folder: Path

    @property
    def id(self) -> str:
        """The run's id."""
        return run_id(self.config, self.source.identity)

    @property
    def checkpoints(self) -> Path:
        """Folder of the run's checkpoints."""
        return self.folder / "checkpoints" / self.id


def train(
    run: Run,
    *,
    stop: Callable[[], bool] = lambda: False,
    held: Callable[[], bool] = lambda: True,
    report: Callable[[Report], None] = lambda _: None,
) -> dict[str, Any]:
    """Trains a run to its end, from its last checkpoint if there is one, and returns its row (also written).

    `stop()` is asked between dispatches; when true the state is saved and Stopped raised. `held()` false (another
    process took the run over) raises Stopped without writing. Raises StoreError when the disk is full.
    """
    t, began = run.config.train, time.monotonic()
    h, prog = hparams(run.config), program(run.config, run.source.task)
    say = partial(_say, report, run)
    data, (state, seconds_before, trained_by) = run.source.data(), _resume(run, prog, h, say)
    store.truncate_curve(run.folder, run.id, int(state.step))
    points: list[dict[str, Any]] = []  # of the curve, not yet on disk
    speed = _Speed(t.batch_size * run.config.model.context)

    def seconds() -> float:
        return seconds_before + time.monotonic() - began

    def save(state: TrainState) -> None:
        if not held():
            raise Stopped
        # The curve first: resuming cuts it at the checkpoint's step, so it may be longer but never shorter.
        store.append_curve(run.folder, run.id, points)
        points.clear()
        step, every = int(state.step), rollback_every(t)
        meta = {"step": step, "run_id": run.id, "seconds": seconds(), "trained_by": trained_by}
        # What stops and `checkpoint_every` put between must not push out the ones that a roll-back needs.
        targets = [s for s in (*checkpoint.steps(run.checkpoints), step) if s <= step and s % every == 0][-2:]
        checkpoint.save(run.checkpoints, step, state, meta, spare=targets)

    while (step := int(state.step)) < t.steps:
        if stop():
            if not int(state.bad_in_a_row):
                save(state)
            raise Stopped
        until = min(*(_next(step, every) for every in (eval_every(t), checkpoint_every(t), rollback_every(t))), t.steps)
        state, metrics = advance(prog, state, np.int32(min(until - step, speed.steps())), h, data)
        done = int(state.step) - step
        values = {name: np.asarray(value)[:done] for name, value in metrics.items()}
        report(Report(run.id, step + done, t.steps, speed.measured(done), float(values["train_loss"][-1])))
        points += _points(run, step, values, state)
        if int(state.bad_in_a_row) >= t.max_bad_steps:
            if not held():
                raise Stopped
            if int(state.retry) >= t.max_rollbacks:
                return _finish(run, state, "diverged", points, seconds(), speed, trained_by)
            points.clear()
            state = _roll_back(run, prog, h, state, say)
            store.truncate_curve(run.folder, run.id, int(state.step))
            save(state)
            checkpoint.discard_after(run.checkpoints, int(state.step))  # else resuming would go on from before this
            continue
        step += done
        if step % eval_every(t) == 0 or step == t.steps:
            points[-1] |= run.source.task.summarise(np.asarray(evaluate(run.source.task, state.params, data)))
        planned = step % checkpoint_every(t) == 0 or step % rollback_every(t) == 0
        if step == t.steps or (planned and not int(state.bad_in_a_row)):
            save(state)
    return _finish(run, state, "done", points, seconds(), speed, trained_by)


def _next(step: int, every: int) -> int:
    return (step // every + 1) * every


def _say(report: Callable[[Report], None], run: Run, note: str) -> None:
    report(Report(run.id, 0, run.config.train.steps, math.nan, math.nan, note))


def eval_every(t: TrainConfig) -> int:
    """Steps between validations, given or derived."""
    return t.eval_every or max(1, t.steps // 5)


def checkpoint_every(t: TrainConfig) -> int:
    """Steps between checkpoints, given or derived."""
    return t.checkpoint_every or rollback_every(t)


def rollback_every(t: TrainConfig) -> int:
    """Steps between the checkpoints that a roll-back may go back to: a fifth of the run, at most 1000.

    They are always saved. A function of `steps` alone: `checkpoint_every` is not part of a run's identity, so where
    a roll-back lands must not depend on it.
    """
    return min(1000, max(1, t.steps // 5))


class _Speed:
    """How many steps fit into a dispatch, measured on the dispatches so far; results do not depend on it."""

    def __init__(self, tokens_per_step: int):
        self.tokens_per_step = tokens_per_step
        self.began: float | None = None
        self.seconds = self.done = 0.0
        self.compiled = False

    def steps(self) -> int:
        """Steps to dispatch next; starts the clock."""
        self.began = time.perf_counter()
        return max(1, min(CHUNK, int(SECONDS_PER_DISPATCH * self.done / self.seconds))) if self.done else 1

    def measured(self, done: int) -> float:
        """Tokens per second of the dispatch that has just ended; nan for the first, which compiles."""
        assert self.began is not None, "steps() starts the clock"
        seconds = time.perf_counter() - self.began
        if not self.compiled:
            self.compiled = True
            return math.nan
        self.seconds, self.done = self.seconds + seconds, self.done + done
        return done * self.tokens_per_step / seconds

    def mean(self) -> float:
        """Tokens per second over all dispatches but the first."""
        return self.done * self.tokens_per_step / self.seconds if self.done else math.nan


def provenance(run: Run) -> dict[str, Any]:
    """What the bits of a run depend on beside its config and data: code_version, versions (of packages), backend."""
    return {
        "code_version": store.code_version(),
        "versions": store.package_versions(),
        "backend": f"{jax.default_backend()} {compute_dtype(run.config.model)}",
    }


def _changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The differences of two provenances, in words: ["code a1b2 -> c3d4", "jax 0.10.1 -> 0.10.2"]."""
    old, new = flatten(before), flatten(now)
    words = {name: "code" if name == "code_version" else name.removeprefix("versions.") for name in old}
    return [f"{words[name]} {old[name]} -> {new.get(name)}" for name in old if old[name] != new.get(name)]


def _resume(
    run: Run, prog: Program, h: Hparams, say: Callable[[str], None]
) -> tuple[TrainState, float, list[dict[str, Any]]]:
    """The state of the last good checkpoint, or the first state; the seconds that were spent to get there; and the
    provenances that the run was and will be trained by, in order.
    """
    now, found, seed = provenance(run), None, run.config.train.seed
    if checkpoint.steps(run.checkpoints):
        # The task's own code is not traced: it may make its parameters as it likes.
        like = jax.eval_shape(partial(_first_state, prog, h), run.source.task.init(seed))
        found = checkpoint.restore_latest(run.checkpoints, like, say)
    if found is None:
        return init_state(prog, h, seed), 0.0, [now]
    restored, meta = found
    trained_by = meta.get("trained_by") or [{"code_version": "unknown"}]
    if int(restored.step) < run.config.train.steps:
        say(f"goes on from step {int(restored.step):,}")
        if changes := _changes(trained_by[-1], now):
            say(
                f"goes on under other versions than before: {', '.join(changes)}; "
                "the result is no longer bit-identical to an undisturbed one"
            )
            trained_by = [*trained_by, now]
    return jax.tree.map(jnp.asarray, restored), float(meta["seconds"]), trained_by


def _roll_back(run: Run, prog: Program, h: Hparams, bad: TrainState, say: Callable[[str], None]) -> TrainState:
    """The last good checkpoint's state with another retry count, so that the batches after it are new ones.

    Only checkpoints that every run of this id makes are taken (multiples of `rollback_every`), so that a run that was
    interrupted, or is saved more often, rolls back to the same step as one that is not.
    """
    state, every = None, rollback_every(run.config.train)
    for step in reversed([step for step in checkpoint.steps(run.checkpoints) if step % every == 0]):
        try:
            state = jax.tree.map(jnp.asarray, checkpoint.restore(run.checkpoints, bad, step)[0])
            break
        except checkpoint.Damaged as error:
            say(str(error))
    if state is None:
        state = init_state(prog, h, run.config.train.seed)
    say(f"{int(bad.bad_in_a_row)} non-finite steps in a row: back from step {int(bad.step):,} to {int(state.step):,}")
    return state._replace(retry=bad.retry + 1, bad_steps=bad.bad_steps)


def _points(run: Run, step: int, metrics: dict[str, np.ndarray], state: TrainState) -> list[dict[str, Any]]:
    """Points of the curve for the steps step + 1, ... of a dispatch that are logged; the last of a span always is."""
    t, per_step = run.config.train, run.config.train.batch_size * run.config.model.context
    last = step + len(metrics["train_loss"])
    marked = {last} if last == t.steps or last % eval_every(t) == 0 else set()
    n = _parameters(run, state)[0].total
    return [
        {
            "step": i,
            "tokens": i * per_step,
            "flops_6nd": flops.flops_6nd(n, i * per_step),
            "retry": int(state.retry),
            **{name: float(values[i - step - 1]) for name, values in metrics.items()},
        }
        for i in range(step + 1, last + 1)
        if i % t.log_every == 0 or i in marked
    ]


def _parameters(run: Run, state: TrainState) -> tuple[flops.Parameters, bool]:
    """N, and whether the model is `config.model`'s transformer. A task may train another one: then all its parameters
    count, by either convention.
    """
    counts, total = flops.parameters(run.config.model), sum(leaf.size for leaf in jax.tree.leaves(state.params))
    return (counts, True) if counts.total == total else (flops.Parameters(total, total, 0), False)


def _finish(
    run: Run,
    state: TrainState,
    status: str,
    points: list[dict[str, Any]],
    seconds: float,
    speed: _Speed,
    trained_by: list[dict[str, Any]],
) -> dict[str, Any]:
    """Writes what is left of the curve and the run's row, and returns the row."""
    store.append_curve(run.folder, run.id, points)
    c, corpus_tokens = run.config, run.config.tokens
    curve = store.read_curve(run.folder, run.id)
    last = curve[-1] if curve and status == "done" else {}
    counts, transformer = _parameters(run, state)
    row = {
        "run_id": run.id,
        "status": status,
        "params_total": counts.total,
        "params_non_embedding": counts.non_embedding,
        "tokens": corpus_tokens,
        "flops_6nd": flops.flops_6nd(counts.total, corpus_tokens),
        "flops_exact": flops.flops_exact(c.model, corpus_tokens, attention="causal") if transformer else None,
        "final_loss": last.get("validation_loss"),
        "final_loss_sem": last.get("validation_loss_sem"),
        "final_bits_per_byte": last.get("validation_bits_per_byte"),
        "best_loss": min((p["validation_loss"] for p in curve if p.get("validation_loss") is not None), default=None),
        "steps_done": int(state.step),
        "bad_steps": int(state.bad_steps),
        "rollbacks": int(state.retry),
        "wall_seconds": round(seconds, 3),
        "tokens_per_second": speed.mean(),
        "device": jax.devices()[0].device_kind,
        "corpus_sha256": run.source.identity,
        # Of a run that went on under other versions, all of them: "a1b2+c3d4".
        "code_version": store.joined(p["code_version"] for p in trained_by),
        "versions": {
            name: store.joined(p.get("versions", {}).get(name, "unknown") for p in trained_by)
            for name in trained_by[-1].get("versions", {})
        },
        "backend": store.joined(p.get("backend", "unknown") for p in trained_by),
        **flatten(to_dict(c)),
    }
    store.write_row(run.folder, row)
    return row
