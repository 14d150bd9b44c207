"""What the tests on a real Slurm and a real Ray share: a sweep that is long enough to be disturbed, run by the command,
and the table of the same sweep that nothing happened to.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pandas
import pytest

from jaxgpt import load

VOLATILE = ["wall_seconds", "tokens_per_second", "mfu", "code_version"]
AXES = {"model.d_model": [16, 32], "train.batch_size": [4, 6], "train.seed": [0, 1]}  # 8 runs in 4 populations
STEPS = 8000  # enough for the disturbances to fall in the middle of runs


def until(condition, what, seconds=120):
    """Waits for something, and gives what it is."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"{what} did not happen within {seconds} s"
        time.sleep(0.05)
    return found


@pytest.fixture(scope="session")
def settings(random_text):
    """Of the sweep, as words of the command."""
    fixed = {"data.corpus": random_text, "model.n_layers": 1, "model.n_heads": 1, "model.context": 16,
             "train.steps": STEPS, "train.log_every": 200, "train.eval_every": 2000, "train.eval_windows": 10,
             "train.checkpoint_every": 400}  # fmt: skip
    axes = {name: ",".join(map(str, values)) for name, values in AXES.items()}
    return [f"{name}={value}" for name, value in (fixed | axes).items()]


@pytest.fixture(scope="session")
def expected(settings, tmp_path_factory):
    """The table of an undisturbed sweep on this machine, in one process."""
    folder = tmp_path_factory.mktemp("undisturbed")
    command = [*JAXGPT, "sweep", *settings, "--out", str(folder)]
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": "1"}  # as each job of a cluster has it
    subprocess.run(command, check=True, timeout=600, stdout=subprocess.DEVNULL, env=env)
    return load(folder)[0]


JAXGPT = [sys.executable, "-c", "from experiments.cli import main; main()"]


@dataclass
class Launch:
    """A launch under way: the command, its folder, and what it says."""

    command: list
    folder: Path
    log: Path
    process: subprocess.Popen

    def checkpoints(self):
        """Newest step of each run that is not done."""
        done = {path.stem for path in self.folder.glob("runs/*.json")}
        found = {}
        for path in self.folder.glob("checkpoints/*/step_*"):
            if path.parent.name not in done:
                found[path.parent.name] = max(found.get(path.parent.name, 0), int(path.name.removeprefix("step_")))
        return found

    def owners(self):
        """The process that trains each run, from its lease."""
        found = {}
        for path in sorted(self.folder.glob("leases/*.*"), key=lambda path: int(path.suffix[1:] or 0)):
            try:
                found[path.stem] = json.loads(path.read_text())["pid"]
            except (ValueError, OSError, TypeError):
                found.pop(path.stem, None)
        done = {path.stem for path in self.folder.glob("runs/*.json")}
        return {run: pid for run, pid in found.items() if run not in done and run != "sweep"}

    def said(self):
        return self.log.read_text()

    def ends(self, code=0, seconds=400):
        assert self.process.wait(seconds) == code, self.said()


@pytest.fixture
def start(settings, tmp_path):
    """Starts the sweep by the command, in a folder of the test's own; again: goes on in the same."""
    launches = []

    def started(*flags, env=None):
        folder, log = tmp_path / "sweep", tmp_path / f"said-{len(launches)}"
        command = [*JAXGPT, "sweep", *settings, "--out", str(folder), *flags]
        with open(log, "w") as said:
            process = subprocess.Popen(command, stdout=said, stderr=said, env={**os.environ, **(env or {})})
        launches.append(Launch(command, folder, log, process))
        return launches[-1]

    yield started
    for launch in launches:
        if launch.process.poll() is None:
            launch.process.send_signal(signal.SIGTERM)
            launch.process.wait(60)


@pytest.fixture
def check(expected):
    """Asserts that a folder's table is the undisturbed one, bit for bit; that no run is lost and none stands twice."""

    def checked(folder):
        runs, curves = load(folder)
        assert sorted(runs["run_id"]) == sorted(expected["run_id"])
        assert runs["run_id"].is_unique
        assert not curves.duplicated(["run_id", "step"]).any()
        assert (curves.groupby("run_id")["step"].count() == STEPS // 200).all()
        tables = [t.drop(columns=VOLATILE, errors="ignore").sort_values("run_id").reset_index(drop=True)
                  for t in (runs, expected)]  # fmt: skip
        pandas.testing.assert_frame_equal(*tables, check_exact=True)

    return checked
