"""A run and its files: what it trains on, where it stands, how it goes on from a checkpoint, and its row at the end."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxgpt import checkpoint, flops, parallel, store
from jaxgpt.config import RunConfig, TrainConfig, flatten, run_id, to_dict
from jaxgpt.optimizer import hparams
from jaxgpt.parts import compute_dtype
from jaxgpt.profile import mfu
from jaxgpt.step import Program, Task, TrainState, first_state, init_state, program

# At least so long between checkpoints that nobody asked for: a model of a few thousand parameters trains for less time
# than it takes to save it. They are made where a roll-back may land, so that a kill may cost more.
SAVE_SECONDS = 10.0

Stream = Callable[..., Iterator[Any]]


# --- what a run is -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """What a run trains on. `identity` names it in the run's id: the sha256 of a corpus, or a task's name and version.
    Runs of equal task and identity have equal data, and so may be trained in one program.

    `data` is called when the run starts and puts what the task reads on the device. A corpus that does not fit there
    has a `stream` as well: of (data seed, retry, step) the batches from that step on, as NumPy; the task then samples
    nothing. Where several hosts train one model it is given a slice too, and gives those rows of each batch.
    `keep(folder)` writes beside the runs what one needs later to use them: a tokenizer. `numbers` are scalars of the
    task that may differ between the runs of one program, a noise level for example: they enter the run's id and its
    row, and the task is given `(data, numbers)`, the numbers as a dict of float32, where else it is given `data`.
    """

    task: Task
    data: Callable[[], Any]
    identity: str
    stream: Stream | None = None
    keep: Callable[[Path], None] = lambda folder: None
    numbers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """A run and where it lives: its config, what it trains on, the sweep's folder."""

    config: RunConfig
    source: Source
    folder: Path

    @property
    def id(self) -> str:
        """The run's id."""
        numbers = {name: float(value) for name, value in self.source.numbers.items()}
        return run_id(self.config, self.source.identity + (json.dumps(numbers, sort_keys=True) if numbers else ""))

    @property
    def checkpoints(self) -> Path:
        """Folder of the run's checkpoints."""
        return self.folder / "checkpoints" / self.id

    @property
    def program(self) -> Program:
        """What its compiled program depends on."""
        return program(self.config, self.source.task)


@dataclass(frozen=True)
class Report:
    """Where a run stands, for whoever shows it; with a note, something happened that is worth a line."""

    run_id: str
    step: int
    steps: int
    tokens_per_second: float  # of the last dispatch, all its runs together; nan while compiling
    train_loss: float
    note: str = ""


class Stopped(Exception):
    """The run was asked to stop; its state is on disk."""


def eval_every(t: TrainConfig) -> int:
    """Steps between validations, given or derived."""
    return t.eval_every or max(1, t.steps // 5)


def rollback_every(t: TrainConfig) -> int:
    """Steps between the states that a roll-back may go back to: a fifth of the run, at most 1000.

    A function of `steps` alone: `checkpoint_every` is not part of a run's identity, so where a roll-back lands must
    not depend on it.
    """
    return min(1000, max(1, t.steps // 5))


def run_parameters(run: Run, params: Any) -> tuple[flops.Parameters, bool]:
    """N, and whether the model is that of `config.model`. A task may train another one: then all its parameters
    count, by either convention.
    """
    counts, total = flops.parameters(run.config.model), sum(leaf.size for leaf in jax.tree.leaves(params))
    return (counts, True) if counts.total == total else (flops.Parameters(total, total, 0), False)


def provenance(run: Run, how: str = "") -> dict[str, Any]:
    """What the bits of a run depend on beside its config and data: code_version, versions (of packages), backend.

    `how`: the layout or mode in which it is trained, where that changes rounding.
    """
    return {
        "code_version": store.code_version(),
        "versions": store.package_versions(),
        "backend": " ".join([jax.default_backend(), str(compute_dtype(run.config.model)), *([how] if how else [])]),
    }


# --- a run under way -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hooks:
    """What a run under way asks and tells. `held()` false: another process took the run over, nothing more is written.
    `log` is given the curve's points once they are on disk, `finished` the row likewise.
    """

    held: Callable[[], bool] = lambda: True
    report: Callable[[Report], None] = lambda _: None
    log: Callable[[list[dict[str, Any]]], None] = lambda _: None
    finished: Callable[[dict[str, Any]], None] = lambda _: None


class Member:
    """A run inside a block of runs: what the host knows of it, and its files. Its state lives with the block.

    Of several processes that train one model each has a Member, which all do the same; process 0 writes.

    `step`, `retry`, `bad_in_a_row` and `bad_steps` are those of the state after the last dispatch.
    """

    def __init__(self, run: Run, hooks: Hooks, devices: int = 1, how: str = ""):
        """`devices`: that its model is spread over. `how`: see `provenance`."""
        self.run, self.hooks, self.t = run, hooks, run.config.train
        self.devices, self.how = devices, how
        self.h = hparams(run.config)
        self.points: list[dict[str, Any]] = []  # of the curve, not yet on disk
        self.seconds = self.busy = 0.0  # spent on it; of these in dispatches whose speed counts
        self.tokens_timed = 0  # trained in `busy` seconds
        self.shared = 0  # steps that another run trained for it: see prefix.py
        self.row: dict[str, Any] | None = None  # once it is done
        self.gone = False  # in other hands
        self.saved_at = time.monotonic()
        self.anchor: tuple[int, TrainState] | None = None  # what a roll-back goes back to, and its step
        self.anchor_on_disk = False

    # --- from the disk ---------------------------------------------------------------------------------------------

    def resume(self) -> TrainState:
        """The state of the last good checkpoint, or the first one; on the host."""
        now, found, prog, seed = provenance(self.run, self.how), None, self.run.program, self.t.seed
        self.trained_by: list[dict[str, Any]] = [now]
        if parallel.agree(bool(checkpoint.steps(self.run.checkpoints))):
            # The task's own code is not traced: it may make its parameters as it likes.
            like = jax.eval_shape(partial(first_state, prog, self.h), self.run.source.task.init(seed))
            found = checkpoint.restore_latest(self.run.checkpoints, like, self.say)
        if found is None:
            state = self._first()
        else:
            state, meta = found
            self.seconds, self.shared = float(meta["seconds"]), int(meta.get("shared_steps", 0))
            self.trained_by = meta.get("trained_by") or [{"code_version": "unknown"}]
            self._tell_what_changed(int(state.step), now)
        self.step, self.retry = int(state.step), int(state.retry)
        self.bad_in_a_row, self.bad_steps = int(state.bad_in_a_row), int(state.bad_steps)
        self.n_params, self.is_model = run_parameters(self.run, state.params)
        if self.step % rollback_every(self.t) == 0:
            self._keep(state, on_disk=found is not None)
        folder = self.run.folder
        parallel.by_writer(lambda: self.run.source.keep(folder), f"write in {folder}")
        parallel.by_writer(lambda: store.truncate_curve(folder, self.run.id, self.step), f"write in {folder}")
        return state

    def board(self, step: int, trunk: Member, meta: Mapping[str, Any], shared: int) -> None:
        """Stands at a step of another run, whose state is its own too (prefix.py). `meta`: of its last checkpoint."""
        self.step, self.retry, self.bad_in_a_row, self.bad_steps = step, 0, 0, 0
        self.n_params, self.is_model = trunk.n_params, trunk.is_model
        self.seconds, self.shared, self.trained_by = float(meta["seconds"]), shared, list(meta["trained_by"])
        self.run.source.keep(self.run.folder)
        store.truncate_curve(self.run.folder, self.run.id, step)

    def _first(self) -> TrainState:
        """The state before the first step, on the host: one device may not hold it whole."""
        with jax.default_device(parallel.host_device()):
            return jax.tree.map(np.asarray, init_state(self.run.program, self.h, self.t.seed))

    def _tell_what_changed(self, step: int, now: dict[str, Any]) -> None:
        if step >= self.t.steps:
            return
        self.say(f"goes on from step {step:,}")
        if changes := _changes(self.trained_by[-1], now):
            self.say(
                f"goes on under other versions than before: {', '.join(changes)}; "
                "the result is no longer bit-identical to an undisturbed one"
            )
            self.trained_by = [*self.trained_by, now]

    def say(self, note: str) -> None:
        """A line on this run."""
        self.hooks.report(Report(self.run.id, 0, self.t.steps, math.nan, math.nan, note))

    # --- while it trains -------------------------------------------------------------------------------------------

    @property
    def active(self) -> bool:
        """Whether it still has steps to do here."""
        return self.row is None and not self.gone

    def until(self) -> int:
        """The step at which something is due: a validation, a checkpoint, the end."""
        every = [eval_every(self.t), rollback_every(self.t)]
        every += [each for each in (self.t.checkpoint_every, self.t.keep_every) if each]
        return min(*((self.step // e + 1) * e for e in every), self.t.steps)

    def absorb(self, metrics: Mapping[str, np.ndarray], counters: Sequence[int], tokens_per_second: float) -> None:
        """What a dispatch did to this run: its metrics by step, and its step, retry, bad_in_a_row, bad_steps after."""
        before = self.step
        self.step, self.retry, self.bad_in_a_row, self.bad_steps = counters
        if self.step == before:
            return
        t, per_step = self.t, self.t.batch_size * self.run.config.model.context
        # The last step of a stretch that ends with a validation is always logged.
        marked = {self.step} if self.step == t.steps or self.step % eval_every(t) == 0 else set()
        self.points += [
            {
                "step": i,
                "tokens": i * per_step,
                "flops_6nd": flops.flops_6nd(self.n_params.total, i * per_step),
                "retry": self.retry,
                **{name: float(values[i - before - 1]) for name, values in metrics.items()},
            }
            for i in range(before + 1, self.step + 1)
            if i % t.log_every == 0 or i in marked
        ]
        loss = float(metrics["train_loss"][self.step - before - 1])
        self.hooks.report(Report(self.run.id, self.step, t.steps, tokens_per_second, loss))

    @property
    def failed(self) -> bool:
        """Whether it has had as many bad steps in a row as are allowed."""
        return self.bad_in_a_row >= self.t.max_bad_steps

    def due_for_validation(self) -> bool:
        """Whether the last dispatch ended at one."""
        return self.active and not self.failed and (self.step % eval_every(self.t) == 0 or self.step == self.t.steps)

    def due_for_keeping(self) -> bool:
        """Whether the state after the last dispatch has to be brought to the host."""
        planned = self.step % rollback_every(self.t) == 0 or self._asked()
        return self.active and not self.failed and (self.step == self.t.steps or (planned and not self.bad_in_a_row))

    def _asked(self) -> bool:
        """Whether the user wants a checkpoint of this step."""
        return any(each and self.step % each == 0 for each in (self.t.checkpoint_every, self.t.keep_every))

    # --- to the disk -----------------------------------------------------------------------------------------------

    def keep(self, state: TrainState) -> None:
        """What is done with a state that was due: kept for a roll-back, and saved if it is time; at the end always.

        Which states are on disk changes no result: all that could be rolled back to come back by themselves when a
        run goes on from an older one.
        """
        t = self.t
        if self.step % rollback_every(t) == 0 and not self.bad_in_a_row:
            self._keep(state, on_disk=False)
        late = time.monotonic() - self.saved_at >= SAVE_SECONDS
        if self._asked() or self.step == t.steps or parallel.agree(late):
            self.save(state)

    def _keep(self, state: TrainState, on_disk: bool) -> None:
        # A copy: what comes from the device may be a view of memory that the next dispatch writes to.
        self.anchor, self.anchor_on_disk = (int(state.step), jax.tree.map(np.array, state)), on_disk

    def stop(self, state: TrainState) -> None:
        """Saves what is needed to go on from here or, if the last steps were bad, from the last good state."""
        if not self.active or not self.step:
            return
        if not self.bad_in_a_row:
            self.save(state)
        elif self.anchor is not None and not self.anchor_on_disk and self.anchor[0] and self.held():
            self.write_curve()
            self._write(*self.anchor)
            self.anchor_on_disk = True

    def held(self) -> bool:
        """Whether the run is still this process's, asked of the disk; if not, it is `gone`."""
        self.gone = self.gone or not parallel.agree(self.hooks.held())
        return not self.gone

    def save(self, state: TrainState) -> None:
        """Curve and checkpoint. Where the state stands between two that can be rolled back to, the earlier one too."""
        if not self.held():
            return
        self.write_curve()
        # The first state needs no file.
        if self.anchor is not None and not self.anchor_on_disk and 0 < self.anchor[0] < self.step:
            self._write(*self.anchor)
        self._write(self.step, state)
        self.anchor_on_disk = True
        self.saved_at = time.monotonic()

    def write_curve(self) -> None:
        """The points so far. Before any checkpoint: resuming cuts the curve at its step, so it may be longer but never
        shorter.
        """
        folder = self.run.folder
        parallel.by_writer(lambda: store.append_curve(folder, self.run.id, self.points), f"write in {folder}")
        self.hooks.log(list(self.points))
        self.points.clear()

    def _write(self, step: int, state: TrainState) -> None:
        every = rollback_every(self.t)
        meta = {"step": step, "run_id": self.run.id, "seconds": self.seconds, "trained_by": self.trained_by,
                "shared_steps": self.shared, "bad_steps": self.bad_steps}  # fmt: skip
        # What stops and `checkpoint_every` put between must not push out the ones that a roll-back needs.
        there = [s for s in (*checkpoint.steps(self.run.checkpoints), step) if s <= step]
        spare, keep = [s for s in there if s % every == 0][-2:], 2
        if self.t.keep_every:
            if step == self.t.steps:  # nothing rolls back any more: what stays is what was asked for
                spare, keep = [], 1
            spare += [s for s in there if s % self.t.keep_every == 0]
        checkpoint.save(self.run.checkpoints, step, state, meta, keep, spare)

    def roll_back(self) -> TrainState:
        """The last good state with another retry count, so that the batches after it are new ones.

        Only states that every run of this id passes through are taken (multiples of `rollback_every`), so that a run
        that was interrupted, or is saved more often, rolls back to the same step as one that is not.
        """
        state = self.anchor[1] if self.anchor is not None else self._target_on_disk()
        bad_in_a_row, bad = self.bad_in_a_row, self.step
        state = state._replace(retry=np.int32(self.retry + 1), bad_steps=np.int32(self.bad_steps))
        self.step, self.retry, self.bad_in_a_row = int(state.step), self.retry + 1, 0
        self.say(f"{bad_in_a_row} non-finite steps in a row: back from step {bad:,} to {self.step:,}")
        self.points = [point for point in self.points if point["step"] <= self.step]
        folder = self.run.folder
        parallel.by_writer(lambda: store.truncate_curve(folder, self.run.id, self.step), f"write in {folder}")
        self.save(state)
        if not self.gone:
            checkpoint.discard_after(self.run.checkpoints, self.step)  # else resuming would go on from before this
        return state

    def _target_on_disk(self) -> TrainState:
        """Of a run that went on from between two such states."""
        every, first, found = rollback_every(self.t), self._first(), 0
        for step in reversed([s for s in checkpoint.steps(self.run.checkpoints) if s % every == 0 and s <= self.step]):
            try:
                checkpoint.check(self.run.checkpoints, step)
                found = step
                break
            except checkpoint.Damaged as error:
                self.say(str(error))
        found = parallel.agree(found)  # one host may not see yet what another one does
        return checkpoint.restore(self.run.checkpoints, first, found)[0] if found else first

    def finish(self, status: str) -> None:
        """Writes what is left of the curve and the run's row."""
        if not self.held():
            return
        self.write_curve()
        self.row = row = self._row(status)
        parallel.by_writer(lambda: store.write_row(self.run.folder, row), f"write in {self.run.folder}")
        self.hooks.finished(self.row)

    def _row(self, status: str) -> dict[str, Any]:
        run, c, tokens = self.run, self.run.config, self.run.config.tokens
        curve = store.read_curve(run.folder, run.id)
        last = curve[-1] if curve and status == "done" else {}
        counts, is_model, device = self.n_params, self.is_model, jax.devices()[0].device_kind
        speed = self.tokens_timed / self.busy if self.busy else math.nan
        trained_by = self.trained_by
        return {
            "run_id": run.id,
            "status": status,
            "params_total": counts.total,
            "params_non_embedding": counts.non_embedding,
            "params_active": counts.active,
            "tokens": tokens,
            "flops_6nd": flops.flops_6nd(counts.total, tokens),
            "flops_exact": flops.flops_exact(c.model, tokens, attention="causal") if is_model else None,
            **dict.fromkeys(("final_loss", "final_loss_sem", "final_bits_per_byte")),
            **{name.replace("validation_", "final_"): x for name, x in last.items() if name.startswith("validation_")},
            "best_loss": min((p["validation_loss"] for p in curve if p.get("validation_loss") is not None),
                             default=None),
            "steps_done": self.step,
            "shared_steps": self.shared,  # of these, trained within another run, which bears their wall_seconds
            "bad_steps": self.bad_steps,
            "rollbacks": self.retry,
            "wall_seconds": round(self.seconds, 3),
            "tokens_per_second": speed,
            "mfu": mfu(c, speed, device, compute_dtype(c.model), self.devices) if is_model else None,
            "device": device,
            "corpus_sha256": run.source.identity,
            # Of a run that went on under other versions, all of them: "a1b2+c3d4".
            "code_version": store.joined(p["code_version"] for p in trained_by),
            "versions": {
                name: store.joined(p.get("versions", {}).get(name, "unknown") for p in trained_by)
                for name in trained_by[-1].get("versions", {})
            },
            "backend": store.joined(p.get("backend", "unknown") for p in trained_by),
            **({"numbers": dict(run.source.numbers)} if run.source.numbers else {}),
            **flatten(to_dict(c)),
        }  # fmt: skip


def _changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The differences of two provenances, in words: ["code a1b2 -> c3d4", "jax 0.10.1 -> 0.10.2"]."""
    old, new = flatten(before), flatten(now)
    words = {name: "code" if name == "code_version" else name.removeprefix("versions.") for name in old}
    return [f"{words[name]} {old[name]} -> {new.get(name)}" for name in old if old[name] != new.get(name)]
