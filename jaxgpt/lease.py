"""Leases: who works on a run, agreed through files in a shared folder, with no lock and no server.

`leases/<name>.<generation>` is made with O_CREAT|O_EXCL, which one process wins. The highest generation owns; taking
over a stale lease n means winning generation n + 1, so of all that judged n stale one gets it. Generations only grow:
a released lease stays as a tombstone (a file saying "released"), because if numbers began again, a process that had
judged the old number 1 could not tell it from a new one.

The file's mtime is the heartbeat, and its age is measured against a file freshly made in the same folder, so clocks of
different machines need not agree. An owner that was held up so long that somebody may have judged it stale (SIGSTOP, a
hanging disk) must win the next generation itself before it believes that it still holds.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import threading
import time
from pathlib import Path
from typing import Any

from jaxgpt.store import store_error

STALE_AFTER = 60.0  # seconds without a heartbeat
RELEASED = b"released\n"


class Lease:
    """A lease that this process holds, from `acquire`. A daemon thread keeps it alive; leaving a `with` releases it."""

    def __init__(self, folder: Path, name: str, generation: int, stale_after: float, born: float) -> None:
        self.name = name
        self._folder, self._generation, self._stale_after = folder, generation, stale_after
        self._beat = born  # when the heartbeat was last known to be good, in seconds of _clock()
        self._gone = False
        self._lock, self._stop = threading.RLock(), threading.Event()
        self._thread = threading.Thread(target=self._keep, name=f"lease {name}", daemon=True)
        self._thread.start()

    def held(self) -> bool:
        """Whether this process still owns the lease, asked of the disk. Ask before writing what the lease protects.

        False for good once somebody took it over, the file vanished, or it was released.
        """
        with self._lock:
            if self._gone:
                return False
            now = _clock()
            try:
                os.utime(_path(self._folder, self.name, self._generation))
                taken = _path(self._folder, self.name, self._generation + 1).exists()
                # Asked after the disk answered: it may be the disk that took so long.
                if not taken and _clock() - self._beat > self._stale_after / 2:
                    taken = not _claim(self._folder, self.name, self._generation + 1)
                    self._generation += 1
            except FileNotFoundError:
                taken = True
            except OSError:  # the disk does not answer; until half of stale_after nobody can have judged us stale
                return now - self._beat < self._stale_after / 2
            self._gone, self._beat = taken, now
            return not taken

    def release(self) -> None:
        """Gives the lease back, at once and for good. Does nothing if it is no longer held."""
        self._stop.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        with self._lock:
            if not self.held():
                return
            self._gone = True
            try:
                # In place: a rename would hide the highest generation from a process that is listing the folder.
                descriptor = os.open(_path(self._folder, self.name, self._generation), os.O_WRONLY)
                try:
                    os.write(descriptor, RELEASED)
                    os.ftruncate(descriptor, len(RELEASED))
                finally:
                    os.close(descriptor)
                for generation in _generations(self._folder, self.name):  # ascending: an old owner's own goes first
                    if generation < self._generation:
                        _path(self._folder, self.name, generation).unlink(missing_ok=True)
            except OSError:
                return  # then it goes stale by itself

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.release()

    def _keep(self) -> None:
        while not self._stop.wait(self._stale_after / 6):
            self.held()
            if self._gone:
                return


def acquire(folder: Path | str, name: str, stale_after: float = STALE_AFTER) -> Lease | None:
    """The lease `name` of a sweep folder, or None while somebody else (or this process already) holds it.

    A lease is free when nobody has it, when its owner died on this machine (seen at once), and when it has had no
    heartbeat for `stale_after` seconds; all processes of a sweep use the same value. Whoever gets a lease must look
    again whether the work is still to be done. Raises StoreError when the disk is full or refuses.
    """
    leases = Path(folder) / "leases"
    try:
        leases.mkdir(parents=True, exist_ok=True)
        highest = max(_generations(leases, name), default=0)
        if highest and not _free(_path(leases, name, highest), stale_after):
            return None
        born = _clock()
        if not _claim(leases, name, highest + 1):
            return None
        # The first listing may have run while generations were changing, and missed the highest.
        if max(_generations(leases, name), default=0) > highest + 1:
            _path(leases, name, highest + 1).unlink(missing_ok=True)
            return None
    except OSError as error:
        raise store_error(leases, error) from error
    return Lease(leases, name, highest + 1, stale_after, born)


def holder(folder: Path | str, name: str, stale_after: float = STALE_AFTER) -> str | None:
    """Who holds a lease, in words such as "host, pid 123, 4 s ago" (its last heartbeat).

    None if it is free, as `acquire` sees it: also when its owner died or has had no heartbeat for `stale_after` s.
    """
    leases = Path(folder) / "leases"
    try:
        path = _path(leases, name, max(_generations(leases, name), default=0))
        if _free(path, stale_after):
            return None
        owner, age = _read(path), _age(path)
    except OSError:
        return None
    if owner == "released":  # just now
        return None
    who = f"{owner['host']}, pid {owner['pid']}" if isinstance(owner, dict) else "a process that has not said its name"
    return f"{who}, {max(age, 0):.0f} s ago"


# --- files ---------------------------------------------------------------------------------------------------------


def _path(leases: Path, name: str, generation: int) -> Path:
    return leases / f"{name}.{generation}"


def _generations(leases: Path, name: str) -> list[int]:
    """Generations on disk, ascending; [] without a folder."""
    pattern = re.compile(re.escape(name) + r"\.(\d+)")
    try:
        return sorted(int(match[1]) for entry in os.listdir(leases) if (match := pattern.fullmatch(entry)))
    except FileNotFoundError:
        return []


def _claim(leases: Path, name: str, generation: int) -> bool:
    """Wins a generation, or finds that somebody has."""
    path = _path(leases, name, generation)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return False
    try:
        os.write(descriptor, json.dumps(_identity()).encode())
    except OSError:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)
    return True


def _read(path: Path) -> dict[str, Any] | str | None:
    """The owner; "released"; or None for a half-written file, whose owner was killed between create and write."""
    data = path.read_bytes()
    if data.startswith(RELEASED):
        return "released"
    try:
        owner = json.loads(data)
    except ValueError:
        return None
    return owner if isinstance(owner, dict) and {"host", "pid", "start"} <= owner.keys() else None


def _free(path: Path, stale_after: float) -> bool:
    """Whether the lease in this file may be taken over."""
    try:
        owner = _read(path)
        if owner == "released" or (isinstance(owner, dict) and _dead(owner)):
            return True
        return _age(path) > stale_after
    except FileNotFoundError:
        return False  # replaced while we looked; whoever asks again sees what there is then


def _age(path: Path) -> float:
    """Seconds since the last heartbeat, by the clock of the machine that keeps the files."""
    clock = path.with_name(f".clock.{secrets.token_hex(8)}")
    clock.touch()
    try:
        return clock.stat().st_mtime - path.stat().st_mtime
    finally:
        clock.unlink(missing_ok=True)


# --- processes -----------------------------------------------------------------------------------------------------


def _identity() -> dict[str, Any]:
    """This process. Host, boot and pid namespace together say where its pid means something; start, since when."""
    return {"host": socket.gethostname(), "machine": _machine(), "pid": os.getpid(), "start": _start(os.getpid())}


def _machine() -> str:
    try:  # containers may share a host name, and one that is booted again has other processes under the same pids
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + " " + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _dead(owner: dict[str, Any]) -> bool:
    """True only if the owner's pid means something here and that process is gone: dead, a zombie, or another one."""
    if owner["host"] != socket.gethostname() or owner.get("machine") != _machine():
        return False
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass  # alive, and somebody else's
    start = _start(owner["pid"])
    return start is not None and start != owner["start"]


def _start(pid: int) -> str | None:
    """When a process started, in ticks since boot; "zombie" once it is dead but not reaped; None: unknown here."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return "zombie" if fields[0] in "ZX" else fields[19]


def _clock() -> float:
    """Seconds that also pass while the machine sleeps, since those age a heartbeat too."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()
