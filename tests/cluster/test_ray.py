"""A real Ray: two nodes on this machine, of which a worker and then a node are killed; and the launcher's own Ray."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from conftest import until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]


def kill_tree(process):
    """SIGKILL for a process and all that it started."""
    found = psutil.Process(process.pid)
    for one in (*found.children(recursive=True), found):
        try:
            one.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait(30)


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Two nodes with a core each, that the test may kill; the address."""
    token = tmp_path / "token"
    token.write_text("a" * 64)
    token.chmod(0o600)
    for name, value in {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": token, "RAY_USAGE_STATS_ENABLED": 0}.items():
        monkeypatch.setenv(name, str(value))
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{one.getsockname()[1]}"
    ray = str(Path(sys.executable).parent / "ray")
    common = ["--node-ip-address=127.0.0.1", "--num-cpus=1", "--object-store-memory=80000000", "--block"]
    head = ["--head", f"--port={address.rpartition(':')[2]}", "--include-dashboard=False"]
    log = open(tmp_path / "nodes", "w")  # noqa: SIM115
    nodes = []

    def alive():
        code = f"import ray; ray.init({address!r}, log_to_driver=False); print(ray.cluster_resources().get('CPU'))"
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stdout.strip()

    try:
        for arguments, cores in ((head, "1.0"), ([f"--address={address}"], "2.0")):
            nodes.append(subprocess.Popen([ray, "start", *arguments, *common], stdout=log, stderr=log))
            until(lambda: alive() == cores, f"a cluster of {cores} cores", 90)  # noqa: B023
        yield address, nodes
    finally:
        for node in reversed(nodes):
            if node.poll() is None:
                kill_tree(node)
        log.close()


def test_a_cluster_that_loses_a_worker_and_then_a_node_ends_as_if_nothing_had_happened(cluster, start, check):
    address, (_, second) = cluster
    launch = start("--launcher", "ray", "--address", address)

    def in_the_middle(among):
        """A process that trains runs which have saved, of the processes that are asked about."""
        steps = launch.checkpoints()
        return next((pid for run, pid in launch.owners().items() if pid in among() and steps.get(run)), None)

    everybody = until(lambda: in_the_middle(psutil.pids), "a task in its middle")
    os.kill(everybody, signal.SIGKILL)
    until(lambda: "is started again: WorkerCrashedError" in launch.said(), "the launcher's word on it")

    def of_second():
        return [one.pid for one in psutil.Process(second.pid).children(recursive=True)]

    until(lambda: in_the_middle(of_second), "a task in its middle on the second node")
    kill_tree(second)
    until(lambda: launch.said().count("is started again") == 2, "the launcher's word on the node")
    launch.ends()
    logs = "".join(path.read_text() for path in (launch.folder / "logs").iterdir())
    assert logs.count("goes on from step") >= 2
    check(launch.folder)


def test_our_own_ray_listens_on_loopback_only_and_goes_when_it_is_done(start, check, tmp_path):
    names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_USAGE_STATS_ENABLED")
    assert not any(name in os.environ for name in names)
    launch = start("--launcher", "ray", "--workers", "2", env={"XDG_CONFIG_HOME": str(tmp_path)})
    until(launch.owners, "a task at work")
    family = [psutil.Process(launch.process.pid), *psutil.Process(launch.process.pid).children(recursive=True)]
    assert any("raylet" in one.name() for one in family)
    listening = [c.laddr.ip for one in family for c in one.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert listening
    assert set(listening) <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
    raylet = next(one for one in family if "raylet" in one.name())
    environment = raylet.environ()
    assert environment["RAY_AUTH_MODE"] == "token"
    assert environment["RAY_AUTH_TOKEN_PATH"] == str(tmp_path / "jaxgpt" / "ray-token")
    assert environment["RAY_USAGE_STATS_ENABLED"] == "0"
    # Ctrl-C: the tasks save, the cluster ends, the same command goes on.
    until(launch.checkpoints, "a checkpoint")
    launch.process.send_signal(signal.SIGINT)
    launch.ends(130)
    until(lambda: not any(one.is_running() for one in family), "the end of the cluster", 30)
    launch = start("--launcher", "ray", "--workers", "2", env={"XDG_CONFIG_HOME": str(tmp_path)})
    launch.ends()
    check(launch.folder)
