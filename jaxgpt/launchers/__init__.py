"""Where a sweep's populations execute: in worker processes of this machine, as Slurm jobs, or as Ray tasks.

    from jaxgpt.launchers import launch
    runs = launch(configs, "results/raw/mine", workers=4)          # or launcher="slurm", or launcher="ray"

A job is the runs of one population. Executing it is calling `jaxgpt.launch.sweep` in another process, on the shared
results folder: leases keep two processes off one run, and what a job had done when it died is on disk. So there is one
loop for all launchers (`supervise`), which starts a job again until its runs are done, and one small `Executor` for
each, which starts jobs and says how they ended.
"""

from __future__ import annotations

import os
import pickle
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import jax

from jaxgpt import checkpoint, population, store, track
from jaxgpt.config import BadInput, RunConfig
from jaxgpt.launch import Interrupted, Setup, plan, record, stopping, sweep
from jaxgpt.parallel import ONE_DEVICE, Layout
from jaxgpt.prefix import families
from jaxgpt.progress import PLAIN_SECONDS, Progress
from jaxgpt.run import Run

if TYPE_CHECKING:
    import pandas

Launcher = Literal["local", "slurm", "ray"]
Ticket = Hashable  # what an executor calls a job that it has started

DONE, DIED, REFUSED, UNFINISHED = 0, 1, 2, 75  # how a job ends; 75: saved, and asks to be run again
MOST_DEATHS = 3  # of one job in a row without a step that lasted; then it is given up
LOOK_SECONDS = 0.5  # between looks at the jobs


# --- what is executed ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """Runs that train together, and what `sweep` needs to train them. Crosses to other processes by pickle."""

    name: str
    configs: tuple[RunConfig, ...]
    runs: tuple[str, ...]  # ids, in the order of configs
    folder: Path  # absolute
    setup: Setup | None = None
    trackers: tuple[str | track.Open, ...] = ()
    cores: int | None = None  # where JAX runs on the CPU: so many devices; None: as `sweep` says
    layout: Layout = ONE_DEVICE  # of each model over the job's devices

    @property
    def log(self) -> Path:
        """What the job says; each start adds to it."""
        return self.folder / "logs" / f"{self.runs[0]}.log"


@dataclass(frozen=True)
class Resources:
    """What each job asks of Slurm or Ray, and where that Ray is."""

    job_minutes: int = 60  # Slurm: its time limit; a job saves before, and is put back in the queue
    partition: str | None = None  # Slurm
    gpus: int = 0
    cpus: int = 1
    memory_gb: float | None = None
    address: str | None = None  # Ray: a running cluster's; None: one of our own on this machine


@dataclass(frozen=True)
class Ended:
    """How a job ended: one of the codes above, and for people a line on why."""

    code: int
    why: str


class Executor(Protocol):
    """Starts jobs somewhere and says how they ended."""

    def under_way(self) -> Mapping[Ticket, Sequence[str]]:
        """Jobs that an earlier launch left behind and that still run or queue: the ids of their runs."""
        ...

    def start(self, jobs: Sequence[Job]) -> Sequence[Ticket]:
        """Starts the first of these jobs, as many as there is room for."""
        ...

    def poll(self, tickets: Sequence[Ticket]) -> Mapping[Ticket, Ended]:
        """Those that have ended since; waits up to LOOK_SECONDS for the first."""
        ...

    def stop(self, tickets: Sequence[Ticket]) -> str:
        """Has the jobs save and end. Returns what goes on all the same, in words; "" if nothing does."""
        ...

    def close(self) -> None:
        """Ends what is left of it."""
        ...


def execute(job: Job) -> int:
    """Does a job in this process: DONE, or UNFINISHED after SIGTERM or Ctrl-C. Raises what `sweep` raises."""
    if job.cores is not None:  # neither Slurm nor Ray need hold a job to the cores that it asked for
        os.environ["JAX_NUM_CPU_DEVICES"] = str(job.cores)  # for `sweep`; JAX has read it already
        with suppress(RuntimeError):  # JAX runs already
            jax.config.update("jax_num_cpu_devices", job.cores)
    try:
        sweep(job.configs, job.folder, setup=job.setup, trackers=job.trackers, layout=job.layout)
    except Interrupted:
        return UNFINISHED
    return DONE


def standing(folder: Path, runs: Sequence[str]) -> tuple[int, ...]:
    """How far runs are, on disk: the step of the newest checkpoint; -1: none; -2: it is done."""

    def stands(run: str) -> int:
        return -2 if store.read_row(folder, run) else max(checkpoint.steps(folder / "checkpoints" / run), default=-1)

    return tuple(stands(run) for run in runs)


# --- bringing jobs to their end ------------------------------------------------------------------------------------


class Failed(RuntimeError):
    """Some jobs were given up; the message says which and why, a line each. `table`: the runs that are done."""

    def __init__(self, reasons: Sequence[str], table: pandas.DataFrame):
        super().__init__("\n".join(reasons))
        self.table = table


def launch(
    configs: Iterable[RunConfig],
    folder: Path | str = "results/raw/sweep",
    *,
    launcher: Launcher = "local",
    workers: int | None = None,
    resources: Resources | None = None,
    setup: Setup | None = None,
    max_minutes: float | None = None,
    progress: bool = True,
    trackers: Sequence[str | track.Open] = (),
    layout: Layout = ONE_DEVICE,
) -> pandas.DataFrame:
    """`jaxgpt.launch.sweep` in other processes: trains what is not yet trained, waits, and returns the finished runs,
    one row each, in the order of `configs`.

    launcher: "local": `workers` processes on this machine, none (the default): in this process. "slurm": each
    population is a task of a job array. "ray": each is a task of a cluster; with both, `workers` is how many may run at
    once (default: as many as the cluster lets). resources: what each job asks of Slurm or Ray. setup: as for `sweep`,
    but a function that other processes can import.

    max_minutes: stop after about so long. Jobs in Slurm go on when this process stops; the same call waits for them.
    With jobs, JAX is started on the CPU in this process, unless it runs already: accelerators are for the jobs.
    Raises BadInput before anything is started, Interrupted on Ctrl-C or SIGTERM once the state is saved, and Failed at
    the end if a job was refused or died MOST_DEATHS times in a row without getting further.
    """
    configs, folder = list(configs), Path(folder)
    check(launcher, workers, resources, setup, trackers, layout)
    if launcher == "local" and workers is None:
        return sweep(configs, folder, setup=setup, max_minutes=max_minutes, progress=progress, trackers=trackers,
                     layout=layout)  # fmt: skip
    jax.config.update("jax_platforms", "cpu")  # does nothing where JAX runs already
    runs = plan(configs, folder, setup, layout=layout, check=False)  # each job asks about its own memory
    store.planned(folder)  # refuses a broken sweep.json before anything is written
    executor = _executor(launcher, folder, workers, resources or Resources())
    store.prepare(folder)
    record(runs)
    with closing(executor), stopping(max_minutes) as stop, Progress(runs, show=progress) as shown:
        watch = _Watch(runs, shown)
        todo = {run.id: run for run in watch.pending}
        going = {ticket: [todo.pop(i) for i in ids if i in todo] for ticket, ids in executor.under_way().items()}
        cores = None if launcher == "local" else (resources or Resources()).cpus
        job = partial(job_of, setup=setup, trackers=trackers, cores=cores, layout=layout)
        left = {ticket: job(group) for ticket, group in going.items() if group}
        if left:
            shown.say(f"waits for {len(left)} job{'s' * (len(left) > 1)} of an earlier launch")
        jobs = [job(part) for part in parts_of(list(todo.values()), launcher, workers)]
        failed, goes_on = supervise(jobs, executor, left=left, stop=stop, tick=watch.look, say=shown.say)
        watch.look(0)
    table = _finished(runs, folder)
    if stop.signum:
        message = f"{len(table)} of {len(runs)} runs are done; {folder} holds the state"
        raise Interrupted(stop.signum, f"{message}; {goes_on}" if goes_on else message)
    if failed:
        raise Failed(failed, table)
    return table


def supervise(
    jobs: Sequence[Job],
    executor: Executor,
    *,
    left: Mapping[Ticket, Job] | None = None,
    stop: Callable[[], bool] = lambda: False,
    tick: Callable[[int], None] = lambda _: None,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[list[str], str]:
    """Starts jobs, and again those that died or asked for it, until the runs of all are done or the job is given up.

    left: jobs under way already. tick: called between looks with the number of jobs under way. Returns a line for each
    job that was given up, and what goes on all the same after a stop.
    """
    waiting, running, failed = list(jobs), dict(left or {}), []
    deaths, before = Counter[str](), {job.name: standing(job.folder, job.runs) for job in (*waiting, *running.values())}
    while (waiting or running) and not stop():
        tickets = executor.start(waiting) if waiting else ()
        running |= zip(tickets, waiting, strict=False)
        waiting = waiting[len(tickets) :]
        ended = executor.poll(list(running))
        for ticket, end in ended.items():
            job = running.pop(ticket)
            now = standing(job.folder, job.runs)
            if all(step == -2 for step in now):
                continue
            # What gets further may be interrupted as often as it likes: it ends all the same.
            deaths[job.name] = deaths[job.name] + 1 if now == before[job.name] else 0
            before[job.name] = now
            if end.code == REFUSED:
                failed.append(f"{job.name}: {end.why}")
            elif deaths[job.name] >= MOST_DEATHS:
                failed.append(f"{job.name} is given up, it got no further {MOST_DEATHS} times: {end.why}")
            else:
                say(f"{job.name} {'goes on' if end.code == UNFINISHED else 'is started again'}: {end.why}")
                waiting.append(job)
        tick(len(running))
    return failed, executor.stop(list(running)) if running else ""


def parts_of(runs: Sequence[Run], launcher: str, workers: int | None) -> list[Sequence[Run]]:
    """The runs of each job: a population, and for workers of this machine a part of one where some would be idle."""
    groups = [group.runs for group in population.split(runs)]
    return [*divide(groups, workers)] if launcher == "local" and workers else [*groups]


def divide(groups: Sequence[Sequence[Run]], least: int) -> list[list[Run]]:
    """The groups, the largest halved until there are at least so many, so that no worker is idle from the start. Runs
    that share a trunk stay together: apart, each would train the beginning for itself.
    """
    parts = [
        sorted(((f.trunk, *f.branches) for f in families(group)), key=lambda family: -family[0].config.tokens)
        for group in groups
    ]
    while parts and len(parts) < least:
        largest = max(range(len(parts)), key=lambda i: len(parts[i]))
        part = parts[largest]
        if len(part) == 1:
            break
        parts[largest : largest + 1] = [part[::2], part[1::2]]  # long and short ones in both
    return [[run for family in part for run in family] for part in parts]


def job_of(
    runs: Sequence[Run],
    setup: Setup | None = None,
    trackers: Sequence[str | track.Open] = (),
    cores: int | None = None,
    layout: Layout = ONE_DEVICE,
) -> Job:
    """The job that trains these runs, of one folder."""
    ids = tuple(run.id for run in runs)
    name = f"job {ids[0]}" + (f" (and {len(ids) - 1} more runs)" if len(ids) > 1 else "")
    return Job(name, tuple(run.config for run in runs), ids, runs[0].folder.absolute(), setup, tuple(trackers),
               cores, layout)  # fmt: skip


class _Watch:
    """Says which runs are done, as their rows appear, and how many jobs are under way."""

    def __init__(self, runs: Sequence[Run], shown: Progress):
        self.shown, self.total, self.said_at = shown, len(runs), time.monotonic()
        self.pending = [run for run in runs if not shown.skipped(run, store.read_row(run.folder, run.id))]
        if len(self.pending) < self.total:
            shown.say(f"{self.total - len(self.pending)} of them are done already")

    def look(self, under_way: int) -> None:
        rows = {run.id: row for run in self.pending if (row := store.read_row(run.folder, run.id))}
        for run in self.pending:
            if run.id in rows:
                self.shown.finished(run, rows[run.id], here=True)
        self.pending = [run for run in self.pending if run.id not in rows]
        done = self.total - len(self.pending)
        state = f"{done} of {self.total} runs are done, {under_way} job{'s' * (under_way != 1)} under way"
        self.shown.bars.update(self.shown.bar, state=state)
        if not self.shown.console.is_terminal and time.monotonic() - self.said_at >= PLAIN_SECONDS:
            self.said_at = time.monotonic()
            self.shown.say(state)


def _finished(runs: Sequence[Run], folder: Path) -> pandas.DataFrame:
    done = [run.id for run in runs if store.read_row(folder, run.id)]
    return store.load_runs(folder).set_index("run_id", drop=False).loc[done].reset_index(drop=True)


# --- which one -----------------------------------------------------------------------------------------------------


def check(
    launcher: str,
    workers: int | None,
    resources: Resources | None,
    setup: Any = None,
    trackers: Any = (),
    layout: Layout = ONE_DEVICE,
) -> None:
    """Raises BadInput for what cannot be launched. The arguments are those of `launch`; JAX is not asked anything."""
    track.check(trackers)
    if launcher not in get_args(Launcher):
        raise BadInput(f"launcher={launcher} is not allowed; it must be one of {', '.join(get_args(Launcher))}")
    if workers is not None and workers < 1:
        raise BadInput(f"workers={workers} is not allowed; it must be 1 or more")
    unused = {"local": ("job_minutes", "partition", "gpus", "cpus", "memory_gb", "address"), "slurm": ("address",),
              "ray": ("job_minutes", "partition")}[launcher]  # fmt: skip
    given = [name for name in unused if getattr(resources or Resources(), name) != getattr(Resources(), name)]
    if given:
        raise BadInput(f"{given[0]}={getattr(resources, given[0])} does nothing with launcher={launcher}")
    for name, least in (("job_minutes", 1), ("gpus", 0), ("cpus", 1), ("memory_gb", 0)):
        if (value := getattr(resources or Resources(), name)) is not None and value < least:
            raise BadInput(f"{name}={value} is not allowed; it must be {least} or more")
    if launcher == "local" and workers is None:
        return
    asked = resources or Resources()
    if launcher == "local" and (workers or 0) > 1 and layout.size > 1:
        raise BadInput(f"layout {layout} is not for workers={workers}, which share the devices; leave workers out")
    if launcher != "local" and layout.size > (asked.gpus or asked.cpus):
        raise BadInput(
            f"layout.data={layout.data} x layout.model={layout.model} needs {layout.size} devices; "
            f"each job has {f'gpus={asked.gpus}' if asked.gpus else f'cpus={asked.cpus}'}"
        )
    for name, value in (("setup", setup), *(("trackers", one) for one in trackers)):
        try:
            pickle.dumps(value)
            importable = getattr(value, "__module__", None) != "__main__"
        except Exception:  # pickle raises what it likes
            importable = False
        if not importable:
            raise BadInput(
                f"{name}={getattr(value, '__qualname__', value)} cannot be imported by another process; it must be a "
                "function at the top level of a module"
            )


def _executor(launcher: str, folder: Path, workers: int | None, resources: Resources) -> Executor:
    if launcher == "slurm":
        from jaxgpt.launchers.slurm import Slurm

        return Slurm(folder, resources, workers)
    if launcher == "ray":
        from jaxgpt.launchers.ray_cluster import Ray

        return Ray(resources, workers)
    from jaxgpt.launchers.local import Workers

    return Workers(workers or 1)
