"""What other processes run: `attempt`, which does a job, and the worker process of the local launcher around it.

`python -m jaxgpt.launchers.worker` takes jobs from stdin until it is closed. Messages are pickles. In: the cores that
it may use, then parcels. Out, on stdout: an `Ended` for each.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import sys
import threading
import traceback
from dataclasses import dataclass
from pathlib import Path

from jaxgpt.config import BadInput
from jaxgpt.launchers import DIED, REFUSED, UNFINISHED, Ended, Job, execute
from jaxgpt.store import StoreError


@dataclass(frozen=True)
class Parcel:
    """A job on its way, closed: where it comes from is set up before it is opened, so that it finds what it names."""

    log: str
    folder: str  # that the sender was in: relative paths begin there
    path: tuple[str, ...]  # where the sender finds modules
    job: bytes


def parcel(job: Job) -> Parcel:
    """Closes a job for another process."""
    return Parcel(str(job.log), os.getcwd(), tuple(sys.path), pickle.dumps(job))


def attempt(sent: Parcel) -> Ended:
    """Does a job and says how it ended, whatever happened. What it prints, and tracebacks, go to its log."""
    try:
        _say_into(Path(sent.log))
        os.chdir(sent.folder)
        sys.path += [entry for entry in sent.path if entry not in sys.path]
        code = execute(pickle.loads(sent.job))
        return Ended(code, "it was asked to stop, and saved" if code == UNFINISHED else "")
    except (BadInput, StoreError) as error:
        return Ended(REFUSED, " ".join(str(error).split()))
    except Exception as error:
        traceback.print_exc()
        return Ended(DIED, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}; see {sent.log}")


def main() -> None:
    """Does jobs until stdin is closed. When that happens in the middle of one (the launcher is gone), it is saved."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a job prints must not look like an answer
    if cores := pickle.load(sys.stdin.buffer):
        os.sched_setaffinity(0, cores)
    inbox: queue.SimpleQueue[Parcel | None] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(inbox,), daemon=True).start()
    while (sent := inbox.get()) is not None:
        pickle.dump(attempt(sent), answers)
        answers.flush()


def _listen(inbox: queue.SimpleQueue[Parcel | None]) -> None:
    try:
        while True:
            inbox.put(pickle.load(sys.stdin.buffer))
    except EOFError:
        inbox.put(None)
        os.kill(os.getpid(), signal.SIGTERM)


def _say_into(log: Path) -> None:
    """From here on, stdout and stderr of this process, whoever writes to them, go to the end of a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


if __name__ == "__main__":
    main()
