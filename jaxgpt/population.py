"""Runs that share a compiled program, trained together: their states are stacked and one dispatch advances them all.

A population is the runs of a sweep with equal programs: what differs between them (seed, rates, end step, ...) are
arguments. It is cut into blocks, each of which is trained on one lane (a device, or several that hold one model).

    map    one run after the other within the dispatch (lax.map): the bits of a run do not depend on the others, and a
           run that has ended costs nothing
    vmap   all at once: for accelerators, which one small model cannot fill

Letters: R runs of a block.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxgpt import flops, memory
from jaxgpt.optimizer import hparams
from jaxgpt.run import Run, Stream
from jaxgpt.step import CHUNK, Program, Task, TrainState, init_state, steps

Mode = Literal["map", "vmap"]
# Runs of a block under `map`: more would not be faster, and a sweep that is stopped should hold finished runs.
MAP_BLOCK = 8
STREAM_CHUNK = 16  # most steps in one dispatch over a streamed corpus: so many batches lie on the device
MEASURE_SECONDS = 0.2  # of a dispatch that is timed
MEASURE = (1, 8, 64, 512)  # block sizes that are timed on an accelerator
WORTHWHILE = 1.1  # by how much a larger block must be faster than the best so far


# --- which runs go together ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """How a population is computed: its mode, and how many runs a block holds at most.

    Where that was not obvious, `measured`: steps of runs per second by block size, on which `device`s, when it had how
    many `runs` and how much memory.
    """

    mode: Mode
    block: int
    measured: Mapping[str, float] | None = None
    device: str = ""
    runs: int = 0
    have_bytes: int = 0

    def serves(self, device: str, runs: int, have_bytes: int) -> bool:
        """Whether it was measured for what is there now, or for more runs in no more memory."""
        return (
            self.measured is not None and device == self.device and runs <= self.runs and have_bytes >= self.have_bytes
        )


@dataclass(frozen=True)
class Population:
    """Runs that one compiled program trains."""

    runs: tuple[Run, ...]

    @property
    def name(self) -> str:
        """8 hex digits, the same for runs of an equal program and data."""
        source = self.runs[0].source
        text = f"{self.runs[0].program!r} {source.identity} {source.stream is not None} {sorted(source.numbers)}"
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    @property
    def work(self) -> float:
        """FLOPs of all its runs."""
        return sum(work(run) for run in self.runs)


@dataclass(frozen=True)
class Block:
    """Runs of one population that one dispatch advances; at most `plan.block`, and shapes are for that many."""

    runs: tuple[Run, ...]
    plan: Plan

    @property
    def work(self) -> float:
        """FLOPs of all its runs."""
        return sum(work(run) for run in self.runs)


def work(run: Run) -> float:
    """Training FLOPs of a run, for comparisons between runs."""
    return flops.flops_exact(run.config.model, run.config.tokens, attention="full")


def split(runs: Sequence[Run]) -> list[Population]:
    """Runs by program and data, in the order in which each first appears."""
    groups: dict[Any, list[Run]] = {}
    for run in runs:
        source = run.source
        key = (run.program, source.identity, source.stream is not None, tuple(sorted(source.numbers)))
        groups.setdefault(key, []).append(run)
    return [Population(tuple(group)) for group in groups.values()]


def blocks(population: Population, plan: Plan, cut: int = 1) -> list[Block]:
    """The population in blocks of at most plan.block runs, the longest first: those of a block end together; in `cut`
    blocks at least.

    A place that no run takes costs nothing under `map`, and a program less; under `vmap` it costs as much as a run.
    """
    runs = sorted(population.runs, key=lambda run: -run.config.train.steps)
    each = math.ceil(len(runs) / max(cut, math.ceil(len(runs) / plan.block)))
    size = each if plan.mode == "vmap" else plan.block
    return [Block(tuple(runs[i : i + each]), replace(plan, block=size)) for i in range(0, len(runs), each)]


def pieces(populations: Sequence[Population], lanes: int) -> list[int]:
    """Into how many blocks at least each population is cut so that `lanes` lanes can share the work.

    As few as possible: each lane that takes a part of a population compiles its program.
    """
    share = sum(population.work for population in populations) / lanes
    return [min(len(p.runs), lanes, max(1, math.ceil(p.work / share - 0.25))) if share else 1 for p in populations]


def choose(
    population: Population,
    cut: int,
    device: Any,
    devices: str,
    have_bytes: int,
    say: Callable[[str], None],
    stop: Callable[[], bool] = lambda: False,
) -> Plan:
    """How to compute a population that is cut into at least `cut` blocks, on lanes like `device` with so much memory.

    On a CPU `map`: `vmap` was seen from 2.5 times slower to 1.6 times faster and its bits depend on the other runs. On
    an accelerator one large model fills the device and small ones do not: blocks of growing size are timed, and the
    smallest counts that is not clearly slower than the best.
    """
    runs, config = len(population.runs), population.runs[0].config
    at_once = device.platform != "cpu" and runs > 1
    fit = max(1, memory.largest_block(config, runs, at_once, have_bytes, device.platform)) if have_bytes else runs
    if not at_once:
        count = max(cut, math.ceil(runs / min(MAP_BLOCK, fit)))
        return Plan("map", math.ceil(runs / count))
    most = min(math.ceil(runs / cut), fit)
    sizes = sorted({min(size, most) for size in MEASURE})
    measured: dict[str, float] = {}
    with jax.default_device(device):
        for size in sizes:
            if stop():
                return Plan("map", 1)  # nothing will be trained with it
            try:
                measured[str(size)] = steps_per_second(population.runs[:size], "map" if size == 1 else "vmap", device)
            except jax.errors.JaxRuntimeError as error:
                if not measured or "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                break  # the estimate of memory was too low
            say(f"population {population.name}: {measured[str(size)]:,.0f} steps/s with {size} runs at once")
            if measured[str(size)] < WORTHWHILE * max([0.0, *list(measured.values())[:-1]]):
                break
    best = max(measured.values())
    size = min(int(size) for size, speed in measured.items() if speed * WORTHWHILE > best)
    return Plan("map" if size == 1 else "vmap", size, measured, devices, runs, have_bytes)


# --- the program ---------------------------------------------------------------------------------------------------


def inputs(data: Any, numbers: Mapping[str, Array]) -> Any:
    """What a task is given as data: see `Source.numbers`."""
    return (data, numbers) if numbers else data


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def advance(
    program: Program,
    mode: Mode,
    states_R: TrainState,
    n_R: Array,
    h_R: Any,
    numbers_R: Mapping[str, Array],
    data: Any,
    batches_R: Any = None,
) -> tuple[TrainState, dict[str, Array]]:
    """Up to n_R steps of each run in one dispatch: `step.advance` for each, metrics [R, CHUNK]."""

    def one(state: TrainState, its: tuple) -> tuple[TrainState, dict[str, Array]]:
        n, h, numbers, batches = its
        return steps(program, state, n, h, inputs(data, numbers), batches)

    theirs_R = (n_R, h_R, numbers_R, batches_R)
    if mode == "vmap":
        return jax.vmap(one)(states_R, theirs_R)

    # What lax.map does, but in the states' own memory: it would hold them twice.
    def in_place(states_R: TrainState, run: tuple) -> tuple[TrainState, dict[str, Array]]:
        r, its = run
        state, metrics = one(jax.tree.map(lambda x_R: x_R[r], states_R), its)
        return jax.tree.map(lambda x_R, x: x_R.at[r].set(x), states_R, state), metrics

    return jax.lax.scan(in_place, states_R, (jnp.arange(len(n_R)), theirs_R))


@partial(jax.jit, static_argnums=(0, 1))
def evaluate(task: Task, mode: Mode, params_R: Any, numbers_R: Mapping[str, Array], data: Any, due_R: Array) -> Any:
    """Held-out losses of the runs that are due, zeros for the others, which under `map` cost nothing."""

    def one(run: tuple) -> Any:
        params, numbers, due = run

        def held_out(params: Any) -> Any:
            return task.evaluate(params, inputs(data, numbers))

        nothing = jax.eval_shape(held_out, params)
        zeros = lambda _: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), nothing)  # noqa: E731
        return jax.lax.cond(due, held_out, zeros, params)

    its_R = (params_R, numbers_R, due_R)
    return jax.lax.map(one, its_R) if mode == "map" else jax.vmap(one)(its_R)


class Feed:
    """Batches of a streamed corpus, stacked for a dispatch; always as many, so that one program serves every number."""

    def __init__(self, stream: Stream | None, data_seed: int, rows: slice | None = None):
        self.stream, self.data_seed, self.rows = stream, data_seed, rows
        self.at: tuple[int, int] | None = None  # the retry and step of the iterator's next batch

    def take(self, retry: int, step: int, n: int) -> Any:
        """The batches of the next n <= STREAM_CHUNK steps, padded by the last; None for what is not streamed."""
        if self.stream is None:
            return None
        if self.at != (retry, step):
            own = () if self.rows is None else (self.rows,)
            self.batches = self.stream(self.data_seed, retry, step, *own)
        taken = [next(self.batches) for _ in range(n)]
        self.at = (retry, step + n)
        return jax.tree.map(lambda *leaves: np.stack(leaves), *taken, *taken[-1:] * (STREAM_CHUNK - n))


def stack(trees: Sequence[Any], size: int) -> Any:
    """Trees of NumPy arrays as one with a leading axis of `size`; the last is repeated to fill it."""
    filled = [*trees, *[trees[-1]] * (size - len(trees))]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *filled)


def steps_per_second(runs: Sequence[Run], mode: Mode, device: Any) -> float:
    """Steps of runs per second that a block of these runs does, compiled and warm; from fresh states, thrown away."""
    first, size = runs[0], len(runs)
    prog, h = first.program, [hparams(run.config) for run in runs]
    states = [init_state(prog, h_, run.config.train.seed) for run, h_ in zip(runs, h, strict=True)]
    numbers = [{name: np.float32(x) for name, x in run.source.numbers.items()} for run in runs]
    states_R, h_R, numbers_R, data = jax.device_put(
        (stack(states, size), stack(h, size), stack(numbers, size), first.source.data()), device
    )
    feeds = [Feed(run.source.stream, int(h_.data_seed)) for run, h_ in zip(runs, h, strict=True)]
    batches_R = stack([feed.take(0, 0, STREAM_CHUNK) for feed in feeds], size)  # of None, None

    def dispatch(n: int) -> float:
        nonlocal states_R
        began = time.perf_counter()
        n_R = np.full(size, n, np.int32)
        states_R, _ = advance(prog, mode, states_R, n_R, h_R, numbers_R, data, batches_R)
        jax.block_until_ready(states_R)
        return time.perf_counter() - began

    dispatch(1)  # compiles
    n, most = 1, CHUNK if batches_R is None else STREAM_CHUNK
    while (seconds := dispatch(n)) < MEASURE_SECONDS and n < most:
        n = min(4 * n, most)
    return size * n / seconds
