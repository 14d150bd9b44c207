"""A real Slurm: munged, slurmctld and slurmd on this machine, with a configuration of their own and no accounting.

Each test ends the daemons that it started, by their process ids. Needs root, and what install.sh installs.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess

import pytest
from conftest import STEPS, until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

CONFIGURATION = """
ClusterName=jaxgpt
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
# A requeued job waits until its old credentials have run out, else two minutes.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_min_interval=100000,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=10
JobRequeue=1
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=1000 State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=60 State=UP
"""


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def run(*command):
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout


@pytest.fixture
def slurm(tmp_path_factory, monkeypatch):
    """Slurm is up while a test runs."""
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}:/usr/sbin:/sbin")
    for program in ("munged", "slurmctld", "slurmd", "sbatch", "squeue"):
        assert shutil.which(program), f"{program} is missing: run tests/cluster/install.sh"
    assert os.getuid() == 0, "slurmd has to be started by root"
    folder = tmp_path_factory.mktemp("slurm")
    for part in ("state", "spool"):
        (folder / part).mkdir()
    (folder / "munge.key").write_bytes(secrets.token_bytes(128))
    (folder / "munge.key").chmod(0o600)
    host = socket.gethostname().partition(".")[0]
    text = CONFIGURATION.format(host=host, folder=folder, ports=free_ports(2))
    (folder / "slurm.conf").write_text(text)
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    names = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid", "log-file": "munge.log",
             "seed-file": "munge.seed"}  # fmt: skip
    munge = ["munged", "--foreground", "--force", *(f"--{flag}={folder / name}" for flag, name in names.items())]
    log, daemons = open(folder / "daemons.log", "w"), []  # noqa: SIM115

    def start(*command):
        daemons.append(subprocess.Popen(command, stdout=log, stderr=log))

    try:
        start(*munge)
        until((folder / "munge.socket").exists, "munged", 20)
        start("slurmctld", "-D", "-c")
        start("slurmd", "-D", "-c", "-N", host)
        until(lambda: "idle" in run("sinfo", "--noheader", "--format=%T"), "an idle node", 60)
        yield
    finally:
        run("scancel", "--user=root", "--full", "--signal=KILL")
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in reversed(daemons):
            daemon.wait(30)
        log.close()


def tasks(states):
    """Array tasks in these states, "12_0" and so on."""
    listed = (line.split() for line in run("squeue", "--noheader", "--array", "--format=%F_%K %T").splitlines())
    return [name for name, state in listed if state in states.split()]


def restarts(task):
    return int(re.search(r"Restarts=(\d+)", run("scontrol", "show", "job", task))[1])


def array_runs(launch, task):
    """The runs of a task, as the launcher wrote them down."""
    return json.loads((launch.folder / "slurm" / "jobs.json").read_text())[task]


@pytest.mark.usefixtures("slurm")
def test_an_array_of_populations_is_disturbed_in_every_way_and_ends_as_if_nothing_had_happened(start, check):
    launch = start("--launcher", "slurm", "--job-minutes", "10", "--partition", "debug")
    until(lambda: len(tasks("RUNNING PENDING")) == 4, "an array of four")
    array = tasks("RUNNING PENDING")[0].partition("_")[0]

    def in_the_middle(*but):
        """A task that trains: it has saved, and its runs are not done."""

        def trains(task):
            return all(0 < launch.checkpoints().get(name, 0) < STEPS for name in array_runs(launch, task))

        def one():
            return next((task for task in tasks("RUNNING") if task not in but and trains(task)), None)

        return until(one, "a task in its middle")

    # What Slurm sends ahead of the time limit: the job saves and puts itself back in the queue.
    first = in_the_middle()
    with contextlib.suppress(subprocess.TimeoutExpired):  # it tries again when it finds the job requeued
        subprocess.run(["scancel", "--signal=USR2", first], timeout=3, check=False)
    until(lambda: restarts(first) == 1, "a requeue of the first task")
    # An operator puts another one back.
    second = in_the_middle(first)
    run("scontrol", "requeue", second)
    until(lambda: restarts(second) == 1, "a requeue of the second task")
    # Ctrl-C for the one who waits: the jobs go on, and the same command waits for them.
    launch.process.send_signal(signal.SIGINT)
    launch.ends(130)
    assert re.search(rf"jobs go on in Slurm \(`scancel {array}` ends them\); the same command", launch.said())
    until(lambda: tasks("RUNNING PENDING"), "a job that nobody waits for")
    launch = start("--launcher", "slurm", "--job-minutes", "10", "--partition", "debug")
    until(lambda: "of an earlier launch" in launch.said(), "the second launch found them")
    # One is killed without a word: it is submitted again.
    third = in_the_middle()
    os.kill(launch.owners()[array_runs(launch, third)[0]], signal.SIGKILL)
    launch.ends()
    assert f"Slurm ended its job {third}" in launch.said()
    submitted = {name.partition("_")[0] for name in os.listdir(launch.folder / "slurm") if name.endswith("_log.out")}
    assert submitted == {array, str(int(array) + 4)}, "what still ran was submitted again, or what died was not"
    for task in (first, second, third):
        log = (launch.folder / "logs" / f"{array_runs(launch, task)[0]}.log").read_text()
        assert "goes on from step" in log
    check(launch.folder)
