"""Runs trained from their first step or their last checkpoint to their rows; one, or a block of a population at once.

A run's result depends on its config and corpus only: not on which runs are trained beside it, on how many steps are
dispatched at once, on when it was interrupted, or on how often something is logged.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxgpt import population
from jaxgpt.config import BadInput
from jaxgpt.parallel import Lane, agree, any_host, from_rows, gather, rows
from jaxgpt.population import STREAM_CHUNK, Block, Feed, Mode, Plan
from jaxgpt.prefix import Ride
from jaxgpt.run import Hooks, Member, Report, Run, Stopped
from jaxgpt.step import CHUNK, TrainState

HERE = Lane()
SECONDS_PER_DISPATCH = 0.5  # how long Ctrl-C may have to wait


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
    (member,) = train_block(Block((run,), Plan("map", 1)), lambda _: Hooks(held, report, log), stop=stop)
    if member.row is None:
        raise Stopped
    return member.row


def train_block(
    block: Block,
    hooks: Callable[[Run], Hooks],
    *,
    stop: Callable[[], bool] = lambda: False,
    lane: Lane = HERE,
    branches: Mapping[str, Sequence[Run]] | None = None,
) -> list[Member]:
    """Trains the runs of a block together, each to its row or until it is in other hands (`Member.gone`).

    As `train` for each. `branches`: by id of a run, those that it trains the beginning of (prefix.py); when it is done
    they have a checkpoint there, or train by themselves. Raises Stopped once all are saved.
    """
    training = _Training(block, hooks, lane, branches or {})
    training.settle()
    while active := [m for m in training.members if m.active]:
        if any_host(stop()):
            training.stop()
            raise Stopped
        training.dispatch(active)
        training.validate()
        training.keep()
        training.settle()
    return training.members


class _Training:
    """A block under way: its states on the device, its members on the host."""

    def __init__(self, block: Block, hooks: Callable[[Run], Hooks], lane: Lane, branches: Mapping[str, Sequence[Run]]):
        first, size = block.runs[0], block.plan.block
        self.mode: Mode = block.plan.mode
        self.program, self.task, self.lane = first.program, first.source.task, lane
        self.clock = _Clock(self.mode)
        # What rounds differently: one program on one device does not.
        how = str(lane.layout) if lane.mesh is not None else "vmap" if self.mode == "vmap" else ""
        self.members = [Member(run, hooks(run), lane.layout.size, how) for run in block.runs]
        with lane.active():
            self.data = lane.put(first.source.data())
        states = population.stack([m.resume() for m in self.members], size)
        self.states: TrainState = lane.put_states(states, first.config.model)
        riders = [
            [Member(run, hooks(run), lane.layout.size, how) for run in branches.get(m.run.id, ())] for m in self.members
        ]
        self.rides = [Ride(m, its) for m, its in zip(self.members, riders, strict=True)]
        numbers = [{name: np.float32(x) for name, x in run.source.numbers.items()} for run in block.runs]
        self.h_R = lane.put(population.stack([m.h for m in self.members], size))
        self.numbers_R = lane.put(population.stack(numbers, size))
        self.batch_size, self.size = first.config.train.batch_size, size
        # Hosts that share a model read their own rows of each batch.
        own = rows(lane.mesh, self.batch_size) if lane.mesh is not None and jax.process_count() > 1 else None
        self.feeds = [Feed(m.run.source.stream, int(m.h.data_seed), own) for m in self.members]

    def dispatch(self, active: list[Member]) -> None:
        """Some steps of every run that has some to do."""
        n = min(agree(self.clock.steps(len(active))), CHUNK if self.feeds[0].stream is None else STREAM_CHUNK)
        n_R = np.zeros(self.size, np.int32)
        for i, (m, ride) in enumerate(zip(self.members, self.rides, strict=True)):
            n_R[i] = min(m.until() - m.step, ride.until() - m.step, n) if m.active else 0
        batches_R = self._batches(n_R)
        with self.lane.active():
            self.states, metrics = population.advance(
                self.program, self.mode, self.states, n_R, self.h_R, self.numbers_R, self.data, batches_R
            )
        values, at = gather(metrics), self.states
        counters = gather((at.step, at.retry, at.bad_in_a_row, at.bad_steps))
        done_R = [int(counters[0][i]) - m.step for i, m in enumerate(self.members)]
        per_step = self.batch_size * self.members[0].run.config.model.context
        tokens_per_second = self.clock.measured(self.members, done_R, per_step)
        for i, m in enumerate(self.members):
            if m.active:
                mine, aboard = {name: value[i] for name, value in values.items()}, self.rides[i].aboard
                m.absorb(mine, counters_i := [int(x[i]) for x in counters], tokens_per_second)
                self.rides[i].absorb(aboard, mine, counters_i)

    def _batches(self, n_R: np.ndarray) -> Any:
        """The streamed batches of a dispatch, [R, STREAM_CHUNK, ...]; None for what is not streamed."""
        if self.feeds[0].stream is None:
            return None
        mine = zip(self.feeds, self.members, n_R, strict=False)  # there may be more places than runs
        taken = [feed.take(m.retry, m.step, n) if n else None for feed, m, n in mine]
        some = next(batch for batch in taken if batch is not None)
        idle = jax.tree.map(np.zeros_like, some)
        batches_R = population.stack([idle if batch is None else batch for batch in taken], self.size)
        if self.feeds[0].rows is None or self.lane.mesh is None:
            return batches_R
        return from_rows(batches_R, self.lane.mesh, self.batch_size, axis=2)

    def validate(self) -> None:
        """Numbers on held-out data, into the last point of those that are due; with a running mean of the parameters
        its numbers too, called ..._ema.
        """
        theirs = [[m for m in (ride.trunk, *ride.aboard) if m.due_for_validation()] for ride in self.rides]
        due = [i for i, members in enumerate(theirs) if members]
        if not due:
            return
        due_R = np.isin(np.arange(self.size), due)
        for params_R, suffix in ((self.states.params, ""), (self.states.ema, "_ema")):
            if params_R is None:
                continue
            with self.lane.active():
                held_out_R = population.evaluate(self.task, self.mode, params_R, self.numbers_R, self.data, due_R)
            held_out_R = gather(held_out_R)
            for i in due:
                numbers = self.task.summarise(_part(held_out_R, i))
                if "validation_loss" not in numbers:
                    raise BadInput(
                        f"{type(self.task).__name__}.summarise gives {', '.join(numbers) or 'nothing'}; "
                        "validation_loss must be among its numbers"
                    )
                for m in theirs[i]:
                    m.points[-1] |= {f"{name}{suffix}": value for name, value in numbers.items()}

    def keep(self) -> None:
        """Brings the states that are due to the host, and to the disk if it is time."""
        due = [i for i, m in enumerate(self.members) if m.due_for_keeping() or self.rides[i].due_for_keeping()]
        if due:
            host = gather(self.states)
            for i in due:
                self.rides[i].keep(_part(host, i))
                if self.members[i].due_for_keeping():
                    self.members[i].keep(_part(host, i))

    def settle(self) -> None:
        """Ends the runs that have done their steps, and sends back those that failed."""
        ended = [m for m in self.members if m.active and not m.failed and m.step >= m.t.steps]
        self.clock.rest(ended)
        for i, m in enumerate(self.members):
            if m.active and m.failed:
                self._roll_back(i)
            elif m in ended:
                m.finish("done")

    def stop(self) -> None:
        """Saves what is needed to go on from here."""
        host = gather(self.states)
        for i, m in enumerate(self.members):
            self.rides[i].keep(_part(host, i))
            m.stop(_part(host, i))

    def _roll_back(self, i: int) -> None:
        """A run that has failed goes back, or is given up."""
        m = self.members[i]
        if not m.held():
            return
        if m.retry >= m.t.max_rollbacks:
            m.finish("diverged")
        else:
            state = m.roll_back()
            host = jax.tree.map(np.array, gather(self.states))
            del self.states  # before they are put again: there may be no room for both
            for all_, one in zip(jax.tree.leaves(host), jax.tree.leaves(state), strict=True):
                all_[i] = one
            self.states = self.lane.put_states(host, m.run.config.model)


def _part(tree_R: Any, i: int) -> Any:
    """One run's part of a stacked tree."""
    return jax.tree.map(lambda x: x[i], tree_R)


class _Clock:
    """How many steps fit into a dispatch, measured on the dispatches so far; results do not depend on it."""

    def __init__(self, mode: Mode):
        self.mode = mode
        self.marked = self.began = time.perf_counter()
        self.seconds = self.done = 0.0
        self.compiled = False

    def steps(self, active: int) -> int:
        """Steps of each of the active runs to dispatch next; starts the clock."""
        self.began = time.perf_counter()
        if not self.done:
            return 1
        at_once = 1 if self.mode == "vmap" else active
        return max(1, int(SECONDS_PER_DISPATCH * self.done / self.seconds / at_once))

    def measured(self, members: Sequence[Member], done_R: Sequence[int], tokens_per_step: int) -> float:
        """Tokens per second of the dispatch that has just ended; nan for the first, which compiles.

        Each run bears its part of the steps of the time: of what the dispatch took, as its speed; and of all since the
        dispatch before, with validations and checkpoints, as its wall seconds.
        """
        now = time.perf_counter()
        dispatch, wall, total = now - self.began, now - self.marked, sum(done_R)
        self.marked, compiled, self.compiled = now, self.compiled, True
        for m, done in zip(members, done_R, strict=True):
            m.seconds += wall * done / total
            if compiled:
                m.busy, m.tokens_timed = m.busy + dispatch * done / total, m.tokens_timed + done * tokens_per_step
        if not compiled:
            return math.nan
        self.seconds += dispatch
        self.done += max(done_R) if self.mode == "vmap" else total
        return total * tokens_per_step / dispatch

    def rest(self, ended: Sequence[Member]) -> None:
        """Runs that have just ended bear the time since their last dispatch: of validation and checkpoint."""
        if ended:
            now = time.perf_counter()
            for m in ended:
                m.seconds += (now - self.marked) / len(ended)
            self.marked = now
