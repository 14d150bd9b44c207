"""Two processes on this machine train one model together, by Gloo over the loopback, as one process does."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("grain")
ROOT = Path(__file__).parents[1]
SECONDS = 240


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def logs(results):
    return "\n".join(f"{path.name}: {path.read_text()[-3000:]}" for path in sorted(results.glob("*.log")))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What two_hosts.py found: {(count, index): its arrays}, of one process alone and of two."""
    results, checkpoints = tmp_path_factory.mktemp("results"), tmp_path_factory.mktemp("checkpoints")
    address, processes = f"127.0.0.1:{free_port()}", {}
    try:
        for count, index in ((1, 0), (2, 0), (2, 1)):
            folder = checkpoints / str(count)
            folder.mkdir(exist_ok=True)
            words = [results, folder, address, count, index]
            with open(results / f"{count}_{index}.log", "wb") as log:
                processes[count, index] = subprocess.Popen(
                    [sys.executable, "-W", "error", "tests/two_hosts.py", *map(str, words)],
                    cwd=ROOT,
                    env=os.environ | {"PYTHONPATH": str(ROOT)},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
        deadline = time.monotonic() + SECONDS
        # All at once: where one fails the other waits for it.
        while any(process.poll() is None for process in processes.values()):
            assert time.monotonic() < deadline, logs(results)
            assert not any(process.poll() for process in processes.values()), logs(results)
            time.sleep(0.2)
        assert not any(process.returncode for process in processes.values()), logs(results)
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    return {key: dict(np.load(results / f"{key[0]}_{key[1]}.npz")) for key in processes}


HOSTS = ((2, 0), (2, 1))


def test_two_processes_train_one_model_as_one_process_does(outcomes):
    alone = outcomes[1, 0]
    leaves = [name for name in alone if name.startswith("leaf_")]
    assert len(leaves) > 10
    for host in HOSTS:
        assert outcomes[host]["devices"] == 2
        for name in leaves:
            np.testing.assert_allclose(outcomes[host][name], alone[name], rtol=0, atol=1e-5)
        for name in ("train_loss_0", "train_loss_1"):
            np.testing.assert_allclose(outcomes[host][name], alone[name], rtol=0, atol=1e-5)
            assert np.isfinite(alone[name]).sum() == 3  # the steps that process 0 asked for


def test_each_host_reads_its_own_rows_and_together_they_read_the_batch(outcomes):
    assert [list(outcomes[host]["rows"]) for host in HOSTS] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    for name in ("batches_0", "batches_1"):
        halves = [outcomes[host][name] for host in HOSTS]
        assert [half.shape for half in halves] == [(3, 4, 9)] * 2
        np.testing.assert_array_equal(np.concatenate(halves, axis=1), outcomes[1, 0][name])


def test_process_0_writes_checkpoints_and_all_read_them(outcomes):
    for host in HOSTS:
        assert outcomes[host]["same"]
        assert outcomes[host]["meta_writer"] == 0
        assert list(outcomes[host]["steps"]) == [6]
        assert outcomes[host]["nothing"]


def test_a_save_that_fails_on_process_0_fails_on_all(outcomes):
    assert "Not a directory" in str(outcomes[1, 0]["refused"])
    assert "Not a directory" in str(outcomes[2, 0]["refused"])
    assert "process 0 could not save" in str(outcomes[2, 1]["refused"])


def test_a_signal_to_one_host_reaches_all_and_process_0_decides(outcomes):
    assert [bool(outcomes[host]["signalled"]) for host in HOSTS] == [False, True]
    assert [bool(outcomes[host]["before"]) for host in HOSTS] == [False, False]
    assert [bool(outcomes[host]["after"]) for host in HOSTS] == [True, True]
    assert [int(outcomes[host]["agreed"]) for host in HOSTS] == [10, 10]
    assert [bool(outcomes[host]["writer"]) for host in HOSTS] == [True, False]
