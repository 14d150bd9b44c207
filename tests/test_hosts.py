"""Two processes on this machine train one model together, by Gloo over the loopback, as one process does."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from two_hosts import STOP_AT, SWEEP_STEPS, configs

from jaxgpt import checkpoint, store, sweep
from jaxgpt.launch import plan

pytest.importorskip("grain")
ROOT = Path(__file__).parents[1]
SECONDS = 240


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def logs(results):
    return "\n".join(f"{path.name}: {path.read_text()[-3000:]}" for path in sorted(results.glob("*.log")))


def run_hosts(what, folders, results, hosts):
    """Runs two_hosts.py as each (count, index) of `hosts`, all at once; `folders` by count."""
    address, processes = f"127.0.0.1:{free_port()}", []
    try:
        for count, index in hosts:
            words = [what, results, folders[count], address, count, index]
            with open(results / f"{what}_{count}_{index}.log", "wb") as log:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "-W", "error", "tests/two_hosts.py", *map(str, words)],
                        cwd=ROOT,
                        env=os.environ | {"PYTHONPATH": str(ROOT)},
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )
                )
        deadline = time.monotonic() + SECONDS
        # All at once: where one fails the other waits for it.
        while any(process.poll() is None for process in processes):
            assert time.monotonic() < deadline, logs(results)
            assert not any(process.poll() for process in processes), logs(results)
            time.sleep(0.2)
        assert not any(process.returncode for process in processes), logs(results)
    finally:
        for process in processes:
            process.kill()
            process.wait()


# --- the parts of a training ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What two_hosts.py found: {(count, index): its arrays}, of one process alone and of two."""
    results, hosts = tmp_path_factory.mktemp("results"), ((1, 0), (2, 0), (2, 1))
    folders = {count: tmp_path_factory.mktemp("checkpoints") for count in (1, 2)}
    run_hosts("steps", folders, results, hosts)
    return {(count, index): dict(np.load(results / f"steps_{count}_{index}.npz")) for count, index in hosts}


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


# --- whole sweeps --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory, random_text):
    """Holds a folder for each sweep, and the corpus."""
    folder = tmp_path_factory.mktemp("sweeps")
    shutil.copy(random_text, folder / "letters.txt")
    return folder


@pytest.fixture(scope="module")
def swept(tmp_path_factory, folder):
    """What the two processes say of their sweeps."""
    results = tmp_path_factory.mktemp("results")
    run_hosts("sweeps", {2: folder}, results, HOSTS)
    return [json.loads((results / f"sweeps_2_{index}.json").read_text()) for index in (0, 1)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory, folder):
    """{streamed or resident: the folder of the same sweep by one process, each model on one device}"""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("resident", "streamed")}
    for name, own in folders.items():
        sweep(configs(folder / "letters.txt", name == "streamed"), own, progress=False)
    return folders


def losses(folder, name="final_loss"):
    return {row["run_id"]: row[name] for _, row in store.load_runs(folder).iterrows()}


@pytest.mark.parametrize(("name", "runs"), [("resident", 2), ("streamed", 1)])
def test_both_processes_return_the_finished_sweep_of_one_process(swept, alone, folder, name, runs):
    expected = losses(alone[name])
    assert len(expected) == runs
    for found in swept:
        assert [row["status"] for row in found[name]] == ["done"] * runs
        assert {row["run_id"]: row["final_loss"] for row in found[name]} == pytest.approx(expected, abs=1e-5)
    assert swept[0][name] == swept[1][name]
    for run_id in expected:
        ours, theirs = (store.read_curve(at, run_id) for at in (folder / name, alone[name]))
        assert [point["step"] for point in ours] == list(range(1, SWEEP_STEPS + 1))  # by one process, once
        for loss in ("train_loss", "grad_norm"):
            np.testing.assert_allclose([p[loss] for p in ours], [p[loss] for p in theirs], rtol=0, atol=1e-5)


def test_a_checkpoint_of_two_processes_is_read_by_one(swept, alone, folder):
    assert len(swept) == 2
    for run_id in losses(alone["resident"]):
        (ours, meta), (theirs, _) = (
            checkpoint.restore_latest(at / "checkpoints" / run_id, None, pytest.fail)
            for at in (folder / "resident", alone["resident"])
        )
        assert meta["step"] == SWEEP_STEPS
        leaves = [jax.tree_util.tree_leaves_with_path(state) for state in (ours, theirs)]
        for (path, leaf), (same, other) in zip(*leaves, strict=True):
            assert path == same
            np.testing.assert_allclose(leaf, other, rtol=0, atol=1e-5)


def test_a_signal_to_process_1_ends_both_and_one_process_without_a_layout_goes_on(swept, alone, folder, capsys):
    for found in swept:
        signum, message, seconds = found["interrupted"]
        assert signum == signal.SIGTERM
        assert message == f"1 of 2 runs are done; {folder / 'stopped'} holds the state"
        assert seconds < 30
    runs = configs(folder / "letters.txt")
    _, second = (run.id for run in plan(runs, folder / "stopped"))
    assert checkpoint.steps(folder / "stopped" / "checkpoints" / second)[-1] == STOP_AT
    sweep(runs, folder / "stopped")
    assert f"goes on from step {STOP_AT}" in "".join(capsys.readouterr())
    assert losses(folder / "stopped") == pytest.approx(losses(alone["resident"]), abs=1e-5)
    steps = [point["step"] for point in store.read_curve(folder / "stopped", second)]
    assert steps == list(range(1, SWEEP_STEPS + 1))


def test_a_folder_that_only_process_0_cannot_make_ends_both(swept):
    (kind, message, _), (other, *_) = (found["file"] for found in swept)
    assert (kind, other) == ("BadInput", "StoreError")
    assert "is a file; a folder is needed" in message


@pytest.mark.parametrize("call", ["posix_fallocate", "fsync"])  # of a checkpoint; of the curve before it
def test_a_disk_that_is_full_for_process_0_ends_both_and_they_can_go_on_together(swept, alone, call):
    (kind, message, _), (other, *_) = (found[call] for found in swept)
    assert (kind, other) == ("StoreError", "StoreError")
    assert "no space left on the disk" in message
    expected = losses(alone["resident"])
    for found in swept:
        (again,) = found[f"{call}_again"]
        assert again["final_loss"] == pytest.approx(expected[again["run_id"]], abs=1e-5)
