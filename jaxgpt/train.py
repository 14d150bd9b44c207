"""One run, from its first step or its last checkpoint to its row.

A run's result depends on its config and corpus only: not on how many steps are dispatched at once, on when it was
interrupted, or on how often something is logged.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt import checkpoint, flops, store
from jaxgpt.config import RunConfig, TrainConfig, flatten, run_id, to_dict
from jaxgpt.optimizer import Hparams, hparams
from jaxgpt.parts import compute_dtype
from jaxgpt.profile import mfu
from jaxgpt.step import CHUNK, Program, Task, TrainState, advance, evaluate, first_state, init_state, program

SECONDS_PER_DISPATCH = 0.5  # how long Ctrl-C may have to wait
STREAM_CHUNK = 16  # most steps in one dispatch over a streamed corpus: so many batches lie on the device

Stream = Callable[[int, int, int], Iterator[Any]]


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

    `data` is called when the run starts and puts what the task reads on the device. A corpus that does not fit there
    has a `stream` as well: of (data seed, retry, step) the batches from that step on, as NumPy; the task then samples
    nothing. `keep(folder)` writes beside the runs what one needs later to use them: a tokenizer.
    """

    task: Task
    data: Callable[[], Any]
    identity: str
    stream: Stream | None = None
    keep: Callable[[Path], None] = lambda folder: None


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
    log: Callable[[list[dict[str, Any]]], None] = lambda _: None,
) -> dict[str, Any]:
    """Trains a run to its end, from its last checkpoint if there is one, and returns its row (also written).

    `stop()` is asked between dispatches; when true the state is saved and Stopped raised. `held()` false (another
    process took the run over) raises Stopped without writing. `log` is given the curve's points once they are on disk.
    Raises StoreError when the disk is full.
    """
    t, began = run.config.train, time.monotonic()
    h, prog = hparams(run.config), program(run.config, run.source.task)
    say = partial(_say, report, run)
    data, (state, seconds_before, trained_by) = run.source.data(), _resume(run, prog, h, say)
    run.source.keep(run.folder)
    feed = Feed(run.source.stream, int(h.data_seed))
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
        log(list(points))
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
        n = min(until - step, speed.steps(), CHUNK if run.source.stream is None else STREAM_CHUNK)
        state, metrics = advance(prog, state, np.int32(n), h, data, feed.take(state, n))
        done = int(state.step) - step
        values = {name: np.asarray(value)[:done] for name, value in metrics.items()}
        report(Report(run.id, step + done, t.steps, speed.measured(done), float(values["train_loss"][-1])))
        points += _points(run, step, values, state)
        if int(state.bad_in_a_row) >= t.max_bad_steps:
            if not held():
                raise Stopped
            if int(state.retry) >= t.max_rollbacks:
                return _finish(run, state, "diverged", points, seconds(), speed, trained_by, log)
            points.clear()
            state = _roll_back(run, prog, h, state, say)
            store.truncate_curve(run.folder, run.id, int(state.step))
            save(state)
            checkpoint.discard_after(run.checkpoints, int(state.step))  # else resuming would go on from before this
            continue
        step += done
        if step % eval_every(t) == 0 or step == t.steps:
            points[-1] |= _validate(run.source.task, state, data)
        planned = step % checkpoint_every(t) == 0 or step % rollback_every(t) == 0
        if step == t.steps or (planned and not int(state.bad_in_a_row)):
            save(state)
    return _finish(run, state, "done", points, seconds(), speed, trained_by, log)


def _validate(task: Task, state: TrainState, data: Any) -> dict[str, float]:
    """The task's numbers on held-out data; with a running mean of the parameters its numbers too, called ..._ema."""

    def numbers(params: Any) -> dict[str, float]:
        return task.summarise(jax.tree.map(np.asarray, evaluate(task, params, data)))

    means = {} if state.ema is None else numbers(state.ema)
    return numbers(state.params) | {f"{name}_ema": value for name, value in means.items()}


class Feed:
    """Batches of a streamed corpus, stacked for a dispatch; always as many, so that one program serves every number."""

    def __init__(self, stream: Stream | None, data_seed: int):
        self.stream, self.data_seed = stream, data_seed
        self.at: tuple[int, int] | None = None  # the retry and step of the iterator's next batch

    def take(self, state: TrainState, n: int) -> Any:
        """The batches of the next n <= STREAM_CHUNK steps, padded by the last; None for what is not streamed."""
        if self.stream is None:
            return None
        retry, step = int(state.retry), int(state.step)
        if self.at != (retry, step):
            self.batches = self.stream(self.data_seed, retry, step)
        taken = [next(self.batches) for _ in range(n)]
        self.at = (retry, step + n)
        return jax.tree.map(lambda *leaves: np.stack(leaves), *taken, *taken[-1:] * (STREAM_CHUNK - n))


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
        like = jax.eval_shape(partial(first_state, prog, h), run.source.task.init(seed))
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
    n = run_parameters(run, state)[0].total
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


def run_parameters(run: Run, state: TrainState) -> tuple[flops.Parameters, bool]:
    """N, and whether the model is that of `config.model`. A task may train another one: then all its parameters
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
    log: Callable[[list[dict[str, Any]]], None],
) -> dict[str, Any]:
    """Writes what is left of the curve and the run's row, and returns the row."""
    store.append_curve(run.folder, run.id, points)
    log(points)
    c, corpus_tokens = run.config, run.config.tokens
    curve = store.read_curve(run.folder, run.id)
    last = curve[-1] if curve and status == "done" else {}
    counts, transformer = run_parameters(run, state)
    device = jax.devices()[0].device_kind
    row = {
        "run_id": run.id,
        "status": status,
        "params_total": counts.total,
        "params_non_embedding": counts.non_embedding,
        "params_active": counts.active,
        "tokens": corpus_tokens,
        "flops_6nd": flops.flops_6nd(counts.total, corpus_tokens),
        "flops_exact": flops.flops_exact(c.model, corpus_tokens, attention="causal") if transformer else None,
        **dict.fromkeys(("final_loss", "final_loss_sem", "final_bits_per_byte")),
        **{name.replace("validation_", "final_"): x for name, x in last.items() if name.startswith("validation_")},
        "best_loss": min((p["validation_loss"] for p in curve if p.get("validation_loss") is not None), default=None),
        "steps_done": int(state.step),
        "bad_steps": int(state.bad_steps),
        "rollbacks": int(state.retry),
        "wall_seconds": round(seconds, 3),
        "tokens_per_second": speed.mean(),
        "mfu": mfu(c, speed.mean(), device, compute_dtype(c.model)) if transformer else None,
        "device": device,
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
