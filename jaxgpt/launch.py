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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from jaxgpt import flops, lease, store, track
from jaxgpt.config import BadInput, RunConfig, override, run_id, to_dict
from jaxgpt.progress import Progress
from jaxgpt.step import program
from jaxgpt.tasks import text
from jaxgpt.train import Run, Source, Stopped, train

if TYPE_CHECKING:
    import pandas

    from jaxgpt.profile import Profile

Setup = Callable[[RunConfig], Source]
WAIT_SECONDS = 1.0  # between looks at runs that other processes hold


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


def plan(configs: Iterable[RunConfig], folder: Path | str, setup: Setup | None = None) -> list[Run]:
    """The runs of a sweep, each once, checked as far as can be without compiling. Nothing is written."""
    setup, runs = setup or text.reader(), {}
    for config in configs:
        source = setup(config)
        _check_memory(config)
        runs.setdefault(run_id(config, source.identity), Run(config, source, Path(folder)))
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
) -> pandas.DataFrame:
    """Trains what is not yet trained and returns the finished runs, one row each, in the order of `configs`.

    setup: what a config trains on; default: text, as `tasks.text.reader` says. max_minutes: stop cleanly after about
    this long; the table then lacks the unfinished runs. trackers: "tensorboard", "wandb" or one of your own, which are
    sent the curves too, as track.py says. Raises BadInput before anything is written, StoreError when the disk is
    full, and Interrupted on Ctrl-C or SIGTERM once the state is saved.
    """
    track.check(trackers)
    _use_compilation_cache()
    runs = plan(configs, folder, setup)
    store.planned(folder)  # refuses a broken sweep.json before anything is written
    store.prepare(folder)
    record(runs)
    with _stopping(max_minutes) as stop, Progress(runs, show=progress) as shown:
        pending = [run for run in runs if not shown.skipped(run, store.read_row(folder, run.id))]
        if len(pending) < len(runs):
            done = len(runs) - len(pending)
            shown.say("it is done already" if len(runs) == 1 else f"{done} of them are done already")
        while pending and not stop():
            left = [run for run in pending if not stop() and not _done(run, stop, shown, trackers)]
            # Runs that neither finished here nor were stopped are in other hands: look again later.
            if len(left) == len(pending) and not stop():
                if who := lease.holder(folder, left[0].id):
                    # Without the age of its heartbeat, so that waiting is one line and not one a second.
                    shown.say(f"waits for {who.rpartition(', ')[0]} to finish {left[0].id}")
                time.sleep(WAIT_SECONDS)
            pending = left
        finished = [row for run in runs if (row := store.read_row(folder, run.id))]
        for run in runs if trackers else ():
            if run.id not in shown.trained and not stop.signum:
                _track_finished(run, shown, trackers)
    if stop.signum:
        raise Interrupted(stop.signum, f"{len(finished)} of {len(runs)} runs are done; {folder} holds the state")
    table = store.load_runs(folder)
    return table.set_index("run_id", drop=False).loc[[row["run_id"] for row in finished]].reset_index(drop=True)


def _done(run: Run, stop: Callable[[], bool], shown: Progress, trackers: Sequence[str | track.Open]) -> bool:
    """Trains a run if nobody has and nobody does. True once its row stands."""
    if row := store.read_row(run.folder, run.id):
        shown.finished(run, row, here=False)
        return True
    held = lease.acquire(run.folder, run.id)
    if held is None:
        return False
    with held:
        # Between the look above and the lease, its last holder may have finished it.
        if row := store.read_row(run.folder, run.id):
            shown.finished(run, row, here=False)
            return True
        tracker = track.start(trackers, run.folder, run.id, run.config, shown.say)
        done: dict[str, Any] | None = None
        try:
            row = done = train(run, stop=stop, held=held.held, report=shown.report, log=tracker.log)
        except Stopped:
            return False
        finally:
            tracker.finish(done)
    shown.finished(run, row, here=True)
    return True


def _track_finished(run: Run, shown: Progress, trackers: Sequence[str | track.Open]) -> None:
    """Sends what the trackers have not seen of a run that was done before, or by a process without them."""
    row = store.read_row(run.folder, run.id)
    if row is not None and (held := lease.acquire(run.folder, run.id)) is not None:
        with held:
            track.start(trackers, run.folder, run.id, run.config, shown.say).finish(row)


def profile(config: RunConfig, folder: Path | str, *, setup: Setup | None = None) -> Profile:
    """Times and traces a few steps of a run from a fresh state, whether it is done or not: see profile.py. The trace
    goes to `<folder>/profile/<run_id>`.
    """
    from jaxgpt.profile import profile

    _use_compilation_cache()
    (run,) = plan([config], folder, setup)
    store.prepare(folder)
    return profile(run, run.folder / "profile" / run.id)


def record(runs: Sequence[Run]) -> None:
    """Adds the runs to the folder's sweep.json, beside those that earlier calls planned there.

    `runs`: by id, with the code version that planned each first. `last_planned_with`: what wrote the file last. What
    a run was trained with stands in its row.
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
            "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "cores": os.cpu_count(),
        }
        store.write_json(folder / "sweep.json", {"runs": before | planned, "last_planned_with": with_what})


def _use_compilation_cache() -> None:
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
def _stopping(max_minutes: float | None) -> Iterator[_Stop]:
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


# --- before it starts ----------------------------------------------------------------------------------------------


def _check_memory(config: RunConfig) -> None:
    """Raises BadInput for a run that surely does not fit the device. By a lower bound: passing proves nothing."""
    need, have = flops.training_bytes(config), _device_bytes()
    if have and need > have:
        raise BadInput(
            f"model.d_model={config.model.d_model}, model.n_layers={config.model.n_layers}, train.batch_size="
            f"{config.train.batch_size}: training needs at least {need / 1e9:,.1f} GB and the device has "
            f"{have / 1e9:,.1f} GB; make one of them smaller or raise train.microbatches"
        )


def _device_bytes() -> int:
    """Memory of a device in bytes; 0 where it is not known."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return (device.memory_stats() or {}).get("bytes_limit", 0)


def estimate_seconds(runs: Sequence[Run]) -> float:
    """A rough forecast of the time that the unfinished runs take.

    From the speed of finished runs in the same folder where there are some, else from the speed of a matrix product
    of each model's width, and COMPILE_SECONDS for each program.
    """
    todo = [run for run in runs if store.read_row(run.folder, run.id) is None]
    work = {run.id: flops.flops_exact(run.config.model, run.config.tokens, attention="full") for run in runs}
    rows = {run.id: row for run in runs if (row := store.read_row(run.folder, run.id)) and row["wall_seconds"]}
    if rows:
        rate = sum(work[i] for i in rows) / sum(row["wall_seconds"] for row in rows.values())
        return sum(work[run.id] for run in todo) / rate
    programs = {program(run.config, run.source.task) for run in todo}
    rates = {width: _matmul_flops_per_second(width) for width in {run.config.model.d_model for run in todo}}
    seconds = sum(work[run.id] / (STEP_EFFICIENCY * rates[run.config.model.d_model]) for run in todo)
    return seconds + COMPILE_SECONDS * len(programs)


# Measured on 2 CPU cores over the demo's models; for a forecast only.
COMPILE_SECONDS = 6.0
STEP_EFFICIENCY = 0.3


def _matmul_flops_per_second(width: int) -> float:
    """Speed of [2048, width] x [width, 4 width] on this device, FLOPs per second; the best of three."""
    product = jax.jit(lambda x_BxD, w_DxF: x_BxD @ w_DxF)
    x_BxD, w_DxF = jax.numpy.ones((2048, width)), jax.numpy.ones((width, 4 * width))
    product(x_BxD, w_DxF).block_until_ready()
    times = []
    for _ in range(3):
        began = time.perf_counter()
        for _ in range(10):
            out = product(x_BxD, w_DxF)
        out.block_until_ready()
        times.append((time.perf_counter() - began) / 10)
    return 2 * 2048 * 4 * width**2 / min(times)
