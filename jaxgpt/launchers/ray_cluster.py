"""Ray: each population a task with its resources, on a cluster of our own on this machine or one that is named.

Our own listens on loopback only, asks for a token that lies in the user's configuration folder, and sends no usage
statistics.
The death of a worker or of a node ends a task with an error; `supervise` then starts it again, as for every launcher,
so Ray's own retries, which do not ask whether a task gets any further, are off.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxgpt.config import BadInput
from jaxgpt.launchers import DIED, LOOK_SECONDS, UNFINISHED, Ended, Job, Resources, Ticket
from jaxgpt.launchers.worker import Parcel, attempt, parcel

STOP_SECONDS = 300.0  # for tasks to save when they are asked to stop
OBJECT_STORE = 100_000_000  # bytes; what passes through it is small, and Ray would take 30 % of the memory


class Ray:
    """The executor. cluster: what stands for the module `ray`, connected; default: the real one."""

    def __init__(self, resources: Resources, at_once: int | None = None, cluster: Any = None):
        self.ours = cluster is None
        self.cluster = _connected(resources.address) if cluster is None else cluster
        self.at_once = at_once
        self.running: set[Any] = set()
        needs = {"num_cpus": resources.cpus, "num_gpus": resources.gpus}
        if resources.memory_gb is not None:
            needs["memory"] = int(resources.memory_gb * 1e9)
        # A process for each task: JAX holds on to the devices that it has seen first.
        self.work = self.cluster.remote(max_retries=0, max_calls=1, **needs)(work)

    def under_way(self) -> Mapping[Ticket, Sequence[str]]:
        """None: Ray ends the tasks of a process that is gone."""
        return {}

    def start(self, jobs: Sequence[Job]) -> Sequence[Ticket]:
        """All of them, or as many as may run at once; Ray queues what has no room."""
        room = len(jobs) if self.at_once is None else self.at_once - len(self.running)
        tickets = [self.work.remote(parcel(job)) for job in jobs[:room]]
        self.running |= set(tickets)
        return tickets

    def poll(self, tickets: Sequence[Ticket]) -> Mapping[Ticket, Ended]:
        """Those that returned, and those whose worker or node died."""
        if not tickets:
            return {}
        ready, _ = self.cluster.wait(list(tickets), num_returns=len(tickets), timeout=LOOK_SECONDS)
        self.running -= set(ready)
        return {ticket: self._ended(ticket) for ticket in ready}

    def stop(self, tickets: Sequence[Ticket]) -> str:
        """Ctrl-C in each task: it saves and ends; waits for that."""
        for ticket in tickets:
            self.cluster.cancel(ticket, force=False)
        self.cluster.wait(list(tickets), num_returns=len(tickets), timeout=STOP_SECONDS)
        return ""

    def close(self) -> None:
        """Leaves the cluster; one of our own ends with that."""
        if self.ours:
            self.cluster.shutdown()

    def _ended(self, ticket: Ticket) -> Ended:
        try:
            return self.cluster.get(ticket)
        except Exception as error:  # of many kinds, from a dead worker to a node that is gone
            first = next((line for line in str(error).splitlines() if line.strip()), "")
            return Ended(DIED, f"{type(error).__name__}: {first.strip()[:200]}")


def work(sent: Parcel) -> Ended:
    """Does a job as a Ray task."""
    ended = attempt(sent)
    if ended.code == UNFINISHED:
        return Ended(UNFINISHED, f"{ended.why} (on {socket.gethostname()})")
    return ended


def token_file() -> Path:
    """The secret that processes of our own clusters show each other; made when it is first asked for, mode 0600."""
    folder = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "jaxgpt"
    path = folder / "ray-token"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        path.chmod(0o600)
        return path
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))
    return path


def environment(address: str | None) -> dict[str, str]:
    """What has to stand in the environment before Ray is imported; what the user has set there stands.

    A cluster that is named decides itself which token it wants.
    """
    own = {"RAY_USAGE_STATS_ENABLED": "0"}
    if address is None:
        own["RAY_AUTH_MODE"] = "token"
        # Ray's switch for macOS and Windows has it listen on loopback alone, anywhere. Asked for 127.0.0.1 as its
        # address it would take the machine's own instead (Ray 2.60, services.resolve_ip_for_localhost).
        own["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        if "RAY_AUTH_TOKEN" not in os.environ and "RAY_AUTH_TOKEN_PATH" not in os.environ:
            own["RAY_AUTH_TOKEN_PATH"] = str(token_file())
    return {name: value for name, value in own.items() if name not in os.environ}


def _connected(address: str | None) -> Any:
    """Ray, connected. Raises BadInput where it is missing or the cluster does not answer."""
    os.environ.update(environment(address))
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise BadInput("launcher=ray needs the package ray: pip install -e '.[ray]'") from None
    if ray.is_initialized():
        raise BadInput("launcher=ray: this process is connected to a Ray cluster already; call ray.shutdown() first")
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        ray.init("local", include_dashboard=False, object_store_memory=OBJECT_STORE, **common)
        return ray
    try:
        ray.init(address, **common)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise BadInput(f"address={address}: no Ray cluster answers there: {reason}") from None
    return ray
