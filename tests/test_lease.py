"""Leases: one owner at a time, whatever dies, hangs or races; nobody waits for the dead."""

import contextlib
import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from jaxgpt import lease
from jaxgpt.lease import acquire, holder
from jaxgpt.store import StoreError

ROOT = Path(lease.__file__).parent.parent


def files(folder):
    return sorted(p.name for p in (folder / "leases").iterdir())


def write(folder, name, generation, age=0.0, **owner):
    """A lease file as another process would have left it, its last heartbeat `age` seconds ago."""
    path = folder / "leases" / f"{name}.{generation}"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(lease._identity() | owner))
    os.utime(path, (time.time() - age,) * 2)
    return path


class Other:
    """Another process that does what it is told, a line of Python at a time, and answers with one line."""

    PROGRAM = """
import sys
from jaxgpt.lease import acquire, holder
for line in sys.stdin:
    exec(line)
    print(flush=True)
"""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.PROGRAM], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def ask(self, line):
        self.tell(line)
        return self.process.stdout.readline().strip()

    def tell(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def end(self):
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


@pytest.fixture
def other():
    process = Other()
    yield process
    process.end()


# --- one process ---------------------------------------------------------------------------------------------------


def test_a_held_lease_is_nobody_elses_and_a_released_one_is_free_at_once(tmp_path):
    first = acquire(tmp_path, "ab")
    assert first.held()
    assert acquire(tmp_path, "ab") is None
    with acquire(tmp_path, "cd") as another:
        assert another.held()
        assert first.held()
    assert not another.held()
    first.release()
    first.release()
    assert not first.held()
    with acquire(tmp_path, "ab") as second:
        assert second.held()
        assert not first.held()
        first.release()
        assert second.held()


def test_names_that_begin_alike_are_different_leases(tmp_path):
    with acquire(tmp_path, "a"), acquire(tmp_path, "a.1"), acquire(tmp_path, "a+"):
        assert acquire(tmp_path, "a") is acquire(tmp_path, "a.1") is acquire(tmp_path, "a+") is None


def test_numbers_never_begin_again_and_old_files_are_cleared(tmp_path):
    for generation in (1, 2, 3):
        with acquire(tmp_path, "ab"):
            assert f"ab.{generation}" in files(tmp_path)
        assert files(tmp_path) == [f"ab.{generation}"]


def test_the_heartbeat_keeps_a_lease_longer_than_it_lasts_without(tmp_path):
    with acquire(tmp_path, "ab", stale_after=1.0) as mine:
        time.sleep(1.5)
        assert acquire(tmp_path, "ab", stale_after=1.0) is None
        assert mine.held()
    assert files(tmp_path) == ["ab.1"]


def test_the_holder_is_told_in_words(tmp_path):
    assert holder(tmp_path, "ab") is None
    with acquire(tmp_path, "ab"):
        host, pid = re.escape(lease._identity()["host"]), os.getpid()
        assert re.fullmatch(f"{host}, pid {pid}, 0 s ago", holder(tmp_path, "ab"))
    assert holder(tmp_path, "ab") is None
    write(tmp_path, "cd", 3, age=7, host="far", pid=9)
    assert re.fullmatch("far, pid 9, [78] s ago", holder(tmp_path, "cd"))
    (tmp_path / "leases" / "ef.1").touch()
    assert holder(tmp_path, "ef") == "a process that has not said its name, 0 s ago"
    write(tmp_path, "gh", 1, age=70, machine="another boot")
    write(tmp_path, "ij", 1, start="dead")
    assert holder(tmp_path, "gh") is holder(tmp_path, "ij") is None  # free for whoever wants it
    assert holder(tmp_path, "gh", stale_after=100) is not None
    assert files(tmp_path) == ["ab.1", "cd.3", "ef.1", "gh.1", "ij.1"]


def test_an_owner_on_another_machine_is_waited_for_until_its_heartbeat_is_stale(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "time", lambda real=time.time: real() + 1000)  # our clock runs ahead of the file server's
    elsewhere = {"machine": "another boot", "pid": 1}
    path = write(tmp_path, "ab", 4, **elsewhere)
    now = path.with_name("clock")
    now.touch()
    for age, free in [(0, False), (50, False), (70, True)]:
        os.utime(path, (now.stat().st_mtime - age,) * 2)
        found = acquire(tmp_path, "ab")
        assert (found is not None) == free
    assert found._generation == 5
    found.release()


def test_a_pid_that_belongs_to_another_process_by_now_is_a_dead_owner(tmp_path):
    alive = write(tmp_path, "ab", 1)
    assert acquire(tmp_path, "ab") is None
    alive.write_text(json.dumps(lease._identity() | {"start": "12"}))
    with acquire(tmp_path, "ab") as mine:
        assert mine.held()


@pytest.mark.parametrize("content", ["", "{", '{"host": "x"}', "[]"])
def test_a_half_written_lease_counts_by_its_age_alone(tmp_path, content):
    path = write(tmp_path, "ab", 1)
    path.write_text(content)
    assert acquire(tmp_path, "ab") is None
    os.utime(path, (time.time() - 61,) * 2)
    with acquire(tmp_path, "ab") as mine:
        assert mine.held()


def test_a_lease_whose_file_vanished_is_not_held(tmp_path):
    mine = acquire(tmp_path, "ab")
    (tmp_path / "leases" / "ab.1").unlink()
    assert not mine.held()
    mine.release()
    assert files(tmp_path) == []


def test_a_full_disk_is_said_and_leaves_no_half_lease(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(StoreError, match="leases: no space left on the disk"):
            acquire(tmp_path, "ab")
    assert files(tmp_path) == []
    with acquire(tmp_path, "ab") as mine:
        assert mine.held()


# --- races, step by step -------------------------------------------------------------------------------------------


def test_who_judged_a_lease_stale_and_slept_gets_nothing_when_it_was_taken_and_given_back_meanwhile(
    tmp_path, monkeypatch
):
    write(tmp_path, "ab", 1, start="dead")
    real = lease._claim

    def sleepy(leases, name, generation):
        monkeypatch.setattr(lease, "_claim", real)
        acquire(tmp_path, "ab").release()
        return real(leases, name, generation)

    monkeypatch.setattr(lease, "_claim", sleepy)
    assert acquire(tmp_path, "ab") is None
    with acquire(tmp_path, "ab") as mine:
        assert mine.held()


def test_who_listed_the_folder_while_generations_changed_backs_out(tmp_path, monkeypatch):
    for _ in range(2):
        acquire(tmp_path, "ab").release()
    with acquire(tmp_path, "ab") as mine:
        (tmp_path / "leases" / "ab.2").unlink()
        real, answers = lease._generations, [[]]
        monkeypatch.setattr(lease, "_generations", lambda *a: answers.pop() if answers else real(*a))
        assert acquire(tmp_path, "ab") is None
        assert mine.held()
        assert files(tmp_path) == ["ab.3"]


@pytest.mark.parametrize("taken_over", [False, True])
def test_an_owner_that_hung_wins_the_next_generation_or_knows_that_it_lost(tmp_path, monkeypatch, taken_over):
    mine = acquire(tmp_path, "ab")
    if taken_over:
        os.utime(tmp_path / "leases" / "ab.1", (0, 0))
        thief = acquire(tmp_path, "ab")
    monkeypatch.setattr(lease, "_clock", lambda real=lease._clock: real() + 100)
    assert mine.held() is (not taken_over)
    assert files(tmp_path) == ["ab.1", "ab.2"]
    # Whoever had judged generation 1 stale before the owner woke comes too late now.
    assert not lease._claim(tmp_path / "leases", "ab", 2)
    if taken_over:
        thief.release()
    mine.release()
    assert len(files(tmp_path)) == 1


# --- many processes ------------------------------------------------------------------------------------------------


def test_of_threads_that_want_the_same_lease_one_gets_it(tmp_path):
    start, won = threading.Barrier(8), []

    def want(name):
        start.wait()
        if found := acquire(tmp_path, name):
            won.append((name, found))

    for name in ("a", "b", "c", "d", "e"):
        threads = [threading.Thread(target=want, args=(name,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [name for name, _ in won] == ["a", "b", "c", "d", "e"]
    for _, found in won:
        found.release()


RACE = """
import os, sys, time
from pathlib import Path
from jaxgpt.lease import acquire
folder = Path(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
mine = []
for i in range(40):  # leases whose owner is dead: one winner each
    if found := acquire(folder, f"stale{i}"):
        mine.append(f"stale{i}")
for _ in range(25):  # one lease that goes round: never two inside
    while (found := acquire(folder, "round")) is None:
        time.sleep(0.0005)
    os.close(os.open(folder / "inside", os.O_CREAT | os.O_EXCL))
    assert found.held()
    os.unlink(folder / "inside")
    found.release()
print(*mine, "rounds", flush=True)
os.kill(os.getpid(), 9)
"""


def test_processes_that_race_for_stale_and_for_passing_leases_never_hold_one_together(tmp_path):
    dead = subprocess.run(
        [sys.executable, "-c", "import json; from jaxgpt.lease import _identity; print(json.dumps(_identity()))"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for i in range(40):  # seen to be dead, or not heard of for long
        owner = json.loads(dead.stdout) | ({"machine": "another boot"} if i % 2 else {})
        write(tmp_path, f"stale{i}", 1, age=61 * (i % 2), **owner)
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, str(tmp_path)],
            cwd=ROOT,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for _ in range(6)
    ]
    for racer in racers:
        racer.stdout.readline()
    for racer in racers:
        racer.stdin.write("\n")
        racer.stdin.flush()
    answers = [racer.communicate() for racer in racers]
    assert [errors for _, errors in answers] == [""] * 6
    words = [word for out, _ in answers for word in out.split()]
    assert sorted(words) == sorted([f"stale{i}" for i in range(40)] + ["rounds"] * 6)


def test_a_lease_of_a_process_killed_by_9_is_free_at_once(tmp_path, other):
    assert other.ask(f"mine = acquire({str(tmp_path)!r}, 'ab'); print(mine.held(), end='')") == "True"
    assert acquire(tmp_path, "ab") is None
    assert f"pid {other.process.pid}," in holder(tmp_path, "ab")
    other.process.kill()
    deadline = time.monotonic() + 5
    while holder(tmp_path, "ab") is not None:
        assert time.monotonic() < deadline
    while (mine := acquire(tmp_path, "ab")) is None:  # not reaped: the dead process is still in the process table
        assert time.monotonic() < deadline
    assert mine.held()
    mine.release()


def test_an_owner_stopped_for_too_long_loses_its_lease_and_knows_it_when_it_goes_on(tmp_path, other):
    assert other.ask(f"mine = acquire({str(tmp_path)!r}, 'ab', 1.0); print(mine.held(), end='')") == "True"
    other.process.send_signal(signal.SIGSTOP)
    assert acquire(tmp_path, "ab", 1.0) is None
    time.sleep(1.2)
    mine = acquire(tmp_path, "ab", 1.0)
    assert mine.held()
    other.process.send_signal(signal.SIGCONT)
    assert other.ask("print(mine.held(), end='')") == "False"
    assert other.ask(f"mine.release(); print(acquire({str(tmp_path)!r}, 'ab', 1.0), end='')") == "None"
    assert mine.held()
    mine.release()


def test_an_owner_stopped_for_too_long_keeps_its_lease_if_nobody_wanted_it(tmp_path, other):
    assert other.ask(f"mine = acquire({str(tmp_path)!r}, 'ab', 1.0); print(mine.held(), end='')") == "True"
    other.process.send_signal(signal.SIGSTOP)
    time.sleep(1.2)
    other.process.send_signal(signal.SIGCONT)
    assert other.ask("print(mine.held(), end='')") == "True"
    assert acquire(tmp_path, "ab", 1.0) is None
    assert files(tmp_path) == ["ab.1", "ab.2"]
