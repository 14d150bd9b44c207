"""What the tests of the command and of the demo share: the smoke reproduction, made once, and a way to call."""

import contextlib
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from experiments.cli import main


@dataclass(frozen=True)
class Said:
    """What a call of the command gave: its exit code and what it wrote."""

    code: int
    out: str
    err: str


def call(*words) -> Said:
    """`jaxgpt words...` in this process."""
    code, out, err = 0, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(word) for word in words])
        except SystemExit as stopped:
            code = stopped.code or 0
    return Said(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def command():
    """Calls `jaxgpt` in this process: `command("train", "model.d_model=8")`."""
    return call


@dataclass(frozen=True)
class Smoke:
    """A finished `jaxgpt reproduce demo --scale smoke --json smoke.json`, called in `home`."""

    home: Path
    said: Said

    @property
    def outcome(self) -> Path:
        """Where it left claims.json and the figure."""
        return self.home / "results/raw/demo/smoke/outcome"

    def json(self, path):
        """The content of a JSON file below `home`; NaN, which is no JSON, fails."""
        return json.loads((self.home / path).read_text(), parse_constant=pytest.fail)


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    home, before = tmp_path_factory.mktemp("smoke"), Path.cwd()
    os.chdir(home)
    try:
        return Smoke(home, call("reproduce", "demo", "--scale", "smoke", "--json", "smoke.json"))
    finally:
        os.chdir(before)


def forbid_training(monkeypatch):
    """Any run that starts to train fails the test."""
    import jaxgpt.launch

    monkeypatch.setattr(jaxgpt.launch, "train_block", lambda block, *_, **__: pytest.fail(f"{block} was trained"))


@pytest.fixture
def no_training(monkeypatch):
    forbid_training(monkeypatch)
