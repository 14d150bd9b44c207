"""A sweep: which runs, in which folder, and how they get done, here or beside other processes on the same folder.

    from jaxgpt import RunConfig, product, sweep
    runs = sweep(product(RunConfig(), {"model.d_model": [32, 64], "train.steps": [200, 400]}), "results/raw/mine")

What is done is not done again: the same call after a kill, a stop or with more runs trains only what is missing.
"""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from jaxgpt import lease, parallel, prefix, store, track
from jaxgpt.config import BadInput, RunConfig, override, to_dict
from jaxgpt.forecast import check_memory, device_bytes
from jaxgpt.memory import largest_block
from jaxgpt.parallel import ONE_DEVICE, Lane, Layout
from jaxgpt.population import Block, Plan, blocks, choose, pieces, split
from jaxgpt.progress import Progress
from jaxgpt.run import Hooks, Run, Source, Stopped
from jaxgpt.tasks import text
from jaxgpt.train import train_block

if TYPE_CHECKING:
    import pandas

    from jaxgpt.profile import Profile

Setup = Callable[[RunConfig], Source]
WAIT_SECONDS = 1.0  # between looks at runs that other processes hold
LOOK_SECONDS = 0.05  # between looks of an idle lane at what another one may bring


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM (`signum`) stopped a sweep; what was done is on disk."""

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.signum = signum


# --- making configs ------------------------------------------------------------------------------------------------


def product(base: RunConfig, axes: Mapping[str, Sequence[Any]]) -> list[RunConfig]:
    """Every combination of the axes' values: `product(base, {'model.d_model': [32, 64], 'train.seed': [0, 1]})`."""
    _check_axes(axes)
    return [override(base, dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values())]


def zipped(base: RunConfig, axes: Mapping[str, Sequence[Any]]) -> list[RunConfig]:
    """The axes side by side: first values together, second values together, ... Raises BadInput for unequal lengths."""
    _check_axes(axes)
    lengths = {axis: len(values) for axis, values in axes.items()}
    if len(set(lengths.values())) > 1:
        raise BadInput(
            f"zipped axes need equally many values, not {', '.join(f'{a}: {n}' for a, n in lengths.items())}"
        )
    return [override(base, dict(zip(axes, values, strict=True))) for values in zip(*axes.values(), strict=True)]


def _check_axes(axes: Mapping[str, Any]) -> None:
    for axis, values in axes.items():
        if isinstance(values, str) or not hasattr(values, "__len__"):
            raise BadInput(f"{axis}={values} is not an axis; it must be a list of values, as in [{values}]")


# --- doing them ----------------------------------------------------------------------------------------------------


def plan(
    configs: Iterable[RunConfig],
    folder: Path | str,
    setup: Setup | None = None,
    *,
    layout: Layout = ONE_DEVICE,
    check: bool = True,
) -> list[Run]:
    """The runs of a sweep, each once, checked as far as can be without compiling. Nothing is written.

    check: whether they fit the devices of this process, spread as `layout` says; it starts JAX.
    """
    setup, runs = setup or text.reader(), {}
    for config in configs:
        source = setup(config)
        if check:
            check_memory(config, layout.size)
        if layout.size > 1:
            parallel.check(layout, config)
        run = Run(config, source, Path(folder))
        runs.setdefault(run.id, run)
    if not runs:
        raise BadInput("a sweep needs at least one run")
    return list(runs.values())


def sweep(
    configs: Iterable[RunConfig],
    folder: Path | str = "results/raw/sweep",
    *,
    setup: Setup | None = None,
    max_minutes: float | None = None,
    progress: bool = True,
    trackers: Sequence[str | track.Open] = (),
    devices: int | None = None,
    layout: Layout = ONE_DEVICE,
) -> pandas.DataFrame:
    """Trains what is not yet trained and returns the finished runs, one row each, in the order of `configs`.

    Runs that share a program are trained together, and populations spread over the devices; on a CPU each core is one.
    What several of them begin with is trained once, as prefix.py says.

    setup: what a config trains on; default: text, as `tasks.text.reader` says. max_minutes: stop cleanly after about
    this long; the table then lacks the unfinished runs. trackers: "tensorboard", "wandb" or one of your own, which are
    sent the curves too, as track.py says. devices: use so many; default: all. layout: how each model is spread over
    devices, if it is; after `parallel.start_hosts` over those of several hosts, which all make this call. Raises
    BadInput before anything is written, StoreError when the disk is full, and Interrupted on Ctrl-C or SIGTERM once
    the state is saved.
    """
    track.check(trackers)
    use_compilation_cache()
    lanes = lanes_of(layout, devices)
    runs = plan(configs, folder, setup, layout=layout)
    store.planned(folder)  # refuses a broken sweep.json before anything is written
    parallel.by_writer(lambda: store.prepare(folder) and None, f"write in {folder}")
    with stopping(max_minutes) as stop, Progress(runs, show=progress and parallel.is_writer()) as shown:
        parallel.by_writer(lambda: record(runs), f"write in {folder}")
        done = [parallel.agree(shown.skipped(run, store.read_row(folder, run.id))) for run in runs]
        pending = [run for run, is_done in zip(runs, done, strict=True) if not is_done]
        if any(done):
            shown.say("it is done already" if len(runs) == 1 else f"{sum(done)} of them are done already")
        lanes = _within_memory(lanes, pending)
        plans = _plans(runs, pending, lanes, shown, stop)
        waited: set[str] = set()
        while pending and not parallel.any_host(stop()):
            crew = _Crew(lanes, plans, stop, shown, trackers)
            crew.train(pending)
            left = [run for run in pending if run.id not in crew.done]
            # Runs that neither finished here nor were stopped are in other hands: look again later.
            if len(left) == len(pending) and not parallel.any_host(stop()):
                if held := next(((who, run.id) for run in left if (who := lease.holder(folder, run.id))), None):
                    # Without the age of its heartbeat, so that waiting is one line and not one a second.
                    line = f"waits for {held[0].rpartition(', ')[0]} to finish {held[1]}"
                    if line not in waited:
                        shown.say(line)
                    waited.add(line)
                time.sleep(WAIT_SECONDS)
            pending = left
        asked = parallel.any_host(bool(stop.signum))  # perhaps another host only
        signum = stop.signum or (signal.SIGTERM if asked else 0)
        finished = [row for run in runs if (row := store.read_row(folder, run.id))]
        for run in runs if trackers and parallel.is_writer() else ():
            if run.id not in shown.trained and not signum:
                _track_finished(run, shown, trackers)
    if signum:
        raise Interrupted(signum, f"{len(finished)} of {len(runs)} runs are done; {folder} holds the state")
    table = store.load_runs(folder)
    return table.set_index("run_id", drop=False).loc[[row["run_id"] for row in finished]].reset_index(drop=True)


class _Crew:
    """The lanes at work: each trains one block after the other. `done`: ids of the runs whose rows stand."""

    def __init__(
        self,
        lanes: Sequence[Lane],
        plans: Mapping[str, Plan],
        stop: Callable[[], bool],
        shown: Progress,
        trackers: Sequence[str | track.Open],
    ):
        self.lanes, self.plans, self.asked, self.shown, self.trackers = lanes, plans, stop, shown, trackers
        self.done: set[str] = set()
        self.errors: list[BaseException] = []
        self.queue: deque[Block] = deque()
        self.branches: dict[str, tuple[Run, ...]] = {}  # by id of the run that trains their beginning
        self.busy = 0  # lanes that train a block, after which there may be more of them
        self.lock = threading.Lock()

    def stop(self) -> bool:
        """Whether to stop: asked to, or another lane broke."""
        return self.asked() or bool(self.errors)

    def train(self, runs: Sequence[Run]) -> None:
        """Trains what is free of the runs. Raises what a lane raised, once the others have saved."""
        self._line_up(runs)
        lanes = self.lanes[: len(self.queue) + sum(map(len, self.branches.values()))]
        if len(lanes) == 1:
            self._lane(lanes[0])
        else:
            x64 = jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]
            # Daemons: a second Ctrl-C ends the process without waiting for them.
            threads = [threading.Thread(target=self._guarded, args=(lane, x64), daemon=True) for lane in lanes]
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():  # with a limit, so that signals are seen on every platform
                    thread.join(0.1)
        if self.errors:
            raise self.errors[0]

    def _line_up(self, runs: Sequence[Run]) -> None:
        """Queues the runs in blocks; those that another of them trains the beginning of come after it."""
        families = prefix.families(runs)
        populations = split([family.trunk for family in families])
        cuts = pieces(populations, len(self.lanes))
        found = [b for p, cut in zip(populations, cuts, strict=True) for b in blocks(p, self.plans[p.name], cut)]
        with self.lock:
            self.branches |= {family.trunk.id: family.branches for family in families}
            for branch in (branch for family in families for branch in family.branches):
                self.shown.rides(branch, prefix.branch_point(branch.config))
            # The largest first: what is left for the end is small, so that no lane waits long for another. What has
            # waited goes before them: the lane that asks next is likely to have compiled its program.
            found.sort(key=lambda block: -block.work)  # equal ones stay as they came
            self.queue.extendleft(found[::-1])

    def _guarded(self, lane: Lane, x64: bool) -> None:
        try:
            with jax.enable_x64(x64):  # JAX's contexts belong to a thread
                self._lane(lane)
        except BaseException as error:
            self.errors.append(error)

    def _lane(self, lane: Lane) -> None:
        while not parallel.any_host(self.stop()):
            with self.lock:
                block = self.queue.popleft() if self.queue else None
                if block is None and not self.busy:
                    return
                self.busy += block is not None
            if block is None:
                time.sleep(LOOK_SECONDS)
                continue
            try:
                self._block(block, lane)
            finally:
                with self.lock:
                    self.busy -= 1

    def _block(self, block: Block, lane: Lane) -> None:
        """Trains those runs of a block that nobody has trained and nobody trains, and queues what waited for them."""
        with ExitStack() as stack:
            hooks = {run.id: found for run in block.runs if (found := self._take(run, stack))}
            free = Block(tuple(run for run in block.runs if run.id in hooks), block.plan)
            riders: dict[str, list[Run]] = {run.id: [] for run in free.runs}
            for trunk, its in riders.items():
                for branch in self.branches[trunk]:
                    if found := self._take(branch, stack):  # its steps are none of this process's work
                        hooks[branch.id] = replace(found, report=lambda _: None)
                        its.append(branch)
            if free.runs:
                with suppress(Stopped):
                    train_block(free, lambda run: hooks[run.id], stop=self.stop, lane=lane, branches=riders)
        ready = [b for run in block.runs if run.id in self.done for b in self.branches[run.id] if b.id not in self.done]
        if ready:
            self._line_up(ready)

    def _take(self, run: Run, stack: ExitStack) -> Hooks | None:
        """The run's lease, tracker and what is told of it; None if it is done or in other hands."""
        row, held = store.read_row(run.folder, run.id), None

        def look() -> None:
            nonlocal row, held
            if row is None and (held := lease.acquire(run.folder, run.id)):
                stack.enter_context(held)
                # Between the look above and the lease, its last holder may have finished it.
                row = store.read_row(run.folder, run.id)

        parallel.by_writer(look, f"take run {run.id}")
        if parallel.agree(row is not None):
            self.done.add(run.id)
            if row is not None:
                self.shown.finished(run, row, here=False)
            return None
        if not parallel.agree(held is not None):
            return None
        mine: lease.Lease | None = held
        if mine is None:  # process 0 holds it, writes and tells
            return Hooks(finished=lambda _: self.done.add(run.id))
        tracker = track.start(self.trackers, run.folder, run.id, run.config, self.shown.say)
        unfinished = ExitStack()  # what is done with the tracker of a run that does not end here
        unfinished.callback(tracker.finish, None)
        stack.enter_context(unfinished)

        def finished(row: dict[str, Any]) -> None:
            unfinished.pop_all()
            tracker.finish(row)
            self.done.add(run.id)
            self.shown.finished(run, row, here=True)
            mine.release()

        return Hooks(mine.held, self.shown.report, tracker.log, finished)


def _track_finished(run: Run, shown: Progress, trackers: Sequence[str | track.Open]) -> None:
    """Sends what the trackers have not seen of a run that was done before, or by a process without them."""
    row = store.read_row(run.folder, run.id)
    if row is not None and (held := lease.acquire(run.folder, run.id)) is not None:
        with held:
            track.start(trackers, run.folder, run.id, run.config, shown.say).finish(row)


def _within_memory(lanes: list[Lane], runs: Sequence[Run]) -> list[Lane]:
    """As many lanes as may train at once: on a CPU all share one memory."""
    device = lanes[0].device
    if device is None or device.platform != "cpu" or not (have := device_bytes()):
        return lanes
    configs = {run.program: run.config for run in runs}.values()  # one of each population
    while len(lanes) > 1 and not all(largest_block(config, 1, False, have // len(lanes), "cpu") for config in configs):
        lanes = lanes[: len(lanes) // 2]
    return lanes


def _plans(
    runs: Sequence[Run], pending: Sequence[Run], lanes: Sequence[Lane], shown: Progress, stop: Callable[[], bool]
) -> dict[str, Plan]:
    """How each population that has runs to do is computed, by its name; what is measured is recorded at once."""
    device, waiting = lanes[0].device, {run.id for run in pending}
    if device is None:  # a model that needs several devices fills them
        return {population.name: Plan("map", 1) for population in split(runs)}
    populations, before, plans = split(runs), recorded_plans(runs[0].folder), {}
    have = device_bytes() // (len(lanes) if device.platform == "cpu" else 1)
    devices = f"{len(lanes)} x {device.device_kind}"
    for population, cut in zip(populations, pieces(populations, len(lanes)), strict=True):
        if waiting.isdisjoint(run.id for run in population.runs):
            continue
        old = Plan(**before.get(population.name, {"mode": "map", "block": 1}))
        if old.serves(devices, len(population.runs), have):
            plans[population.name] = old
            continue
        plans[population.name] = chosen = choose(population, cut, device, devices, have, shown.say, stop)
        if chosen.measured:  # it took time
            record(runs, {population.name: chosen})
    if not stop():  # while it was being measured: what was found is no plan, and an older one stands
        record(runs, plans)
    return plans


def expose(devices: int | None) -> list[Any]:
    """The devices that a sweep uses. On a CPU each core becomes one, unless JAX runs already, or JAX_NUM_CPU_DEVICES or
    XLA_FLAGS say how many there are. Raises BadInput for more than there are.
    """
    if "JAX_NUM_CPU_DEVICES" not in os.environ and "device_count" not in os.environ.get("XLA_FLAGS", ""):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        with suppress(RuntimeError):  # it runs already
            jax.config.update("jax_num_cpu_devices", max(cores, devices or 0))
    found = jax.local_devices()
    if devices is not None and not 1 <= devices <= len(found):
        there = f"; JAX has {len(found)} here" if devices > 0 else ""
        raise BadInput(f"devices={devices} is not allowed; it must be 1 or more{there}")
    return found[:devices]


def lanes_of(layout: Layout, devices: int | None) -> list[Lane]:
    """Where blocks are trained: `expose`'s devices, each by itself, or as meshes that hold one model each."""
    several_hosts = jax.distributed.is_initialized()  # asking for their number would start JAX before it is told more
    found = jax.devices() if several_hosts else expose(devices)
    if layout.size == 1 and not several_hosts:
        return [Lane(device) for device in found]
    return [Lane(mesh=mesh, layout=layout) for mesh in parallel.lanes(layout, found)]


def profile(config: RunConfig, folder: Path | str, *, setup: Setup | None = None) -> Profile:
    """Times and traces a few steps of a run from a fresh state, whether it is done or not: see profile.py. The trace
    goes to `<folder>/profile/<run_id>`.
    """
    from jaxgpt.profile import profile

    use_compilation_cache()
    (run,) = plan([config], folder, setup)
    store.prepare(folder)
    return profile(run, run.folder / "profile" / run.id)


def recorded_plans(folder: Path) -> dict[str, dict[str, Any]]:
    """How populations were computed in this folder before, by name, as `record` wrote it."""
    path = folder / "sweep.json"
    return store.read_json(path).get("plans", {}) if path.exists() else {}


def record(runs: Sequence[Run], plans: Mapping[str, Plan] | None = None) -> None:
    """Adds the runs to the folder's sweep.json, beside those that earlier calls planned there.

    `runs`: by id, with the code version that planned each first. `plans`: how each population is computed, by name.
    `last_planned_with`: what wrote the file last. What a run was trained with stands in its row.
    """
    folder = runs[0].folder
    while (held := lease.acquire(folder, "sweep")) is None:
        time.sleep(0.1)
    with held:
        before, now = store.planned(folder), store.code_version()
        planned = {
            run.id: {
                "config": to_dict(run.config),
                "identity": run.source.identity,
                "planned_by": before.get(run.id, {}).get("planned_by", now),
            }
            for run in runs
        }
        with_what = {
            "code_version": now,
            "versions": store.package_versions(),
            "device": f"{jax.local_device_count()} x {jax.local_devices()[0].device_kind}",
            "cores": os.cpu_count(),
        }
        ways = recorded_plans(folder) | {name: asdict(plan) for name, plan in (plans or {}).items()}
        now_there = {"runs": before | planned, "plans": ways, "last_planned_with": with_what}
        store.write_json(folder / "sweep.json", now_there)


def use_compilation_cache() -> None:
    """Programs that were compiled once on this machine are read back. JAX_COMPILATION_CACHE_DIR says where they lie."""
    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxgpt" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(folder))
    # By default JAX keeps only what took a second to compile; small programs add up to seconds too.
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


class _Stop:
    """Whether to stop, and why: a signal's number, or a deadline."""

    def __init__(self, seconds: float | None):
        self.signum = 0
        self.deadline = None if seconds is None else time.monotonic() + seconds

    def __call__(self) -> bool:
        return bool(self.signum) or (self.deadline is not None and time.monotonic() > self.deadline)


@contextmanager
def stopping(max_minutes: float | None) -> Iterator[_Stop]:
    """Ctrl-C and SIGTERM ask for a clean stop while inside; a second one ends at once, as Python does by itself."""
    stop = _Stop(None if max_minutes is None else 60 * max_minutes)

    def ask(signum: int, _frame: Any) -> None:
        if stop.signum:
            raise KeyboardInterrupt
        stop.signum = signum

    # Only the main thread may set handlers; in another one the caller's stand.
    signals = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {signum: signal.signal(signum, ask) for signum in signals}
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
