"""Slurm: each population a task of a job array, submitted by submitit, that puts itself back in the queue.

Ahead of its time limit (and when somebody sends SIGTERM) a job saves, asks Slurm to requeue it and exits with code 75;
so it goes on also when nobody waits for it. submitit's own way, which pickles from inside a signal handler and counts
time-outs, is not used: what a run needs to go on is on disk already. After `scancel` or a preemption Slurm has decided
what becomes of the job, and it asks for nothing.

What the waiting process knows comes from `squeue`, which every Slurm has (`sacct` needs a data base): a job that is no
longer listed has ended, and its runs' rows say whether it is done.
"""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxgpt import store
from jaxgpt.config import BadInput
from jaxgpt.launchers import DIED, LOOK_SECONDS, MOST_DEATHS, UNFINISHED, Ended, Job, Resources, Ticket, standing
from jaxgpt.launchers.worker import Parcel, attempt, parcel

WARNING_SECONDS = 90  # before the time limit: for a dispatch to end and the state to be saved
ASK_SECONDS = 5.0  # between calls of squeue, which all users of a cluster share
SETTLE_SECONDS = 20.0  # for a shared disk to show what a job that has ended wrote


class Slurm:
    """The executor. submit: submits jobs and returns their Slurm ids; queue: ids of this user's jobs that have not
    ended, None if Slurm does not answer. Both default to the real ones.
    """

    def __init__(
        self,
        folder: Path,
        resources: Resources,
        at_once: int | None = None,
        submit: Callable[[Sequence[Job]], Sequence[str]] | None = None,
        queue: Callable[[], set[str] | None] | None = None,
    ):
        self.folder = folder / "slurm"
        self.submit = submit or _submitter(self.folder, resources, at_once)
        self.queue = queue or squeue
        self.known: Mapping[Ticket, Sequence[str]] = {}  # submitted and not known to have ended: the ids of their runs
        self.gone: dict[Ticket, float] = {}  # since when it is not listed
        self.asked_at, self.listed = -1e9, set[str]()

    def under_way(self) -> Mapping[Ticket, Sequence[str]]:
        """Jobs of earlier launches on this folder that still queue or run."""
        path = self.folder / "jobs.json"
        before = store.read_json(path) if path.exists() else {}
        listed = self.queue() if before else set()
        if listed is None:
            raise BadInput("launcher=slurm: squeue does not answer, so jobs that still run cannot be told from others")
        self.known = {ticket: runs for ticket, runs in before.items() if ticket in listed}
        return self.known

    def start(self, jobs: Sequence[Job]) -> Sequence[Ticket]:
        """Submits all of them, as one array."""
        tickets = self.submit(jobs)
        self.known = {**self.known, **{t: list(job.runs) for t, job in zip(tickets, jobs, strict=True)}}
        self.folder.mkdir(parents=True, exist_ok=True)
        store.write_json(self.folder / "jobs.json", self.known)
        self.asked_at = -1e9
        return tickets

    def poll(self, tickets: Sequence[Ticket]) -> Mapping[Ticket, Ended]:
        """Those that Slurm no longer lists, once what they left behind can be seen."""
        time.sleep(LOOK_SECONDS)
        now = time.monotonic()
        if now - self.asked_at >= ASK_SECONDS:
            self.asked_at = now
            self.listed = listed if (listed := self.queue()) is not None else self.listed | {str(t) for t in tickets}
        ended = {}
        for ticket in tickets:
            if str(ticket) in self.listed:
                self.gone.pop(ticket, None)
                continue
            since = self.gone.setdefault(ticket, now)
            left = self._left(str(ticket))
            if left is not None or now - since >= SETTLE_SECONDS:
                ended[ticket] = left or Ended(DIED, f"Slurm ended its job {ticket}; see {self._log(str(ticket))}")
        return ended

    def stop(self, tickets: Sequence[Ticket]) -> str:
        """Leaves them: they need nobody to wait for them."""
        ids = " ".join(sorted({str(ticket).partition("_")[0] for ticket in tickets}))
        return f"{len(tickets)} jobs go on in Slurm (`scancel {ids}` ends them); the same command waits for them"

    def close(self) -> None:
        """Nothing is held."""

    def _left(self, ticket: str) -> Ended | None:
        path = self.folder / f"{ticket}_0_result.pkl"
        try:
            outcome, result = pickle.loads(path.read_bytes())
        except (OSError, EOFError, pickle.UnpicklingError):
            return None
        return result if outcome == "success" else Ended(DIED, f"see {self._log(ticket)}")

    def _log(self, ticket: str) -> Path:
        return self.folder / f"{ticket}_0_log.out"


def squeue() -> set[str] | None:
    """Ids of this user's jobs that wait, run or end just now: "12" or, of an array, "12_0". None: no answer."""
    try:
        # %F: id of the array, %K: index in it.
        command = ["squeue", "--me", "--noheader", "--array", "--format=%F_%K"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (subprocess.SubprocessError, OSError):
        return None
    return {line.strip().removesuffix("_N/A") for line in said.splitlines() if line.strip()}


def _submitter(folder: Path, resources: Resources, at_once: int | None) -> Callable[[Sequence[Job]], Sequence[str]]:
    """Submits through submitit. Raises BadInput where that or Slurm is missing."""
    try:
        import submitit  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise BadInput("launcher=slurm needs the package submitit: pip install -e '.[slurm]'") from None
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        raise BadInput("launcher=slurm needs Slurm's commands sbatch, srun and squeue; they are not on this machine")

    def submit(jobs: Sequence[Job]) -> Sequence[str]:
        executor = submitit.SlurmExecutor(folder)
        wanted: dict[str, Any] = {
            "job_name": "jaxgpt",
            "time": resources.job_minutes,
            "partition": resources.partition,
            "cpus_per_task": resources.cpus,
            "gpus_per_node": resources.gpus or None,
            "mem": resources.memory_gb,
            "signal_delay_s": min(WARNING_SECONDS, 20 * resources.job_minutes),
            "array_parallelism": at_once,
            "additional_parameters": {"requeue": True},  # also after the death of a node
            "srun_args": [f"--cpus-per-task={resources.cpus}"],  # which srun takes from nobody since Slurm 22.05
            "stderr_to_stdout": True,
        }
        executor.update_parameters(**{name: value for name, value in wanted.items() if value is not None})
        try:
            if len(jobs) == 1:
                return [executor.submit(work, parcel(jobs[0]), jobs[0].folder, jobs[0].runs).job_id]
            folders, runs = zip(*((job.folder, job.runs) for job in jobs), strict=True)
            return [job.job_id for job in executor.map_array(work, [parcel(job) for job in jobs], folders, runs)]
        except submitit.core.utils.FailedJobError as error:
            reason = " ".join(str(error).split())
            raise BadInput(f"launcher=slurm: Slurm does not take the jobs: {reason[-300:]}") from None

    return submit


def work(sent: Parcel, folder: Path, runs: Sequence[str]) -> Ended:
    """Does a job inside a Slurm allocation. Exits with code 75 when it was stopped and has asked to be requeued."""
    before = standing(folder, runs)
    (folder / "slurm" / f"{_name()}_0_result.pkl").unlink(missing_ok=True)  # of an earlier start of this job
    # submitit would requeue from inside the handler, without saving. SIGTERM is what a sweep saves on.
    signal.signal(signal.SIGUSR2, lambda *_: signal.raise_signal(signal.SIGTERM))
    ended = attempt(sent)
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    # One that gets no further is not requeued for ever.
    if ended.code == UNFINISHED and (standing(folder, runs) != before or restarts < MOST_DEATHS) and _requeue():
        sys.exit(UNFINISHED)
    return ended


def _requeue() -> bool:
    """Puts this job back in the queue, if it is for us to decide; whether that was done."""
    asked = ["squeue", "--noheader", f"--jobs={_name()}", "--format=%T"]
    state = subprocess.run(asked, capture_output=True, text=True, timeout=60, check=False).stdout.strip()
    if state != "RUNNING":  # cancelled or preempted
        return False
    return subprocess.run(["scontrol", "requeue", _name()], timeout=60, check=False).returncode == 0


def _name() -> str:
    """This job's id: "12" or, in an array, "12_0"."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]
