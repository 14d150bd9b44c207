"""Supervised worker processes on this machine: any one may die, its job is given to another.

A worker is `python -m jaxgpt.launchers.worker`, not a fork (JAX hangs after one) and not multiprocessing's spawn, which
needs a guarded main module. It is given jobs through its stdin, one after another, and ends when that is closed, so it
never outlives this process by more than a save.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import selectors
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from jaxgpt.launchers import DIED, LOOK_SECONDS, Ended, Job, Ticket
from jaxgpt.launchers.worker import parcel


class Workers:
    """The executor: at most `count` processes, each with its share of this machine's cores and GPUs."""

    def __init__(self, count: int):
        self.count = count
        self.started = 0
        self.busy: dict[Ticket, _Worker] = {}
        self.idle: list[_Worker] = []

    def under_way(self) -> Mapping[Ticket, Sequence[str]]:
        """None: workers do not outlive their launcher."""
        return {}

    def start(self, jobs: Sequence[Job]) -> Sequence[Ticket]:
        """Gives jobs to workers that are free, and to new ones while there are fewer than `count`."""
        tickets = []
        for worker in [worker for worker in self.idle if worker.process.poll() is not None]:
            self.idle.remove(worker)
            worker.end()
        for job in jobs[: self.count - len(self.busy)]:
            worker = self.idle.pop() if self.idle else self._new()
            worker.give(job)
            self.started += 1
            self.busy[self.started] = worker
            tickets.append(self.started)
        return tickets

    def poll(self, tickets: Sequence[Ticket]) -> Mapping[Ticket, Ended]:
        """Those that have answered or died; waits LOOK_SECONDS for the first."""
        with selectors.DefaultSelector() as waiting:
            for ticket in tickets:
                waiting.register(self.busy[ticket].answers, selectors.EVENT_READ, ticket)
            ended = {key.data: self.busy[key.data].answer() for key, _ in waiting.select(LOOK_SECONDS)}
        for ticket in ended:
            worker = self.busy.pop(ticket)
            if worker.died:
                worker.end()
            else:
                self.idle.append(worker)
        return ended

    def stop(self, tickets: Sequence[Ticket]) -> str:
        """SIGTERM: each worker saves and ends; waits for that."""
        for ticket in tickets:
            self.busy[ticket].process.send_signal(signal.SIGTERM)
        for ticket in tickets:
            self.busy[ticket].answer()
            self.idle.append(self.busy.pop(ticket))
        return ""

    def close(self) -> None:
        """Ends all workers: those without a job by themselves, others by force (after a second Ctrl-C)."""
        for worker in self.busy.values():
            worker.process.kill()
        for worker in (*self.busy.values(), *self.idle):
            worker.end()

    def _new(self) -> _Worker:
        taken = {worker.number for worker in (*self.busy.values(), *self.idle)}
        number = next(i for i in range(self.count) if i not in taken)
        mine, environment = share(number, self.count, cores(), gpus(), os.environ)
        return _Worker(number, _spawn(environment), mine)


class _Worker:
    """A process, the pipe through which it is given jobs, and the one through which it answers."""

    def __init__(self, number: int, process: subprocess.Popen, cores: Sequence[int]):
        self.number, self.process = number, process
        self.answers: IO[bytes] = process.stdout  # pyright: ignore[reportAttributeAccessIssue]
        self.job: Job | None = None
        self.died = False
        self._send(list(cores))

    def give(self, job: Job) -> None:
        self.job = job
        self._send(parcel(job))

    def answer(self) -> Ended:
        """How its job ended; waits for it. A worker that died has closed its pipe."""
        assert self.job is not None
        try:
            return pickle.load(self.answers)
        except (EOFError, pickle.UnpicklingError):
            self.died, code = True, self.process.wait()
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            return Ended(DIED, f"its worker was {how}; see {self.job.log}")

    def end(self) -> None:
        for pipe in (self.process.stdin, self.answers):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()  # pyright: ignore[reportOptionalMemberAccess]
        self.process.wait()

    def _send(self, message: Any) -> None:
        with contextlib.suppress(BrokenPipeError):  # it died; `answer` will say so
            pickle.dump(message, self.process.stdin)  # pyright: ignore[reportArgumentType]
            self.process.stdin.flush()  # pyright: ignore[reportOptionalMemberAccess]


def _spawn(environment: Mapping[str, str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "jaxgpt.launchers.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **environment},
        start_new_session=True,  # Ctrl-C in the terminal is for the launcher, which then tells the workers
    )


# --- shares --------------------------------------------------------------------------------------------------------


def cores() -> list[int]:
    """The cores that this process may use; [] where the system does not say which."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def gpus() -> list[str]:
    """The NVIDIA GPUs that this process may use, without asking JAX, which would take them."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in visible.split(",") if name]
    return [str(i) for i in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]


def share(
    number: int, count: int, cores: Sequence[int], gpus: Sequence[str], environment: Mapping[str, str]
) -> tuple[list[int], dict[str, str]]:
    """The cores of worker `number` of `count`, and the environment that gives it its GPUs.

    Each core and each GPU has one worker while there are enough. Workers that share a GPU also share its memory, of
    which JAX would let the first take most.
    """
    mine = list(cores[number::count]) or [cores[number % len(cores)]] if cores else []
    if not gpus:
        return mine, {}
    own = {"CUDA_VISIBLE_DEVICES": ",".join(gpus[number::count] or [gpus[number % len(gpus)]])}
    sharers = -(-count // len(gpus))
    if sharers > 1 and "XLA_PYTHON_CLIENT_MEM_FRACTION" not in environment:
        own["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{0.9 / sharers:.3f}"
    return mine, own
